package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

//go:embed monitor.html
var monitorPage []byte

// monitor keeps the pipeline's metrics of the last two minutes for a page that
// draws them. It reads them from the operators' ports, as Prometheus would.
type monitor struct {
	addrs []string

	mu        sync.Mutex
	snapshots []snapshot // a second apart
}

// keptSnapshots is how many the page draws.
const keptSnapshots = 120

// snapshot is the series at one time, by name and labels in the text form's
// spelling, and which services did not answer.
type snapshot struct {
	Time   float64            `json:"time"` // Unix seconds
	Series map[string]float64 `json:"series"`
	Silent []string           `json:"silent"`
}

// serveMonitor serves the page until the stack stops.
func (s *stack) serveMonitor() (url string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:"+strconv.Itoa(max(usualPort(usualMonitorPort), 0)))
	if err != nil {
		return "", fmt.Errorf("--monitor: %w", err)
	}
	m := &monitor{addrs: s.opsAddrs}
	srv := &http.Server{Handler: m.handler(), ReadHeaderTimeout: 5 * time.Second}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { m.run(ctx) })
	running.Go(func() { _ = srv.Serve(ln) }) // ends by Close
	s.undo = append(s.undo, func() error {
		cancel()
		err := srv.Close()
		running.Wait()
		return err
	})
	return "http://" + ln.Addr().String(), nil
}

func (m *monitor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		_, _ = w.Write(monitorPage) // else the browser is gone
	})
	mux.HandleFunc("GET /metrics.json", func(w http.ResponseWriter, r *http.Request) {
		after, _ := strconv.ParseFloat(r.FormValue("after"), 64) // all, without
		m.mu.Lock()
		defer m.mu.Unlock()
		first := slices.IndexFunc(m.snapshots, func(s snapshot) bool { return s.Time > after })
		if first < 0 {
			first = len(m.snapshots)
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(m.snapshots[first:])
	})
	return mux
}

func (m *monitor) run(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		s := m.take(ctx)
		m.mu.Lock()
		m.snapshots = append(m.snapshots, s)
		if n := len(m.snapshots) - keptSnapshots; n > 0 {
			m.snapshots = slices.Delete(m.snapshots, 0, n)
		}
		m.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// take scrapes every service at once.
func (m *monitor) take(ctx context.Context) snapshot {
	s := snapshot{Time: float64(time.Now().UnixMilli()) / 1000, Series: map[string]float64{}, Silent: []string{}}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, addr := range m.addrs {
		wg.Go(func() {
			one, err := scrape(ctx, addr)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				s.Silent = append(s.Silent, addr)
				return
			}
			maps.Copy(s.Series, one)
		})
	}
	wg.Wait()
	return s
}

// scrape reads the series of one service that are the pipeline's own and say
// something; of a histogram, its buckets.
func scrape(ctx context.Context, addr string) (map[string]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return nil, fmt.Errorf("read the metrics of %s: %w", addr, err)
	}
	out := map[string]float64{}
	for name, f := range families {
		if !strings.HasPrefix(name, "fp_") {
			continue
		}
		for _, m := range f.Metric {
			labels := m.Label
			switch {
			case m.Counter != nil && m.Counter.GetValue() > 0:
				out[series(name, labels)] = m.Counter.GetValue()
			case m.Gauge != nil:
				out[series(name, labels)] = m.Gauge.GetValue()
			case m.Histogram != nil && m.Histogram.GetSampleCount() > 0:
				for _, b := range m.Histogram.Bucket {
					le := strconv.FormatFloat(b.GetUpperBound(), 'g', -1, 64)
					out[series(name+"_bucket", append(labels, &dto.LabelPair{Name: new("le"), Value: &le}))] = float64(b.GetCumulativeCount())
				}
			}
		}
	}
	return out, nil
}

// series spells a series as the text form does.
func series(name string, labels []*dto.LabelPair) string {
	if len(labels) == 0 {
		return name
	}
	parts := make([]string, len(labels))
	for i, l := range labels {
		parts[i] = l.GetName() + "=" + strconv.Quote(l.GetValue())
	}
	return name + "{" + strings.Join(parts, ",") + "}"
}
