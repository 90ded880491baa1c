package streams

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Consumer runs a handler over one durable: it pulls what fits into memory,
// hands it out, and acts on the decisions. It is the only place that acks.
//
// Messages it holds are kept alive at the server and are handed back only at
// shutdown; so a delivery count rises only when a process died, and an outage
// uses up nobody's attempts.
type Consumer struct {
	Stage, Stream, Durable string

	JS        jetstream.JetStream
	Publisher *Publisher // for dead letters
	Log       *slog.Logger
	Metrics   *ConsumerMetrics

	// Concurrency is how many handler calls run at once; Batch is how many
	// messages each gets at most. Both default to 1.
	Concurrency, Batch int
	// Linger is how long a batch that is not full waits for more while
	// others are being handled; an idle stage never waits.
	Linger time.Duration
	// Window is how many messages are held at once, beside those parked by
	// RetryAfter. It defaults to twice what the handlers can have in hand.
	Window int
	// MaxParked stops pulling while so many are parked; default 5,000.
	MaxParked int
	// StopTimeout bounds how long handlers may take at shutdown, default 20 s.
	StopTimeout time.Duration

	// Reachable, if set, is told whether the durable can be pulled from.
	Reachable func(error)
}

const (
	// pullExpiry bounds a pull request. It is short because at shutdown
	// whatever a pull still brings must be awaited and handed back. Each
	// pull is a request of its own (Fetch): nats.go's Consume can lose its
	// only outstanding request and then sleep on a backlog.
	pullExpiry   = time.Second
	pullRetry    = 250 * time.Millisecond
	lookupPeriod = time.Second

	// progressEvery keeps held messages from being given to somebody else.
	progressEvery = AckWait / 6

	// deadRetry is how long a message waits whose dead letter has no room.
	deadRetry = 5 * time.Second

	holdMin = 250 * time.Millisecond
	holdMax = 5 * time.Second

	// settledMemory is how many settled sequences are remembered, so that a
	// message whose ack was lost on the way is acked again and not handled
	// again.
	settledMemory = 8192
)

// Run blocks until ctx is done and everything in hand is settled or handed
// back. It waits for as long as it takes for the server and the durable to
// appear. The error is non-nil only when handlers outlast StopTimeout.
func (c *Consumer) Run(ctx context.Context, handle Handler) error {
	conf := *c
	conf.Concurrency = max(conf.Concurrency, 1)
	conf.Batch = max(conf.Batch, 1)
	if conf.Window == 0 {
		conf.Window = 2 * conf.Concurrency * conf.Batch
	}
	if conf.MaxParked == 0 {
		conf.MaxParked = 5000
	}
	if conf.StopTimeout == 0 {
		conf.StopTimeout = 20 * time.Second
	}
	r := &runner{
		Consumer: &conf, handle: handle, metrics: conf.Metrics.of(conf.Durable),
		held:    map[uint64]*Delivery{},
		settled: make(map[uint64]time.Time, settledMemory),
		results: make(chan result, conf.Concurrency),
		found:   make(chan lookup, 1),
		allowed: conf.Concurrency,
	}
	r.log = conf.Log.With("consumer", conf.Durable)
	return r.run(ctx)
}

// runner is the state of one Run. Only its loop touches it; handlers run in
// goroutines of their own and answer through results.
type runner struct {
	*Consumer
	handle  Handler
	metrics *consumerMetrics
	log     *slog.Logger

	// Pulling.
	durable   jetstream.Consumer // nil until found
	found     chan lookup
	looking   bool
	pull      jetstream.MessageBatch
	pulled    <-chan jetstream.Msg // nil when no pull is out
	pullAfter time.Time

	// Messages in hand: every one is in held, and in at most one of ready,
	// suspects and parked; the rest are with handlers or await their ack.
	held     map[uint64]*Delivery
	ready    queue
	suspects []*Delivery
	parked   parking
	unacked  []*Delivery
	pending  uint64               // how many wait in the stream, by the latest delivery
	newest   uint64               // highest sequence delivered
	settled  map[uint64]time.Time // when each was stored: a restored stream may use a sequence again
	ring     [settledMemory]uint64
	ringNext int

	// Handling.
	results chan result
	running int
	alone   bool // a suspect is running
	allowed int  // concurrency, growing back after a hold

	// Holding; number is 0 when not.
	hold struct {
		number  int
		cause   Cause
		since   time.Time
		until   time.Time
		pause   time.Duration
		probing bool
	}
	holds int
}

