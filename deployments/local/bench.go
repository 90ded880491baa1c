package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/labstack/echo/v4"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/services/persister"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// benchResult is one row of the edge's benchmark.
type benchResult struct {
	What    string  `json:"what"`
	Clients int     `json:"clients"`
	Rate    float64 `json:"per_second"`
	// OfEcho is Rate as a part of the bare echo handler's in the same run.
	OfEcho float64 `json:"of_bare_echo,omitzero"`
	P50    float64 `json:"p50_ms"`
	P99    float64 `json:"p99_ms"`
	Failed int64   `json:"failed,omitempty"`
}

// benchEdge measures, in one run and on one machine, a bare echo handler that
// only validates, bare publishes, and the edge with everything on. Only the
// ratios mean something elsewhere: load, server and stream share the cores.
func benchEdge(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 1 && args[0] == benchServeArg {
		return benchServe(ctx, args[1:], os.Stdin, stdout, stderr)
	}
	if len(args) > 0 && args[0] == "pipeline" {
		return benchPipeline(ctx, args[1:], stdout, stderr)
	}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	fs.SetOutput(stderr)
	duration := fs.Duration("duration", 4*time.Second, "length of each measurement")
	rounds := fs.Int("rounds", 3, "rounds; the medians are printed")
	asJSON := fs.Bool("json", false, "print a JSON list")
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return 0
		}
		return 2
	}
	b, err := newEdgeBench(ctx)
	if err == nil {
		err = b.run(ctx, *duration, *rounds, stdout, *asJSON)
		b.stop()
	}
	if err != nil {
		fmt.Fprintln(stderr, "local bench:", err)
		return 1
	}
	return 0
}

// edgeBench is what the measurements run against.
type edgeBench struct {
	bare, edge string // addresses
	apiKey     string
	js         jetstream.JetStream
	natsURL    string
	dir        string
	procs      map[string]int // process ids, by what they serve
	undo       []func()
}

func (b *edgeBench) stop() {
	for _, f := range slices.Backward(b.undo) {
		f()
	}
}

func newEdgeBench(ctx context.Context) (b *edgeBench, err error) {
	b = &edgeBench{procs: map[string]int{}}
	defer func() {
		if err != nil {
			b.stop()
		}
	}()
	dir, err := os.MkdirTemp("", "fingerprint-prefetch-bench-")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	b.undo = append(b.undo, func() { os.RemoveAll(dir) })
	url, err := b.start("nats", dir)
	if err != nil {
		return nil, err
	}
	b.natsURL, b.dir = url, dir
	conn, err := streams.Connect(streams.ConnectConfig{Name: "bench", URL: url}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		return nil, err
	}
	b.undo, b.js = append(b.undo, conn.Close), conn.JS
	if err := poll(ctx, conn.Err); err != nil {
		return nil, err
	}
	if _, err := streams.Ensure(ctx, conn.JS, streams.Limits{MaxBytes: map[string]int64{streams.StreamIngest: 16 << 30}}, false); err != nil {
		return nil, err
	}

	key, entry, err := ingest.NewKey("bench", ingest.AllSubscribers(), rand.Reader)
	if err != nil {
		return nil, err
	}
	b.apiKey = key
	keys, err := json.Marshal([]ingest.KeyEntry{entry})
	if err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "keys.json")
	if err := os.WriteFile(file, keys, 0o600); err != nil {
		return nil, err
	}
	if b.edge, err = b.start("edge", url, file); err != nil {
		return nil, err
	}
	if b.bare, err = b.start("echo", key); err != nil {
		return nil, err
	}
	return b, nil
}

// start runs a server as a process of its own, as it would be anywhere else:
// in one process, the garbage collector would stop each for all the others'
// memory. It returns the server's address.
func (b *edgeBench) start(args ...string) (addr string, err error) {
	exe, err := os.Executable()
	if err != nil {
		return "", err
	}
	cmd := exec.Command(exe, append([]string{"bench", benchServeArg}, args...)...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start %s: %w", args[0], err)
	}
	b.procs[args[0]] = cmd.Process.Pid
	b.undo = append(b.undo, func() {
		in.Close()
		_ = cmd.Wait() // it has said why on stderr
	})
	if addr, err = bufio.NewReader(out).ReadString('\n'); err != nil {
		return "", fmt.Errorf("%s does not start: %w", args[0], err)
	}
	return strings.TrimSpace(addr), nil
}

const benchServeArg = "serve"

// benchServe is one of the benchmark's servers: it prints its address and
// serves until stdin ends, which it does with the benchmark.
func benchServe(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, stdin)
		cancel()
	}()
	servers := map[string]func(context.Context, []string, io.Writer) error{
		"nats": serveNATS, "edge": serveEdge, "echo": serveEcho,
		"vendor": serveVendor, "prefetcher": serveStage(prefetcher.Program()), "persister": serveStage(persister.Program()),
	}
	if args[0] == "edge" || args[0] == "prefetcher" || args[0] == "persister" {
		ops.CollectSeldom() // as their main functions do
	}
	serve, ok := servers[args[0]]
	if !ok {
		fmt.Fprintf(stderr, "local bench: no server %q\n", args[0])
		return 2
	}
	if err := serve(ctx, args[1:], stdout); err != nil {
		fmt.Fprintf(stderr, "local bench: %s: %v\n", args[0], err)
		return 1
	}
	return 0
}

