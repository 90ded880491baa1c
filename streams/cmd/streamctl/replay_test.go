package main

import (
	stdcmp "cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

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

func decodeReplay(t *testing.T, out string) feedState {
	t.Helper()
	var s feedState
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("%v: %q", err, out)
	}
	return s
}

func TestDryRunEqualsRun(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.work(streams.StreamBackfill, streams.DurablePersisterBackfill)
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
	b.put(streams.EnrichedSubject(streams.HeartbeatSubscriber), nil, "a heartbeat")
	until := time.Now().Format(time.RFC3339Nano)
	for args, want := range map[string]feedCounts{
		"--subscriber 12":                {Copied: 36, Ready: 10, PastLife: 4, Invalid: 1},
		"--subscriber 12 --only-missing": {Copied: 26, PastLife: 4, Present: 10, Invalid: 1},
		"--request-id e5":                {Copied: 1, Ready: 1},
		"":                               {Copied: 37, Ready: 10, PastLife: 4, Invalid: 1},
		"--subscriber 13 --from-seq 1":   {Copied: 1},
	} {
		line := append([]string{"replay", "--stage", "persister", "--since", "1h", "--until", until, "--json", "--no-wait"}, strings.Fields(args)...)
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
	_, out, errs := b.run("replay", "--stage", "prefetcher", "--since", "1h", "--json", "--no-wait")
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
	_, out, _ = b.run("replay", "--stage", "prefetcher", "--request-id", "a", "--force", "--json", "--no-wait")
	if s := decodeReplay(t, out); s.Counts.VendorCalls != 1 || read(streams.StreamBackfill, 3).Header.Get(streams.HeaderForce) != "1" {
		t.Errorf("%+v", s)
	}
}

// Killed at any point and gone on with, a run copies each event once; also
// when the stream no longer knows the message ids.
func TestKilledRunResumes(t *testing.T) {
	t.Parallel()
	t.Run("replay", func(t *testing.T) {
		t.Parallel()
		testKilledRunResumes(t, []string{"replay"}, streams.EnrichedSubject(12), "--stage", "persister", "--since", "1h")
	})
	t.Run("redrive", func(t *testing.T) {
		t.Parallel()
		b := testKilledRunResumes(t, []string{"dead", "redrive"}, streams.DeadSubject(streams.StagePersister, 12), "--all")
		s, err := b.js.Stream(t.Context(), streams.StreamDead)
		if err != nil || s.CachedInfo().State.Msgs != 0 {
			t.Errorf("%d dead letters are left, %v", s.CachedInfo().State.Msgs, err)
		}
	})
}

func testKilledRunResumes(t *testing.T, verb []string, subject string, args ...string) *bench {
	const events = 400
	b := newBench(t)
	b.work(streams.StreamBackfill, streams.DurablePersisterBackfill)
	b.work(streams.StreamBackfill, streams.DurablePrefetcherBackfill)
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
		b.put(subject, nil, streams.NewRecord(event(fmt.Sprint("e", i)), now, record.NotFound, record.EventNotFound))
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], slices.Concat(verb, args, []string{"--rate", "400"})...)
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
	code := run(stopped, append(verb, "--resume", ids[0]), func(name string) string { return map[string]string{"NATS_URL": b.n.URL}[name] }, nil, &out, &errs)
	if code != exitLeft || !strings.Contains(out.String(), "--resume "+ids[0]) {
		t.Errorf("exit %d, %s%s", code, out.String(), errs.String())
	}

	code, last, stderr := b.run(append(verb, "--resume", ids[0], "--json", "--no-wait")...)
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
	return b
}

