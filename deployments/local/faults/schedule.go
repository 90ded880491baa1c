//go:build unix

package faults

import (
	"math/rand/v2"
	"time"
)

// step is one fault of a schedule.
type step struct {
	At   time.Duration // from the start of the phase
	For  time.Duration // how long it is kept up
	Name string
	Pick uint64 // decides on the target and other details
}

// mostAtOnce is how many faults overlap at most.
const mostAtOnce = 3

// plan returns the schedule of a random mix: the same for the same seed,
// length and catalog. Every fault comes up before one comes up again. Faults
// that overlap hit different parts, so that a part is never down altogether
// while its replicas are promised to cover for each other.
func plan(seed uint64, length time.Duration, catalog []fault) (steps []step) {
	r := rand.New(rand.NewPCG(seed, 0x6661756c7473))
	until := map[string]time.Duration{} // by part
	var bag []fault
	var at time.Duration
	next := func() (fault, bool) {
		for range 2 {
			for i, f := range bag {
				if until[f.part] <= at && (f.before == 0 || at < time.Duration(float64(length)*f.before)) {
					bag = append(bag[:i:i], bag[i+1:]...)
					return f, true
				}
			}
			if len(bag) > len(catalog) {
				break
			}
			more := append([]fault(nil), catalog...)
			r.Shuffle(len(more), func(i, j int) { more[i], more[j] = more[j], more[i] })
			bag = append(bag, more...)
		}
		return fault{}, false
	}
	for at < length {
		busy := 0
		for _, end := range until {
			if end > at {
				busy++
			}
		}
		if busy < mostAtOnce {
			if f, ok := next(); ok {
				d := f.min + time.Duration(r.Int64N(int64(f.max-f.min)+1))
				if at+d > length { // it would not be over
					d = 0
				}
				if d > 0 {
					steps = append(steps, step{at, d, f.name, r.Uint64()})
					until[f.part] = at + d + rest
				}
			}
		}
		at += time.Second + time.Duration(r.Int64N(int64(4*time.Second)))
	}
	return steps
}

// rest is what a part is given to come back before it is hit again.
const rest = 2 * time.Second
