package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestMain lets the test binary be streamctl itself, for what needs a process
// to kill.
func TestMain(m *testing.M) {
	if os.Getenv("STREAMCTL_TEST_PROCESS") != "" {
		main()
	}
	os.Exit(m.Run())
}

// copies returns how often each message of a replay's source is in
// FP_BACKFILL.
func (b *bench) copies(id string) map[string]int {
	b.t.Helper()
	in, err := findSpan(b.t.Context(), b.js, streams.StreamBackfill, time.Time{}, time.Time{})
	if err != nil {
		b.t.Fatal(err)
	}
	n := map[string]int{}
	if err := scan(b.t.Context(), b.conn, in, ">", func(m *jetstream.RawStreamMsg) error {
		if m.Header.Get(streams.HeaderReplay) == id {
			n[requestID(m.Data)]++
		}
		return nil
	}); err != nil {
		b.t.Fatal(err)
	}
	return n
}

func decodeReplay(t *testing.T, out string) replayState {
	t.Helper()
	var s replayState
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	return s
}

func TestDryRunEqualsRun(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	for i := range 40 {
		at := now
		if i%10 == 0 {
			at = now.Add(-25 * time.Hour)
		}
		r := ready(event(fmt.Sprint("e", i)), at)
		b.put(streams.EnrichedSubject(12), nil, r)
		if i%4 == 1 {
			b.record(r, time.Hour)
		}
	}
	b.put(streams.EnrichedSubject(12), nil, "no record")
	b.put(streams.EnrichedSubject(13), nil, ready(event("other"), now))
	until := time.Now().Format(time.RFC3339Nano)
	for args, want := range map[string]replayCounts{
		"--subscriber 12":                {Copied: 36, Ready: 10, PastLife: 4, Invalid: 1},
		"--subscriber 12 --only-missing": {Copied: 26, PastLife: 4, Present: 10, Invalid: 1},
		"--request-id e5":                {Copied: 1, Ready: 1},
		"--subscriber 13 --from-seq 1":   {Copied: 1},
	} {
		line := append([]string{"replay", "--stage", "persister", "--since", "1h", "--until", until, "--json"}, strings.Fields(args)...)
		_, out, errs := b.run(append(line, "--dry-run")...)
		plan := decodeReplay(t, out)
		if n := len(b.copies(plan.ID)); n != 0 {
			t.Errorf("%s: the plan copied %d", args, n)
		}
		code, out, errs2 := b.run(line...)
		ran := decodeReplay(t, out)
		if d := cmp.Diff(want, plan.Counts); d != "" {
			t.Errorf("%s: plan, -want +got\n%s%s", args, d, errs)
		}
		if d := cmp.Diff(plan.Counts, ran.Counts); code != exitDone || d != "" {
			t.Errorf("%s: exit %d, -plan +run\n%s%s", args, code, d, errs2)
		}
		if n := len(b.copies(ran.ID)); n != int(want.Copied) {
			t.Errorf("%s: %d copies in the stream", args, n)
		}
	}
	if code, _, _ := b.run("replay", "--stage", "persister", "--since", "1ns"); code != exitNone {
		t.Errorf("exit %d", code)
	}
	for _, args := range []string{"", "--stage x --since 1h", "--stage persister", "--stage persister --since x", "--resume a --stage persister", "--stage persister --request-id .."} {
		if code, _, errs := b.run(append([]string{"replay"}, strings.Fields(args)...)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, errs)
		}
	}
}