// A run waits for the stages and says what the streams and Redis have.
func TestReplayWaitsForTheStages(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	for _, id := range []string{"ready", "foreign", "earlier", "absent"} {
		b.put(streams.EnrichedSubject(12), nil, ready(event(id), now))
	}
	foreign := event("foreign")
	foreign.SubscriberID = 13
	b.record(ready(event("ready"), now), time.Hour)
	b.record(ready(foreign, now), time.Hour)
	b.record(ready(event("earlier"), now.Add(-time.Minute)), time.Hour)

	// Nobody will do it: that is said, and what is left.
	if code, out, errs := b.run("pause", streams.DurablePersisterBackfill, "--for", "1h"); code != exitDone {
		t.Fatalf("exit %d, %s%s", code, out, errs)
	}
	code, out, errs := b.run("replay", "--stage", "persister", "--since", "1h", "--json")
	s := decodeReplay(t, out)
	if code != exitLeft || !s.Done || s.Settled || !strings.Contains(s.Waiting, "paused") {
		t.Fatalf("exit %d, %+v, %s", code, s, errs)
	}
	if code, out, errs := b.run("resume", streams.DurablePersisterBackfill); code != exitDone {
		t.Fatalf("exit %d, %s%s", code, out, errs)
	}
	b.put(streams.DeadSubject(streams.StagePersister, 12), nats.Header{streams.HeaderReplay: {s.ID}, streams.HeaderDeadReason: {"foreign_subscriber"}}, event("foreign"))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		code, out, errs = b.run("replay", "--resume", s.ID, "--json")
	}()
	b.finish(streams.StreamBackfill, streams.DurablePersisterBackfill, 4)
	<-ended
	s = decodeReplay(t, out)
	want := &outcome{InStream: 4, Agrees: true, Dead: map[string]uint64{"foreign_subscriber": 1},
		Records: map[string]uint64{"ready": 1, "foreign": 1, "earlier": 1, "absent": 1}}
	if d := cmp.Diff(want, s.Outcome); code != exitDone || !s.Settled || d != "" {
		t.Errorf("exit %d, -want +got\n%s%s", code, d, errs)
	}
	if s.Counts.Ready != 1 {
		t.Errorf("a record counts as ready although it is another's or an earlier event's: %+v", s.Counts)
	}
	if _, out, _ := b.run("replay", "--resume", s.ID); !strings.Contains(out, "1 absent, 1 earlier, 1 foreign, 1 ready") {
		t.Error(out)
	}
}

