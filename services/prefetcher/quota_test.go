package prefetcher

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// drain takes tokens until there are none and returns how many there were.
func drain(q *quota, p priority) (n int) {
	for q.take(p) == 0 {
		n++
	}
	return n
}

func TestQuotaNeverExceedsRateAndBurst(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	q := newQuota(5, func() time.Time { return now })
	if n := drain(q, firstLook); n != 15 {
		t.Errorf("burst of %d, want 15", n)
	}
	calls := 0
	for range 1000 { // ten seconds in uneven steps
		now = now.Add(10 * time.Millisecond)
		calls += drain(q, firstLook)
	}
	if calls != 50 {
		t.Errorf("%d calls in ten seconds, want 50", calls)
	}
	now = now.Add(time.Hour)
	if n := drain(q, firstLook); n != 15 {
		t.Errorf("burst of %d after an hour, want 15", n)
	}
}

// What waits for later takes only what those before it leave.
func TestQuotaPriorities(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		p    priority
		want int
	}{"first look": {firstLook, 15}, "later look": {laterLook, 14}, "backfill": {backfill, 8}} {
		now := time.Unix(0, 0)
		q := newQuota(5, func() time.Time { return now })
		if n := drain(q, tt.p); n != tt.want {
			t.Errorf("%s: %d of 15, want %d", name, n, tt.want)
		}
	}
	// A bucket too small for the thresholds still lets everybody through.
	for _, p := range []priority{firstLook, laterLook, backfill} {
		now := time.Unix(0, 0)
		if q := newQuota(0.1, func() time.Time { return now }); drain(q, p) != 1 {
			t.Errorf("priority %d never gets a token of a small bucket", p)
		}
	}
}

func TestQuotaPauseStopsEverybodyAndLeavesNoBurst(t *testing.T) {
	t.Parallel()
	now := time.Unix(0, 0)
	q := newQuota(5, func() time.Time { return now })
	q.pause(3 * time.Second)
	q.pause(time.Second) // a shorter one does not shorten it
	if d := q.take(firstLook); d != 3*time.Second {
		t.Errorf("waits %v, want 3s", d)
	}
	now = now.Add(3 * time.Second)
	if n := drain(q, firstLook); n != 0 {
		t.Errorf("%d calls at once after a pause", n)
	}
	now = now.Add(time.Second)
	if n := drain(q, firstLook); n != 5 {
		t.Errorf("%d calls in the second after, want 5", n)
	}
	if q := newQuota(0, time.Now); drain10(q) != 10 {
		t.Error("rate 0 is not unlimited")
	}
}

func drain10(q *quota) (n int) {
	for range 10 {
		if q.take(backfill) == 0 {
			n++
		}
	}
	return n
}

func TestQuotaWaitEndsWithItsContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		q := newQuota(1, time.Now)
		drain(q, firstLook)
		start := time.Now()
		if err := q.wait(t.Context(), firstLook); err != nil || time.Since(start).Round(time.Millisecond) != time.Second {
			t.Errorf("waited %v (%v), want 1s", time.Since(start), err)
		}
		stop := errors.New("stop")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(stop)
		if err := q.wait(ctx, firstLook); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
	})
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
