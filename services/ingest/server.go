package ingest

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/labstack/echo/v4"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/idenza/fingerprint-prefetch/streams"
)

const (
	ingestPath = "/fingerprint/ingest"

	headerKey       = "X-Api-Key" // in the canonical form in which http.Header keeps it
	headerSupport   = "X-Request-Id"
	headerReplayed  = "Idempotent-Replayed"
	contentTypeJSON = "application/json; charset=UTF-8"
)

// server is the public API.
type server struct {
	echo           *echo.Echo
	keys           *keyring
	publisher      publisher
	publishTimeout time.Duration
	maxInflight    int64
	log            *slog.Logger
	metrics        *metrics
	tracer         trace.Tracer // nil records nothing

	scratch    sync.Pool    // of *scratch
	inflight   atomic.Int64 // requests with a good key
	draining   atomic.Bool
	authLog    sampler
	publishLog sampler
}

func newServer(keys *keyring, p publisher, cfg Config, log *slog.Logger, m *metrics) *server {
	s := &server{
		echo: echo.New(), keys: keys, publisher: p, publishTimeout: cfg.PublishTimeout, maxInflight: int64(cmp.Or(cfg.MaxInflight, defaultInflight)), log: log, metrics: m,
		scratch: sync.Pool{New: func() any { return new(scratch) }},
	}
	s.echo.Logger.SetOutput(io.Discard)
	s.echo.HTTPErrorHandler = func(err error, c echo.Context) { s.refuse(&exchange{Context: c, ctx: c.Request().Context()}, err) }
	s.echo.Use(s.observe)
	s.echo.POST(ingestPath, s.ingest)
	s.echo.GET(openAPIPath, func(c echo.Context) error {
		c.(*exchange).outcome = described
		return c.Blob(http.StatusOK, contentTypeJSON, openAPI)
	})
	return s
}

// httpServer returns the server for the public port. The framework's own has
// no time limits.
func (s *server) httpServer() *http.Server {
	return &http.Server{
		Handler:           s.echo,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       60 * time.Second,
		MaxHeaderBytes:    16 << 10,
		// Else net/http answers "OPTIONS *" itself, with 200.
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
}

// exchange is one request and what becomes known about it on the way.
type exchange struct {
	echo.Context
	supportID string
	keyID     string // empty without a good key
	requestID string // the event's; empty until the body was read
	outcome   outcome

	ctx  context.Context // of the request's trace
	span trace.Span      // nil without a good key
}

// endSpan ends the request's span.
func (x *exchange) endSpan() {
	if x.span == nil || !x.span.IsRecording() {
		return
	}
	status := x.Response().Status
	x.span.SetAttributes(attribute.String("http.request.method", http.MethodPost), attribute.String("http.route", ingestPath), attribute.Int("http.response.status_code", status),
		attribute.String("fp.outcome", string(x.outcome)), attribute.String("fp.request_id", x.requestID), attribute.String("fp.key_id", x.keyID))
	if status >= http.StatusInternalServerError {
		x.span.SetStatus(codes.Error, string(x.outcome))
	}
	x.span.End()
}

// observe is around everything: it sets the headers every answer has, turns
// errors and panics into answers, and counts.
func (s *server) observe(next echo.HandlerFunc) echo.HandlerFunc {
	return func(c echo.Context) error {
		start := time.Now()
		s.metrics.inflight.Inc()
		defer s.metrics.inflight.Dec()

		x := &exchange{Context: c, ctx: c.Request().Context(), supportID: newSupportID()}
		r, h := c.Request(), c.Response().Header()
		h.Set(headerSupport, x.supportID)
		h.Set("Cache-Control", "no-store") // the answer repeats personal data
		// A request may carry Content-Length besides Transfer-Encoding.
		// net/http drops the former unseen and keeps the connection, where a
		// proxy that believed it sees the next request start elsewhere.
		if len(r.TransferEncoding) > 0 || s.draining.Load() {
			h.Set("Connection", "close")
		}

		if err := s.call(next, x); err != nil {
			s.refuse(x, err)
		}
		took := time.Since(start)
		x.endSpan()
		s.metrics.observe(x.ctx, x.outcome, x.keyID, took)
		if ctx := r.Context(); s.log.Enabled(ctx, slog.LevelDebug) {
			s.log.DebugContext(ctx, "request answered", "outcome", x.outcome, "status", c.Response().Status,
				"support_id", x.supportID, "key_id", x.keyID, "request_id", x.requestID, streams.LogTrace(x.ctx), "duration", took)
		}
		return nil
	}
}

// call runs a handler, or refuses what the router let through. A panic comes
// back as an error.
func (s *server) call(next echo.HandlerFunc, x *exchange) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = panicError{v, debug.Stack()}
		}
	}()
	// The router says so of any method a known path does not have. Left
	// alone, it would answer OPTIONS with 204.
	if methods, ok := x.Get(echo.ContextKeyHeaderAllow).(string); ok {
		x.Response().Header().Set("Allow", strings.TrimPrefix(methods, "OPTIONS, "))
		return errMethod
	}
	return next(x)
}

// panicError is a panic on its way to the log.
type panicError struct {
	value any
	stack []byte
}

// Error gives the value only where it is the runtime's own: any other may
// have been built from a request.
func (e panicError) Error() string {
	if err, ok := e.value.(runtime.Error); ok {
		return "panic: " + err.Error()
	}
	return fmt.Sprintf("panic: %T", e.value)
}

// refusal is an answer other than 202. Its text is for the client, its cause
// for the log.
type refusal struct {
	status  int
	outcome outcome
	text    string
	cause   error
}

func (r refusal) Error() string { return r.text }

