// Package ops is what a process lends to a service: settings, logger, metric
// registry, health and the operators' port. Every service starts the same way:
//
//	func main() { os.Exit(ops.Main(prefetcher.Program())) }
//
// where a Program is a name, a function that reads the settings, and one that
// runs until its context is done.
package ops

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/otel/trace"
)

// Process is what a service gets from whoever runs it: a main function, the
// local stack, or a test.
type Process struct {
	Log      *slog.Logger
	Registry *prometheus.Registry
	Health   *Health
	// Tracer records spans; nil, the default, records none.
	Tracer trace.Tracer
}

// NewProcess returns a process named service that logs to w: JSON, or text
// when format says so.
func NewProcess(service string, w io.Writer, level slog.Level, format string) *Process {
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewJSONHandler(w, opts)
	if format == "text" {
		h = slog.NewTextHandler(w, opts)
	}
	return NewProcessLogger(service, slog.New(h))
}

// NewProcessLogger is NewProcess with a logger of the caller's.
func NewProcessLogger(service string, log *slog.Logger) *Process {
	reg := prometheus.NewRegistry()
	version, revision := Version()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name:        "fp_build_info",
		Help:        "Always 1; what is running, in the labels.",
		ConstLabels: prometheus.Labels{"service": service, "version": version, "revision": revision, "goversion": runtime.Version()},
	})
	info.Set(1)
	p := &Process{Log: log.With("service", service), Registry: reg, Health: newHealth(service)}
	reg.MustRegister(info, p.Health,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return p
}

// Version returns the module version and the commit this binary was built
// from, as far as the build recorded them.
func Version() (version, revision string) {
	version, revision = "devel", "unknown"
	b, ok := debug.ReadBuildInfo()
	if !ok {
		return version, revision
	}
	if v := b.Main.Version; v != "" && v != "(devel)" {
		version = v
	}
	for _, s := range b.Settings {
		if s.Key == "vcs.revision" {
			revision = s.Value
		}
	}
	return version, revision
}

// Health collects what each part of a service says about itself. It is safe
// for concurrent use and a Prometheus collector.
type Health struct {
	mu       sync.Mutex
	parts    map[string]error
	draining bool
	ready    *prometheus.Desc
	drain    *prometheus.Desc
	up       *prometheus.Desc
}

func newHealth(service string) *Health {
	l := prometheus.Labels{"service": service}
	return &Health{
		parts: map[string]error{},
		ready: prometheus.NewDesc("fp_ready", "1 when the service could do its work now.", nil, l),
		drain: prometheus.NewDesc("fp_draining", "1 from SIGTERM on.", nil, l),
		up:    prometheus.NewDesc("fp_dependency_up", "1 when the dependency answered last time.", []string{"dependency"}, l),
	}
}

// Expect names parts that must report before the service is ready.
func (h *Health) Expect(parts ...string) {
	for _, p := range parts {
		h.Set(p, errors.New("starting"))
	}
}

// Set records the state of a part: nil when it works.
func (h *Health) Set(part string, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.parts[part] = err
}

// Drain makes the service not ready from now on.
func (h *Health) Drain() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.draining = true
}

// Err returns nil when the service is ready, else why not, one part a line. A
// service that has not yet named its parts is not ready.
func (h *Health) Err() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	var errs []error
	if h.draining {
		errs = append(errs, errors.New("draining"))
	}
	if len(h.parts) == 0 {
		errs = append(errs, errors.New("starting"))
	}
	for _, p := range h.names() {
		if err := h.parts[p]; err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

func (h *Health) names() []string {
	names := make([]string, 0, len(h.parts))
	for p := range h.parts {
		names = append(names, p)
	}
	slices.Sort(names)
	return names
}

// Describe implements prometheus.Collector.
func (h *Health) Describe(ch chan<- *prometheus.Desc) { ch <- h.ready; ch <- h.drain; ch <- h.up }

// Collect implements prometheus.Collector.
func (h *Health) Collect(ch chan<- prometheus.Metric) {
	one := func(d *prometheus.Desc, ok bool, l ...string) {
		v := 0.0
		if ok {
			v = 1
		}
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, l...)
	}
	one(h.ready, h.Err() == nil)
	h.mu.Lock()
	defer h.mu.Unlock()
	one(h.drain, h.draining)
	for _, p := range h.names() {
		one(h.up, h.parts[p] == nil, p)
	}
}

// Handler serves the operators' port: /metrics, /livez (the process answers;
// depends on nothing else), /readyz and pprof.
func (p *Process) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(p.Registry, promhttp.HandlerOpts{EnableOpenMetrics: true, Registry: p.Registry}))
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := p.Health.Err(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, err)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}

// Serve runs the operators' port on ln until ctx is done.
func (p *Process) Serve(ctx context.Context, ln net.Listener) error {
	srv := &http.Server{
		Handler:           p.Handler(),
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(p.Log.Handler(), slog.LevelDebug),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve operators' port: %w", err)
	}
	return nil
}

