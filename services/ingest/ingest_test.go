package ingest

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// running is an edge started by Run.
type running struct {
	addr, key string
	process   *ops.Process
	stop      context.CancelFunc
	result    chan error
}

func run(t *testing.T, natsURL string, change ...func(*Config)) *running {
	t.Helper()
	key, entry := testKey(t, "acme-1", "12")
	cfg := Config{
		APIKeysFile:     filepath.Join(t.TempDir(), "keys.json"),
		PublishTimeout:  1500 * time.Millisecond,
		ShutdownTimeout: time.Minute,
		NATS:            streams.ConnectConfig{Name: "ingest", URL: natsURL},
	}
	writeKeys(t, cfg.APIKeysFile, entry)
	var err error
	if cfg.Listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	for _, c := range change {
		c(&cfg)
	}
	ctx, stop := context.WithCancel(t.Context())
	r := &running{
		addr: cfg.Listener.Addr().String(), key: key,
		process: ops.NewProcessLogger("ingest", streamstest.Logger(t)), stop: stop, result: make(chan error, 1),
	}
	go func() { r.result <- Run(ctx, cfg, r.process) }()
	t.Cleanup(func() { stop(); <-r.result })
	return r
}

// wait returns Run's result.
func (r *running) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.result:
		r.result <- nil // for the cleanup
		return err
	case <-time.After(time.Minute):
		t.Fatal("still running")
		return nil
	}
}

func (r *running) post(t *testing.T, body string) answer {
	t.Helper()
	return send(t, request(t, r.addr, r.key, body))
}

func (r *running) ready(t *testing.T, want bool) {
	t.Helper()
	streamstest.Eventually(t, "readiness", func() bool { return (r.process.Health.Err() == nil) == want })
}

