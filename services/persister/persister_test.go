package persister

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

func client(t testing.TB, url string) redis.UniversalClient {
	t.Helper()
	rdb, err := redisclient.New(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rdb.Close() })
	return rdb
}

// base is when the events of these tests were accepted, give or take.
var base = time.Now().Add(-time.Minute).Truncate(time.Millisecond)

func rec(id string, subscriber int64, status record.Status, at time.Duration) record.Record {
	r := record.Record{
		Schema: 1, Status: status, AcceptedAt: record.At(base.Add(at)), SubscriberID: subscriber,
		RequestID: id, SessionID: "DEV-SESSION-XYZ", UserID: "user@example.com",
	}
	switch status {
	case record.Ready:
		r.Signals, r.Source, r.Event = &record.Signals{}, record.SourceAPI, json.RawMessage(`{"event_id":"`+id+`"}`)
	case record.NotFound:
		r.Reason = record.EventNotFound
	case record.Failed:
		r.Reason = record.UpstreamUnavailable
	}
	return r
}

func put(t testing.TB, s *store, r record.Record) outcome {
	t.Helper()
	body, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	w := &write{rec: r, body: body}
	s.put(t.Context(), time.Now(), []*write{w})
	if w.err != nil {
		t.Fatal(w.err)
	}
	return w.outcome
}

// Promise 5: ready is never replaced by less, among the rest an older event
// never replaces a newer one, and another subscriber's record is not touched.
func TestGuardDecides(t *testing.T) {
	t.Parallel()
	rdb := client(t, streamstest.NewRedis(t).URL())
	s := newStore(rdb, time.Hour)
	tests := map[string]struct {
		have, put record.Record
		want      outcome
	}{
		"pending then ready":                  {rec("", 1, record.Pending, 0), rec("", 1, record.Ready, 0), written},
		"pending then negative, same event":   {rec("", 1, record.Pending, 0), rec("", 1, record.NotFound, 0), written},
		"negative then pending, same event":   {rec("", 1, record.NotFound, 0), rec("", 1, record.Pending, 0), superseded},
		"negative then newer pending":         {rec("", 1, record.NotFound, 0), rec("", 1, record.Pending, 1), written},
		"newer pending then older negative":   {rec("", 1, record.Pending, 1), rec("", 1, record.Failed, 0), superseded},
		"ready then newer pending":            {rec("", 1, record.Ready, 0), rec("", 1, record.Pending, 1), superseded},
		"ready then newer negative":           {rec("", 1, record.Ready, 0), rec("", 1, record.Failed, 1), superseded},
		"ready then newer ready":              {rec("", 1, record.Ready, 0), rec("", 1, record.Ready, 1), written},
		"ready then equal ready":              {rec("", 1, record.Ready, 0), rec("", 1, record.Ready, 0), written},
		"ready then older ready":              {rec("", 1, record.Ready, 1), rec("", 1, record.Ready, 0), superseded},
		"newer negative then older ready":     {rec("", 1, record.Failed, 1), rec("", 1, record.Ready, 0), written},
		"another subscriber's pending":        {rec("", 1, record.Pending, 0), rec("", 2, record.Ready, 1), foreign},
		"another subscriber's, number prefix": {rec("", 1, record.Pending, 0), rec("", 12, record.Ready, 1), foreign},
		"a nanosecond counts":                 {rec("", 1, record.Pending, time.Nanosecond), rec("", 1, record.Pending, 0), superseded},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			id := strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), ",", "")
			tt.have.RequestID, tt.put.RequestID = id, id
			put(t, s, tt.have)
			if got := put(t, s, tt.put); got != tt.want {
				t.Errorf("got %s, want %s", got, tt.want)
			}
			want := tt.have
			if tt.want == written {
				want = tt.put
			}
			body, err := rdb.Get(t.Context(), record.Key(id)).Bytes()
			if err != nil {
				t.Fatal(err)
			}
			if got, err := record.Decode(body); err != nil || got.Status != want.Status || got.SubscriberID != want.SubscriberID || !got.AcceptedAt.Equal(want.AcceptedAt.Time) {
				t.Errorf("stored %s of %d, want %s of %d (%v)", got.Status, got.SubscriberID, want.Status, want.SubscriberID, err)
			}
		})
	}
}

func TestExpiryCountsFromAcceptance(t *testing.T) {
	t.Parallel()
	rdb := client(t, streamstest.NewRedis(t).URL())
	s := newStore(rdb, time.Hour)
	r := rec("id", 1, record.Ready, 0)
	put(t, s, r)
	ttl, err := rdb.PExpireTime(t.Context(), record.Key("id")).Result()
	if err != nil {
		t.Fatal(err)
	}
	if want := r.AcceptedAt.Add(time.Hour).UnixMilli(); ttl.Milliseconds() != want {
		t.Errorf("expires at %d, want %d", ttl.Milliseconds(), want)
	}
	if got := put(t, s, rec("stale", 1, record.Ready, -2*time.Hour)); got != expired {
		t.Errorf("a record past its life is %s", got)
	}
	if n := rdb.Exists(t.Context(), record.Key("stale")).Val(); n != 0 {
		t.Error("a replay revived a stale record")
	}
}

