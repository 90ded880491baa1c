package streams_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// lagging is a server whose streams a test fills by hand.
type lagging struct {
	t    *testing.T
	nats *streamstest.NATS
	conn *streams.Conn
	js   jetstream.JetStream
}

func newLagging(t *testing.T) *lagging {
	t.Parallel()
	n := streamstest.NewNATS(t)
	c := n.Connect("test")
	return &lagging{t, n, c, c.JS}
}

// publish stores a message and returns when the stream says it did.
func (l *lagging) publish(stream, subject string) time.Time {
	l.t.Helper()
	ack, err := l.js.Publish(l.t.Context(), subject, []byte("x"))
	if err != nil {
		l.t.Fatal(err)
	}
	s, err := l.js.Stream(l.t.Context(), stream)
	if err != nil {
		l.t.Fatal(err)
	}
	m, err := s.GetMsg(l.t.Context(), ack.Sequence)
	if err != nil {
		l.t.Fatal(err)
	}
	return m.Time
}

// expect checks one durable's lag; the server may take a moment to account
// for acks.
func (l *lagging) expect(durable string, want streams.Lag) {
	l.t.Helper()
	var got streams.Lag
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		if got, err = streams.ReadLag(l.t.Context(), l.js, want.Stream, durable); want.Delivered == 0 { // of no interest
			got.Delivered = 0
		}
		if err == nil && got == want {
			return
		}
	}
	l.t.Fatalf("%+v, %v, want %+v", got, err, want)
}

func TestLagIsTheAgeOfTheOldestUnfinishedMessage(t *testing.T) {
	l := newLagging(t)
	var none time.Time
	lag := func(delivered, pending, inFlight uint64, oldest, undelivered time.Time) {
		t.Helper()
		l.expect("prefetcher", streams.Lag{Stream: "FP_INGEST", Durable: "prefetcher", Pending: pending, InFlight: inFlight, Oldest: oldest, Undelivered: undelivered, Delivered: delivered})
	}
	lag(0, 0, 0, none, none)
	var at [5]time.Time
	for i := range at {
		at[i] = l.publish("FP_INGEST", "fp.ingest.12")
	}
	lag(0, 5, 0, at[0], at[0])
	msgs := fetch(t, l.js, "FP_INGEST", "prefetcher", 4)
	lag(4, 1, 4, at[0], at[4])
	ack := func(i int) {
		t.Helper()
		if err := msgs[i].DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	// Out of order: the first one stays with its consumer, parked.
	ack(1)
	ack(3)
	if err := msgs[0].NakWithDelay(200 * time.Millisecond); err != nil {
		t.Fatal(err)
	}
	lag(4, 1, 2, at[0], at[4])
	ack(2)
	lag(4, 1, 1, at[0], at[4])
	msgs = fetch(t, l.js, "FP_INGEST", "prefetcher", 2) // the last one, and the first again
	lag(5, 0, 2, at[0], none)
	for i, m := range msgs {
		if md, err := m.Metadata(); err != nil {
			t.Fatal(err)
		} else if md.Sequence.Stream == 1 {
			ack(i)
			lag(5, 0, 1, at[4], none)
			ack(1 - i)
		}
	}
	lag(5, 0, 0, none, none)
	// The other durable of the stream has its own.
	l.expect("persister-pending", streams.Lag{Stream: "FP_INGEST", Durable: "persister-pending", Pending: 5, Oldest: at[0], Undelivered: at[0]})
}

// Where several durables share a stream by filter, and where messages were
// deleted in between, the oldest is the durable's own.
func TestLagWithFiltersAndGaps(t *testing.T) {
	l := newLagging(t)
	lag := func(durable string, pending uint64, oldest time.Time) {
		t.Helper()
		l.expect(durable, streams.Lag{Stream: "FP_BACKFILL", Durable: durable, Pending: pending, Oldest: oldest, Undelivered: oldest})
	}
	l.publish("FP_BACKFILL", "fp.backfill.persister.12")
	l.publish("FP_BACKFILL", "fp.backfill.persister.13")
	fetchAndAck(t, l.js, "FP_BACKFILL", "persister-backfill", 2)
	lag("persister-backfill", 0, time.Time{})
	third := l.publish("FP_BACKFILL", "fp.backfill.prefetcher.12") // sequence 3
	lag("prefetcher-backfill", 1, third)
	fourth := l.publish("FP_BACKFILL", "fp.backfill.persister.12")
	lag("persister-backfill", 1, fourth)
	fifth := l.publish("FP_BACKFILL", "fp.backfill.prefetcher.12")
	lag("prefetcher-backfill", 2, third)

	s, err := l.js.Stream(t.Context(), "FP_BACKFILL")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteMsg(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	lag("prefetcher-backfill", 1, fifth)
	if err := s.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	lag("prefetcher-backfill", 0, time.Time{})
	lag("persister-backfill", 0, time.Time{})
}

func TestLagSeconds(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 23, 9, 8, 7, 0, time.UTC)
	for name, c := range map[string]struct {
		lag  streams.Lag
		want float64
	}{
		"finished":                          {streams.Lag{}, 0},
		"pending":                           {streams.Lag{Pending: 1, Oldest: now.Add(-90 * time.Second)}, 90},
		"in flight":                         {streams.Lag{InFlight: 1, Oldest: now.Add(-1500 * time.Millisecond)}, 1.5},
		"the server's clock runs ahead":     {streams.Lag{Pending: 1, Oldest: now.Add(time.Second)}, 0},
		"finished between the two requests": {streams.Lag{Pending: 1}, 0},
	} {
		if got := c.lag.Seconds(now); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
	if n := (streams.Lag{Pending: 3, InFlight: 4}).Messages(); n != 7 {
		t.Errorf("3 pending and 4 in flight are %d", n)
	}
}

func TestLagOfWhatDoesNotExist(t *testing.T) {
	l := newLagging(t)
	for _, ref := range [][2]string{{"FP_INGEST", "nobody"}, {"FP_NONE", "prefetcher"}} {
		if lag, err := streams.ReadLag(t.Context(), l.js, ref[0], ref[1]); err == nil {
			t.Errorf("%+v", lag)
		}
	}
}

// collector runs a LagCollector over some durables until the test ends.
func (l *lagging) collector(refs ...streams.StreamRef) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	c := streams.NewLagCollector(l.js, streamstest.Logger(l.t), reg, refs...)
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { c.Run(ctx) })
	l.t.Cleanup(func() { cancel(); done.Wait() })
	return reg
}

