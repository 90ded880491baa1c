package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// Promise 1 with the stream full: refused honestly, and accepted again as soon
// as there is room.
func TestFullStreamIsRefusedAndThenAccepted(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	js := p.nats.Connect("test").JS
	limit := func(n int64) {
		cfg := streams.Definition(streams.Limits{})[0].Stream
		cfg.MaxMsgs = n
		if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	limit(3)
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	for i := range 5 {
		want := http.StatusAccepted
		if i >= 3 {
			want = http.StatusServiceUnavailable
		}
		if status, answer := p.post(fmt.Sprint("full-", i)); status != want {
			t.Errorf("post %d: %d %s", i, status, answer)
		}
	}
	limit(-1)
	if status, answer := p.post("full-4"); status != http.StatusAccepted {
		t.Errorf("with room again: %d %s", status, answer)
	}
	p.eventually("full-4", record.Ready)
	if s := p.status("full-3"); s != "" {
		t.Errorf("an event answered 503 is %s", s)
	}
}

// Promise 8 for the edge: two of them behind a balancer that asks for
// readiness are restarted one after the other under load, and no request
// fails.
func TestRollingRestartFailsNoRequest(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	first := p.procs["ingest"]
	addr := streamstest.FreeAddr(t)
	p.add("ingest-b", append(without(first.env, "INGEST_ADDR", "OPS_ADDR", "NATS_URL", "SHUTDOWN_GRACE", "LOG_FORMAT"), "INGEST_ADDR="+addr, "SHUTDOWN_GRACE=1s")...)
	first.env = append(without(first.env, "SHUTDOWN_GRACE"), "SHUTDOWN_GRACE=1s")
	p.procs["ingest-b"].binary = "ingest"
	edges := map[string]string{"ingest": p.ingestURL, "ingest-b": "http://" + addr}
	p.start("ingest", "ingest-b")
	p.ready("ingest", "ingest-b")

	// The balancer looks at readiness ten times a second.
	var targets atomic.Pointer[[]*url.URL]
	look := func() {
		var ready []*url.URL
		for name, edge := range edges {
			if p.readyz(name) == nil {
				u, err := url.Parse(edge)
				if err != nil {
					t.Error(err)
				}
				ready = append(ready, u)
			}
		}
		targets.Store(&ready)
	}
	look()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
				look()
			}
		}
	})
	var turn atomic.Int64
	balancer := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			if list := *targets.Load(); len(list) > 0 {
				r.SetURL(list[turn.Add(1)%int64(len(list))])
			}
		},
		Transport: &http.Transport{MaxIdleConnsPerHost: 64},
	}
	front := &http.Server{Addr: streamstest.FreeAddr(t), Handler: balancer, ReadHeaderTimeout: time.Second}
	go front.ListenAndServe() //nolint:errcheck // ends with Close
	t.Cleanup(func() { front.Close() })
	p.ingestURL = "http://" + front.Addr
	streamstest.Eventually(t, "the balancer", func() bool { status, _ := p.post("first"); return status == http.StatusAccepted })

	var posts, failed atomic.Int64
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				select {
				case <-stop:
					return
				default:
				}
				posts.Add(1)
				if status, answer := p.post(fmt.Sprintf("roll-%d-%d", w, i)); status != http.StatusAccepted {
					failed.Add(1)
					t.Errorf("%d %s", status, answer)
				}
			}
		})
	}
	for _, name := range []string{"ingest", "ingest-b"} {
		before := posts.Load()
		if err := p.kill(name, syscall.SIGTERM); err != nil {
			t.Errorf("%s after SIGTERM: %v", name, err)
		}
		p.start(name)
		p.ready(name)
		streamstest.Eventually(t, "more posts", func() bool { return posts.Load() > before+200 })
	}
	close(stop)
	wg.Wait()
	t.Logf("%d posts, %d failed", posts.Load(), failed.Load())
}

// without drops variables from an environment.
func without(env []string, names ...string) (out []string) {
	for _, e := range env {
		drop := false
		for _, n := range names {
			drop = drop || len(e) > len(n) && e[:len(n)+1] == n+"="
		}
		if !drop {
			out = append(out, e)
		}
	}
	return out
}

// The benchmark runs, and nothing it sends is refused.
func TestBenchRuns(t *testing.T) {
	var out, errs bytes.Buffer
	if code := run(t.Context(), []string{"bench", "--duration", "100ms", "--rounds", "1", "--json"}, func(string) string { return "" }, &out, &errs); code != 0 {
		t.Fatalf("exit %d: %s", code, errs.String())
	}
	var rows []benchResult
	if err := json.Unmarshal(out.Bytes(), &rows); err != nil {
		t.Fatal(err)
	}
	if len(rows) != 8 {
		t.Errorf("%d rows", len(rows))
	}
	for _, r := range rows {
		if r.Rate == 0 || r.Failed != 0 {
			t.Errorf("%+v", r)
		}
	}
}
