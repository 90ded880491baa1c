package streams_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// publishing is a publisher on a real server, with what a test needs to
// disturb it and to see what was stored.
type publishing struct {
	t    *testing.T
	nats *streamstest.NATS
	conn *streams.Conn
	reg  *prometheus.Registry
	*streams.Publisher
}

func newPublishing(t *testing.T) *publishing {
	t.Parallel()
	n := streamstest.NewNATS(t)
	c := n.Connect("publisher")
	p := &publishing{t: t, nats: n, conn: c, reg: prometheus.NewRegistry()}
	p.Publisher = streams.NewPublisher(c.JS, p.reg)
	return p
}

func message(id string) streams.Message {
	return streams.Message{Stream: streams.StreamIngest, Subject: streams.IngestSubject(12), ID: id, Body: []byte(id)}
}

// stored counts the copies of each message id in a stream.
func stored(t *testing.T, js jetstream.JetStream, stream string) map[string]int {
	t.Helper()
	s, err := js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	n := map[string]int{}
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		m, err := s.GetMsg(t.Context(), seq)
		if err != nil {
			t.Fatal(err)
		}
		n[m.Header.Get(jetstream.MsgIDHeader)]++
	}
	return n
}

// expect checks what one publish came to: the reason it wraps and its metric.
func (p *publishing) expect(err, reason error, outcome string) {
	p.t.Helper()
	if !errors.Is(err, reason) {
		p.t.Errorf("%v, want %v", err, reason)
	}
	for _, other := range []error{streams.ErrStreamFull, streams.ErrUnavailable, streams.ErrUnsure, streams.ErrTooLarge, streams.ErrRefused} {
		if other != reason && errors.Is(err, other) {
			p.t.Errorf("%v is also %v", err, other)
		}
	}
	if n := mustMetric(p.t, p.reg, "fp_publishes_total", outcome); n == 0 {
		p.t.Errorf("fp_publishes_total{outcome=%q} = 0", outcome)
	}
}

func (p *publishing) updateIngest(change func(*jetstream.StreamConfig)) {
	p.t.Helper()
	cfg := streams.Definition(streams.Limits{})[0].Stream
	change(&cfg)
	if _, err := p.conn.JS.UpdateStream(p.t.Context(), cfg); err != nil {
		p.t.Fatal(err)
	}
}