const lastSuccess = "fp_stream_collector_last_success_timestamp_seconds"

// The age grows from scrape to scrape although nobody consumes and nothing new
// arrives, and falls to 0 when everything is finished.
func TestLagCollector(t *testing.T) {
	l := newLagging(t)
	stored := l.publish("FP_INGEST", "fp.ingest.12")
	l.publish("FP_INGEST", "fp.ingest.12")
	fetch(t, l.js, "FP_INGEST", "persister-pending", 1)
	reg := l.collector(streams.StreamRef{Stream: "FP_INGEST", Durables: []string{"prefetcher", "persister-pending"}})
	streamstest.Eventually(t, "a first reading", func() bool { _, ok := metric(t, reg, lastSuccess); return ok })
	for name, want := range map[[2]string]float64{
		{"fp_consumer_lag_messages", "prefetcher"}: 2, {"fp_consumer_ack_pending_messages", "prefetcher"}: 0,
		{"fp_consumer_lag_messages", "persister-pending"}: 1, {"fp_consumer_ack_pending_messages", "persister-pending"}: 1,
	} {
		if v := mustMetric(t, reg, name[0], name[1], "FP_INGEST"); v != want {
			t.Errorf("%v = %v, want %v", name, v, want)
		}
	}
	seconds := func() float64 { return mustMetric(t, reg, "fp_consumer_lag_seconds", "prefetcher") }
	first := seconds()
	if high := time.Since(stored).Seconds(); first <= 0 || first > high {
		t.Errorf("%v seconds, want up to %v", first, high)
	}
	streamstest.Eventually(t, "growth without consumption", func() bool { return seconds() > first+0.05 })
	if s := mustMetric(t, reg, lastSuccess); time.Since(time.UnixMilli(int64(s*1000))) > time.Minute {
		t.Errorf("last success at %v", s)
	}
	fetchAndAck(t, l.js, "FP_INGEST", "prefetcher", 2)
	streamstest.Eventually(t, "no lag", func() bool {
		return seconds() == 0 && mustMetric(t, reg, "fp_consumer_lag_messages", "prefetcher") == 0
	})
}

// A durable that does not exist has no series, which alerts can tell from a
// lag of 0; the others are read all the same.
func TestLagCollectorWithoutTheDurable(t *testing.T) {
	l := newLagging(t)
	reg := l.collector(streams.StreamRef{Stream: "FP_INGEST", Durables: []string{"nobody", "prefetcher"}}, streams.StreamRef{Stream: "FP_ENRICHED", Durables: []string{"persister"}})
	streamstest.Eventually(t, "a first reading", func() bool { _, ok := metric(t, reg, "fp_consumer_lag_messages", "persister"); return ok })
	if v, ok := metric(t, reg, "fp_consumer_lag_messages", "nobody"); ok {
		t.Errorf("a lag of %v for a durable that does not exist", v)
	}
	if v, ok := metric(t, reg, lastSuccess); ok {
		t.Errorf("complete at %v although one reading failed", v)
	}
	if err := l.js.DeleteConsumer(t.Context(), "FP_ENRICHED", "persister"); err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "its series gone", func() bool { _, ok := metric(t, reg, "fp_consumer_lag_messages", "persister"); return !ok })
	if _, ok := metric(t, reg, "fp_consumer_lag_messages", "prefetcher"); !ok {
		t.Error("the other one's series is gone too")
	}
}

