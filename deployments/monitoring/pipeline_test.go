package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
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

// pipeline is everything there is, in this process, each service with its own
// registry.
type pipeline struct {
	t     *testing.T
	nats  *streamstest.NATS
	redis *streamstest.Redis
	sim   *fingerprintsim.Sim

	key, url  string
	processes map[string]*ops.Process
	cancel    map[string]func()
	run       map[string]func(ctx context.Context, p *ops.Process) error
}

func newPipeline(t *testing.T) *pipeline {
	t.Helper()
	p := &pipeline{
		t: t, nats: streamstest.NewNATS(t), redis: streamstest.NewRedis(t),
		sim:       fingerprintsim.New(fingerprintsim.Options{Key: "sim"}),
		processes: map[string]*ops.Process{}, cancel: map[string]func(){},
	}
	sim := httptest.NewServer(p.sim)
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
	p.key, p.url = key, "http://"+addr+"/fingerprint/ingest"
	env := map[string]string{
		"NATS_URL": p.nats.URL, "REDIS_URL": p.redis.URL(), "INGEST_ADDR": addr, "INGEST_API_KEYS_FILE": keys, "SHUTDOWN_GRACE": "0s",
		"FINGERPRINT_BASE_URL": sim.URL, "FINGERPRINT_API_KEY": "sim", "FINGERPRINT_RATE_LIMIT": "2000", "FINGERPRINT_RETENTION": "0s",
	}
	p.run = map[string]func(context.Context, *ops.Process) error{
		"ingest":     service(t, ingest.Program(), env),
		"prefetcher": service(t, prefetcher.Program(), env),
		"persister":  service(t, persister.Program(), env),
		"exporter": func(ctx context.Context, p *ops.Process) error {
			conn, err := streams.Connect(streams.ConnectConfig{Name: streams.UserStreamctl, URL: env["NATS_URL"]}, p.Log, p.Registry)
			if err != nil {
				return err
			}
			defer conn.Close()
			streams.RunExporter(ctx, conn.JS, p.Log, p.Registry, 24*time.Hour)
			return nil
		},
	}
	for _, name := range services {
		p.start(name)
	}
	for _, name := range services {
		streamstest.Eventually(t, name+" to be ready", func() bool {
			begun := name == "exporter" || p.gather(name)["fp_dependency_up"] != nil
			return begun && p.processes[name].Health.Err() == nil
		})
	}
	return p
}

// service returns what runs a program on env.
func service[C any](t *testing.T, prog ops.Program[C], env map[string]string) func(context.Context, *ops.Process) error {
	t.Helper()
	s := ops.NewSettings(func(name string) string { return env[name] })
	cfg := prog.Config(s)
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return func(ctx context.Context, p *ops.Process) error { return prog.Run(ctx, cfg, p) }
}

// start runs a service as a process that has just begun.
func (p *pipeline) start(name string) {
	proc := ops.NewProcessLogger(name, streamstest.Logger(p.t))
	p.processes[name] = proc
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := p.run[name](ctx, proc); err != nil {
			p.t.Errorf("%s: %v", name, err)
		}
	})
	p.cancel[name] = func() { cancel(); wg.Wait() }
	p.t.Cleanup(p.cancel[name])
}

var client = &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 64, DialContext: (&net.Dialer{Timeout: time.Second}).DialContext}}

// post hands in one event and returns the answer's status, 0 for none.
func (p *pipeline) post(id string, subscriber int64) int {
	body := fmt.Sprintf(`{"request_id":%q,"subscriber_id":%d,"session_id":"s","user_id":"u%d@example.com"}`, id, subscriber, subscriber)
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodPost, p.url, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", p.key)
	resp, err := client.Do(req)
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

// gather returns the families of a service by name.
func (p *pipeline) gather(name string) map[string]*dto.MetricFamily {
	p.t.Helper()
	families, err := p.processes[name].Registry.Gather()
	if err != nil {
		p.t.Fatal(err)
	}
	out := map[string]*dto.MetricFamily{}
	for _, f := range families {
		out[f.GetName()] = f
	}
	return out
}

// sum adds the values of all series of a family, of all services, whose labels
// include those given as name, value, …. Histograms count their observations.
func (p *pipeline) sum(family string, labels ...string) float64 {
	p.t.Helper()
	total := 0.0
	for name := range p.processes {
		for _, m := range p.gather(name)[family].GetMetric() {
			if matches(m, labels) {
				total += m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
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