// A copy says when the original was accepted, so that order and expiry hold,
// and only a forced one has the vendor asked about a ready event.
func TestReplayForThePrefetcher(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.put(streams.IngestSubject(12), nats.Header{streams.HeaderTraceParent: {"tp"}}, event("a"))
	b.put(streams.IngestSubject(12), nil, event("b"))
	b.record(ready(event("a"), time.Now()), time.Hour)
	_, out, errs := b.run("replay", "--stage", "prefetcher", "--since", "1h", "--json")
	s := decodeReplay(t, out)
	if s.Counts.VendorCalls != 1 || s.Counts.Copied != 2 || s.Seconds <= 0 {
		t.Errorf("%+v %s", s, errs)
	}
	read := func(stream string, seq uint64) *jetstream.RawStreamMsg {
		st, err := b.js.Stream(t.Context(), stream)
		if err != nil {
			t.Fatal(err)
		}
		m, err := st.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	original, copied := read(streams.StreamIngest, 1), read(streams.StreamBackfill, 1)
	if copied.Subject != "fp.backfill.prefetcher.12" || string(copied.Data) != string(original.Data) || copied.Header.Get(streams.HeaderTraceParent) != "tp" ||
		copied.Header.Get(streams.HeaderAcceptedAt) != original.Time.UTC().Format(time.RFC3339Nano) || copied.Header.Get(streams.HeaderForce) != "" {
		t.Errorf("%s %v", copied.Subject, copied.Header)
	}
	_, out, _ = b.run("replay", "--stage", "prefetcher", "--request-id", "a", "--force", "--json")
	if s := decodeReplay(t, out); s.Counts.VendorCalls != 1 || read(streams.StreamBackfill, 3).Header.Get(streams.HeaderForce) != "1" {
		t.Errorf("%+v", s)
	}
}

// Killed at any point and gone on with, a replay copies each event once; also
// when the stream no longer knows the message ids.
func TestKilledReplayResumes(t *testing.T) {
	t.Parallel()
	const events = 400
	b := newBench(t)
	for _, d := range streams.Definition(streams.Limits{}) {
		if d.Stream.Name == streams.StreamBackfill {
			d.Stream.Duplicates = 100 * time.Millisecond
			if _, err := b.js.UpdateStream(t.Context(), d.Stream); err != nil {
				t.Fatal(err)
			}
		}
	}
	now := time.Now()
	for i := range events {
		b.put(streams.EnrichedSubject(12), nil, streams.NewRecord(event(fmt.Sprint("e", i)), now, record.NotFound, record.EventNotFound))
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "replay", "--stage", "persister", "--since", "1h", "--rate", "400")
	cmd.Env = append(os.Environ(), "STREAMCTL_TEST_PROCESS=1", "NATS_URL="+b.n.URL)
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "half of the copies", func() bool {
		s, err := b.js.Stream(t.Context(), streams.StreamBackfill)
		return err == nil && s.CachedInfo().State.Msgs > 150
	})
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // "signal: killed" is what was asked for
	kv, err := b.js.KeyValue(t.Context(), replayBucket)
	if err != nil {
		t.Fatal(err)
	}
	ids, err := kv.Keys(t.Context())
	if err != nil || len(ids) != 1 {
		t.Fatal(ids, err)
	}
	if n := len(b.copies(ids[0])); n >= events {
		t.Fatal("was through before the kill")
	}

	// Stopped as by Ctrl-C, it says that work is left.
	stopped, cancel := context.WithCancel(t.Context())
	time.AfterFunc(300*time.Millisecond, cancel)
	var out, errs strings.Builder
	code := run(stopped, []string{"replay", "--resume", ids[0]}, func(name string) string { return map[string]string{"NATS_URL": b.n.URL}[name] }, &out, &errs)
	if code != exitLeft || !strings.Contains(out.String(), "--resume "+ids[0]) {
		t.Errorf("exit %d, %s%s", code, out.String(), errs.String())
	}

	code, last, stderr := b.run("replay", "--resume", ids[0], "--json")
	if s := decodeReplay(t, last); code != exitDone || !s.Done || s.Counts.Copied != events {
		t.Errorf("exit %d, %+v, %s", code, s, stderr)
	}
	n := b.copies(ids[0])
	if len(n) != events {
		t.Errorf("%d of %d copied", len(n), events)
	}
	for id, times := range n {
		if times != 1 {
			t.Errorf("%s copied %d times", id, times)
		}
	}
}
