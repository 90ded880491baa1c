package streams

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/nats-io/nats.go"
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
		settled: make(map[uint64]struct{}, settledMemory),
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
	settled  map[uint64]struct{}
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

// --- pulling

// request looks the durable up or asks for more messages, whichever is due.
func (r *runner) request(ctx context.Context, now time.Time) {
	if r.pulled != nil || r.looking || now.Before(r.pullAfter) {
		return
	}
	if r.durable == nil {
		r.looking = true
		go func() {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			d, err := r.JS.Consumer(ctx, r.Stream, r.Durable)
			r.found <- lookup{d, err}
		}()
		return
	}
	n := r.wanted()
	if n <= 0 {
		return
	}
	pull, err := r.durable.Fetch(n, jetstream.FetchMaxWait(pullExpiry))
	if err != nil {
		r.unreachable(fmt.Errorf("pull: %w", err))
		return
	}
	r.pull, r.pulled = pull, pull.Messages()
}

// wanted is how many messages may be pulled now.
func (r *runner) wanted() int {
	free := r.Window - (len(r.held) - r.parked.Len())
	if r.parked.Len() >= r.MaxParked {
		return 0
	}
	if r.hold.number > 0 {
		// One at a time, so that each probe can be another message: a
		// stage must not hold for ever because of a single one.
		if free <= 0 || r.untried() {
			return 0
		}
		return 1
	}
	if free < max(r.Window/4, 1) {
		return 0
	}
	return free
}

func (r *runner) looked(l lookup) {
	r.looking = false
	if l.err != nil {
		r.unreachable(fmt.Errorf("look up durable %s of %s: %w", r.Durable, r.Stream, l.err))
		r.pullAfter = time.Now().Add(lookupPeriod)
		return
	}
	r.durable = l.durable
	r.reachable(nil)
}

func (r *runner) unreachable(err error) {
	r.reachable(err)
	r.log.Debug("cannot pull", "err", err)
	r.pullAfter = time.Now().Add(pullRetry)
}

func (r *runner) reachable(err error) {
	if r.Reachable != nil {
		r.Reachable(err)
	}
}

// receive takes one message of the current pull; open is false when the pull
// has ended.
func (r *runner) receive(msg jetstream.Msg, open bool) {
	if !open {
		err := r.pull.Error()
		r.pull, r.pulled = nil, nil
		switch {
		case err == nil:
			r.reachable(nil)
		case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrConsumerDeleted), errors.Is(err, jetstream.ErrConsumerNotFound):
			r.durable = nil // deleted, or no leader: look it up again
			r.unreachable(fmt.Errorf("pull: %w", err))
		default:
			r.unreachable(fmt.Errorf("pull: %w", err))
		}
		return
	}
	md, err := msg.Metadata()
	if err != nil {
		r.log.Error("message without metadata", "subject", msg.Subject(), "err", err)
		return
	}
	seq, now := md.Sequence.Stream, time.Now()
	r.metrics.received.Inc()
	if md.NumDelivered > 1 {
		r.metrics.redelivered.Inc()
		r.log.Debug("message delivered again", "seq", seq, "deliveries", md.NumDelivered)
	}
	if d, ok := r.held[seq]; ok { // in hand already: only the ack handle is new
		d.msg, d.delivered, d.touched = msg, int(md.NumDelivered), now
		return
	}
	if _, ok := r.settled[seq]; ok && md.NumDelivered > 1 { // its ack got lost
		d := newDelivery(msg, md, now)
		r.held[seq] = d
		r.ack(d)
		return
	}
	d := newDelivery(msg, md, now)
	r.metrics.queueWait.Observe(now.Sub(d.stored).Seconds())
	r.held[seq] = d
	r.enqueue(d)
}

// receiveMore takes what else has arrived already, so that batches fill up
// before they are handed out.
func (r *runner) receiveMore() {
	for range r.Batch {
		if r.pulled == nil {
			return
		}
		select {
		case msg, open := <-r.pulled:
			r.receive(msg, open)
		default:
			return
		}
	}
}

func (r *runner) enqueue(d *Delivery) {
	if d.suspect() {
		r.suspects = append(r.suspects, d)
		return
	}
	r.ready.push(d)
}

// --- handling

func (r *runner) unpark(now time.Time) {
	for r.parked.Len() > 0 && !r.parked[0].due.After(now) {
		r.enqueue(heap.Pop(&r.parked).(*Delivery))
	}
}

// dispatch starts as many handler calls as may run now.
func (r *runner) dispatch(ctx context.Context, now time.Time) {
	for {
		batch, alone := r.next(now)
		if len(batch) == 0 {
			return
		}
		r.running++
		r.alone = alone
		number := 0
		if r.hold.number > 0 {
			number, r.hold.probing = r.hold.number, true
		}
		for _, d := range batch {
			d.Deliveries = d.delivered
			if d.Looks == 0 {
				d.FirstLook = now
			}
		}
		go func() { r.results <- r.call(ctx, batch, number, alone) }()
	}
}

