package prefetcher

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// running is a prefetcher between a real stream and the vendor's double.
type running struct {
	t    *testing.T
	nats *streamstest.NATS
	conn *streams.Conn
	pub  *streams.Publisher
	sim  *fingerprintsim.Sim
	proc *ops.Process
	stop func() error

	settings map[string]string

	read  uint64 // of FP_ENRICHED
	ends  map[string]record.Record
	waits map[string]time.Duration // from acceptance to the end, by the server's clock
}

func start(t *testing.T, o fingerprintsim.Options, env map[string]string) *running {
	t.Helper()
	n := streamstest.NewNATS(t)
	c := n.Connect("test")
	sim := fingerprintsim.New(o)
	srv := httptest.NewServer(sim)
	t.Cleanup(srv.Close)
	r := &running{
		t: t, nats: n, conn: c, sim: sim, pub: streams.NewPublisher(c.JS, prometheus.NewRegistry()),
		proc: ops.NewProcessLogger("prefetcher", streamstest.Logger(t)), ends: map[string]record.Record{}, waits: map[string]time.Duration{},
	}
	settings := map[string]string{
		"NATS_URL": n.URL, "FINGERPRINT_BASE_URL": srv.URL, "FINGERPRINT_API_KEY": "key", "FINGERPRINT_RATE_LIMIT": "0", "FINGERPRINT_TIMEOUT": "1s",
	}
	maps.Copy(settings, env)
	r.settings = settings
	r.stop = r.replica(r.proc)
	return r
}

// replica starts a prefetcher and returns what stops it.
func (r *running) replica(proc *ops.Process) (stop func() error) {
	r.t.Helper()
	s := ops.NewSettings(func(name string) string { return r.settings[name] })
	cfg := ReadConfig(s)
	if err := s.Err(); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, cfg, proc) }()
	stop = sync.OnceValue(func() error { cancel(); return <-done })
	r.t.Cleanup(func() {
		if err := stop(); err != nil {
			r.t.Error(err)
		}
	})
	return stop
}

func (r *running) accept(ids ...string) { r.acceptFrom(12, ids...) }

func (r *running) acceptFrom(subscriber int64, ids ...string) {
	r.t.Helper()
	for _, id := range ids {
		e := streams.Event{Schema: 1, RequestID: id, SubscriberID: subscriber, SessionID: "s", UserID: "u"}
		body, err := json.Marshal(e)
		if err != nil {
			r.t.Fatal(err)
		}
		// On a busy machine an ack may be late; a repeat is stored once.
		streamstest.Eventually(r.t, "the stream to have "+id, func() bool {
			_, err := r.pub.Publish(r.t.Context(), streams.Message{Stream: streams.StreamIngest, Subject: streams.IngestSubject(subscriber), ID: e.MessageID(), Body: body})
			return err == nil
		})
	}
}

// end waits for the end of an event.
func (r *running) end(id string) record.Record {
	r.t.Helper()
	streamstest.Eventually(r.t, "the end of "+id, func() bool { r.update(); _, ok := r.ends[id]; return ok })
	return r.ends[id]
}

// update reads what FP_ENRICHED has got since.
func (r *running) update() {
	r.t.Helper()
	st, err := r.conn.JS.Stream(r.t.Context(), streams.StreamEnriched)
	if err != nil {
		r.t.Fatal(err)
	}
	for ; r.read < st.CachedInfo().State.LastSeq; r.read++ {
		m, err := st.GetMsg(r.t.Context(), r.read+1)
		if err != nil {
			r.t.Fatal(err)
		}
		rec, err := record.Decode(m.Data)
		if err != nil {
			r.t.Fatal(err)
		}
		if _, twice := r.ends[rec.RequestID]; twice {
			r.t.Errorf("%s ended twice", rec.RequestID)
		}
		r.ends[rec.RequestID], r.waits[rec.RequestID] = rec, m.Time.Sub(rec.AcceptedAt.Time)
	}
}

