package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// build makes the real binaries, once for all tests.
var build = sync.OnceValues(func() (dir string, err error) {
	dir, err = os.MkdirTemp("", "fingerprint-prefetch-bin-")
	if err != nil {
		return "", err
	}
	const prefix = "github.com/idenza/fingerprint-prefetch/"
	cmd := exec.Command("go", "build", "-o", dir+"/",
		prefix+"services/ingest/cmd/ingest", prefix+"services/prefetcher/cmd/prefetcher", prefix+"services/persister/cmd/persister", prefix+"streams/cmd/streamctl",
		"github.com/nats-io/nats-server/v2")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, nil
})

func TestMain(m *testing.M) {
	if len(os.Args) > 2 && os.Args[1] == "bench" { // the benchmark's servers are its own executable
		os.Exit(run(context.Background(), os.Args[1:], os.Getenv, os.Stdout, os.Stderr))
	}
	code := m.Run()
	if dir, err := build(); err == nil {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// pipeline is the three services as processes of their own, between a NATS
// server, a redis-server and the vendor's double.
type pipeline struct {
	t     testing.TB
	nats  *streamstest.NATS
	redis *streamstest.Redis
	rdb   redis.Cmdable
	sim   *fingerprintsim.Sim
	// servers returns the settings by which a service reaches NATS and Redis.
	servers func(service string) []string

	apiKey    string
	ingestURL string
	logs      io.Writer
	procs     map[string]*process
}

// process is one service.
type process struct {
	name string
	// binary is the command's name, if it is not name, and args its arguments.
	binary string
	args   []string

	ops string
	env []string
	cmd *exec.Cmd
}

func newPipeline(t testing.TB) *pipeline {
	t.Helper()
	nats, rs := streamstest.NewEmptyNATS(t), streamstest.NewRedis(t)
	p := newPipelineAt(t, func(service string) []string {
		env := []string{"NATS_URL=" + nats.URL}
		if service == "persister" {
			env = append(env, "REDIS_URL="+rs.URL())
		}
		return env
	})
	p.nats, p.redis, p.rdb = nats, rs, redisClient(t, rs.URL())
	return p
}

// newPipelineAt returns the services at servers of the caller's.
func newPipelineAt(t testing.TB, servers func(service string) []string) *pipeline {
	t.Helper()
	if _, err := build(); err != nil {
		t.Fatal(err)
	}
	p := &pipeline{
		t: t, servers: servers,
		sim: fingerprintsim.New(fingerprintsim.Options{Key: "sim"}), logs: t.Output(), procs: map[string]*process{},
	}
	sim := httptest.NewServer(p.sim)
	t.Cleanup(sim.Close)

	key, entry, err := ingest.NewKey("test", ingest.SomeSubscribers(12, 13), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p.apiKey = key
	keys := filepath.Join(t.TempDir(), "keys.json")
	b, err := json.Marshal([]ingest.KeyEntry{entry})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(keys, b, 0o600); err != nil {
		t.Fatal(err)
	}
	addr := streamstest.FreeAddr(t)
	p.ingestURL = "http://" + addr
	p.add("ingest", "INGEST_ADDR="+addr, "INGEST_API_KEYS_FILE="+keys, "SHUTDOWN_GRACE=0s")
	p.add("prefetcher", "FINGERPRINT_BASE_URL="+sim.URL, "FINGERPRINT_API_KEY=sim", "FINGERPRINT_RATE_LIMIT=0", "FINGERPRINT_TIMEOUT=1s")
	p.add("persister")
	return p
}

func (p *pipeline) add(name string, env ...string) {
	addr := streamstest.FreeAddr(p.t)
	p.procs[name] = &process{name: name, ops: addr, env: slices.Concat(env, p.servers(name), []string{"OPS_ADDR=" + addr, "LOG_FORMAT=text"})}
}

// apply does what an operator does once: streamctl apply.
func (p *pipeline) apply() {
	p.t.Helper()
	p.streamctl("apply")
}

// streamctl runs the operators' tool and returns all it printed.
func (p *pipeline) streamctl(args ...string) string {
	p.t.Helper()
	dir, _ := build()
	cmd := exec.Command(filepath.Join(dir, "streamctl"), args...)
	cmd.Env = p.servers("streamctl")
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("streamctl %v: %v\n%s", args, err, out)
	}
	return string(out)
}

func (p *pipeline) start(names ...string) {
	p.t.Helper()
	dir, _ := build()
	for _, name := range names {
		pr := p.procs[name]
		cmd := exec.Command(filepath.Join(dir, cmp.Or(pr.binary, name)), pr.args...)
		cmd.Env = pr.env
		cmd.Stdout, cmd.Stderr = p.logs, p.logs
		if err := cmd.Start(); err != nil {
			p.t.Fatal(err)
		}
		pr.cmd = cmd
		p.t.Cleanup(func() {
			_ = cmd.Process.Kill() // may have ended already
			_ = cmd.Wait()
		})
	}
}

func (p *pipeline) kill(name string, sig syscall.Signal) error {
	p.t.Helper()
	pr := p.procs[name]
	if err := pr.cmd.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
	return pr.cmd.Wait()
}

func (p *pipeline) ready(names ...string) {
	p.t.Helper()
	for _, name := range names {
		streamstest.Eventually(p.t, name+" to be ready", func() bool { return p.readyz(name) == nil })
	}
}

func (p *pipeline) readyz(name string) error {
	ctx, cancel := context.WithTimeout(p.t.Context(), time.Second)
	defer cancel()
	return readyz(ctx, p.procs[name].ops)
}

var client = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64}}

