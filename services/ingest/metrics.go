package ingest

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// outcome is how a request ended: a closed set, used as a metric label.
type outcome string

const (
	accepted         outcome = "accepted"
	duplicate        outcome = "duplicate"
	invalid          outcome = "invalid"
	unauthorized     outcome = "unauthorized"
	forbidden        outcome = "forbidden"
	tooLarge         outcome = "too_large"
	unsupportedMedia outcome = "unsupported_media"
	notFound         outcome = "not_found"   // another path or method
	throttled        outcome = "throttled"   // its key's rate
	overloaded       outcome = "overloaded"  // too many requests at once
	unavailable      outcome = "unavailable" // the stream
	described        outcome = "described"   // the API's description
	internalError    outcome = "error"
)

// outcomes lists them all.
func outcomes() []outcome {
	return []outcome{accepted, duplicate, invalid, unauthorized, forbidden, tooLarge, unsupportedMedia, notFound, throttled, overloaded, unavailable, described, internalError}
}

// metrics of one edge. No label takes a value from a request.
type metrics struct {
	requests    *prometheus.CounterVec
	duration    *prometheus.HistogramVec
	inflight    prometheus.Gauge
	invalid     *prometheus.CounterVec
	authFailed  *prometheus.CounterVec
	keyRequests *prometheus.CounterVec
	keys        prometheus.Gauge
	keysCurrent prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	f := promauto.With(reg)
	m := &metrics{
		requests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_ingest_requests_total", Help: "Requests answered, by outcome.",
		}, []string{"outcome"}),
		duration: f.NewHistogramVec(ops.Histogram("fp_ingest_request_duration_seconds", "Time from a request's headers to its answer, by outcome.",
			.0002, .0005, .001, .002, .005, .01, .025, .05, .1, .25, .5, 1, 2), []string{"outcome"}),
		inflight: f.NewGauge(prometheus.GaugeOpts{
			Name: "fp_ingest_inflight_requests", Help: "Requests being handled now.",
		}),
		invalid: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_ingest_invalid_fields_total", Help: "Bodies refused, by the field and the rule it broke.",
		}, []string{"field", "rule"}),
		authFailed: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_ingest_auth_failures_total", Help: "Requests without a good key, by what was wrong with it.",
		}, []string{"reason"}),
		keyRequests: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_ingest_key_requests_total", Help: "Requests with a good key, by the key's id and whether the event was accepted.",
		}, []string{"key_id", "outcome"}),
		keys: f.NewGauge(prometheus.GaugeOpts{
			Name: "fp_ingest_keys", Help: "Keys in force, expired ones included.",
		}),
		keysCurrent: f.NewGauge(prometheus.GaugeOpts{
			Name: "fp_ingest_keys_current", Help: "1 when the keys in force are those of the file, 0 while its last edit is broken.",
		}),
	}
	for _, o := range outcomes() {
		m.requests.WithLabelValues(string(o))
		m.duration.WithLabelValues(string(o))
	}
	for field, rules := range bodyRules() {
		for _, r := range rules {
			m.invalid.WithLabelValues(string(field), string(r))
		}
	}
	for _, r := range authReasons() {
		m.authFailed.WithLabelValues(string(r))
	}
	return m
}

// Values of the outcome label of keyRequests.
const (
	keyAccepted = "accepted"
	keyRefused  = "refused"
)

// observe counts a finished request; keyID is empty when no good key was
// presented.
func (m *metrics) observe(ctx context.Context, o outcome, keyID string, took time.Duration) {
	m.requests.WithLabelValues(string(o)).Inc()
	streams.Observe(ctx, m.duration.WithLabelValues(string(o)), took.Seconds())
	if keyID == "" {
		return
	}
	if o == accepted || o == duplicate {
		m.keyRequests.WithLabelValues(keyID, keyAccepted).Inc()
	} else {
		m.keyRequests.WithLabelValues(keyID, keyRefused).Inc()
	}
}
