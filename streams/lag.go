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
	"github.com/prometheus/client_golang/prometheus/promauto"
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
	// Undelivered is the same for the oldest message that nobody was handed
	// yet. It stays young while only a parked message holds Oldest back.
	Undelivered time.Time
	// Paused: an operator told the server to deliver nothing for a while.
	Paused bool
	// Delivered is the sequence of the last message handed out. While it
	// stands still and Undelivered grows, nobody asks for messages.
	Delivered uint64
}

// Messages is the number of unfinished messages.
func (l Lag) Messages() uint64 { return l.Pending + l.InFlight }

// Seconds is the age of the oldest unfinished message at now, 0 when there is
// none. It grows while nobody consumes.
func (l Lag) Seconds(now time.Time) float64 { return age(l.Oldest, now) }

// UndeliveredSeconds is the age of the oldest undelivered message at now, 0
// when there is none.
func (l Lag) UndeliveredSeconds(now time.Time) float64 { return age(l.Undelivered, now) }

func age(stored, now time.Time) float64 {
	if stored.IsZero() {
		return 0
	}
	return max(now.Sub(stored).Seconds(), 0)
}

// ReadLag asks the server about one durable: two requests, and up to two
// direct gets when something is unfinished. What exists no more while it asks
// counts as finished.
func ReadLag(ctx context.Context, js jetstream.JetStream, stream, durable string) (Lag, error) {
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return Lag{}, fmt.Errorf("look up stream %s: %w", stream, err)
	}
	l, _, err := readLag(ctx, s, durable)
	return l, err
}

// readLag also returns the sequence of the oldest unfinished message, 0 when
// there is none.
func readLag(ctx context.Context, s jetstream.Stream, durable string) (Lag, uint64, error) {
	l := Lag{Stream: s.CachedInfo().Config.Name, Durable: durable}
	c, err := s.Consumer(ctx, durable)
	if err != nil {
		return l, 0, fmt.Errorf("look up durable %s of %s: %w", durable, l.Stream, err)
	}
	info := c.CachedInfo()
	l.Pending, l.InFlight, l.Paused = info.NumPending, uint64(max(info.NumAckPending, 0)), info.Paused
	l.Delivered = info.Delivered.Stream
	// The ack floor alone does not say: it stays behind after deletions.
	if l.Messages() == 0 {
		return l, 0, nil
	}
	next := func(sequence uint64) (*jetstream.RawStreamMsg, error) {
		msg, err := s.GetMsg(ctx, sequence, jetstream.WithGetMsgSubject(info.Config.FilterSubject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return &jetstream.RawStreamMsg{}, nil // finished, or expired, since
		}
		if err != nil {
			return nil, fmt.Errorf("read message %d or later of %s for %s: %w", sequence, l.Stream, durable, err)
		}
		return msg, nil
	}
	oldest, err := next(info.AckFloor.Stream + 1)
	if err != nil {
		return l, 0, err
	}
	l.Oldest = oldest.Time
	if l.Pending > 0 {
		undelivered := oldest
		if info.Delivered.Stream > info.AckFloor.Stream {
			if undelivered, err = next(info.Delivered.Stream + 1); err != nil {
				return l, 0, err
			}
		}
		l.Undelivered = undelivered.Time
	}
	return l, oldest.Sequence, nil
}

// StreamRef names what a [LagCollector] reads: a stream, and some of its
// durables or none.
type StreamRef struct {
	Stream   string
	Durables []string
}

// LagCollector polls streams and the lag of their durables, and serves the last
// answer to Prometheus: a scrape costs the server nothing. The age of a message
// that is still the oldest one goes on growing from scrape to scrape, also
// while the server is away; that of a durable which moved on since the look
// before is what it was at the last look.
type LagCollector struct {
	js   jetstream.JetStream
	log  *slog.Logger
	refs []StreamRef

	mu      sync.Mutex
	streams map[string]*jetstream.StreamInfo
	last    map[string]reading
	at      time.Time

	errors  prometheus.Counter
	expired *prometheus.CounterVec

	pending, inFlight, seconds, undelivered, delivered, paused *prometheus.Desc
	messages, size, limit, maxAge, stored, success             *prometheus.Desc
}

// reading is a durable's lag and the sequence of its oldest message.
type reading struct {
	Lag
	oldest uint64
	at     time.Time
	// Whether the oldest message, and what was delivered, are others than in
	// the reading before.
	moved, delivering bool
}

// seconds returns the two ages to be shown at now.
func (r reading) seconds(now time.Time) (unfinished, undelivered float64) {
	at := func(moved bool) time.Time {
		if moved && now.Sub(r.at) < 2*lagPeriod {
			return r.at // it has hardly stayed the oldest since
		}
		return now
	}
	return r.Seconds(at(r.moved)), r.UndeliveredSeconds(at(r.delivering))
}

// NewLagCollector registers a collector on reg for the given streams. A stream
// may be named more than once.
func NewLagCollector(js jetstream.JetStream, log *slog.Logger, reg prometheus.Registerer, refs ...StreamRef) *LagCollector {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc(name, help, labels, nil)
	}
	f := promauto.With(reg)
	c := &LagCollector{
		js: js, log: log, refs: refs, last: map[string]reading{}, streams: map[string]*jetstream.StreamInfo{},
		errors: f.NewCounter(prometheus.CounterOpts{
			Name: "fp_stream_collector_errors_total", Help: "Streams and durables that could not be read in a poll.",
		}),
		expired: f.NewCounterVec(prometheus.CounterOpts{
			Name: "fp_consumer_unprocessed_expired_total",
			Help: "Messages that the stream's age limit removed before they were finished, seen by this process: data lost.",
		}, []string{"stream", "consumer"}),
		pending:     desc("fp_consumer_lag_messages", "Messages never delivered yet.", "stream", "consumer"),
		inFlight:    desc("fp_consumer_ack_pending_messages", "Messages delivered and not acknowledged yet.", "stream", "consumer"),
		seconds:     desc("fp_consumer_lag_seconds", "Age of the oldest message that is not acknowledged; while that one stays the same, at scrape time.", "stream", "consumer"),
		undelivered: desc("fp_consumer_undelivered_seconds", "Age of the oldest message that was never delivered; while nothing is, at scrape time.", "stream", "consumer"),
		delivered:   desc("fp_consumer_delivered_sequence", "Sequence in the stream of the last message handed to anyone. It stands still while nobody asks.", "stream", "consumer"),
		paused:      desc("fp_consumer_paused", "1 while an operator has paused the durable on the server.", "stream", "consumer"),
		messages:    desc("fp_stream_messages", "Messages in the stream, finished ones included.", "stream"),
		size:        desc("fp_stream_size_bytes", "Size of the stream as the server counts it against its limit.", "stream"),
		limit:       desc("fp_stream_limit_bytes", "Size at which the stream refuses messages; 0 without a limit.", "stream"),
		maxAge:      desc("fp_stream_max_age_seconds", "Age at which the stream drops messages, finished or not; 0 for never.", "stream"),
		stored:      desc("fp_stream_last_sequence", "Messages ever stored: survives restarts of whoever published, and purges.", "stream"),
		success:     desc("fp_stream_collector_last_success_timestamp_seconds", "When everything was last read completely."),
	}
	for _, ref := range refs {
		for _, durable := range ref.Durables {
			c.expired.WithLabelValues(ref.Stream, durable)
		}
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
	failed := func(err error) {
		c.log.Debug("cannot read lag", "err", err)
		c.errors.Inc()
		complete = false
	}
	for _, ref := range c.refs {
		s, err := c.js.Stream(ctx, ref.Stream)
		if err != nil {
			failed(fmt.Errorf("look up stream %s: %w", ref.Stream, err))
			if errors.Is(err, jetstream.ErrStreamNotFound) {
				c.forget(ref.Stream, ref.Durables...)
			}
			continue
		}
		c.mu.Lock()
		c.streams[ref.Stream] = s.CachedInfo()
		c.mu.Unlock()
		for _, durable := range ref.Durables {
			l, oldest, err := readLag(ctx, s, durable)
			if err != nil {
				failed(err)
				if errors.Is(err, jetstream.ErrConsumerNotFound) {
					c.forget("", durable)
				}
				continue
			}
			c.keep(s.CachedInfo(), reading{Lag: l, oldest: oldest, at: time.Now()})
		}
	}
	if complete {
		c.mu.Lock()
		c.at = time.Now()
		c.mu.Unlock()
	}
}

// forget drops the series of what does not exist: it has no lag, which is not
// the same as a lag of 0.
func (c *LagCollector) forget(stream string, durables ...string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.streams, stream)
	for _, d := range durables {
		delete(c.last, d)
	}
}

