package prefetcher

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

type metrics struct {
	calls     *prometheus.CounterVec
	duration  *prometheus.HistogramVec
	wait      prometheus.Histogram
	results   *prometheus.CounterVec
	moved     *prometheus.CounterVec
	skipped   *prometheus.CounterVec
	coalesced prometheus.Counter
	heartbeat func(sent time.Time)
}

func newMetrics(reg prometheus.Registerer, q *quota) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		heartbeat: streams.HeartbeatGauge(reg, streams.StagePrefetcher),
		calls: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_prefetch_calls_total", Help: "Calls to the vendor by what the answer means.",
		}, []string{"outcome"}),
		duration: f.NewHistogramVec(ops.Histogram("fp_prefetch_call_duration_seconds", "One call to the vendor, body included.",
			// For calls over the internet that are cut off at 5 s.
			.01, .025, .05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10), []string{"outcome"}),
		wait: f.NewHistogram(ops.Histogram("fp_prefetch_quota_wait_seconds", "Waiting for the quota before a call.",
			.001, .01, .1, .25, .5, 1, 2.5, 5, 10, 30, 60)),
		results: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_prefetch_results_total", Help: "Events that reached their end here, by status and reason.",
		}, []string{"status", "reason"}),
		moved: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_prefetch_moved_total", Help: "Live events moved to FP_BACKFILL to let others go first: old, or crowded (their subscriber had half of the places).",
		}, []string{"reason"}),
		skipped: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_prefetch_skipped_total", Help: "Events that needed no call: their record is ready, the vendor's retention is over, or they are copies of heartbeats.",
		}, []string{"reason"}),
		coalesced: f.NewCounter(prometheus.CounterOpts{
			Name: "fp_prefetch_coalesced_total", Help: "Looks answered by a call under way for the same id.",
		}),
	}
	for _, reason := range []string{"old", "crowded"} {
		m.moved.WithLabelValues(reason)
	}
	for _, reason := range []string{"ready", "retention", "heartbeat"} {
		m.skipped.WithLabelValues(reason)
	}
	for p, name := range map[priority]string{firstLook: "first_look", backfill: "backfill"} {
		f.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "fp_prefetch_quota_waiting", Help: "Events that wait for a call.", ConstLabels: prometheus.Labels{"priority": name},
		}, func() float64 { return q.waiters(p) })
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "fp_prefetch_quota_tokens", Help: "Calls that may be made at once now; of the whole fleet while fp_prefetch_quota_shared is 1.",
	}, q.bucket.available)
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "fp_prefetch_quota_shared", Help: "1 while the quota is one bucket for all replicas, in Redis, or there is no limit to share; 0 while this replica keeps to its share.",
	}, func() float64 {
		if b, ok := q.bucket.(*fleetBucket); q.unlimited || ok && b.shared() {
			return 1
		}
		return 0
	})
	for o := Found; o <= Malformed; o++ {
		m.calls.WithLabelValues(o.String())
	}
	for status, reasons := range map[record.Status][]record.Reason{
		record.Ready: {""}, record.NotFound: {record.EventNotFound}, record.Rejected: {record.EventIDInvalid},
		record.Failed: {record.UpstreamUnavailable, record.UpstreamMalformed, record.Configuration, record.TooOld, record.Poison},
	} {
		for _, reason := range reasons {
			m.results.WithLabelValues(string(status), string(reason))
		}
	}
	return m
}

func (m *metrics) call(ctx context.Context, o Outcome, took time.Duration) {
	m.calls.WithLabelValues(o.String()).Inc()
	streams.Observe(ctx, m.duration.WithLabelValues(o.String()), took.Seconds())
}
