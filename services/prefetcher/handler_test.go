package prefetcher

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

type vendorFunc func(id string) Answer

func (f vendorFunc) Event(_ context.Context, id string) Answer { return f(id) }

// outbox is a stream that remembers, and refuses while err is set.
type outbox struct {
	err  error
	sent []streams.Message
}

func (o *outbox) Publish(_ context.Context, m streams.Message) (streams.Ack, error) {
	if o.err != nil {
		return streams.Ack{}, o.err
	}
	o.sent = append(o.sent, m)
	return streams.Ack{}, nil
}

// records returns what was published.
func (o *outbox) records(t *testing.T) []record.Record {
	t.Helper()
	var out []record.Record
	for _, m := range o.sent {
		r, err := record.Decode(m.Body)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

func newHandler(v eventGetter) (*handler, *outbox) {
	o := &outbox{}
	q := newQuota(newLocalBucket(0, time.Now), true)
	return &handler{
		live: make(lane, 1000), backlog: make(lane, 1000), vendor: v, publisher: o, quota: q, maxAge: 23 * time.Hour, fresh: time.Minute, retention: 720 * time.Hour, now: time.Now,
		metrics: newMetrics(prometheus.NewRegistry(), q),
	}, o
}

func delivery(id string) *streams.Delivery {
	body, err := json.Marshal(streams.Event{Schema: 1, RequestID: id, SubscriberID: 12, SessionID: "DEV-SESSION-XYZ", UserID: "user@example.com"})
	if err != nil {
		panic(err)
	}
	return &streams.Delivery{Subject: streams.IngestSubject(12), Data: body, Sequence: 1, Deliveries: 1, AcceptedAt: time.Now().UTC()}
}

// settle plays the consumer: it looks again for as long as the handler asks,
// and returns the last decision with the waits in between. Holds count as a
// second.
func settle(t *testing.T, h *handler, d *streams.Delivery) (last streams.Decision, waits []time.Duration) {
	t.Helper()
	for range 10_000 {
		last = h.handle(t.Context(), d)
		d.Looks++
		after, again := last.Again()
		if !again {
			return last, waits
		}
		waits = append(waits, after)
		time.Sleep(after) // fake time
	}
	t.Fatal("no end")
	return last, nil
}

func found(id string) Answer {
	body := fingerprintsim.Event(id, time.Now().Add(-time.Second))
	p, err := Project(body)
	if err != nil {
		panic(err)
	}
	return Answer{Outcome: Found, Status: 200, Body: body, Projection: p}
}

func answer(o Outcome) Answer { return Answer{Outcome: o, Err: errors.New(o.String())} }

func TestFoundBecomesReady(t *testing.T) {
	t.Parallel()
	h, o := newHandler(vendorFunc(found))
	d := delivery("1A2B3C4D5E")
	d.Header = map[string][]string{streams.HeaderTraceParent: {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}}
	if dec := h.handle(t.Context(), d); !dec.IsDone() {
		t.Fatalf("decision %+v", dec)
	}
	r := o.records(t)[0]
	if r.Status != record.Ready || r.RequestID != "1A2B3C4D5E" || r.Attempts != 1 || r.Source != record.SourceAPI || !r.AcceptedAt.Equal(d.AcceptedAt) {
		t.Errorf("record %+v", r)
	}
	if r.Checks == nil || !r.Checks.EventIDMatch || r.Checks.Fresh == nil || !*r.Checks.Fresh || r.Signals == nil || r.Signals.VisitorID == nil {
		t.Errorf("checks %+v, signals %+v", r.Checks, r.Signals)
	}
	m := o.sent[0]
	if m.Stream != streams.StreamEnriched || m.Subject != "fp.enriched.12" || m.TraceParent == "" {
		t.Errorf("message on %s %s, trace %q", m.Stream, m.Subject, m.TraceParent)
	}
}

// A 404 is looked at on its schedule, counted from the first look and not from
// the event's age, and ends as not_found.
func TestNotFoundHasABudgetFromTheFirstLook(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h, o := newHandler(vendorFunc(func(string) Answer { return answer(NotFound) }))
		d := delivery("forged")
		d.AcceptedAt = time.Now().Add(-time.Hour) // the stage was down for an hour
		dec, waits := settle(t, h, d)
		want := []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 15 * time.Second}
		if fmt.Sprint(waits) != fmt.Sprint(want) || !dec.IsDone() {
			t.Errorf("waits %v, then %+v", waits, dec)
		}
		if r := o.records(t)[0]; r.Status != record.NotFound || r.Reason != record.EventNotFound || r.Attempts != 7 {
			t.Errorf("record %+v", r)
		}
	})
}

