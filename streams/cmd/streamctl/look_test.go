package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

const email = "planted@example.com"

// bench is a server, a Redis and the ways to put things there.
type bench struct {
	t        *testing.T
	n        *streamstest.NATS
	conn     *streams.Conn
	js       jetstream.JetStream
	redisURL string
}

func newBench(t *testing.T) *bench {
	t.Helper()
	n := streamstest.NewNATS(t)
	conn := n.Connect("test")
	return &bench{t, n, conn, conn.JS, streamstest.NewRedis(t).URL()}
}

func (b *bench) run(args ...string) (code int, stdout, stderr string) {
	b.t.Helper()
	return b.answer("", args...)
}

// answer runs streamctl with something to read.
func (b *bench) answer(stdin string, args ...string) (code int, stdout, stderr string) {
	b.t.Helper()
	var out, errs bytes.Buffer
	env := map[string]string{"NATS_URL": b.n.URL, "REDIS_URL": b.redisURL}
	code = run(b.t.Context(), args, func(name string) string { return env[name] }, strings.NewReader(stdin), &out, &errs)
	return code, out.String(), errs.String()
}

func event(id string) streams.Event {
	return streams.Event{Schema: streams.EventSchema, RequestID: id, SubscriberID: 12, SessionID: "s", UserID: email}
}

func (b *bench) put(subject string, h nats.Header, body any) uint64 {
	b.t.Helper()
	data, err := json.Marshal(body)
	if err != nil {
		b.t.Fatal(err)
	}
	ack, err := b.js.PublishMsg(b.t.Context(), &nats.Msg{Subject: subject, Header: h, Data: data})
	if err != nil {
		b.t.Fatal(err)
	}
	return ack.Sequence
}

func ready(e streams.Event, at time.Time) record.Record {
	r := streams.NewRecord(e, at, record.Ready, "")
	r.Signals, r.Checks, r.Event = &record.Signals{}, &record.Checks{}, json.RawMessage(`{}`)
	return r
}

// work acks whatever comes to a durable until the test ends, as a stage that is
// there does.
func (b *bench) work(stream, durable string) {
	var working sync.WaitGroup
	ctx, cancel := context.WithCancel(b.t.Context())
	working.Go(func() {
		for ctx.Err() == nil {
			c, err := b.js.Consumer(ctx, stream, durable)
			if err != nil {
				continue // the server is away
			}
			m, err := c.Next(jetstream.FetchMaxWait(time.Second))
			if err == nil {
				_ = m.Ack() // else it comes again
			}
		}
	})
	b.t.Cleanup(func() { cancel(); working.Wait() })
}

// finish acks everything a durable has.
func (b *bench) finish(stream, durable string, n int) {
	b.t.Helper()
	c, err := b.js.Consumer(b.t.Context(), stream, durable)
	if err != nil {
		b.t.Fatal(err)
	}
	for range n {
		m, err := c.Next(jetstream.FetchMaxWait(10 * time.Second))
		if err != nil {
			b.t.Fatal(err)
		}
		if err := m.DoubleAck(b.t.Context()); err != nil {
			b.t.Fatal(err)
		}
	}
}

func (b *bench) record(r record.Record, ttl time.Duration) {
	b.t.Helper()
	c, err := redisclient.New(b.redisURL)
	if err != nil {
		b.t.Fatal(err)
	}
	defer c.Close()
	data, err := json.Marshal(r)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := c.Set(b.t.Context(), record.Key(r.RequestID), data, ttl).Err(); err != nil {
		b.t.Fatal(err)
	}
}

