package ingest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
)

type publisherFunc func(context.Context, streams.Message) (streams.Ack, error)

func (f publisherFunc) Publish(ctx context.Context, m streams.Message) (streams.Ack, error) {
	return f(ctx, m)
}

// stored acknowledges everything.
func stored(context.Context, streams.Message) (streams.Ack, error) {
	return streams.Ack{Sequence: 1}, nil
}

// logBuffer collects log lines.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewJSONHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// testKey makes a key that is the same in every run.
func testKey(t testing.TB, id, subscribers string) (string, KeyEntry) {
	t.Helper()
	set, err := ParseSubscribers(subscribers)
	if err != nil {
		t.Fatal(err)
	}
	seed := [32]byte{}
	copy(seed[:], id)
	key, entry, err := NewKey(id, set, rand.NewChaCha8(seed))
	if err != nil {
		t.Fatal(err)
	}
	return key, entry
}

func writeKeys(t testing.TB, path string, entries ...KeyEntry) {
	t.Helper()
	b, err := json.MarshalIndent(append([]KeyEntry{}, entries...), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// edge is the public API without NATS behind it.
type edge struct {
	*server
	registry *prometheus.Registry
	logs     *logBuffer
	// Keys: of subscriber 12, of every subscriber, no longer valid, and not
	// in the file.
	acme, admin, expired, revoked string
	keysFile                      string
}

func newEdge(t testing.TB, p publisherFunc) *edge {
	t.Helper()
	e := &edge{registry: prometheus.NewRegistry(), logs: new(logBuffer), keysFile: filepath.Join(t.TempDir(), "keys.json")}
	var acme, admin, expired KeyEntry
	e.acme, acme = testKey(t, "acme-1", "12")
	e.admin, admin = testKey(t, "admin", "*")
	e.expired, expired = testKey(t, "acme-0", "12")
	e.revoked, _ = testKey(t, "gone", "12")
	expired.NotAfter = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	writeKeys(t, e.keysFile, acme, admin, expired)

	m := newMetrics(e.registry)
	keys, err := loadKeyring(e.keysFile, 0, e.logs.logger(), m)
	if err != nil {
		t.Fatal(err)
	}
	e.server = newServer(keys, p, Config{PublishTimeout: 1500 * time.Millisecond, MaxInflight: 1000}, e.logs.logger(), m)
	return e
}

// listen serves the edge on a socket for the length of the test.
func (e *edge) listen(t testing.TB) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := e.httpServer()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; err != http.ErrServerClosed {
			t.Error(err)
		}
	})
	return ln.Addr().String()
}

// request is what tests send: a good request with changes.
func request(t testing.TB, addr, key, body string, change ...func(*http.Request)) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+addr+ingestPath, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	if key != "" {
		r.Header.Set("X-API-Key", key)
	}
	for _, c := range change {
		c(r)
	}
	return r
}

// answer is a response, read to its end.
type answer struct {
	*http.Response
	body string
}

func send(t testing.TB, r *http.Request) answer {
	t.Helper()
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport, Timeout: time.Minute}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return read(t, resp)
}

func read(t testing.TB, resp *http.Response) answer {
	t.Helper()
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{resp, string(b)}
}

// rawConn speaks HTTP by hand, for what a client library would not send.
type rawConn struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func dial(t testing.TB, addr string) *rawConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return &rawConn{c, t, bufio.NewReader(c)}
}

func (c *rawConn) send(lines ...string) {
	c.t.Helper()
	if _, err := io.WriteString(c, strings.Join(lines, "\r\n")); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rawConn) answer() answer {
	c.t.Helper()
	resp, err := http.ReadResponse(c.r, nil)
	if err != nil {
		c.t.Fatal(err)
	}
	return read(c.t, resp)
}

// closed fails the test unless the server has nothing more to say.
func (c *rawConn) closed() {
	c.t.Helper()
	if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
		c.t.Errorf("after the answer: %q, %v", rest, err)
	}
}