// Listen binds addr; its error names the setting the address came from.
func Listen(setting, addr string) (net.Listener, error) {
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", setting, err)
	}
	return ln, nil
}

// Program is a command that runs one service.
type Program[C any] struct {
	Name, Summary string
	// OpsAddr is the default of OPS_ADDR.
	OpsAddr string
	// Config reads the service's own settings; faults are kept in s.
	Config func(s *Settings) C
	// Run blocks until ctx is done and everything in hand is finished.
	Run func(ctx context.Context, cfg C, p *Process) error
}

// CollectSeldom makes the garbage collector run four times less often than by
// default, unless GOGC says how often. These processes keep little and throw
// away much: at 13,000 events a second the edge collected its few megabytes
// often enough to take a tenth of its throughput. The memory this costs is
// bounded where GOMEMLIMIT is set, as in production.
func CollectSeldom() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(400)
	}
}

// Main runs a program with the process's arguments, environment and signals
// and returns its exit code: 0 after a requested stop, 1 after a failure, 2
// for bad usage or settings. A second signal ends the process at once.
func Main[C any](prog Program[C]) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // from here on a second signal kills
	CollectSeldom()
	return prog.main(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
}

func (prog Program[C]) main(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(args) > 0 {
		switch args[0] {
		case "--version", "-version":
			version, revision := Version()
			fmt.Fprintln(stdout, prog.Name, version, revision, runtime.Version())
			return 0
		case "--help", "-help", "-h", "help":
			fmt.Fprintf(stdout, "%s %s\n\nSettings (environment; NAME_FILE reads the value from a file):\n", prog.Name, prog.Summary)
			PrintSettings(stdout, prog.Settings())
			return 0
		}
		fmt.Fprintf(stderr, "%s: unknown argument %q; settings come from the environment, see --help\n", prog.Name, args[0])
		return 2
	}
	err := prog.Serve(ctx, getenv, stdout)
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, err)
	if errors.Is(err, ErrSettings) {
		return 2
	}
	return 1
}

// ErrSettings is wrapped by Serve's error when the settings are at fault.
var ErrSettings = errors.New("bad settings")

type settingsError struct{ error }

func (settingsError) Is(target error) bool { return target == ErrSettings }

// settings are those every program has, and its own.
type settings[C any] struct {
	cfg     C
	opsAddr string
	level   slog.Level
	format  string
	traces  string
}

func (prog Program[C]) read(s *Settings) settings[C] {
	r := settings[C]{
		cfg:     prog.Config(s),
		opsAddr: s.Addr("OPS_ADDR", prog.OpsAddr, "operators' port: /metrics, /livez, /readyz, pprof"),
	}
	// OneOf has let only words through that slog knows.
	_ = r.level.UnmarshalText([]byte(s.OneOf("LOG_LEVEL", "lowest level logged", "info", "debug", "warn", "error")))
	r.format = s.OneOf("LOG_FORMAT", "form of log lines on stdout", "json", "text")
	r.traces = readTracesURL(s)
	return r
}

// Settings lists every setting of the program.
func (prog Program[C]) Settings() []Setting {
	s := NewSettings(func(string) string { return "" })
	prog.read(s)
	return s.Asked()
}

// Serve reads the settings, opens the operators' port, and runs the service
// until ctx is done. Log lines go to w. Bad settings are an ErrSettings that
// names every fault, one a line.
func (prog Program[C]) Serve(ctx context.Context, getenv func(string) string, w io.Writer) error {
	s := NewSettings(getenv)
	r := prog.read(s)
	if err := s.Err(); err != nil {
		return settingsError{err}
	}
	p := NewProcess(prog.Name, w, r.level, r.format)
	if r.traces != "" {
		flush, err := p.traceTo(prog.Name, r.traces)
		if err != nil {
			return settingsError{err}
		}
		defer flush()
	}
	ln, err := Listen("OPS_ADDR", r.opsAddr)
	if err != nil {
		return err
	}
	version, revision := Version()
	p.Log.Info("starting", "version", version, "revision", revision, "ops_addr", ln.Addr().String())

	// The operators' port lives as long as the service, its last seconds
	// included.
	opsCtx, stopOps := context.WithCancel(context.WithoutCancel(ctx))
	runCtx, fail := context.WithCancelCause(ctx)
	served := make(chan error, 1)
	go func() {
		err := p.Serve(opsCtx, ln)
		fail(err)
		served <- err
	}()
	err = prog.Run(runCtx, r.cfg, p)
	stopOps()
	if err = errors.Join(err, <-served); err != nil {
		return fmt.Errorf("%s: %w", prog.Name, err)
	}
	p.Log.Info("stopped", "cause", context.Cause(ctx))
	return nil
}

// PrintSettings writes settings as a table.
func PrintSettings(w io.Writer, settings []Setting) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range settings {
		def := s.Default
		if def == "" {
			def = "-"
		}
		fmt.Fprintf(t, "  %s\t%s\t%s\n", s.Name, def, s.Doc)
	}
	t.Flush()
}
