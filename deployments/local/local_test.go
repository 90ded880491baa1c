package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// addrs gives a run of its own ports.
func addrs(t *testing.T) map[string]string {
	t.Helper()
	return map[string]string{"INGEST_ADDR": streamstest.FreeAddr(t), "OPS_ADDR": threeFree(t)}
}

// threeFree returns the first of three neighbouring free addresses.
func threeFree(t *testing.T) string {
	t.Helper()
	for range 100 {
		addr := streamstest.FreeAddr(t)
		_, port, _ := net.SplitHostPort(addr)
		var n int
		fmt.Sscan(port, &n)
		free := true
		for i := 1; i <= 2; i++ {
			ln, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", n+i))
			if err != nil {
				free = false
				break
			}
			ln.Close()
		}
		if free {
			return addr
		}
	}
	t.Fatal("no three free ports")
	return ""
}

func runOnce(t *testing.T, env map[string]string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), append(args, "--once"), func(name string) string { return env[name] }, &out, &errs)
	return code, out.String(), errs.String()
}

// The README's first command: the product page's own example, from the request
// to the record.
func TestOnceShowsTheJob(t *testing.T) {
	code, stdout, stderr := runOnce(t, addrs(t))
	if code != 0 {
		t.Fatalf("exit %d\n%s\n%s", code, stdout, stderr)
	}
	for _, want := range []string{
		"curl -i http://127.0.0.1:", "X-API-Key: fpk_live_",
		`-d '{"request_id":"1A2B3C4D5E","subscriber_id":12,"session_id":"DEV-SESSION-XYZ","user_id":"user@example.com"}'`,
		"202 Accepted",
		`{"status":"accepted","mode":"prefetch_pipeline","redis_keys":["fp:prefetch:1A2B3C4D5E"],"user_id":"user@example.com","session_id":"DEV-SESSION-XYZ"}` + "\n",
		" ms later the scorer finds at fp:prefetch:1A2B3C4D5E",
		`"status":"ready"`,
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("output lacks %s", want)
		}
	}
	if stderr != "" {
		t.Errorf("stderr: %s", stderr)
	}
	t.Log(stdout)
}

// Variables that point at real servers change nothing without --real.
func TestEnvironmentOfRealServersIsIgnored(t *testing.T) {
	env := addrs(t)
	for _, name := range []string{"NATS_URL", "REDIS_URL", "FINGERPRINT_BASE_URL"} {
		env[name] = "nonsense://192.0.2.1:1"
	}
	env["NATS_CREDS_FILE"], env["FINGERPRINT_API_KEY_FILE"], env["INGEST_API_KEYS_FILE"] = "/nowhere", "/nowhere", "/nowhere"
	if code, stdout, stderr := runOnce(t, env); code != 0 {
		t.Errorf("exit %d\n%s\n%s", code, stdout, stderr)
	}
}

// With --real the servers named are used and the others still embedded.
func TestRealServersAreUsed(t *testing.T) {
	env := addrs(t)
	nats, redis := streamstest.NewEmptyNATS(t), streamstest.NewRedis(t)
	env["NATS_URL"], env["REDIS_URL"] = nats.URL, redis.URL()
	code, stdout, stderr := runOnce(t, env, "--real")
	if code != 0 || !strings.Contains(stdout, nats.URL) || !strings.Contains(stdout, redis.URL()) {
		t.Fatalf("exit %d\n%s\n%s", code, stdout, stderr)
	}
	s, err := nats.Connect("test").JS.Stream(t.Context(), "FP_INGEST")
	if err != nil || s.CachedInfo().State.Msgs != 1 {
		t.Fatalf("the event is not in the server named: %v", err)
	}
	// What size its streams have is for its owner to say.
	cfg := s.CachedInfo().Config
	cfg.MaxBytes = 2 << 30
	if _, err := nats.Connect("test").JS.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := runOnce(t, env, "--real"); code != 0 {
		t.Errorf("exit %d\n%s\n%s", code, stdout, stderr)
	}
	if info, err := s.Info(t.Context()); err != nil || info.Config.MaxBytes != cfg.MaxBytes {
		t.Errorf("the size was changed: %v", err)
	}
}

func TestPortInUseNamesTheSetting(t *testing.T) {
	for _, name := range []string{"INGEST_ADDR", "OPS_ADDR"} {
		env := addrs(t)
		ln, err := net.Listen("tcp", env[name])
		if err != nil {
			t.Fatal(err)
		}
		code, _, stderr := runOnce(t, env)
		ln.Close()
		if code == 0 || !regexp.MustCompile(name+`.*address already in use`).MatchString(stderr) || strings.Count(stderr, "\n") != 1 {
			t.Errorf("%s: exit %d, stderr %q", name, code, stderr)
		}
	}
}

func TestBadUsage(t *testing.T) {
	for _, args := range [][]string{{"--nonsense"}, {"stray"}} {
		if code, _, stderr := runOnce(t, addrs(t), args...); code != 2 || stderr == "" {
			t.Errorf("%v: exit %d, stderr %q", args, code, stderr)
		}
	}
	env := addrs(t)
	env["RECORD_TTL"], env["PREFETCH_MAX_AGE"] = "soon", "later"
	if code, _, stderr := runOnce(t, env); code != 2 || !strings.Contains(stderr, "RECORD_TTL") && !strings.Contains(stderr, "PREFETCH_MAX_AGE") {
		t.Errorf("exit %d, stderr %q", code, stderr)
	}
}

// With --data the streams survive, and the records are rebuilt from them
// although Redis starts empty.
func TestDataSurvivesARestart(t *testing.T) {
	env, dir := addrs(t), t.TempDir()
	if code, stdout, stderr := runOnce(t, env, "--data", dir); code != 0 {
		t.Fatalf("exit %d\n%s\n%s", code, stdout, stderr)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s, err := start(ctx, options{data: dir}, func(name string) string { return env[name] }, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	}()
	rdb := redisClient(t, s.redisURL)
	streamstest.Eventually(t, "the record of the last run", func() bool {
		v, err := rdb.Get(t.Context(), "fp:prefetch:1A2B3C4D5E").Result()
		return err == nil && strings.Contains(v, `"status":"ready"`)
	})
}

// Ctrl-C ends a serving stack cleanly.
func TestInterruptStopsCleanly(t *testing.T) {
	env := addrs(t)
	ctx, cancel := context.WithCancel(t.Context())
	serving := &watched{for_: "Serving until Ctrl-C", seen: make(chan struct{})}
	exit := make(chan int, 1)
	go func() { exit <- run(ctx, nil, func(name string) string { return env[name] }, serving, t.Output()) }()
	select {
	case <-serving.seen:
	case code := <-exit:
		t.Fatalf("exit %d", code)
	}
	cancel()
	begin := time.Now()
	if code := <-exit; code != 0 {
		t.Errorf("exit %d", code)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("stopping took %v", took)
	}
}

// watched closes seen once a text was written to it.
type watched struct {
	for_ string
	all  bytes.Buffer
	seen chan struct{}
}

func (w *watched) Write(p []byte) (int, error) {
	before := strings.Contains(w.all.String(), w.for_)
	w.all.Write(p)
	if !before && strings.Contains(w.all.String(), w.for_) {
		close(w.seen)
	}
	return len(p), nil
}