func TestGuardLeavesForeignDataAlone(t *testing.T) {
	t.Parallel()
	rdb := client(t, streamstest.NewRedis(t).URL())
	s := newStore(rdb, time.Hour)
	rdb.Set(t.Context(), record.Key("text"), "not a record", 0)
	rdb.HSet(t.Context(), record.Key("hash"), "a", "b")
	for _, id := range []string{"text", "hash"} {
		if got := put(t, s, rec(id, 1, record.Ready, 0)); got != unreadable {
			t.Errorf("%s: %s, want unreadable", id, got)
		}
	}
}

// running is a persister on real servers.
type running struct {
	t     *testing.T
	nats  *streamstest.NATS
	redis *streamstest.Redis
	conn  *streams.Conn
	pub   *streams.Publisher
	rdb   redis.UniversalClient
	proc  *ops.Process
}

// start runs a persister; settings are further NAME=value.
func start(t *testing.T, rds *streamstest.Redis, settings ...string) *running {
	t.Helper()
	n := streamstest.NewNATS(t)
	c := n.Connect("test")
	r := &running{
		t: t, nats: n, redis: rds, conn: c, pub: streams.NewPublisher(c.JS, prometheus.NewRegistry()),
		rdb: client(t, rds.URL()), proc: ops.NewProcessLogger("persister", streamstest.Logger(t)),
	}
	env := map[string]string{"NATS_URL": n.URL, "REDIS_URL": rds.URL()}
	for _, s := range settings {
		name, value, _ := strings.Cut(s, "=")
		env[name] = value
	}
	cfg := ReadConfig(ops.NewSettings(func(name string) string { return env[name] }))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, r.proc) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *running) enriched(recs ...record.Record) {
	r.t.Helper()
	for _, rec := range recs {
		body, err := rec.Encode()
		if err != nil {
			r.t.Fatal(err)
		}
		r.publish(streams.StreamEnriched, streams.EnrichedSubject(rec.SubscriberID), streams.DerivedMessageID(rec, ""), body)
	}
}

