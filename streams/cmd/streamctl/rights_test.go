package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// guarded starts a server with the given configuration of users and returns a
// bench whose connection is the user root, who may do everything.
func guarded(t *testing.T, users string) (b *bench, url func(user string) string) {
	t.Helper()
	addr := streamstest.FreeAddr(t)
	file := filepath.Join(t.TempDir(), "nats.conf")
	root := `{ user: "root", password: "" }`
	users = strings.Replace(users, "users: [", "users: [\n"+root, 1)
	if err := os.WriteFile(file, fmt.Appendf(nil, "listen: %q\njetstream { store_dir: %q }\n%s", addr, t.TempDir(), users), 0o600); err != nil {
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
	url = func(user string) string { return "nats://" + user + ":@" + addr }
	conn, err := streams.Connect(streams.ConnectConfig{Name: "root", URL: url("root")}, streamstest.Logger(t), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	streamstest.Eventually(t, "connection", conn.NC.IsConnected)
	return &bench{t, nil, conn, conn.JS, streamstest.NewRedis(t).URL()}, url
}

// as runs streamctl as one of the server's users.
func (b *bench) as(url string, args ...string) (code int, output string) {
	b.t.Helper()
	var out bytes.Buffer
	env := map[string]string{"NATS_URL": url, "REDIS_URL": b.redisURL}
	code = run(b.t.Context(), args, func(name string) string { return env[name] }, strings.NewReader(""), &out, &out)
	return code, out.String()
}

// seed puts something into each stream.
func (b *bench) seed() {
	b.t.Helper()
	if _, err := streams.Ensure(b.t.Context(), b.js, streams.Limits{}, false); err != nil {
		b.t.Fatal(err)
	}
	b.put(streams.EnrichedSubject(12), nil, ready(event("a"), time.Now()))
	b.put(streams.IngestSubject(12), nil, event("a"))
	b.finish(streams.StreamIngest, streams.DurablePrefetcher, 1)
	for range 3 {
		b.put(streams.DeadSubject(streams.StagePersister, 12), nats.Header{streams.HeaderDeadReason: {"poison"}}, ready(event("a"), time.Now()))
	}
}

// The documented rights of each verb are enough for it.
func TestDocumentedRightsAreEnough(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(readme), "| verb | may publish to |\n|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	quoted := regexp.MustCompile("`([^`]+)`")
	words := func(s string) (all []string) {
		for _, m := range quoted.FindAllStringSubmatch(s, -1) {
			all = append(all, m[1])
		}
		return all
	}
	rights := map[string][]string{}
	for line := range strings.Lines(table) {
		cells := strings.Split(line, " | ")
		if len(cells) != 2 {
			t.Fatalf("no row: %s", line)
		}
		subjects := words(cells[1])
		if i := strings.Index(cells[1], "those of `"); i >= 0 {
			subjects = append(subjects[1:], rights[subjects[0]]...)
		}
		for _, verb := range words(cells[0]) {
			rights[verb] = subjects
		}
	}
	commands := map[string]string{
		"status": "status", "trace": "trace a", "show": "show enriched", "dead list": "dead list", "dead show": "dead show 1", "audit": "audit",
		"show --reveal": "show enriched --reveal", "diff": "diff", "apply": "apply --max-bytes FP_DEAD=2GiB",
		"replay --dry-run": "replay --stage persister --since 1h --dry-run", "dead redrive --dry-run": "dead redrive --all --dry-run",
		"erase --dry-run": "erase --subscriber 12 --dry-run", "replay": "replay --stage persister --since 1h --no-wait",
		"dead redrive": "dead redrive --from-seq 3 --no-wait", "dead purge": "dead purge --reason poison --yes",
		"pause": "pause persister --for 1h", "resume": "resume persister", "erase": "erase --subscriber 12",
		"tail": "", // a show that goes on
	}
	users := &strings.Builder{}
	users.WriteString("authorization { users: [")
	name := strings.NewReplacer(" ", "_", "-", "")
	for verb, subjects := range rights {
		if _, ok := commands[verb]; !ok {
			t.Errorf("%s is not tested", verb)
		}
		fmt.Fprintf(users, "\n{ user: %q, permissions: { publish: { allow: %q }, subscribe: { allow: [\"_INBOX_streamctl.>\"] } } }",
			name.Replace(verb), subjects)
	}
	users.WriteString("\n] }\n")
	for verb, command := range commands {
		if rights[verb] == nil {
			t.Errorf("the README gives no rights for %s", verb)
		}
		if command == "" {
			continue
		}
		t.Run(verb, func(t *testing.T) {
			t.Parallel()
			b, url := guarded(t, strings.ReplaceAll(users.String(), `" "`, `", "`))
			b.seed()
			if verb == "audit" {
				b.as(url("root"), "pause", "persister", "--for", "1h")
			}
			if code, out := b.as(url(name.Replace(verb)), strings.Fields(command)...); code != exitDone || strings.Contains(out, "permissions violation") {
				t.Errorf("exit %d, %s", code, out)
			}
		})
	}
}

// The operator looks at everything, and changes and reveals nothing; the user
// streamctl does the rest.
func TestOperatorLooksOnly(t *testing.T) {
	t.Parallel()
	conf := &strings.Builder{}
	if err := streams.WriteNATSUsers(conf); err != nil {
		t.Fatal(err)
	}
	b, url := guarded(t, conf.String())
	b.seed()
	code, out := b.as(url(streams.UserStreamctl), "replay", "--stage", "persister", "--since", "1h", "--no-wait")
	if code != exitDone || strings.Contains(out, "violation") {
		t.Fatalf("exit %d, %s", code, out)
	}
	for _, args := range []string{"status", "trace a", "show enriched", "dead list", "dead show 1", "audit", "diff", "replay --stage persister --since 1h --dry-run"} {
		if code, out := b.as(url(streams.UserOperator), strings.Fields(args)...); code != exitDone || strings.Contains(out, "violation") || strings.Contains(out, email) {
			t.Errorf("operator: %s: exit %d, %s", args, code, out)
		}
	}
	before := b.holds(email)
	for _, args := range []string{
		"show enriched --reveal", "dead show 1 --reveal", "replay --stage persister --since 1h --no-wait", "dead redrive --all --no-wait",
		"dead purge --all --yes", "pause persister --for 1h", "erase --user-id " + email,
	} {
		if code, out := b.as(url(streams.UserOperator), strings.Fields(args)...); code != exitFailed || strings.Contains(out, email) {
			t.Errorf("operator: %s: exit %d, %s", args, code, out)
		}
	}
	if after := b.holds(email); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("changed %v to %v", before, after)
	}
}
