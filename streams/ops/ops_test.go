package ops

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
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

	"github.com/prometheus/client_golang/prometheus/testutil"
)

type config struct {
	Word  string
	Key   Secret
	Grace time.Duration
}

func program(run func(context.Context, config, *Process) error) Program[config] {
	return Program[config]{
		Name: "tester", Summary: "is a program for tests.", OpsAddr: "127.0.0.1:0",
		Config: func(s *Settings) config {
			return config{s.OneOf("TEST_WORD", "a word", "one", "two"), s.Secret("TEST_KEY", "a key"), s.Duration("TEST_GRACE", time.Second, 0, time.Minute, "a time")}
		},
		Run: run,
	}
}

// start runs prog.main to its end.
func start(t *testing.T, prog Program[config], env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = prog.main(t.Context(), args, func(name string) string { return env[name] }, &out, &errs)
	return code, out.String(), errs.String()
}

func TestProgramExitCodes(t *testing.T) {
	t.Parallel()
	var got config
	fine := program(func(_ context.Context, c config, _ *Process) error { got = c; return nil })
	failing := program(func(context.Context, config, *Process) error { return errors.New("the reason") })

	code, stdout, stderr := start(t, fine, map[string]string{"TEST_WORD": "two", "TEST_KEY": "hunter2"})
	if code != 0 || stderr != "" || got != (config{"two", "hunter2", time.Second}) {
		t.Errorf("%d, %q, %+v", code, stderr, got)
	}
	for _, want := range []string{`"msg":"starting"`, `"msg":"stopped"`, `"service":"tester"`} {
		if !strings.Contains(stdout, want) {
			t.Errorf("no %s in %s", want, stdout)
		}
	}

	code, stdout, stderr = start(t, failing, map[string]string{"LOG_FORMAT": "text", "LOG_LEVEL": "error"})
	if code != 1 || stderr != "tester: the reason\n" || stdout != "" {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}

	got = config{}
	code, stdout, stderr = start(t, fine, map[string]string{"TEST_WORD": "three", "TEST_GRACE": "1", "LOG_LEVEL": "loud", "OPS_ADDR": "9101"})
	if lines := strings.Split(strings.TrimSpace(stderr), "\n"); code != 2 || stdout != "" || len(lines) != 4 || got != (config{}) {
		t.Errorf("%d, %q, %q, %+v", code, stdout, stderr, got)
	}
	for _, name := range []string{"TEST_WORD: ", "TEST_GRACE: ", "LOG_LEVEL: ", "OPS_ADDR: "} {
		if !strings.Contains(stderr, name) {
			t.Errorf("%q does not name %s", stderr, name)
		}
	}

	for _, arg := range []string{"--verbose", "serve", ""} {
		code, stdout, stderr = start(t, fine, nil, arg)
		if code != 2 || stdout != "" || !strings.Contains(stderr, fmt.Sprintf("%q", arg)) || !strings.Contains(stderr, "--help") {
			t.Errorf("argument %q: %d, %q, %q", arg, code, stdout, stderr)
		}
	}
}