// When the quota lets only few looks through, there are three of them anyway.
func TestNotFoundNeedsThreeLooks(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		looks := 0
		h, o := newHandler(vendorFunc(func(id string) Answer {
			looks++
			time.Sleep(time.Minute) // the budget is over after each look
			if looks == 3 {
				return found(id)
			}
			return answer(NotFound)
		}))
		if dec, _ := settle(t, h, delivery("late")); !dec.IsDone() {
			t.Errorf("decision %+v", dec)
		}
		if r := o.records(t)[0]; r.Status != record.Ready || r.Attempts != 3 {
			t.Errorf("record %s after %d looks", r.Status, r.Attempts)
		}
	})
}

// Promise 4 when the vendor is slow: tokens are not hoarded while all calls
// that may be under way are, to be spent in one go afterwards.
func TestSlowCallsHoardNoTokens(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		var mu sync.Mutex
		var calls []time.Duration
		h, _ := newHandler(vendorFunc(func(id string) Answer {
			at := time.Since(start)
			mu.Lock()
			calls = append(calls, at)
			mu.Unlock()
			if at < 10*time.Second {
				time.Sleep(10 * time.Second)
			}
			return found(id)
		}))
		h.publisher = discard{}
		h.live = make(lane, 2)
		h.quota = newQuota(newLocalBucket(1, time.Now), false)
		go h.quota.run(t.Context())
		var wg sync.WaitGroup
		for i := range 12 {
			wg.Go(func() { h.handle(t.Context(), delivery(fmt.Sprint("id-", i))) })
		}
		wg.Wait()
		for i := range calls {
			if i >= burstFactor+1 && calls[i]-calls[i-burstFactor-1] < time.Second/2 {
				t.Fatalf("more calls at once than the burst: %v", calls)
			}
		}
		if len(calls) != 12 {
			t.Errorf("%d calls", len(calls))
		}
	})
}

func TestRejectedEndsAtOnce(t *testing.T) {
	t.Parallel()
	h, o := newHandler(vendorFunc(func(string) Answer { return answer(Rejected) }))
	if dec := h.handle(t.Context(), delivery("odd")); !dec.IsDone() {
		t.Errorf("decision %+v", dec)
	}
	if r := o.records(t)[0]; r.Status != record.Rejected || r.Reason != record.EventIDInvalid {
		t.Errorf("record %+v", r)
	}
}

func TestUndecodableIsDeadLettered(t *testing.T) {
	t.Parallel()
	h, o := newHandler(vendorFunc(func(string) Answer { panic("asked for what cannot be read") }))
	d := delivery("x")
	d.Data = []byte(`{"request_id":`)
	if dec := h.handle(t.Context(), d); !dec.GivesUp() || len(o.sent) != 0 {
		t.Errorf("decision %+v, %d messages", dec, len(o.sent))
	}
	d.Data = []byte(`{"schema":2,"request_id":"x"}`)
	if after, again := h.handle(t.Context(), d).Again(); !again || after == 0 {
		t.Error("a newer version's event is not left to a newer replica")
	}
}

// Promise 3 as a property: whatever dependencies do, and in whatever order, no
// event is given up before its age or its harm to the process says so, and a
// fault of single events never stops the stage.
func TestDependencyFaultsNeverGiveUpAnEvent(t *testing.T) {
	t.Parallel()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for range 500 {
		faults := make([]Outcome, rng.IntN(40))
		for i := range faults {
			faults[i] = []Outcome{Transient, Throttled, Misconfigured, Malformed}[rng.IntN(4)]
		}
		refusals := rng.IntN(5)
		synctest.Test(t, func(t *testing.T) {
			calls := 0
			h, o := newHandler(vendorFunc(func(id string) Answer {
				calls++
				if calls <= len(faults) {
					return answer(faults[calls-1])
				}
				return found(id)
			}))
			d := delivery("patient")
			dec := streams.Decision{}
			for !dec.IsDone() {
				if refusals > 0 && calls > len(faults) {
					refusals--
					o.err = streams.ErrStreamFull
				} else {
					o.err = nil
				}
				dec = h.handle(t.Context(), d)
				if dec.GivesUp() {
					t.Fatalf("seed %d: given up after %v", seed, faults)
				}
				after, _ := dec.Again()
				time.Sleep(after)
			}
			if calls != len(faults)+1 {
				t.Fatalf("seed %d: %d calls for %d faults: a refused publish cost a call", seed, calls, len(faults))
			}
			if r := o.records(t)[0]; r.Status != record.Ready {
				t.Fatalf("seed %d: %s", seed, r.Status)
			}
		})
	}
}

