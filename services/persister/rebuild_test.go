package persister

import (
	"fmt"
	"maps"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// kept is a record's bytes and when it expires, Unix ms.
type kept struct {
	body    string
	expires int64
}

func snapshot(t *testing.T, rdb redis.UniversalClient) map[string]kept {
	t.Helper()
	out := map[string]kept{}
	keys, err := rdb.Keys(t.Context(), record.KeyPrefix+"*").Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range keys {
		body, err := rdb.Get(t.Context(), k).Result()
		if err != nil {
			t.Fatal(err)
		}
		at, err := rdb.PExpireTime(t.Context(), k).Result()
		if err != nil {
			t.Fatal(err)
		}
		out[k] = kept{body, at.Milliseconds()}
	}
	return out
}

// Redis is a cache of FP_ENRICHED: after a FLUSHALL, a replay of the stream
// restores every live record to the byte, with its old expiry. No vendor is
// asked: there is none here.
func TestReplayRebuildsEveryRecord(t *testing.T) {
	t.Parallel()
	r := start(t, streamstest.NewRedis(t))
	// In the order of the stream: outcomes that improve, get worse and
	// belong to somebody else, and one past its life.
	statuses := []record.Status{record.Ready, record.NotFound, record.Failed}
	for i := range 300 {
		if i == 120 {
			r.settled() // each id has its owner
		}
		id, at := fmt.Sprint("id-", i%120), time.Duration(i)*time.Millisecond
		if i%50 == 49 {
			at -= 25 * time.Hour
		}
		next := rec(id, 1+int64(i/120%2), statuses[i%len(statuses)], at)
		next.Attempts = i
		r.enriched(next)
	}
	r.settled()
	before := snapshot(t, r.rdb)
	if len(before) < 100 {
		t.Fatalf("only %d records", len(before))
	}
	refused := len(r.deadReasons())
	if refused == 0 {
		t.Fatal("no foreign record among them")
	}

	if err := r.rdb.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	st, err := r.conn.JS.Stream(t.Context(), streams.StreamEnriched)
	if err != nil {
		t.Fatal(err)
	}
	for seq := uint64(1); seq <= 300; seq++ {
		m, err := st.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		r.replay(m)
	}
	streamstest.Eventually(t, "the replay to be through", func() bool {
		l, err := streams.ReadLag(t.Context(), r.conn.JS, streams.StreamBackfill, streams.DurablePersisterBackfill)
		return err == nil && l.Messages() == 0
	})
	after := snapshot(t, r.rdb)
	if !maps.Equal(before, after) {
		t.Errorf("%d records before, %d after", len(before), len(after))
		for k := range before {
			if before[k] != after[k] {
				t.Errorf("%s\nbefore %v\nafter  %v", k, before[k], after[k])
			}
		}
	}
}

// replay copies a message of FP_ENRICHED to FP_BACKFILL.
func (r *running) replay(m *jetstream.RawStreamMsg) {
	r.t.Helper()
	rec, err := record.Decode(m.Data)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.pub.Publish(r.t.Context(), streams.Message{
		Stream: streams.StreamBackfill, Subject: streams.BackfillSubject(streams.StagePersister, rec.SubscriberID),
		ID:     fmt.Sprint("r1-", m.Sequence),
		Header: nats.Header{streams.HeaderReplay: {"r1"}, streams.HeaderAcceptedAt: {rec.AcceptedAt.String()}},
		Body:   m.Data,
	}); err != nil {
		r.t.Fatal(err)
	}
}
