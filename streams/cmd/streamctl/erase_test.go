package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// planted puts events of the planted user into every stream, and records; a
// neighbour's stand beside each.
func (b *bench) plant() {
	b.t.Helper()
	now := time.Now()
	for _, who := range []string{"mine", "neighbour"} {
		ev := event(who)
		if who == "neighbour" {
			ev.UserID = "not-" + email
		}
		b.put(streams.IngestSubject(12), nil, ev)
		b.put(streams.EnrichedSubject(12), nil, ready(ev, now))
		b.put(streams.BackfillSubject(streams.StagePrefetcher, 12), nil, ev)
		b.put(streams.BackfillSubject(streams.StagePersister, 12), nil, ready(ev, now))
		b.put(streams.DeadSubject(streams.StagePrefetcher, 12), nats.Header{streams.HeaderDeadReason: {"poison"}}, ev)
		b.record(ready(ev, now), time.Hour)
	}
	// Nobody can read this one, and it names the user.
	if _, err := b.js.Publish(b.t.Context(), streams.DeadSubject(streams.StagePrefetcher, 0), []byte(`{"user_id":"`+email)); err != nil {
		b.t.Fatal(err)
	}
	// A record that outlived its messages.
	b.record(ready(event("orphan"), now), time.Hour)
}

// holds returns where a text is in any message or record.
func (b *bench) holds(text string) (places []string) {
	b.t.Helper()
	for _, d := range streams.Definition(streams.Limits{}) {
		in, err := findSpan(b.t.Context(), b.js, d.Stream.Name, time.Time{}, time.Time{})
		if err != nil {
			b.t.Fatal(err)
		}
		if err := scan(b.t.Context(), b.conn, in, ">", func(m *jetstream.RawStreamMsg) error {
			if bytes.Contains(m.Data, []byte(text)) || strings.Contains(fmt.Sprint(m.Header), text) {
				places = append(places, fmt.Sprint(d.Stream.Name, " ", m.Sequence))
			}
			return nil
		}); err != nil {
			b.t.Fatal(err)
		}
	}
	rdb, err := redisclient.New(b.redisURL)
	if err != nil {
		b.t.Fatal(err)
	}
	defer rdb.Close()
	keys, err := rdb.Keys(b.t.Context(), "*").Result()
	if err != nil {
		b.t.Fatal(err)
	}
	for _, key := range keys {
		if v, err := rdb.Get(b.t.Context(), key).Result(); err != nil || strings.Contains(v, text) {
			places = append(places, key)
		}
	}
	return places
}

// onDisk counts the files of the test's streams that hold a text as it is.
func onDisk(t *testing.T, text string) (n int) {
	t.Helper()
	err := filepath.WalkDir(filepath.Dir(t.TempDir()), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.Contains(path, "jetstream") {
			return nil //nolint:nilerr // files come and go
		}
		if data, err := os.ReadFile(path); err == nil && bytes.Contains(data, []byte(text)) {
			n++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestErase(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		args, stdin string
		left        int // places that still hold the planted text
		want        erasure
	}{
		"user": {args: "--user-id " + email, left: 6, want: erasure{Records: 2, Events: 2,
			Streams: map[string]int{"FP_INGEST": 1, "FP_ENRICHED": 1, "FP_BACKFILL": 2, "FP_DEAD": 2}}},
		"user from standard input": {args: "--user-id -", stdin: email + "\n", left: 6, want: erasure{Records: 2, Events: 2,
			Streams: map[string]int{"FP_INGEST": 1, "FP_ENRICHED": 1, "FP_BACKFILL": 2, "FP_DEAD": 2}}},
		"subscriber": {args: "--subscriber 12", left: 1, want: erasure{Records: 3, Events: 3,
			Streams: map[string]int{"FP_INGEST": 2, "FP_ENRICHED": 2, "FP_BACKFILL": 4, "FP_DEAD": 2}}},
		"user of another subscriber": {args: "--subscriber 13 --user-id " + email, left: 14},
		"nobody":                     {args: "--user-id nobody@example.com", left: 14},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBench(t)
			b.plant()
			line := append(strings.Fields("erase --json "), strings.Fields(c.args)...)
			if c.want.Streams == nil {
				c.want.Streams = map[string]int{}
			}
			before := len(b.holds(email))
			if before != 14 || onDisk(t, email) == 0 {
				t.Fatalf("planted in %d places", before)
			}
			var all strings.Builder
			for _, dry := range []bool{true, false} {
				if dry {
					line = append(line, "--dry-run")
				} else {
					line = line[:len(line)-1]
				}
				code, out, errs := b.answer(c.stdin, line...)
				all.WriteString(out + errs)
				var got erasure
				if err := json.Unmarshal([]byte(out), &got); err != nil {
					t.Fatalf("exit %d, %v, %s", code, err, errs)
				}
				if (code == exitNone) != (c.want.Records == 0) || code != exitNone && code != exitDone || fmt.Sprint(got.Streams, got.Records, got.Events, got.Left) != fmt.Sprint(c.want.Streams, c.want.Records, c.want.Events, "") {
					t.Errorf("exit %d, %s%s", code, out, errs)
				}
				if n := len(b.holds(email)); dry && n != before || !dry && n != c.left {
					t.Errorf("dry run %v: still in %v", dry, b.holds(email))
				}
			}
			// What is left on disk is the neighbour's, whose id has the planted
			// text in it.
			if c.left == 6 && onDisk(t, `"`+email) != 0 {
				t.Errorf("still in %d files", onDisk(t, `"`+email))
			}
			if _, out, _ := b.run("audit"); c.left != 14 && !strings.Contains(out, "erase  done") || strings.Contains(out+all.String(), email) {
				t.Errorf("%s\n%s", out, all.String())
			}
			for id, want := range map[string]string{"mine": "erased", "orphan": "erased", "neighbour": "ready"} {
				if c.args == "--subscriber 12" {
					want = "erased"
				}
				if c.left == 14 {
					want = "ready"
				}
				code, out, errs := b.run("trace", id, "--json")
				if code != exitDone || !strings.Contains(out, `"place":"`+want+`"`) {
					t.Errorf("%s: exit %d, %s%s", id, code, out, errs)
				}
			}
		})
	}
}