// post hands in one event and returns the status, 0 when there was no answer.
func (p *pipeline) post(id string) (status int, answer string) {
	return p.send(fmt.Sprintf(`{"request_id":%q,"subscriber_id":12,"session_id":"s-%s","user_id":"user@example.com"}`, id, id))
}

// send posts a body.
func (p *pipeline) send(body string) (status int, answer string) {
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, p.ingestURL+"/fingerprint/ingest", strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", p.apiKey)
	resp, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body) // a cut answer is no answer
	return resp.StatusCode, string(b)
}

func (p *pipeline) status(id string) record.Status {
	b, err := p.rdb.Get(p.t.Context(), record.Key(id)).Bytes()
	if err != nil {
		return ""
	}
	r, err := record.Decode(b)
	if err != nil {
		p.t.Errorf("%s: %v", id, err)
	}
	return r.Status
}

func (p *pipeline) eventually(id string, want record.Status) {
	p.t.Helper()
	streamstest.Eventually(p.t, fmt.Sprintf("%s to be %s", id, want), func() bool { return p.status(id) == want })
}

// metric returns a value from a service's operators' port, 0 when absent.
func (p *pipeline) metric(service, series string) float64 {
	p.t.Helper()
	resp, err := client.Get("http://" + p.procs[service].ops + "/metrics")
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	for line := range strings.SplitSeq(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, series+" "); ok {
			f, err := strconv.ParseFloat(v, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			return f
		}
	}
	return 0
}

// accounted checks the sum of what was accepted: everything in FP_INGEST has a
// ready record or is in FP_DEAD, and nothing waits.
func (p *pipeline) accounted(accepted map[string]bool) {
	p.t.Helper()
	p.accountedAt(p.nats.Connect("test"), accepted)
}

func (p *pipeline) accountedAt(conn *streams.Conn, accepted map[string]bool) {
	p.t.Helper()
	streamstest.Eventually(p.t, "nothing to wait", func() bool {
		for _, ref := range [][2]string{{streams.StreamIngest, streams.DurablePrefetcher}, {streams.StreamEnriched, streams.DurablePersister}} {
			l, err := streams.ReadLag(p.t.Context(), conn.JS, ref[0], ref[1])
			if err != nil || l.Messages() != 0 {
				return false
			}
		}
		return true
	})
	stored := map[string]bool{}
	st, err := conn.JS.Stream(p.t.Context(), streams.StreamIngest)
	if err != nil {
		p.t.Fatal(err)
	}
	for seq := uint64(1); seq <= st.CachedInfo().State.LastSeq; seq++ {
		m, err := st.GetMsg(p.t.Context(), seq)
		if err != nil {
			p.t.Fatal(err)
		}
		e, err := streams.DecodeEvent(m.Data)
		if err != nil {
			p.t.Fatal(err)
		}
		stored[e.RequestID] = true
	}
	dead, err := conn.JS.Stream(p.t.Context(), streams.StreamDead)
	if err != nil {
		p.t.Fatal(err)
	}
	lost, missing := 0, 0
	for id := range accepted {
		if !stored[id] {
			lost++
		}
	}
	for id := range stored {
		if p.status(id) != record.Ready {
			missing++
		}
	}
	if n := dead.CachedInfo().State.Msgs; lost != 0 || missing != 0 || n != 0 {
		p.t.Errorf("of %d accepted %d were not stored; of %d stored %d have no ready record; %d dead letters", len(accepted), lost, len(stored), missing, n)
	}
	p.t.Logf("accepted %d = stored and answered; stored %d = ready; dead 0; waiting 0", len(accepted), len(stored))
}