func TestRunStoresWhatItAccepts(t *testing.T) {
	t.Parallel()
	nats := streamstest.NewNATS(t)
	r := run(t, nats.URL)
	r.ready(t, true)

	first := r.post(t, typicalBody)
	if first.StatusCode != 202 || first.Header.Get("Idempotent-Replayed") != "" {
		t.Fatalf("%s %s", first.Status, first.body)
	}
	again := r.post(t, " "+typicalBody)
	if again.StatusCode != 202 || again.Header.Get("Idempotent-Replayed") != "true" || again.body != first.body {
		t.Errorf("%s %v %s", again.Status, again.Header, again.body)
	}
	changed := r.post(t, strings.Replace(typicalBody, "jane", "joan", 1))
	if changed.StatusCode != 202 || changed.Header.Get("Idempotent-Replayed") != "" {
		t.Errorf("%s %v", changed.Status, changed.Header)
	}

	stream, err := nats.Connect("test").JS.Stream(t.Context(), streams.StreamIngest)
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Msgs; n != 2 {
		t.Errorf("%d messages stored", n)
	}
	msg, err := stream.GetLastMsgForSubject(t.Context(), "fp.ingest.12")
	if err != nil {
		t.Fatal(err)
	}
	got, err := streams.DecodeEvent(msg.Data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(streams.Event{
		Schema: 1, RequestID: "1708102555327.NLOjmg", SubscriberID: 12,
		SessionID: "8f14e45f-ceea-467f-9d2c-1c5d0e6f7a88", UserID: "joan.doe@example.com",
	}, got); diff != "" {
		t.Error(diff)
	}
	if id := msg.Header.Get("Nats-Msg-Id"); id != got.MessageID() {
		t.Errorf("message id %q", id)
	}
	r.stop()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
}

// TestRunWithoutNATS: it starts, checks keys and bodies, says that it cannot
// store, stores nothing later, and works as soon as NATS is there.
func TestRunWithoutNATS(t *testing.T) {
	t.Parallel()
	nats := streamstest.NewNATS(t)
	nats.Stop()
	r := run(t, nats.URL)
	refused := r.post(t, typicalBody)
	if refused.StatusCode != 503 || refused.Header.Get("Retry-After") != "1" {
		t.Errorf("%s %s", refused.Status, refused.body)
	}
	if got := r.post(t, `{}`); got.StatusCode != 400 {
		t.Errorf("%s %s", got.Status, got.body)
	}
	r.ready(t, false)

	nats.Start()
	r.ready(t, true)
	if got := r.post(t, body("", "")); got.StatusCode != 202 {
		t.Errorf("%s %s", got.Status, got.body)
	}
	stream, err := nats.Connect("test").JS.Stream(t.Context(), streams.StreamIngest)
	if err != nil {
		t.Fatal(err)
	}
	if n := stream.CachedInfo().State.Msgs; n != 1 {
		t.Errorf("%d messages stored, want only the accepted one", n)
	}
	r.stop()
	if err := r.wait(t); err != nil {
		t.Error(err)
	}
}

// TestRunGoesOnAcceptingInItsGrace also loses NATS for good in the end, to
// cut an hour's grace short.
func TestRunGoesOnAcceptingInItsGrace(t *testing.T) {
	t.Parallel()
	s := newEdge(t, stored)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	health := ops.NewProcessLogger("ingest", s.logs.logger()).Health
	ctx, stop := context.WithCancel(t.Context())
	lost, result := make(chan struct{}), make(chan error, 1)
	go func() {
		result <- s.serve(ctx, ln, Config{ShutdownGrace: time.Hour, ShutdownTimeout: time.Minute}, lost, health)
	}()

	if got := send(t, request(t, ln.Addr().String(), s.acme, typicalBody)); got.StatusCode != 202 || got.Close {
		t.Errorf("before: %s, close %v", got.Status, got.Close)
	}
	stop()
	streamstest.Eventually(t, "draining", func() bool { return health.Err() != nil && s.draining.Load() })
	if got := send(t, request(t, ln.Addr().String(), s.acme, typicalBody)); got.StatusCode != 202 || !got.Close {
		t.Errorf("in the grace: %s, close %v", got.Status, got.Close)
	}
	close(lost)
	if err := <-result; !errors.Is(err, streams.ErrClosed) {
		t.Error(err)
	}
}

// TestShutdownFinishesRequests: a request that is being stored when the port
// closes is answered.
func TestShutdownFinishesRequests(t *testing.T) {
	t.Parallel()
	publishing, release := make(chan struct{}), make(chan struct{})
	s := newEdge(t, func(context.Context, streams.Message) (streams.Ack, error) {
		close(publishing)
		<-release
		return streams.Ack{}, nil
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := ln.Addr().String()
	ctx, stop := context.WithCancel(t.Context())
	result, status := make(chan error, 1), make(chan int, 1)
	health := ops.NewProcessLogger("ingest", s.logs.logger()).Health
	go func() { result <- s.serve(ctx, ln, Config{ShutdownTimeout: time.Minute}, nil, health) }()
	r := request(t, addr, s.acme, typicalBody)
	go func() {
		resp, err := (&http.Transport{}).RoundTrip(r)
		if err != nil {
			status <- 0
			return
		}
		resp.Body.Close()
		status <- resp.StatusCode
	}()
	<-publishing
	stop()
	streamstest.Eventually(t, "the port to close", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	close(release)
	if got := <-status; got != 202 {
		t.Errorf("status %d", got)
	}
	if err := <-result; err != nil {
		t.Error(err)
	}
}

// TestShutdownIsBounded: what does not finish in time is cut off and said so.
func TestShutdownIsBounded(t *testing.T) {
	t.Parallel()
	publishing, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	s := newEdge(t, func(context.Context, streams.Message) (streams.Ack, error) {
		close(publishing)
		<-release
		return streams.Ack{}, nil
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	result := make(chan error, 1)
	health := ops.NewProcessLogger("ingest", s.logs.logger()).Health
	go func() { result <- s.serve(ctx, ln, Config{ShutdownTimeout: time.Millisecond}, nil, health) }()
	c := dial(t, ln.Addr().String())
	c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "X-API-Key: "+s.acme,
		"Transfer-Encoding: chunked", "", strconv.FormatInt(int64(len(typicalBody)), 16), typicalBody, "0", "", "")
	<-publishing
	stop()
	if err := <-result; !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestRunFailsAtOnce(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		change func(*Config)
		want   string
	}{
		"port in use": {func(c *Config) { c.Addr = c.Listener.Addr().String(); c.Listener = nil }, "INGEST_ADDR: "},
		"no keys": {func(c *Config) {
			if err := os.WriteFile(c.APIKeysFile, []byte("[]"), 0o600); err != nil {
				t.Error(err)
			}
		}, "INGEST_API_KEYS_FILE: "},
		"bad URL": {func(c *Config) { c.NATS.URL = "nats://[" }, "NATS_URL: "},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			_, entry := testKey(t, "acme-1", "12")
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer ln.Close()
			cfg := Config{Listener: ln, APIKeysFile: filepath.Join(dir, "keys.json"), NATS: streams.ConnectConfig{Name: "ingest", URL: "nats://127.0.0.1:1"}}
			writeKeys(t, cfg.APIKeysFile, entry)
			test.change(&cfg)
			if err := Run(t.Context(), cfg, ops.NewProcessLogger("ingest", streamstest.Logger(t))); err == nil || !strings.HasPrefix(err.Error(), test.want) {
				t.Error(err)
			}
		})
	}
}

func TestReadConfig(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "keys.json")
	_, entry := testKey(t, "acme-1", "12")
	writeKeys(t, path, entry)
	s := ops.NewSettings(func(name string) string { return map[string]string{"INGEST_API_KEYS_FILE": path}[name] })
	got := ReadConfig(s)
	if err := s.Err(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(Config{
		Addr: ":8080", APIKeysFile: path, PublishTimeout: 1500 * time.Millisecond, MaxInflight: defaultInflight,
		ShutdownGrace: 5 * time.Second, ShutdownTimeout: 20 * time.Second,
		NATS: streams.ConnectConfig{Name: "ingest", URL: "nats://127.0.0.1:4222"},
	}, got); diff != "" {
		t.Error(diff)
	}

	s = ops.NewSettings(func(name string) string {
		return map[string]string{"INGEST_ADDR": "8080", "INGEST_PUBLISH_TIMEOUT": "1h"}[name]
	})
	ReadConfig(s)
	err := s.Err()
	if err == nil {
		t.Fatal("no error")
	}
	for _, name := range []string{"INGEST_ADDR: ", "INGEST_PUBLISH_TIMEOUT: ", "INGEST_API_KEYS_FILE: required"} {
		if !strings.Contains(err.Error(), name) {
			t.Errorf("%s is not among the faults: %v", name, err)
		}
	}
}
