// Package ingest is the HTTP edge of the prefetch pipeline.
//
//	client ──POST /fingerprint/ingest──▶ key? body? subscriber? ──▶ FP_INGEST
//	       ◀──────────────── 202 ───────────────────────────────── ack
//
// It answers 202 only after the stream has acknowledged the event, and 503,
// within a bounded time, whenever it cannot be sure. It keeps nothing: what
// was not confirmed is not sent later, the client repeats it, and the message
// id makes repeating safe.
package ingest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

const keysInterval = 2 * time.Second

// Program is the command of this service.
func Program() ops.Program[Config] {
	return ops.Program[Config]{
		Name:    "ingest",
		Summary: "accepts Fingerprint events over HTTP and stores them for the prefetcher.\n`ingest keygen --help` tells how to make an API key.",
		OpsAddr: ":9101", Config: ReadConfig, Run: Run,
	}
}

// Run serves the public API until ctx is done. It then reports not ready,
// goes on accepting for the grace period, finishes the requests under way and
// returns nil. It fails when it cannot listen, when it has no keys at the
// start, when the NATS connection is gone for good, or when requests were cut
// off at the shutdown timeout. NATS being away is none of these: requests are
// answered 503 until it is there.
func Run(ctx context.Context, cfg Config, p *ops.Process) error {
	ln := cfg.Listener
	if ln == nil {
		var err error
		if ln, err = ops.Listen("INGEST_ADDR", cfg.Addr); err != nil {
			return err // names the setting already
		}
	}
	defer ln.Close()

	m := newMetrics(p.Registry)
	keys, err := loadKeyring(cfg.APIKeysFile, cfg.RateLimit, p.Log, m)
	if err != nil {
		return fmt.Errorf("INGEST_API_KEYS_FILE: %w", err)
	}
	p.Health.Expect("nats")
	conn, err := streams.Connect(cfg.NATS, p.Log, p.Registry)
	if err != nil {
		return err // says it was connecting
	}
	defer conn.Close()
	s := newServer(keys, streams.NewPublisher(conn.JS, p.Registry), cfg, p.Log, m)
	s.tracer = p.Tracer

	// These go on while the last requests are finished.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer stop()
	tasks.Go(func() { keys.watch(background, keysInterval) })
	tasks.Go(func() { conn.WatchReady(background, p.Health, streams.StreamIngest) })

	return s.serve(ctx, ln, cfg, conn.Closed(), p.Health)
}

// serve answers requests on ln until ctx is done and the rest is finished, or
// until lost is closed.
func (s *server) serve(ctx context.Context, ln net.Listener, cfg Config, lost <-chan struct{}, health *ops.Health) error {
	srv := s.httpServer()
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	s.log.Info("accepting", "addr", ln.Addr().String())

	var failure error
	select {
	case err := <-served:
		return fmt.Errorf("serve %s: %w", ln.Addr(), err)
	case <-lost:
		failure = streams.ErrClosed
	case <-ctx.Done():
	}
	// From here every answer closes its connection, so that clients open the
	// next one elsewhere and none is cut while a request travels on it.
	health.Drain()
	s.draining.Store(true)
	if failure == nil {
		s.log.Info("draining", "cause", context.Cause(ctx), "grace", cfg.ShutdownGrace)
		grace := time.NewTimer(cfg.ShutdownGrace)
		defer grace.Stop()
		select {
		case err := <-served:
			return fmt.Errorf("serve %s: %w", ln.Addr(), err)
		case <-lost:
			failure = streams.ErrClosed
		case <-grace.C:
		}
	}

	finish, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.ShutdownTimeout)
	defer cancel()
	if err := srv.Shutdown(finish); err != nil {
		srv.Close()
		failure = errors.Join(failure, fmt.Errorf("finish requests under way: %w", err))
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		failure = errors.Join(failure, fmt.Errorf("serve %s: %w", ln.Addr(), err))
	}
	return failure
}