// Help and version work also where the settings are wrong.
func TestProgramHelpAndVersion(t *testing.T) {
	t.Parallel()
	prog := program(func(context.Context, config, *Process) error { t.Error("ran"); return nil })
	broken := map[string]string{"TEST_WORD": "three", "TEST_KEY": "hunter2"}
	code, stdout, stderr := start(t, prog, broken, "--version")
	if code != 0 || stderr != "" || !strings.HasPrefix(stdout, "tester ") || !strings.Contains(stdout, runtime.Version()) || strings.Count(stdout, "\n") != 1 {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
	code, stdout, stderr = start(t, prog, broken, "--help")
	if code != 0 || stderr != "" || !strings.HasPrefix(stdout, "tester is a program for tests.\n") {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
	for name, def := range map[string]string{
		"TEST_WORD": "one", "TEST_KEY": "-", "TEST_GRACE": "1s", "OPS_ADDR": "127.0.0.1:0", "LOG_LEVEL": "info", "LOG_FORMAT": "json",
	} {
		found := false
		for line := range strings.Lines(stdout) {
			f := strings.Fields(line)
			found = found || len(f) > 2 && f[0] == name && f[1] == def
		}
		if !found {
			t.Errorf("no line for %s with the default %s:\n%s", name, def, stdout)
		}
	}
	if strings.Contains(stdout, "hunter2") {
		t.Error("help shows a value")
	}
}

func TestProgramNamesTheSettingOfAPortInUse(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	prog := program(func(context.Context, config, *Process) error { t.Error("ran"); return nil })
	code, stdout, stderr := start(t, prog, map[string]string{"OPS_ADDR": ln.Addr().String()})
	if code != 1 || stdout != "" || !strings.HasPrefix(stderr, "OPS_ADDR: ") || !strings.Contains(stderr, ln.Addr().String()) {
		t.Errorf("%d, %q, %q", code, stdout, stderr)
	}
}

// buffer is a bytes.Buffer for several goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// The operators' port answers until Run has returned: also in the last
// seconds, in which the rest is finished.
func TestProgramServesUntilRunReturns(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	var log buffer
	url := func() string {
		_, addr, _ := strings.Cut(log.String(), "ops_addr=")
		addr, _, _ = strings.Cut(addr, "\n")
		return "http://" + addr
	}
	status := func(path string) (int, error) {
		resp, err := http.Get(url() + path)
		if err != nil {
			return 0, err
		}
		resp.Body.Close()
		return resp.StatusCode, nil
	}
	prog := program(func(ctx context.Context, _ config, p *Process) error {
		p.Health.Set("part", nil)
		if code, err := status("/readyz"); code != http.StatusOK {
			return fmt.Errorf("readyz %d, %w", code, err)
		}
		cancel()
		<-ctx.Done()
		p.Health.Drain()
		if code, err := status("/readyz"); code != http.StatusServiceUnavailable {
			return fmt.Errorf("readyz %d while draining, %w", code, err)
		}
		return nil
	})
	if err := prog.Serve(ctx, func(name string) string { return map[string]string{"LOG_FORMAT": "text"}[name] }, &log); err != nil {
		t.Error(err)
	}
	if code, err := status("/livez"); err == nil {
		t.Errorf("livez %d after Run", code)
	}
	if !strings.Contains(log.String(), "msg=stopped") {
		t.Errorf("no word of the stop:\n%s", log.String())
	}
}

// A port that is lost is an error, for Serve and so for the program.
func TestServeReportsALostPort(t *testing.T) {
	t.Parallel()
	ln, err := Listen("OPS_ADDR", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := NewProcessLogger("tester", slog.New(slog.DiscardHandler)).Serve(t.Context(), ln); err == nil || !strings.Contains(err.Error(), "operators' port") {
		t.Error(err)
	}
}

const asProgram = "OPS_TEST_AS_PROGRAM"

// TestMain lets the test binary be started as a program of its own.
func TestMain(m *testing.M) {
	how := os.Getenv(asProgram)
	if how == "" {
		os.Exit(m.Run())
	}
	os.Args = os.Args[:1]
	os.Exit(Main(program(func(ctx context.Context, _ config, p *Process) error {
		fmt.Println("running")
		<-ctx.Done()
		fmt.Println("stopping")
		if how == "hangs" {
			select {}
		}
		return nil
	})))
}

// SIGTERM asks for a stop, which is a success; a second one ends at once a
// process that does not come to its end.
func TestMainAnswersSignals(t *testing.T) {
	t.Parallel()
	for how, want := range map[string]string{"stops": "exit status 0", "hangs": "signal: terminated"} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), asProgram+"="+how, "OPS_ADDR=127.0.0.1:0", "LOG_LEVEL=error")
		stdout, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() }) // ended already, if all went well
		expect := func(line string) {
			t.Helper()
			got := make([]byte, len(line)+1)
			if _, err := io.ReadFull(stdout, got); err != nil || string(got) != line+"\n" {
				t.Fatalf("%s: read %q, %v", how, got, err)
			}
		}
		expect("running")
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		expect("stopping")
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		again, late := time.NewTicker(20*time.Millisecond), time.After(time.Minute)
		for waiting := true; waiting; {
			select {
			case <-ended: // judged by its state
				waiting = false
			case <-again.C: // one may come before the first is fully taken in
				if how == "hangs" {
					_ = cmd.Process.Signal(syscall.SIGTERM) // may have ended by now
				}
			case <-late:
				t.Fatalf("%s: does not end", how)
			}
		}
		again.Stop()
		if got := cmd.ProcessState.String(); got != want {
			t.Errorf("%s: %s, want %s", how, got, want)
		}
	}
}

