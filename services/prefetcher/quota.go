package prefetcher

import (
	"context"
	"sync"
	"time"
)

// burstFactor: the vendor's bucket always holds three times its rate ("burst
// size is always API Rate Limit * 3", the vendor's page on account limits).
const burstFactor = 3

// throttlePause is how long a 429 that names no time stops all calls. The
// vendor's bucket refills every second.
const throttlePause = time.Second

// priority says how full the bucket must be for a call. The rest of it is for
// those who may go first.
type priority int

const (
	firstLook priority = iota // a live event, not asked for yet
	laterLook                 // a live event that was not there yet
	backfill                  // replays, redrives, old events
)

// quota is a token bucket for the vendor's rate limit. It is safe for
// concurrent use.
type quota struct {
	rate, burst float64
	now         func() time.Time

	mu     sync.Mutex
	tokens float64
	at     time.Time // when tokens was right
	paused time.Time // no call before
}

// newQuota returns a full bucket of rate calls per second; 0 is unlimited.
func newQuota(rate float64, now func() time.Time) *quota {
	burst := max(burstFactor*rate, 1)
	return &quota{rate: rate, burst: burst, now: now, tokens: burst, at: now()}
}

// wait blocks until a call of this priority may be made, or ctx is done.
func (q *quota) wait(ctx context.Context, p priority) error {
	for {
		d := q.take(p)
		if d <= 0 {
			return nil
		}
		t := time.NewTimer(d)
		select {
		case <-ctx.Done():
			t.Stop()
			return context.Cause(ctx)
		case <-t.C:
		}
	}
}

// take takes a token, or returns how long there is none to be had.
func (q *quota) take(p priority) time.Duration {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := q.now()
	if d := q.paused.Sub(now); d > 0 {
		return d
	}
	if q.rate == 0 {
		return 0
	}
	if now.After(q.at) {
		q.tokens = min(q.burst, q.tokens+now.Sub(q.at).Seconds()*q.rate)
		q.at = now
	}
	need := 1.0
	switch p {
	case laterLook:
		need = 2
	case backfill:
		need = q.burst / 2
	}
	need = min(max(need, 1), q.burst)
	// Clocks count nanoseconds; a token missing a billionth is a token.
	if q.tokens+1e-9 < need {
		return time.Duration((need-q.tokens)/q.rate*float64(time.Second)) + 1
	}
	q.tokens--
	return 0
}

// pause stops all calls for d and empties the bucket: afterwards they start at
// the rate and not with a burst.
func (q *quota) pause(d time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if until := q.now().Add(d); until.After(q.paused) {
		q.paused, q.at, q.tokens = until, until, 0
	}
}

// available is the number of tokens in the bucket now.
func (q *quota) available() float64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return min(q.burst, q.tokens+max(q.now().Sub(q.at).Seconds(), 0)*q.rate)
}