func redisClient(t testing.TB, url string) *redis.Client {
	t.Helper()
	o, err := redis.ParseURL(url)
	if err != nil {
		t.Fatal(err)
	}
	c := redis.NewClient(o)
	t.Cleanup(func() { c.Close() })
	return c
}

// Promise 8: the services start first, in any order, with everything down;
// they say that they are not ready, and work once the rest is there.
func TestProcessesStartInAnyOrder(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.nats.Stop()
	p.redis.Kill()
	names := []string{"persister", "ingest", "prefetcher"}
	p.start(names...)
	for _, name := range names {
		streamstest.Eventually(t, name+" to say what it lacks", func() bool {
			err := p.readyz(name)
			return err != nil && strings.Contains(err.Error(), "not ready")
		})
	}
	if status, answer := p.post("too-early"); status != http.StatusServiceUnavailable {
		t.Errorf("without NATS: %d %s", status, answer)
	}
	p.nats.Start()
	p.apply()
	p.redis.Start()
	p.ready(names...)
	if status, answer := p.post("1A2B3C4D5E"); status != http.StatusAccepted {
		t.Fatalf("%d %s", status, answer)
	}
	p.eventually("1A2B3C4D5E", record.Ready)
	for _, name := range names {
		if err := p.kill(name, syscall.SIGTERM); err != nil {
			t.Errorf("%s after SIGTERM: %v", name, err)
		}
	}
	// What was refused while NATS was away is nowhere.
	p.accounted(map[string]bool{"1A2B3C4D5E": true})
	if p.status("too-early") != "" {
		t.Error("an event answered 503 was stored later")
	}
}

// Promises 1 and 2 with kill -9: every 202 ends as a record.
func TestKillNineInTheMiddleLosesNothing(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	const posts = 5000
	victims := map[int64]string{1000: "ingest", 2000: "prefetcher", 3000: "persister"}
	var next atomic.Int64
	var mu sync.Mutex
	accepted := map[string]bool{}
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for n := next.Add(1); n <= posts; n = next.Add(1) {
				if name, ok := victims[n]; ok {
					_ = p.kill(name, syscall.SIGKILL) // "signal: killed" is what was asked for
					p.start(name)
				}
				id := fmt.Sprint("kill-", n)
				for range 3 {
					if status, _ := p.post(id); status == http.StatusAccepted {
						mu.Lock()
						accepted[id] = true
						mu.Unlock()
						break
					}
				}
			}
		})
	}
	wg.Wait()
	if len(accepted) < posts*9/10 {
		t.Fatalf("only %d of %d posts were accepted", len(accepted), posts)
	}
	p.accounted(accepted)
}

// The vendor is away for the whole time: clients notice nothing, records say
// pending, the lag grows in seconds, and afterwards everything becomes ready.
func TestVendorAwayIsPendingThenReady(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	p.sim.SetFault(&fingerprintsim.Fault{Reset: true})
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	accepted := map[string]bool{}
	for i := range 200 {
		id := fmt.Sprint("away-", i)
		if status, answer := p.post(id); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
		accepted[id] = true
	}
	for id := range accepted {
		p.eventually(id, record.Pending)
	}
	const lag = `fp_consumer_lag_seconds{consumer="prefetcher",stream="FP_INGEST"}`
	streamstest.Eventually(t, "lag in seconds", func() bool { return p.metric("prefetcher", lag) > 1 })
	before := p.metric("prefetcher", lag)
	streamstest.Eventually(t, "lag to grow", func() bool { return p.metric("prefetcher", lag) > before+1 })
	if v := p.metric("prefetcher", `fp_stage_holding{cause="fingerprint",consumer="prefetcher"}`); v != 1 {
		t.Errorf("fp_stage_holding = %v", v)
	}
	p.sim.SetFault(nil)
	for id := range accepted {
		p.eventually(id, record.Ready)
	}
	p.accounted(accepted)
}

