// Package persister is the last stage: it writes records to Redis, where the
// scorer reads them.
//
//	FP_ENRICHED ─▶ persister ─guarded write─▶ Redis fp:prefetch:<request_id>
//
// Where something stands already, a write is guarded by a script that compares
// its head: another subscriber's record is not touched, ready is never replaced
// by less, and an older event never replaces a newer one. So redelivery, replay
// and disorder are harmless, and Redis can be rebuilt from FP_ENRICHED.
package persister

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
)

// writers is how many batches are written at once: while Redis works on one,
// the next is prepared.
const writers = 3

// Program is the command of this service.
func Program() ops.Program[Config] {
	return ops.Program[Config]{
		Name: "persister", Summary: "writes the records of FP_ENRICHED to Redis, and pending markers for FP_INGEST",
		OpsAddr: ":9103", Config: ReadConfig, Run: Run,
	}
}

// Run persists until ctx is done and what is in hand is written. It starts
// with any of its servers down.
func Run(ctx context.Context, cfg Config, p *ops.Process) error {
	rdb, err := redisclient.Open(cfg.Redis)
	if err != nil {
		return fmt.Errorf("REDIS_URL: %w", err)
	}
	defer rdb.Close()
	return runWith(ctx, cfg, p, rdb, func() recordStore { return newStore(rdb, cfg.TTL) })
}

// runWith is Run with a store for each durable: whether records stand already
// differs between them.
func runWith(ctx context.Context, cfg Config, p *ops.Process, rdb redis.UniversalClient, newStore func() recordStore) error {
	conn, err := streams.Connect(cfg.NATS, p.Log, p.Registry)
	if err != nil {
		return err
	}
	defer conn.Close()

	m := newMetrics(p.Registry)
	newHandler := func() *handler {
		return &handler{store: newStore(), detail: cfg.Event, metrics: m, now: time.Now, tracer: p.Tracer}
	}
	work := func(stream, durable string, batches int, handle streams.Handler) streams.Work {
		return streams.Work{Handle: handle, Consumer: streams.Consumer{
			Stream: stream, Durable: durable, Concurrency: batches, Batch: cfg.Batch, Linger: cfg.Linger,
			Window: (batches + 2) * cfg.Batch, StopTimeout: cfg.ShutdownTimeout,
		}}
	}

	p.Health.Expect("redis")
	watchCtx, stopWatching := context.WithCancel(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { watchRedis(watchCtx, rdb, p) })
	defer watching.Wait()
	defer stopWatching()
	return streams.RunStage(ctx, streams.StagePersister, conn, streams.NewPublisher(conn.JS, p.Registry), p,
		work(streams.StreamEnriched, streams.DurablePersister, writers, newHandler().persist),
		work(streams.StreamBackfill, streams.DurablePersisterBackfill, 1, newHandler().persist),
		work(streams.StreamIngest, streams.DurablePending, 1, newHandler().mark),
	)
}

// watchRedis keeps the service's readiness true to whether Redis answers.
func watchRedis(ctx context.Context, rdb redis.UniversalClient, p *ops.Process) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		err := rdb.Ping(ctx).Err()
		if err != nil && !errors.Is(err, context.Canceled) {
			err = fmt.Errorf("ping: %w", err)
		}
		p.Health.Set("redis", err)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
