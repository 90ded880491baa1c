package streams

import (
	"container/heap"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

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
			d.NewerWait = r.pending > 0 || r.newest > d.Sequence && len(r.held) > len(batch)
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
		switch err := r.publishDead(context.WithoutCancel(ctx), batch[i], dec); {
		case errors.Is(err, ErrStreamFull): // no reason to keep from the others what is theirs
			res.decisions[i] = RetryAfter(deadRetry, fmt.Errorf("dead letter: %w", err))
		case err != nil:
			res.decisions[i] = Hold(CauseNATS, fmt.Errorf("dead letter: %w", err))
		}
	}
	res.took = time.Since(start)
	return res
}

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
			r.log.Error("message dead-lettered", "reason", dec.reason, "stream", r.Stream, "seq", d.Sequence, "deliveries", d.Deliveries,
				"request_id", d.RequestID, LogTrace(d.Context(context.Background())), "err", dec.err)
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
	case res.hold != r.hold.number:
	case res.decisions[0].moved: // the next probe follows at once
		r.hold.probing = false
	default:
		r.endHold(now)
	}
}

func (r *runner) park(d *Delivery, now time.Time, after time.Duration) {
	r.metrics.retried.Inc()
	d.due = now.Add(after)
	heap.Push(&r.parked, d)
}

// ack acknowledges d. When that cannot be sent, d stays in hand and is tried
// again, since its work is done and must not be done twice.
func (r *runner) ack(d *Delivery) {
	r.remember(d)
	if err := d.msg.Ack(); err != nil && !errors.Is(err, jetstream.ErrMsgAlreadyAckd) {
		r.metrics.ackFailures.Inc()
		r.unacked = append(r.unacked, d)
		return
	}
	delete(r.held, d.Sequence)
}

func (r *runner) remember(d *Delivery) {
	_, known := r.settled[d.Sequence]
	if r.settled[d.Sequence] = d.stored; known {
		return
	}
	delete(r.settled, r.ring[r.ringNext])
	r.ring[r.ringNext] = d.Sequence
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