func (r *running) dead() uint64 {
	r.t.Helper()
	st, err := r.conn.JS.Stream(r.t.Context(), streams.StreamDead)
	if err != nil {
		r.t.Fatal(err)
	}
	return st.CachedInfo().State.Msgs
}

// deliveries is how often the live durable handed out a message, again
// included.
func (r *running) deliveries() int {
	r.t.Helper()
	c, err := r.conn.JS.Consumer(r.t.Context(), streams.StreamIngest, streams.DurablePrefetcher)
	if err != nil {
		r.t.Fatal(err)
	}
	return int(c.CachedInfo().Delivered.Consumer)
}

func (r *running) lag() streams.Lag {
	r.t.Helper()
	l, err := streams.ReadLag(r.t.Context(), r.conn.JS, streams.StreamIngest, streams.DurablePrefetcher)
	if err != nil {
		r.t.Fatal(err)
	}
	return l
}

// holding returns the cause the stage holds for, if it does.
func (r *running) holding() string {
	r.t.Helper()
	families, err := r.proc.Registry.Gather()
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == "fp_stage_holding" && m.GetGauge().GetValue() == 1 {
				return m.GetLabel()[0].GetValue()
			}
		}
	}
	return ""
}

func ids(prefix string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprint(prefix, "-", i)
	}
	return out
}

func TestPrefetcherFetchesEachEventOnce(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key", Latency: time.Millisecond}, nil)
	all := ids("id", 200)
	r.sim.Script("id-7", fingerprintsim.Fault{Status: 404}, fingerprintsim.Fault{Status: 404})
	r.sim.Script("id-8", fingerprintsim.Fault{Status: 503})
	r.accept(all...)
	for _, id := range all {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
	if n := r.sim.Calls(); n != 203 {
		t.Errorf("%d calls, want 203", n)
	}
	if a, b := r.ends["id-7"].Attempts, r.ends["id-8"].Attempts; a != 3 || b != 2 {
		t.Errorf("attempts %d and %d, want 3 and 2", a, b)
	}
}

// Promise 3 for the vendor: each of its faults, for everybody and for as long
// as it takes, burns no attempt and loses nothing.
func TestVendorFaultHoldsAndRecovers(t *testing.T) {
	t.Parallel()
	for name, tt := range map[string]struct {
		fault fingerprintsim.Fault
		cause string
	}{
		"server errors":     {fingerprintsim.Fault{Status: 503}, "fingerprint"},
		"connections reset": {fingerprintsim.Fault{Reset: true}, "fingerprint"},
		"garbage":           {fingerprintsim.Fault{Garbage: fingerprintsim.Truncated}, "fingerprint"},
		"hung":              {fingerprintsim.Fault{Hang: true}, "fingerprint"},
		"key revoked":       {fingerprintsim.Fault{Status: 403, Code: "secret_api_key_not_found"}, "configuration"},
		"wrong region":      {fingerprintsim.Fault{Status: 403, Code: "wrong_region"}, "configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{"FINGERPRINT_TIMEOUT": "100ms"})
			r.sim.SetFault(&tt.fault)
			all := ids("id", 100)
			r.accept(all...)
			streamstest.Eventually(t, "the stage to hold", func() bool { return r.holding() == tt.cause })
			calls := r.sim.Calls()
			if calls > 2*64+20 {
				t.Errorf("%d calls until it held", calls)
			}
			if r.dead() != 0 || r.lag().Messages() == 0 {
				t.Errorf("%d dead letters, %d waiting", r.dead(), r.lag().Messages())
			}
			if err := r.proc.Health.Err(); err != nil {
				t.Errorf("a trouble of the vendor's makes the pod not ready: %v", err)
			}
			r.sim.SetFault(nil)
			for _, id := range all {
				if got := r.end(id); got.Status != record.Ready {
					t.Errorf("%s is %s", id, got.Status)
				}
			}
			if r.dead() != 0 {
				t.Errorf("%d dead letters", r.dead())
			}
		})
	}
}

