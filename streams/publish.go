package streams

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Headers of ours. Request ids and the like stay in the body.
const (
	// HeaderAcceptedAt carries, on a copy of an ingest event, when FP_INGEST
	// stored the original.
	HeaderAcceptedAt = "Fp-Accepted-At"
	// HeaderReplay carries the id of the replay or redrive that made a copy.
	HeaderReplay = "Fp-Replay"
	// HeaderForce, set to "1" on a copy for the prefetcher, asks the vendor
	// again although a ready record is there.
	HeaderForce = "Fp-Force"
	// HeaderTraceParent is the W3C trace context.
	HeaderTraceParent = "traceparent"
)

// Message is what Publish sends.
type Message struct {
	// Stream the subject must be bound to; a publish to a subject that
	// another stream took over fails instead of vanishing.
	Stream, Subject string
	// ID is recognised by the stream for ten minutes.
	ID string
	// TraceParent is sent on as a header; empty for none.
	TraceParent string
	// Header holds more headers; may be nil.
	Header nats.Header
	Body   []byte
}

// Ack is the stream's word that it has the message.
type Ack struct {
	Sequence uint64
	// Duplicate is true when the stream had a message of this id already,
	// before Publish was called, and stored nothing.
	Duplicate bool
}

// Why a publish was not confirmed. Every one but ErrTooLarge may be repeated
// with the same id; after ErrUnsure the message may have been stored.
var (
	ErrStreamFull   = errors.New("stream is full")
	ErrUnavailable  = errors.New("stream is unavailable")
	ErrUnsure       = errors.New("no ack in time")
	ErrTooLarge     = errors.New("message is too large")
	ErrRefused      = errors.New("publish refused")
	publishOutcomes = [...]string{"acked", "duplicate", "full", "unavailable", "unsure", "too_large", "refused"}
)

// A publish in flight when its server dies is not failed by anybody; only the
// deadline ends it. Three short attempts with one id beat one long one.
const (
	publishAttempt  = 500 * time.Millisecond
	publishAttempts = 3
	publishPause    = 50 * time.Millisecond
)

// Publisher publishes to streams. It is safe for concurrent use.
type Publisher struct {
	js       jetstream.JetStream
	total    *prometheus.CounterVec
	duration prometheus.Histogram
}

// NewPublisher returns a publisher with its metrics on reg.
func NewPublisher(js jetstream.JetStream, reg prometheus.Registerer) *Publisher {
	f := promauto.With(reg)
	p := &Publisher{
		js: js,
		total: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_publishes_total", Help: "Messages published, by what the stream answered in the end.",
		}, []string{"outcome"}),
		duration: f.NewHistogram(ops.Histogram("fp_publish_duration_seconds", "Time until the stream's ack or the last attempt's end.",
			.0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5)),
	}
	for _, o := range publishOutcomes {
		p.total.WithLabelValues(o)
	}
	return p
}

// Publish stores m and returns once the stream has acknowledged it. It makes
// up to three attempts of half a second with the same id, within ctx. The
// error wraps one of the reasons above.
func (p *Publisher) Publish(ctx context.Context, m Message) (Ack, error) {
	start := time.Now()
	ack, err := p.publish(ctx, m)
	p.duration.Observe(time.Since(start).Seconds())
	p.total.WithLabelValues(publishOutcome(ack, err)).Inc()
	if err != nil {
		return Ack{}, fmt.Errorf("publish to %s: %w", m.Stream, err)
	}
	return ack, nil
}

func (p *Publisher) publish(ctx context.Context, m Message) (Ack, error) {
	msg := &nats.Msg{Subject: m.Subject, Header: make(nats.Header, 3+len(m.Header)), Data: m.Body}
	msg.Header[jetstream.MsgIDHeader] = []string{m.ID}
	msg.Header[jetstream.ExpectedStreamHeader] = []string{m.Stream}
	if m.TraceParent != "" {
		msg.Header[HeaderTraceParent] = []string{m.TraceParent}
	}
	maps.Copy(msg.Header, m.Header)
	var unsure, last error
	for attempt := range publishAttempts {
		if attempt > 0 && !sleep(ctx, publishPause) {
			break
		}
		var ack Ack
		if ack, last = p.attempt(ctx, msg); last == nil {
			if unsure != nil {
				ack.Duplicate = false // of an attempt of ours, as far as anybody knows
			}
			return ack, nil
		}
		last = classifyPublish(last)
		if errors.Is(last, ErrUnsure) {
			unsure = last // stays true whatever later attempts say
		}
		if errors.Is(last, ErrTooLarge) || errors.Is(last, ErrRefused) {
			break
		}
	}
	if unsure != nil {
		return Ack{}, unsure
	}
	return Ack{}, last
}

