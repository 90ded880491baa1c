package main

import (
	"bytes"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// spanCollector takes spans as an OpenTelemetry collector does.
type spanCollector struct {
	*httptest.Server
	mu    sync.Mutex
	raw   []byte
	spans []*otlp.Span
	from  map[string]string // span id to service
}

func newSpanCollector(t *testing.T) *spanCollector {
	t.Helper()
	c := &spanCollector{from: map[string]string{}}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		var req collector.ExportTraceServiceRequest
		if err := proto.Unmarshal(b, &req); err != nil || r.URL.Path != "/v1/traces" {
			t.Errorf("%s: %v", r.URL.Path, err)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.raw = append(c.raw, b...)
		for _, rs := range req.ResourceSpans {
			service := ""
			for _, a := range rs.Resource.Attributes {
				if a.Key == "service.name" {
					service = a.Value.GetStringValue()
				}
			}
			for _, ss := range rs.ScopeSpans {
				for _, s := range ss.Spans {
					c.spans = append(c.spans, s)
					c.from[string(s.SpanId)] = service
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(c.Close)
	return c
}

// trace returns "service span < parent's name" of each span of a trace.
func (c *spanCollector) trace(id string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	names := map[string]string{}
	for _, s := range c.spans {
		names[string(s.SpanId)] = s.Name
	}
	var out []string
	for _, s := range c.spans {
		if hex.EncodeToString(s.TraceId) != id {
			continue
		}
		parent := names[string(s.ParentSpanId)]
		if parent == "" {
			parent = hex.EncodeToString(s.ParentSpanId)
		}
		out = append(out, c.from[string(s.SpanId)]+": "+s.Name+" < "+parent)
	}
	slices.Sort(out)
	return out
}

// One trace goes with an event from the client to the Redis write, the
// vendor's call in it, and holds nothing personal.
func TestOneTracePerEvent(t *testing.T) {
	c := newSpanCollector(t)
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "50") // ms; read by the library
	env := addrs(t)
	env["OTEL_EXPORTER_OTLP_ENDPOINT"] = c.URL
	s, err := start(t.Context(), options{}, func(name string) string { return env[name] }, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	})
	defer stop()
	if err := s.ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	const traceID, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.ingestURL+"/fingerprint/ingest", strings.NewReader(exampleBody))
	if err != nil {
		t.Fatal(err)
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "X-Api-Key": {s.apiKey}, "Traceparent": {"00-" + traceID + "-" + parent + "-01"}}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	// The marker of "not yet" comes from the same event.
	want := []string{
		"ingest: POST /fingerprint/ingest < " + parent,
		"persister: persist < POST /fingerprint/ingest",
		"persister: persist < prefetch",
		"prefetcher: GET /v4/events/{event_id} < prefetch",
		"prefetcher: prefetch < POST /fingerprint/ingest",
	}
	streamstest.Eventually(t, "the whole trace", func() bool { return len(c.trace(traceID)) >= len(want) })
	stop() // sends what is left
	if got := c.trace(traceID); !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, personal := range []string{"DEV-SESSION-XYZ", "user@example.com"} {
		if bytes.Contains(c.raw, []byte(personal)) {
			t.Errorf("a span holds %q", personal)
		}
	}
}

// A collector that is away costs spans, and never an event or a clean end.
func TestTheCollectorMayBeAway(t *testing.T) {
	env := addrs(t)
	env["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://" + streamstest.FreeAddr(t)
	if code, stdout, stderr := runOnce(t, env); code != 0 {
		t.Errorf("exit %d\n%s\n%s", code, stdout, stderr)
	}
}
