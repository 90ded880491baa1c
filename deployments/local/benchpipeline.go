package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// pipelineResult is what `local bench pipeline` finds.
type pipelineResult struct {
	CPUs int `json:"cpus"`
	// Sustained is what 64 clients get through the whole pipeline, the time it
	// takes to drain what they were ahead included.
	Sustained float64            `json:"sustained_per_second"`
	CPU       map[string]float64 `json:"cpu_seconds_per_million,omitempty"` // by process, at that rate
	Latency   []latencyResult    `json:"latency"`
	Backlog   backlogResult      `json:"backlog"`
	Held      []heldResult       `json:"held"`
}

// latencyResult is one open loop through the whole pipeline.
type latencyResult struct {
	Share      float64 `json:"of_sustained,omitzero"`
	Rate       float64 `json:"per_second"`
	Answer50   float64 `json:"answer_p50_ms"`
	Answer99   float64 `json:"answer_p99_ms"`
	Readable50 float64 `json:"readable_p50_ms"` // from the answer to the record
	Readable99 float64 `json:"readable_p99_ms"`
	Samples    int     `json:"samples"`
	Failed     int64   `json:"failed"`
}

// backlogResult is a backlog that prefetcher and persister find and drain.
type backlogResult struct {
	Events  int            `json:"events"`
	Rate    float64        `json:"per_second"`
	Samples []drainSample  `json:"samples"` // about a second apart
	PeakMiB map[string]int `json:"peak_mib,omitempty"`
}

type drainSample struct {
	Second  float64 `json:"second"`
	Waiting uint64  `json:"waiting"`
	DiskMiB int     `json:"disk_mib"`
}

// heldResult is the edge's rate while FP_INGEST holds so many messages.
type heldResult struct {
	Messages int     `json:"messages"`
	Rate     float64 `json:"per_second"`
	P99      float64 `json:"p99_ms"`
}

// benchPipeline measures the whole pipeline, every part a process of its own on
// this machine, and the vendor answering at once and without a limit.
func benchPipeline(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	fs := flag.NewFlagSet("bench pipeline", flag.ContinueOnError)
	fs.SetOutput(stderr)
	duration := fs.Duration("duration", 15*time.Second, "length of each measurement")
	backlog := fs.Int("backlog", 100_000, "events in the backlog to drain")
	held := fs.Int("held", 1_000_000, "messages held in FP_INGEST at most")
	asJSON := fs.Bool("json", false, "print JSON")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	r, err := runPipelineBench(ctx, *duration, *backlog, *held, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "local bench pipeline:", err)
		return 1
	}
	if *asJSON {
		_ = json.NewEncoder(stdout).Encode(r)
	} else {
		r.print(stdout)
	}
	return 0
}

// pipelineBench is the running pipeline.
type pipelineBench struct {
	*edgeBench
	rdb      *redis.Client
	env      []string // of prefetcher and persister
	progress io.Writer
	serial   atomic.Int64
}

func runPipelineBench(ctx context.Context, d time.Duration, backlog, held int, progress io.Writer) (r pipelineResult, err error) {
	e, err := newEdgeBench(ctx)
	if err != nil {
		return r, err
	}
	defer e.stop()
	delete(e.procs, "echo") // no part of the pipeline
	b := &pipelineBench{edgeBench: e, progress: progress}
	if err := b.startRest(ctx); err != nil {
		return r, err
	}
	stages, err := b.startStages()
	if err != nil {
		return r, err
	}
	r.CPUs = runtime.NumCPU()

	b.say("64 clients for %v", d)
	before := b.cpuSeconds()
	begin := time.Now()
	load, err := closedLoop(ctx, 64, d, b.post)
	if err != nil {
		return r, err
	}
	if err := b.drained(ctx, nil); err != nil {
		return r, err
	}
	events := load.Rate * d.Seconds()
	r.Sustained = events / time.Since(begin).Seconds()
	for name, s := range b.cpuSeconds() {
		if r.CPU == nil {
			r.CPU = map[string]float64{}
		}
		r.CPU[name] = (s - before[name]) / events * 1e6
	}
	for _, share := range []float64{.1, .5, .8, 0} {
		rate := r.Sustained * share
		if share == 0 {
			rate = 500 // of a fixed rate, to be compared between machines
		}
		b.say("%.0f events a second for %v", rate, d)
		l, err := b.latency(ctx, rate, d)
		if err != nil {
			return r, err
		}
		l.Share = share
		r.Latency = append(r.Latency, l)
	}
	b.say("a backlog of %d", backlog)
	for _, stop := range stages {
		stop()
	}
	if r.Backlog, err = b.drainBacklog(ctx, backlog); err != nil {
		return r, err
	}
	if r.Held, err = b.heldMessages(ctx, held, d/3); err != nil {
		return r, err
	}
	return r, nil
}