func (r *running) publish(stream, subject, id string, body []byte) {
	r.t.Helper()
	if _, err := r.pub.Publish(r.t.Context(), streams.Message{Stream: stream, Subject: subject, ID: id, Body: body}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *running) status(id string) record.Status {
	b, err := r.rdb.Get(r.t.Context(), record.Key(id)).Bytes()
	if err != nil {
		return ""
	}
	rec, err := record.Decode(b)
	if err != nil {
		r.t.Errorf("%s: %v", id, err)
	}
	return rec.Status
}

func (r *running) eventually(id string, want record.Status) {
	r.t.Helper()
	streamstest.Eventually(r.t, fmt.Sprintf("%s to be %s", id, want), func() bool { return r.status(id) == want })
}

// right waits until Redis holds these records, to the byte.
func (r *running) right(recs ...record.Record) {
	r.t.Helper()
	for _, want := range recs {
		body, err := want.Encode()
		if err != nil {
			r.t.Fatal(err)
		}
		streamstest.Eventually(r.t, "the record of "+want.RequestID, func() bool {
			got, err := r.rdb.Get(r.t.Context(), record.Key(want.RequestID)).Bytes()
			return err == nil && bytes.Equal(got, body)
		})
	}
}

// message returns what FP_ENRICHED has under a sequence.
func (r *running) message(seq int) *jetstream.RawStreamMsg {
	r.t.Helper()
	st, err := r.conn.JS.Stream(r.t.Context(), streams.StreamEnriched)
	if err != nil {
		r.t.Fatal(err)
	}
	m, err := st.GetMsg(r.t.Context(), uint64(seq))
	if err != nil {
		r.t.Fatal(err)
	}
	return m
}

func (r *running) deadReasons() []string {
	r.t.Helper()
	st, err := r.conn.JS.Stream(r.t.Context(), streams.StreamDead)
	if err != nil {
		r.t.Fatal(err)
	}
	var reasons []string
	for seq := uint64(1); seq <= st.CachedInfo().State.LastSeq; seq++ {
		m, err := st.GetMsg(r.t.Context(), seq)
		if err != nil {
			r.t.Fatal(err)
		}
		reasons = append(reasons, m.Header.Get(streams.HeaderDeadReason))
	}
	slices.Sort(reasons)
	return reasons
}

func (r *running) settled() {
	r.t.Helper()
	streamstest.Eventually(r.t, "everything acknowledged", func() bool {
		l, err := streams.ReadLag(r.t.Context(), r.conn.JS, streams.StreamEnriched, streams.DurablePersister)
		return err == nil && l.Messages() == 0
	})
}

func TestPersisterWritesPendingThenReady(t *testing.T) {
	t.Parallel()
	r := start(t, streamstest.NewRedis(t))
	e := streams.Event{Schema: 1, RequestID: "1A2B3C4D5E", SubscriberID: 12, SessionID: "DEV-SESSION-XYZ", UserID: "user@example.com"}
	body, _ := json.Marshal(e)
	r.publish(streams.StreamIngest, streams.IngestSubject(12), e.MessageID(), body)
	r.eventually("1A2B3C4D5E", record.Pending)
	r.enriched(rec("1A2B3C4D5E", 12, record.Ready, time.Hour))
	r.eventually("1A2B3C4D5E", record.Ready)
}

// A bad message costs only itself.
func TestPersisterIsolatesPoison(t *testing.T) {
	t.Parallel()
	r := start(t, streamstest.NewRedis(t))
	r.enriched(rec("mine", 1, record.Ready, 0))
	r.eventually("mine", record.Ready)
	r.publish(streams.StreamEnriched, streams.EnrichedSubject(1), "a", []byte(`{"not":"a record"`))
	r.enriched(rec("mine", 2, record.Ready, 0), rec("other", 2, record.Ready, 0))
	r.publish(streams.StreamEnriched, streams.EnrichedSubject(1), "b", []byte(`{"schema":1,"status":"pending","accepted_at":"2026-01-01T00:00:00Z","subscriber_id":1,"request_id":"x"}`))
	r.eventually("other", record.Ready)
	r.settled()
	if got, want := fmt.Sprint(r.deadReasons()), "[foreign_subscriber undecodable undecodable]"; got != want {
		t.Errorf("dead letters %v, want %v", got, want)
	}
}

// A message of a newer version waits for a newer replica.
func TestPersisterLeavesNewerSchemaAlone(t *testing.T) {
	t.Parallel()
	r := start(t, streamstest.NewRedis(t))
	newer := rec("newer", 1, record.Ready, 0)
	newer.Schema = record.Schema + 1
	r.enriched(newer, rec("now", 1, record.Ready, 0))
	r.eventually("now", record.Ready)
	streamstest.Eventually(t, "the newer one alone to be unfinished", func() bool {
		l, err := streams.ReadLag(t.Context(), r.conn.JS, streams.StreamEnriched, streams.DurablePersister)
		return err == nil && l.Messages() == 1
	})
	if got := r.deadReasons(); len(got) != 0 {
		t.Errorf("dead letters %v", got)
	}
}

// Promise 3 for Redis: each fault holds the stage, dead-letters nothing, and
// is recovered from without help.
func TestRedisFaultHoldsAndRecovers(t *testing.T) {
	t.Parallel()
	faults := map[string]struct{ begin, end func(*running) }{
		"killed": {
			func(r *running) { r.redis.Kill() },
			func(r *running) { r.redis.Start() },
		},
		"hung": {
			func(r *running) { r.redis.Freeze() },
			func(r *running) { r.redis.Thaw() },
		},
		"out of memory": {
			func(r *running) { r.rdb.ConfigSet(r.t.Context(), "maxmemory", "1") },
			func(r *running) { r.rdb.ConfigSet(r.t.Context(), "maxmemory", "0") },
		},
		"a read-only replica": {
			func(r *running) { r.rdb.SlaveOf(r.t.Context(), "127.0.0.1", "1") },
			func(r *running) { r.rdb.SlaveOf(r.t.Context(), "NO", "ONE") },
		},
		"scripts flushed": {
			func(r *running) { r.rdb.ScriptFlush(r.t.Context()) },
			func(*running) {},
		},
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, streamstest.NewRedis(t))
			r.enriched(rec("before", 1, record.Ready, 0))
			r.eventually("before", record.Ready)
			fault.begin(r)
			var during []record.Record
			for i := range 50 {
				during = append(during, rec(fmt.Sprint("during-", i), 1, record.Ready, 0))
			}
			r.enriched(during...)
			if name != "scripts flushed" {
				streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
			}
			fault.end(r)
			for _, d := range during {
				r.eventually(d.RequestID, record.Ready)
			}
			r.settled()
			if got := r.deadReasons(); len(got) != 0 {
				t.Errorf("dead letters %v", got)
			}
			streamstest.Eventually(t, "ready again", func() bool { return r.proc.Health.Err() == nil })
		})
	}
}

