package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/reader"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestShippedPermissionsAreEnough runs every program with its own certificate
// and password on the NATS and the Redis that ship, from a client's post to
// the scorer's answer and a replay.
func TestShippedPermissionsAreEnough(t *testing.T) {
	t.Parallel()
	n := newShippedNATS(t)
	rs := newShippedRedis(t, n.authority)
	redisUsers := map[string]string{"prefetcher": streams.RedisUserPrefetcher, "persister": streams.RedisUserPersister, "streamctl": streams.RedisUserStreamctl}
	p := newPipelineAt(t, func(service string) []string {
		env := n.env(service)
		if user, ok := redisUsers[service]; ok {
			rs.secret(user, user+"-1")
			env = append(env, rs.env(user)...)
		}
		return env
	})
	p.rdb = rs.client(t, rs.url("scorer", "scorer-1"))
	// With a limit, so that the quota is shared through Redis.
	p.procs["prefetcher"].env = append(p.procs["prefetcher"].env, "FINGERPRINT_RATE_LIMIT=100")
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
	scorer := reader.Reader{Get: func(ctx context.Context, key string) ([]byte, error) {
		b, err := p.rdb.Get(ctx, key).Bytes()
		if errors.Is(err, redis.Nil) {
			return nil, nil
		}
		return b, err
	}}
	if res, err := scorer.Lookup(t.Context(), 12, "1A2B3C4D5E"); err != nil || res.Outcome != reader.Ready {
		t.Errorf("the scorer finds %s, %v", res.Outcome, err)
	}
	if v := p.metric("prefetcher", "fp_prefetch_quota_shared"); v != 1 {
		t.Errorf("fp_prefetch_quota_shared = %v", v)
	}
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
	// One call for each event, and one more for the replay of 13's, which has
	// no record; the replay of 12's saw its own.
	if calls := p.sim.CallsFor("1A2B3C4D5E"); calls != 3 {
		t.Errorf("%d calls to the vendor, want 3", calls)
	}

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
	copies := []string{"$JS.API.STREAM.SNAPSHOT.FP_INGEST", "$JS.API.STREAM.RESTORE.FP_INGEST"}
	destroy := []string{
		"$JS.API.STREAM.DELETE.FP_INGEST", "$JS.API.STREAM.CREATE.OTHER", "$JS.API.STREAM.SNAPSHOT.OTHER", "$JS.API.STREAM.RESTORE.OTHER",
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
		streams.UserIngest:      slices.Concat(copies, destroy, administer, purge, enrich, asPrefetcher, asPersister, read),
		streams.StagePrefetcher: slices.Concat(copies, destroy, administer, purge, ingestOthers, asPersister, read[1:]),
		streams.StagePersister:  slices.Concat(copies, destroy, administer, purge, ingestOthers, enrich, asPrefetcher, read[2:]),
		streams.UserExporter:    slices.Concat(copies, destroy, administer, ingestOthers, enrich, asPrefetcher, asPersister),
		streams.UserStreamctl:   slices.Concat(copies, destroy, ingestOthers, enrich, asPrefetcher[1:], asPersister[1:]),
		streams.UserOperator:    slices.Concat(copies, destroy, administer, purge, ingestOthers, enrich, asPrefetcher, asPersister),
		streams.UserBackup:      slices.Concat(destroy, administer, purge, ingestOthers, enrich, asPrefetcher, asPersister, read),
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
				if subject == "_INBOX_"+user+".>" || user == streams.UserOperator && subject == "_INBOX_streamctl.>" { // it runs streamctl
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

// TestShippedRedisRefusesTheRest tries, with each user's password and without
// one, what the Redis that ships must refuse.
func TestShippedRedisRefusesTheRest(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	r := newShippedRedis(t, ca)
	const mine, script = "fp:prefetch:A", "return redis.call(ARGV[1], KEYS[1], 'x', 'y')"
	const around = "return redis.call('GETRANGE', 'fp:' .. 'other', 0, 1)"
	type command = []any
	everyone := []command{
		{"flushall"}, {"keys", "*"}, {"config", "get", "*"}, {"acl", "list"}, {"acl", "whoami"}, {"client", "list"}, {"client", "kill", "type", "normal"},
		{"shutdown", "nosave"}, {"save"}, {"bgrewriteaof"}, {"replicaof", "no", "one"}, {"monitor"}, {"slowlog", "reset"}, {"latency", "latest"}, {"swapdb", 0, 1},
		{"function", "list"}, {"script", "flush"}, {"subscribe", "c"}, {"publish", "c", "x"}, {"expire", mine, 1}, {"rename", mine, "x"}, {"get", "other"}, {"set", "other", "x"},
	}
	state := []command{{"info"}, {"slowlog", "get"}, {"slowlog", "len"}} // people may look
	for user, own := range map[string][]command{
		streams.RedisUserPersister:  slices.Concat(state, []command{{"scan", 0}, {"del", mine}, {"hset", "fp:quota:fingerprint", "a", 1}, {"eval", around, 1, mine}, {"eval", script, 1, "fp:quota:fingerprint", "hset"}, {"mget", mine, "other"}}),
		streams.RedisUserPrefetcher: slices.Concat(state, []command{{"scan", 0}, {"del", mine}, {"set", mine, "x"}, {"eval", script, 1, mine, "hset"}, {"eval", around, 1, "fp:quota:fingerprint"}, {"mget", mine}}),
		streams.RedisUserScorer:     slices.Concat(state, []command{{"scan", 0}, {"del", mine}, {"set", mine, "x"}, {"eval", script, 1, mine, "set"}, {"hgetall", "fp:quota:fingerprint"}, {"mget", mine, "other"}}),
		streams.RedisUserStreamctl:  {{"set", mine, "x"}, {"eval", script, 1, mine, "set"}, {"del", "fp:quota:fingerprint"}, {"hset", "fp:quota:fingerprint", "a", 1}},
		streams.RedisUserOperator:   {{"scan", 0}, {"del", mine}, {"set", mine, "x"}, {"eval", around, 1, mine}},
	} {
		c := r.client(t, r.url(user, user+"-1"))
		if err := c.Ping(t.Context()).Err(); err != nil {
			t.Fatalf("%s cannot do anything: %v", user, err)
		}
		for _, cmd := range slices.Concat(everyone, own) {
			err := c.Do(t.Context(), cmd...).Err()
			if err == nil || !strings.Contains(err.Error(), "NOPERM") && !strings.Contains(err.Error(), "The user executing the script can't") {
				t.Errorf("%s %v is not refused: %v", user, cmd, err)
			}
		}
	}

	foreign := t.TempDir()
	newAuthority(t).issue(foreign, "localhost")
	open := func(url, ca string) error {
		c, err := redisclient.Open(redisclient.Config{URL: func() ops.Secret { return ops.Secret(url) }, CAFile: ca})
		if err != nil {
			return err
		}
		defer c.Close()
		return c.Ping(t.Context()).Err()
	}
	own := filepath.Join(r.dir, "ca.crt")
	good := r.url("scorer", "scorer-1")
	if err := open(good, own); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ url, ca, why string }{
		"a wrong password":        {r.url("scorer", "guess"), own, "WRONGPASS"},
		"another's password":      {r.url("persister", "scorer-1"), own, "WRONGPASS"},
		"no user":                 {"rediss://" + localhost(r.addr) + "/0", own, "NOAUTH"},
		"the default user":        {r.url("default", "scorer-1"), own, "WRONGPASS"},
		"the system's CAs":        {good, "", "unknown authority"},
		"another CA":              {good, filepath.Join(foreign, "ca.crt"), "unknown authority"},
		"a name not the server's": {strings.Replace(good, "localhost", "127.0.0.1", 1), own, "IP SANs"},
		"a CA that is not there":  {good, filepath.Join(foreign, "none"), "no such file"},
		"no TLS":                  {strings.Replace(good, "rediss:", "redis:", 1), "", ""},
	} {
		if err := open(tt.url, tt.ca); err == nil || !strings.Contains(err.Error(), tt.why) {
			t.Errorf("%s: %v, want %q", name, err, tt.why)
		}
	}
}

// TestRunbooksCallsOfRedisAreAllowed runs every redis-cli line of the runbooks
// as the operator whom the README's call names.
func TestRunbooksCallsOfRedisAreAllowed(t *testing.T) {
	t.Parallel()
	bin, err := exec.LookPath("redis-cli")
	if err != nil {
		t.Fatal("redis-cli is not installed; it comes with redis-server")
	}
	_, call, ok := strings.Cut(readFile(t, "../k8s/README.md"), "-- redis-cli ")
	call, _, ended := strings.Cut(call, " PING\n")
	if !ok || !ended {
		t.Fatal("the README shows no call of redis-cli")
	}
	r := newShippedRedis(t, newAuthority(t))
	_, port, _ := net.SplitHostPort(r.addr)
	options := append(strings.Fields(strings.ReplaceAll(call, "/run/secrets/redis", r.dir)), "-p", port)
	pages, err := filepath.Glob("../monitoring/runbooks/*.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := 0
	for _, page := range pages {
		text := readFile(t, page)
		for line := range strings.Lines(text) {
			command, ok := strings.CutPrefix(strings.TrimSpace(line), "redis-cli ")
			if !ok {
				continue
			}
			lines++
			if !strings.Contains(text, "(../../k8s/README.md#redis-cli)") {
				t.Errorf("%s does not say how redis-cli is called", page)
			}
			cmd := exec.CommandContext(t.Context(), bin, slices.Concat(options, strings.Fields(command))...)
			cmd.Stdin = strings.NewReader("operator-1\n") // it asks for the password
			out, err := cmd.CombinedOutput()
			for _, word := range []string{"NOPERM", "NOAUTH", "WRONGPASS", "AUTH failed", "ERR"} {
				if err != nil || strings.Contains(string(out), word) {
					t.Errorf("%s: redis-cli %s: %v\n%s", filepath.Base(page), command, err, out)
					break
				}
			}
		}
	}
	if lines < 5 {
		t.Errorf("only %d lines", lines)
	}
}

// TestRedisPasswordRotatesWithoutARestart follows the README's steps while the
// services run.
func TestRedisPasswordRotatesWithoutARestart(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	r := newShippedRedis(t, newAuthority(t))
	p := newPipelineAt(t, func(service string) []string {
		env := []string{"NATS_URL=" + n.URL}
		if service != "ingest" && service != "streamctl" {
			r.secret(service, service+"-1")
			env = append(env, r.env(service)...)
		}
		return env
	})
	p.apply()
	services := []string{"ingest", "prefetcher", "persister"}
	p.start(services...)
	p.ready(services...)
	works := func(id, password string) {
		t.Helper()
		p.rdb = r.client(t, r.url("scorer", "scorer-"+password))
		if status, answer := p.post(id); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
		p.eventually(id, record.Ready)
	}
	works("old", "1")
	r.passwords("1", "2")
	r.restart()
	works("both", "1")
	for _, user := range []string{"prefetcher", "persister"} {
		r.secret(user, user+"-2")
	}
	r.passwords("2")
	r.restart()
	works("new", "2")
	for _, id := range []string{"old", "both"} {
		if p.status(id) != record.Ready { // Redis kept its data
			t.Errorf("%s is %q after Redis restarted", id, p.status(id))
		}
	}
}
