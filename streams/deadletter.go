package streams

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// DeadReason is why a message was given up. The set is closed.
type DeadReason string

// The reasons.
const (
	// DeadUndecodable: the body is not what the stream carries.
	DeadUndecodable DeadReason = "undecodable"
	// DeadForeign: the record of this request id belongs to another
	// subscriber.
	DeadForeign DeadReason = "foreign_subscriber"
	// DeadExhausted: too old to be worth another try. A failed record says
	// so to the scorer.
	DeadExhausted DeadReason = "exhausted"
	// DeadPoison: the message kills the process.
	DeadPoison DeadReason = "poison"
	// DeadUnwritable: the key holds something that is not a record.
	DeadUnwritable DeadReason = "unwritable"
)

// DeadReasons lists them all, for metrics.
func DeadReasons() []DeadReason {
	return []DeadReason{DeadUndecodable, DeadForeign, DeadExhausted, DeadPoison, DeadUnwritable}
}

// Headers of a dead letter. Its body is the original's.
const (
	HeaderDeadReason     = "Fp-Dead-Reason"
	HeaderDeadError      = "Fp-Dead-Error"
	HeaderDeadStage      = "Fp-Dead-Stage"
	HeaderDeadConsumer   = "Fp-Dead-Consumer"
	HeaderDeadStream     = "Fp-Dead-Stream"
	HeaderDeadSequence   = "Fp-Dead-Sequence"
	HeaderDeadSubject    = "Fp-Dead-Subject"
	HeaderDeadDeliveries = "Fp-Dead-Deliveries"
	HeaderDeadAt         = "Fp-Dead-At"
)

// maxDeadError bounds the error text, so that headers stay small.
const maxDeadError = 256

// publishDead stores the dead letter of d. It is on record before the original
// is acknowledged, and its id keeps a crash in between from doubling it.
func (c *Consumer) publishDead(ctx context.Context, d *Delivery, dec Decision) error {
	if dec.err == nil {
		dec.err = errors.New(string(dec.reason))
	}
	text := dec.err.Error()
	if len(text) > maxDeadError {
		text = strings.ToValidUTF8(text[:maxDeadError], "")
	}
	h := make(nats.Header, len(d.Header)+9)
	maps.Copy(h, d.Header)
	h.Set(HeaderAcceptedAt, d.AcceptedAt.Format(time.RFC3339Nano))
	h.Set(HeaderDeadReason, string(dec.reason))
	h.Set(HeaderDeadError, text)
	h.Set(HeaderDeadStage, c.Stage)
	h.Set(HeaderDeadConsumer, c.Durable)
	h.Set(HeaderDeadStream, c.Stream)
	h.Set(HeaderDeadSequence, strconv.FormatUint(d.Sequence, 10))
	h.Set(HeaderDeadSubject, d.Subject)
	h.Set(HeaderDeadDeliveries, strconv.Itoa(d.Deliveries))
	h.Set(HeaderDeadAt, time.Now().UTC().Format(time.RFC3339Nano))
	id := fmt.Sprintf("dead:%s:%d:%d", c.Durable, d.Sequence, d.stored.UnixNano())
	// The original's own id and expectations are not the copy's.
	for k := range h {
		if strings.HasPrefix(k, "Nats-") {
			delete(h, k)
		}
	}
	_, err := c.Publisher.Publish(ctx, Message{
		Stream: StreamDead, Subject: DeadSubject(c.Stage, SubjectSubscriber(d.Subject)), ID: id, Header: h, Body: d.Data,
	})
	return err
}

// SubjectSubscriber returns the subscriber a subject ends in, or 0.
func SubjectSubscriber(subject string) int64 {
	n, err := strconv.ParseInt(subject[strings.LastIndexByte(subject, '.')+1:], 10, 64)
	if err != nil || n < 0 {
		return 0
	}
	return n
}
