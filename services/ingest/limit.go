package ingest

import (
	"math"
	"strconv"
	"sync/atomic"
	"time"
)

// limiter is the rate limit of one key on this replica: a token bucket that
// holds one second's worth and starts full. It is kept as the time at which
// the bucket will be full again, so that one atomic word is all there is to
// it. It is safe for concurrent use.
type limiter struct {
	rate  float64       // requests per second
	each  time.Duration // what one request costs
	burst time.Duration // what a full bucket holds
	full  atomic.Int64  // Unix nanoseconds
}

// newLimiter returns a full bucket, or nil for rate 0: no limit.
func newLimiter(rate float64) *limiter {
	if rate == 0 {
		return nil
	}
	each := time.Duration(math.Max(float64(time.Second)/rate, 1))
	return &limiter{rate: rate, each: each, burst: max(time.Second, each)}
}

// allowance is what a client is told about its limit.
type allowance struct {
	ok        bool
	limit     int           // requests a full bucket admits
	remaining int           // requests it would admit now
	reset     time.Duration // until it is full
	retry     time.Duration // until the next request is admitted, unless ok
}

// take admits a request, or says when it would be.
func (l *limiter) take(now time.Time) allowance {
	for {
		old := l.full.Load()
		full := max(old, now.UnixNano()) + int64(l.each)
		over := time.Duration(full-now.UnixNano()) - l.burst
		a := allowance{ok: over <= 0, limit: int(l.burst / l.each)}
		if !a.ok {
			a.retry, a.reset = over, time.Duration(old-now.UnixNano())
			return a
		}
		if l.full.CompareAndSwap(old, full) {
			a.reset = time.Duration(full - now.UnixNano())
			a.remaining = int((l.burst - a.reset) / l.each)
			return a
		}
	}
}

// seconds rounds up, as a client that comes back too early gets nothing.
func seconds(d time.Duration) string {
	return strconv.Itoa(int(math.Ceil(d.Seconds())))
}