func TestPublishReturnsTheAckOfTheStream(t *testing.T) {
	p := newPublishing(t)
	m := message("first")
	m.TraceParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	m.Header = nats.Header{streams.HeaderReplay: {"r1"}}
	ack, err := p.Publish(t.Context(), m)
	if err != nil || ack != (streams.Ack{Sequence: 1}) {
		t.Fatalf("%+v, %v", ack, err)
	}
	if ack, err = p.Publish(t.Context(), message("second")); err != nil || ack != (streams.Ack{Sequence: 2}) {
		t.Fatalf("%+v, %v", ack, err)
	}
	// The same id is recognised, whatever else differs.
	again := message("first")
	again.Body, again.Subject = []byte("other"), streams.IngestSubject(13)
	if ack, err = p.Publish(t.Context(), again); err != nil || ack != (streams.Ack{Sequence: 1, Duplicate: true}) {
		t.Fatalf("%+v, %v", ack, err)
	}
	s, err := p.conn.JS.Stream(t.Context(), streams.StreamIngest)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().State.Msgs; n != 2 {
		t.Errorf("%d messages stored", n)
	}
	got, err := s.GetMsg(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if got.Subject != "fp.ingest.12" || string(got.Data) != "first" || got.Header.Get("traceparent") != m.TraceParent ||
		got.Header.Get(streams.HeaderReplay) != "r1" || got.Header.Get(jetstream.MsgIDHeader) != "first" {
		t.Errorf("stored %s %q %v", got.Subject, got.Data, got.Header)
	}
	if a, d := mustMetric(t, p.reg, "fp_publishes_total", "acked"), mustMetric(t, p.reg, "fp_publishes_total", "duplicate"); a != 2 || d != 1 {
		t.Errorf("acked %v, duplicate %v", a, d)
	}
}

// A full stream refuses and remembers nothing: the same message is accepted
// once there is room.
func TestPublishToAFullStream(t *testing.T) {
	for name, limit := range map[string]func(*jetstream.StreamConfig){
		"messages": func(c *jetstream.StreamConfig) { c.MaxMsgs = 1 },
		"bytes":    func(c *jetstream.StreamConfig) { c.MaxBytes = 150 },
	} {
		t.Run(name, func(t *testing.T) {
			p := newPublishing(t)
			p.updateIngest(limit)
			if _, err := p.Publish(t.Context(), message("fits")); err != nil {
				t.Fatal(err)
			}
			_, err := p.Publish(t.Context(), message("refused"))
			p.expect(err, streams.ErrStreamFull, "full")
			// What is stored is still recognised.
			if ack, err := p.Publish(t.Context(), message("fits")); err != nil || !ack.Duplicate {
				t.Errorf("%+v, %v", ack, err)
			}
			p.updateIngest(func(*jetstream.StreamConfig) {})
			if ack, err := p.Publish(t.Context(), message("refused")); err != nil || ack.Duplicate {
				t.Errorf("%+v, %v", ack, err)
			}
			if n := stored(t, p.conn.JS, streams.StreamIngest); n["fits"] != 1 || n["refused"] != 1 {
				t.Errorf("stored %v", n)
			}
		})
	}
}

func TestPublishWithoutTheStream(t *testing.T) {
	p := newPublishing(t)
	if err := p.conn.JS.DeleteStream(t.Context(), streams.StreamIngest); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	_, err := p.Publish(t.Context(), message("a"))
	p.expect(err, streams.ErrUnavailable, "unavailable")
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
}

// Another stream took the subject over: the message must not go there.
func TestPublishToTheWrongStream(t *testing.T) {
	p := newPublishing(t)
	m := message("a")
	m.Stream = streams.StreamEnriched
	_, err := p.Publish(t.Context(), m)
	p.expect(err, streams.ErrRefused, "refused")
	for _, s := range []string{streams.StreamIngest, streams.StreamEnriched} {
		if n := stored(t, p.conn.JS, s); len(n) != 0 {
			t.Errorf("%s holds %v", s, n)
		}
	}
}

func TestPublishTooLarge(t *testing.T) {
	p := newPublishing(t)
	for name, size := range map[string]int{"for the stream": 100 << 10, "for the server": 2 << 20} {
		m := message(name)
		m.Body = bytes.Repeat([]byte("x"), size)
		start := time.Now()
		_, err := p.Publish(t.Context(), m)
		p.expect(err, streams.ErrTooLarge, "too_large")
		if took := time.Since(start); took > time.Second {
			t.Errorf("%s: took %v", name, took)
		}
	}
	if n := stored(t, p.conn.JS, streams.StreamIngest); len(n) != 0 {
		t.Errorf("stored %v", n)
	}
	if _, err := p.Publish(t.Context(), message("small")); err != nil {
		t.Errorf("the connection did not survive: %v", err)
	}
}

func TestPublishWithADoneContext(t *testing.T) {
	p := newPublishing(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	start := time.Now()
	_, err := p.Publish(ctx, message("a"))
	p.expect(err, streams.ErrUnsure, "unsure")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v does not say why", err)
	}
	if took := time.Since(start); took > 200*time.Millisecond {
		t.Errorf("took %v", took)
	}
	if n := stored(t, p.conn.JS, streams.StreamIngest); len(n) != 0 {
		t.Errorf("stored %v", n)
	}
}

// What the caller was told is not stored must not be stored later, when the
// connection is back.
func TestPublishWhileTheServerIsDown(t *testing.T) {
	p := newPublishing(t)
	p.nats.Stop()
	start := time.Now()
	_, err := p.Publish(t.Context(), message("ghost"))
	if err == nil {
		t.Fatal("acked by nobody")
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	streamstest.Eventually(t, "the loss noticed", func() bool { return !p.conn.NC.IsConnected() })
	start = time.Now()
	_, err = p.Publish(t.Context(), message("ghost 2"))
	p.expect(err, streams.ErrUnavailable, "unavailable")
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("took %v", took)
	}
	p.nats.Start()
	streamstest.Eventually(t, "a publish accepted again", func() bool {
		_, err := p.Publish(t.Context(), message("after"))
		return err == nil
	})
	if n := stored(t, p.conn.JS, streams.StreamIngest); n["ghost"]+n["ghost 2"] != 0 || n["after"] != 1 {
		t.Errorf("stored %v", n)
	}
}

// The server dies under load and comes back. Every answer must be true: what
// was acked is there, once; what was refused is not; unsure may be either.
func TestPublishAnswersAreTrueOverARestart(t *testing.T) {
	p := newPublishing(t)
	var mu sync.Mutex
	answers := map[string]error{}
	var acked, refused atomic.Int32
	stop := make(chan struct{})
	var publishers sync.WaitGroup
	for i := range 32 {
		publishers.Go(func() {
			for j := 0; ; j++ {
				select {
				case <-stop:
					return
				default:
				}
				id := fmt.Sprintf("%d-%d", i, j)
				_, err := p.Publish(context.Background(), message(id))
				mu.Lock()
				answers[id] = err
				mu.Unlock()
				if err == nil {
					acked.Add(1)
				} else {
					refused.Add(1)
				}
			}
		})
	}
	streamstest.Eventually(t, "load", func() bool { return acked.Load() > 200 })
	p.nats.Stop()
	down := refused.Load()
	streamstest.Eventually(t, "refusals", func() bool { return refused.Load() > down+64 })
	p.nats.Start()
	up := acked.Load()
	streamstest.Eventually(t, "load again", func() bool { return acked.Load() > up+200 })
	close(stop)
	publishers.Wait()

	n := stored(t, p.conn.JS, streams.StreamIngest)
	unsure := 0
	for id, err := range answers {
		switch {
		case err == nil && n[id] != 1:
			t.Errorf("%s was acked and is stored %d times", id, n[id])
		case errors.Is(err, streams.ErrUnsure):
			unsure++
		case err != nil && n[id] != 0:
			t.Errorf("%s is stored although the answer was: %v", id, err)
		}
		if n[id] > 1 {
			t.Errorf("%s is stored %d times", id, n[id])
		}
	}
	t.Logf("%d acked, %d refused, %d unsure", acked.Load(), int(refused.Load())-unsure, unsure)
}

// The server hangs: nobody closes the connection, nothing comes back. The
// message may get there later, and then a repeat is recognised.
func TestPublishToAHungServer(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	px := newProxy(t, n.URL)
	c, _ := connect(t, streams.ConnectConfig{Name: "publisher", URL: px.URL})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	p := &publishing{t: t, nats: n, conn: c, reg: prometheus.NewRegistry()}
	p.Publisher = streams.NewPublisher(c.JS, p.reg)
	if _, err := p.Publish(t.Context(), message("before")); err != nil {
		t.Fatal(err)
	}
	thaw := px.hang()
	start := time.Now()
	_, err := p.Publish(t.Context(), message("hung"))
	took := time.Since(start)
	p.expect(err, streams.ErrUnsure, "unsure")
	if took < 1500*time.Millisecond || took > 2*time.Second {
		t.Errorf("took %v, want three attempts of half a second", took)
	}
	thaw()
	if _, err := p.Publish(t.Context(), message("hung")); err != nil {
		t.Errorf("repeated: %v", err)
	}
	if n := stored(t, c.JS, streams.StreamIngest); n["hung"] != 1 || n["before"] != 1 {
		t.Errorf("stored %v", n)
	}
}

// The message arrives, the ack is lost, and then the connection: that later
// attempts are refused for certain must not make the first one certain.
func TestPublishWhoseAckIsLostIsUnsure(t *testing.T) {
	p := newPublishing(t)
	px := newProxy(t, p.nats.URL)
	c, _ := connect(t, streams.ConnectConfig{Name: "publisher", URL: px.URL})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	direct := p.Publisher
	p.reg = prometheus.NewRegistry()
	p.Publisher = streams.NewPublisher(c.JS, p.reg)

	px.loseAnswers()
	answer := make(chan error, 1)
	go func() {
		_, err := p.Publish(context.Background(), message("lost ack"))
		answer <- err
	}()
	streamstest.Eventually(t, "the message stored", func() bool { return stored(t, p.conn.JS, streams.StreamIngest)["lost ack"] == 1 })
	px.close()
	p.expect(<-answer, streams.ErrUnsure, "unsure")
	if ack, err := direct.Publish(t.Context(), message("lost ack")); err != nil || !ack.Duplicate {
		t.Errorf("repeated: %+v, %v", ack, err)
	}
}

// When the first attempt's ack is lost, the second is told of a duplicate. That
// is our own, and must not be told as somebody's before us.
func TestPublishIsNoDuplicateOfItself(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	c := n.Connect("publisher")
	if err := c.JS.DeleteStream(t.Context(), streams.StreamIngest); err != nil {
		t.Fatal(err)
	}
	var asked atomic.Int64
	sub, err := c.NC.Subscribe(streams.IngestSubject(12), func(m *nats.Msg) {
		if asked.Add(1) > 1 {
			_ = m.Respond([]byte(`{"stream":"FP_INGEST","seq":7,"duplicate": true}`))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	p := streams.NewPublisher(c.JS, prometheus.NewRegistry())
	for _, want := range []streams.Ack{{Sequence: 7}, {Sequence: 7, Duplicate: true}} {
		if ack, err := p.Publish(t.Context(), message("again")); err != nil || ack != want {
			t.Errorf("%+v, %v, want %+v", ack, err, want)
		}
	}
}

// The caller's deadline ends a publish earlier.
func TestPublishKeepsTheCallersDeadline(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	px := newProxy(t, n.URL)
	c, _ := connect(t, streams.ConnectConfig{Name: "publisher", URL: px.URL})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	p := streams.NewPublisher(c.JS, prometheus.NewRegistry())
	px.hang()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	start := time.Now()
	if _, err := p.Publish(ctx, message("a")); !errors.Is(err, streams.ErrUnsure) {
		t.Error(err)
	}
	if took := time.Since(start); took > 450*time.Millisecond {
		t.Errorf("took %v", took)
	}
}

// An error names the stream and nothing of the message: ids and bodies hold
// personal data, and errors are logged.
func TestPublishErrorsQuoteNothing(t *testing.T) {
	p := newPublishing(t)
	p.nats.Stop()
	m := message("marker-id")
	m.Body = []byte("marker-body")
	_, err := p.Publish(t.Context(), m)
	if err == nil || strings.Contains(err.Error(), "marker") || !strings.Contains(err.Error(), streams.StreamIngest) {
		t.Error(err)
	}
}

// BenchmarkPublish compares Publish with the client's bare call, 64 callers
// each, server included.
func BenchmarkPublish(b *testing.B) {
	body := bytes.Repeat([]byte("x"), 250)
	for name, publisher := range map[string]func(c *streams.Conn) func(id string) error{
		"publisher": func(c *streams.Conn) func(string) error {
			p := streams.NewPublisher(c.JS, prometheus.NewRegistry())
			return func(id string) error {
				_, err := p.Publish(context.Background(), streams.Message{Stream: streams.StreamIngest, Subject: streams.IngestSubject(12), ID: id, Body: body})
				return err
			}
		},
		"bare": func(c *streams.Conn) func(string) error {
			return func(id string) error {
				_, err := c.JS.PublishMsg(context.Background(), &nats.Msg{Subject: streams.IngestSubject(12), Data: body}, jetstream.WithMsgID(id))
				return err
			}
		},
	} {
		b.Run(name, func(b *testing.B) {
			n := streamstest.NewNATS(b)
			publish := publisher(n.Connect("bench"))
			var id atomic.Int64
			b.SetParallelism(32)
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := publish(fmt.Sprint(id.Add(1))); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}