func (b *pipelineBench) say(format string, args ...any) {
	fmt.Fprintf(b.progress, time.Now().Format(time.TimeOnly)+" "+format+"\n", args...)
}

// startRest starts what the edge alone does not need.
func (b *pipelineBench) startRest(ctx context.Context) error {
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return errors.New("redis-server is not installed; `make redis-server` installs it on Debian, elsewhere install Redis 7 or later")
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	addr := ln.Addr().String()
	ln.Close()
	_, port, _ := net.SplitHostPort(addr)
	cmd := exec.Command(path, "--port", port, "--bind", "127.0.0.1", "--save", "", "--dir", b.dir)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start redis-server: %w", err)
	}
	b.procs["redis"] = cmd.Process.Pid
	b.undo = append(b.undo, func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	b.rdb = redis.NewClient(&redis.Options{Addr: addr})
	b.undo = append(b.undo, func() { b.rdb.Close() })
	if err := poll(ctx, func() error { return b.rdb.Ping(ctx).Err() }); err != nil {
		return fmt.Errorf("redis-server: %w", err)
	}
	vendor, err := b.start("vendor")
	if err != nil {
		return err
	}
	b.env = []string{
		"NATS_URL=" + b.natsURL, "REDIS_URL=redis://" + addr, "FINGERPRINT_BASE_URL=" + vendor, "FINGERPRINT_API_KEY=bench",
		"FINGERPRINT_RATE_LIMIT=0", "FINGERPRINT_RETENTION=0s", "OPS_ADDR=127.0.0.1:0", "PREFETCH_CONCURRENCY=256",
	}
	return nil
}

// startStages starts prefetcher and persister and returns what stops them.
func (b *pipelineBench) startStages() (stops []func(), err error) {
	for _, stage := range []string{"prefetcher", "persister"} {
		if _, err := b.start(append([]string{stage}, b.env...)...); err != nil {
			return nil, err
		}
		n := len(b.undo) - 1
		stop := sync.OnceFunc(b.undo[n])
		b.undo[n] = stop
		stops = append(stops, stop)
	}
	return stops, nil
}

func (b *pipelineBench) post(ctx context.Context) (func() error, func(), error) {
	return httpClient(ctx, b.edge, b.apiKey, &b.serial)
}

// waiting is how many events have not reached their record.
func (b *pipelineBench) waiting(ctx context.Context) (n uint64, err error) {
	for stream, durable := range map[string]string{streams.StreamIngest: streams.DurablePrefetcher, streams.StreamEnriched: streams.DurablePersister} {
		c, err := b.js.Consumer(ctx, stream, durable)
		if err != nil {
			return 0, err
		}
		i := c.CachedInfo()
		n += i.NumPending + uint64(i.NumAckPending)
	}
	return n, nil
}