// next takes the batch to be handled now, if any.
func (r *runner) next(now time.Time) (batch []*Delivery, alone bool) {
	if r.alone {
		return nil, false
	}
	if r.hold.number > 0 {
		if r.hold.probing || r.running > 0 || now.Before(r.hold.until) {
			return nil, false
		}
		if d := r.probe(); d != nil {
			return []*Delivery{d}, false
		}
		return nil, false
	}
	if n := len(r.suspects); n > 0 {
		if r.running > 0 {
			return nil, false
		}
		// In random order: after each crash half of the innocent ones are
		// through on average, before the guilty one is tried again.
		i := rand.IntN(n)
		d := r.suspects[i]
		r.suspects[i] = r.suspects[n-1]
		r.suspects = r.suspects[:n-1]
		return []*Delivery{d}, true
	}
	n := min(r.ready.len(), r.Batch)
	if n == 0 || r.running >= r.allowed {
		return nil, false
	}
	if n < r.Batch && r.running > 0 && r.Linger > 0 && now.Sub(r.ready.front().arrived) < r.Linger {
		return nil, false
	}
	return r.ready.pop(n), false
}

// probe takes a message for trying whether the cause of the hold is gone: one
// the hold has not seen if there is any, else the one that waited longest.
func (r *runner) probe() *Delivery {
	for range r.ready.len() {
		d := r.ready.pop(1)[0]
		if d.held != r.hold.number {
			return d
		}
		r.ready.push(d)
	}
	if len(r.suspects) > 0 {
		d := r.suspects[0]
		r.suspects = r.suspects[1:]
		return d
	}
	if r.ready.len() > 0 {
		return r.ready.pop(1)[0]
	}
	return nil
}

// untried reports whether there is a message the hold has not seen.
func (r *runner) untried() bool {
	for i := range r.ready.len() {
		if r.ready.at(i).held != r.hold.number {
			return true
		}
	}
	return false
}

// call runs the handler and stores the dead letters it decided on.
func (r *runner) call(ctx context.Context, batch []*Delivery, number int, alone bool) (res result) {
	start := time.Now()
	res = result{batch: batch, hold: number, alone: alone}
	func() {
		defer func() {
			if p := recover(); p != nil {
				res.panicked = true
				r.log.Error("handler panicked", "seq", batch[0].Sequence, "panic", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
			}
		}()
		res.decisions = r.handle(ctx, batch)
	}()
	if res.panicked || len(res.decisions) != len(batch) {
		res.panicked = true
		res.decisions = make([]Decision, len(batch))
		for i, d := range batch {
			d.panics++
			res.decisions[i] = RetryAfter(time.Second, errors.New("handler panicked"))
			if d.panics > maxPanics { // even giving it up panics
				res.decisions[i] = DeadLetter(DeadPoison, errors.New("handler panicked"))
			}
		}
	}
	for i, dec := range res.decisions {
		if dec.kind != deadLetter {
			continue
		}
		if err := r.publishDead(context.WithoutCancel(ctx), batch[i], dec); err != nil {
			res.decisions[i] = Hold(CauseNATS, fmt.Errorf("dead letter: %w", err))
		}
	}
	res.took = time.Since(start)
	return res
}

// --- settling

// settle acts on the decisions of one handler call.
func (r *runner) settle(res result) {
	now := time.Now()
	r.running--
	if res.alone {
		r.alone = false
	}
	r.metrics.duration.Observe(res.took.Seconds())
	holding := Decision{}
	for i, d := range res.batch {
		d.Looks++
		dec := res.decisions[i]
		switch dec.kind {
		case done:
			r.metrics.acked.Inc()
			r.ack(d)
		case deadLetter:
			r.metrics.dead(dec.reason).Inc()
			r.log.Error("message dead-lettered", "reason", dec.reason, "stream", r.Stream, "seq", d.Sequence, "deliveries", d.Deliveries, "err", dec.err)
			r.ack(d)
		case hold:
			r.metrics.held.Inc()
			holding = dec
			d.held = r.holdNumber()
			r.enqueue(d)
		case retryAfter:
			r.park(d, now, dec.after)
		case undecided:
			r.log.Error("handler left a message undecided", "seq", d.Sequence)
			r.park(d, now, time.Second)
		}
	}
	switch {
	case holding.kind == hold:
		r.startHold(now, res, holding)
	case r.hold.number == 0:
		r.allowed = min(2*r.allowed, r.Concurrency)
	case res.hold == r.hold.number:
		r.endHold(now)
	}
}

func (r *runner) park(d *Delivery, now time.Time, after time.Duration) {
	r.metrics.retried.Inc()
	d.due = now.Add(after)
	heap.Push(&r.parked, d)
}

// holdNumber is the number of the hold in force, or of the one about to start.
func (r *runner) holdNumber() int {
	if r.hold.number > 0 {
		return r.hold.number
	}
	return r.holds + 1
}

// startHold begins a hold, or prolongs it when a probe failed. A call that had
// begun before the hold changes nothing.
func (r *runner) startHold(now time.Time, res result, dec Decision) {
	switch {
	case r.hold.number == 0:
		r.holds++
		r.hold.number, r.hold.cause, r.hold.since, r.hold.pause = r.holds, dec.cause, now, holdMin
		r.metrics.holding(dec.cause, true)
		r.log.Warn("stage holds", "cause", dec.cause, "err", dec.err)
	case res.hold == r.hold.number:
		r.hold.probing = false
		r.hold.pause = min(2*r.hold.pause, holdMax)
		if r.hold.cause != dec.cause {
			r.metrics.holding(r.hold.cause, false)
			r.metrics.holding(dec.cause, true)
			r.hold.cause = dec.cause
			r.log.Warn("stage holds", "cause", dec.cause, "err", dec.err)
		}
	default:
		return
	}
	r.hold.until = now.Add(r.hold.pause*4/5 + rand.N(r.hold.pause*2/5))
}

// endHold goes on, one call at a time first and doubling from there: what was
// away may not stand the full load at once.
func (r *runner) endHold(now time.Time) {
	r.metrics.holding(r.hold.cause, false)
	r.log.Info("stage goes on", "cause", r.hold.cause, "held", now.Sub(r.hold.since).Round(time.Millisecond).String())
	r.hold.number, r.hold.probing = 0, false
	r.allowed = 1
}

// ack acknowledges d. When that cannot be sent, d stays in hand and is tried
// again, since its work is done and must not be done twice.
func (r *runner) ack(d *Delivery) {
	r.remember(d.Sequence)
	if err := d.msg.Ack(); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
		r.metrics.ackFailures.Inc()
		r.unacked = append(r.unacked, d)
		return
	}
	delete(r.held, d.Sequence)
}