func (r refusal) because(err error) refusal {
	r.cause = err
	return r
}

var (
	errNoKey      = refusal{status: http.StatusUnauthorized, outcome: unauthorized, text: "Missing API key"}
	errBadKey     = refusal{status: http.StatusUnauthorized, outcome: unauthorized, text: "Invalid API key"}
	errSubscriber = refusal{status: http.StatusForbidden, outcome: forbidden, text: "API key is not allowed to send for this subscriber_id"}
	errPath       = refusal{status: http.StatusNotFound, outcome: notFound, text: "Not found"}
	errMethod     = refusal{status: http.StatusMethodNotAllowed, outcome: notFound, text: "Method not allowed"}
	errTooLarge   = refusal{status: http.StatusRequestEntityTooLarge, outcome: tooLarge, text: "Request body is larger than 64 KiB"}
	errType       = refusal{status: http.StatusUnsupportedMediaType, outcome: unsupportedMedia, text: "Content-Type must be application/json in UTF-8"}
	errCoding     = refusal{status: http.StatusUnsupportedMediaType, outcome: unsupportedMedia, text: "Content-Encoding is not supported"}
	errRate       = refusal{status: http.StatusTooManyRequests, outcome: throttled, text: "Rate limit of this API key exceeded"}
	errOverload   = refusal{status: http.StatusServiceUnavailable, outcome: overloaded, text: "Too many requests at once; send the same request again"}
	errStream     = refusal{status: http.StatusServiceUnavailable, outcome: unavailable, text: "Storing the event was not confirmed; send the same request again"}
	errInternal   = refusal{status: http.StatusInternalServerError, outcome: internalError, text: "Internal error"}
)

// refusalOf maps every error to its answer. What is not known is a bug.
func refusalOf(err error) refusal {
	switch e := err.(type) {
	case refusal:
		return e
	case bodyError:
		return refusal{status: http.StatusBadRequest, outcome: invalid, text: e.Error(), cause: e}
	}
	if errors.Is(err, echo.ErrNotFound) {
		return errPath
	}
	return errInternal.because(err)
}

// refuse writes the answer to an error, and logs what an operator should
// know. It is the only place that does either.
func (s *server) refuse(x *exchange, err error) {
	ref := refusalOf(err)
	x.outcome = ref.outcome
	r, h := x.Request(), x.Response().Header()

	switch ref.outcome {
	case invalid:
		e, _ := ref.cause.(bodyError)
		s.metrics.invalid.WithLabelValues(string(e.field), string(e.rule)).Inc()
		if e.rule == ruleUnread {
			hangUp(x)
		}
	case unauthorized:
		h.Set("WWW-Authenticate", `ApiKey realm="ingest"`)
		hangUp(x)
		e, _ := ref.cause.(authError)
		s.metrics.authFailed.WithLabelValues(string(e.reason)).Inc()
		if more, ok := s.authLog.take(time.Now()); ok {
			s.log.Warn("request without a good key", "reason", e.reason, "remote", r.RemoteAddr,
				"support_id", x.supportID, "unlogged", more)
		}
	case notFound:
		if r.ContentLength != 0 {
			hangUp(x)
		}
	case tooLarge:
		hangUp(x)
	case overloaded:
		h.Set("Retry-After", "1")
		hangUp(x) // instead of reading the body
	case unavailable:
		h.Set("Retry-After", "1")
		if more, ok := s.publishLog.take(time.Now()); ok {
			s.log.Warn("event not stored", "err", ref.cause, "request_id", x.requestID, "key_id", x.keyID,
				"support_id", x.supportID, streams.LogTrace(x.ctx), "unlogged", more)
		}
	case internalError:
		attrs := []any{"err", ref.cause, "support_id", x.supportID, streams.LogTrace(x.ctx)}
		if e, ok := ref.cause.(panicError); ok {
			attrs = append(attrs, "stack", string(e.stack))
		}
		s.log.Error("request failed", attrs...)
	}
	if x.Response().Committed {
		return // a bug after the answer: too late for another
	}
	b := append(make([]byte, 0, 128), `{"error":`...)
	b, _ = jsontext.AppendQuote(b, ref.text)
	_ = x.Blob(ref.status, contentTypeJSON, append(b, '}')) // else the client is gone
}

// hangUp has the connection closed after the answer. net/http reads what is
// left of a body of up to 256 KiB even then, so that the client gets to see
// the answer; half a second is enough for that, and a client that sends
// nothing would hold the connection for the whole ReadTimeout.
func hangUp(x *exchange) {
	x.Response().Header().Set("Connection", "close")
	// Not supported by recorders in tests, and then there is no connection.
	_ = http.NewResponseController(x.Response()).SetReadDeadline(time.Now().Add(500 * time.Millisecond))
}

// newSupportID returns what a client can quote to find its request in the
// logs. It need not be hard to guess.
func newSupportID() string {
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:8], rand.Uint64())
	binary.LittleEndian.PutUint64(b[8:], rand.Uint64())
	var text [32]byte
	hex.Encode(text[:], b[:])
	return string(text[:])
}

// sampler lets one log line a second through: during an outage every request
// has the same to say. It is safe for concurrent use.
type sampler struct {
	next    atomic.Int64 // Unix nanoseconds
	skipped atomic.Int64
}

// take reports whether to log now, and how many lines were left out since
// the last.
func (s *sampler) take(now time.Time) (skipped int64, ok bool) {
	next := s.next.Load()
	if now.UnixNano() < next || !s.next.CompareAndSwap(next, now.Add(time.Second).UnixNano()) {
		s.skipped.Add(1)
		return 0, false
	}
	return s.skipped.Swap(0), true
}
