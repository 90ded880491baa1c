package persister

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// place is all the model knows of a record. attempts tells records of one
// place apart.
type place struct {
	subscriber int64
	ready      bool
	at         int64
	terminal   bool
	attempts   int
}

// model is what must be in Redis.
type model map[string]place

// write says what becomes of a record, and remembers it.
func (m model) write(id string, p place) outcome {
	have, ok := m[id]
	switch {
	case p.at <= time.Now().Add(-time.Hour).UnixNano():
		return expired
	case ok && have.subscriber != p.subscriber:
		return foreign
	case ok && larger(have, p):
		return superseded
	}
	m[id] = p
	return written
}

// larger is a over b, strictly.
func larger(a, b place) bool {
	if a.ready != b.ready {
		return a.ready
	}
	if a.at != b.at {
		return a.at > b.at
	}
	return a.terminal && !b.terminal
}

func placeOf(r record.Record) place {
	return place{r.SubscriberID, r.Status == record.Ready, r.AcceptedAt.UnixNano(), r.Status.Terminal(), r.Attempts}
}

// stored is what Redis holds.
func stored(t *testing.T, rdb redis.UniversalClient) model {
	t.Helper()
	m := model{}
	keys, err := rdb.Keys(t.Context(), record.KeyPrefix+"*").Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		b, err := rdb.Get(t.Context(), k).Bytes()
		if err != nil {
			t.Fatal(err)
		}
		r, err := record.Decode(b)
		if err != nil || record.Key(r.RequestID) != k {
			t.Fatalf("%s: %v", k, err)
		}
		m[r.RequestID] = placeOf(r)
	}
	return m
}

// message is one message of the streams, as a handler gets it.
type message struct {
	id      string
	place   place
	pending bool // of FP_INGEST
	subject string
	data    []byte
}

func (m message) delivery() *streams.Delivery {
	return &streams.Delivery{Subject: m.subject, Header: nats.Header{}, Data: m.data, AcceptedAt: time.Unix(0, m.place.at).UTC()}
}

// replayed is a copy of the message on FP_BACKFILL.
func (m message) replayed() *streams.Delivery {
	d := m.delivery()
	d.Replay = "r1"
	d.Header = d.CopyHeader()
	return d
}

func ingested(id string, subscriber int64, at time.Duration) message {
	r := rec(id, subscriber, record.Pending, at)
	body, err := json.Marshal(streams.Event{Schema: 1, RequestID: id, SubscriberID: subscriber, SessionID: r.SessionID, UserID: r.UserID})
	if err != nil {
		panic(err)
	}
	return message{id, placeOf(r), true, streams.IngestSubject(subscriber), body}
}

func ended(id string, subscriber int64, status record.Status, at time.Duration, attempts int) message {
	r := rec(id, subscriber, status, at)
	r.Attempts = attempts
	body, err := r.Encode()
	if err != nil {
		panic(err)
	}
	return message{id, placeOf(r), false, streams.EnrichedSubject(subscriber), body}
}

// arbitrary returns a message of one of a few ids, subscribers and times, so
// that they meet.
func arbitrary(rng *rand.Rand, round, subscribers int) message {
	id, sub := fmt.Sprintf("%d-%d", round, rng.IntN(3)), 1+rng.Int64N(int64(subscribers))
	at := time.Duration(rng.IntN(3))
	if rng.IntN(20) == 0 {
		at -= 2 * time.Hour // past its life
	}
	statuses := []record.Status{record.Pending, record.Ready, record.NotFound, record.Rejected, record.Failed}
	s := statuses[rng.IntN(len(statuses))]
	if s == record.Pending {
		return ingested(id, sub, at)
	}
	return ended(id, sub, s, at, 1+rng.IntN(1000))
}

// newHandler returns a handler that tries batches of many or more without the
// script.
func newHandler(rdb redis.UniversalClient, many int) *handler {
	s := newStore(rdb, time.Hour)
	s.many = many
	return &handler{store: s, detail: EventLean, metrics: newMetrics(prometheus.NewRegistry()), now: time.Now}
}

