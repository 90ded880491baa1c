package streams_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// guardedNATS is a server that knows the pipeline's users and nobody else.
// Users have no passwords here; their certificates are tested with the
// configuration that ships.
type guardedNATS struct {
	t    *testing.T
	addr string
}

func newGuardedNATS(t *testing.T) guardedNATS {
	t.Helper()
	g := guardedNATS{t, streamstest.FreeAddr(t)}
	conf := &bytes.Buffer{}
	fmt.Fprintf(conf, "listen: %q\njetstream { store_dir: %q }\n", g.addr, t.TempDir())
	if err := streams.WriteNATSUsers(conf); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(file, conf.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	opts, err := server.ProcessConfigFile(file)
	if err != nil {
		t.Fatal(err)
	}
	opts.NoSigs, opts.NoLog = true, true
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() { srv.Shutdown(); srv.WaitForShutdown() })
	if !srv.ReadyForConnections(20 * time.Second) {
		t.Fatal("nats-server does not start")
	}
	if _, err := streams.Ensure(t.Context(), g.connect(streams.UserStreamctl).JS, streams.Limits{}, false); err != nil {
		t.Fatal(err)
	}
	return g
}

func (g guardedNATS) connect(user string) *streams.Conn {
	g.t.Helper()
	c, err := streams.Connect(streams.ConnectConfig{Name: user, URL: "nats://" + user + ":@" + g.addr},
		streamstest.Logger(g.t), prometheus.NewRegistry())
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(c.Close)
	streamstest.Eventually(g.t, "connection of "+user, c.NC.IsConnected)
	return c
}

