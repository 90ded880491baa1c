package persister

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

type metrics struct {
	records   *prometheus.CounterVec
	duration  prometheus.Histogram
	size      prometheus.Histogram
	valueSize prometheus.Histogram
	endToEnd  *prometheus.HistogramVec
	heartbeat func(sent time.Time)
}

// heartbeatStatus stands for the status of a heartbeat's record.
const heartbeatStatus = "heartbeat"

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		heartbeat: streams.HeartbeatGauge(reg, streams.StagePersister),
		records: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_persist_records_total", Help: "Records that reached Redis, by status (or heartbeat) and by what became of them there.",
		}, []string{"status", "outcome"}),
		duration: f.NewHistogram(ops.Histogram("fp_persist_batch_duration_seconds", "One pipeline of guarded writes.",
			.0002, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1)),
		size: f.NewHistogram(prometheus.HistogramOpts{
			Name: "fp_persist_batch_records", Help: "Records in one pipeline.", Buckets: prometheus.ExponentialBuckets(1, 2, 12),
		}),
		valueSize: f.NewHistogram(prometheus.HistogramOpts{
			Name: "fp_persist_value_size_bytes", Help: "Size of a record as stored.", Buckets: prometheus.ExponentialBuckets(256, 2, 11),
		}),
		endToEnd: f.NewHistogramVec(ops.Histogram("fp_pipeline_end_to_end_seconds", "From the acceptance of an event to its record, a negative or a better one included, being readable; heartbeats do not count.",
			.005, .01, .025, .05, .1, .25, .5, 1, 2, 5, 10, 30, 60, 300, 1800, 7200, 86400), []string{"mode"}),
	}
	for _, s := range []record.Status{record.Pending, record.Ready, record.NotFound, record.Rejected, record.Failed, heartbeatStatus} {
		for _, o := range []outcome{written, superseded, foreign, unreadable, expired} {
			m.records.WithLabelValues(string(s), string(o))
		}
	}
	for _, mode := range []string{"live", "backfill"} {
		m.endToEnd.WithLabelValues(mode)
	}
	return m
}

func (m *metrics) batch(n int, took time.Duration) {
	m.size.Observe(float64(n))
	m.duration.Observe(took.Seconds())
}

func (m *metrics) record(w *write, d *streams.Delivery, now time.Time) {
	if d.Heartbeat() {
		m.records.WithLabelValues(heartbeatStatus, string(w.outcome)).Inc()
		if w.outcome == written {
			m.heartbeat(w.rec.AcceptedAt.Time)
		}
		return
	}
	m.records.WithLabelValues(string(w.rec.Status), string(w.outcome)).Inc()
	if w.outcome == written {
		m.valueSize.Observe(float64(len(w.body)))
	}
	if w.rec.Status.Terminal() && (w.outcome == written || w.outcome == superseded) {
		streams.Observe(w.ctx, m.endToEnd.WithLabelValues(d.Mode()), now.Sub(w.rec.AcceptedAt.Time).Seconds())
	}
}
