package streams_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// left returns the sequences a stream holds.
func (l *lagging) left(stream string, last uint64) []uint64 {
	l.t.Helper()
	s, err := l.js.Stream(l.t.Context(), stream)
	if err != nil {
		l.t.Fatal(err)
	}
	var out []uint64
	for seq := uint64(1); seq <= last; seq++ {
		if _, err := s.GetMsg(l.t.Context(), seq); err == nil {
			out = append(out, seq)
		}
	}
	return out
}

// janitor returns one to which every stream with a message is under pressure.
func (l *lagging) janitor(keepEnriched time.Duration) (*streams.Janitor, *prometheus.Registry) {
	reg := prometheus.NewRegistry()
	j := streams.NewJanitor(l.js, streamstest.Logger(l.t), reg, keepEnriched)
	j.Pressure = 1e-9
	return j, reg
}

func (l *lagging) sweep(j *streams.Janitor) {
	l.t.Helper()
	if err := j.Sweep(l.t.Context()); err != nil {
		l.t.Fatal(err)
	}
}

// Only what the working durable has finished goes, and the pending markers'
// durable holds nothing back.
func TestJanitorPurgesOnlyWhatIsFinished(t *testing.T) {
	l := newLagging(t)
	for range 5 {
		l.publish("FP_INGEST", "fp.ingest.12")
	}
	j, reg := l.janitor(0)
	l.sweep(j)
	if got := l.left("FP_INGEST", 5); len(got) != 5 {
		t.Fatalf("%v is left although nothing is finished", got)
	}
	msgs := fetch(t, l.js, "FP_INGEST", "prefetcher", 4)
	for _, i := range []int{0, 1, 3} { // the third is in somebody's hands
		if err := msgs[i].DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	l.sweep(j)
	if got := l.left("FP_INGEST", 5); !slices.Equal(got, []uint64{3, 4, 5}) {
		t.Errorf("%v is left, want 3, 4, 5", got)
	}
	if v := mustMetric(t, reg, "fp_stream_purged_messages_total", "FP_INGEST"); v != 2 {
		t.Errorf("%v purged, want 2", v)
	}
}

// Of a stream that two durables share by filter, each one's finished part goes.
func TestJanitorPurgesByFilter(t *testing.T) {
	l := newLagging(t)
	for _, stage := range []string{"prefetcher", "persister", "prefetcher", "persister"} {
		l.publish("FP_BACKFILL", "fp.backfill."+stage+".12")
	}
	fetchAndAck(t, l.js, "FP_BACKFILL", "persister-backfill", 2)
	j, _ := l.janitor(0)
	l.sweep(j)
	if got := l.left("FP_BACKFILL", 4); !slices.Equal(got, []uint64{1, 3}) {
		t.Errorf("%v is left, want 1, 3", got)
	}
}

// Records are rebuilt from FP_ENRICHED, so what is younger than they live
// stays, finished or not.
func TestJanitorKeepsWhatRecordsAreRebuiltFrom(t *testing.T) {
	l := newLagging(t)
	var at [4]time.Time
	for i := range at {
		at[i] = l.publish("FP_ENRICHED", "fp.enriched.12")
	}
	fetchAndAck(t, l.js, "FP_ENRICHED", "persister", 4)
	young, _ := l.janitor(time.Hour)
	l.sweep(young)
	if got := l.left("FP_ENRICHED", 4); len(got) != 4 {
		t.Fatalf("%v is left of what is younger than an hour", got)
	}
	old, _ := l.janitor(0)
	l.sweep(old)
	if got := l.left("FP_ENRICHED", 4); len(got) != 0 {
		t.Errorf("%v is left of what is old and finished", got)
	}
}

// Without pressure all history stays, for replays.
func TestJanitorKeepsHistoryWhileThereIsRoom(t *testing.T) {
	l := newLagging(t)
	l.publish("FP_INGEST", "fp.ingest.12")
	fetchAndAck(t, l.js, "FP_INGEST", "prefetcher", 1)
	l.sweep(streams.NewJanitor(l.js, streamstest.Logger(t), prometheus.NewRegistry(), 0))
	if got := l.left("FP_INGEST", 1); len(got) != 1 {
		t.Error("purged with plenty of room")
	}
}

// The exporter says so while it can see nothing.
func TestExporterIsReadyWhileNATSAnswers(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	p := ops.NewProcessLogger("exporter", streamstest.Logger(t))
	conn, err := streams.Connect(streams.ConnectConfig{Name: streams.UserExporter, URL: n.URL}, p.Log, p.Registry)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if p.Health.Err() == nil {
		t.Error("ready before it runs")
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); streams.RunExporter(ctx, conn, p, 0) }()
	defer func() { stop(); <-done }()
	streamstest.Eventually(t, "readiness", func() bool { return p.Health.Err() == nil })
	n.Stop()
	streamstest.Eventually(t, "the loss noticed", func() bool {
		err := p.Health.Err()
		return err != nil && strings.HasPrefix(err.Error(), "nats: ")
	})
	n.Start()
	streamstest.Eventually(t, "readiness again", func() bool { return p.Health.Err() == nil })
}
