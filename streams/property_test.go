package streams_test

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// storedMsg is a message of a stream that exists in memory alone, so that the
// clock can be a fake one.
type storedMsg struct {
	jetstream.Msg // nil: what is not below is not to be called

	seq      uint64
	at       time.Time // stored
	earlier  uint64    // deliveries before
	late     time.Duration
	server   *memoryStream
	alive    time.Time // last sign of life, or delivery
	finished bool      // the handler has said Done
	acked    int

	looks  int
	due    time.Time // of the next look
	last   int       // look to say Done at
	panics int
}

func (m *storedMsg) Data() []byte         { return nil }
func (m *storedMsg) Headers() nats.Header { return nil }
func (m *storedMsg) Subject() string      { return streams.IngestSubject(12) }

func (m *storedMsg) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Stream: m.seq}, NumDelivered: 1 + m.earlier, Timestamp: m.at}, nil
}

func (m *storedMsg) InProgress() error {
	m.sign()
	return nil
}

func (m *storedMsg) Ack() error {
	m.sign()
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	if m.acked++; m.acked > 1 || !m.finished {
		m.server.t.Errorf("message %d acked %d times, done is %v", m.seq, m.acked, m.finished)
	}
	return nil
}

// sign is a sign of life: without one for AckWait a server gives the message to
// somebody else.
func (m *storedMsg) sign() {
	m.server.mu.Lock()
	defer m.server.mu.Unlock()
	if d := time.Since(m.alive); d >= streams.AckWait {
		m.server.t.Errorf("no sign of message %d for %v", m.seq, d)
	}
	m.alive = time.Now()
}

// memoryStream has one durable, which delivers each message once.
type memoryStream struct {
	jetstream.Consumer // nil

	t  *testing.T
	mu sync.Mutex
	// messages not delivered yet, in order of their time
	messages []*storedMsg
}

func (s *memoryStream) Fetch(n int, _ ...jetstream.FetchOpt) (jetstream.MessageBatch, error) {
	b := memoryBatch(make(chan jetstream.Msg, n))
	go func() {
		defer close(b)
		for expiry := time.Now().Add(time.Second); n > 0; n-- {
			s.mu.Lock()
			next := expiry
			if len(s.messages) > 0 {
				if at := s.messages[0].at.Add(s.messages[0].late); at.Before(expiry) {
					next = at
				}
			}
			s.mu.Unlock()
			time.Sleep(time.Until(next))
			if next == expiry {
				return
			}
			s.mu.Lock()
			m := s.messages[0]
			s.messages = s.messages[1:]
			m.alive = time.Now()
			s.mu.Unlock()
			b <- m
		}
	}()
	return b, nil
}

type memoryJS struct {
	jetstream.JetStream
	durable jetstream.Consumer
}

func (j memoryJS) Consumer(context.Context, string, string) (jetstream.Consumer, error) {
	return j.durable, nil
}

func (memoryJS) Conn() *nats.Conn { return nil }

type memoryBatch chan jetstream.Msg

func (b memoryBatch) Messages() <-chan jetstream.Msg { return b }
func (b memoryBatch) Error() error                   { return nil }

// stageModel is what the rules allow a stage to begin. It is told of each call
// of the handler and of its result.
type stageModel struct {
	t           *testing.T
	concurrency int
	running     int
	allowed     int
	alone       bool // a call that has panicked runs, and nothing beside it
	holding     bool
	pause       time.Duration
	until       time.Time // no probe before
	held        bool      // there was a hold
}

const leastPause, mostPause = 250 * time.Millisecond, 5 * time.Second

// begin judges a call that begins, and reports whether it is the probe of a
// hold.
func (m *stageModel) begin(suspect bool) (probe bool) {
	m.running++
	now := time.Now()
	switch {
	case m.holding && m.running > 1:
		m.t.Errorf("%d calls at once while the stage holds", m.running)
	case m.holding && now.Before(m.until):
		m.t.Errorf("a probe %v too early", m.until.Sub(now))
	case m.holding:
		return true
	case m.running > m.allowed:
		m.t.Errorf("%d calls at once, allowed are %d", m.running, m.allowed)
	case m.alone || suspect && m.running > 1:
		m.t.Errorf("what has panicked runs beside %d calls", m.running-1)
	}
	m.alone = m.alone || suspect
	return false
}

// end learns from a result.
func (m *stageModel) end(suspect, probe, hold bool) {
	m.running--
	if suspect && !probe {
		m.alone = false
	}
	switch {
	case hold && !m.holding:
		m.holding, m.held, m.pause = true, true, leastPause
		m.until = time.Now().Add(m.pause * 4 / 5)
	case hold && probe:
		m.pause = min(2*m.pause, mostPause)
		m.until = time.Now().Add(m.pause * 4 / 5)
	case hold: // began before the hold
	case probe:
		m.holding, m.allowed = false, 1
	case !m.holding:
		m.allowed = min(2*m.allowed, m.concurrency)
	}
}

// Whatever handlers decide and however long they take: each message is acked
// once and only when it is done, and nobody else gets it meanwhile; none is
// looked at again before its time, and those that wait come back in the order
// of their times; a hold tries one message at a time, with growing pauses, and
// ends slowly; and what panics runs alone. In the end everything is done.
func TestConsumerKeepsItsRulesInAnySchedule(t *testing.T) {
	t.Parallel()
	const schedules = 1000
	metrics := streams.NewConsumerMetrics(prometheus.NewRegistry())
	begin := time.Now()
	for seed := range uint64(schedules) {
		synctest.Test(t, func(t *testing.T) {
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("seed %d", seed)
				}
			})
			playConsumer(t, rand.New(rand.NewPCG(seed, 0)), metrics)
		})
	}
	took := time.Since(begin)
	t.Logf("%d schedules in %v, %.0f a second", schedules, took.Round(time.Millisecond), schedules/took.Seconds())
}

