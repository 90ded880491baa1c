package streams_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// stage is a consumer on a real server, with what a test needs to drive it.
type stage struct {
	t    *testing.T
	nats *streamstest.NATS
	conn *streams.Conn
	pub  *streams.Publisher
	*streams.Consumer

	reg  *prometheus.Registry
	stop func() error
}

// metric returns the value of a gauge or counter with this value of
// one of its labels.
func (s *stage) metric(name, label string) float64 {
	s.t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if f.GetName() == name && l.GetValue() == label {
					return m.GetGauge().GetValue() + m.GetCounter().GetValue()
				}
			}
		}
	}
	s.t.Fatalf("no metric %s{%s}", name, label)
	return 0
}

func newStage(t *testing.T) *stage {
	t.Parallel()
	n := streamstest.NewNATS(t)
	c := n.Connect("stage")
	s := &stage{t: t, nats: n, conn: c, pub: streams.NewPublisher(c.JS, prometheus.NewRegistry()), reg: prometheus.NewRegistry()}
	s.Consumer = &streams.Consumer{
		Stage: streams.StagePrefetcher, Stream: streams.StreamIngest, Durable: streams.DurablePrefetcher,
		JS: c.JS, Publisher: s.pub, Log: streamstest.Logger(t),
		Metrics: streams.NewConsumerMetrics(s.reg), Concurrency: 4,
	}
	return s
}

func (s *stage) publish(ids ...string) {
	s.t.Helper()
	for _, id := range ids {
		e := streams.Event{Schema: 1, RequestID: id, SubscriberID: 12, SessionID: "s", UserID: "u"}
		_, err := s.pub.Publish(s.t.Context(), streams.Message{
			Stream: streams.StreamIngest, Subject: streams.IngestSubject(12), ID: e.MessageID(), Body: []byte(id),
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
}

// start runs the consumer until stop is called or the test ends.
func (s *stage) start(h streams.Handler) {
	ctx, cancel := context.WithCancel(context.Background())
	stopped := make(chan error, 1)
	go func() { stopped <- s.Run(ctx, h) }()
	s.stop = sync.OnceValue(func() error { cancel(); return <-stopped })
	s.t.Cleanup(func() {
		if err := s.stop(); err != nil {
			s.t.Error(err)
		}
	})
}

func (s *stage) lag() streams.Lag {
	s.t.Helper()
	l, err := streams.ReadLag(s.t.Context(), s.conn.JS, s.Stream, s.Durable)
	if err != nil {
		s.t.Fatal(err)
	}
	return l
}

func (s *stage) settled() {
	s.t.Helper()
	streamstest.Eventually(s.t, "everything acknowledged", func() bool { return s.lag().Messages() == 0 })
}

func (s *stage) dead() []*jetstream.RawStreamMsg {
	s.t.Helper()
	st, err := s.conn.JS.Stream(s.t.Context(), streams.StreamDead)
	if err != nil {
		s.t.Fatal(err)
	}
	var out []*jetstream.RawStreamMsg
	for seq := uint64(1); seq <= st.CachedInfo().State.LastSeq; seq++ {
		m, err := st.GetMsg(s.t.Context(), seq)
		if err != nil {
			s.t.Fatal(err)
		}
		out = append(out, m)
	}
	return out
}

// seen records what a handler was given.
type seen struct {
	mu  sync.Mutex
	ids []string
}

func (s *seen) add(id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ids = append(s.ids, id)
	n := 0
	for _, x := range s.ids {
		if x == id {
			n++
		}
	}
	return n
}

func (s *seen) count(id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, x := range s.ids {
		if x == id {
			n++
		}
	}
	return n
}

func TestConsumerAcksWhatIsDone(t *testing.T) {
	s := newStage(t)
	var seen seen
	for i := range 500 {
		s.publish(fmt.Sprint("id-", i))
	}
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		seen.add(string(d.Data))
		return streams.Done()
	}))
	s.settled()
	for i := range 500 {
		if n := seen.count(fmt.Sprint("id-", i)); n != 1 {
			t.Errorf("id-%d handled %d times", i, n)
		}
	}
}

func TestConsumerLooksAgainWithoutAnotherDelivery(t *testing.T) {
	s := newStage(t)
	s.publish("later")
	looks := make(chan [2]int, 10)
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		looks <- [2]int{d.Looks, d.Deliveries}
		if d.Looks < 2 {
			return streams.RetryAfter(20*time.Millisecond, errors.New("not yet"))
		}
		return streams.Done()
	}))
	s.settled()
	for want := range 3 {
		if got := <-looks; got != [2]int{want, 1} {
			t.Errorf("look %d: looks, deliveries = %v", want, got)
		}
	}
}