func TestStatus(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.put(streams.IngestSubject(12), nil, event("a"))
	b.put(streams.IngestSubject(12), nil, event("b"))
	b.finish(streams.StreamIngest, streams.DurablePrefetcher, 1)
	code, out, errs := b.run("status", "--json")
	var r statusReport
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != exitDone {
		t.Fatalf("exit %d, %v, %s", code, err, errs)
	}
	if len(r.Streams) != 5 || r.Streams[0].Messages != 2 || r.Streams[0].First.IsZero() || !r.Streams[3].First.IsZero() {
		t.Errorf("%+v", r.Streams)
	}
	d := r.Durables[0]
	if len(r.Durables) != 5 || d.Durable != streams.DurablePrefetcher || d.Pending != 1 || d.OldestSeconds <= 0 || d.State != "idle" || r.Durables[2].State != "done" {
		t.Errorf("%+v", r.Durables)
	}
	code, out, _ = b.run("status")
	if code != exitDone || !strings.Contains(out, "FP_ENRICHED") {
		t.Errorf("exit %d\n%s", code, out)
	}
	for line := range strings.Lines(out) {
		if len(line) > 81 {
			t.Errorf("wider than 80 columns: %s", line)
		}
	}
}

func TestTraceInEveryPlace(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	now := time.Now()
	old := nats.Header{streams.HeaderAcceptedAt: {now.Add(-30 * time.Hour).Format(time.RFC3339Nano)}}
	for _, id := range []string{"ready", "negative", "gone"} {
		b.put(streams.IngestSubject(12), nil, event(id))
	}
	b.finish(streams.StreamIngest, streams.DurablePrefetcher, 3)
	b.put(streams.IngestSubject(12), nil, event("waiting"))
	b.put(streams.BackfillSubject(streams.StagePrefetcher, 12), nil, event("moved"))
	dead := nats.Header{streams.HeaderDeadReason: {"poison"}}
	b.put(streams.DeadSubject(streams.StagePrefetcher, 12), dead, event("dead"))
	for _, r := range []record.Record{
		ready(event("ready"), now),
		streams.NewRecord(event("negative"), now, record.NotFound, record.EventNotFound),
		ready(event("gone"), now),
	} {
		b.put(streams.EnrichedSubject(12), nil, r)
		if r.RequestID != "gone" {
			b.record(r, time.Hour)
		}
	}
	b.put(streams.EnrichedSubject(12), old, ready(event("expired"), now.Add(-30*time.Hour)))
	b.finish(streams.StreamEnriched, streams.DurablePersister, 4)
	for id, want := range map[string]string{
		"ready": "ready", "negative": "not_found", "gone": "finished", "waiting": "waiting", "moved": "waiting",
		"dead": "dead", "expired": "expired", "nobody": "not_found_anywhere",
	} {
		code, out, errs := b.run("trace", id, "--json")
		var r traceReport
		if err := json.Unmarshal([]byte(out), &r); err != nil {
			t.Fatalf("%s: exit %d, %v, %s", id, code, err, errs)
		}
		if r.Place != want || (code == exitNone) != (want == "not_found_anywhere") || (r.TTLSeconds > 0) != (id == "ready" || id == "negative") {
			t.Errorf("%s: exit %d, %s", id, code, out)
		}
		if strings.Contains(out, email) {
			t.Errorf("%s: personal data in %s", id, out)
		}
	}
	if code, out, _ := b.run("trace", "ready"); code != exitDone || !strings.Contains(out, "FP_ENRICHED") {
		t.Errorf("exit %d\n%s", code, out)
	}
	if code, out, _ := b.run("trace", "--since", "1ns", "waiting"); code != exitNone || !strings.Contains(out, "looked from") {
		t.Errorf("exit %d\n%s", code, out)
	}
}

// FP_DEAD keeps longer than the other streams, so what was given up days ago is
// found there all the same.
func TestTraceLooksAtAllDeadLetters(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	b.put(streams.IngestSubject(12), nil, event("a"))
	b.put(streams.DeadSubject(streams.StagePrefetcher, 12), nats.Header{streams.HeaderDeadReason: {"poison"}}, event("a"))
	// As if both had been stored before the 72 hours.
	r := newTrace("a", time.Time{})
	if back := time.Since(r.Since); back < 72*time.Hour || back > 73*time.Hour {
		t.Errorf("looks %v back", back)
	}
	r.Since = time.Now().Add(time.Minute)
	if err := r.read(t.Context(), b.conn, nil, time.Hour); err != nil {
		t.Fatal(err)
	}
	if r.Place != "dead" || len(r.Steps) != 1 {
		t.Errorf("%+v", r)
	}
	const whole = "and at all of FP_DEAD"
	own := fmt.Sprint(time.Now().Add(-time.Hour).UnixMilli(), ".NLOjmg")
	for args, want := range map[string]bool{"a": true, "a --since 1h": false, own: false} {
		_, text, _ := b.run(append([]string{"trace"}, strings.Fields(args)...)...)
		_, asJSON, _ := b.run(append([]string{"trace", "--json"}, strings.Fields(args)...)...)
		if strings.Contains(text, whole) != want || strings.Contains(asJSON, `"whole_dead":true`) != want {
			t.Errorf("%s: %s%s", args, text, asJSON)
		}
	}
}