func serveNATS(ctx context.Context, args []string, stdout io.Writer) error {
	srv, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, JetStream: true, StoreDir: args[0], NoSigs: true, NoLog: true})
	if err != nil {
		return err
	}
	srv.Start()
	defer srv.WaitForShutdown()
	defer srv.Shutdown()
	if !srv.ReadyForConnections(10 * time.Second) {
		return errors.New("does not start")
	}
	fmt.Fprintln(stdout, srv.ClientURL())
	<-ctx.Done()
	return nil
}

func serveEdge(ctx context.Context, args []string, stdout io.Writer) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	settings := ops.NewSettings(func(name string) string {
		return map[string]string{"NATS_URL": args[0], "INGEST_API_KEYS_FILE": args[1], "SHUTDOWN_GRACE": "0s"}[name]
	})
	cfg := ingest.ReadConfig(settings)
	if err := settings.Err(); err != nil {
		return err
	}
	cfg.Listener = ln
	proc := ops.NewProcess("ingest", io.Discard, slog.LevelInfo, "json")
	done := make(chan error, 1)
	go func() { done <- ingest.Run(ctx, cfg, proc) }()
	if err := poll(ctx, proc.Health.Err); err != nil {
		return err
	}
	fmt.Fprintln(stdout, ln.Addr())
	return <-done
}

func serveEcho(ctx context.Context, args []string, stdout io.Writer) error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	srv := &http.Server{Handler: bareEcho(args[0]), ReadHeaderTimeout: 5 * time.Second}
	context.AfterFunc(ctx, func() { srv.Close() })
	fmt.Fprintln(stdout, ln.Addr())
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// bareEcho is the yardstick, and is not to be improved: the shortest handler
// that checks the key and the four fields as echo offers it, and stores
// nothing.
func bareEcho(key string) http.Handler {
	e := echo.New()
	e.POST("/fingerprint/ingest", func(c echo.Context) error {
		if c.Request().Header.Get("X-API-Key") != key {
			return c.JSON(http.StatusUnauthorized, map[string]string{"error": "Invalid API key"})
		}
		var in struct {
			RequestID    string `json:"request_id"`
			SubscriberID int64  `json:"subscriber_id"`
			SessionID    string `json:"session_id"`
			UserID       string `json:"user_id"`
		}
		if err := c.Bind(&in); err != nil || in.RequestID == "" || in.SubscriberID == 0 || in.SessionID == "" || in.UserID == "" {
			return c.JSON(http.StatusBadRequest, map[string]string{"error": "Invalid body"})
		}
		return c.JSON(http.StatusAccepted, map[string]any{
			"status": "accepted", "mode": "prefetch_pipeline", "redis_keys": []string{"fp:prefetch:" + in.RequestID},
			"user_id": in.UserID, "session_id": in.SessionID,
		})
	})
	return e
}

func (b *edgeBench) run(ctx context.Context, d time.Duration, rounds int, w io.Writer, asJSON bool) error {
	var serial atomic.Int64
	post := func(addr string) newClientFunc {
		return func(ctx context.Context) (func() error, func(), error) {
			return httpClient(ctx, addr, b.apiKey, &serial)
		}
	}
	publish := func(context.Context) (func() error, func(), error) {
		return func() error {
			n := strconv.FormatInt(serial.Add(1), 10)
			msg := &nats.Msg{Subject: streams.IngestSubject(12), Data: bytes.Repeat([]byte{'x'}, 300), Header: nats.Header{jetstream.MsgIDHeader: {n}}}
			_, err := b.js.PublishMsg(ctx, msg)
			return err
		}, func() {}, nil
	}
	var all []benchResult
	for _, clients := range []int{64, 256} {
		rows := []struct {
			what string
			new  newClientFunc
		}{{"bare echo handler", post(b.bare)}, {"bare publish", publish}, {"edge", post(b.edge)}}
		results := make([][]benchResult, len(rows))
		for range rounds { // side by side, so that a noisy minute hits all
			for i, row := range rows {
				r, err := closedLoop(ctx, clients, d, row.new)
				if err != nil {
					return fmt.Errorf("%s: %w", row.what, err)
				}
				r.What, r.Clients = row.what, clients
				results[i] = append(results[i], r)
			}
		}
		var echoRate float64
		for i := range rows {
			slices.SortFunc(results[i], func(a, b benchResult) int { return int(a.Rate - b.Rate) })
			r := results[i][len(results[i])/2]
			if i == 0 {
				echoRate = r.Rate
			}
			r.OfEcho = r.Rate / echoRate
			all = append(all, r)
		}
	}
	half := all[len(all)-1].Rate / 2
	for _, row := range []struct {
		what string
		new  newClientFunc
	}{{"edge, open loop at half of that", post(b.edge)}, {"bare publish, open loop, same", publish}} {
		r, err := openLoop(ctx, half, d, row.new)
		if err != nil {
			return err
		}
		r.What, r.Clients = row.what, openLoopClients
		all = append(all, r)
	}
	if asJSON {
		return json.NewEncoder(w).Encode(all)
	}
	fmt.Fprintf(w, "%-32s %8s %10s %9s %9s %9s %7s\n", "", "clients", "per second", "of echo", "p50 ms", "p99 ms", "failed")
	for _, r := range all {
		fmt.Fprintf(w, "%-32s %8d %10.0f %9.2f %9.2f %9.2f %7d\n", r.What, r.Clients, r.Rate, r.OfEcho, r.P50, r.P99, r.Failed)
	}
	return nil
}