// purge makes room as the exporter does in streams under pressure.
func (b *bench) purge() {
	b.t.Helper()
	j := streams.NewJanitor(b.js, streamstest.Logger(b.t), prometheus.NewRegistry(), 0)
	j.Pressure = 1e-9
	if err := j.Sweep(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
}

// Copies that were finished and purged are not missing; others are.
func TestReplayKnowsWhatWasPurged(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	for i := range 15 {
		b.put(streams.EnrichedSubject(12), nil, ready(event(fmt.Sprint("e", i)), now))
	}
	// Another run's copies are no concern of this one.
	for _, stage := range []string{streams.StagePersister, streams.StagePrefetcher} {
		b.put(streams.BackfillSubject(stage, 12), nil, event("earlier"))
	}
	_, out, errs := b.run("replay", "--stage", "persister", "--since", "1h", "--rate", "0", "--json", "--no-wait")
	s := decodeReplay(t, out)
	if s.Counts.Copied != 15 {
		t.Fatalf("%+v, %s", s, errs)
	}
	look := func(code int, want outcome) {
		t.Helper()
		got, out, errs := b.run("replay", "--resume", s.ID, "--json")
		o := decodeReplay(t, out).Outcome
		if o == nil || got != code || o.InStream != want.InStream || o.Purged != want.Purged || o.Agrees != want.Agrees {
			t.Errorf("exit %d, %+v, want %+v, %s", got, o, want, errs)
		}
	}
	b.finish(streams.StreamBackfill, streams.DurablePersisterBackfill, 11)
	b.purge()
	b.finish(streams.StreamBackfill, streams.DurablePersisterBackfill, 5)
	look(exitDone, outcome{InStream: 5, Purged: 10, Agrees: true})
	if code, out, _ := b.run("replay", "--resume", s.ID); code != exitDone || !strings.Contains(out, "finished and purged    10\n") {
		t.Errorf("exit %d, %s", code, out)
	}
	backfill, err := b.js.Stream(t.Context(), streams.StreamBackfill)
	if err != nil {
		t.Fatal(err)
	}
	if err := backfill.DeleteMsg(t.Context(), s.LastCopy[streams.StagePersister]-3); err != nil {
		t.Fatal(err)
	}
	look(exitFailed, outcome{InStream: 4, Purged: 10})
	b.purge()
	look(exitDone, outcome{Purged: 15, Agrees: true}) // nothing is left to tell by
}

// Of a redrive for both stages, each one's finished copies may be gone.
func TestRedriveKnowsWhatWasPurged(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	b.put(streams.DeadSubject(streams.StagePrefetcher, 12), nil, event("a"))
	for _, id := range []string{"b", "c"} {
		b.put(streams.DeadSubject(streams.StagePersister, 12), nil, ready(event(id), now))
	}
	_, out, errs := b.run("dead", "redrive", "--all", "--rate", "25", "--json", "--no-wait")
	s := decodeReplay(t, out)
	if s.Counts.Copied != 3 || s.FirstCopies[streams.StagePrefetcher] != 1 {
		t.Fatalf("%+v, %s", s, errs)
	}
	b.finish(streams.StreamBackfill, streams.DurablePersisterBackfill, 2)
	b.purge()
	b.finish(streams.StreamBackfill, streams.DurablePrefetcherBackfill, 1)
	code, out, errs := b.run("dead", "redrive", "--resume", s.ID, "--json")
	if o := decodeReplay(t, out).Outcome; code != exitDone || o == nil || o.InStream != 1 || o.Purged != 2 || !o.Agrees {
		t.Errorf("exit %d, %+v, %s", code, o, errs)
	}
}

func TestRedrive(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	letter := func(stage, reason string, redrives string, body any, at time.Time) {
		h := nats.Header{
			streams.HeaderDeadReason: {reason}, streams.HeaderDeadStage: {stage}, streams.HeaderAcceptedAt: {at.Format(time.RFC3339Nano)},
			streams.HeaderReplay: {"before"},
		}
		if redrives != "" {
			h.Set(headerRedrives, redrives)
		}
		b.put(streams.DeadSubject(stage, 12), h, body)
	}
	letter(streams.StagePrefetcher, "poison", "", event("a"), now)
	letter(streams.StagePrefetcher, "poison", "2", event("b"), now)
	letter(streams.StagePrefetcher, "poison", "3", event("c"), now)
	letter(streams.StagePrefetcher, "exhausted", "", event("old"), now.Add(-23*time.Hour-time.Minute))
	letter(streams.StagePersister, "poison", "", ready(event("d"), now), now)
	letter(streams.StagePersister, "undecodable", "", "what is this", now)
	left := func() (ids []string) {
		_, out, _ := b.run("dead", "list", "--json")
		var found []deadLetter
		if err := json.Unmarshal([]byte(out), &found); err != nil {
			t.Fatal(err)
		}
		for _, d := range found {
			ids = append(ids, stdcmp.Or(d.RequestID, d.Reason))
		}
		return ids
	}
	for _, c := range []struct {
		args string
		want feedCounts
		left string
	}{
		{"--stage prefetcher", feedCounts{Copied: 2, PastLife: 1, UsedUp: 1, VendorCalls: 2}, "[c old d undecodable]"},
		{"--reason undecodable", feedCounts{Copied: 1}, "[c old d]"},
		{"--all --rate 0", feedCounts{Copied: 1, PastLife: 1, UsedUp: 1}, "[c old]"},
	} {
		line := append([]string{"dead", "redrive", "--json", "--no-wait"}, strings.Fields(c.args)...)
		before := fmt.Sprint(left())
		_, out, errs := b.run(append(line, "--dry-run")...)
		if d := cmp.Diff(c.want, decodeReplay(t, out).Counts); d != "" {
			t.Errorf("%s: plan, -want +got\n%s%s", c.args, d, errs)
		}
		if got := fmt.Sprint(left()); got != before {
			t.Errorf("%s: the plan left %s", c.args, got)
		}
		code, out, errs := b.run(line...)
		s := decodeReplay(t, out)
		if d := cmp.Diff(c.want, s.Counts); code != exitDone || d != "" {
			t.Errorf("%s: exit %d, -want +got\n%s%s", c.args, code, d, errs)
		}
		if got := fmt.Sprint(left()); got != c.left {
			t.Errorf("%s: left %s", c.args, got)
		}
		if n := len(b.copies(s.ID)); n != int(c.want.Copied) {
			t.Errorf("%s: %d copies", c.args, n)
		}
	}
	s, err := b.js.Stream(t.Context(), streams.StreamBackfill)
	if err != nil {
		t.Fatal(err)
	}
	for seq, want := range map[uint64][2]string{1: {"fp.backfill.prefetcher.12", "1"}, 2: {"fp.backfill.prefetcher.12", "3"}, 4: {"fp.backfill.persister.12", "1"}} {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		if got := [2]string{m.Subject, m.Header.Get(headerRedrives)}; got != want {
			t.Errorf("%d: %s", seq, got)
		}
		if m.Header.Get(streams.HeaderDeadReason) != "" {
			t.Errorf("%d: %v", seq, m.Header)
		}
	}
	if code, _, _ := b.run("dead", "redrive", "--request-id", "nobody"); code != exitNone {
		t.Errorf("exit %d", code)
	}
}

func TestPurgeAsksFirst(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for i, reason := range []string{"poison", "exhausted", "poison"} {
		b.put(streams.DeadSubject(streams.StagePersister, 12), nats.Header{streams.HeaderDeadReason: {reason}}, event(fmt.Sprint("e", i)))
	}
	for _, c := range []struct {
		stdin, args string
		code        int
		left        uint64
	}{
		{"n\n", "--all", exitLeft, 3},
		{"", "--all", exitLeft, 3},
		{"", "--reason poison --until 1h --yes", exitNone, 3},
		{"y\n", "--reason poison", exitDone, 1},
		{"", "--all --yes", exitDone, 0},
		{"", "--all --yes", exitNone, 0},
	} {
		code, out, errs := b.answer(c.stdin, append([]string{"dead", "purge"}, strings.Fields(c.args)...)...)
		s, err := b.js.Stream(t.Context(), streams.StreamDead)
		if err != nil {
			t.Fatal(err)
		}
		if n := s.CachedInfo().State.Msgs; code != c.code || n != c.left {
			t.Errorf("%s: exit %d, %d left, %s%s", c.args, code, n, out, errs)
		}
	}
}

func TestBar(t *testing.T) {
	t.Parallel()
	if got := bar(50, 200, 10*time.Second, "49 copied"); got != "[######..................]  25%  49 copied, ETA 30s" {
		t.Error(got)
	}
	if got := bar(0, 200, time.Second, ""); !strings.Contains(got, "ETA ?") || len(got) > 80 {
		t.Error(got)
	}
}

// NATS and Redis may go away and come back under a run: it waits for them and
// copies everything once.
func TestReplayOutlivesRestarts(t *testing.T) {
	t.Parallel()
	const events = 400
	b, rds := newBench(t), streamstest.NewRedis(t)
	b.work(streams.StreamBackfill, streams.DurablePersisterBackfill)
	now := time.Now()
	for i := range events {
		b.put(streams.EnrichedSubject(12), nil, ready(event(fmt.Sprint("e", i)), now))
	}
	type ended struct {
		code      int
		out, errs string
	}
	end := make(chan ended, 1)
	env := map[string]string{"NATS_URL": b.n.URL, "REDIS_URL": rds.URL()}
	go func() {
		var out, errs strings.Builder
		code := run(t.Context(), strings.Fields("replay --stage persister --from-seq 1 --rate 200 --json --no-wait"),
			func(name string) string { return env[name] }, nil, &out, &errs)
		end <- ended{code, out.String(), errs.String()}
	}()
	copied := func(n uint64) func() bool {
		return func() bool {
			s, err := b.js.Stream(t.Context(), streams.StreamBackfill)
			return err == nil && s.CachedInfo().State.Msgs >= n
		}
	}
	streamstest.Eventually(t, "the first copies", copied(20))
	b.n.Stop()
	rds.Kill()
	b.n.Start()
	streamstest.Eventually(t, "the server", copied(20))
	rds.Start()
	streamstest.Eventually(t, "more copies", copied(events/2))
	b.n.Stop()
	b.n.Start()
	e := <-end
	if s := decodeReplay(t, e.out); e.code != exitDone || !s.Done || s.Counts.Copied != events {
		t.Fatalf("exit %d, %+v, %s", e.code, s, e.errs)
	}
	n := b.copies(decodeReplay(t, e.out).ID)
	if len(n) != events {
		t.Errorf("%d of %d copied", len(n), events)
	}
	for id, times := range n {
		if times != 1 {
			t.Errorf("%s copied %d times", id, times)
		}
	}
}

// What may wait follows what the stages finish: two seconds' worth.
func TestRoomFollowsTheStages(t *testing.T) {
	start := time.Now()
	for perSecond, want := range map[float64]int{1: minOutstanding, 40: 80, 200: 400, 5000: maxOutstanding} {
		r := newRoom(start)
		copies, finished, most := 0, 0.0, 0
		for tick := range 3000 { // a minute
			now := start.Add(time.Duration(tick) * 20 * time.Millisecond)
			finished = min(finished+perSecond/50, float64(copies))
			waiting := copies - int(finished)
			if tick > 1000 {
				most = max(most, waiting)
			}
			if r.left > 0 || r.look(now, copies, waiting) {
				copies += r.left
				r.left = 0
			}
		}
		if most > want+want/4 || most < want/2 {
			t.Errorf("at %g a second %d wait, want about %d", perSecond, most, want)
		}
		if copies < int(perSecond*55) {
			t.Errorf("at %g a second %d copies in a minute", perSecond, copies)
		}
	}
}
