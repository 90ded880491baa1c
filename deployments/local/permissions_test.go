package main

import (
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestShippedPermissionsAreEnough runs every program with its own certificate
// on the cluster that ships, from a client's post to a record and a replay.
func TestShippedPermissionsAreEnough(t *testing.T) {
	t.Parallel()
	n := newShippedNATS(t)
	rs := streamstest.NewRedis(t)
	p := newPipelineAt(t, func(service string) []string {
		env := n.env(service)
		if service != streams.UserIngest {
			env = append(env, "REDIS_URL="+rs.URL())
		}
		return env
	})
	p.rdb = redisClient(t, rs.URL())
	p.add("exporter")
	p.procs["exporter"].binary, p.procs["exporter"].args = "streamctl", []string{"exporter"}
	services := []string{"ingest", "prefetcher", "persister", "exporter"}
	p.start(services...)

	var out strings.Builder
	out.WriteString(p.streamctl("apply", "--replicas=3", "--timeout=50s"))
	out.WriteString(p.streamctl("diff", "--replicas=3"))
	p.ready("ingest", "prefetcher", "persister")
	if status, answer := p.post("1A2B3C4D5E"); status != http.StatusAccepted {
		t.Fatalf("%d %s", status, answer)
	}
	p.eventually("1A2B3C4D5E", record.Ready)
	out.WriteString(p.streamctl("status"))
	out.WriteString(p.streamctl("trace", "1A2B3C4D5E"))
	// The id belongs to subscriber 12: 13's event is a dead letter.
	if status, answer := p.send(`{"request_id":"1A2B3C4D5E","subscriber_id":13,"session_id":"s","user_id":"u"}`); status != http.StatusAccepted {
		t.Fatalf("%d %s", status, answer)
	}
	admin := n.connect(t, streams.UserStreamctl)
	dead, err := admin.JS.Stream(t.Context(), streams.StreamDead)
	if err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "a dead letter", func() bool {
		info, err := dead.Info(t.Context())
		return err == nil && info.State.Msgs == 1
	})
	out.WriteString(p.streamctl("dead", "list"))

	// A replay of each stage, through FP_BACKFILL and back.
	since := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)
	for _, stage := range []string{streams.StagePrefetcher, streams.StagePersister} {
		out.WriteString(p.streamctl("replay", "--stage", stage, "--since", since))
	}
	backfill, err := admin.JS.Stream(t.Context(), streams.StreamBackfill)
	if err != nil {
		t.Fatal(err)
	}
	if got := backfill.CachedInfo().State.LastSeq; got < 2 {
		t.Errorf("two replays made %d copies", got)
	}
	for _, durable := range []string{streams.DurablePrefetcherBackfill, streams.DurablePersisterBackfill} {
		streamstest.Eventually(t, durable+" to finish the replay", func() bool {
			l, err := streams.ReadLag(t.Context(), admin.JS, streams.StreamBackfill, durable)
			return err == nil && l.Messages() == 0
		})
	}
	p.eventually("1A2B3C4D5E", record.Ready)

	streamstest.Eventually(t, "the exporter to have read every stream and durable", func() bool {
		return p.metric("exporter", "fp_stream_collector_last_success_timestamp_seconds") > 0
	})

	// A refusal shows nowhere but here: the call itself only times out.
	if strings.Contains(strings.ToLower(out.String()), "violation") {
		t.Errorf("streamctl was refused something:\n%s", out.String())
	}
	for _, name := range services {
		streamstest.Eventually(t, name+" to report its connection", func() bool { return p.metric(name, "fp_nats_connected") == 1 })
		if v := p.metric(name, `fp_nats_async_errors_total{kind="permission"}`); v != 0 {
			t.Errorf("%s was refused %v requests", name, v)
		}
	}
}

