//go:build checkops

package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// drillPace is how much faster than deployed the rules run in a drill.
const drillPace = 10

// watched is a fleet under load, scraped every second by a real Prometheus
// with the rules at drillPace.
type watched struct {
	*fleet
	addr string
}

func newWatched(t *testing.T) *watched {
	t.Helper()
	w := &watched{fleet: newFleet(t, services...), addr: streamstest.FreeAddr(t)}
	dir := t.TempDir()
	rules, err := rulesYAML(Groups(drillPace))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "rules.yaml"), rules, 0o600); err != nil {
		t.Fatal(err)
	}
	targets := &strings.Builder{}
	for _, addr := range w.ops {
		fmt.Fprintf(targets, "%q,", addr)
	}
	config := fmt.Sprintf(`
global: {scrape_interval: 1s, scrape_timeout: 900ms, evaluation_interval: 1s, scrape_native_histograms: true, always_scrape_classic_histograms: true}
rule_files: [%q]
scrape_configs: [{job_name: fingerprint-prefetch, static_configs: [{targets: [%s]}]}]
`, filepath.Join(dir, "rules.yaml"), strings.TrimSuffix(targets.String(), ","))
	file := filepath.Join(dir, "prometheus.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tool(t, "prometheus"), "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+w.addr, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	streamstest.Eventually(t, "Prometheus", func() bool { _, err := get(t, w.addr, "/-/ready"); return err == nil })

	done := make(chan struct{})
	var load sync.WaitGroup
	load.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
				w.post(fmt.Sprintf("load-%d", i), int64(i%100+1)) // refused ones are part of a drill
			}
		}
	})
	t.Cleanup(func() { close(done); load.Wait() })
	return w
}

// sample is one line of an answer.
type sample struct {
	Metric map[string]string
}

// query returns what an expression gives now.
func (w *watched) query(expr string) ([]sample, error) {
	page, err := get(w.t, w.addr, "/api/v1/query?query="+url.QueryEscape(expr))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", expr, err)
	}
	var answer struct {
		Data struct{ Result json.RawMessage }
	}
	var samples []sample
	if err := json.Unmarshal([]byte(page), &answer); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(answer.Data.Result, &samples); err != nil {
		return nil, fmt.Errorf("%s: not a vector: %w", expr, err)
	}
	return samples, nil
}

// selector finds what a rule reads.
var selector = regexp.MustCompile(`\bfp[_:][a-z0-9_:]+(\{[^}]*\})?`)

// TestEveryExpressionReturnsData asks a real Prometheus for every query of every
// panel and runbook, and for everything a rule reads.
func TestEveryExpressionReturnsData(t *testing.T) {
	w := newWatched(t)
	grafana := strings.NewReplacer("$namespace", ".*", "$instance", ".*", "$__rate_interval", "10s")
	wanted := map[string]string{}
	for _, d := range Dashboards() {
		for _, p := range d.Panels {
			for _, query := range p.Queries {
				wanted[grafana.Replace(query.expr())] = d.Title + ", " + p.Title
			}
		}
	}
	for _, alert := range alerts() {
		for _, query := range runbookQueries(t, alert) {
			wanted[query] = alert + ".md"
		}
	}
	for _, g := range Groups(drillPace) {
		for _, r := range g.Rules {
			if r.Record != "" {
				wanted[r.Expr] = r.Record
			}
			for _, s := range selector.FindAllString(r.Expr, -1) {
				wanted[s] = r.Alert + r.Record
			}
		}
	}
	empty := map[string]string{}
	deadline := time.Now().Add(2 * time.Minute)
	for {
		clear(empty)
		for expr, where := range wanted {
			samples, err := w.query(expr)
			if err != nil {
				t.Fatalf("%s: %v", where, err)
			}
			if len(samples) == 0 {
				empty[expr] = where
			}
		}
		if len(empty) == 0 || time.Now().After(deadline) {
			break
		}
		time.Sleep(time.Second)
	}
	for expr, where := range empty {
		t.Errorf("%s: nothing for %s", where, expr)
	}
	t.Logf("%d expressions", len(wanted))
	for _, s := range w.firing() {
		t.Errorf("under plain load %v fires", s.Metric)
	}
	for _, name := range services {
		page, err := get(t, w.ops[name], "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		lint := exec.Command(tool(t, "promtool"), "check", "metrics")
		lint.Stdin = strings.NewReader(page)
		if out, err := lint.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("promtool check metrics of %s: %v\n%s", name, err, out)
		}
	}
	// What Prometheus itself says about rules that fail.
	page, err := get(t, w.addr, "/api/v1/rules")
	if err != nil || strings.Contains(page, `"health":"err"`) || !strings.Contains(page, `"health":"ok"`) {
		t.Errorf("rules: %v\n%s", err, page)
	}
}

