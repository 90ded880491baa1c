package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/services/persister"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// services are the names under which processes report.
var services = []string{"ingest", "prefetcher", "persister", "exporter"}

// exporterProgram is what streamctl exporter runs.
func exporterProgram() ops.Program[streams.ConnectConfig] {
	return ops.Program[streams.ConnectConfig]{
		Name: "exporter", OpsAddr: ":9104",
		Config: func(s *ops.Settings) streams.ConnectConfig {
			return streams.ReadConnectConfig(s, streams.UserStreamctl)
		},
		Run: func(ctx context.Context, cfg streams.ConnectConfig, p *ops.Process) error {
			conn, err := streams.Connect(cfg, p.Log, p.Registry)
			if err != nil {
				return err
			}
			defer conn.Close()
			streams.RunExporter(ctx, conn, p, 24*time.Hour)
			return nil
		},
	}
}

// A test's child is a service: the test's own executable, told which by this
// variable.
const childOf = "FP_TEST_SERVICE"

func TestMain(m *testing.M) {
	switch os.Getenv(childOf) {
	case "":
		os.Exit(m.Run())
	case "ingest":
		os.Exit(ops.Main(ingest.Program()))
	case "prefetcher":
		os.Exit(ops.Main(prefetcher.Program()))
	case "persister":
		os.Exit(ops.Main(persister.Program()))
	case "exporter":
		os.Exit(ops.Main(exporterProgram()))
	}
	os.Exit(2)
}

// servers are what the services need, and their settings.
type servers struct {
	t     testing.TB
	nats  *streamstest.NATS
	redis *streamstest.Redis
	sim   *fingerprintsim.Sim

	env      map[string]string
	key, url string
}

func newServers(t testing.TB) *servers {
	t.Helper()
	s := &servers{t: t, nats: streamstest.NewNATS(t), redis: streamstest.NewRedis(t), sim: fingerprintsim.New(fingerprintsim.Options{Key: "sim"})}
	sim := httptest.NewServer(s.sim)
	t.Cleanup(sim.Close)
	key, entry, err := ingest.NewKey("test", ingest.AllSubscribers(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal([]ingest.KeyEntry{entry})
	if err != nil {
		t.Fatal(err)
	}
	keys := filepath.Join(t.TempDir(), "keys.json")
	if err := os.WriteFile(keys, b, 0o600); err != nil {
		t.Fatal(err)
	}
	addr := streamstest.FreeAddr(t)
	s.key, s.url = key, "http://"+addr+"/fingerprint/ingest"
	s.env = map[string]string{
		"NATS_URL": s.nats.URL, "REDIS_URL": s.redis.URL(), "INGEST_ADDR": addr, "INGEST_API_KEYS_FILE": keys, "SHUTDOWN_GRACE": "0s", "LOG_FORMAT": "text",
		"FINGERPRINT_BASE_URL": sim.URL, "FINGERPRINT_API_KEY": "sim", "FINGERPRINT_RATE_LIMIT": "2000", "FINGERPRINT_RETENTION": "0s",
	}
	return s
}

var client = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: (&net.Dialer{Timeout: time.Second}).DialContext}}

// post hands in one event and returns the answer's status, 0 for none.
func (s *servers) post(id string, subscriber int64) int {
	body := fmt.Sprintf(`{"request_id":%q,"subscriber_id":%d,"session_id":"s","user_id":"u%d@example.com"}`, id, subscriber, subscriber)
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodPost, s.url, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", s.key)
	resp, err := client.Do(req)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// pipeline is everything there is, in this process, each service with its own
// registry.
type pipeline struct {
	*servers
	processes map[string]*ops.Process
	// retired are processes that have stopped: their counters count on.
	retired []*ops.Process
	stop    map[string]func()
	run     map[string]func(ctx context.Context, p *ops.Process) error
}

func newPipeline(t testing.TB) *pipeline {
	t.Helper()
	p := &pipeline{servers: newServers(t), processes: map[string]*ops.Process{}, stop: map[string]func(){}}
	p.run = map[string]func(context.Context, *ops.Process) error{
		"ingest":     service(t, ingest.Program(), p.env),
		"prefetcher": service(t, prefetcher.Program(), p.env),
		"persister":  service(t, persister.Program(), p.env),
		"exporter":   service(t, exporterProgram(), p.env),
	}
	for _, name := range services {
		p.start(name)
	}
	for _, name := range services {
		streamstest.Eventually(t, name+" to be ready", func() bool { return p.processes[name].Health.Err() == nil })
	}
	return p
}

// service returns what runs a program on env.
func service[C any](t testing.TB, prog ops.Program[C], env map[string]string) func(context.Context, *ops.Process) error {
	t.Helper()
	s := ops.NewSettings(func(name string) string { return env[name] })
	cfg := prog.Config(s)
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context, p *ops.Process) error { return prog.Run(ctx, cfg, p) }
}

