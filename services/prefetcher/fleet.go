package prefetcher

import (
	"context"
	_ "embed"
	"fmt"
	"log/slog"
	"math"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
)

//go:embed fleet.lua
var fleetScript string

// fleetBucket is one token bucket for all replicas, in Redis and by its clock.
// While Redis is away it gives out this replica's share instead: it neither
// stalls nor runs free. It is safe for concurrent use.
type fleetBucket struct {
	rdb         redis.Scripter
	script      *redis.Script
	rate, burst float64
	share       *localBucket
	log         *slog.Logger

	away   atomic.Bool
	tokens atomic.Uint64 // as float64 bits, by the latest answer
}

// newFleetBucket returns the fleet's bucket of rate calls per second; share is
// this replica's part of it.
func newFleetBucket(rdb redis.Scripter, rate float64, share *localBucket, log *slog.Logger) *fleetBucket {
	return &fleetBucket{
		rdb: rdb, script: redis.NewScript(fleetScript), rate: rate, burst: max(burstFactor*rate, 1), share: share, log: log,
	}
}

// run asks Redis once a second, so that its coming and going is noticed also
// when there is nothing to fetch.
func (b *fleetBucket) run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		pause := time.Duration(0)
		if b.away.Load() {
			// What the shares have spent is still in the fleet's bucket:
			// even the shortest pause empties it.
			pause = time.Microsecond
		}
		if _, _, err := b.ask(ctx, firstLook, 0, pause); ctx.Err() == nil {
			b.reached(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (b *fleetBucket) take(ctx context.Context, p priority, n int) (int, time.Duration) {
	if !b.away.Load() {
		got, wait, err := b.ask(ctx, p, n, 0)
		if err == nil {
			return got, wait
		}
		if ctx.Err() != nil {
			return 0, time.Second
		}
		b.reached(err)
	}
	return b.share.take(ctx, p, n)
}

func (b *fleetBucket) pause(ctx context.Context, d time.Duration) {
	b.share.pause(ctx, d)
	if b.away.Load() {
		return
	}
	if _, _, err := b.ask(ctx, firstLook, 0, d); err != nil && ctx.Err() == nil {
		b.reached(err)
	}
}

// reached remembers whether Redis answers, and says so when that changes.
func (b *fleetBucket) reached(err error) {
	if was := b.away.Swap(err != nil); was == (err != nil) {
		return
	}
	if err == nil {
		b.log.Info("the vendor's quota is shared through Redis again")
		return
	}
	b.share.empty() // its tokens may have been spent from the fleet's bucket
	b.log.Warn("Redis is away: calling the vendor at this replica's share of the quota", "rate", b.share.rate, "err", err)
}

// ask runs the script: it first pauses, if pause is more than 0, and then takes
// up to n tokens.
func (b *fleetBucket) ask(ctx context.Context, p priority, n int, pause time.Duration) (int, time.Duration, error) {
	out, err := b.script.Run(ctx, b.rdb, []string{streams.QuotaKey}, b.rate, b.burst, p.need(b.burst), n, pause.Microseconds()).Slice()
	if err != nil {
		return 0, 0, fmt.Errorf("take from the fleet's quota: %w", err)
	}
	if len(out) != 3 {
		return 0, 0, fmt.Errorf("take from the fleet's quota: %d values instead of 3", len(out))
	}
	got, ok1 := out[0].(int64)
	wait, ok2 := out[1].(int64)
	text, ok3 := out[2].(string)
	tokens, err := strconv.ParseFloat(text, 64)
	if !ok1 || !ok2 || !ok3 || err != nil {
		return 0, 0, fmt.Errorf("take from the fleet's quota: unexpected answer")
	}
	b.tokens.Store(math.Float64bits(tokens))
	return int(got), time.Duration(wait) * time.Microsecond, nil
}

func (b *fleetBucket) available() float64 {
	if b.away.Load() {
		return b.share.available()
	}
	return math.Float64frombits(b.tokens.Load())
}

// shared reports whether the fleet's bucket is in use.
func (b *fleetBucket) shared() bool { return !b.away.Load() }
