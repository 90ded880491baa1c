package prefetcher

import (
	"slices"
	"sync"
)

// How many different ids in a row must fail before it is the stage's trouble
// and no longer theirs. The vendor refusing our key in its own words needs one
// confirmation: a second answer of that kind is hardly an accident.
const (
	tripTransient     = 5
	tripMisconfigured = 2
)

// breaker tells trouble of the stage from trouble with single events. A single
// event can never trip it, however often it fails. It is safe for concurrent
// use.
type breaker struct {
	mu            sync.Mutex
	transient     []string // different ids that failed since the last real answer
	misconfigured []string
}

// fail counts a failure and reports whether the stage should hold.
func (b *breaker) fail(o Outcome, id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if o == Misconfigured {
		b.misconfigured = add(b.misconfigured, id, tripMisconfigured)
		return len(b.misconfigured) >= tripMisconfigured
	}
	b.transient = add(b.transient, id, tripTransient)
	return len(b.transient) >= tripTransient
}

// ok counts an answer about an event, good or bad: the vendor is there.
func (b *breaker) ok() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.transient, b.misconfigured = b.transient[:0], b.misconfigured[:0]
}

func add(ids []string, id string, most int) []string {
	if len(ids) >= most || slices.Contains(ids, id) {
		return ids
	}
	return append(ids, id)
}