func get(t *testing.T, h http.Handler, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	return w.Code, w.Body.String()
}

func TestHandler(t *testing.T) {
	t.Parallel()
	p := NewProcessLogger("tester", slog.New(slog.DiscardHandler))
	h := p.Handler()
	expect := func(path string, code int, body string) {
		t.Helper()
		if c, b := get(t, h, path); c != code || !strings.Contains(b, body) {
			t.Errorf("%s: %d %q, want %d %q", path, c, b, code, body)
		}
	}
	metrics := func(lines ...string) {
		t.Helper()
		_, b := get(t, h, "/metrics")
		for _, l := range lines {
			if !strings.Contains(b, l+"\n") {
				t.Errorf("no %s in /metrics", l)
			}
		}
	}
	// Its parts are not named yet.
	expect("/readyz", 503, "starting\n")
	metrics(`fp_ready{service="tester"} 0`)

	p.Health.Expect("redis", "nats")
	expect("/readyz", 503, "nats: starting\nredis: starting\n")
	expect("/livez", 200, "ok\n") // depends on nothing else
	metrics(`fp_ready{service="tester"} 0`, `fp_draining{service="tester"} 0`, `fp_dependency_up{dependency="redis",service="tester"} 0`)

	p.Health.Set("nats", nil)
	expect("/readyz", 503, "redis: starting\n")
	p.Health.Set("redis", nil)
	expect("/readyz", 200, "ok\n")
	metrics(`fp_ready{service="tester"} 1`, `fp_dependency_up{dependency="nats",service="tester"} 1`)

	p.Health.Set("redis", errors.New("connection refused"))
	expect("/readyz", 503, "redis: connection refused\n")
	p.Health.Set("redis", nil)

	p.Health.Drain()
	expect("/readyz", 503, "draining\n")
	expect("/livez", 200, "ok\n")
	metrics(`fp_draining{service="tester"} 1`, `fp_ready{service="tester"} 0`)

	expect("/metrics", 200, `fp_build_info{goversion="`+runtime.Version()+`"`)
	expect("/metrics", 200, "go_goroutines ")
	expect("/metrics", 200, "process_open_fds ")
	expect("/debug/pprof/", 200, "goroutine")
	expect("/debug/pprof/cmdline", 200, os.Args[0])
	expect("/", 404, "")
	expect("/metrics/more", 404, "")
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/readyz", nil))
	if w.Code != http.StatusMethodNotAllowed {
		t.Errorf("POST: %d", w.Code)
	}
}

func TestProcessMetricsAreLintFree(t *testing.T) {
	t.Parallel()
	p := NewProcess("tester", io.Discard, slog.LevelInfo, "json")
	p.Health.Expect("redis")
	p.Handler()
	p.Handler() // two of them share the registry
	problems, err := testutil.GatherAndLint(p.Registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range problems {
		t.Errorf("%s: %s", problem.Metric, problem.Text)
	}
}

func TestNewProcessFormats(t *testing.T) {
	t.Parallel()
	for format, want := range map[string]string{"json": `"msg":"hello","service":"tester"}`, "text": "msg=hello service=tester"} {
		var b bytes.Buffer
		p := NewProcess("tester", &b, slog.LevelWarn, format)
		p.Log.Info("quiet")
		p.Log.Warn("hello")
		if got := b.String(); !strings.Contains(got, want) || strings.Contains(got, "quiet") {
			t.Errorf("%s: %s", format, got)
		}
	}
}
