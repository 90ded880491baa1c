package streams

import (
	"context"
	"encoding/hex"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/trace"
)

// WithTraceParent returns ctx with the W3C trace context of a traceparent
// header as the parent of what is started in it. It comes from strangers and
// ends up in logs, so anything but version 00 in its exact form is ignored.
func WithTraceParent(ctx context.Context, header string) context.Context {
	const form = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
	if len(header) != len(form) || header[:3] != "00-" || header[35] != '-' || header[52] != '-' {
		return ctx
	}
	traceID, err := trace.TraceIDFromHex(header[3:35])
	if err != nil {
		return ctx
	}
	spanID, err := trace.SpanIDFromHex(header[36:52])
	if err != nil {
		return ctx
	}
	flags, err := hex.DecodeString(header[53:])
	if err != nil {
		return ctx
	}
	return trace.ContextWithRemoteSpanContext(ctx, trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: traceID, SpanID: spanID, TraceFlags: trace.TraceFlags(flags[0]) & trace.FlagsSampled, Remote: true,
	}))
}

// TraceParent returns the traceparent header for what is sent in ctx, empty
// when it belongs to no trace.
func TraceParent(ctx context.Context) string {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() {
		return ""
	}
	return "00-" + sc.TraceID().String() + "-" + sc.SpanID().String() + "-" + sc.TraceFlags().String()
}

// LogTrace returns the id of the trace that ctx belongs to for a log line, and
// for none an attribute that is left out.
func LogTrace(ctx context.Context) slog.Attr {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() {
		return slog.Attr{}
	}
	return slog.String("trace_id", sc.TraceID().String())
}

// Observe adds v to a histogram, with the trace it was seen in as an exemplar
// where that is being recorded.
func Observe(ctx context.Context, h prometheus.Observer, v float64) {
	sc := trace.SpanContextFromContext(ctx)
	if e, ok := h.(prometheus.ExemplarObserver); ok && sc.IsSampled() {
		e.ObserveWithExemplar(v, prometheus.Labels{"trace_id": sc.TraceID().String()})
		return
	}
	h.Observe(v)
}

// StartSpan starts a span in ctx and makes it the parent of what follows. With
// a nil tracer it records nothing and costs nothing, and the parent stays, so
// that a trace that others record goes through.
func StartSpan(ctx context.Context, t trace.Tracer, name string, kind trace.SpanKind) (context.Context, trace.Span) {
	if t == nil {
		return ctx, trace.SpanFromContext(ctx)
	}
	return t.Start(ctx, name, trace.WithSpanKind(kind))
}

// Context returns ctx with the trace that the message belongs to.
func (d *Delivery) Context(ctx context.Context) context.Context {
	return WithTraceParent(ctx, d.Header.Get(HeaderTraceParent))
}