func TestConsumerStoresDeadLetterBeforeAck(t *testing.T) {
	s := newStage(t)
	s.publish("bad")
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
		return streams.DeadLetter(streams.DeadUndecodable, errors.New("not JSON at offset 0"))
	}))
	s.settled()
	dead := s.dead()
	if len(dead) != 1 {
		t.Fatalf("%d dead letters", len(dead))
	}
	d := dead[0]
	if d.Subject != "fp.dead.prefetcher.12" || string(d.Data) != "bad" {
		t.Errorf("dead letter %s %q", d.Subject, d.Data)
	}
	for header, want := range map[string]string{
		streams.HeaderDeadReason: "undecodable", streams.HeaderDeadError: "not JSON at offset 0", streams.HeaderDeadStage: "prefetcher",
		streams.HeaderDeadStream: "FP_INGEST", streams.HeaderDeadSequence: "1", streams.HeaderDeadSubject: "fp.ingest.12", streams.HeaderDeadDeliveries: "1",
	} {
		if got := d.Header.Get(header); got != want {
			t.Errorf("%s = %q, want %q", header, got, want)
		}
	}
}

// A dead-letter stream that refuses must not cost the message.
// A message whose dead letter has no room waits, and only it.
func TestConsumerKeepsWhatCannotBeDeadLettered(t *testing.T) {
	s := newStage(t)
	limit := func(n int64) {
		cfg := streams.Definition(streams.Limits{})[3].Stream
		cfg.MaxMsgs = n
		if _, err := s.conn.JS.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	limit(1)
	s.publish("first", "second")
	s.Concurrency = 1
	var calls, sound atomic.Int32
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		if string(d.Data) == "sound" {
			sound.Add(1)
			return streams.Done()
		}
		calls.Add(1)
		return streams.DeadLetter(streams.DeadUndecodable, nil)
	}))
	streamstest.Eventually(t, "a dead letter refused", func() bool { return calls.Load() >= 2 })
	s.publish("sound")
	streamstest.Eventually(t, "another message handled", func() bool { return sound.Load() == 1 })
	streamstest.Eventually(t, "it refused again and again", func() bool { return calls.Load() >= 4 })
	if l := s.lag(); l.Messages() != 1 {
		t.Errorf("unfinished = %d, want the one whose dead letter was refused", l.Messages())
	}
	limit(-1)
	s.settled()
	if n := len(s.dead()); n != 2 {
		t.Errorf("%d dead letters, want 2", n)
	}
}

// While a dependency is down nothing is lost, given up or delivered again,
// and one message at a time is tried.
func TestConsumerHoldBurnsNoAttempt(t *testing.T) {
	s := newStage(t)
	for i := range 50 {
		s.publish(fmt.Sprint("id-", i))
	}
	var down atomic.Bool
	down.Store(true)
	var running, most, probes atomic.Int32
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		defer running.Add(-1)
		n := running.Add(1)
		if down.Load() {
			if probes.Add(1) > 4 && n > most.Load() {
				most.Store(n)
			}
			return streams.Hold(streams.CauseRedis, errors.New("connection refused"))
		}
		if d.Deliveries != 1 {
			t.Errorf("delivery %d after a hold", d.Deliveries)
		}
		return streams.Done()
	}))
	streamstest.Eventually(t, "some probes", func() bool { return probes.Load() > 7 })
	if n := most.Load(); n > 1 {
		t.Errorf("%d probes at once", n)
	}
	if n := s.metric("fp_stage_holding", "redis"); n != 1 {
		t.Errorf("fp_stage_holding = %v during the hold", n)
	}
	down.Store(false)
	s.settled()
	if n := s.metric("fp_stage_holding", "redis"); n != 0 {
		t.Errorf("fp_stage_holding = %v after the hold", n)
	}
	if len(s.dead()) != 0 {
		t.Error("dead letters from an outage")
	}
}

// A single message that always makes the stage hold must not stop the others:
// probes take other messages, also ones that arrive later.
func TestConsumerHoldEndsWithAnotherMessage(t *testing.T) {
	s := newStage(t)
	s.Concurrency = 1
	s.publish("odd")
	var odd atomic.Int32
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		if string(d.Data) == "odd" && odd.Add(1) < 4 {
			return streams.Hold(streams.CauseVendor, errors.New("looks like an outage"))
		}
		return streams.Done()
	}))
	streamstest.Eventually(t, "a hold", func() bool { return odd.Load() > 1 })
	s.publish("fine")
	s.settled()
}

