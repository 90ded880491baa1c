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
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
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

	share := cfg.RateLimit / float64(cfg.Replicas)
	q := newQuota(share, time.Now)
	pub := streams.NewPublisher(conn.JS, p.Registry)
	key := func() string { return string(cfg.APIKey()) }
	h := &handler{
		vendor:    NewFingerprint(cfg.BaseURL, key, cfg.Timeout, cfg.Concurrency),
		publisher: pub, quota: q, maxAge: cfg.MaxAge, now: time.Now, metrics: newMetrics(p.Registry, q),
	}
	work := func(stream, durable string) streams.Work {
		return streams.Work{Handle: streams.Each(h.handle), Consumer: streams.Consumer{
			Stream: stream, Durable: durable, Concurrency: cfg.Concurrency,
			Window: window(cfg.Concurrency, share), StopTimeout: cfg.ShutdownTimeout,
		}}
	}
	return streams.RunStage(ctx, streams.StagePrefetcher, conn, pub, p,
		work(streams.StreamIngest, streams.DurablePrefetcher),
		work(streams.StreamBackfill, streams.DurablePrefetcherBackfill),
	)
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