type lookup struct {
	durable jetstream.Consumer
	err     error
}

type result struct {
	batch     []*Delivery
	decisions []Decision
	hold      int // number of the hold it was a probe of, or 0
	alone     bool
	took      time.Duration
	panicked  bool
}

func (r *runner) run(ctx context.Context) error {
	progress := time.NewTicker(progressEvery)
	defer progress.Stop()
	wake := time.NewTimer(0)
	defer wake.Stop()
	for {
		now := time.Now()
		r.unpark(now)
		r.dispatch(ctx, now)
		r.request(ctx, now)
		r.observe()
		wake.Reset(r.nextWake(now))

		select {
		case <-ctx.Done():
			return r.stop()
		case l := <-r.found:
			r.looked(l)
		case msg, open := <-r.pulled:
			r.receive(msg, open)
			r.receiveMore()
		case res := <-r.results:
			r.settle(res)
		case <-progress.C:
			r.keepAlive(time.Now())
		case <-wake.C:
		}
	}
}

// nextWake returns how long nothing needs to happen by itself.
func (r *runner) nextWake(now time.Time) time.Duration {
	next := now.Add(time.Minute)
	earlier := func(t time.Time) {
		if t.After(now) && t.Before(next) {
			next = t
		}
	}
	if r.parked.Len() > 0 {
		earlier(r.parked[0].due)
	}
	if r.hold.number > 0 {
		earlier(r.hold.until)
	}
	if d := r.ready.front(); d != nil && r.Linger > 0 {
		earlier(d.arrived.Add(r.Linger))
	}
	earlier(r.pullAfter)
	return next.Sub(now)
}

// stop takes nothing new, hands back what no handler has begun, lets the
// others finish, and acks what they did.
//
// Nothing is handed back before the last pull has ended, a second at most: that
// pull would get it again, and again, and in one second a message collects the
// deliveries of one that kills its process.
func (r *runner) stop() error {
	deadline := time.NewTimer(r.StopTimeout)
	defer deadline.Stop()
	var back []jetstream.Msg
	handBack := func(msgs ...jetstream.Msg) {
		if back = append(back, msgs...); r.pulled != nil {
			return
		}
		for _, msg := range back {
			_ = msg.Nak() // the server notices by itself when this is lost
			r.metrics.handedBack.Inc()
		}
		back = nil
	}
	drop := func(d *Delivery) {
		delete(r.held, d.Sequence)
		handBack(d.msg)
	}
	for _, d := range slices.Concat(r.ready.pop(r.ready.len()), r.suspects, r.parked) {
		drop(d)
	}
	for r.running > 0 || r.pulled != nil {
		select {
		case msg, open := <-r.pulled:
			if open {
				back = append(back, msg)
				continue
			}
			r.pulled = nil
			handBack()
		case res := <-r.results:
			r.running--
			for i, d := range res.batch {
				switch dec := res.decisions[i]; dec.kind {
				case done:
					r.metrics.acked.Inc()
					r.ack(d)
				case deadLetter:
					r.metrics.dead(dec.reason).Inc()
					r.ack(d)
				default:
					drop(d)
				}
			}
		case <-deadline.C:
			r.pulled = nil
			handBack()
			return fmt.Errorf("consumer %s: %d handler calls still running after %v; their messages will be delivered again", r.Durable, r.running, r.StopTimeout)
		}
	}
	r.keepAlive(time.Now()) // acks that had failed
	return nil
}

func (r *runner) observe() {
	r.metrics.inHand.Set(float64(len(r.held)))
	r.metrics.parked.Set(float64(r.parked.Len()))
}