// keep takes a new reading over, and counts what expired since the one before:
// at most what was unfinished then, and only what lay between the oldest
// unfinished message and the stream's new beginning. Purges of younger
// messages do not count, they are somebody's will.
func (c *LagCollector) keep(stream *jetstream.StreamInfo, now reading) {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.last[now.Durable]
	now.moved, now.delivering = now.oldest != before.oldest, now.Delivered != before.Delivered
	c.last[now.Durable] = now
	maxAge, first := stream.Config.MaxAge, stream.State.FirstSeq
	if before.oldest == 0 || maxAge == 0 || time.Since(before.Oldest) < maxAge || first <= before.oldest {
		return
	}
	c.expired.WithLabelValues(now.Stream, now.Durable).Add(float64(min(first-before.oldest, before.Messages())))
}

// Describe implements prometheus.Collector.
func (c *LagCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{c.pending, c.inFlight, c.seconds, c.undelivered, c.delivered, c.paused, c.messages, c.size, c.limit, c.maxAge, c.stored, c.success} {
		ch <- d
	}
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
		unfinished, undelivered := l.seconds(now)
		gauge(c.seconds, unfinished, l.Stream, l.Durable)
		gauge(c.undelivered, undelivered, l.Stream, l.Durable)
		gauge(c.delivered, float64(l.Delivered), l.Stream, l.Durable)
		paused := 0.0
		if l.Paused {
			paused = 1
		}
		gauge(c.paused, paused, l.Stream, l.Durable)
	}
	for name, s := range c.streams {
		gauge(c.messages, float64(s.State.Msgs), name)
		gauge(c.size, float64(s.State.Bytes), name)
		gauge(c.limit, float64(max(s.Config.MaxBytes, 0)), name)
		gauge(c.stored, float64(s.State.LastSeq), name)
		gauge(c.maxAge, s.Config.MaxAge.Seconds(), name)
	}
	if !c.at.IsZero() {
		gauge(c.success, float64(c.at.UnixMilli())/1000)
	}
}