// attempt sends m once. It asks for the ack itself, as PublishMsg of the
// client library would: that decodes each ack by reflection, which was a sixth
// of the edge's work for an event.
func (p *Publisher) attempt(ctx context.Context, m *nats.Msg) (Ack, error) {
	// A request without a connection fails and is remembered for ever
	// (nats.go v1.55.0).
	if !p.js.Conn().IsConnected() {
		return Ack{}, nats.ErrConnectionReconnecting
	}
	ctx, cancel := context.WithTimeout(ctx, publishAttempt)
	defer cancel()
	reply, err := p.js.Conn().RequestMsgWithContext(ctx, m)
	if err != nil {
		return Ack{}, err
	}
	return parseAck(reply.Data)
}

// parseAck reads a stream's answer to a publish. The plain case, an ack in the
// server's own spelling, is read in place.
func parseAck(b []byte) (Ack, error) {
	if rest, ok := bytes.CutPrefix(b, []byte(`{"stream":"`)); ok {
		_, seq, _ := bytes.Cut(rest, []byte(`","seq":`))
		if digits, ok := bytes.CutSuffix(seq, []byte{'}'}); ok {
			if n, err := strconv.ParseUint(string(digits), 10, 64); err == nil && n > 0 {
				return Ack{Sequence: n}, nil
			}
		}
	}
	var answer struct {
		jetstream.PubAck
		Error *jetstream.APIError `json:"error"`
	}
	switch err := json.Unmarshal(b, &answer); {
	case err != nil || answer.Error == nil && (answer.Stream == "" || answer.Sequence == 0):
		return Ack{}, jetstream.ErrInvalidJSAck
	case answer.Error != nil:
		return Ack{}, answer.Error
	}
	return Ack{Sequence: answer.Sequence, Duplicate: answer.Duplicate}, nil
}

// Error numbers of the server's errors.json.
const (
	codeMessageTooLarge   = 10054
	codeStreamFull        = 10077 // stream limit reached with DiscardNew
	codeResourcesExceeded = 10002 // account
	codeInsufficient      = 10023 // resources of the server
	codeStorageExceeded   = 10047
	codeWrongStream       = 10060
)

// classifyPublish wraps err in the reason it stands for.
func classifyPublish(err error) error {
	var reason error
	apiErr, isAPI := errors.AsType[*jetstream.APIError](err)
	switch {
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled),
		errors.Is(err, nats.ErrTimeout), errors.Is(err, nats.ErrDisconnected), errors.Is(err, nats.ErrConnectionClosed),
		errors.Is(err, jetstream.ErrInvalidJSAck):
		reason = ErrUnsure
	case errors.Is(err, nats.ErrMaxPayload):
		reason = ErrTooLarge
	case isAPI && apiErr.ErrorCode == codeMessageTooLarge:
		reason = ErrTooLarge
	case isAPI && apiErr.ErrorCode == codeWrongStream:
		reason = ErrRefused
	case isAPI && (apiErr.ErrorCode == codeStreamFull || apiErr.ErrorCode == codeResourcesExceeded ||
		apiErr.ErrorCode == codeInsufficient || apiErr.ErrorCode == codeStorageExceeded):
		reason = ErrStreamFull
	default:
		// No responders, no leader, too many requests, or not connected with
		// nothing buffered: not stored.
		reason = ErrUnavailable
	}
	return fmt.Errorf("%w: %w", reason, err)
}

func publishOutcome(ack Ack, err error) string {
	switch {
	case err == nil && ack.Duplicate:
		return "duplicate"
	case err == nil:
		return "acked"
	case errors.Is(err, ErrUnsure):
		return "unsure"
	case errors.Is(err, ErrStreamFull):
		return "full"
	case errors.Is(err, ErrTooLarge):
		return "too_large"
	case errors.Is(err, ErrRefused):
		return "refused"
	}
	return "unavailable"
}

// sleep waits for d and reports whether ctx outlived it.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