// TestShippedPermissionsRefuseTheRest tries, with each user's certificate, what
// that user must not be able to do.
func TestShippedPermissionsRefuseTheRest(t *testing.T) {
	t.Parallel()
	n := newShippedNATS(t)
	newPipelineAt(t, n.env).streamctl("apply", "--replicas=3", "--timeout=50s")
	inboxes := []string{}
	for _, p := range streams.AllPermissions() {
		inboxes = append(inboxes, "_INBOX_"+p.User+".>")
	}
	readAll := []string{">", "fp.>", "fp.ingest.*", "fp.enriched.*", "fp.dead.*.*", "$SYS.>", "$JS.API.>", "$JS.ACK.>", "_INBOX.>"}
	destroy := []string{
		"$JS.API.STREAM.DELETE.FP_INGEST", "$JS.API.STREAM.CREATE.OTHER", "$JS.API.STREAM.SNAPSHOT.FP_INGEST", "$JS.API.STREAM.RESTORE.FP_INGEST",
		"$JS.API.STREAM.PEER.REMOVE.FP_INGEST", "$JS.API.ACCOUNT.PURGE.$G", "$JS.API.META.LEADER.STEPDOWN", "$JS.API.SERVER.REMOVE",
		"$SYS.REQ.SERVER.PING", "$SYS.REQ.ACCOUNT.$G.CONNZ",
	}
	administer := []string{
		"$JS.API.STREAM.PURGE.FP_DEAD", "$JS.API.STREAM.UPDATE.FP_INGEST", "$JS.API.STREAM.CREATE.FP_INGEST", "$JS.API.STREAM.MSG.DELETE.FP_INGEST",
		"$JS.API.STREAM.MSG.GET.FP_DEAD", "$JS.API.CONSUMER.CREATE.FP_INGEST.mine.fp.ingest.*", "$JS.API.CONSUMER.DURABLE.CREATE.FP_INGEST.mine",
		"$JS.API.CONSUMER.DELETE.FP_INGEST.prefetcher", "$JS.API.CONSUMER.PAUSE.FP_INGEST.prefetcher", "fp.backfill.persister.12",
	}
	purge := []string{"$JS.API.STREAM.PURGE.FP_INGEST", "$JS.API.STREAM.PURGE.FP_ENRICHED", "$JS.API.STREAM.PURGE.FP_BACKFILL"}
	ingestOthers := []string{"fp.ingest.12"}
	enrich := []string{"fp.enriched.12"}
	asPrefetcher := []string{"$JS.API.CONSUMER.MSG.NEXT.FP_INGEST.prefetcher", "$JS.ACK.FP_INGEST.prefetcher.1.1.1.1.0", "fp.dead.prefetcher.12"}
	asPersister := []string{"$JS.API.CONSUMER.MSG.NEXT.FP_ENRICHED.persister", "$JS.ACK.FP_ENRICHED.persister.1.1.1.1.0", "fp.dead.persister.12"}
	read := []string{"$JS.API.DIRECT.GET.FP_INGEST", "$JS.API.DIRECT.GET.FP_ENRICHED", "$JS.API.DIRECT.GET.FP_DEAD"}

	refused := map[string][]string{
		streams.UserIngest:      slices.Concat(destroy, administer, purge, enrich, asPrefetcher, asPersister, read),
		streams.StagePrefetcher: slices.Concat(destroy, administer, purge, ingestOthers, asPersister, read[1:]),
		streams.StagePersister:  slices.Concat(destroy, administer, purge, ingestOthers, enrich, asPrefetcher, read[2:]),
		streams.UserExporter:    slices.Concat(destroy, administer, ingestOthers, enrich, asPrefetcher, asPersister),
		streams.UserStreamctl:   slices.Concat(destroy, ingestOthers, enrich, asPrefetcher[1:], asPersister[1:]),
		streams.UserOperator:    slices.Concat(destroy, administer, purge, ingestOthers, enrich, asPrefetcher, asPersister, read),
	}
	for _, p := range streams.AllPermissions() {
		user := p.User
		t.Run(user, func(t *testing.T) {
			t.Parallel()
			if len(refused[user]) == 0 {
				t.Fatal("nothing to try")
			}
			nc := n.connect(t, user).NC
			check := func(subject string, try func() error) {
				t.Helper()
				if err := errors.Join(try(), nc.Flush()); err != nil {
					t.Fatal(err)
				}
				// The refusal comes before the answer to the flush's ping.
				if err := nc.LastError(); err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", subject)) {
					t.Errorf("%s is not refused (%v)", subject, err)
				}
			}
			for _, subject := range refused[user] {
				check(subject, func() error { return nc.Publish(subject, []byte("x")) })
			}
			// Nor may it answer in another's place.
			for _, inbox := range inboxes {
				reply := strings.Replace(inbox, ">", "x", 1)
				check(reply, func() error { return nc.Publish(reply, []byte("x")) })
			}
			for _, subject := range slices.Concat(readAll, inboxes) {
				if subject == "_INBOX_"+user+".>" {
					continue
				}
				check(subject, func() error { _, err := nc.SubscribeSync(subject); return err })
			}
		})
	}
}

// TestShippedNATSKnowsItsClients tries to get in without a user's certificate.
func TestShippedNATSKnowsItsClients(t *testing.T) {
	t.Parallel()
	n := newShippedNATS(t)
	n.connect(t, streams.UserIngest) // the way in is there
	n.issue(filepath.Join(n.dir, "nobody"), "nobody")
	foreign := newAuthority(t)
	foreign.issue(filepath.Join(n.dir, "foreign"), streams.UserStreamctl)
	without := n.config(streams.UserIngest)
	without.CertFile, without.KeyFile = "", ""
	plain := streams.ConnectConfig{Name: "plain", URL: strings.ReplaceAll(without.URL, "tls://", "nats://")}
	asAnother := n.config(streams.UserIngest)
	asAnother.URL = strings.ReplaceAll(asAnother.URL, "tls://", "tls://streamctl:x@")
	foreignCert := n.config("foreign")
	foreignCert.CAFile = without.CAFile // it trusts the servers; they do not trust it
	for name, cfg := range map[string]streams.ConnectConfig{
		"a name that is no user's": n.config("nobody"), "the servers' own certificate": n.config("server"),
		"another CA's certificate": foreignCert, "no certificate": without, "no TLS": plain,
		"a certificate and another user's name": asAnother,
	} {
		t.Run(name, func(t *testing.T) {
			opts := []nats.Option{nats.NoReconnect(), nats.Timeout(10 * time.Second)}
			if cfg.CAFile != "" {
				opts = append(opts, nats.RootCAs(cfg.CAFile))
			}
			if cfg.CertFile != "" {
				opts = append(opts, nats.ClientCert(cfg.CertFile, cfg.KeyFile))
			}
			nc, err := nats.Connect(cfg.URL, opts...)
			if err == nil {
				nc.Close()
				t.Error("let in")
			} else if errors.Is(err, nats.ErrTimeout) || errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("not refused: %v", err)
			}
		})
	}
}