func TestConsumerHandsBackAtOnceOnStop(t *testing.T) {
	s := newStage(t)
	s.Concurrency, s.Window = 1, 10
	for i := range 10 {
		s.publish(fmt.Sprint("id-", i))
	}
	started, finish := make(chan struct{}), make(chan struct{})
	var once sync.Once
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
		once.Do(func() { close(started) })
		<-finish
		return streams.Done()
	}))
	<-started
	streamstest.Eventually(t, "ten in hand", func() bool { return s.lag().InFlight == 10 })
	close(finish)
	begin := time.Now()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	// Whatever was not finished is available to the next replica now, long
	// before AckWait.
	var got atomic.Int32
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
		got.Add(1)
		return streams.Done()
	}))
	s.settled()
	if took := time.Since(begin); took > streams.AckWait/2 {
		t.Errorf("took %v", took)
	}
}

// A stopping replica's last pull must not get again what it hands back: each
// time would count as a delivery, and enough of them as poison.
func TestConsumerHandsBackOnceOnStop(t *testing.T) {
	s := newStage(t)
	s.Concurrency, s.Window = 4, 20
	s.publish("parked-1", "parked-2", "parked-3")
	parked := make(chan struct{}, 3)
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
		parked <- struct{}{}
		return streams.RetryAfter(time.Minute, errors.New("not yet"))
	}))
	for range 3 {
		<-parked
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		if d.Deliveries > 2 {
			t.Errorf("%s: delivery %d after one stop", d.Data, d.Deliveries)
		}
		return streams.Done()
	}))
	s.settled()
}

func TestConsumerStopsInTimeWithAHungHandler(t *testing.T) {
	s := newStage(t)
	s.StopTimeout = 50 * time.Millisecond
	s.publish("hang")
	started, release := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(release) })
	ctx, cancel := context.WithCancel(t.Context())
	stopped := make(chan error, 1)
	go func() {
		stopped <- s.Run(ctx, streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
			close(started)
			<-release
			return streams.Done()
		}))
	}()
	<-started
	cancel()
	if err := <-stopped; err == nil {
		t.Error("no error although a handler was left behind")
	}
}

// A panic costs its message only, and that one only after three tries.
func TestConsumerIsolatesAPanic(t *testing.T) {
	s := newStage(t)
	s.Batch = 8
	s.publish("a", "b", "boom", "c", "d")
	var boom atomic.Int32
	s.start(func(_ context.Context, batch []*streams.Delivery) []streams.Decision {
		out := make([]streams.Decision, len(batch))
		for i, d := range batch {
			switch {
			case d.Poison():
				out[i] = streams.DeadLetter(streams.DeadPoison, errors.New("kills the stage"))
			case string(d.Data) == "boom":
				boom.Add(1)
				panic("boom")
			default:
				out[i] = streams.Done()
			}
		}
		return out
	})
	s.settled()
	dead := s.dead()
	if len(dead) != 1 || string(dead[0].Data) != "boom" {
		t.Fatalf("dead letters: %d", len(dead))
	}
	if n := boom.Load(); n != 3 {
		t.Errorf("tried %d times, want 3", n)
	}
}

// A message that kills its process is recognised by its deliveries, is tried
// alone, and its neighbours are not given up with it.
func TestConsumerRecognisesPoisonByDeliveries(t *testing.T) {
	s := newStage(t)
	s.publish("n1", "n2", "killer", "n3")
	cons, err := s.conn.JS.Consumer(t.Context(), s.Stream, s.Durable)
	if err != nil {
		t.Fatal(err)
	}
	for range streams.MaxDeliveries { // as many processes that died with them in hand
		batch, err := cons.Fetch(4, jetstream.FetchMaxWait(5*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		for m := range batch.Messages() {
			if err := m.Nak(); err != nil {
				t.Fatal(err)
			}
		}
	}
	var running atomic.Int32
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		if running.Add(1) > 1 {
			t.Error("a suspect runs beside others")
		}
		defer running.Add(-1)
		if d.Poison() && string(d.Data) == "killer" {
			return streams.DeadLetter(streams.DeadPoison, nil)
		}
		return streams.Done()
	}))
	s.settled()
	if dead := s.dead(); len(dead) != 1 || string(dead[0].Data) != "killer" {
		t.Errorf("%d dead letters", len(dead))
	}
}