func playConsumer(t *testing.T, rng *rand.Rand, metrics *streams.ConsumerMetrics) {
	upTo := func(d time.Duration) time.Duration { return time.Duration(rng.Int64N(int64(d))) }
	server := &memoryStream{t: t}
	all := map[uint64]*storedMsg{}
	at := time.Now()
	for seq := range uint64(1 + rng.IntN(30)) {
		at = at.Add(upTo(time.Second))
		m := &storedMsg{seq: seq + 1, at: at, server: server, last: 1 + rng.IntN(4)}
		all[m.seq] = m
		server.messages = append(server.messages, m)
	}
	type outage struct{ from, to time.Time }
	var outages []outage
	for range rng.IntN(3) {
		from := time.Now().Add(upTo(20 * time.Second))
		outages = append(outages, outage{from, from.Add(upTo(30 * time.Second))})
	}
	longest := []time.Duration{time.Millisecond, 2 * time.Second}[rng.IntN(2)] // of a call
	m := &stageModel{t: t, concurrency: 1 + rng.IntN(4)}
	m.allowed = m.concurrency

	// What the handler draws depends on the order of calls that begin at one
	// moment; the rules hold in each.
	var mu sync.Mutex
	var lastDue, lastBegan time.Time // of the message looked at again last
	handle := func(_ context.Context, d *streams.Delivery) streams.Decision {
		mu.Lock()
		msg := all[d.Sequence]
		suspect := msg.panics > 0
		probe := m.begin(suspect)
		msg.looks++
		now := time.Now()
		if msg.finished {
			t.Errorf("message %d is looked at after it was done", d.Sequence)
		}
		if now.Before(msg.due) {
			t.Errorf("message %d is looked at %v too early", d.Sequence, msg.due.Sub(now))
		}
		if !msg.due.IsZero() && !m.held && !suspect {
			if msg.due.Before(lastDue) && now.After(lastBegan) { // those of one moment are in no order
				t.Errorf("message %d was due %v before the one that went first", d.Sequence, lastDue.Sub(msg.due))
			}
			lastDue, lastBegan = msg.due, now
		}
		if d.Deliveries != 1 {
			t.Errorf("message %d has %d deliveries", d.Sequence, d.Deliveries)
		}
		took := upTo(longest) + 1
		away := false
		for _, o := range outages {
			away = away || now.After(o.from) && now.Before(o.to)
		}
		panics := !away && msg.panics < 2 && rng.IntN(30) == 0
		after := upTo(40 * time.Second)
		mu.Unlock()

		time.Sleep(took)

		mu.Lock()
		defer mu.Unlock()
		msg.due = time.Time{}
		m.end(suspect, probe, away)
		switch {
		case away:
			return streams.Hold(streams.CauseVendor, errors.New("away"))
		case panics:
			msg.panics++
			msg.due = time.Now().Add(time.Second)
			panic("planted")
		case msg.looks < msg.last:
			msg.due = time.Now().Add(after)
			return streams.RetryAfter(after, errors.New("not yet"))
		}
		server.mu.Lock()
		defer server.mu.Unlock()
		msg.finished = true
		return streams.Done()
	}

	c := &streams.Consumer{
		Stage: streams.StagePrefetcher, Stream: streams.StreamIngest, Durable: streams.DurablePrefetcher, JS: memoryJS{durable: server},
		Log: slog.New(slog.DiscardHandler), Metrics: metrics, Concurrency: m.concurrency, Window: m.concurrency + rng.IntN(20),
	}
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error)
	go func() { stopped <- c.Run(ctx, streams.Each(handle)) }()
	left := len(all)
	for waited := time.Duration(0); left > 0 && waited < time.Hour; waited += 10 * time.Second {
		time.Sleep(10 * time.Second)
		server.mu.Lock()
		left = 0
		for _, m := range all {
			if m.acked == 0 {
				left++
			}
		}
		server.mu.Unlock()
	}
	cancel()
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if left > 0 {
		t.Errorf("%d of %d messages are not done after an hour", left, len(all))
	}
}

// A stream made anew, or restored, uses its sequences again. What comes under
// one that was settled before is another message, also when others had it first.
func TestConsumerHandlesASequenceUsedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		server := &memoryStream{t: t}
		begin := time.Now()
		var all []*storedMsg
		for i := range 3 {
			m := &storedMsg{seq: 1, at: begin.Add(time.Duration(i) * time.Minute), server: server, finished: true}
			all = append(all, m)
		}
		all[1].earlier = 1
		again := *all[1] // the same once more: its ack got lost
		again.earlier, again.late = 2, 30*time.Second
		server.messages = []*storedMsg{all[0], all[1], &again, all[2]}
		calls := 0
		c := streams.Consumer{
			Stage: streams.StagePrefetcher, Stream: streams.StreamIngest, Durable: streams.DurablePrefetcher, JS: memoryJS{durable: server},
			Log: slog.New(slog.DiscardHandler), Metrics: streams.NewConsumerMetrics(prometheus.NewRegistry()),
		}
		ctx, cancel := context.WithCancel(t.Context())
		stopped := make(chan error)
		go func() {
			stopped <- c.Run(ctx, streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
				calls++
				return streams.Done()
			}))
		}()
		time.Sleep(10 * time.Minute)
		cancel()
		if err := <-stopped; err != nil {
			t.Error(err)
		}
		if calls != 3 {
			t.Errorf("%d calls of the handler, want one for each message", calls)
		}
		for i, m := range append(all, &again) {
			if m.acked != 1 {
				t.Errorf("message %d acked %d times", i, m.acked)
			}
		}
	})
}
