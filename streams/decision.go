package streams

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Handler decides about a batch of deliveries and returns one decision for
// each, in the same order. It may keep what it learns in Delivery.Memo. ctx is
// done when the process stops: a handler then starts nothing new, finishes the
// call under way on a context of its own, and returns.
type Handler func(ctx context.Context, batch []*Delivery) []Decision

// Each makes a Handler of a function that looks at one delivery.
func Each(one func(ctx context.Context, d *Delivery) Decision) Handler {
	return func(ctx context.Context, batch []*Delivery) []Decision {
		out := make([]Decision, len(batch))
		for i, d := range batch {
			out[i] = one(ctx, d)
		}
		return out
	}
}

// Decision is what shall become of a delivery. The zero value is invalid: a
// handler that forgets one is a bug, and the message is looked at again.
type Decision struct {
	kind   kind
	after  time.Duration
	reason DeadReason
	cause  Cause
	err    error
	moved  bool
}

type kind int

const (
	undecided kind = iota
	done
	retryAfter
	deadLetter
	hold
)

// Done acknowledges the message: its effect is stored downstream.
func Done() Decision { return Decision{kind: done} }

// Moved acknowledges a message that was better served elsewhere, like one of
// which a copy is stored in another stream, or that needed nothing. It is
// settled like Done, but says nothing about what the stage holds for.
func Moved() Decision { return Decision{kind: done, moved: true} }

// RetryAfter looks at this message again after d. It stays in memory with its
// ack timer kept alive, so it neither comes back before newer events nor
// counts as another delivery.
func RetryAfter(d time.Duration, err error) Decision {
	return Decision{kind: retryAfter, after: d, err: err}
}

// DeadLetter gives the message up because of what it is: a copy goes to
// FP_DEAD with the reason, and then the original is acknowledged. err ends up
// in a header and must hold nothing personal.
func DeadLetter(reason DeadReason, err error) Decision {
	return Decision{kind: deadLetter, reason: reason, err: err}
}

// Hold stops the stage because of something that is not the message's fault.
// Nothing is pulled and nothing is given up until one message, tried alone
// with growing pauses, gets another decision than Hold.
func Hold(cause Cause, err error) Decision { return Decision{kind: hold, cause: cause, err: err} }

// Cause is why a stage holds.
type Cause string

// The causes.
const (
	CauseNATS          Cause = "nats"
	CauseRedis         Cause = "redis"
	CauseVendor        Cause = "fingerprint"
	CauseConfiguration Cause = "configuration"
)

// Causes lists them all, for metrics.
func Causes() []Cause {
	return []Cause{CauseNATS, CauseRedis, CauseVendor, CauseConfiguration}
}

// Delivery is one message in a stage's hands. The handler that holds it is its
// only user.
type Delivery struct {
	Subject string
	Header  nats.Header
	Data    []byte
	// Sequence is the message's place in its stream.
	Sequence uint64
	// Deliveries is how often the server handed the message to anyone,
	// this time included. Since nothing is handed back but at shutdown, a
	// high number means that the message kills its process.
	Deliveries int
	// AcceptedAt is when FP_INGEST stored the original event, also for a
	// copy of it.
	AcceptedAt time.Time
	// NewerWait says that newer messages wait behind this one, here or in the
	// stream, as far as this process knows.
	NewerWait bool
	// Replay is the id of the replay that made this copy; empty for live.
	Replay string
	// Looks is how often the handler saw the message before, in this
	// process; FirstLook is when it did for the first time.
	Looks     int
	FirstLook time.Time
	// RequestID is the event's, once the handler has read it; for logs.
	RequestID string
	// Memo is the handler's own and survives until the message is settled.
	Memo any

	// The rest belongs to the consumer's loop.
	msg       jetstream.Msg
	delivered int       // the next value of Deliveries
	stored    time.Time // when this stream stored it
	arrived   time.Time
	touched   time.Time // last sign of life to the server
	due       time.Time // when parked
	panics    int
	held      int // number of the hold that refused it last
}

// MaxDeliveries is the number of deliveries after which a message counts as
// the one that kills the process.
const MaxDeliveries = 12

// Poison reports whether the message has killed this stage too often to be
// tried again.
func (d *Delivery) Poison() bool { return d.Deliveries > MaxDeliveries || d.panics >= maxPanics }

// A suspect has been delivered this often, or has panicked, and runs alone, so
// that it takes no neighbour with it.
const (
	suspectDeliveries = 3
	maxPanics         = 3
)

func (d *Delivery) suspect() bool { return d.delivered > suspectDeliveries || d.panics > 0 }

// Mode is live, or backfill for a copy made by a replay, a redrive or
// freshness.
func (d *Delivery) Mode() string {
	if d.Replay != "" || d.Header.Get(HeaderAcceptedAt) != "" {
		return "backfill"
	}
	return "live"
}

func newDelivery(msg jetstream.Msg, md *jetstream.MsgMetadata, now time.Time) *Delivery {
	d := &Delivery{
		Subject: msg.Subject(), Header: msg.Headers(), Data: msg.Data(),
		Sequence: md.Sequence.Stream, Deliveries: int(md.NumDelivered), delivered: int(md.NumDelivered), AcceptedAt: md.Timestamp.UTC(),
		Replay: msg.Headers().Get(HeaderReplay),
		msg:    msg, stored: md.Timestamp, arrived: now, touched: now,
	}
	if t, err := time.Parse(time.RFC3339Nano, d.Header.Get(HeaderAcceptedAt)); err == nil {
		d.AcceptedAt = t.UTC()
	}
	return d
}

// GivesUp reports whether d is a DeadLetter.
func (d Decision) GivesUp() bool { return d.kind == deadLetter }

// CopyHeader returns the headers that travel with everything made from a copy:
// when the original was accepted, and the replay that made the copy.
func (d *Delivery) CopyHeader() nats.Header {
	h := nats.Header{HeaderAcceptedAt: {d.AcceptedAt.Format(time.RFC3339Nano)}}
	if d.Replay != "" {
		h.Set(HeaderReplay, d.Replay)
	}
	return h
}

// IsDone reports whether d is Done.
func (d Decision) IsDone() bool { return d.kind == done && !d.moved }

// IsMoved reports whether d is Moved.
func (d Decision) IsMoved() bool { return d.moved }

// Again returns the delay of a RetryAfter, and whether d is one.
func (d Decision) Again() (time.Duration, bool) { return d.after, d.kind == retryAfter }
