package streams

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
)

// Lag is how far a durable is behind.
type Lag struct {
	Stream, Durable string
	// Pending messages were never delivered; InFlight ones were, and are not
	// acknowledged yet.
	Pending, InFlight uint64
	// Oldest is when the stream stored the oldest message that is not
	// acknowledged; zero when there is none.
	Oldest time.Time
}

// Messages is the number of unfinished messages.
func (l Lag) Messages() uint64 { return l.Pending + l.InFlight }

// Seconds is the age of the oldest unfinished message at now, 0 when there is
// none. It grows while nobody consumes.
func (l Lag) Seconds(now time.Time) float64 {
	if l.Oldest.IsZero() {
		return 0
	}
	return max(now.Sub(l.Oldest).Seconds(), 0)
}

// ReadLag asks the server about one durable: one request, and a direct get
// when something is unfinished.
func ReadLag(ctx context.Context, js jetstream.JetStream, stream, durable string) (Lag, error) {
	l := Lag{Stream: stream, Durable: durable}
	c, err := js.Consumer(ctx, stream, durable)
	if err != nil {
		return l, fmt.Errorf("look up durable %s of %s: %w", durable, stream, err)
	}
	info := c.CachedInfo()
	l.Pending, l.InFlight = info.NumPending, uint64(max(info.NumAckPending, 0))
	if l.Messages() == 0 {
		return l, nil
	}
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return l, fmt.Errorf("look up stream %s: %w", stream, err)
	}
	msg, err := s.GetMsg(ctx, info.AckFloor.Stream+1, jetstream.WithGetMsgSubject(info.Config.FilterSubject))
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return l, nil // finished, or expired, since
	}
	if err != nil {
		return l, fmt.Errorf("read the oldest unfinished message of %s/%s: %w", stream, durable, err)
	}
	l.Oldest = msg.Time
	return l, nil
}

// LagCollector polls the lag of durables and serves the last answer to
// Prometheus: a scrape costs the server nothing.
type LagCollector struct {
	js   jetstream.JetStream
	log  *slog.Logger
	refs [][2]string

	mu   sync.Mutex
	last map[string]Lag
	at   time.Time

	pending, inFlight, seconds, success *prometheus.Desc
}

// NewLagCollector registers a collector on reg for the given {stream, durable}
// pairs.
func NewLagCollector(js jetstream.JetStream, log *slog.Logger, reg prometheus.Registerer, refs ...[2]string) *LagCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	c := &LagCollector{
		js: js, log: log, refs: refs, last: map[string]Lag{},
		pending:  desc("fp_consumer_lag_messages", "Messages never delivered yet.", "stream", "consumer"),
		inFlight: desc("fp_consumer_ack_pending_messages", "Messages delivered and not acknowledged yet.", "stream", "consumer"),
		seconds:  desc("fp_consumer_lag_seconds", "Age of the oldest message that is not acknowledged, at scrape time.", "stream", "consumer"),
		success:  desc("fp_stream_collector_last_success_timestamp_seconds", "When the lag was last read completely."),
	}
	reg.MustRegister(c)
	return c
}

// lagPeriod is gentle: asking for consumer info too often is the best-known
// way to slow a JetStream server down.
const lagPeriod = 5 * time.Second

// Run polls until ctx is done.
func (c *LagCollector) Run(ctx context.Context) {
	for {
		c.poll(ctx)
		if !sleep(ctx, lagPeriod*9/10+rand.N(lagPeriod/5)) {
			return
		}
	}
}

func (c *LagCollector) poll(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	complete := true
	for _, ref := range c.refs {
		l, err := ReadLag(ctx, c.js, ref[0], ref[1])
		if err != nil {
			c.log.Debug("cannot read lag", "err", err)
			complete = false
			if errors.Is(err, jetstream.ErrConsumerNotFound) || errors.Is(err, jetstream.ErrStreamNotFound) {
				c.mu.Lock()
				delete(c.last, l.Durable) // what does not exist has no lag
				c.mu.Unlock()
			}
			continue
		}
		c.mu.Lock()
		c.last[l.Durable] = l
		c.mu.Unlock()
	}
	if complete {
		c.mu.Lock()
		c.at = time.Now()
		c.mu.Unlock()
	}
}

// Describe implements prometheus.Collector.
func (c *LagCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- c.pending
	ch <- c.inFlight
	ch <- c.seconds
	ch <- c.success
}

// Collect implements prometheus.Collector.
func (c *LagCollector) Collect(ch chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	for _, l := range c.last {
		gauge(c.pending, float64(l.Pending), l.Stream, l.Durable)
		gauge(c.inFlight, float64(l.InFlight), l.Stream, l.Durable)
		gauge(c.seconds, l.Seconds(now), l.Stream, l.Durable)
	}
	if !c.at.IsZero() {
		gauge(c.success, float64(c.at.UnixMilli())/1000)
	}
}
