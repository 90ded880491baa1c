package prefetcher

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

type metrics struct {
	calls    *prometheus.CounterVec
	duration *prometheus.HistogramVec
	wait     prometheus.Histogram
	results  *prometheus.CounterVec
}

// vendorBuckets fit calls over the internet that are cut off at 5 s.
func vendorBuckets() []float64 {
	return []float64{.01, .025, .05, .1, .2, .3, .5, .75, 1, 1.5, 2, 3, 5, 10}
}

func newMetrics(reg prometheus.Registerer, q *quota) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		calls: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_prefetch_calls_total", Help: "Calls to the vendor by what the answer means.",
		}, []string{"outcome"}),
		duration: f.NewHistogramVec(prometheus.HistogramOpts{
			Name: "fp_prefetch_call_duration_seconds", Help: "One call to the vendor, body included.",
			Buckets: vendorBuckets(), NativeHistogramBucketFactor: 1.1,
		}, []string{"outcome"}),
		wait: f.NewHistogram(prometheus.HistogramOpts{
			Name: "fp_prefetch_quota_wait_seconds", Help: "Waiting for the quota before a call.",
			Buckets: []float64{.001, .01, .1, .25, .5, 1, 2.5, 5, 10, 30, 60}, NativeHistogramBucketFactor: 1.1,
		}),
		results: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_prefetch_results_total", Help: "Events that reached their end here, by status and reason.",
		}, []string{"status", "reason"}),
	}
	f.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "fp_prefetch_quota_tokens", Help: "Calls that may be made at once now.",
	}, q.available)
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

func (m *metrics) call(o Outcome, took time.Duration) {
	m.calls.WithLabelValues(o.String()).Inc()
	m.duration.WithLabelValues(o.String()).Observe(took.Seconds())
}