// A 429 slows the whole stage down and costs no event anything.
func TestThrottledStageSlowsDown(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, nil)
	r.sim.SetFault(&fingerprintsim.Fault{Status: 429, RetryAfter: "1"})
	r.accept(ids("id", 30)...)
	streamstest.Eventually(t, "a 429", func() bool { return r.sim.Calls() > 0 })
	r.sim.SetFault(nil)
	for _, id := range ids("id", 30) {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
}

// Promise 4 for one replica: our own limit keeps the vendor's from being hit.
func TestQuotaIsNotExceeded(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key", Rate: 50, Burst: 150}, map[string]string{"FINGERPRINT_RATE_LIMIT": "50"})
	all := ids("id", 250)
	r.accept(all...)
	for _, id := range all {
		r.end(id)
	}
	if n := r.sim.CountsByStatus()[429]; n > 2 { // two clocks, one bucket each
		t.Errorf("%d of %d calls were 429", n, r.sim.Calls())
	}
}

// A corrected key is picked up without a restart.
func TestCorrectedKeyEndsTheHold(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "key")
	write := func(key string) {
		if err := os.WriteFile(file, []byte(key+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("revoked")
	r := start(t, fingerprintsim.Options{Key: "key"}, map[string]string{"FINGERPRINT_API_KEY": "", "FINGERPRINT_API_KEY_FILE": file})
	r.accept(ids("id", 10)...)
	streamstest.Eventually(t, "the stage to hold", func() bool { return r.holding() == "configuration" })
	write("key")
	for _, id := range ids("id", 10) {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
}

// FP_ENRICHED full is back-pressure: results are kept, not fetched again.
func TestFullStreamIsBackPressure(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key"}, nil)
	limit := func(n int64) {
		cfg := streams.Definition(streams.Limits{})[1].Stream
		cfg.MaxMsgs = n
		if _, err := r.conn.JS.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
	}
	limit(5)
	r.accept(ids("id", 20)...)
	streamstest.Eventually(t, "the stage to hold", func() bool { return r.holding() == "nats" })
	limit(-1)
	for _, id := range ids("id", 20) {
		if got := r.end(id); got.Status != record.Ready {
			t.Errorf("%s is %s", id, got.Status)
		}
	}
	if n := r.sim.Calls(); n != 20 {
		t.Errorf("%d calls for 20 events", n)
	}
	if r.dead() != 0 {
		t.Error("back-pressure made dead letters")
	}
}

// A call under way is finished on stop and its result is not lost; what
// waits is handed back.
func TestStopFinishesCallsUnderWay(t *testing.T) {
	t.Parallel()
	r := start(t, fingerprintsim.Options{Key: "key", Latency: 300 * time.Millisecond}, map[string]string{"PREFETCH_CONCURRENCY": "2"})
	r.accept(ids("id", 4)...)
	streamstest.Eventually(t, "two calls", func() bool { return r.sim.Calls() == 2 })
	if err := r.stop(); err != nil {
		t.Fatal(err)
	}
	r.update()
	if len(r.ends) != 2 {
		t.Errorf("%d results, want those of the two calls under way", len(r.ends))
	}
	if l := r.lag(); l.Messages() != 2 {
		t.Errorf("%d unfinished, want 2", l.Messages())
	}
	if n := r.sim.Calls(); n != 2 {
		t.Errorf("%d calls: one began after the stop", n)
	}
}

func BenchmarkProjectAndEncode(b *testing.B) {
	h, _ := newHandler(vendorFunc(found))
	h.publisher = discard{}
	a := found("1A2B3C4D5E")
	h.vendor = vendorFunc(func(string) Answer {
		var err error
		if a.Projection, err = Project(a.Body); err != nil {
			b.Fatal(err)
		}
		return a
	})
	d := delivery("1A2B3C4D5E")
	b.ReportAllocs()
	for b.Loop() {
		d.Memo = nil
		if dec := h.handle(b.Context(), d); !dec.IsDone() {
			b.Fatal(dec)
		}
	}
}

type discard struct{}

func (discard) Publish(context.Context, streams.Message) (streams.Ack, error) {
	return streams.Ack{}, nil
}