// TestPermissionsRefuseAllElse asks the server: for each subject it names the
// users who may publish there; every other one must be refused.
func TestPermissionsRefuseAllElse(t *testing.T) {
	t.Parallel()
	g := newGuardedNATS(t)
	publish := map[string]string{
		"fp.ingest.7": "ingest",
		"fp.ingest":   "",
		// The heartbeats' subscriber, whom no client can name.
		"fp.ingest.9007199254740992": "ingest exporter",
		"fp.ingest.7.8":              "",
		"fp.enriched.7":              "prefetcher",
		"fp.backfill.prefetcher.7":   "prefetcher streamctl",
		"fp.backfill.persister.7":    "streamctl",
		"fp.dead.prefetcher.7":       "prefetcher",
		"fp.dead.persister.7":        "persister",
		"fp.other":                   "",
		"_INBOX_ingest.x":            "",
		"_INBOX_prefetcher.x":        "",

		"$JS.ACK.FP_INGEST.prefetcher.1.1.1.1.0":             "prefetcher",
		"$JS.ACK._.hash.FP_INGEST.prefetcher.1.1.1.1.0":      "prefetcher",
		"$JS.ACK.FP_BACKFILL.prefetcher-backfill.1.1.1.1.0":  "prefetcher",
		"$JS.ACK.FP_INGEST.persister-pending.1.1.1.1.0":      "persister",
		"$JS.ACK.FP_ENRICHED.persister.1.1.1.1.0":            "persister",
		"$JS.ACK.FP_BACKFILL.persister-backfill.1.1.1.1.0":   "persister",
		"$JS.API.CONSUMER.MSG.NEXT.FP_INGEST.prefetcher":     "prefetcher streamctl",
		"$JS.API.CONSUMER.MSG.NEXT.FP_ENRICHED.persister":    "persister streamctl",
		"$JS.API.CONSUMER.INFO.FP_INGEST.prefetcher":         "prefetcher exporter streamctl operator",
		"$JS.API.CONSUMER.INFO.FP_ENRICHED.persister":        "persister exporter streamctl operator",
		"$JS.API.CONSUMER.CREATE.FP_INGEST.mine":             "streamctl",
		"$JS.API.CONSUMER.CREATE.FP_INGEST.mine.fp.ingest.*": "streamctl",
		"$JS.API.CONSUMER.DURABLE.CREATE.FP_INGEST.mine":     "streamctl",
		"$JS.API.CONSUMER.DELETE.FP_INGEST.nobody":           "streamctl",

		"$JS.API.INFO":                      "exporter streamctl operator backup",
		"$JS.API.STREAM.NAMES":              "streamctl operator backup",
		"$JS.API.STREAM.INFO.FP_INGEST":     "ingest prefetcher persister exporter streamctl operator backup",
		"$JS.API.STREAM.INFO.FP_ENRICHED":   "persister exporter streamctl operator backup",
		"$JS.API.STREAM.INFO.FP_DEAD":       "exporter streamctl operator backup",
		"$JS.API.STREAM.INFO.OTHER":         "",
		"$JS.API.STREAM.CREATE.FP_INGEST":   "streamctl",
		"$JS.API.STREAM.CREATE.OTHER":       "",
		"$JS.API.STREAM.UPDATE.FP_DEAD":     "streamctl",
		"$JS.API.STREAM.DELETE.FP_INGEST":   "",
		"$JS.API.STREAM.PURGE.FP_INGEST":    "exporter streamctl",
		"$JS.API.STREAM.PURGE.FP_DEAD":      "streamctl",
		"$JS.API.STREAM.MSG.GET.FP_DEAD":    "streamctl",
		"$JS.API.DIRECT.GET.FP_INGEST":      "prefetcher persister exporter streamctl operator",
		"$JS.API.DIRECT.GET.FP_ENRICHED":    "persister exporter streamctl operator",
		"$JS.API.DIRECT.GET.FP_DEAD":        "exporter streamctl operator",
		"$JS.API.STREAM.MSG.DELETE.FP_DEAD": "streamctl",

		"$JS.API.CONSUMER.PAUSE.FP_INGEST.prefetcher":       "streamctl",
		"$JS.API.CONSUMER.PAUSE.FP_INGEST.mine":             "",
		"$KV.FP_REPLAYS.a":                                  "streamctl",
		"$JS.API.DIRECT.GET.KV_FP_REPLAYS":                  "streamctl operator",
		"$JS.API.DIRECT.GET.KV_FP_REPLAYS.$KV.FP_REPLAYS.a": "streamctl",
		"$SYS.REQ.USER.INFO":                                "streamctl operator",
		"fp.audit.replay":                                   "streamctl",
		"$JS.API.DIRECT.GET.FP_AUDIT":                       "exporter streamctl operator",
		"$JS.API.STREAM.PURGE.FP_AUDIT":                     "",
		"$JS.API.STREAM.MSG.DELETE.FP_AUDIT":                "",

		"$JS.API.STREAM.SNAPSHOT.FP_INGEST": "backup",
		"$JS.API.STREAM.SNAPSHOT.OTHER":     "",
		"$JS.API.STREAM.RESTORE.FP_INGEST":  "backup",
		"$JS.API.STREAM.RESTORE.OTHER":      "",
		"$JS.SNAPSHOT.ACK.FP_INGEST.a.1.1":  "backup",
		"$JS.SNAPSHOT.RESTORE.FP_INGEST.a":  "backup",
		"$JS.API.STREAM.RESTORE.KV_OTHER":   "",
	}
	subscribe := map[string]string{
		"_INBOX_ingest.x":              "ingest",
		"_INBOX_prefetcher.x":          "prefetcher",
		"_INBOX_persister.x":           "persister",
		"_INBOX_exporter.x":            "exporter",
		"_INBOX_streamctl.x":           "streamctl operator",
		"_INBOX_operator.x":            "operator",
		"_INBOX_backup.x":              "backup",
		"_INBOX.x":                     "",
		"fp.ingest.7":                  "",
		"fp.>":                         "",
		">":                            "",
		"$JS.API.>":                    "",
		"$SYS.>":                       "",
		"$JS.EVENT.ADVISORY.API":       "operator",
		"$JS.ACK.FP_INGEST.prefetcher": "",
	}
	for _, p := range streams.AllPermissions() {
		t.Run(p.User, func(t *testing.T) {
			t.Parallel()
			nc := guardedNATS{t, g.addr}.connect(p.User).NC
			check := func(verb, subject, users string, try func() error) {
				t.Helper()
				if err := errors.Join(try(), nc.Flush()); err != nil {
					t.Fatal(err)
				}
				// The refusal comes before the answer to the flush's ping.
				err := nc.LastError()
				refused := err != nil && strings.Contains(err.Error(), fmt.Sprintf("%q", subject))
				if allowed := strings.Contains(" "+users+" ", " "+p.User+" "); allowed == refused {
					t.Errorf("%s %s: refused %v, want %v (%v)", verb, subject, refused, !allowed, err)
				}
			}
			for subject, users := range subscribe {
				check("subscribe", subject, users, func() error { _, err := nc.SubscribeSync(subject); return err })
			}
			for subject, users := range publish {
				// Not JSON and no reply: an allowed request does nothing.
				check("publish", subject, users, func() error { return nc.Publish(subject, []byte("x")) })
			}
		})
	}
}

