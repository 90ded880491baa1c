package ops

import (
	"context"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// readTracesURL reads where spans go: the standard variables, of which the
// exporter itself reads the rest (OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT,
// _CERTIFICATE and so on, OTEL_TRACES_SAMPLER, OTEL_SERVICE_NAME,
// OTEL_RESOURCE_ATTRIBUTES). Empty means nowhere.
func readTracesURL(s *Settings) string {
	base := s.URL("OTEL_EXPORTER_OTLP_ENDPOINT", "", "collector that spans are sent to, OTLP over HTTP (port 4318); empty records none. The other standard OTEL_* variables hold too", "http", "https")
	own := s.URL("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "", "the same, with its path, for spans alone", "http", "https")
	s.OneOf("OTEL_EXPORTER_OTLP_PROTOCOL", "form of what is sent", "http/protobuf")
	off := s.OneOf("OTEL_SDK_DISABLED", "true records no spans whatever else is set", "false", "true") == "true" ||
		s.OneOf("OTEL_TRACES_EXPORTER", "none records no spans either", "otlp", "none") == "none"
	switch {
	case off:
		return ""
	case own != "":
		return own
	case base != "":
		return strings.TrimSuffix(base, "/") + "/v1/traces"
	}
	return ""
}

// traceTo makes p record spans and send them to url in the background. A
// collector that is away costs spans and a warning now and then, never an
// event. flush sends what is left, within three seconds.
func (p *Process) traceTo(service, url string) (flush func(), err error) {
	exporter, err := otlptracehttp.New(context.Background(), otlptracehttp.WithEndpointURL(url))
	if err != nil {
		return nil, fmt.Errorf("OTEL_EXPORTER_OTLP_ENDPOINT: %w", err)
	}
	version, _ := Version()
	res, err := resource.New(context.Background(),
		resource.WithAttributes(attribute.String("service.name", service), attribute.String("service.version", version)),
		resource.WithTelemetrySDK(), resource.WithFromEnv())
	if err != nil {
		return nil, fmt.Errorf("OTEL_RESOURCE_ATTRIBUTES: %w", err)
	}
	// The only place where the library says what went wrong in the background.
	otel.SetErrorHandler(&traceErrors{log: p.Log})
	provider := sdktrace.NewTracerProvider(sdktrace.WithBatcher(exporter), sdktrace.WithResource(res))
	p.Tracer = provider.Tracer("github.com/idenza/fingerprint-prefetch")
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			p.Log.Warn("cannot send the last spans", "err", withoutURL(err))
		}
	}, nil
}

// traceErrors logs the exporter's troubles, one a minute at most.
type traceErrors struct {
	log  *slog.Logger
	next atomic.Int64 // Unix nanoseconds
}

// Handle implements otel.ErrorHandler.
func (e *traceErrors) Handle(err error) {
	now, next := time.Now(), e.next.Load()
	if now.UnixNano() >= next && e.next.CompareAndSwap(next, now.Add(time.Minute).UnixNano()) {
		e.log.Warn("cannot send spans", "err", withoutURL(err))
	}
}

// withoutURL drops the address from an error of net/http, since it may hold a
// password.
func withoutURL(err error) error {
	for e := err; e != nil; {
		if u, ok := e.(*url.Error); ok {
			return u.Err
		}
		wrapped, ok := e.(interface{ Unwrap() error })
		if !ok {
			break
		}
		e = wrapped.Unwrap()
	}
	return err
}
