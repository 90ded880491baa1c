package prefetcher

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// The tests in this file play many schedules on a fake clock, each made from
// its own seed, and compare what happens with a small model. A failure names
// the seed.

// schedules calls play for each seed and logs how fast that was.
func schedules(t *testing.T, n uint64, play func(t *testing.T, rng *rand.Rand)) {
	t.Helper()
	begin := time.Now()
	for seed := range n {
		synctest.Test(t, func(t *testing.T) {
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			})
			play(t, rand.New(rand.NewPCG(seed, 0)))
		})
	}
	took := time.Since(begin)
	t.Logf("%d schedules in %v, %.0f a second", n, took.Round(time.Millisecond), float64(n)/took.Seconds())
}

func upTo(rng *rand.Rand, d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }

// lifeModel is what the rules say about one event.
type lifeModel struct {
	calls, notFound, failures int
	first404                  time.Time
	reason                    record.Reason // of the latest failure

	end    record.Status // once it is known
	ending record.Reason
	dead   bool
}

// old says that the event is given up for its age.
func (m *lifeModel) old() {
	m.end, m.ending, m.dead = record.Failed, m.reason, true
	if m.ending == "" {
		m.ending = record.TooOld
	}
}

// answered returns between which times the next look is due, unless the event
// has come to its end.
func (m *lifeModel) answered(o Outcome, at time.Time) (least, most time.Duration) {
	m.calls++
	switch o {
	case Found:
		m.end = record.Ready
		return 0, 0
	case Rejected:
		m.end, m.ending = record.Rejected, record.EventIDInvalid
		return 0, 0
	case NotFound:
		if m.notFound++; m.notFound == 1 {
			m.first404 = at
		}
		if m.notFound >= 3 && at.Sub(m.first404) >= 30*time.Second {
			m.end, m.ending = record.NotFound, record.EventNotFound
			return 0, 0
		}
		wait := []time.Duration{500, 1000, 2000, 4000, 8000, 15000}[min(m.notFound, 6)-1] * time.Millisecond
		return wait, wait
	case Throttled:
		m.reason = record.UpstreamUnavailable
		return 0, 0
	case Misconfigured:
		m.reason = record.Configuration
	case Malformed:
		m.reason = record.UpstreamMalformed
	default:
		m.reason = record.UpstreamUnavailable
	}
	m.failures++
	wait := 500 * time.Millisecond
	for i := 1; i < m.failures && wait < time.Minute; i++ {
		wait *= 2
	}
	wait = min(wait, time.Minute)
	return wait * 3 / 4, wait * 5 / 4
}