func seeded(t *testing.T) *rand.Rand {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return rand.New(rand.NewPCG(seed, 0))
}

// decided reports whether a decision fits what became of a write: of one past
// its life Redis is not asked, which says nothing about Redis.
func decided(d streams.Decision, o outcome, givesUp bool) bool {
	return d.GivesUp() == givesUp && d.IsMoved() == (o == expired) && d.IsDone() == (o != expired && !givesUp)
}

// Whatever order messages come in, however they are batched, redelivered,
// replayed, claimed by another subscriber, and cut by restarts of the
// persister and by a Redis that forgets: what stands is what the model says,
// after each step.
func TestRecordsEqualModelInAnyInterleaving(t *testing.T) {
	t.Parallel()
	rdb := client(t, streamstest.NewRedis(t).URL())
	rng := seeded(t)
	for round := range 150 {
		h, m := newHandler(rdb, 1+rng.IntN(4)), model{}
		if err := rdb.FlushDB(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		var history []message
		for range 1 + rng.IntN(25) {
			switch rng.IntN(20) {
			case 0: // the persister restarts
				h = newHandler(rdb, 1+rng.IntN(4))
			case 1: // a server that was failed over to knows no scripts
				rdb.ScriptFlush(t.Context())
			case 2: // Redis restarts and has forgotten all
				rdb.FlushDB(t.Context())
				clear(m)
			}
			var marks, records []message
			var markBatch, recordBatch []*streams.Delivery
			for range 1 + rng.IntN(8) {
				msg, again := arbitrary(rng, round, 2), (*streams.Delivery)(nil)
				if len(history) > 0 && rng.IntN(2) == 0 {
					msg = history[rng.IntN(len(history))]
					if !msg.pending && rng.IntN(2) == 0 {
						again = msg.replayed()
					}
				}
				if again == nil {
					again = msg.delivery()
				}
				history = append(history, msg)
				if msg.pending {
					marks, markBatch = append(marks, msg), append(markBatch, again)
				} else {
					records, recordBatch = append(records, msg), append(recordBatch, again)
				}
			}
			for i, d := range h.mark(t.Context(), markBatch) {
				if o := m.write(marks[i].id, marks[i].place); !decided(d, o, false) {
					t.Fatalf("a marker is %s: decision %+v", o, d)
				}
			}
			for i, d := range h.persist(t.Context(), recordBatch) {
				if o := m.write(records[i].id, records[i].place); !decided(d, o, o == foreign) {
					t.Fatalf("%s: decision %+v", o, d)
				}
			}
			if got := stored(t, rdb); !maps.Equal(got, m) {
				t.Fatalf("round %d: stored %v, want %v", round, got, m)
			}
		}
	}
}

// Several replicas write at once, each message by more than one of them: the
// largest stands.
func TestRecordsEqualModelWithReplicas(t *testing.T) {
	t.Parallel()
	rdb := client(t, streamstest.NewRedis(t).URL())
	rng := seeded(t)
	for round := range 60 {
		m := model{}
		msgs := make([]message, 1+rng.IntN(30))
		for i := range msgs {
			msgs[i] = arbitrary(rng, round, 1)
			m.write(msgs[i].id, msgs[i].place)
		}
		var replicas sync.WaitGroup
		for range 4 {
			h, own := newHandler(rdb, 1), slices.Clone(msgs)
			rng.Shuffle(len(own), func(i, j int) { own[i], own[j] = own[j], own[i] })
			replicas.Go(func() {
				for _, msg := range own {
					handle := h.persist
					if msg.pending {
						handle = h.mark
					}
					if d := handle(context.Background(), []*streams.Delivery{msg.delivery()}); !d[0].IsDone() && !d[0].IsMoved() {
						t.Errorf("decision %+v", d[0])
					}
				}
			})
		}
		replicas.Wait()
		got := stored(t, rdb)
		for id, want := range m {
			if have, ok := got[id]; !ok || larger(have, want) || larger(want, have) {
				t.Fatalf("round %d: %s is %+v, want %+v", round, id, have, want)
			}
		}
	}
}
