package prefetcher

import "sync"

// places counts who the events being handled belong to. No subscriber may have
// more than half of them while others wait. It is safe for concurrent use.
type places struct {
	half int // 0 means that nobody need share

	mu sync.Mutex
	by map[int64]int
}

// enter takes a place and reports whether the subscriber had its half before.
func (p *places) enter(subscriber int64) (crowded bool) {
	if p.half == 0 {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by == nil {
		p.by = map[int64]int{}
	}
	p.by[subscriber]++
	return p.by[subscriber] > p.half
}

func (p *places) leave(subscriber int64) {
	if p.half == 0 {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.by[subscriber]--; p.by[subscriber] == 0 {
		delete(p.by, subscriber)
	}
}