// Whatever the vendor answers in whatever order, however long that takes and
// the stream is away, and however old the event is: each look asks at most
// once, the next one is when the rules say, a pause after a 429 is kept, and
// there is one end, the right one, with every call counted. A single event
// never holds the stage because of the vendor.
func TestEventEqualsModelWhateverTheVendorAnswers(t *testing.T) {
	t.Parallel()
	outcomes := []Outcome{NotFound, NotFound, NotFound, NotFound, Transient, Transient, Throttled, Malformed, Misconfigured, Rejected, Found}
	schedules(t, 1000, func(t *testing.T, rng *rand.Rand) {
		var m lifeModel
		var asked int
		var outcome Outcome
		var answered, paused time.Time
		pauseFor := time.Duration(rng.IntN(3)) * time.Second
		lastly := rng.IntN(len(outcomes)) // from here on the vendor answers the same for ever
		steady := rng.IntN(30)
		h, out := newHandler(vendorFunc(func(id string) Answer {
			if now := time.Now(); now.Before(paused) {
				t.Errorf("asked %v before the pause after a 429 was over", paused.Sub(now))
			}
			time.Sleep(upTo(rng, 3*time.Second))
			outcome = outcomes[rng.IntN(len(outcomes))]
			if asked++; asked > steady {
				outcome = outcomes[lastly]
			} else if outcome == Found || outcome == Rejected {
				outcome = NotFound
			}
			answered = time.Now()
			switch outcome {
			case Found:
				return found(id)
			case Throttled:
				paused = answered.Add(max(pauseFor, throttlePause))
				return Answer{Outcome: Throttled, RetryAfter: pauseFor, Err: errors.New("429")}
			default:
				return answer(outcome)
			}
		}))
		h.maxAge = 10 * time.Minute // else those that never end take a thousand looks
		d := delivery("id")
		age := upTo(rng, 2*h.fresh)
		if rng.IntN(4) == 0 {
			age = h.maxAge - upTo(rng, 2*time.Minute) + upTo(rng, time.Minute)
		}
		d.AcceptedAt = time.Now().Add(-age)
		for looks := 0; ; looks++ {
			d.NewerWait = rng.IntN(8) == 0
			if out.err = nil; rng.IntN(4) == 0 {
				out.err = errors.New("NATS is away")
			}
			begin, before, sent, pause := time.Now(), asked, len(out.sent), time.Until(paused)
			dec := h.handle(t.Context(), d)
			d.Looks++
			after, again := dec.Again()
			held := !again && !dec.IsDone() && !dec.IsMoved() && !dec.GivesUp()
			age := begin.Sub(d.AcceptedAt)
			calls, wantCalls := asked-before, 0
			var least, most time.Duration
			switch {
			case m.end != "": // only to be published still
			case d.NewerWait && age > h.fresh && age <= h.maxAge && m.notFound == 0:
				if calls != 0 || out.err == nil && (!dec.IsMoved() || out.sent[sent].Stream != streams.StreamBackfill) || out.err != nil && !held {
					t.Fatalf("look %d, %v old while newer ones wait: %+v after %d calls", looks, age, dec, calls)
				}
				if dec.IsMoved() {
					return
				}
				time.Sleep(time.Second)
				continue
			case age > h.maxAge:
				m.old()
			case m.notFound > 0 && pause > 0: // a later look does not wait for its token
				least, most = pause, 2*pause
			default:
				wantCalls = 1
				least, most = m.answered(outcome, answered)
			}
			if calls != wantCalls {
				t.Fatalf("look %d: %d calls, want %d", looks, calls, wantCalls)
			}
			switch {
			case m.end == "":
				if !again || after < least || after > most {
					t.Fatalf("look %d, %v: %+v, want another look in %v to %v", looks, outcome, dec, least, most)
				}
				time.Sleep(after)
				continue
			case out.err != nil:
				if !held {
					t.Fatalf("look %d: %+v though the end cannot be stored", looks, dec)
				}
				time.Sleep(time.Second)
				continue
			}
			r := out.records(t)
			if len(r) != 1 || r[0].Status != m.end || r[0].Reason != m.ending || r[0].Attempts != asked || asked != m.calls {
				t.Fatalf("ended as %+v after %d calls, want %s %s after %d", r, asked, m.end, m.ending, m.calls)
			}
			if dec.GivesUp() != m.dead || dec.IsDone() == m.dead {
				t.Fatalf("%s %s: %+v", m.end, m.ending, dec)
			}
			return
		}
	})
}

// The stage holds for the vendor exactly when so many different events have
// failed since its last real answer.
func TestBreakerEqualsModel(t *testing.T) {
	t.Parallel()
	schedules(t, 5000, func(t *testing.T, rng *rand.Rand) {
		var b breaker
		transient, misconfigured := map[string]bool{}, map[string]bool{}
		for i := range 40 {
			id := string(rune('a' + rng.IntN(8)))
			switch o := []Outcome{Found, Transient, Transient, Transient, Malformed, Malformed, Misconfigured}[rng.IntN(7)]; o {
			case Found:
				b.ok()
				clear(transient)
				clear(misconfigured)
			case Misconfigured:
				misconfigured[id] = true
				if got := b.fail(o, id); got != (len(misconfigured) >= 2) {
					t.Fatalf("step %d: holds is %v after %d refused", i, got, len(misconfigured))
				}
			default:
				transient[id] = true
				if got := b.fail(o, id); got != (len(transient) >= 5) {
					t.Fatalf("step %d: holds is %v after %d failed", i, got, len(transient))
				}
			}
		}
	})
}

// caller is one who asks for a token; left is when it got one or gave up.
type caller struct {
	p          priority
	subscriber int64
	came, left time.Time
	granted    bool
}

