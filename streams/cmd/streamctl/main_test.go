package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

func streamctl(t *testing.T, url string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, func(name string) string { return map[string]string{"NATS_URL": url}[name] }, nil, &out, &errs)
	return code, out.String(), errs.String()
}

func TestApplyThenDiff(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	if code, out, _ := streamctl(t, n.URL, "diff"); code != exitLeft || strings.Count(out, "\n+ ")+1 != 10 {
		t.Errorf("diff of an empty server: exit %d\n%s", code, out)
	}
	if code, out, errs := streamctl(t, n.URL, "apply"); code != exitDone || !strings.Contains(out, "+ FP_INGEST/prefetcher\n") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	if code, out, _ := streamctl(t, n.URL, "apply"); code != exitDone || out != "nothing to change\n" {
		t.Errorf("second apply: exit %d\n%s", code, out)
	}
	if code, out, _ := streamctl(t, n.URL, "diff"); code != exitDone || out != "no differences\n" {
		t.Errorf("diff: exit %d\n%s", code, out)
	}
	// Somebody changes a durable by hand.
	js := n.Connect("drift").JS
	d := streams.Definition(streams.Limits{})[0]
	d.Durables[0].MaxAckPending = 7
	if _, err := js.UpdateConsumer(t.Context(), d.Stream.Name, d.Durables[0]); err != nil {
		t.Fatal(err)
	}
	const drift = "~ FP_INGEST/prefetcher  max_ack_pending: 7 -> 20000\n"
	for range 2 { // diff changes nothing
		if code, out, _ := streamctl(t, n.URL, "diff"); code != exitLeft || out != drift {
			t.Errorf("exit %d\n%s", code, out)
		}
	}
	code, out, _ := streamctl(t, n.URL, "diff", "--json", "--max-bytes", "FP_DEAD=2GiB", "--max-bytes=FP_INGEST=1073741824")
	var changes []streams.Change
	if err := json.Unmarshal([]byte(out), &changes); err != nil {
		t.Fatal(err)
	}
	want := []streams.Change{
		{Object: "FP_INGEST/prefetcher", Field: "max_ack_pending", Have: "7", Want: "20000"},
		{Object: "FP_DEAD", Field: "max_bytes", Have: "1073741824", Want: "2147483648"},
	}
	if d := cmp.Diff(want, changes); code != exitLeft || d != "" {
		t.Errorf("exit %d, -want +got\n%s", code, d)
	}
	if code, out, _ := streamctl(t, n.URL, "apply"); code != exitDone || out != drift {
		t.Errorf("apply: exit %d\n%s", code, out)
	}
	if code, out, _ := streamctl(t, n.URL, "apply", "--json"); code != exitDone || out != "[]\n" {
		t.Errorf("apply: exit %d\n%s", code, out)
	}
}