// Any order: the stage starts before the server and before its streams exist.
func TestConsumerStartsBeforeServerAndStreams(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	n.Stop()
	c, err := streams.Connect(streams.ConnectConfig{Name: "early", URL: n.URL}, streamstest.Logger(t), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	var reachable sync.Map
	s := &stage{t: t, nats: n, conn: c, pub: streams.NewPublisher(c.JS, prometheus.NewRegistry())}
	s.Consumer = &streams.Consumer{
		Stage: streams.StagePrefetcher, Stream: streams.StreamIngest, Durable: streams.DurablePrefetcher, JS: c.JS,
		Publisher: s.pub, Log: streamstest.Logger(t), Metrics: streams.NewConsumerMetrics(prometheus.NewRegistry()),
		Reachable: func(err error) { reachable.Store("last", fmt.Sprint(err)) },
	}
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision { return streams.Done() }))
	streamstest.Eventually(t, "a report that nothing is reachable", func() bool { v, _ := reachable.Load("last"); return v != nil && v != "<nil>" })
	n.Start()
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	if _, err := streams.Ensure(t.Context(), c.JS, streams.Limits{}, false); err != nil {
		t.Fatal(err)
	}
	s.publish("id")
	s.settled()
	streamstest.Eventually(t, "a report that all is well", func() bool { v, _ := reachable.Load("last"); return v == "<nil>" })
}

// While the server is away nothing is asked of the connection: each pull that
// fails on it would leave a subscription behind.
func TestConsumerLeavesNothingBehindWithoutAServer(t *testing.T) {
	s := newStage(t)
	s.publish("first")
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision { return streams.Done() }))
	s.settled()
	s.nats.Stop()
	var refused atomic.Int32
	streamstest.Eventually(t, "the loss noticed", func() bool { return !s.conn.NC.IsConnected() })
	streamstest.Eventually(t, "the last pull ended", func() bool { return s.conn.NC.NumSubscriptions() <= 1 })
	for range 20 {
		if _, err := s.pub.Publish(t.Context(), streams.Message{Stream: streams.StreamIngest, Subject: streams.IngestSubject(12), ID: "x", Body: []byte("x")}); err != nil {
			refused.Add(1)
		}
	}
	if refused.Load() != 20 {
		t.Fatal("a publish was accepted by nobody")
	}
	// The client library's own memory of requests; it offers no other look.
	if n := reflect.ValueOf(s.conn.NC).Elem().FieldByName("respMap").Len(); n > 1 {
		t.Errorf("%d requests remembered", n)
	}
	if n := s.conn.NC.NumSubscriptions(); n > 1 {
		t.Errorf("%d subscriptions", n)
	}
	s.nats.Start()
	streamstest.Eventually(t, "the connection won back", s.conn.NC.IsConnected)
	s.publish("second")
	s.settled()
}

// The server dies with messages in hand: what was finished meanwhile is acked
// once it is back, and nothing is handled twice.
func TestConsumerKeepsAcksOverServerRestart(t *testing.T) {
	s := newStage(t)
	var seen seen
	finish := make(chan struct{})
	s.publish("a", "b", "c")
	s.start(streams.Each(func(_ context.Context, d *streams.Delivery) streams.Decision {
		seen.add(string(d.Data))
		<-finish
		return streams.Done()
	}))
	streamstest.Eventually(t, "three in hand", func() bool { return seen.count("a")+seen.count("b")+seen.count("c") == 3 })
	s.nats.Stop()
	close(finish)
	streamstest.Eventually(t, "the loss noticed", func() bool { return !s.conn.NC.IsConnected() })
	s.nats.Start()
	streamstest.Eventually(t, "a new connection", s.conn.NC.IsConnected)
	s.settled()
	for _, id := range []string{"a", "b", "c"} {
		if n := seen.count(id); n != 1 {
			t.Errorf("%s handled %d times", id, n)
		}
	}
}

// BenchmarkConsume is the runner's own cost a message, server included.
func BenchmarkConsume(b *testing.B) {
	for _, batch := range []int{1, 256} {
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			n := streamstest.NewNATS(b)
			c := n.Connect("bench")
			body := make([]byte, 300)
			for range b.N {
				if _, err := c.JS.PublishAsync(streams.IngestSubject(1), body); err != nil {
					b.Fatal(err)
				}
			}
			<-c.JS.PublishAsyncComplete()
			reg := prometheus.NewRegistry()
			s := streams.Consumer{
				Stage: streams.StagePrefetcher, Stream: streams.StreamIngest, Durable: streams.DurablePrefetcher, JS: c.JS,
				Publisher: streams.NewPublisher(c.JS, reg), Log: slog.New(slog.DiscardHandler), Metrics: streams.NewConsumerMetrics(reg),
				Concurrency: 4, Batch: batch, Window: 2048,
			}
			ctx, cancel := context.WithCancel(b.Context())
			var left atomic.Int64
			left.Store(int64(b.N))
			b.ReportAllocs()
			b.ResetTimer()
			err := s.Run(ctx, streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
				if left.Add(-1) == 0 {
					b.StopTimer() // stopping waits for the last pull to expire
					cancel()
				}
				return streams.Done()
			}))
			if err != nil {
				b.Fatal(err)
			}
		})
	}
}