// drained waits until nothing waits, and tells each look, if anybody asks.
func (b *pipelineBench) drained(ctx context.Context, look func(waiting uint64)) error {
	for ctx.Err() == nil {
		n, err := b.waiting(ctx)
		if err != nil {
			return err
		}
		if look != nil {
			look(n)
		}
		if n == 0 {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return ctx.Err()
}

// latency sends rate events a second and follows some of them to their records.
func (b *pipelineBench) latency(ctx context.Context, rate float64, d time.Duration) (latencyResult, error) {
	followCtx, stop := context.WithTimeout(ctx, d)
	defer stop()
	var times []time.Duration
	var followErr error
	var wg sync.WaitGroup
	wg.Go(func() { times, followErr = b.follow(followCtx) })
	load, err := openLoop(ctx, rate, d, b.post)
	wg.Wait()
	if err := cmp.Or(err, followErr); err != nil {
		return latencyResult{}, err
	}
	if err := b.drained(ctx, nil); err != nil {
		return latencyResult{}, err
	}
	n := len(times)
	f := summarise(times)
	return latencyResult{Rate: rate, Answer50: load.P50, Answer99: load.P99, Readable50: f.P50, Readable99: f.P99, Samples: n, Failed: load.Failed}, nil
}

// follow posts twenty events a second, one after the other, and returns how
// long after its answer each was readable.
func (b *pipelineBench) follow(ctx context.Context) (times []time.Duration, err error) {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	s := &stack{ingestURL: "http://" + b.edge, apiKey: b.apiKey, client: &http.Client{Timeout: 5 * time.Second}}
	for {
		select {
		case <-ctx.Done():
			return times, nil
		case <-tick.C:
		}
		id := "follow-" + strconv.FormatInt(b.serial.Add(1), 36)
		status, _, err := s.post(context.WithoutCancel(ctx), `{"request_id":"`+id+`","subscriber_id":12,"session_id":"s","user_id":"u"}`)
		if err != nil {
			return nil, err
		}
		if !strings.HasPrefix(status, "202") {
			continue // counted by the load's own posts
		}
		answered := time.Now()
		for {
			v, err := b.rdb.Get(context.WithoutCancel(ctx), record.Key(id)).Result()
			if err != nil && !errors.Is(err, redis.Nil) {
				return nil, err
			}
			if strings.Contains(v, `"status":"ready"`) {
				break
			}
			if time.Since(answered) > time.Minute {
				return nil, fmt.Errorf("%s has no record after a minute", id)
			}
			time.Sleep(100 * time.Microsecond)
		}
		times = append(times, time.Since(answered))
	}
}

// fill stores n events in FP_INGEST.
func (b *pipelineBench) fill(n int) error {
	js, err := jetstream.New(b.js.Conn(), jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		return err
	}
	for range n {
		e := streams.Event{Schema: streams.EventSchema, RequestID: "backlog-" + strconv.FormatInt(b.serial.Add(1), 36), SubscriberID: 12, SessionID: "DEV-SESSION-XYZ", UserID: "user@example.com"}
		body, err := json.Marshal(e)
		if err != nil {
			return err
		}
		if _, err := js.PublishMsgAsync(&nats.Msg{Subject: streams.IngestSubject(12), Data: body, Header: nats.Header{jetstream.MsgIDHeader: {e.MessageID()}}}); err != nil {
			return err
		}
	}
	select {
	case <-js.PublishAsyncComplete():
		return nil
	case <-time.After(10 * time.Minute):
		return errors.New("events are not stored within ten minutes")
	}
}

func (b *pipelineBench) drainBacklog(ctx context.Context, n int) (r backlogResult, err error) {
	if err := b.fill(n); err != nil {
		return r, err
	}
	stops, err := b.startStages()
	if err != nil {
		return r, err
	}
	begin, next := time.Now(), time.Duration(0)
	r = backlogResult{Events: n, PeakMiB: map[string]int{}}
	err = b.drained(ctx, func(waiting uint64) {
		since := time.Since(begin)
		if since < next && waiting > 0 {
			return
		}
		next = since + time.Second
		r.Samples = append(r.Samples, drainSample{Second: since.Seconds(), Waiting: waiting, DiskMiB: int(diskBytes(b.dir) >> 20)})
		for name, pid := range b.procs {
			r.PeakMiB[name] = max(r.PeakMiB[name], residentMiB(pid))
		}
	})
	r.Rate = float64(n) / time.Since(begin).Seconds()
	for _, stop := range stops {
		stop()
	}
	return r, err
}

// heldMessages measures the edge while the stream holds ten times more each
// time, with nobody reading.
func (b *pipelineBench) heldMessages(ctx context.Context, most int, d time.Duration) (all []heldResult, err error) {
	st, err := b.js.Stream(ctx, streams.StreamIngest)
	if err != nil {
		return nil, err
	}
	if err := st.Purge(ctx); err != nil {
		return nil, err
	}
	for n := most / 100; n <= most && n > 0; n *= 10 {
		info, err := st.Info(ctx)
		if err != nil {
			return nil, err
		}
		b.say("%d messages held", n)
		if err := b.fill(max(n-int(info.State.Msgs), 0)); err != nil {
			return nil, err
		}
		load, err := closedLoop(ctx, 64, d, b.post)
		if err != nil {
			return nil, err
		}
		all = append(all, heldResult{Messages: n, Rate: load.Rate, P99: load.P99})
	}
	return all, nil
}

// cpuSeconds is what each process has used so far; empty where the system does
// not say in /proc.
func (b *pipelineBench) cpuSeconds() map[string]float64 {
	all := map[string]float64{}
	for name, pid := range b.procs {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		// After the name in parentheses: utime and stime are fields 14 and 15,
		// in hundredths of a second.
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		user, _ := strconv.ParseFloat(fields[11], 64)
		system, _ := strconv.ParseFloat(fields[12], 64)
		all[name] = (user + system) / 100
	}
	return all
}

func residentMiB(pid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	if err != nil {
		return 0
	}
	pages, _ := strconv.Atoi(strings.Fields(string(b))[1])
	return pages * os.Getpagesize() >> 20
}

func diskBytes(dir string) (n int64) {
	_ = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil {
			return nil // gone meanwhile
		}
		if i, err := e.Info(); err == nil && i.Mode().IsRegular() {
			n += i.Size()
		}
		return nil
	})
	return n
}