// What a deployment was given once need not be said again.
func TestApplyKeepsWhatIsNotGiven(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	js := n.Connect("test").JS
	if code, _, errs := streamctl(t, n.URL, "apply", "--max-bytes", "FP_ENRICHED=13GiB"); code != exitDone {
		t.Fatalf("exit %d, %s", code, errs)
	}
	for verb, want := range map[string]string{"diff": "no differences\n", "apply": "nothing to change\n"} {
		if code, out, errs := streamctl(t, n.URL, verb); code != exitDone || out != want {
			t.Errorf("%s: exit %d\n%s%s", verb, code, out, errs)
		}
	}
	if code, out, errs := streamctl(t, n.URL, "apply", "--max-bytes", "FP_INGEST=2GiB"); code != exitDone || out != "~ FP_INGEST  max_bytes: 1073741824 -> 2147483648\n" {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	if err := js.DeleteStream(t.Context(), streams.StreamDead); err != nil {
		t.Fatal(err)
	}
	if code, out, errs := streamctl(t, n.URL, "apply"); code != exitDone || out != "+ FP_DEAD\n" {
		t.Errorf("exit %d\n%s%s", code, out, errs)
	}
	for stream, want := range map[string]int64{streams.StreamEnriched: 13 << 30, streams.StreamIngest: 2 << 30, streams.StreamDead: 1 << 30} {
		s, err := js.Stream(t.Context(), stream)
		if err != nil {
			t.Fatal(err)
		}
		if got := s.CachedInfo().Config.MaxBytes; got != want {
			t.Errorf("%s: %d bytes, want %d", stream, got, want)
		}
	}
}

func TestApplyRefusesLoss(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	js := n.Connect("test").JS
	for range 10 {
		if _, err := js.Publish(t.Context(), streams.IngestSubject(1), make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	messages := func() uint64 {
		s, err := js.Stream(t.Context(), streams.StreamIngest)
		if err != nil {
			t.Fatal(err)
		}
		return s.CachedInfo().State.Msgs
	}
	code, out, errs := streamctl(t, n.URL, "apply", "--max-bytes", "FP_INGEST=4KiB", "--max-bytes", "FP_DEAD=2MiB")
	if code != exitFailed || out != "" || !strings.Contains(errs, "nothing changed") || !strings.Contains(errs, "FP_INGEST  max_bytes: 1073741824 -> 4096") || !strings.Contains(errs, "--allow-loss") {
		t.Errorf("exit %d, %q, %q", code, out, errs)
	}
	if code, out, _ := streamctl(t, n.URL, "diff"); code != exitDone {
		t.Errorf("something was changed: exit %d, %s", code, out)
	}
	if code, _, errs := streamctl(t, n.URL, "apply", "--max-bytes", "FP_INGEST=4KiB", "--allow-loss"); code != exitDone {
		t.Errorf("exit %d, %s", code, errs)
	}
	if n := messages(); n != 10 {
		t.Errorf("%d messages left", n)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args string
		want string
	}{
		{"", "streamctl apply"},
		{"nonsense", `"nonsense"`},
		{"apply stray", `"stray"`},
		{"apply --nonsense", "-nonsense"},
		{"apply --replicas 2", "--replicas 2"},
		{"apply --replicas x", "replicas"},
		{"apply --timeout 0", "--timeout"},
		{"apply --max-bytes FP_NONE=1", `"FP_NONE"`},
		{"apply --max-bytes FP_DEAD", "STREAM=SIZE"},
		{"apply --max-bytes FP_DEAD=much", "500MiB"},
		{"apply --max-bytes FP_DEAD=1 --max-bytes FP_DEAD=2", "FP_DEAD is given twice"},
		{"diff --max-bytes FP_DEAD=-1", "500MiB"},
		{"diff --allow-loss", "-allow-loss"}, // not for diff
	} {
		code, out, errs := streamctl(t, "", strings.Fields(c.args)...)
		if code != exitUsage || out != "" || !strings.Contains(errs, c.want) {
			t.Errorf("%q: exit %d, %q, %q", c.args, code, out, errs)
		}
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	expect := func(out string, words ...string) {
		t.Helper()
		for _, w := range words {
			if !strings.Contains(out, w) {
				t.Errorf("no %q in\n%s", w, out)
			}
		}
	}
	code, out, errs := streamctl(t, "", "--help")
	if code != exitDone || errs != "" {
		t.Errorf("exit %d, %q", code, errs)
	}
	expect(out, "NATS_URL", "NATS_CREDS_FILE", "0 done", "1 failed", "2 usage", "3 nothing matched", "4 stopped with work left")
	for _, v := range verbs() {
		expect(out, "streamctl "+v.name, v.summary)
		code, out, errs := streamctl(t, "", v.name, "--help")
		if code != exitDone || errs != "" {
			t.Errorf("%s --help: exit %d, %q", v.name, code, errs)
		}
		expect(out, "streamctl "+v.name, v.summary)
		if v.name != "exporter" { // a service: it has settings, and no result to print
			expect(out, "--json", "--timeout", "30s")
		}
	}
	if code, out, _ := streamctl(t, "", "--version"); code != exitDone || !strings.HasPrefix(out, "streamctl ") {
		t.Errorf("exit %d, %s", code, out)
	}
}

func TestParseSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]int64{
		"1": 1, "1048576": 1 << 20, "1KiB": 1 << 10, "500MiB": 500 << 20, "2GiB": 2 << 30, "1TiB": 1 << 40, "8388607TiB": 8388607 << 40,
	} {
		if n, err := parseSize(text); err != nil || n != want {
			t.Errorf("%s: %d, %v", text, n, err)
		}
	}
	for _, text := range []string{"", "0", "-1", "GiB", "1GB", "1G", "1.5GiB", "1 GiB", "2gib", "8388608TiB", "9223372036854775808", "0x10"} {
		if n, err := parseSize(text); err == nil {
			t.Errorf("%q: %d", text, n)
		}
	}
}

// A server that does not answer is named, without its password, in time.
func TestServerThatDoesNotAnswer(t *testing.T) {
	t.Parallel()
	mute, err := net.Listen("tcp", "127.0.0.1:0") // accepts and says nothing
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { mute.Close() })
	for name, addr := range map[string]string{"nobody there": streamstest.FreeAddr(t), "mute": mute.Addr().String()} {
		for _, verb := range []string{"apply", "diff"} {
			begin := time.Now()
			code, out, errs := streamctl(t, "nats://user:hunter2@"+addr, verb, "--timeout", "300ms")
			if code != exitFailed || out != "" || !strings.Contains(errs, addr) || !strings.Contains(errs, "gave up after 300ms") || strings.Contains(errs, "hunter2") {
				t.Errorf("%s, %s: exit %d, %q, %q", name, verb, code, out, errs)
			}
			if took := time.Since(begin); took > 4*time.Second {
				t.Errorf("%s, %s: took %v", name, verb, took)
			}
		}
	}
}

// A job that is started together with its server waits for it.
func TestApplyWaitsForNATS(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	n.Stop()
	ln, err := net.Listen("tcp", strings.TrimPrefix(n.URL, "nats://"))
	if err != nil {
		t.Fatal(err)
	}
	var code int
	var out, errs string
	var applied sync.WaitGroup
	applied.Go(func() { code, out, errs = streamctl(t, n.URL, "apply", "--timeout", "20s") })
	first, err := ln.Accept() // apply has tried
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	ln.Close()
	n.Start()
	applied.Wait()
	if code != exitDone || strings.Count(out, "\n") != 10 {
		t.Errorf("exit %d, %q, %q", code, out, errs)
	}
}

func TestInterrupt(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("interrupted"))
	var out, errs bytes.Buffer
	env := map[string]string{"NATS_URL": "nats://" + streamstest.FreeAddr(t)}
	code := run(ctx, []string{"apply"}, func(name string) string { return env[name] }, nil, &out, &errs)
	if code != exitFailed || !strings.Contains(errs.String(), "interrupted") {
		t.Errorf("exit %d, %s", code, errs.String())
	}
}