// In a cluster each node knows its own keys alone. A node that does not answer
// is an error, and not a few records less.
func TestEraseOnACluster(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	nodes, url := streamstest.NewRedisCluster(t)
	b.redisURL = url
	now := time.Now()
	const each = 50
	for i := range each {
		mine, neighbour := event(fmt.Sprint("mine-", i)), event(fmt.Sprint("neighbour-", i))
		neighbour.UserID = "neighbour@example.com"
		b.record(ready(mine, now), time.Hour)
		b.record(ready(neighbour, now), time.Hour)
	}
	onNodes := func(id string) (counts []int) {
		for _, n := range nodes {
			c := redis.NewClient(&redis.Options{Addr: n.Addr})
			keys, err := c.Keys(t.Context(), record.Key(id)+"*").Result()
			c.Close()
			if err != nil {
				t.Fatal(err)
			}
			counts = append(counts, len(keys))
		}
		return counts
	}
	if n := onNodes("mine"); slices.Min(n) == 0 || n[0]+n[1]+n[2] != each {
		t.Fatalf("the nodes hold %v records", n)
	}
	erased := func(args ...string) (int, erasure) {
		code, out, errs := b.run(append([]string{"erase", "--user-id", email, "--json"}, args...)...)
		var got erasure
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("exit %d, %v, %s", code, err, errs)
		}
		return code, got
	}
	if code, got := erased("--dry-run"); code != exitDone || got.Records != each || got.Events != each {
		t.Errorf("dry run: exit %d, %+v", code, got)
	}
	nodes[2].Freeze()
	if code, out, errs := b.run("erase", "--user-id", email, "--json", "--dry-run"); code != exitFailed || out != "" || !strings.Contains(errs, "cluster") {
		t.Errorf("with a node frozen: exit %d, %s%s", code, out, errs)
	}
	nodes[2].Thaw()
	streamstest.Eventually(t, "the cluster to be whole again", func() bool {
		code, _, _ := b.run("erase", "--user-id", email, "--dry-run")
		return code == exitDone
	})
	if code, got := erased(); code != exitDone || got.Records != each || got.Events != each || got.Left != "" {
		t.Errorf("exit %d, %+v", code, got)
	}
	if mine, neighbour := onNodes("mine"), onNodes("neighbour"); slices.Max(mine) != 0 || neighbour[0]+neighbour[1]+neighbour[2] != each {
		t.Errorf("the nodes hold %v of the user's records and %v of the neighbour's", mine, neighbour)
	}
}