// waits reports whether the caller was waiting before from and still after to.
func (c *caller) waits(from, to time.Time) bool { return c.came.Before(from) && c.left.After(to) }

// Whoever comes and goes, and whenever the vendor throttles: no more calls
// than the rate and the burst allow, none in a pause, no token lies about
// while somebody may have it, those of higher priority go first, and within
// one priority subscribers take turns.
func TestQuotaKeepsItsRulesInAnySchedule(t *testing.T) {
	t.Parallel()
	schedules(t, 500, func(t *testing.T, rng *rand.Rand) {
		rate := []float64{1, 5, 20}[rng.IntN(3)]
		b := newLocalBucket(rate, time.Now)
		q := newQuota(b, false)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go q.run(ctx)

		var callers []*caller
		type span struct{ from, to time.Time }
		var pauses []span
		for range 10 + rng.IntN(40) {
			time.Sleep(upTo(rng, time.Second/2) + 1)
			switch x := rng.IntN(20); {
			case x == 0:
				d := upTo(rng, 4*time.Second)
				pauses = append(pauses, span{time.Now(), time.Now().Add(d)})
				q.pause(ctx, d)
			case x < 4:
				if q.try(ctx, laterLook) == 0 {
					callers = append(callers, &caller{laterLook, 0, time.Now(), time.Now(), true})
				}
			default:
				patience := time.Hour
				if rng.IntN(5) == 0 {
					patience = upTo(rng, 5*time.Second)
				}
				p, subscriber := []priority{firstLook, backfill}[rng.IntN(2)], rng.Int64N(3)
				for range 1 + rng.IntN(4) {
					c := &caller{p: p, subscriber: subscriber, came: time.Now()}
					callers = append(callers, c)
					go func() {
						ctx, cancel := context.WithTimeout(ctx, patience)
						defer cancel()
						c.granted = q.wait(ctx, p, subscriber) == nil
						c.left = time.Now()
					}()
				}
			}
			synctest.Wait()
			inPause := slices.ContainsFunc(pauses, func(s span) bool { return time.Now().Before(s.to) })
			if p, n := q.first(); n > 0 && !inPause && b.available() >= p.need(b.burst)+1e-6 {
				t.Fatalf("%d wait with priority %d though there are %v tokens", n, p, b.available())
			}
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()

		var granted []*caller
		for _, c := range callers {
			if c.left.IsZero() {
				t.Fatalf("somebody with priority %d waits for ever", c.p)
			}
			if c.granted {
				granted = append(granted, c)
			}
		}
		slices.SortStableFunc(granted, func(a, b *caller) int { return a.left.Compare(b.left) })
		for i, g := range granted {
			for _, s := range pauses {
				if g.left.After(s.from) && g.left.Before(s.to) {
					t.Fatalf("a call %v before the pause was over", s.to.Sub(g.left))
				}
			}
			for j, later := range granted[i:] {
				if n, most := j+1, b.burst+rate*later.left.Sub(g.left).Seconds()+1e-6; float64(n) > most {
					t.Fatalf("%d calls in %v, allowed are %v", n, later.left.Sub(g.left), most)
				}
			}
			for _, c := range callers {
				if c.p < g.p && c.waits(g.left, g.left) {
					t.Fatalf("priority %d got a token while %d waited", g.p, c.p)
				}
			}
			// Between two tokens of one subscriber another that waits gets one.
			next := slices.IndexFunc(granted[i:], func(c *caller) bool {
				return c.p == g.p && c.subscriber == g.subscriber && c.left.After(g.left)
			})
			if next < 0 || g.p == laterLook {
				continue
			}
			to := granted[i+next].left
			for _, c := range callers {
				if c.p == g.p && c.subscriber != g.subscriber && c.waits(g.left, to) && !slices.ContainsFunc(granted, func(o *caller) bool {
					return o.p == c.p && o.subscriber == c.subscriber && !o.left.Before(g.left) && !o.left.After(to)
				}) {
					t.Fatalf("subscriber %d got two tokens while %d waited", g.subscriber, c.subscriber)
				}
			}
		}
	})
}
