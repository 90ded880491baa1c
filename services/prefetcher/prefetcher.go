// Package prefetcher fetches the Fingerprint event of every accepted id ahead
// of time and publishes it, or the reason why there is none.
//
//	FP_INGEST ─▶ prefetcher ──GET /v4/events/<id>──▶ Fingerprint Server API
//	                 └──▶ FP_ENRICHED
//
// The vendor's quota is the pipeline's real throughput, so every call counts:
// a result is kept until the stream has it, a trouble of the vendor's stops
// all calls instead of failing each event, and what waits, waits in the
// stream.
package prefetcher

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
)

// Program is the command of this service.
func Program() ops.Program[Config] {
	return ops.Program[Config]{
		Name: "prefetcher", Summary: "fetches the Fingerprint events of FP_INGEST and publishes them to FP_ENRICHED",
		OpsAddr: ":9102", Config: ReadConfig, Run: Run,
	}
}

// Run prefetches until ctx is done and the calls under way are finished. It
// starts with any of its servers down.
func Run(ctx context.Context, cfg Config, p *ops.Process) error {
	conn, err := streams.Connect(cfg.NATS, p.Log, p.Registry)
	if err != nil {
		return err
	}
	defer conn.Close()
	if cfg.APIKey() == "" {
		p.Log.Warn("FINGERPRINT_API_KEY is not set; the vendor will refuse every call")
	}
	key := func() string { return string(cfg.APIKey()) }
	vendor := NewFingerprint(cfg.BaseURL, key, cfg.Timeout, cfg.Concurrency)
	pub := streams.NewPublisher(conn.JS, p.Registry)
	return run(ctx, cfg, p, conn, vendor, pub, pub)
}

// run is Run behind its connections; results go out through out.
func run(ctx context.Context, cfg Config, p *ops.Process, conn *streams.Conn, vendor eventGetter, out publisher, pub *streams.Publisher) error {
	h := &handler{
		live: make(lane, cfg.Concurrency), backlog: make(lane, cfg.Concurrency), vendor: vendor, publisher: out, maxAge: cfg.MaxAge, fresh: cfg.FreshWithin, retention: cfg.Retention, now: time.Now, tracer: p.Tracer,
	}
	share := cfg.RateLimit / float64(cfg.Replicas)
	local := newLocalBucket(share, time.Now)
	h.quota = newQuota(local, cfg.RateLimit == 0)
	watch := func(context.Context) {}
	if cfg.Redis.Set() {
		rdb, err := redisclient.Open(cfg.Redis)
		if err != nil {
			return fmt.Errorf("REDIS_URL: %w", err)
		}
		defer rdb.Close()
		h.records = redisRecords{rdb}
		if cfg.RateLimit > 0 {
			fleet := newFleetBucket(rdb, cfg.RateLimit, local, p.Log)
			h.quota, watch = newQuota(fleet, false), fleet.run
		}
	}
	if cfg.RateLimit > 0 { // without a limit there is nothing to share out
		h.places.half = max(cfg.Concurrency/2, 1)
	}
	h.metrics = newMetrics(p.Registry, h.quota)

	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { watch(ctx) })
	wg.Go(func() { h.quota.run(ctx) })
	defer wg.Wait()
	defer cancel()

	work := func(stream, durable string) streams.Work {
		return streams.Work{Handle: streams.Each(h.handle), Consumer: streams.Consumer{
			// Twice as many handlers as calls: while one publishes, its
			// call's place goes to the next.
			Stream: stream, Durable: durable, Concurrency: 2 * cfg.Concurrency,
			Window: window(2*cfg.Concurrency, share), StopTimeout: cfg.ShutdownTimeout,
		}}
	}
	return streams.RunStage(ctx, streams.StagePrefetcher, conn, pub, p,
		work(streams.StreamIngest, streams.DurablePrefetcher),
		work(streams.StreamBackfill, streams.DurablePrefetcherBackfill),
	)
}

// redisRecords reads records where the persister writes them.
type redisRecords struct{ rdb redis.Cmdable }

// Record implements recordGetter. Trouble counts as no record: asking the
// vendor once too often is better than not at all.
func (r redisRecords) Record(ctx context.Context, id string) *record.Record {
	b, err := r.rdb.Get(ctx, record.Key(id)).Bytes()
	if err != nil {
		return nil
	}
	rec, err := record.Decode(b)
	if err != nil {
		return nil
	}
	return &rec
}

// window is how many events are held at once: what the handlers can have in
// hand, but no more than the quota admits within half the ack wait. The rest
// waits in the stream, where another replica can take it.
func window(concurrency int, rate float64) int {
	n := 2 * concurrency
	if rate > 0 {
		n = min(n, max(int(burstFactor*rate), int(rate*streams.AckWait.Seconds()/2), 1))
	}
	return n
}
