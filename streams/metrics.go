package streams

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// ConsumerMetrics are the metrics of every consumer of a process.
type ConsumerMetrics struct {
	received, redelivered, ackFailures *prometheus.CounterVec
	events, dead                       *prometheus.CounterVec
	inHand, parked, holding            *prometheus.GaugeVec
	queueWait, duration                *prometheus.HistogramVec
}

// NewConsumerMetrics registers them on reg.
func NewConsumerMetrics(reg prometheus.Registerer) *ConsumerMetrics {
	f := promauto.With(reg)
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return f.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, append([]string{"consumer"}, labels...))
	}
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return f.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, append([]string{"consumer"}, labels...))
	}
	histogram := func(name, help string, bounds ...float64) *prometheus.HistogramVec {
		return f.NewHistogramVec(ops.Histogram(name, help, bounds...), []string{"consumer"})
	}
	return &ConsumerMetrics{
		received:    counter("fp_stage_received_total", "Messages delivered to this process."),
		redelivered: counter("fp_stage_redeliveries_total", "Messages delivered that had been delivered before, to anyone."),
		ackFailures: counter("fp_stage_ack_failures_total", "Acks that could not be sent at once; they are repeated."),
		events:      counter("fp_stage_events_total", "Decisions about messages: acked, retried (parked and looked at again), held (the stage's trouble), dead_lettered, handed_back (at shutdown).", "outcome"),
		dead:        counter("fp_stage_dead_lettered_total", "Messages given up, by reason.", "reason"),
		inHand:      gauge("fp_stage_inflight_events", "Messages this process holds."),
		parked:      gauge("fp_stage_parked_events", "Those of them that wait for another look."),
		holding:     gauge("fp_stage_holding", "1 while the stage holds for this cause.", "cause"),
		queueWait:   histogram("fp_stage_queue_wait_seconds", "From the stream storing a message to its delivery here.", .001, .005, .025, .1, .5, 1, 2.5, 5, 15, 60, 300, 1800, 7200, 86400),
		duration:    histogram("fp_stage_processing_duration_seconds", "One handler call, dead letters included.", .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30),
	}
}

// consumerMetrics are those of one consumer.
type consumerMetrics struct {
	received, redelivered, ackFailures prometheus.Counter
	acked, retried, held, handedBack   prometheus.Counter
	inHand, parked                     prometheus.Gauge
	queueWait, duration                prometheus.Observer
	dead                               func(DeadReason) prometheus.Counter
	holding                            func(Cause, bool)
}

func (m *ConsumerMetrics) of(consumer string) *consumerMetrics {
	event := func(outcome string) prometheus.Counter { return m.events.WithLabelValues(consumer, outcome) }
	c := &consumerMetrics{
		received: m.received.WithLabelValues(consumer), redelivered: m.redelivered.WithLabelValues(consumer),
		ackFailures: m.ackFailures.WithLabelValues(consumer),
		acked:       event("acked"), retried: event("retried"), held: event("held"), handedBack: event("handed_back"),
		inHand: m.inHand.WithLabelValues(consumer), parked: m.parked.WithLabelValues(consumer),
		queueWait: m.queueWait.WithLabelValues(consumer), duration: m.duration.WithLabelValues(consumer),
	}
	deadTotal := event("dead_lettered")
	for _, reason := range DeadReasons() {
		m.dead.WithLabelValues(consumer, string(reason))
	}
	for _, cause := range Causes() {
		m.holding.WithLabelValues(consumer, string(cause))
	}
	c.dead = func(reason DeadReason) prometheus.Counter {
		deadTotal.Inc()
		return m.dead.WithLabelValues(consumer, string(reason))
	}
	c.holding = func(cause Cause, on bool) {
		v := 0.0
		if on {
			v = 1
		}
		m.holding.WithLabelValues(consumer, string(cause)).Set(v)
	}
	return c
}