func (w *watched) firing() []sample {
	w.t.Helper()
	samples, err := w.query(`ALERTS{alertstate="firing"}`)
	if err != nil {
		w.t.Fatal(err)
	}
	return samples
}

// TestDrills breaks one thing after another under load: its alert fires, with
// its texts filled in, and clears when the thing is whole again.
func TestDrills(t *testing.T) {
	w := newWatched(t)
	admin := w.nats.Connect("admin")
	streamstest.Eventually(t, "the rules' first values", func() bool {
		samples, err := w.query(`fp:ingest_bad_ratio:rate5m`)
		return err == nil && len(samples) > 0
	})
	firing := func(expr string) bool {
		t.Helper()
		samples, err := w.query(expr)
		if err != nil {
			t.Fatal(err)
		}
		return len(samples) > 0
	}
	dead := func(maxBytes int64) jetstream.Stream {
		t.Helper()
		s, err := admin.JS.Stream(t.Context(), streams.StreamDead)
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		cfg.MaxBytes = maxBytes
		if s, err = admin.JS.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for _, d := range []struct {
		name, alert, label string
		broken, whole      func()
	}{
		{"a service is stopped", "FPAbsent", `service="exporter"`, func() { w.signal("exporter", syscall.SIGTERM) }, func() { w.start("exporter"); w.ready("exporter") }},
		{"the persister is frozen", "FPConsumerStalled", `consumer="persister"`, func() { w.signal("persister", syscall.SIGSTOP) }, func() { w.signal("persister", syscall.SIGCONT) }},
		{"the prefetcher is stopped", "FPConsumerStalled", `consumer="prefetcher"`, func() { w.signal("prefetcher", syscall.SIGTERM) }, func() { w.start("prefetcher"); w.ready("prefetcher") }},
		{"Redis is cut off", "FPRedisDown", "", w.redis.Kill, w.redis.Start},
		{"the vendor's key is revoked", "FPConfigurationFault", "", func() { w.sim.SetKey("another") }, func() { w.sim.SetKey("sim") }},
		{"the vendor is down", "FPVendorDown", "", func() { w.sim.SetFault(&fingerprintsim.Fault{Status: http.StatusServiceUnavailable}) }, func() { w.sim.SetFault(nil) }},
		{"a stream fills up", "FPStreamFilling", `stream="FP_DEAD"`,
			func() {
				dead(1 << 20)
				pub := streams.NewPublisher(admin.JS, prometheus.NewRegistry())
				for i := range 19 {
					noise := make([]byte, 50<<10)
					for n := range noise { // S2 would make little of zeros
						noise[n] = byte(n * (n + i) >> 3)
					}
					if _, err := pub.Publish(t.Context(), streams.Message{Stream: streams.StreamDead, Subject: streams.DeadSubject("persister", 1), ID: fmt.Sprint("fill", i), Body: noise}); err != nil {
						t.Fatal(err)
					}
				}
			},
			func() {
				if err := dead(1 << 30).Purge(t.Context()); err != nil {
					t.Fatal(err)
				}
			}},
		{"NATS is down", "FPNATSDisconnected", "", w.nats.Stop, w.nats.Start},
	} {
		expr := strings.Replace(fmt.Sprintf(`ALERTS{alertname=%q,alertstate="firing",%s}`, d.alert, d.label), ",}", "}", 1)
		if firing(expr) {
			t.Fatalf("%s fires before %s", d.alert, d.name)
		}
		begun := time.Now()
		d.broken()
		streamstest.Eventually(t, d.alert+" after "+d.name, func() bool { return firing(expr) })
		fired := time.Since(begun)
		page, err := get(t, w.addr, "/api/v1/alerts")
		if err != nil || strings.Contains(page, "error expanding") || strings.Contains(page, "no value") {
			t.Errorf("%s: %v\n%s", d.name, err, page)
		}
		begun = time.Now()
		d.whole()
		streamstest.Eventually(t, d.alert+" to clear", func() bool { return !firing(expr) })
		t.Logf("%s: %s fires after %.1f s and clears %.1f s after the repair (rules at %d times their pace)", d.name, d.alert, fired.Seconds(), time.Since(begun).Seconds(), drillPace)
	}
}
