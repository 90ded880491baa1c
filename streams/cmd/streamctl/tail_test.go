package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

func TestShow(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for _, id := range []string{"a", "b", "c"} {
		b.put(streams.EnrichedSubject(12), nil, ready(event(id), time.Now()))
	}
	other := event("d")
	other.SubscriberID = 13
	b.put(streams.EnrichedSubject(13), nil, ready(other, time.Now()))
	b.put(streams.EnrichedSubject(streams.HeartbeatSubscriber), nil, "a heartbeat")
	b.put(streams.DeadSubject(streams.StagePersister, 12), nats.Header{streams.HeaderDeadReason: {"poison"}}, event("e"))
	for args, want := range map[string]string{
		"enriched":                               "a b c d",
		"FP_ENRICHED --limit 2":                  "a b",
		"persister --subscriber 13":              "d",
		"enriched --request-id b":                "b",
		"enriched --from-seq 3 --since 1h":       "c d",
		"enriched --until 1h":                    "",
		"ingest":                                 "",
		"dead --reason poison --stage persister": "e",
		"dead --reason exhausted":                "",
	} {
		code, out, errs := b.run(append([]string{"show", "--json"}, strings.Fields(args)...)...)
		var ids []string
		for line := range strings.Lines(out) {
			var ev seenEvent
			if err := json.Unmarshal([]byte(line), &ev); err != nil {
				t.Fatalf("%s: %v, %s", args, err, line)
			}
			ids = append(ids, ev.RequestID)
		}
		if got := strings.Join(ids, " "); got != want || (code == exitNone) != (want == "") || strings.Contains(out, email) {
			t.Errorf("%s: exit %d, %q, %s%s", args, code, got, out, errs)
		}
	}
	if code, out, _ := b.run("show", "enriched", "--limit", "1"); code != exitDone || strings.Contains(out, email) || !strings.Contains(out, `"user_id":"***"`) {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, out, _ := b.run("show", "enriched", "--limit", "1", "--reveal"); code != exitDone || !strings.Contains(out, email) {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, out, _ := b.run("audit", "--verb", "show"); code != exitDone || !strings.Contains(out, "FP_ENRICHED --limit 1 --reveal true") {
		t.Errorf("exit %d, %s", code, out)
	}
	for _, args := range []string{"show", "show x", "show ingest enriched", "tail", "show ingest --stage x", "show FP_AUDIT"} {
		if code, _, errs := b.run(strings.Fields(args)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, errs)
		}
	}
}

// buffer is written and read at once.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p) //nolint:wrapcheck // never fails
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestTailFollows(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.put(streams.IngestSubject(12), nil, event("before"))
	ctx, stop := context.WithCancel(t.Context())
	var out, all buffer
	var wg sync.WaitGroup
	for w, args := range map[*buffer][]string{&out: {"tail", "ingest", "--subscriber", "12"}, &all: {"tail", "ingest", "--since", "1h", "--json"}} {
		wg.Go(func() {
			if code := run(ctx, args, func(name string) string { return map[string]string{"NATS_URL": b.n.URL}[name] }, nil, w, t.Output()); code != exitDone {
				t.Errorf("exit %d", code)
			}
		})
	}
	streamstest.Eventually(t, "the one before", func() bool { return strings.Contains(all.String(), `"before"`) })
	i := 0
	streamstest.Eventually(t, "one after", func() bool { // the other tail may not have begun
		i++
		b.put(streams.IngestSubject(12), nil, event(fmt.Sprint("after", i)))
		b.put(streams.IngestSubject(13), nil, event("others"))
		return strings.Contains(out.String(), "after")
	})
	stop()
	wg.Wait()
	if s := out.String(); strings.Contains(s, "before") || strings.Contains(s, "others") || strings.Contains(s+all.String(), email) {
		t.Error(s)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(all.String()) {
		if seen[line] {
			t.Errorf("twice: %s", line)
		}
		seen[line] = true
	}
}

func TestStatusShowsQuotaAndReplays(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	if _, out, errs := b.run("status"); !strings.Contains(out, "vendor's quota: not used") || strings.Contains(out, "UNFINISHED") {
		t.Errorf("%s%s", out, errs)
	}
	rdb, err := redisclient.New(b.redisURL)
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	now := time.Now().UnixMicro()
	if err := rdb.HSet(t.Context(), streams.QuotaKey, "tokens", "3.5", "at", now+60e6, "paused", now+60e6).Err(); err != nil {
		t.Fatal(err)
	}
	b.put(streams.EnrichedSubject(12), nil, ready(event("a"), time.Now()))
	_, run, _ := b.run("replay", "--stage", "persister", "--since", "1h", "--no-wait", "--json")
	_, out, errs := b.run("status", "--json")
	var r statusReport
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatal(err, out, errs)
	}
	if q := r.Quota; q == nil || q.Tokens != 3.5 || q.Burst != 15 || q.PausedSeconds < 30 || !q.Used {
		t.Errorf("%+v", q)
	}
	if len(r.Replays) != 1 || r.Replays[0].ID != decodeReplay(t, run).ID || !r.Replays[0].Done || r.Replays[0].Copied != 1 || r.Replays[0].Share != 1 {
		t.Errorf("%+v", r.Replays)
	}
	_, out, _ = b.run("status")
	if !strings.Contains(out, "vendor's quota: 3.5 of 15 calls at once, 5 per second") || !strings.Contains(out, "UNFINISHED") {
		t.Error(out)
	}
	for line := range strings.Lines(out) {
		if len(line) > 81 {
			t.Errorf("wider than 80 columns: %s", line)
		}
	}
}

func TestNATSContext(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	home := t.TempDir()
	dir := filepath.Join(home, ".config", "nats", "context")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"good": fmt.Sprintf(`{"description":"d","url":%q,"user":"u","password":"secret"}`, n.URL),
		"nkey": `{"url":"nats://h","nkey":"/k"}`, "broken": `{"password":"secret`, "file": `{"url":"nats://h","creds":"~/nothing.creds"}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name+".json"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range []struct {
		args, env string
		code      int
		says      string
	}{
		{"--context good", "", exitDone, ""},
		{"", "good", exitDone, ""},
		{"--context nkey", "good", exitUsage, "are understood"},
		{"--context broken", "", exitUsage, "not JSON"},
		{"--context nobody", "", exitUsage, "no such file"},
		{"--context ../good", "", exitUsage, "is no name"},
		{"--context file", "", exitUsage, home + "/nothing.creds"},
	} {
		var out, errs bytes.Buffer
		env := map[string]string{"HOME": home, "NATS_CONTEXT": c.env}
		code := run(t.Context(), append([]string{"diff"}, strings.Fields(c.args)...), func(name string) string { return env[name] }, nil, &out, &errs)
		if code != c.code || !strings.Contains(errs.String(), c.says) || strings.Contains(out.String()+errs.String(), "secret") {
			t.Errorf("%s: exit %d, %s%s", c.args, code, out.String(), errs.String())
		}
	}
	c := natsContext{URL: "nats://a:1, tls://b:2,nats://me:pw@c:3", User: "u", Password: "p"}
	if got := c.servers(); got != "nats://u:p@a:1,tls://u:p@b:2,nats://me:pw@c:3" {
		t.Error(got)
	}
}
