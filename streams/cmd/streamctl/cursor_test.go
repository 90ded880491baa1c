package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// mortal is the way of one run to the servers: it dies at its n-th write, and
// that write may still arrive. What comes after does not.
type mortal struct {
	publisher
	jetstream.KeyValue
	run int // the stream has forgotten the message ids of earlier runs

	mu      sync.Mutex
	n       int // writes left; negative is for ever
	arrives bool
}

var errKilled = errors.New("killed")

// write reports whether a write arrives, and whether its answer does.
func (m *mortal) write() (arrives, answered bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.n < 0:
		return true, true
	case m.n == 0:
		return false, false
	}
	m.n--
	return m.n > 0 || m.arrives, m.n > 0
}

func (m *mortal) Publish(ctx context.Context, msg streams.Message) (ack streams.Ack, err error) {
	msg.ID += ":" + strconv.Itoa(m.run)
	arrives, answered := m.write()
	if arrives {
		if ack, err = m.publisher.Publish(ctx, msg); err != nil {
			return ack, err
		}
	}
	if !answered { // refused is what is not tried again
		return streams.Ack{}, fmt.Errorf("%w: %w", streams.ErrRefused, errKilled)
	}
	return ack, nil
}

func (m *mortal) Update(ctx context.Context, key string, value []byte, revision uint64) (rev uint64, err error) {
	arrives, answered := m.write()
	if arrives {
		if rev, err = m.KeyValue.Update(ctx, key, value, revision); err != nil {
			return rev, err
		}
	}
	if !answered {
		return 0, fmt.Errorf("%w: %w", streams.ErrRefused, errKilled)
	}
	return rev, nil
}

func (m *mortal) Get(ctx context.Context, key string) (jetstream.KeyValueEntry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n == 0 {
		return nil, errKilled
	}
	return m.KeyValue.Get(ctx, key)
}

// Killed at any write, before it arrives or before its answer does, as often
// as you like, and resumed with no message id remembered: a replay copies each
// event once, and counts what an unbroken one counts.
func TestReplayKilledAtAnyWriteEqualsAnUnbrokenOne(t *testing.T) {
	t.Parallel()
	const schedules = 60
	b := newBench(t)
	b.work(streams.StreamBackfill, streams.DurablePersisterBackfill)
	now := time.Now()
	wanted := map[uint64]bool{}
	want := feedCounts{}
	for i := range 260 { // more than two saves' worth
		e := event(fmt.Sprint("e", i))
		switch i % 13 {
		case 3:
			b.put(streams.EnrichedSubject(12), nil, "no record")
			want.Invalid++
		case 7:
			b.put(streams.EnrichedSubject(12), nil, streams.NewRecord(e, now.Add(-25*time.Hour), record.NotFound, record.EventNotFound))
			want.PastLife++
		default:
			wanted[b.put(streams.EnrichedSubject(12), nil, streams.NewRecord(e, now, record.NotFound, record.EventNotFound))] = true
			want.Copied++
		}
	}
	backfill, err := b.js.Stream(t.Context(), streams.StreamBackfill)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for seed := range uint64(schedules) {
		rng := rand.New(rand.NewPCG(seed, 0))
		if err := backfill.Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
		deaths, id := rng.IntN(4), ""
		var f *feeder
		for run := 0; run <= deaths; run++ {
			f = &feeder{records: &records{seen: map[string]*recordHead{}}}
			f.Stage, f.Limits = streams.StagePersister, limits{RecordTTL: 24 * time.Hour}
			if err := f.prepare(t.Context(), b.conn, id, time.Time{}, time.Time{}, 1); err != nil {
				t.Fatal(err)
			}
			id = f.ID
			way := &mortal{publisher: f.pub, KeyValue: f.kv, run: run, n: -1, arrives: rng.IntN(2) == 0}
			if run < deaths {
				way.n = 1 + rng.IntN(150)
			}
			f.pub, f.kv = way, way
			err := f.run(t.Context(), newProgress(t.Output()))
			if killed := way.n == 0; killed != errors.Is(err, errKilled) || !killed && err != nil {
				t.Fatalf("seed %d, run %d: %v", seed, run, err)
			}
		}
		if f.Counts != want || !f.Done {
			t.Errorf("seed %d: %+v after %d deaths, done is %v, want %+v", seed, f.Counts, deaths, f.Done, want)
		}
		times := map[uint64]int{}
		in, err := findSpan(t.Context(), b.js, streams.StreamBackfill, time.Time{}, time.Time{})
		if err != nil {
			t.Fatal(err)
		}
		if err := scan(t.Context(), b.conn, in, ">", func(m *jetstream.RawStreamMsg) error {
			seq, err := strconv.ParseUint(m.Header.Get(headerReplaySequence), 10, 64)
			if times[seq]++; err != nil || times[seq] > 1 || !wanted[seq] || m.Header.Get(streams.HeaderReplay) != id {
				t.Errorf("seed %d: a copy of message %d of %s, its number %d, %v", seed, seq, id, times[seq], err)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if len(times) != len(wanted) {
			t.Errorf("seed %d: %d of %d copied after %d deaths", seed, len(times), len(wanted), deaths)
		}
		if t.Failed() {
			return
		}
	}
	took := time.Since(begin)
	t.Logf("%d schedules in %v, %.0f a second", schedules, took.Round(time.Millisecond), schedules/took.Seconds())
}
