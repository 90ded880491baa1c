package streams_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// What the server says after Ensure is what is documented, spelled out here
// once more because deployments and permissions repeat it.
func TestEnsureCreatesWhatIsDocumented(t *testing.T) {
	t.Parallel()
	js := streamstest.NewNATS(t).Connect("test").JS
	const kib, gib = 1 << 10, 1 << 30
	type stream struct {
		Subject    string
		MaxAge     time.Duration
		MaxMsgSize int32
		MaxBytes   int64
		Durables   map[string]string // and their filters
	}
	want := map[string]stream{
		"FP_INGEST":   {"fp.ingest.*", 72 * time.Hour, 96 * kib, 1 * gib, map[string]string{"prefetcher": "fp.ingest.*", "persister-pending": "fp.ingest.*"}},
		"FP_ENRICHED": {"fp.enriched.*", 72 * time.Hour, 512 * kib, 4 * gib, map[string]string{"persister": "fp.enriched.*"}},
		"FP_BACKFILL": {"fp.backfill.*.*", 72 * time.Hour, 512 * kib, 1 * gib, map[string]string{
			"prefetcher-backfill": "fp.backfill.prefetcher.*", "persister-backfill": "fp.backfill.persister.*"}},
		"FP_DEAD":  {"fp.dead.*.*", 7 * 24 * time.Hour, 640 * kib, 1 * gib, map[string]string{}},
		"FP_AUDIT": {"fp.audit.*", 365 * 24 * time.Hour, 64 * kib, gib / 4, map[string]string{}},
	}
	got := map[string]stream{}
	list := js.ListStreams(t.Context())
	for info := range list.Info() {
		c := info.Config
		if c.Storage != jetstream.FileStorage || c.Compression != jetstream.NoCompression || c.Retention != jetstream.LimitsPolicy ||
			c.Discard != jetstream.DiscardNew || c.Duplicates != 10*time.Minute || !c.AllowDirect || c.DenyDelete != (c.Name == streams.StreamAudit) || c.DenyPurge != c.DenyDelete || c.NoAck ||
			c.Replicas != 1 || c.MaxMsgs != -1 || c.MaxMsgsPerSubject != -1 || c.DiscardNewPerSubject {
			t.Errorf("%s: %+v", c.Name, c)
		}
		s := stream{strings.Join(c.Subjects, " "), c.MaxAge, c.MaxMsgSize, c.MaxBytes, map[string]string{}}
		handle, err := js.Stream(t.Context(), c.Name)
		if err != nil {
			t.Fatal(err)
		}
		consumers := handle.ListConsumers(t.Context())
		for info := range consumers.Info() {
			c := info.Config
			if c.DeliverPolicy != jetstream.DeliverAllPolicy || c.AckPolicy != jetstream.AckExplicitPolicy || c.AckWait != 30*time.Second ||
				c.MaxDeliver != -1 || len(c.BackOff) != 0 || c.MaxAckPending != 20_000 || c.InactiveThreshold != 0 || c.HeadersOnly {
				t.Errorf("%s: %+v", c.Durable, c)
			}
			s.Durables[c.Durable] = c.FilterSubject
		}
		if err := consumers.Err(); err != nil {
			t.Fatal(err)
		}
		got[c.Name] = s
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestEnsureIsIdempotent(t *testing.T) {
	t.Parallel()
	js := streamstest.NewEmptyNATS(t).Connect("test").JS
	limits := streams.Limits{Replicas: 1, MaxBytes: map[string]int64{streams.StreamDead: 1 << 20}}
	all := []streams.Change{
		{Object: "FP_INGEST"}, {Object: "FP_INGEST/prefetcher"}, {Object: "FP_INGEST/persister-pending"},
		{Object: "FP_ENRICHED"}, {Object: "FP_ENRICHED/persister"},
		{Object: "FP_BACKFILL"}, {Object: "FP_BACKFILL/prefetcher-backfill"}, {Object: "FP_BACKFILL/persister-backfill"},
		{Object: "FP_DEAD"},
		{Object: "FP_AUDIT"},
	}
	diff := func(want []streams.Change) {
		t.Helper()
		got, err := streams.Diff(t.Context(), js, limits)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("Diff: -want +got\n%s", d)
		}
	}
	ensure := func(want []streams.Change) {
		t.Helper()
		got, err := streams.Ensure(t.Context(), js, limits, false)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("Ensure: -want +got\n%s", d)
		}
	}
	diff(all)
	diff(all) // and has created nothing
	ensure(all)
	diff(nil)
	ensure(nil)
	// Messages and how far durables are survive another Ensure.
	if _, err := js.Publish(t.Context(), "fp.ingest.12", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if err := js.DeleteConsumer(t.Context(), streams.StreamIngest, streams.DurablePending); err != nil {
		t.Fatal(err)
	}
	fetchAndAck(t, js, streams.StreamIngest, streams.DurablePrefetcher, 1)
	missing := []streams.Change{{Object: "FP_INGEST/persister-pending"}}
	diff(missing)
	ensure(missing)
	if l, err := streams.ReadLag(t.Context(), js, streams.StreamIngest, streams.DurablePrefetcher); err != nil || l.Messages() != 0 {
		t.Errorf("%+v, %v: the durable started over", l, err)
	}
	if l, err := streams.ReadLag(t.Context(), js, streams.StreamIngest, streams.DurablePending); err != nil || l.Messages() != 1 {
		t.Errorf("%+v, %v: the new durable does not start at the beginning", l, err)
	}
}

// fetchAndAck takes n messages and acknowledges them.
func fetchAndAck(t *testing.T, js jetstream.JetStream, stream, durable string, n int) {
	t.Helper()
	for _, m := range fetch(t, js, stream, durable, n) {
		if err := m.DoubleAck(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func fetch(t *testing.T, js jetstream.JetStream, stream, durable string, n int) []jetstream.Msg {
	t.Helper()
	c, err := js.Consumer(t.Context(), stream, durable)
	if err != nil {
		t.Fatal(err)
	}
	batch, err := c.Fetch(n, jetstream.FetchMaxWait(10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	var out []jetstream.Msg
	for m := range batch.Messages() {
		out = append(out, m)
	}
	if len(out) != n {
		t.Fatalf("fetched %d of %d messages: %v", len(out), n, batch.Error())
	}
	return out
}

// Every setting that matters is compared: one that drifts unseen can drop
// messages, refuse them, or change what a stage gets to see.
func TestDiffFindsDriftOfAStream(t *testing.T) {
	t.Parallel()
	js := streamstest.NewNATS(t).Connect("test").JS
	for want, drift := range map[string]func(*jetstream.StreamConfig){
		`~ FP_DEAD  subjects: [fp.dead.*.* other.*] -> [fp.dead.*.*]`: func(c *jetstream.StreamConfig) { c.Subjects = append(c.Subjects, "other.*") },
		`~ FP_DEAD  compression: S2 -> None`:                          func(c *jetstream.StreamConfig) { c.Compression = jetstream.S2Compression },
		`~ FP_DEAD  discard: DiscardOld -> DiscardNew`:                func(c *jetstream.StreamConfig) { c.Discard = jetstream.DiscardOld },
		`~ FP_DEAD  max_age: 1h0m0s -> 168h0m0s`:                      func(c *jetstream.StreamConfig) { c.MaxAge = time.Hour },
		`~ FP_DEAD  max_age: 0s -> 168h0m0s`:                          func(c *jetstream.StreamConfig) { c.MaxAge = 0 },
		`~ FP_DEAD  max_msg_size: 1024 -> 655360`:                     func(c *jetstream.StreamConfig) { c.MaxMsgSize = 1024 },
		`~ FP_DEAD  max_bytes: 1000 -> 1073741824`:                    func(c *jetstream.StreamConfig) { c.MaxBytes = 1000 },
		`~ FP_DEAD  max_msgs: 5 -> -1`:                                func(c *jetstream.StreamConfig) { c.MaxMsgs = 5 },
		`~ FP_DEAD  max_msgs_per_subject: 1 -> -1`:                    func(c *jetstream.StreamConfig) { c.MaxMsgsPerSubject = 1 },
		`~ FP_DEAD  max_consumers: 7 -> -1`:                           func(c *jetstream.StreamConfig) { c.MaxConsumers = 7 },
		`~ FP_DEAD  duplicate_window: 1m0s -> 10m0s`:                  func(c *jetstream.StreamConfig) { c.Duplicates = time.Minute },
		`~ FP_DEAD  no_ack: true -> false`:                            func(c *jetstream.StreamConfig) { c.NoAck = true },
		`~ FP_DEAD  allow_direct: false -> true`:                      func(c *jetstream.StreamConfig) { c.AllowDirect = false },
		`~ FP_DEAD  allow_rollup: true -> false`:                      func(c *jetstream.StreamConfig) { c.AllowRollup = true },
		`~ FP_DEAD  republish: true -> false`: func(c *jetstream.StreamConfig) {
			c.RePublish = &jetstream.RePublish{Source: ">", Destination: "tap.>"}
		},
		`~ FP_DEAD  subject_transform: true -> false`: func(c *jetstream.StreamConfig) {
			c.SubjectTransform = &jetstream.SubjectTransformConfig{Source: "fp.dead.*.*", Destination: "fp.dead.{{wildcard(1)}}.0"}
		},
		`~ FP_DEAD  sources: 1 -> 0`: func(c *jetstream.StreamConfig) { c.Sources = []*jetstream.StreamSource{{Name: streams.StreamIngest}} },
	} {
		c := streams.Definition(streams.Limits{})[3].Stream
		drift(&c)
		if _, err := js.UpdateStream(t.Context(), c); err != nil {
			t.Errorf("%s: %v", want, err)
			continue
		}
		repaired(t, js, want)
	}
}

func TestDiffFindsDriftOfADurable(t *testing.T) {
	t.Parallel()
	js := streamstest.NewNATS(t).Connect("test").JS
	for want, drift := range map[string]func(*jetstream.ConsumerConfig){
		`~ FP_ENRICHED/persister  filter_subject: fp.enriched.12 -> fp.enriched.*`: func(c *jetstream.ConsumerConfig) { c.FilterSubject = "fp.enriched.12" },
		`~ FP_ENRICHED/persister  headers_only: true -> false`:                     func(c *jetstream.ConsumerConfig) { c.HeadersOnly = true },
		`~ FP_ENRICHED/persister  ack_wait: 1s -> 30s`:                             func(c *jetstream.ConsumerConfig) { c.AckWait = time.Second },
		`~ FP_ENRICHED/persister  max_deliver: 3 -> -1`:                            func(c *jetstream.ConsumerConfig) { c.MaxDeliver = 3 },
		`~ FP_ENRICHED/persister  max_ack_pending: 7 -> 20000`:                     func(c *jetstream.ConsumerConfig) { c.MaxAckPending = 7 },
		`~ FP_ENRICHED/persister  max_batch: 2 -> 0`:                               func(c *jetstream.ConsumerConfig) { c.MaxRequestBatch = 2 },
		`~ FP_ENRICHED/persister  max_expires: 2s -> 0s`:                           func(c *jetstream.ConsumerConfig) { c.MaxRequestExpires = 2 * time.Second },
		`~ FP_ENRICHED/persister  max_bytes: 2000 -> 0`:                            func(c *jetstream.ConsumerConfig) { c.MaxRequestMaxBytes = 2000 },
		`~ FP_ENRICHED/persister  inactive_threshold: 1h0m0s -> 0s`:                func(c *jetstream.ConsumerConfig) { c.InactiveThreshold = time.Hour },
	} {
		c := streams.Definition(streams.Limits{})[1].Durables[0]
		drift(&c)
		if _, err := js.UpdateConsumer(t.Context(), streams.StreamEnriched, c); err != nil {
			t.Errorf("%s: %v", want, err)
			continue
		}
		repaired(t, js, want)
	}
	for name, c := range map[string]struct {
		drift func(*jetstream.ConsumerConfig)
		want  []string
	}{
		"backoff": {
			func(c *jetstream.ConsumerConfig) { c.BackOff, c.AckWait = []time.Duration{time.Minute}, time.Minute },
			[]string{`ack_wait: 1m0s -> 30s`, `backoff: [1m0s] -> []`},
		},
		"two filters": {
			func(c *jetstream.ConsumerConfig) {
				c.FilterSubject, c.FilterSubjects = "", []string{"fp.enriched.1", "fp.enriched.2"}
			},
			[]string{`filter_subject:  -> fp.enriched.*`, `filter_subjects: [fp.enriched.1 fp.enriched.2] -> []`},
		},
	} {
		cfg := streams.Definition(streams.Limits{})[1].Durables[0]
		c.drift(&cfg)
		if _, err := js.UpdateConsumer(t.Context(), streams.StreamEnriched, cfg); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for i, w := range c.want {
			c.want[i] = "~ FP_ENRICHED/persister  " + w
		}
		repaired(t, js, c.want...)
	}
}

// repaired checks that Diff finds exactly the wanted changes, and that Ensure
// makes them.
func repaired(t *testing.T, js jetstream.JetStream, want ...string) {
	t.Helper()
	changes, err := streams.Diff(t.Context(), js, streams.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range changes {
		got = append(got, c.String())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
	if _, err := streams.Ensure(t.Context(), js, streams.Limits{}, false); err != nil {
		t.Errorf("%v: %v", want, err)
		return
	}
	if left, err := streams.Diff(t.Context(), js, streams.Limits{}); err != nil || len(left) != 0 {
		t.Errorf("%v: after Ensure %v, %v", want, left, err)
	}
}

// What the server cannot change must be an error each time: silence would
// mean that all is well.
func TestEnsureSaysWhatCannotBeChanged(t *testing.T) {
	t.Parallel()
	for want, drift := range map[string]func(*streams.StreamDefinition){
		"~ FP_ENRICHED  storage: Memory -> File":                     func(d *streams.StreamDefinition) { d.Stream.Storage = jetstream.MemoryStorage },
		"~ FP_ENRICHED  retention: WorkQueue -> Limits":              func(d *streams.StreamDefinition) { d.Stream.Retention = jetstream.WorkQueuePolicy },
		"~ FP_ENRICHED  deny_delete: true -> false":                  func(d *streams.StreamDefinition) { d.Stream.DenyDelete = true },
		"~ FP_ENRICHED  deny_purge: true -> false":                   func(d *streams.StreamDefinition) { d.Stream.DenyPurge = true },
		"~ FP_ENRICHED/persister  mem_storage: true -> false":        func(d *streams.StreamDefinition) { d.Durables[0].MemoryStorage = true },
		"~ FP_ENRICHED/persister  deliver_policy: new -> all":        func(d *streams.StreamDefinition) { d.Durables[0].DeliverPolicy = jetstream.DeliverNewPolicy },
		"~ FP_ENRICHED/persister  ack_policy: AckAll -> AckExplicit": func(d *streams.StreamDefinition) { d.Durables[0].AckPolicy = jetstream.AckAllPolicy },
		"~ FP_ENRICHED/persister  replay_policy: original -> instant": func(d *streams.StreamDefinition) {
			d.Durables[0].ReplayPolicy = jetstream.ReplayOriginalPolicy
		},
		"~ FP_ENRICHED/persister  max_waiting: 4 -> 512": func(d *streams.StreamDefinition) { d.Durables[0].MaxWaiting = 4 },
	} {
		t.Run(want, func(t *testing.T) {
			t.Parallel()
			js := streamstest.NewEmptyNATS(t).Connect("test").JS
			for i, d := range streams.Definition(streams.Limits{}) {
				if i == 1 {
					drift(&d)
				}
				if _, err := js.CreateStream(t.Context(), d.Stream); err != nil {
					t.Fatal(err)
				}
				for _, c := range d.Durables {
					if _, err := js.CreateConsumer(t.Context(), d.Stream.Name, c); err != nil {
						t.Fatal(err)
					}
				}
			}
			changes, err := streams.Diff(t.Context(), js, streams.Limits{})
			if err != nil || len(changes) != 1 || changes[0].String() != want {
				t.Fatalf("%v, %v", changes, err)
			}
			for range 2 {
				changes, err := streams.Ensure(t.Context(), js, streams.Limits{}, false)
				if err == nil {
					left, _ := streams.Diff(t.Context(), js, streams.Limits{})
					t.Fatalf("%v made without an error, left %v", changes, left)
				}
			}
		})
	}
}

// A change that costs messages, copies or room is refused before anything is
// touched, and made when it is asked for.
func TestEnsureRefusesLoss(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		have  func(*jetstream.StreamConfig)
		limit map[string]int64
		want  string
	}{
		"younger": {
			have: func(c *jetstream.StreamConfig) { c.MaxAge = 1000 * time.Hour },
			want: "~ FP_INGEST  max_age: 1000h0m0s -> 72h0m0s  (drops messages)",
		},
		"of any age": {
			have: func(c *jetstream.StreamConfig) { c.MaxAge = 0 },
			want: "~ FP_INGEST  max_age: 0s -> 72h0m0s  (drops messages)",
		},
		"smaller": {
			have: func(*jetstream.StreamConfig) {}, limit: map[string]int64{streams.StreamIngest: 500},
			want: "~ FP_INGEST  max_bytes: 1073741824 -> 500  (leaves no room for new messages)",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			js := streamstest.NewNATS(t).Connect("test").JS
			cfg := streams.Definition(streams.Limits{})[0].Stream
			c.have(&cfg)
			if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
				t.Fatal(err)
			}
			for i := range 10 {
				if _, err := js.Publish(t.Context(), "fp.ingest.12", fmt.Appendf(nil, "message %d of some length", i)); err != nil {
					t.Fatal(err)
				}
			}
			// Another change, without loss, comes along.
			dead := streams.Definition(streams.Limits{})[3].Stream
			dead.MaxAge = time.Hour
			if _, err := js.UpdateStream(t.Context(), dead); err != nil {
				t.Fatal(err)
			}
			limits := streams.Limits{MaxBytes: c.limit}
			before, err := streams.Diff(t.Context(), js, limits)
			if err != nil || len(before) != 2 || before[0].String() != c.want {
				t.Fatalf("%v, %v", before, err)
			}
			changes, err := streams.Ensure(t.Context(), js, limits, false)
			if !errors.Is(err, streams.ErrWouldLose) || !strings.Contains(err.Error(), c.want) || len(changes) != 2 {
				t.Fatalf("%v, %v", changes, err)
			}
			if after, err := streams.Diff(t.Context(), js, limits); err != nil || cmp.Diff(before, after) != "" {
				t.Fatalf("something was touched: %v, %v", after, err)
			}
			if _, err := streams.Ensure(t.Context(), js, limits, true); err != nil {
				t.Fatal(err)
			}
			if after, err := streams.Diff(t.Context(), js, limits); err != nil || len(after) != 0 {
				t.Fatalf("left: %v, %v", after, err)
			}
			s, err := js.Stream(t.Context(), streams.StreamIngest)
			if err != nil {
				t.Fatal(err)
			}
			if n := s.CachedInfo().State.Msgs; n != 10 { // none is that old
				t.Errorf("%d of 10 messages left", n)
			}
		})
	}
}

// An empty stream has nothing to lose.
func TestEnsureShrinksAnEmptyStream(t *testing.T) {
	t.Parallel()
	js := streamstest.NewNATS(t).Connect("test").JS
	cfg := streams.Definition(streams.Limits{})[0].Stream
	cfg.MaxAge = 0
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	limits := streams.Limits{MaxBytes: map[string]int64{streams.StreamIngest: 500}}
	if changes, err := streams.Ensure(t.Context(), js, limits, false); err != nil || len(changes) != 2 {
		t.Errorf("%v, %v", changes, err)
	}
}

func TestDiffNeedsAServer(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	c := n.Connect("test")
	js := c.JS
	n.Stop()
	streamstest.Eventually(t, "the loss noticed", func() bool { return !c.NC.IsConnected() })
	if changes, err := streams.Diff(t.Context(), js, streams.Limits{}); err == nil {
		t.Errorf("%v without a server", changes)
	}
}

// Production keeps three copies; an apply that forgets to say so must not
// quietly drop two of them.
func TestEnsureRefusesToDropCopies(t *testing.T) {
	t.Parallel()
	const copies = 3
	nodes, routes := make([]*ownServer, copies), make([]*url.URL, copies)
	for i := range nodes {
		nodes[i] = newOwnServer(t)
		routes[i] = &url.URL{Scheme: "nats", Host: streamstest.FreeAddr(t)}
	}
	for i, n := range nodes {
		port, err := strconv.Atoi(routes[i].Port())
		if err != nil {
			t.Fatal(err)
		}
		n.start(server.Options{
			ServerName: fmt.Sprint("n", i), JetStream: true, StoreDir: t.TempDir(), Routes: routes,
			Cluster: server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: port},
		})
	}
	c, _ := connect(t, streams.ConnectConfig{Name: "test", URL: "nats://" + nodes[0].Addr})
	streamstest.Eventually(t, "three copies of everything", func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := streams.Ensure(ctx, c.JS, streams.Limits{Replicas: copies}, false)
		return err == nil
	})
	changes, err := streams.Ensure(t.Context(), c.JS, streams.Limits{}, false)
	if !errors.Is(err, streams.ErrWouldLose) || len(changes) != 5 || changes[0].String() != "~ FP_INGEST  replicas: 3 -> 1  (drops copies)" {
		t.Errorf("%v, %v", changes, err)
	}
	if left, err := streams.Diff(t.Context(), c.JS, streams.Limits{Replicas: copies}); err != nil || len(left) != 0 {
		t.Errorf("touched: %v, %v", left, err)
	}
	// Told to keep, it finds nothing to do, and a stream that was lost comes
	// back with as many copies as the others have.
	kept := streams.Limits{Keep: true}
	if left, err := streams.Diff(t.Context(), c.JS, kept); err != nil || len(left) != 0 {
		t.Errorf("does not keep the copies: %v, %v", left, err)
	}
	if err := c.JS.DeleteStream(t.Context(), streams.StreamDead); err != nil {
		t.Fatal(err)
	}
	if changes, err := streams.Ensure(t.Context(), c.JS, kept, false); err != nil || len(changes) != 1 {
		t.Errorf("%v, %v", changes, err)
	}
	s, err := c.JS.Stream(t.Context(), streams.StreamDead)
	if err != nil {
		t.Fatal(err)
	}
	if n := s.CachedInfo().Config.Replicas; n != copies {
		t.Errorf("back with %d copies", n)
	}
	kept.Replicas = 1
	if changes, err := streams.Diff(t.Context(), c.JS, kept); err != nil || len(changes) != 5 {
		t.Errorf("a number that is given does not hold: %v, %v", changes, err)
	}
}