// An event in a stage's hands when its message is erased still comes out of
// the stage: the next pass waits for it.
func TestEraseFindsWhatWasInFlight(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	b.put(streams.IngestSubject(12), nil, event("mine"))
	next := func(stream, durable string) jetstream.Msg {
		c, err := b.js.Consumer(t.Context(), stream, durable)
		if err != nil {
			t.Fatal(err)
		}
		m, err := c.Next(jetstream.FetchMaxWait(10 * time.Second))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	inHand := next(streams.StreamIngest, streams.DurablePrefetcher)
	var code int
	var out, errs string
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		code, out, errs = b.run("erase", "--user-id", email, "--json")
	}()
	b.record(ready(event("other"), now), time.Hour)
	streamstest.Eventually(t, "the first pass", func() bool { return len(b.holds("other")) == 0 })
	b.put(streams.EnrichedSubject(12), nil, ready(event("mine"), now))
	late := next(streams.StreamEnriched, streams.DurablePersister)
	if err := inHand.DoubleAck(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.record(ready(event("mine"), now), time.Hour)
	if err := late.DoubleAck(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-ended
	var r erasure
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitDone || r.Records != 2 || r.Streams["FP_ENRICHED"] != 1 {
		t.Errorf("exit %d, %v, %s%s", code, err, out, errs)
	}
	if places := b.holds(email); len(places) != 0 {
		t.Error(places)
	}
}

// What does not settle is said, and is no success.
func TestEraseSaysWhatDoesNotSettle(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.put(streams.IngestSubject(12), nil, event("mine"))
	c, err := b.js.Consumer(t.Context(), streams.StreamIngest, streams.DurablePrefetcher)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Next(); err != nil {
		t.Fatal(err)
	}
	code, out, errs := b.run("erase", "--user-id", email, "--wait", "1ms")
	if code != exitLeft || !strings.Contains(out, "NOT FINISHED: prefetcher still") || strings.Contains(out+errs, email) {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	for _, args := range []string{"erase", "erase --subscriber -1", "erase x", "erase --user-id -"} {
		if code, _, errs := b.run(strings.Fields(args)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, errs)
		}
	}
}

// Every verb that changes or reveals something leaves who, what, when and how
// it ended, in a stream that nobody can delete from.
func TestAudit(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.put(streams.EnrichedSubject(12), nil, ready(event("a"), time.Now()))
	b.put(streams.DeadSubject(streams.StagePersister, 12), nats.Header{streams.HeaderDeadReason: {"poison"}}, ready(event("a"), time.Now()))
	if code, out, _ := b.run("audit"); code != exitNone {
		t.Errorf("exit %d, %s", code, out)
	}
	for _, line := range []string{
		"status", "dead list", "dead show 1", "replay --stage persister --since 1h --dry-run", // leave nothing
		"replay --stage persister --since 1h --no-wait",
		"dead show 1 --reveal",
		"dead redrive --all --no-wait",
		"pause persister --for 1h",
		"resume persister",
		"erase --user-id nobody@example.com --yes",
	} {
		b.run(strings.Fields(line)...)
	}
	code, out, errs := b.run("audit", "--since", "1h", "--json")
	var found []auditEntry
	if err := json.Unmarshal([]byte(out), &found); err != nil || code != exitDone {
		t.Fatalf("exit %d, %v, %s", code, err, errs)
	}
	var got []string
	for _, a := range found {
		got = append(got, a.Verb+" "+a.Outcome)
		if slices.Contains(a.Arguments, "--since ") {
			t.Errorf("since when is not kept: %v", a.Arguments)
		}
		if a.OSUser == "" || a.Host == "" || time.Since(a.At) > time.Minute || len(a.Arguments) == 0 {
			t.Errorf("%+v", a)
		}
	}
	if want := "replay done, dead show done, dead redrive done, pause done, resume done, erase nothing_matched"; strings.Join(got, ", ") != want {
		t.Errorf("%s\nwant %s", strings.Join(got, ", "), want)
	}
	if strings.Contains(out, "nobody@example.com") {
		t.Error("the audit holds a user id")
	}
	if code, out, _ := b.run("audit", "--verb", "pause"); code != exitDone || !strings.Contains(out, "    persister --for 1h0m0s\n") {
		t.Errorf("exit %d, %s", code, out)
	}
	s, err := b.js.Stream(t.Context(), streams.StreamAudit)
	if err != nil {
		t.Fatal(err)
	}
	if s.DeleteMsg(t.Context(), 1) == nil || s.Purge(t.Context()) == nil {
		t.Error("evidence can be deleted")
	}
}

func TestPause(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	until := time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	if code, out, errs := b.run("pause", "persister", "--until", until.Format(time.RFC3339)); code != exitDone || !strings.Contains(out, until.Format(time.RFC3339)) {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	if code, out, _ := b.run("status"); code != exitDone || !strings.Contains(out, "paused") {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, out, _ := b.run("apply"); code != exitDone || !strings.Contains(out, "nothing to change") {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, out, errs := b.run("resume", "persister", "--json"); code != exitDone || !strings.Contains(out, `"paused":false`) {
		t.Errorf("exit %d, %s%s", code, out, errs)
	}
	if _, out, _ := b.run("status"); strings.Contains(out, "paused") {
		t.Error(out)
	}
	for _, args := range []string{"pause", "pause nobody --for 1h", "pause persister", "pause persister --for 1h --until 1h", "pause persister --for -1h",
		"pause persister --until 2020-01-01T00:00:00Z", "resume", "resume nobody", "resume persister persister"} {
		if code, _, errs := b.run(strings.Fields(args)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, errs)
		}
	}
}