// httpClient returns a call that posts a new event over one kept connection.
// It is hand-made because a full client costs more than the server measured.
func httpClient(ctx context.Context, addr, key string, serial *atomic.Int64) (call func() error, stop func(), err error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, nil, err
	}
	in := bufio.NewReader(conn)
	var out, body []byte
	call = func() error {
		body = append(body[:0], `{"request_id":"1708102555327.`...)
		body = strconv.AppendInt(body, serial.Add(1), 36)
		body = append(body, `","subscriber_id":12,"session_id":"DEV-SESSION-XYZ","user_id":"user@example.com"}`...)
		out = append(out[:0], "POST /fingerprint/ingest HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nX-API-Key: "...)
		out = append(append(out, key...), "\r\nContent-Length: "...)
		out = append(strconv.AppendInt(out, int64(len(body)), 10), "\r\n\r\n"...)
		if _, err := conn.Write(append(out, body...)); err != nil {
			return err
		}
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		accepted := bytes.HasPrefix(line, []byte("HTTP/1.1 202"))
		length := 0
		for {
			if line, err = in.ReadSlice('\n'); err != nil {
				return err
			}
			if len(line) <= 2 {
				break
			}
			if v, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
				if length, err = strconv.Atoi(string(bytes.TrimSpace(v))); err != nil {
					return err
				}
			}
		}
		if _, err := in.Discard(length); err != nil {
			return err
		}
		if !accepted {
			return errRefused
		}
		return nil
	}
	return call, func() { conn.Close() }, nil
}

var errRefused = errors.New("not accepted")

// newClientFunc makes a client of its own: one call, and what ends it.
type newClientFunc func(context.Context) (call func() error, stop func(), err error)

// closedLoop lets clients call one after the other for d.
func closedLoop(ctx context.Context, clients int, d time.Duration, newClient newClientFunc) (benchResult, error) {
	begin := time.Now()
	return loop(ctx, clients, newClient, func() (time.Time, bool) {
		now := time.Now()
		return now, now.Sub(begin) < d
	})
}

// openLoopClients is more than can be waiting at half of the maximum.
const openLoopClients = 256

// openLoop calls at a fixed rate whether or not answers have come, and counts
// from when a call was due: a stall hits everything due in it.
func openLoop(ctx context.Context, rate float64, d time.Duration, newClient newClientFunc) (benchResult, error) {
	begin := time.Now().Add(50 * time.Millisecond)
	var n atomic.Int64
	return loop(ctx, openLoopClients, newClient, func() (time.Time, bool) {
		due := begin.Add(time.Duration(float64(n.Add(1)) / rate * float64(time.Second)))
		return due, due.Sub(begin) <= d
	})
}

// loop lets clients call whenever the next call is due, until none is. A call
// takes from when it was due.
func loop(ctx context.Context, clients int, newClient newClientFunc, next func() (due time.Time, more bool)) (benchResult, error) {
	times := make([][]time.Duration, clients)
	errs := make([]error, clients)
	var failed atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for c := range clients {
		wg.Go(func() {
			call, stop, err := newClient(ctx)
			if err != nil {
				errs[c] = err
				return
			}
			defer stop()
			for ctx.Err() == nil {
				due, more := next()
				if !more {
					return
				}
				time.Sleep(time.Until(due))
				switch err := call(); {
				case errors.Is(err, errRefused):
					failed.Add(1)
				case err != nil:
					errs[c] = err
					return
				}
				times[c] = append(times[c], time.Since(due))
			}
		})
	}
	wg.Wait()
	took := time.Since(begin)
	all := slices.Concat(times...)
	r := summarise(all)
	r.Rate, r.Failed = float64(len(all))/took.Seconds(), failed.Load()
	return r, errors.Join(append(errs, ctx.Err())...)
}

func summarise(times []time.Duration) (r benchResult) {
	if len(times) == 0 {
		return r
	}
	slices.Sort(times)
	ms := func(q float64) float64 {
		return float64(times[int(q*float64(len(times)-1))].Microseconds()) / 1000
	}
	r.P50, r.P99 = ms(0.5), ms(0.99)
	return r
}
