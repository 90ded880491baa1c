package prefetcher

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// An hour of the vendor's outage, 120 times as fast: events keep coming, calls
// are answered 503 and then not at all. No event burns anything in it.
// Afterwards, with the vendor's quota as the limit, new events are served at
// once and those of the outage with what is left over.
func TestOneHourOfOutageBurnsNothing(t *testing.T) {
	t.Parallel()
	const hour, rate = 30 * time.Second, 20
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{
		"FINGERPRINT_RATE_LIMIT": fmt.Sprint(rate),
		"PREFETCH_FRESH_WITHIN":  "1s",
		"PREFETCH_MAX_AGE":       "11m30s", // of 23 hours
	})
	var all []string
	pace := time.NewTicker(time.Second / 15)
	defer pace.Stop()
	// live accepts fifteen events a second until ok is true.
	live := func(ok func() bool) (accepted []string) {
		for !ok() {
			id := fmt.Sprint("id-", len(all))
			// Of twenty subscribers, so that none takes half of the places.
			r.acceptFrom(1+int64(len(all)%20), id)
			all, accepted = append(all, id), append(accepted, id)
			<-pace.C
		}
		return accepted
	}
	during := func(d time.Duration) func() bool {
		until := time.Now().Add(d)
		return func() bool { return time.Now().After(until) }
	}

	live(during(time.Second))
	calls := r.sim.Calls()
	r.sim.SetFault(&fingerprintsim.Fault{Status: 503})
	old := live(during(hour / 2))
	r.sim.SetFault(&fingerprintsim.Fault{Hang: true})
	old = append(old, live(during(hour/2))...)
	if r.holding() != "fingerprint" || r.dead() != 0 {
		t.Errorf("holds for %q, %d dead letters", r.holding(), r.dead())
	}
	// Those under way when it began, and a probe of each lane now and then.
	if calls = r.sim.Calls() - calls; calls > 100 {
		t.Errorf("%d calls in the outage", calls)
	}

	r.sim.SetRate(rate, burstFactor*rate)
	r.sim.SetFault(nil)
	back := time.Now()
	old = append(old, live(func() bool { return r.holding() == "" })...)
	held := time.Since(back)
	fresh := live(during(10 * time.Second))
	left := r.lagOf(streams.StreamBackfill, streams.DurablePrefetcherBackfill).Messages()

	most := 0
	for _, id := range all {
		got := r.end(id)
		if got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
		most = max(most, got.Attempts)
	}
	streamstest.Eventually(t, "everything acknowledged", func() bool {
		return r.lag().Messages()+r.lagOf(streams.StreamBackfill, streams.DurablePrefetcherBackfill).Messages() == 0
	})
	if r.dead() != 0 {
		t.Errorf("%d dead letters", r.dead())
	}
	// Neither the outage nor what came after cost a delivery more.
	if n := r.deliveries(); n != len(all) {
		t.Errorf("%d deliveries of %d events", n, len(all))
	}
	if n := r.sim.CountsByStatus()[429]; n > len(all)/100 {
		t.Errorf("%d of %d calls were 429", n, r.sim.Calls())
	}
	waits := make([]time.Duration, len(fresh))
	for i, id := range fresh {
		waits[i] = r.waits[id]
	}
	slices.Sort(waits)
	p50, p99 := waits[len(waits)/2], waits[len(waits)*99/100]
	if p99 > 2*time.Second || left == 0 {
		t.Errorf("new events waited %v, at p99 %v, beside %d old ones", p50, p99, left)
	}
	t.Logf("%d calls in the outage of %d events, %d for one at most; went on after %v; then %d new events waited %v, at p99 %v, beside %d old ones",
		calls, len(old), most, held, len(fresh), p50, p99, left)
}
