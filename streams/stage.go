package streams

import (
	"context"
	"errors"
	"sync"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Work is one durable of a stage and what to do with its messages. Of the
// consumer only what differs from stage to stage needs to be set.
type Work struct {
	Consumer Consumer
	Handle   Handler
}

// RunStage runs the durables of a stage side by side, with their lag on the
// operators' port, until ctx is done and everything in hand is settled, or the
// connection is gone for good.
func RunStage(ctx context.Context, stage string, conn *Conn, pub *Publisher, p *ops.Process, works ...Work) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-conn.Closed():
			cancel(ErrClosed)
		case <-ctx.Done():
		}
		p.Health.Drain()
	})
	metrics := NewConsumerMetrics(p.Registry)
	var refs []StreamRef
	errs := make([]error, len(works))
	part := func(w Work) string { return "consumer " + w.Consumer.Durable }
	for _, w := range works { // all before the first runs: no part is ready while another is not named
		p.Health.Expect(part(w))
	}
	for i, w := range works {
		c, part := w.Consumer, part(w)
		c.Stage, c.JS, c.Publisher, c.Log, c.Metrics = stage, conn.JS, pub, p.Log, metrics
		c.Reachable = func(err error) { p.Health.Set(part, err) }
		refs = append(refs, StreamRef{c.Stream, []string{c.Durable}})
		wg.Go(func() {
			if errs[i] = c.Run(ctx, w.Handle); errs[i] != nil {
				cancel(errs[i])
			}
		})
	}
	lag := NewLagCollector(conn.JS, p.Log, p.Registry, refs...)
	wg.Go(func() { lag.Run(ctx) })
	wg.Wait()
	if cause := context.Cause(ctx); errors.Is(cause, ErrClosed) {
		errs = append(errs, cause)
	}
	return errors.Join(errs...)
}
