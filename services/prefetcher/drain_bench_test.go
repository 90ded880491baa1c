package prefetcher

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// BenchmarkDrain empties a backlog through the whole stage, beside a bare loop
// of GETs against the same simulator in the same run. Only the ratio carries
// from one machine to another. Run it with -benchtime 1x.
func BenchmarkDrain(b *testing.B) {
	ops.CollectSeldom() // as the program does
	for _, tt := range []struct {
		name     string
		latency  time.Duration
		inFlight int
		events   int
	}{
		{"latency=0/inflight=64", 0, 64, 100_000},
		{"latency=50ms/inflight=256", 50 * time.Millisecond, 256, 50_000},
	} {
		b.Run(tt.name, func(b *testing.B) {
			for b.Loop() {
				sim := httptest.NewServer(fingerprintsim.New(fingerprintsim.Options{Key: "key", Latency: tt.latency}))
				bare := float64(tt.events) / bareGETs(b, sim.URL, tt.inFlight, tt.events).Seconds()
				took, heap := drainBacklog(b, sim.URL, tt.inFlight, tt.events)
				ours := float64(tt.events) / took.Seconds()
				b.ReportMetric(bare, "bare_GET/s")
				b.ReportMetric(ours, "events/s")
				b.ReportMetric(ours/bare, "of_bare")
				b.ReportMetric(float64(heap)/(1<<20), "heap_MiB")
				sim.Close()
			}
			b.ReportMetric(0, "ns/op")
		})
	}
}

// bareGETs is the yardstick: what is left when the stage is only its call. It
// stays as it is.
func bareGETs(b *testing.B, url string, inFlight, n int) time.Duration {
	b.Helper()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: inFlight}}
	defer client.CloseIdleConnections()
	ids := make(chan int)
	var wg sync.WaitGroup
	start := time.Now()
	for range inFlight {
		wg.Go(func() {
			for i := range ids {
				req, err := http.NewRequest(http.MethodGet, fmt.Sprintf("%s/v4/events/bare-%d", url, i), nil)
				if err != nil {
					b.Error(err)
					return
				}
				req.Header.Set("Authorization", "Bearer key")
				resp, err := client.Do(req)
				if err != nil {
					b.Error(err)
					return
				}
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK {
					b.Error(resp.StatusCode, err)
					return
				}
			}
		})
	}
	for i := range n {
		ids <- i
	}
	close(ids)
	wg.Wait()
	return time.Since(start)
}

// backlog returns a server with n events in FP_INGEST.
func backlog(b *testing.B, n int) (*streamstest.NATS, *streams.Conn) {
	b.Helper()
	nats := streamstest.NewNATS(b)
	conn := nats.Connect("bench")
	pub := streams.NewPublisher(conn.JS, prometheus.NewRegistry())
	next := make(chan int)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for i := range next {
				e := streams.Event{Schema: 1, RequestID: fmt.Sprint("id-", i), SubscriberID: int64(1 + i%50), SessionID: "s", UserID: "u"}
				body, err := json.Marshal(e)
				if err != nil {
					b.Error(err)
					return
				}
				m := streams.Message{Stream: streams.StreamIngest, Subject: streams.IngestSubject(e.SubscriberID), ID: e.MessageID(), Body: body}
				if _, err := pub.Publish(b.Context(), m); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	return nats, conn
}

// drainSettings are those of a prefetcher with nothing to wait for.
func drainSettings(natsURL, vendorURL string, inFlight int) map[string]string {
	return map[string]string{
		"NATS_URL": natsURL, "FINGERPRINT_BASE_URL": vendorURL, "FINGERPRINT_API_KEY": "key", "FINGERPRINT_RATE_LIMIT": "0",
		"PREFETCH_CONCURRENCY": fmt.Sprint(inFlight), "PREFETCH_FRESH_WITHIN": "1h",
	}
}

// drainBacklog returns how long the stage needs for n events, and the largest
// heap on the way.
func drainBacklog(b *testing.B, url string, inFlight, n int) (time.Duration, uint64) {
	b.Helper()
	nats, conn := backlog(b, n)
	settings := drainSettings(nats.URL, url, inFlight)
	s := ops.NewSettings(func(name string) string { return settings[name] })
	cfg := ReadConfig(s)
	if err := s.Err(); err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	start := time.Now()
	go func() { done <- Run(ctx, cfg, ops.NewProcessLogger("prefetcher", streamstest.Logger(b))) }()
	var heap uint64
	for {
		time.Sleep(50 * time.Millisecond) // the resolution of the measurement
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		heap = max(heap, m.HeapInuse)
		l, err := streams.ReadLag(b.Context(), conn.JS, streams.StreamIngest, streams.DurablePrefetcher)
		if err == nil && l.Messages() == 0 {
			break
		}
	}
	took := time.Since(start)
	cancel()
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	return took, heap
}

// BenchmarkMemory drains 200,000 events through a prefetcher in a process of
// its own. The most memory it has had does not grow with what went through it.
// It reads /proc, so it is for Linux. Run it with -benchtime 1x.
func BenchmarkMemory(b *testing.B) {
	const events = 200_000
	for b.Loop() {
		sim := httptest.NewServer(fingerprintsim.New(fingerprintsim.Options{Key: "key"}))
		nats, conn := backlog(b, events)
		cmd := exec.CommandContext(b.Context(), os.Args[0])
		cmd.Stdout, cmd.Stderr = b.Output(), b.Output()
		cmd.Env = append(os.Environ(), "PREFETCHER_PROCESS=1", "OPS_ADDR="+streamstest.FreeAddr(b))
		for name, value := range drainSettings(nats.URL, sim.URL, 64) {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		for _, done := range []int{50_000, 100_000, 150_000, events} {
			for {
				time.Sleep(50 * time.Millisecond) // the resolution of the measurement
				l, err := streams.ReadLag(b.Context(), conn.JS, streams.StreamIngest, streams.DurablePrefetcher)
				if err == nil && l.Messages() <= uint64(events-done) {
					break
				}
			}
			b.ReportMetric(peakMiB(b, cmd.Process.Pid), fmt.Sprintf("peak_MiB_at_%dk", done/1000))
		}
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			b.Fatal(err)
		}
		if err := cmd.Wait(); err != nil {
			b.Fatal(err)
		}
		sim.Close()
	}
	b.ReportMetric(0, "ns/op")
}

// peakMiB is the most memory a process has had resident. (The usage that wait4
// returns begins with that of the parent.)
func peakMiB(b *testing.B, pid int) float64 {
	b.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		b.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "VmHWM:")
	var kib float64
	if _, err := fmt.Sscan(rest, &kib); err != nil {
		b.Fatal(err)
	}
	return kib / 1024
}