// start runs a service as a process that has just begun; one of that name that
// ran before must have been stopped.
func (p *pipeline) start(name string) {
	if old := p.processes[name]; old != nil {
		p.retired = append(p.retired, old)
	}
	proc := ops.NewProcessLogger(name, streamstest.Logger(p.t))
	p.processes[name] = proc
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := p.run[name](ctx, proc); err != nil {
			p.t.Errorf("%s: %v", name, err)
		}
	})
	p.stop[name] = func() { cancel(); wg.Wait() }
	p.t.Cleanup(p.stop[name])
}

// gather returns the families of a service by name.
func (p *pipeline) gather(name string) map[string]*dto.MetricFamily {
	p.t.Helper()
	return gather(p.t, p.processes[name])
}

func gather(t testing.TB, p *ops.Process) map[string]*dto.MetricFamily {
	t.Helper()
	families, err := p.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]*dto.MetricFamily{}
	for _, f := range families {
		out[f.GetName()] = f
	}
	return out
}

// sum adds the values of all series of a family, of all processes there ever
// were, whose labels include those given as name, value, …. Histograms count
// their observations.
func (p *pipeline) sum(family string, labels ...string) float64 {
	p.t.Helper()
	total := 0.0
	for _, proc := range p.processes {
		total += sumOf(gather(p.t, proc)[family], labels)
	}
	for _, proc := range p.retired {
		total += sumOf(gather(p.t, proc)[family], labels)
	}
	return total
}

func sumOf(f *dto.MetricFamily, labels []string) (total float64) {
	for _, m := range f.GetMetric() {
		if matches(m, labels) {
			total += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return total
}

func matches(m *dto.Metric, labels []string) bool {
	have := map[string]string{}
	for _, l := range m.GetLabel() {
		have[l.GetName()] = l.GetValue()
	}
	for i := 0; i < len(labels); i += 2 {
		if have[labels[i]] != labels[i+1] {
			return false
		}
	}
	return true
}

// fleet is everything there is, each service a process of its own.
type fleet struct {
	*servers
	ops      map[string]string
	children map[string]*exec.Cmd
}

func newFleet(t testing.TB, names ...string) *fleet {
	t.Helper()
	f := &fleet{servers: newServers(t), ops: map[string]string{}, children: map[string]*exec.Cmd{}}
	for _, name := range names {
		f.ops[name] = streamstest.FreeAddr(t)
		f.start(name)
	}
	for _, name := range names {
		f.ready(name)
	}
	return f
}

func (f *fleet) start(name string) {
	f.t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = []string{childOf + "=" + name, "OPS_ADDR=" + f.ops[name]}
	for k, v := range f.env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdout, cmd.Stderr = f.t.Output(), f.t.Output()
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.children[name] = cmd
	f.t.Cleanup(func() {
		_ = cmd.Process.Kill() // may have ended already
		_ = cmd.Wait()
	})
}

func (f *fleet) ready(name string) {
	f.t.Helper()
	streamstest.Eventually(f.t, name+" to be ready", func() bool {
		_, err := get(f.t, f.ops[name], "/readyz")
		return err == nil
	})
}

func (f *fleet) signal(name string, sig syscall.Signal) {
	f.t.Helper()
	if err := f.children[name].Process.Signal(sig); err != nil {
		f.t.Fatal(err)
	}
	if sig == syscall.SIGTERM {
		_ = f.children[name].Wait() // how it ends is others' test
	}
}

// get returns a page; any status but 200 is an error.
func get(t testing.TB, addr, path string) (string, error) {
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+addr+path, nil)
	if err != nil {
		return "", err
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = cmp.Or(err, fmt.Errorf("%s: %s", resp.Status, b))
	}
	return string(b), err
}
