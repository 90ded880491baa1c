package ingest

import (
	"io"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
)

const typicalBody = `{"request_id":"1708102555327.NLOjmg","subscriber_id":12,"session_id":"8f14e45f-ceea-467f-9d2c-1c5d0e6f7a88","user_id":"jane.doe@example.com","sdk":{"name":"web","version":"3.1.4"}}`

func BenchmarkDecodeBody(b *testing.B) {
	body := []byte(typicalBody)
	b.Run("fresh", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := decodeBody(body); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("reused", func(b *testing.B) {
		var d bodyDecoder
		b.ReportAllocs()
		for b.Loop() {
			if _, err := d.decode(body); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkAppendEvent(b *testing.B) {
	e, err := decodeBody([]byte(typicalBody))
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		appendEvent(make([]byte, 0, 512), e)
	}
}

// nullWriter is a response nobody reads.
type nullWriter struct{ header http.Header }

func (w nullWriter) Header() http.Header         { return w.header }
func (w nullWriter) Write(b []byte) (int, error) { return len(b), nil }
func (w nullWriter) WriteHeader(int)             {}

// BenchmarkHandler is a request from its parsed headers to its answer, without
// the socket and the stream.
func BenchmarkHandler(b *testing.B) {
	e := newEdge(b, stored)
	e.log = slog.New(slog.DiscardHandler)
	r := request(b, "edge", e.acme, "")
	reader := strings.NewReader("")
	r.Body, r.ContentLength = io.NopCloser(reader), int64(len(typicalBody))
	w := nullWriter{http.Header{}}
	b.ReportAllocs()
	for b.Loop() {
		reader.Reset(typicalBody)
		clear(w.header)
		e.echo.ServeHTTP(w, r)
	}
	if n := testutil.ToFloat64(e.metrics.requests.WithLabelValues("accepted")); n < 1 {
		b.Fatal("not accepted")
	}
}

func BenchmarkKeyCheck(b *testing.B) {
	e := newEdge(b, stored)
	values, now := []string{e.acme}, time.Now()
	b.ReportAllocs()
	for b.Loop() {
		if key, reason := e.keys.check(values, now); key == nil {
			b.Fatal(reason)
		}
	}
}
