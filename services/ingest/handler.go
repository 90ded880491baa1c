package ingest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/labstack/echo/v4"
	"go.opentelemetry.io/otel/trace"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// maxBody is the largest request body in bytes. Four members of a few hundred
// bytes need a fraction of it, however they are escaped.
const maxBody = 64 << 10

// publisher stores events. Publish returns once the stream has acknowledged
// the message or ctx is done; it makes its own attempts. After an error the
// message may have been stored or not, and the same message may be published
// again. It is safe for concurrent use.
type publisher interface {
	Publish(ctx context.Context, m streams.Message) (streams.Ack, error)
}

// authError is why a request has no good key.
type authError struct{ reason authReason }

func (e authError) Error() string { return "key: " + string(e.reason) }

// scratch is what a request needs for as long as it is handled.
type scratch struct {
	buf     []byte
	decoder bodyDecoder
}

// ingest handles POST /fingerprint/ingest. The checks go from what costs
// nothing to what costs most, and none of the body is read for a stranger:
// net/http asks for it ("100 Continue") only at the first read.
func (s *server) ingest(c echo.Context) error {
	x := c.(*exchange)
	r := c.Request()
	key, reason := s.keys.check(r.Header[headerKey], time.Now())
	if key == nil {
		if reason == keyMissing {
			return errNoKey.because(authError{reason})
		}
		return errBadKey.because(authError{reason})
	}
	x.keyID = key.ID
	if parents := r.Header["Traceparent"]; len(parents) == 1 {
		x.ctx = streams.WithTraceParent(x.ctx, parents[0])
	}
	x.ctx, x.span = streams.StartSpan(x.ctx, s.tracer, "POST "+ingestPath, trace.SpanKindServer)
	// Each holds its body and a place at the stream; more at once would only
	// make all of them late.
	defer s.inflight.Add(-1)
	if s.inflight.Add(1) > s.maxInflight {
		return errOverload
	}
	if r.ContentLength > maxBody {
		return errTooLarge
	}
	if err := checkMediaType(r.Header); err != nil {
		return err
	}

	tmp := s.scratch.Get().(*scratch)
	defer s.scratch.Put(tmp)
	var err error
	if tmp.buf, err = readBody(tmp.buf[:0], c.Response().Writer, r); err != nil {
		return err
	}
	event, err := tmp.decoder.decode(tmp.buf)
	if err != nil {
		return err
	}
	x.requestID = event.RequestID
	if !key.Subscribers.Contains(event.SubscriberID) {
		return errSubscriber
	}

	if err := limit(key.limit, c.Response().Header()); err != nil {
		return err
	}
	ack, err := s.publish(x.ctx, event)
	if _, bug := err.(panicError); bug {
		return err
	} else if err != nil {
		return errStream.because(err)
	}
	x.outcome = accepted
	if ack.Duplicate {
		x.outcome = duplicate
		c.Response().Header().Set(headerReplayed, "true")
	}
	tmp.buf = appendAccepted(tmp.buf[:0], event)
	_ = c.Blob(http.StatusAccepted, contentTypeJSON, tmp.buf) // stored all the same if the client is gone
	return nil
}

// limit takes the request out of the key's allowance and tells the client
// what is left of it.
func limit(l *limiter, h http.Header) error {
	if l == nil {
		return nil
	}
	a := l.take(time.Now())
	h["Ratelimit-Limit"] = []string{strconv.Itoa(a.limit)}
	h["Ratelimit-Remaining"] = []string{strconv.Itoa(a.remaining)}
	h["Ratelimit-Reset"] = []string{seconds(a.reset)}
	if !a.ok {
		h["Retry-After"] = []string{seconds(a.retry)}
		return errRate
	}
	return nil
}

// checkMediaType admits JSON in UTF-8 and nothing around it. Any doubt about
// what the bytes are is the client's to remove.
func checkMediaType(h http.Header) error {
	if len(h["Content-Encoding"]) > 0 {
		return errCoding
	}
	types := h["Content-Type"]
	if len(types) != 1 {
		return errType
	}
	if types[0] == "application/json" {
		return nil
	}
	mediaType, params, err := mime.ParseMediaType(types[0])
	if err != nil || mediaType != "application/json" {
		return errType
	}
	for name, value := range params {
		if name != "charset" || !strings.EqualFold(value, "utf-8") {
			return errType
		}
	}
	return nil
}

// readBody appends the request's body to dst, which must be empty. Memory grows
// with what comes and not with what is announced.
func readBody(dst []byte, w http.ResponseWriter, r *http.Request) ([]byte, error) {
	body := io.Reader(r.Body)
	if r.ContentLength < 0 {
		body = http.MaxBytesReader(w, r.Body, maxBody)
	}
	var err error
	for err == nil {
		dst = slices.Grow(dst, 512)
		var n int
		n, err = body.Read(dst[len(dst):cap(dst)])
		dst = dst[:len(dst)+n]
	}
	if err == io.EOF {
		err = nil
	}
	if err == nil {
		return dst, nil
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return dst, errTooLarge
	}
	return dst, bodyError{wholeBody, ruleUnread, "ends too early or comes too slowly"}
}

// publish stores an event. It does not stop when the client goes away: the
// message may be on its way, and whether it was stored should be counted.
//
// Nor does it wait longer than the publish timeout for a publisher that does:
// while a hung server's socket is full, NATS's client waits in a write, and
// with it everybody who wants to publish, whatever their contexts say. Such a
// message keeps its place among those in flight until it is let go, so that
// memory stays bounded.
func (s *server) publish(ctx context.Context, e streams.Event) (streams.Ack, error) {
	const around = 96 // names and digits around the texts
	m := streams.Message{
		Stream:      streams.StreamIngest,
		Subject:     streams.IngestSubject(e.SubscriberID),
		ID:          e.MessageID(),
		TraceParent: streams.TraceParent(ctx),
		Body:        appendEvent(make([]byte, 0, around+len(e.RequestID)+len(e.SessionID)+len(e.UserID)), e),
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.publishTimeout)
	defer cancel()
	done := make(chan publishResult, 1)
	go func() {
		var p publishResult
		defer func() {
			if v := recover(); v != nil {
				p.err = panicError{v, debug.Stack()}
			}
			done <- p
		}()
		p.ack, p.err = s.publisher.Publish(ctx, m)
	}()
	select {
	case p := <-done:
		return p.ack, p.err
	case <-ctx.Done():
	}
	s.inflight.Add(1)
	go func() {
		<-done
		s.inflight.Add(-1)
	}()
	return streams.Ack{}, fmt.Errorf("%w: the publish timeout is over", streams.ErrUnsure)
}

type publishResult struct {
	ack streams.Ack
	err error
}

// appendAccepted appends the body of the 202.
func appendAccepted(dst []byte, e streams.Event) []byte {
	dst = append(dst, `{"status":"accepted","mode":"prefetch_pipeline","redis_keys":[`...)
	dst = appendQuoted(dst, record.Key(e.RequestID))
	dst = appendQuoted(append(dst, `],"user_id":`...), e.UserID)
	dst = appendQuoted(append(dst, `,"session_id":`...), e.SessionID)
	return append(dst, '}')
}
