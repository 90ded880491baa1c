package streams

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

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
	if !r.connected() {
		r.unreachable(fmt.Errorf("pull: %w", nats.ErrDisconnected))
		return
	}
	pull, err := r.durable.Fetch(n, jetstream.FetchMaxWait(pullExpiry))
	if err != nil {
		r.unreachable(fmt.Errorf("pull: %w", err))
		return
	}
	r.pull, r.pulled = pull, pull.Messages()
}

// connected is asked first because a Fetch without a connection fails and leaves
// its subscription behind (nats.go v1.55.0).
func (r *runner) connected() bool {
	nc := r.JS.Conn()
	return nc == nil || nc.IsConnected() // nil is a test's
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
	r.pending, r.newest = md.NumPending, max(r.newest, seq)
	if md.NumDelivered > 1 {
		r.metrics.redelivered.Inc()
		r.log.Debug("message delivered again", "seq", seq, "deliveries", md.NumDelivered)
	}
	if d, ok := r.held[seq]; ok { // in hand already: only the ack handle is new
		d.msg, d.delivered, d.touched = msg, int(md.NumDelivered), now
		return
	}
	if stored, ok := r.settled[seq]; ok && md.NumDelivered > 1 && stored.Equal(md.Timestamp) { // its ack got lost
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