// print writes the result as Markdown, which is also what docs/performance.md
// quotes.
func (r pipelineResult) print(w io.Writer) {
	fmt.Fprintf(w, "Through the whole pipeline, %d cores for everything: **%.0f events a second** sustained.\n\n", r.CPUs, r.Sustained)
	if len(r.CPU) > 0 {
		fmt.Fprintf(w, "| process | CPU seconds per million events |\n|---|---|\n")
		for _, name := range sortedKeys(r.CPU) {
			fmt.Fprintf(w, "| %s | %.0f |\n", name, r.CPU[name])
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "| events a second | answer p50 | p99 | answer to readable p50 | p99 | refused |\n|---|---|---|---|---|---|\n")
	for _, l := range r.Latency {
		name := fmt.Sprintf("%.0f", l.Rate)
		if l.Share > 0 {
			name += fmt.Sprintf(" (%.0f %%)", l.Share*100)
		}
		fmt.Fprintf(w, "| %s | %.2f ms | %.2f ms | %.2f ms | %.2f ms | %d |\n", name, l.Answer50, l.Answer99, l.Readable50, l.Readable99, l.Failed)
	}
	fmt.Fprintf(w, "\nA backlog of %d drains at %.0f events a second. Waiting, and disk in MiB:\n\n```\n", r.Backlog.Events, r.Backlog.Rate)
	for _, s := range r.Backlog.Samples {
		bar := strings.Repeat("█", int(40*s.Waiting/uint64(max(r.Backlog.Events, 1))))
		fmt.Fprintf(w, "%5.1f s %9d %6d %s\n", s.Second, s.Waiting, s.DiskMiB, bar)
	}
	fmt.Fprint(w, "```\n")
	if len(r.Backlog.PeakMiB) > 0 {
		fmt.Fprint(w, "\nMemory at most:")
		for i, name := range sortedKeys(r.Backlog.PeakMiB) {
			fmt.Fprintf(w, "%s %s %d MiB", []string{"", ","}[min(i, 1)], name, r.Backlog.PeakMiB[name])
		}
		fmt.Fprintln(w, ".")
	}
	fmt.Fprintf(w, "\n| messages held in FP_INGEST | edge, 64 clients | p99 |\n|---|---|---|\n")
	for _, h := range r.Held {
		fmt.Fprintf(w, "| %d | %.0f/s | %.2f ms |\n", h.Messages, h.Rate, h.P99)
	}
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// serveStage runs prefetcher or persister with settings NAME=VALUE.
func serveStage[C any](prog ops.Program[C]) func(context.Context, []string, io.Writer) error {
	return func(ctx context.Context, env []string, stdout io.Writer) error {
		settings := ops.NewSettings(func(name string) string {
			for _, e := range env {
				if v, ok := strings.CutPrefix(e, name+"="); ok {
					return v
				}
			}
			return ""
		})
		cfg := prog.Config(settings)
		if err := settings.Err(); err != nil {
			return err
		}
		proc := ops.NewProcess(prog.Name, io.Discard, slog.LevelInfo, "json")
		done := make(chan error, 1)
		go func() { done <- prog.Run(ctx, cfg, proc) }()
		if err := poll(ctx, proc.Health.Err); err != nil {
			return err
		}
		fmt.Fprintln(stdout, "ready")
		return <-done
	}
}

func serveVendor(ctx context.Context, _ []string, stdout io.Writer) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: fingerprintsim.New(fingerprintsim.Options{Key: "bench"}), ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { srv.Close() })
	fmt.Fprintln(stdout, "http://"+ln.Addr().String())
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
