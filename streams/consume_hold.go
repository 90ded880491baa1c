package streams

import (
	"math/rand/v2"
	"time"
)

// holdNumber is the number of the hold in force, or of the one about to start.
func (r *runner) holdNumber() int {
	if r.hold.number > 0 {
		return r.hold.number
	}
	return r.holds + 1
}

// startHold begins a hold, or prolongs it when a probe failed. A call that had
// begun before the hold changes nothing.
func (r *runner) startHold(now time.Time, res result, dec Decision) {
	switch {
	case r.hold.number == 0:
		r.holds++
		r.hold.number, r.hold.cause, r.hold.since, r.hold.pause = r.holds, dec.cause, now, holdMin
		r.metrics.holding(dec.cause, true)
		r.log.Warn("stage holds", "cause", dec.cause, "err", dec.err)
	case res.hold == r.hold.number:
		r.hold.probing = false
		r.hold.pause = min(2*r.hold.pause, holdMax)
		if r.hold.cause != dec.cause {
			r.metrics.holding(r.hold.cause, false)
			r.metrics.holding(dec.cause, true)
			r.hold.cause = dec.cause
			r.log.Warn("stage holds", "cause", dec.cause, "err", dec.err)
		}
	default:
		return
	}
	r.hold.until = now.Add(r.hold.pause*4/5 + rand.N(r.hold.pause*2/5))
}

// endHold goes on, one call at a time first and doubling from there: what was
// away may not stand the full load at once.
func (r *runner) endHold(now time.Time) {
	r.metrics.holding(r.hold.cause, false)
	r.log.Info("stage goes on", "cause", r.hold.cause, "held", now.Sub(r.hold.since).Round(time.Millisecond).String())
	r.hold.number, r.hold.probing = 0, false
	r.allowed = 1
}

// probe takes a message for trying whether the cause of the hold is gone: one
// the hold has not seen if there is any, else the one that waited longest.
func (r *runner) probe() *Delivery {
	for range r.ready.len() {
		d := r.ready.pop(1)[0]
		if d.held != r.hold.number {
			return d
		}
		r.ready.push(d)
	}
	if len(r.suspects) > 0 {
		d := r.suspects[0]
		r.suspects = r.suspects[1:]
		return d
	}
	if r.ready.len() > 0 {
		return r.ready.pop(1)[0]
	}
	return nil
}

// untried reports whether there is a message the hold has not seen.
func (r *runner) untried() bool {
	for i := range r.ready.len() {
		if r.ready.at(i).held != r.hold.number {
			return true
		}
	}
	return false
}