func TestDead(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	if code, out, _ := b.run("dead", "list"); code != exitNone || !strings.Contains(out, "no dead letter") {
		t.Errorf("exit %d, %s", code, out)
	}
	letter := func(stage, reason, id string) {
		h := nats.Header{streams.HeaderDeadReason: {reason}, streams.HeaderDeadStage: {stage}}
		b.put(streams.DeadSubject(stage, 12), h, event(id))
	}
	letter(streams.StagePrefetcher, "exhausted", "one")
	letter(streams.StagePrefetcher, "poison", "two")
	letter(streams.StagePersister, "poison", "three")
	for args, want := range map[string]string{
		"":                                     "one two three",
		"--stage prefetcher":                   "one two",
		"--reason poison":                      "two three",
		"--reason poison --stage persister":    "three",
		"--subscriber 13":                      "",
		"--since 1h --subscriber 12":           "one two three",
		"--since 1ns":                          "",
		"--stage persister --reason exhausted": "",
	} {
		code, out, errs := b.run(append([]string{"dead", "list", "--json"}, strings.Fields(args)...)...)
		var got []deadLetter
		if err := json.Unmarshal([]byte(out), &got); err != nil {
			t.Fatalf("%s: exit %d, %v, %s", args, code, err, errs)
		}
		var ids []string
		for _, d := range got {
			ids = append(ids, d.RequestID)
		}
		if s := strings.Join(ids, " "); s != want || (code == exitNone) != (want == "") {
			t.Errorf("%s: exit %d, %s", args, code, s)
		}
	}
	if code, out, _ := b.run("dead", "show", "2"); code != exitDone || !strings.Contains(out, `"two"`) || strings.Contains(out, email) {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, out, _ := b.run("dead", "show", "2", "--reveal"); code != exitDone || !strings.Contains(out, email) {
		t.Errorf("exit %d, %s", code, out)
	}
	if code, _, _ := b.run("dead", "show", "9"); code != exitNone {
		t.Errorf("exit %d", code)
	}
	for _, args := range []string{"dead", "dead show", "dead show x", "dead list 1", "dead list --stage x", "dead list --reason x", "dead purge", "dead redrive", "dead purge x", "dead list --all", "trace", "trace a b", "trace .."} {
		if code, _, errs := b.run(strings.Fields(args)...); code != exitUsage {
			t.Errorf("%s: exit %d, %s", args, code, errs)
		}
	}
}

func TestFindSpan(t *testing.T) {
	t.Parallel()
	b := newBench(t)
	for i := range 20 {
		b.put(streams.IngestSubject(12), nil, event(fmt.Sprint("e", i)))
	}
	s, err := b.js.Stream(t.Context(), streams.StreamIngest)
	if err != nil {
		t.Fatal(err)
	}
	for _, seq := range []uint64{1, 2, 9, 20} { // holes
		if err := s.DeleteMsg(t.Context(), seq); err != nil {
			t.Fatal(err)
		}
	}
	at := func(seq uint64) time.Time {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		return m.Time
	}
	in, err := findSpan(t.Context(), b.js, streams.StreamIngest, at(8), at(12))
	if err != nil {
		t.Fatal(err)
	}
	var seqs []uint64
	if err := scan(t.Context(), b.conn, in, "fp.ingest.12", func(m *jetstream.RawStreamMsg) error {
		seqs = append(seqs, m.Sequence)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(seqs); got != "[8 10 11 12]" {
		t.Error(got)
	}
}