// With no consumer running at all, the lag grows by one second per second.
func TestLagGrowsWithTime(t *testing.T) {
	l := newLagging(t)
	l.publish("FP_INGEST", "fp.ingest.12")
	reg := l.collector(streams.StreamRef{Stream: "FP_INGEST", Durables: []string{"prefetcher"}})
	streamstest.Eventually(t, "a first reading", func() bool { _, ok := metric(t, reg, lastSuccess); return ok })
	read := func() (float64, time.Time) {
		before := time.Now()
		v := mustMetric(t, reg, "fp_consumer_lag_seconds", "prefetcher")
		return v, before.Add(time.Since(before) / 2)
	}
	// Over more than one poll, so that a new reading does not set it back.
	from, start := read()
	polled := mustMetric(t, reg, lastSuccess)
	streamstest.Eventually(t, "another poll", func() bool { return mustMetric(t, reg, lastSuccess) > polled && time.Since(start) > 2*time.Second })
	to, end := read()
	if rate := (to - from) / end.Sub(start).Seconds(); rate < 0.95 || rate > 1.05 {
		t.Errorf("grew by %v seconds per second", rate)
	}
}

// What the age limit removes unprocessed is counted, per durable, and what was
// finished before is not.
func TestLagCollectorCountsWhatExpiresUnprocessed(t *testing.T) {
	l := newLagging(t)
	for range 3 {
		l.publish("FP_INGEST", "fp.ingest.12")
	}
	fetchAndAck(t, l.js, "FP_INGEST", "persister-pending", 3)
	fetchAndAck(t, l.js, "FP_INGEST", "prefetcher", 1)
	reg := l.collector(streams.StreamRef{Stream: "FP_INGEST", Durables: []string{"prefetcher", "persister-pending"}})
	const name = "fp_consumer_unprocessed_expired_total"
	streamstest.Eventually(t, "a first reading", func() bool { _, ok := metric(t, reg, lastSuccess); return ok })
	if v := mustMetric(t, reg, name, "prefetcher"); v != 0 {
		t.Errorf("%v expired before anything could", v)
	}
	s, err := l.js.Stream(t.Context(), "FP_INGEST")
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.MaxAge, cfg.Duplicates = time.Second, time.Second
	if _, err := l.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "two expired", func() bool { return mustMetric(t, reg, name, "prefetcher") == 2 })
	if v := mustMetric(t, reg, name, "persister-pending"); v != 0 {
		t.Errorf("%v expired of what was finished", v)
	}
}