// Redis hangs for longer than AckWait while events keep coming. What is in hand
// is kept alive, so that nothing is even delivered twice.
func TestRedisFrozenPastAckWait(t *testing.T) {
	t.Parallel()
	r := start(t, streamstest.NewRedis(t))
	var all []record.Record
	publish := func() {
		status := []record.Status{record.Ready, record.NotFound, record.Failed}[len(all)%3]
		next := rec(fmt.Sprint("id-", len(all)), 1, status, 0)
		r.enriched(next)
		all = append(all, next)
	}
	for range 100 {
		publish()
	}
	r.right(all...)
	r.redis.Freeze()
	pace := time.NewTicker(20 * time.Millisecond)
	defer pace.Stop()
	for since := time.Now(); time.Since(since) < streams.AckWait+2*time.Second; <-pace.C {
		publish()
	}
	if err := r.proc.Health.Err(); !holding(r) || err == nil || !strings.Contains(err.Error(), "redis") {
		t.Errorf("holds %v, readiness says %v", holding(r), err)
	}
	r.redis.Thaw()
	since := time.Now()
	r.right(all...)
	took := time.Since(since)
	if took > 20*time.Second {
		t.Errorf("all records are there %v after Redis went on", took)
	}
	r.settled()
	if got := r.deadReasons(); len(got) != 0 {
		t.Errorf("dead letters %v", got)
	}
	c, err := r.conn.JS.Consumer(t.Context(), streams.StreamEnriched, streams.DurablePersister)
	if err != nil {
		t.Fatal(err)
	}
	if n := c.CachedInfo().Delivered.Consumer; n != uint64(len(all)) {
		t.Errorf("%d deliveries of %d messages", n, len(all))
	}
	streamstest.Eventually(t, "ready again", func() bool { return r.proc.Health.Err() == nil })
	t.Logf("the records of %d events were there after %v", len(all), took)
}

func holding(r *running) bool {
	families, err := r.proc.Registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "fp_stage_holding" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetGauge().GetValue() == 1 {
				return true
			}
		}
	}
	return false
}

// Promise 8: the persister starts with Redis down, says so, and works as soon
// as it is there.
func TestPersisterStartsBeforeRedis(t *testing.T) {
	t.Parallel()
	rds := streamstest.NewRedis(t)
	rds.Kill()
	r := start(t, rds)
	r.enriched(rec("early", 1, record.Ready, 0))
	streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
	if err := r.proc.Health.Err(); err == nil || !strings.Contains(err.Error(), "redis") {
		t.Errorf("readiness says %v", err)
	}
	rds.Start()
	r.eventually("early", record.Ready)
}

// BenchmarkPut is one batch of 256 records of 4.4 KB, guarded, against a real
// redis-server; the bare pipeline of SETs of the same size is the yardstick.
func BenchmarkPut(b *testing.B) {
	rdb := client(b, streamstest.NewRedis(b).URL())
	s := newStore(rdb, time.Hour)
	event, err := json.Marshal(map[string]string{"event_id": "x", "pad": strings.Repeat("abcdefgh", 500)})
	if err != nil {
		b.Fatal(err)
	}
	const batch = 256
	records := make([]*write, batch)
	for i := range records {
		r := rec(fmt.Sprint("bench-", i), 1, record.Ready, 0)
		r.Event = event
		body, err := r.Encode()
		if err != nil {
			b.Fatal(err)
		}
		records[i] = &write{rec: r, body: body}
	}
	b.Run("guarded", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.put(b.Context(), time.Now(), records)
			if records[0].err != nil {
				b.Fatal(records[0].err)
			}
		}
		b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "records/s")
	})
	b.Run("bare SET", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			pipe := rdb.Pipeline()
			for _, w := range records {
				pipe.Set(b.Context(), record.Key(w.rec.RequestID), w.body, time.Hour)
			}
			if _, err := pipe.Exec(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.N*batch)/b.Elapsed().Seconds(), "records/s")
	})
}

// BenchmarkPrepare is what a record costs between the stream and the pipeline.
func BenchmarkPrepare(b *testing.B) {
	event := []byte(`{"event_id":"x","pad":"` + strings.Repeat("abcdefgh", 450) + `","raw_device_attributes":{"pad":"` + strings.Repeat("abcdefgh", 250) + `"}}`)
	r := rec("bench", 1, record.Ready, 0)
	r.Event = event
	body, err := r.Encode()
	if err != nil {
		b.Fatal(err)
	}
	h := &handler{detail: EventLean, metrics: newMetrics(prometheus.NewRegistry()), now: time.Now}
	d := &streams.Delivery{Data: body}
	b.ReportAllocs()
	b.SetBytes(int64(len(body)))
	for b.Loop() {
		if w, _ := h.decode(d); w == nil {
			b.Fatal("not a record")
		}
	}
}