// NATS and Redis go away in the middle, one after the other.
func TestServersAwayInTheMiddle(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	post := func(prefix string, n, want int) {
		t.Helper()
		for i := range n {
			id := fmt.Sprint(prefix, "-", i)
			begin := time.Now()
			status, answer := p.post(id)
			if status != want {
				t.Errorf("%s: %d %s", id, status, answer)
			}
			if took := time.Since(begin); took > 2*time.Second {
				t.Errorf("%s: answered after %v", id, took)
			}
		}
	}
	post("before", 20, http.StatusAccepted)

	p.redis.Kill()
	streamstest.Eventually(t, "the persister to notice", func() bool { return p.readyz("persister") != nil })
	post("no-redis", 20, http.StatusAccepted)
	if err := p.readyz("ingest"); err != nil {
		t.Errorf("the edge depends on Redis: %v", err)
	}
	p.redis.Start()
	p.ready("persister")
	for i := range 20 {
		p.eventually(fmt.Sprint("no-redis-", i), record.Ready)
	}

	p.nats.Stop()
	streamstest.Eventually(t, "all to notice", func() bool {
		return p.readyz("ingest") != nil && p.readyz("prefetcher") != nil && p.readyz("persister") != nil
	})
	post("no-nats", 3, http.StatusServiceUnavailable)
	p.nats.Start()
	p.ready("ingest", "prefetcher", "persister")
	post("after", 20, http.StatusAccepted)
	for i := range 20 {
		p.eventually(fmt.Sprint("after-", i), record.Ready)
	}
	for i := range 3 {
		if s := p.status(fmt.Sprint("no-nats-", i)); s != "" {
			t.Errorf("no-nats-%d is %s: an event answered 503 was stored later", i, s)
		}
	}
}

// Promise 7: what is personal is in no log line, metric, subject or dead
// letter's header, at any log level, and secrets are nowhere.
func TestPersonalDataStaysInPayloads(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	var logs lockedBuffer
	p.logs = &logs
	names := []string{"ingest", "prefetcher", "persister"}
	for _, name := range names {
		p.procs[name].env = append(p.procs[name].env, "LOG_LEVEL=debug")
	}
	p.start(names...)
	p.ready(names...)
	post := func(id string, subscriber int) {
		t.Helper()
		body := fmt.Sprintf(`{"request_id":%q,"subscriber_id":%d,"session_id":"planted-session","user_id":"planted@example.com"}`, id, subscriber)
		if status, answer := p.send(body); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
	}
	p.sim.Script("fine", fingerprintsim.Fault{Status: 404}, fingerprintsim.Fault{Status: 503})
	post("fine", 12)
	p.eventually("fine", record.Ready)
	post("fine", 13) // another subscriber's: a dead letter
	js := p.nats.Connect("test").JS
	if _, err := js.Publish(t.Context(), streams.IngestSubject(12), []byte(`{"schema":1,"user_id":"planted@example.com","request_id":"planted-session`)); err != nil {
		t.Fatal(err)
	}
	dead, err := js.Stream(t.Context(), streams.StreamDead)
	if err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "two dead letters", func() bool {
		info, err := dead.Info(t.Context())
		return err == nil && info.State.Msgs == 2
	})
	var seen strings.Builder
	seen.WriteString(logs.String())
	for _, name := range names {
		resp, err := client.Get("http://" + p.procs[name].ops + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		seen.WriteString(string(b))
	}
	for seq := uint64(1); seq <= 2; seq++ {
		m, err := dead.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		seen.WriteString(m.Subject + fmt.Sprint(m.Header))
	}
	if !strings.Contains(seen.String(), "message dead-lettered") || !strings.Contains(seen.String(), "fp_stage_events_total") {
		t.Fatal("nothing was looked at")
	}
	for _, planted := range []string{"planted@example.com", "planted-session", p.apiKey, "Bearer", "FINGERPRINT_API_KEY=sim"} {
		if strings.Contains(seen.String(), planted) {
			t.Errorf("%q shows up", planted)
		}
	}
}

// lockedBuffer collects what several processes write.
type lockedBuffer struct {
	mu  sync.Mutex
	all strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.String()
}