func (r *runner) remember(seq uint64) {
	if _, ok := r.settled[seq]; ok {
		return
	}
	delete(r.settled, r.ring[r.ringNext])
	r.ring[r.ringNext] = seq
	r.settled[seq] = struct{}{}
	r.ringNext = (r.ringNext + 1) % settledMemory
}

// keepAlive resets the ack timer of everything in hand and repeats acks that
// could not be sent.
func (r *runner) keepAlive(now time.Time) {
	again := r.unacked
	r.unacked = nil
	for _, d := range again {
		r.ack(d)
	}
	for _, d := range r.held {
		if now.Sub(d.touched) >= progressEvery && d.msg.InProgress() == nil {
			d.touched = now
		}
	}
}

// --- stopping

// stop takes nothing new, hands back what no handler has begun, lets the
// others finish, and acks what they did.
func (r *runner) stop() error {
	deadline := time.NewTimer(r.StopTimeout)
	defer deadline.Stop()
	for _, d := range r.ready.pop(r.ready.len()) {
		r.handBack(d)
	}
	for _, d := range append(r.suspects, r.parked...) {
		r.handBack(d)
	}
	for r.running > 0 || r.pulled != nil {
		select {
		case msg, open := <-r.pulled:
			if !open {
				r.pulled = nil
				continue
			}
			_ = msg.Nak() // the server notices by itself when this is lost
			r.metrics.handedBack.Inc()
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
					r.handBack(d)
				}
			}
		case <-deadline.C:
			return fmt.Errorf("consumer %s: %d handler calls still running after %v; their messages will be delivered again", r.Durable, r.running, r.StopTimeout)
		}
	}
	r.keepAlive(time.Now()) // acks that had failed
	return nil
}

func (r *runner) handBack(d *Delivery) {
	_ = d.msg.Nak() // the server notices by itself when this is lost
	r.metrics.handedBack.Inc()
	delete(r.held, d.Sequence)
}

func (r *runner) observe() {
	r.metrics.inHand.Set(float64(len(r.held)))
	r.metrics.parked.Set(float64(r.parked.Len()))
}

// queue is first in, first out, without moving what is in it.
type queue struct {
	items []*Delivery
	head  int
}

func (q *queue) len() int { return len(q.items) - q.head }

func (q *queue) at(i int) *Delivery { return q.items[q.head+i] }

func (q *queue) push(d *Delivery) { q.items = append(q.items, d) }

func (q *queue) front() *Delivery {
	if q.len() == 0 {
		return nil
	}
	return q.items[q.head]
}

// pop removes the first n; the caller owns the result.
func (q *queue) pop(n int) []*Delivery {
	out := make([]*Delivery, n)
	copy(out, q.items[q.head:])
	clear(q.items[q.head : q.head+n])
	q.head += n
	if q.head == len(q.items) {
		q.items, q.head = q.items[:0], 0
	} else if q.head > 1024 && q.head > len(q.items)/2 {
		k := copy(q.items, q.items[q.head:])
		clear(q.items[k:])
		q.items, q.head = q.items[:k], 0
	}
	return out
}

// parking is a heap of parked messages by when they are due.
type parking []*Delivery

func (p parking) Len() int           { return len(p) }
func (p parking) Less(i, j int) bool { return p[i].due.Before(p[j].due) }
func (p parking) Swap(i, j int)      { p[i], p[j] = p[j], p[i] }
func (p *parking) Push(x any)        { *p = append(*p, x.(*Delivery)) }
func (p *parking) Pop() any {
	old := *p
	d := old[len(old)-1]
	old[len(old)-1] = nil
	*p = old[:len(old)-1]
	return d
}
