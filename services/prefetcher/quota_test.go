package prefetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// full returns a bucket that has had the time to fill up, and its clock.
func full(rate float64) (*localBucket, *time.Time) {
	now := time.Unix(0, 0)
	b := newLocalBucket(rate, func() time.Time { return now })
	now = now.Add(time.Hour)
	return b, &now
}

// drain takes tokens until there are none and returns how many there were.
func drain(b bucket, p priority) (n int) {
	for {
		got, _ := b.take(context.Background(), p, 1)
		if got == 0 {
			return n
		}
		n++
	}
}

func TestBucketNeverExceedsRateAndBurst(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	b := newLocalBucket(5, func() time.Time { return now })
	if n := drain(b, firstLook); n != 5 {
		t.Errorf("%d calls at the start, want a second's worth", n)
	}
	calls := 0
	for range 1000 { // ten seconds in uneven steps
		now = now.Add(10 * time.Millisecond)
		calls += drain(b, firstLook)
	}
	if calls != 50 {
		t.Errorf("%d calls in ten seconds, want 50", calls)
	}
	now = now.Add(time.Hour)
	if n := drain(b, firstLook); n != 15 {
		t.Errorf("burst of %d after an hour, want 15", n)
	}
}

// What waits for later takes only what those before it leave.
func TestBucketPriorities(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		p    priority
		want int
	}{"first look": {firstLook, 15}, "later look": {laterLook, 14}, "backfill": {backfill, 8}} {
		b, _ := full(5)
		if n := drain(b, tt.p); n != tt.want {
			t.Errorf("%s: %d of 15, want %d", name, n, tt.want)
		}
		b, _ = full(5)
		if got, _ := b.take(t.Context(), tt.p, 100); got != tt.want {
			t.Errorf("%s: %d of 15 at once, want %d", name, got, tt.want)
		}
	}
	// A bucket too small for the thresholds still lets everybody through.
	for p := range priorities {
		if b, _ := full(0.1); drain(b, p) != 1 {
			t.Errorf("priority %d never gets a token of a small bucket", p)
		}
	}
}

func TestPauseStopsEverybodyAndLeavesNoBurst(t *testing.T) {
	t.Parallel()
	b, now := full(5)
	b.pause(t.Context(), 3*time.Second)
	b.pause(t.Context(), time.Second) // a shorter one does not shorten it
	if got, d := b.take(t.Context(), firstLook, 1); got != 0 || d != 3*time.Second {
		t.Errorf("%d calls, then %v, want none for 3s", got, d)
	}
	*now = now.Add(3 * time.Second)
	if n := drain(b, firstLook); n != 0 {
		t.Errorf("%d calls at once after a pause", n)
	}
	*now = now.Add(time.Second)
	if n := drain(b, firstLook); n != 5 {
		t.Errorf("%d calls in the second after, want 5", n)
	}
	if got, _ := newLocalBucket(0, time.Now).take(t.Context(), backfill, 1000); got != 1000 {
		t.Error("rate 0 is not unlimited")
	}
}

func TestQuotaWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newLocalBucket(1, time.Now)
		q := newQuota(b, false)
		go q.run(t.Context())
		drain(b, firstLook)
		start := time.Now()
		if err := q.wait(t.Context(), firstLook, 1); err != nil || time.Since(start).Round(time.Millisecond) != time.Second {
			t.Errorf("waited %v (%v), want 1s", time.Since(start), err)
		}
		stop := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(stop)
		if err := q.wait(ctx, firstLook, 1); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
		if _, n := q.first(); n != 0 {
			t.Error("who has gone still waits")
		}
	})
}

// One subscriber's flood does not stand before another's event, and nothing of
// lower priority goes first.
func TestQuotaGoesInTurnsAndByPriority(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		b := newLocalBucket(1, time.Now)
		drain(b, firstLook)
		q := newQuota(b, false)
		var mu sync.Mutex
		var order []string
		wait := func(name string, p priority, subscriber int64) {
			go func() {
				if q.wait(t.Context(), p, subscriber) == nil {
					mu.Lock()
					defer mu.Unlock()
					order = append(order, name)
				}
			}()
			synctest.Wait()
		}
		wait("old", backfill, 3)
		for range 5 {
			wait("flood", firstLook, 1)
		}
		wait("other", firstLook, 2)
		if d := q.try(t.Context(), laterLook); d == 0 {
			t.Error("a later look goes before first ones")
		}
		go q.run(t.Context())
		time.Sleep(20 * time.Second)
		synctest.Wait()
		if got := fmt.Sprint(order); got != "[flood other flood flood flood flood old]" {
			t.Errorf("order %v", got)
		}
		if d := q.try(t.Context(), laterLook); d != 0 {
			t.Errorf("no later look for %v though nobody waits", d)
		}
	})
}

// Whoever waits and whoever leaves: the turns lose nobody and count right.
func TestTurnsAgainstAModel(t *testing.T) {
	t.Parallel()
	rng := rand.New(rand.NewPCG(1, 2))
	var q turns
	in := map[chan struct{}]int64{}
	for range 20_000 {
		switch rng.IntN(3) {
		case 0:
			c := make(chan struct{})
			in[c] = rng.Int64N(4)
			q.push(in[c], c)
		case 1:
			c := q.pop()
			if _, ok := in[c]; ok != (len(in) > 0) {
				t.Fatal("popped who does not wait, or nobody")
			}
			delete(in, c)
		case 2:
			for c, s := range in {
				if !q.remove(s, c) || q.remove(s, c) {
					t.Fatal("a waiter is not removed exactly once")
				}
				delete(in, c)
				break
			}
		}
		if q.len() != len(in) {
			t.Fatalf("%d wait, want %d", q.len(), len(in))
		}
	}
}

func TestBreakerNeedsDifferentIDs(t *testing.T) {
	t.Parallel()
	var b breaker
	for range 100 {
		if b.fail(Transient, "one") {
			t.Fatal("a single event stops the stage")
		}
	}
	for _, id := range []string{"two", "three", "four"} {
		if b.fail(Malformed, id) {
			t.Fatalf("tripped at %s", id)
		}
	}
	if !b.fail(Transient, "five") || !b.fail(Transient, "one") {
		t.Error("five different ids do not trip it")
	}
	b.ok()
	if b.fail(Transient, "six") {
		t.Error("not reset by an answer")
	}
	for range 2 {
		if b.fail(Misconfigured, "a") {
			t.Error("a refused key needs a confirmation by another id")
		}
	}
	if !b.fail(Misconfigured, "b") {
		t.Error("one confirmation is not enough")
	}
}