// TestPermissionsAreEnough does with each user what its service does.
func TestPermissionsAreEnough(t *testing.T) {
	t.Parallel()
	g := newGuardedNATS(t)
	ctx := t.Context()
	publish := func(c *streams.Conn, stream, subject string) {
		t.Helper()
		if _, err := streams.NewPublisher(c.JS, prometheus.NewRegistry()).Publish(ctx,
			streams.Message{Stream: stream, Subject: subject, ID: subject, Body: []byte("{}")}); err != nil {
			t.Fatal(err)
		}
	}
	ingest := g.connect(streams.UserIngest)
	if err := ingest.Ready(ctx, streams.StreamIngest); err != nil {
		t.Fatal(err)
	}
	publish(ingest, streams.StreamIngest, streams.IngestSubject(7))
	publish(g.connect(streams.StagePrefetcher), streams.StreamEnriched, streams.EnrichedSubject(7))
	admin := g.connect(streams.UserStreamctl)
	for _, stage := range []string{streams.StagePrefetcher, streams.StagePersister} {
		publish(admin, streams.StreamBackfill, streams.BackfillSubject(stage, 7))
	}

	// Each durable hands its one message to its stage, which gives it up.
	for _, d := range streams.Definition(streams.Limits{}) {
		for _, dur := range d.Durables {
			stage, _, _ := strings.Cut(dur.Durable, "-")
			c := g.connect(stage)
			if lag, err := streams.ReadLag(ctx, c.JS, d.Stream.Name, dur.Durable); err != nil || lag.Messages() != 1 || lag.Oldest.IsZero() {
				t.Errorf("%s: lag %+v, %v", dur.Durable, lag, err)
			}
			stageCtx, stop := context.WithTimeout(ctx, 30*time.Second)
			p := ops.NewProcessLogger(stage, streamstest.Logger(t))
			err := streams.RunStage(stageCtx, stage, c, streams.NewPublisher(c.JS, p.Registry), p, streams.Work{
				Handle: streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
					stop()
					return streams.DeadLetter("undecodable", errors.New("a test"))
				}),
				Consumer: streams.Consumer{Stream: d.Stream.Name, Durable: dur.Durable, Concurrency: 1, StopTimeout: 10 * time.Second},
			})
			if err != nil {
				t.Errorf("%s: %v", dur.Durable, err)
			}
			exporter := g.connect(streams.UserExporter)
			streamstest.Eventually(t, "ack on "+dur.Durable, func() bool {
				lag, err := streams.ReadLag(ctx, exporter.JS, d.Stream.Name, dur.Durable)
				return err == nil && lag.Messages() == 0
			})
		}
	}
	dead, err := admin.JS.Stream(ctx, streams.StreamDead)
	if err != nil {
		t.Fatal(err)
	}
	if n := dead.CachedInfo().State.Msgs; n != 5 {
		t.Errorf("%d dead letters, want one of each durable", n)
	}
	// A heartbeat needs no more than its one subject.
	beat, stopBeat := context.WithCancel(ctx)
	reg := prometheus.NewRegistry()
	go streams.RunHeartbeat(beat, streams.NewPublisher(g.connect(streams.UserExporter).JS, reg), streamstest.Logger(t), reg)
	streamstest.Eventually(t, "a heartbeat", func() bool {
		_, sent := metric(t, reg, "fp_stage_heartbeat_timestamp_seconds", "exporter")
		return sent
	})
	stopBeat()

	operator := g.connect(streams.UserOperator)
	if changes, err := streams.Diff(ctx, operator.JS, streams.Limits{}); err != nil || len(changes) != 0 {
		t.Errorf("operator's diff: %v, %v", changes, err)
	}

	// Administrators read in order, which makes and deletes ephemeral durables.
	ordered, err := admin.JS.OrderedConsumer(ctx, streams.StreamDead, jetstream.OrderedConsumerConfig{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ordered.Next(jetstream.FetchMaxWait(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if err := dead.DeleteMsg(ctx, 1); err != nil {
		t.Fatal(err)
	}
}

func TestRedisACL(t *testing.T) {
	t.Parallel()
	hash := func(password string) string {
		sum := sha256.Sum256([]byte(password))
		return hex.EncodeToString(sum[:])
	}
	acl := &bytes.Buffer{}
	if err := streams.WriteRedisACL(acl, map[string][]string{"persister": {hash("old"), hash("new")}}); err == nil {
		t.Error("a scorer without a password is accepted")
	}
	if err := streams.WriteRedisACL(acl, map[string][]string{"persister": {hash("old"), hash("new")}, "prefetcher": {hash("p")}, "scorer": {hash("s")},
		"streamctl": {hash("a")}, "operator": {hash("o")}}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "users.acl")
	if err := os.WriteFile(file, acl.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	r := streamstest.NewRedis(t, "--aclfile", file)
	const script = "return redis.call('SET', KEYS[1], ARGV[1], 'PXAT', ARGV[2])"
	const getrange = "return redis.call('GETRANGE', KEYS[1], 0, 159)"
	const mine = "fp:prefetch:A"
	type command = []any
	far := time.Now().Add(time.Hour).UnixMilli()
	for name, tt := range map[string]struct {
		user    string
		command command
		refused bool
	}{
		"write":                       {"persister:new", command{"eval", script, 1, mine, "v", far}, false},
		"write with the old password": {"persister:old", command{"eval", script, 1, mine, "v", far}, false},
		"read the head":               {"persister:new", command{"eval", getrange, 1, mine}, false},
		"ping":                        {"persister:new", command{"ping"}, false},
		"write elsewhere":             {"persister:new", command{"eval", script, 1, "other", "v", far}, true},
		"reach around the keys":       {"persister:new", command{"eval", "return redis.call('SET', 'other', 'v')", 0}, true},
		"delete":                      {"persister:new", command{"del", mine}, true},
		"flush":                       {"persister:new", command{"flushall"}, true},
		"list keys":                   {"persister:new", command{"keys", "*"}, true},
		"configure":                   {"persister:new", command{"config", "get", "*"}, true},
		"read the users":              {"persister:new", command{"acl", "list"}, true},
		"publish":                     {"persister:new", command{"publish", "c", "v"}, true},
		"prefetcher reads":            {"prefetcher:p", command{"get", mine}, false},
		"prefetcher takes a token":    {"prefetcher:p", command{"eval", "return redis.call('HSET', KEYS[1], 'at', redis.call('TIME')[1])", 1, streams.QuotaKey}, false},
		"prefetcher writes a record":  {"prefetcher:p", command{"eval", "return redis.call('HSET', KEYS[1], 'a', 1)", 1, mine}, true},
		"scorer reads":                {"scorer:s", command{"get", mine}, false},
		"scorer reads many":           {"scorer:s", command{"mget", mine, mine + "2"}, false},
		"scorer reads elsewhere":      {"scorer:s", command{"get", "other"}, true},
		"scorer writes":               {"scorer:s", command{"set", mine, "v"}, true},
		"scorer runs a script":        {"scorer:s", command{"eval", getrange, 1, mine}, true},
		"streamctl looks for records": {"streamctl:a", command{"scan", 0, "match", "fp:prefetch:*"}, false},
		"streamctl erases":            {"streamctl:a", command{"eval", "return redis.call('DEL', KEYS[1])", 1, mine}, false},
		"streamctl writes":            {"streamctl:a", command{"set", mine, "v"}, true},
		"streamctl spends":            {"streamctl:a", command{"hset", streams.QuotaKey, "tokens", 0}, true},
		"streamctl asks for memory":   {"streamctl:a", command{"info", "memory"}, false},
		"streamctl sees slow calls":   {"streamctl:a", command{"slowlog", "get", 10}, false},
		"streamctl forgets them":      {"streamctl:a", command{"slowlog", "reset"}, true},
		"persister asks for memory":   {"persister:new", command{"info", "memory"}, true},
		"operator asks for memory":    {"operator:o", command{"info", "memory"}, false},
		"operator sees slow calls":    {"operator:o", command{"slowlog", "get", 10}, false},
		"operator counts slow calls":  {"operator:o", command{"slowlog", "len"}, false},
		"operator forgets them":       {"operator:o", command{"slowlog", "reset"}, true},
		"operator looks":              {"operator:o", command{"get", mine}, false},
		"operator sees the life left": {"operator:o", command{"pttl", mine}, false},
		"operator sees the quota":     {"operator:o", command{"hmget", streams.QuotaKey, "tokens"}, false},
		"operator erases":             {"operator:o", command{"del", mine}, true},
		"operator lists":              {"operator:o", command{"scan", 0}, true},
		"nobody pings":                {"", command{"ping"}, true},
		"a wrong password pings":      {"persister:wrong", command{"ping"}, true},
		"end connections":             {"persister:new", command{"client", "kill", "type", "normal"}, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			user := tt.user
			if user != "" {
				user += "@"
			}
			c, err := redisclient.New("redis://" + user + r.Addr + "/0")
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			err = c.Do(context.Background(), tt.command...).Err()
			if errors.Is(err, redis.Nil) {
				err = nil
			}
			refused := false
			for _, word := range []string{"NOPERM", "NOAUTH", "WRONGPASS", "can't access"} {
				refused = refused || err != nil && strings.Contains(err.Error(), word)
			}
			if refused != tt.refused || !refused && err != nil {
				t.Errorf("refused %v, want %v (%v)", refused, tt.refused, err)
			}
		})
	}
}
