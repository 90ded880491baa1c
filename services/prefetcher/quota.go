package prefetcher

import (
	"context"
	"math"
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
	priorities
)

// need is how many tokens must be in a bucket of this size for a call.
func (p priority) need(burst float64) float64 {
	need := 1.0
	switch p {
	case laterLook:
		need = 2
	case backfill:
		need = burst / 2
	}
	return min(max(need, 1), burst)
}

// bucket holds the tokens, each good for one call. It is safe for concurrent
// use.
type bucket interface {
	// take takes up to n tokens for calls of this priority. If it returns
	// fewer, wait is how long there will be no more.
	take(ctx context.Context, p priority, n int) (got int, wait time.Duration)
	// pause stops all calls for d and empties the bucket: afterwards they
	// start at the rate and not with a burst.
	pause(ctx context.Context, d time.Duration)
	// available is the number of tokens now, as far as is known here.
	available() float64
}

// quota hands the tokens of a bucket to those who wait for them: by priority,
// and in turn by subscriber, so that nobody waits behind another's flood. It
// is safe for concurrent use.
type quota struct {
	bucket    bucket
	unlimited bool

	mu      sync.Mutex
	waiting [priorities]turns
	arrived chan struct{}
}

// newQuota returns the quota of a bucket; unlimited means that the bucket has
// no rate and only pauses matter. Somebody must call run for a limited one.
func newQuota(b bucket, unlimited bool) *quota {
	return &quota{bucket: b, unlimited: unlimited, arrived: make(chan struct{}, 1)}
}

// wait blocks until a call of this priority may be made for the subscriber, or
// ctx is done.
func (q *quota) wait(ctx context.Context, p priority, subscriber int64) error {
	for q.unlimited {
		got, d := q.bucket.take(ctx, p, 1)
		if got == 1 {
			return nil
		}
		if err := sleep(ctx, d, nil); err != nil {
			return err
		}
	}
	granted := make(chan struct{})
	q.mu.Lock()
	q.waiting[p].push(subscriber, granted)
	q.mu.Unlock()
	select {
	case q.arrived <- struct{}{}:
	default:
	}
	select {
	case <-granted:
		return nil
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.waiting[p].remove(subscriber, granted) {
		return context.Cause(ctx)
	}
	return nil // granted just now, and paid for
}

// try takes a token if there is one and nobody waits who goes first. Otherwise
// it returns how long there is none to be had, more than 0.
func (q *quota) try(ctx context.Context, p priority) time.Duration {
	if before, n := q.first(); n > 0 && before < p {
		return time.Second
	}
	got, d := q.bucket.take(ctx, p, 1)
	if got == 1 {
		return 0
	}
	return max(d, time.Millisecond)
}

// pause stops all calls of the fleet for d.
func (q *quota) pause(ctx context.Context, d time.Duration) { q.bucket.pause(ctx, d) }

// run hands out tokens until ctx is done.
func (q *quota) run(ctx context.Context) {
	for ctx.Err() == nil {
		p, n := q.first()
		if n == 0 {
			select {
			case <-q.arrived:
			case <-ctx.Done():
			}
			continue
		}
		got, d := q.bucket.take(ctx, p, n)
		q.grant(p, got)
		if got < n {
			_ = sleep(ctx, d, q.arrived) // the loop looks at ctx
		}
	}
}

// first returns the highest priority that anyone waits with, and how many do.
func (q *quota) first() (priority, int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for p := range priorities {
		if n := q.waiting[p].len(); n > 0 {
			return p, n
		}
	}
	return 0, 0
}

func (q *quota) grant(p priority, n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for range n {
		if granted := q.waiting[p].pop(); granted != nil {
			close(granted)
		}
	}
}

// waiters returns how many wait with priority p.
func (q *quota) waiters(p priority) float64 {
	q.mu.Lock()
	defer q.mu.Unlock()
	return float64(q.waiting[p].len())
}

// sleep waits for d, at most a second so that a bucket's bad news get old, or
// until woken or ctx is done.
func sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) error {
	t := time.NewTimer(min(d, time.Second))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-wake:
	case <-t.C:
	}
	return nil
}

// turns is a queue in which subscribers take turns.
type turns struct {
	order []int64 // subscribers who wait, the next one first
	by    map[int64][]chan struct{}
	n     int
}

func (t *turns) len() int { return t.n }

func (t *turns) push(subscriber int64, c chan struct{}) {
	if t.by == nil {
		t.by = map[int64][]chan struct{}{}
	}
	if len(t.by[subscriber]) == 0 {
		t.order = append(t.order, subscriber)
	}
	t.by[subscriber] = append(t.by[subscriber], c)
	t.n++
}

// pop returns nil when nobody waits.
func (t *turns) pop() chan struct{} {
	if t.n == 0 {
		return nil
	}
	subscriber := t.order[0]
	t.order = t.order[1:]
	c := t.by[subscriber][0]
	if rest := t.by[subscriber][1:]; len(rest) > 0 {
		t.by[subscriber] = rest
		t.order = append(t.order, subscriber)
	} else {
		delete(t.by, subscriber)
	}
	t.n--
	return c
}

// remove reports whether c was still waiting.
func (t *turns) remove(subscriber int64, c chan struct{}) bool {
	for i, w := range t.by[subscriber] {
		if w != c {
			continue
		}
		rest := append(t.by[subscriber][:i:i], t.by[subscriber][i+1:]...)
		t.n--
		if len(rest) > 0 {
			t.by[subscriber] = rest
			return true
		}
		delete(t.by, subscriber)
		for j, s := range t.order {
			if s == subscriber {
				t.order = append(t.order[:j:j], t.order[j+1:]...)
				break
			}
		}
		return true
	}
	return false
}

// localBucket is a token bucket in memory.
type localBucket struct {
	rate, burst float64
	now         func() time.Time

	mu     sync.Mutex
	tokens float64
	at     time.Time // when tokens was right
	paused time.Time // no call before
}

// newLocalBucket returns a bucket of rate calls per second with a second's
// worth in it, since what was spent before is not known; 0 is unlimited.
func newLocalBucket(rate float64, now func() time.Time) *localBucket {
	return &localBucket{rate: rate, burst: max(burstFactor*rate, 1), now: now, tokens: max(rate, 1), at: now()}
}

func (b *localBucket) take(_ context.Context, p priority, n int) (int, time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	if d := b.paused.Sub(now); d > 0 {
		return 0, d
	}
	if b.rate == 0 {
		return n, 0
	}
	b.refill(now)
	need := p.need(b.burst)
	// Clocks count nanoseconds; a token missing a billionth is a token.
	got := min(n, max(0, int(math.Floor(b.tokens-need+1+1e-9))))
	b.tokens -= float64(got)
	if got == n {
		return got, 0
	}
	return got, time.Duration((need-b.tokens)/b.rate*float64(time.Second)) + 1
}

func (b *localBucket) refill(now time.Time) {
	if now.After(b.at) {
		b.tokens = min(b.burst, b.tokens+now.Sub(b.at).Seconds()*b.rate)
		b.at = now
	}
}

func (b *localBucket) pause(_ context.Context, d time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if until := b.now().Add(d); until.After(b.paused) {
		b.paused, b.at, b.tokens = until, until, 0
	}
}

// empty takes all tokens away.
func (b *localBucket) empty() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refill(b.now())
	b.tokens = 0
}

func (b *localBucket) available() float64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return min(b.burst, b.tokens+max(b.now().Sub(b.at).Seconds(), 0)*b.rate)
}
