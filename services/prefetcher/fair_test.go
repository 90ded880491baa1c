package prefetcher

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// metric returns the sum of a counter or gauge of the first replica over its
// labels.
func (r *running) metric(name string) (sum float64) {
	r.t.Helper()
	families, err := r.proc.Registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			for _, m := range f.GetMetric() {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

// soon accepts one event and returns how long its end took.
func (r *running) soon(subscriber int64, id string) time.Duration {
	r.t.Helper()
	posted := time.Now()
	r.acceptFrom(subscriber, id)
	st, err := r.conn.JS.Stream(r.t.Context(), streams.StreamEnriched)
	if err != nil {
		r.t.Fatal(err)
	}
	streamstest.Eventually(r.t, "the end of "+id, func() bool {
		m, err := st.GetLastMsgForSubject(r.t.Context(), streams.EnrichedSubject(subscriber))
		if err != nil {
			return false
		}
		rec, err := record.Decode(m.Data)
		return err == nil && rec.RequestID == id
	})
	return time.Since(posted)
}

func (r *running) lagOf(stream, durable string) streams.Lag {
	r.t.Helper()
	l, err := streams.ReadLag(r.t.Context(), r.conn.JS, stream, durable)
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

// After an outage the newest events are served at once, and the old ones catch
// up with what the quota has left. They make way while the breaker is open.
func TestFreshEventsGoFirstAfterAnOutage(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{
		"FINGERPRINT_RATE_LIMIT": "50", "PREFETCH_FRESH_WITHIN": "1s", "PREFETCH_CONCURRENCY": "256",
	})
	r.sim.SetFault(&fingerprintsim.Fault{Status: 503})
	old := ids("old", 800)
	r.accept(old...)
	streamstest.Eventually(t, "the old events to make way", func() bool {
		return r.metric("fp_prefetch_moved_total") > 700
	})
	if r.holding() == "" {
		t.Error("moving old events ended the hold")
	}
	r.sim.SetFault(nil)
	streamstest.Eventually(t, "the end of the hold", func() bool { return r.holding() == "" })
	var worst time.Duration
	for i := range 20 {
		worst = max(worst, r.soon(2, fmt.Sprint("new-", i)))
	}
	left := r.lagOf(streams.StreamBackfill, streams.DurablePrefetcherBackfill).Messages()
	if t.Logf("new events took %v at most, %d old ones left", worst, left); worst > 5*time.Second || left == 0 {
		t.Errorf("new events took %v at most beside %d old ones", worst, left)
	}
	for _, id := range old {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
	if r.dead() != 0 {
		t.Errorf("%d dead letters", r.dead())
	}
}

// One subscriber's flood does not keep another's event waiting.
func TestFloodDoesNotStarveOtherSubscribers(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{"FINGERPRINT_RATE_LIMIT": "20", "PREFETCH_CONCURRENCY": "16"})
	r.acceptFrom(1, ids("flood", 400)...) // twenty seconds' worth of quota
	took := r.soon(2, "other")
	left := r.lag().Messages() + r.lagOf(streams.StreamBackfill, streams.DurablePrefetcherBackfill).Messages()
	if t.Logf("waited %v, %d of the flood left", took, left); took > 5*time.Second || left < 100 {
		t.Errorf("waited %v behind a flood of which %d are left", took, left)
	}
}

// Forged ids take first looks only, so that they cannot eat the quota of those
// who post real ones.
func TestForgedIDsDoNotEatTheQuota(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{"FINGERPRINT_RATE_LIMIT": "20", "PREFETCH_CONCURRENCY": "8"})
	forged := ids("forged", 60)
	for _, id := range forged {
		r.sim.Always(id, fingerprintsim.Fault{Status: 404})
	}
	r.acceptFrom(1, forged...)
	streamstest.Eventually(t, "a first look at many", func() bool { return r.sim.Calls() > 40 })
	for i := range 20 {
		if took := r.soon(2, fmt.Sprint("real-", i)); took > 5*time.Second {
			t.Errorf("real-%d took %v beside forged ids", i, took)
		}
	}
}

func TestSameIDInFlightIsOneCall(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key", Latency: 500 * time.Millisecond}, nil)
	for _, session := range []string{"one", "two", "three"} {
		e := streams.Event{Schema: 1, RequestID: "same", SubscriberID: 12, SessionID: session, UserID: "u"}
		body, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.pub.Publish(t.Context(), streams.Message{Stream: streams.StreamIngest, Subject: streams.IngestSubject(12), ID: e.MessageID(), Body: body}); err != nil {
			t.Fatal(err)
		}
	}
	streamstest.Eventually(t, "all three to be done", func() bool { return r.lag().Messages() == 0 })
	if n := r.sim.Calls(); n != 1 || r.metric("fp_prefetch_coalesced_total") != 2 {
		t.Errorf("%d calls, %v coalesced", n, r.metric("fp_prefetch_coalesced_total"))
	}
}

// backfill puts a copy of an event on FP_BACKFILL, as a replay does.
func (r *running) backfill(id, replay string, acceptedAt time.Time, force bool) {
	r.t.Helper()
	e := streams.Event{Schema: 1, RequestID: id, SubscriberID: 12, SessionID: "s", UserID: "u"}
	body, err := json.Marshal(e)
	if err != nil {
		r.t.Fatal(err)
	}
	m := streams.Message{
		Stream: streams.StreamBackfill, Subject: streams.BackfillSubject(streams.StagePrefetcher, 12), ID: replay + id, Body: body,
		Header: map[string][]string{streams.HeaderReplay: {replay}, streams.HeaderAcceptedAt: {acceptedAt.Format(time.RFC3339Nano)}},
	}
	if force {
		m.Header.Set(streams.HeaderForce, "1")
	}
	if _, err := r.pub.Publish(r.t.Context(), m); err != nil {
		r.t.Fatal(err)
	}
}

// A replay spends no call on what is ready, unless it is forced to, on
// somebody else's record, or on one of an earlier event.
func TestReplaySpendsNoCallOnWhatIsReady(t *testing.T) {
	t.Parallel()
	srv := streamstest.NewRedis(t)
	rdb := redis.NewClient(&redis.Options{Addr: srv.Addr})
	defer rdb.Close()
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{"REDIS_URL": srv.URL()})
	now := time.Now().UTC()
	put := func(id string, status record.Status, subscriber int64, at time.Time) {
		rec := record.Record{Schema: 1, Status: status, AcceptedAt: record.At(at), SubscriberID: subscriber, RequestID: id}
		if status == record.Ready {
			rec.Signals, rec.Event = &record.Signals{}, json.RawMessage(`{}`)
		}
		b, err := rec.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if err := rdb.Set(t.Context(), record.Key(id), b, 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	put("ready", record.Ready, 12, now)
	put("forced", record.Ready, 12, now)
	put("foreign", record.Ready, 13, now)
	put("earlier", record.Ready, 12, now.Add(-time.Second))
	put("pending", record.Pending, 12, now)
	for _, id := range []string{"ready", "forced", "foreign", "earlier", "pending", "absent"} {
		r.backfill(id, "r1", now, id == "forced")
	}
	streamstest.Eventually(t, "the replay to be done", func() bool {
		l, err := streams.ReadLag(t.Context(), r.conn.JS, streams.StreamBackfill, streams.DurablePrefetcherBackfill)
		return err == nil && l.Messages() == 0
	})
	for id, want := range map[string]int{"ready": 0, "forced": 1, "foreign": 1, "earlier": 1, "pending": 1, "absent": 1} {
		if n := r.sim.CallsFor(id); n != want {
			t.Errorf("%s: %d calls, want %d", id, n, want)
		}
	}
}

func TestIDsPastTheVendorsRetentionAreNotTried(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, nil)
	ago := func(d time.Duration) string { return fmt.Sprintf("%d.AbCdEf", time.Now().Add(-d).UnixMilli()) }
	old, recent := ago(31*24*time.Hour), ago(29*24*time.Hour)
	r.accept(old, recent, "1000000000000", "1000000000000.a-b_cd")
	if got := r.end(old); got.Status != record.NotFound || got.Attempts != 0 || r.sim.CallsFor(old) != 0 {
		t.Errorf("%s after %d attempts, %d calls", got.Status, got.Attempts, r.sim.CallsFor(old))
	}
	// Only the vendor's own form carries a time.
	for _, id := range []string{recent, "1000000000000", "1000000000000.a-b_cd"} {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
}

// With no room in FP_BACKFILL an old event is served in its turn.
func TestFullBackfillDoesNotStopLiveEvents(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{"PREFETCH_FRESH_WITHIN": "1s"})
	cfg := streams.Definition(streams.Limits{})[2].Stream
	cfg.MaxMsgs = 1
	if _, err := r.conn.JS.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	r.backfill("first", "r1", time.Now(), false)
	r.end("first") // it stays in the stream, by its limits
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	all := ids("id", 50)
	r.accept(all...)
	streamstest.Eventually(t, "the events to be old", func() bool {
		return r.lag().Seconds(time.Now()) > 1.2
	})
	r.replica(ops.NewProcessLogger("prefetcher", streamstest.Logger(t)))
	for _, id := range all {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
}