func TestSingleEventNeverHoldsTheStage(t *testing.T) {
	t.Parallel()
	for _, o := range []Outcome{Transient, Malformed, Misconfigured, Throttled, NotFound} {
		synctest.Test(t, func(t *testing.T) {
			h, _ := newHandler(vendorFunc(func(string) Answer { return answer(o) }))
			d := delivery("odd")
			for range 100 {
				dec := h.handle(t.Context(), d)
				after, again := dec.Again()
				if !again && !dec.IsDone() {
					t.Fatalf("%v: decision %+v", o, dec)
				}
				time.Sleep(after)
			}
		})
	}
}

func TestManyEventsHoldTheStage(t *testing.T) {
	t.Parallel()
	for o, want := range map[Outcome]int{Transient: tripTransient, Malformed: tripTransient, Misconfigured: tripMisconfigured} {
		h, _ := newHandler(vendorFunc(func(string) Answer { return answer(o) }))
		for i := 1; i <= want; i++ {
			_, again := h.handle(t.Context(), delivery(fmt.Sprint("id-", i))).Again()
			if holds := !again; holds != (i == want) {
				t.Errorf("%v: holds after %d: %v", o, i, holds)
			}
		}
	}
}

func TestExhaustedByAge(t *testing.T) {
	t.Parallel()
	calls := 0
	h, o := newHandler(vendorFunc(func(string) Answer { calls++; return answer(Transient) }))
	d := delivery("old")
	d.AcceptedAt = time.Now().Add(-24 * time.Hour)
	if dec := h.handle(t.Context(), d); !dec.GivesUp() || calls != 0 {
		t.Errorf("decision %+v after %d calls", dec, calls)
	}
	if r := o.records(t)[0]; r.Status != record.Failed || r.Reason != record.TooOld {
		t.Errorf("record %+v", r)
	}
	// Its dead letter had no room: it alone is tried again.
	if dec := h.handle(t.Context(), d); !dec.GivesUp() || len(o.sent) != 1 {
		t.Errorf("decision %+v, %d records", dec, len(o.sent))
	}
	// What was tried says what was in the way.
	d = delivery("tried")
	d.AcceptedAt = time.Now().Add(-22 * time.Hour)
	h.handle(t.Context(), d)
	d.AcceptedAt = time.Now().Add(-24 * time.Hour)
	if dec := h.handle(t.Context(), d); !dec.GivesUp() {
		t.Errorf("decision %+v", dec)
	}
	if r := o.records(t)[1]; r.Status != record.Failed || r.Reason != record.UpstreamUnavailable || r.Attempts != 1 {
		t.Errorf("record %+v", r)
	}
}

func TestPoisonIsNotAskedAgain(t *testing.T) {
	t.Parallel()
	h, o := newHandler(vendorFunc(func(string) Answer { panic("killed again") }))
	d := delivery("killer")
	d.Deliveries = streams.MaxDeliveries + 1
	if dec := h.handle(t.Context(), d); !dec.GivesUp() {
		t.Errorf("decision %+v", dec)
	}
	if r := o.records(t)[0]; r.Status != record.Failed || r.Reason != record.Poison {
		t.Errorf("record %+v", r)
	}
}

// A replay's result is no duplicate of the first one and keeps its time.
func TestReplayHasAnIDOfItsOwn(t *testing.T) {
	t.Parallel()
	h, o := newHandler(vendorFunc(found))
	live, copied := delivery("id"), delivery("id")
	copied.AcceptedAt, copied.Replay = live.AcceptedAt, "r-1"
	for _, d := range []*streams.Delivery{live, copied} {
		h.handle(t.Context(), d)
	}
	a, b := o.sent[0], o.sent[1]
	if a.ID == b.ID {
		t.Error("the stream would swallow the replay")
	}
	if b.Header.Get(streams.HeaderReplay) != "r-1" || b.Header.Get(streams.HeaderAcceptedAt) == "" {
		t.Errorf("headers %v", b.Header)
	}
}

func TestBackoffDoublesWithJitterUpToAMinute(t *testing.T) {
	t.Parallel()
	for n := 1; n < 50; n++ {
		base := min(500*time.Millisecond<<min(n-1, 10), time.Minute)
		for range 100 {
			if d := backoff(n); d < base*3/4 || d > base*5/4 {
				t.Fatalf("backoff(%d) = %v", n, d)
			}
		}
	}
}