func TestBadSettings(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		env   map[string]string
		lines []string
	}{
		"files":  {map[string]string{"NATS_CREDS_FILE": "/nowhere/1", "NATS_CA_FILE": "/nowhere/2"}, []string{"NATS_CREDS_FILE: ", "NATS_CA_FILE: "}},
		"no URL": {map[string]string{"NATS_URL": "nats://user:hun%zzter2@host"}, []string{"NATS_URL: "}},
	} {
		var out, errs bytes.Buffer
		code := run(t.Context(), []string{"diff"}, func(name string) string { return c.env[name] }, nil, &out, &errs)
		if code != exitUsage || strings.Contains(errs.String(), "ter2") {
			t.Errorf("%s: exit %d, %s", name, code, errs.String())
		}
		for _, l := range c.lines {
			if !strings.Contains(errs.String(), "\n"+l) {
				t.Errorf("%s: no line for %q in %s", name, l, errs.String())
			}
		}
	}
}

// What NATS refuses is said, not only that time is up.
func TestRefusedByNATS(t *testing.T) {
	t.Parallel()
	addr := streamstest.FreeAddr(t)
	_, port, _ := strings.Cut(addr, ":")
	opts := &server.Options{Host: "127.0.0.1", NoSigs: true, NoLog: true, JetStream: true, StoreDir: t.TempDir(), Users: []*server.User{
		{Username: "reader", Password: "hunter2", Permissions: &server.Permissions{Publish: &server.SubjectPermission{Deny: []string{"$JS.API.>"}}}},
	}}
	var err error
	if opts.Port, err = strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(20 * time.Second) {
		t.Fatal("nats-server does not start")
	}
	for url, want := range map[string]string{
		"nats://reader:hunter3@" + addr: "Authorization Violation",
		"nats://reader:hunter2@" + addr: "ermissions",
	} {
		code, _, errs := streamctl(t, url, "apply", "--timeout", "500ms")
		if code != exitFailed || !strings.Contains(errs, want) || strings.Contains(errs, "hunter") {
			t.Errorf("%s: exit %d, %s", want, code, errs)
		}
	}
}