// A durable an operator has paused is shown as such, and its lag goes on.
func TestLagCollectorShowsPausesAndFill(t *testing.T) {
	l := newLagging(t)
	l.publish("FP_INGEST", "fp.ingest.12")
	if _, err := l.js.PauseConsumer(t.Context(), "FP_INGEST", "prefetcher", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	reg := l.collector(streams.StreamRef{Stream: "FP_INGEST", Durables: []string{"prefetcher", "persister-pending"}}, streams.StreamRef{Stream: "FP_DEAD"})
	streamstest.Eventually(t, "a first reading", func() bool { _, ok := metric(t, reg, lastSuccess); return ok })
	if p, q := mustMetric(t, reg, "fp_consumer_paused", "prefetcher"), mustMetric(t, reg, "fp_consumer_paused", "persister-pending"); p != 1 || q != 0 {
		t.Errorf("paused %v and %v, want 1 and 0", p, q)
	}
	if v := mustMetric(t, reg, "fp_consumer_lag_seconds", "prefetcher"); v <= 0 {
		t.Errorf("a lag of %v while paused", v)
	}
	for name, want := range map[string]float64{"fp_stream_messages": 1, "fp_stream_limit_bytes": 1 << 30, "fp_stream_max_age_seconds": 72 * 3600} {
		if v := mustMetric(t, reg, name, "FP_INGEST"); v != want {
			t.Errorf("%s = %v, want %v", name, v, want)
		}
	}
	if v := mustMetric(t, reg, "fp_stream_size_bytes", "FP_INGEST"); v <= 0 {
		t.Errorf("a stream with a message has %v bytes", v)
	}
	if v := mustMetric(t, reg, "fp_stream_messages", "FP_DEAD"); v != 0 {
		t.Errorf("%v dead letters", v)
	}
}

// While the server is away the age goes on growing from what was read last.
func TestLagCollectorGoesOnWithoutTheServer(t *testing.T) {
	l := newLagging(t)
	l.publish("FP_INGEST", "fp.ingest.12")
	reg := l.collector(streams.StreamRef{Stream: "FP_INGEST", Durables: []string{"prefetcher"}})
	streamstest.Eventually(t, "a first reading", func() bool { _, ok := metric(t, reg, lastSuccess); return ok })
	l.nats.Stop()
	streamstest.Eventually(t, "the loss noticed", func() bool { return !l.conn.NC.IsConnected() })
	before := mustMetric(t, reg, "fp_consumer_lag_seconds", "prefetcher")
	streamstest.Eventually(t, "growth", func() bool { return mustMetric(t, reg, "fp_consumer_lag_seconds", "prefetcher") > before+0.05 })
}

// Dashboards and alerts depend on these names. All of a stage's metrics are on
// one registry, as in a service, and follow Prometheus's conventions.
func TestMetricNames(t *testing.T) {
	s := newStage(t)
	s.publish("done", "later", "dead", "hold")
	process := ops.NewProcessLogger("prefetcher", s.Log)
	process.Health.Set("redis", nil)
	s.Metrics = streams.NewConsumerMetrics(process.Registry)
	s.Publisher = streams.NewPublisher(s.conn.JS, process.Registry)
	if _, err := s.Publisher.Publish(t.Context(), message("more")); err != nil {
		t.Fatal(err)
	}
	conn, err := streams.Connect(streams.ConnectConfig{Name: "metrics", URL: s.nats.URL}, s.Log, process.Registry)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	lag := streams.NewLagCollector(s.conn.JS, s.Log, process.Registry, streams.StreamRef{Stream: s.Stream, Durables: []string{s.Durable}})
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() { lag.Run(ctx) })
	t.Cleanup(func() { cancel(); done.Wait() })
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		switch string(d.Data) {
		case "later":
			if d.Looks == 0 {
				return streams.RetryAfter(time.Millisecond, errors.New("not yet"))
			}
		case "dead":
			return streams.DeadLetter(streams.DeadUndecodable, nil)
		case "hold":
			if d.Looks == 0 {
				return streams.Hold(streams.CauseRedis, errors.New("away"))
			}
		}
		return streams.Done()
	}))
	s.settled()
	streamstest.Eventually(t, "a reading of the lag", func() bool { _, ok := metric(t, process.Registry, lastSuccess); return ok })

	problems, err := testutil.GatherAndLint(process.Registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
	families, err := process.Registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range families {
		if !strings.HasPrefix(f.GetName(), "fp_") {
			continue
		}
		var labels []string
		for _, l := range f.GetMetric()[0].GetLabel() {
			labels = append(labels, l.GetName())
		}
		got = append(got, fmt.Sprintf("%s %s {%s}", f.GetName(), strings.ToLower(f.GetType().String()), strings.Join(labels, " ")))
	}
	slices.Sort(got)
	want := []string{
		"fp_build_info gauge {goversion revision service version}",
		"fp_consumer_ack_pending_messages gauge {consumer stream}",
		"fp_consumer_delivered_sequence gauge {consumer stream}",
		"fp_consumer_lag_messages gauge {consumer stream}",
		"fp_consumer_lag_seconds gauge {consumer stream}",
		"fp_consumer_paused gauge {consumer stream}",
		"fp_consumer_undelivered_seconds gauge {consumer stream}",
		"fp_consumer_unprocessed_expired_total counter {consumer stream}",
		"fp_dependency_up gauge {dependency service}",
		"fp_draining gauge {service}",
		"fp_nats_async_errors_total counter {kind}",
		"fp_nats_connected gauge {}",
		"fp_nats_disconnects_total counter {}",
		"fp_nats_reconnects_total counter {}",
		"fp_publish_duration_seconds histogram {}",
		"fp_publishes_total counter {outcome}",
		"fp_ready gauge {service}",
		"fp_stage_ack_failures_total counter {consumer}",
		"fp_stage_dead_lettered_total counter {consumer reason}",
		"fp_stage_events_total counter {consumer outcome}",
		"fp_stage_holding gauge {cause consumer}",
		"fp_stage_inflight_events gauge {consumer}",
		"fp_stage_parked_events gauge {consumer}",
		"fp_stage_processing_duration_seconds histogram {consumer}",
		"fp_stage_queue_wait_seconds histogram {consumer}",
		"fp_stage_received_total counter {consumer}",
		"fp_stage_redeliveries_total counter {consumer}",
		"fp_stream_collector_errors_total counter {}",
		"fp_stream_collector_last_success_timestamp_seconds gauge {}",
		"fp_stream_last_sequence gauge {stream}",
		"fp_stream_limit_bytes gauge {stream}",
		"fp_stream_max_age_seconds gauge {stream}",
		"fp_stream_messages gauge {stream}",
		"fp_stream_size_bytes gauge {stream}",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}
