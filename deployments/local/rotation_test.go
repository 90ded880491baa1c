package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// reload has every server read its configuration and certificates again, as the
// README says, and waits until it has.
func (n *shippedNATS) reload() {
	n.t.Helper()
	dir, _ := build()
	for name, node := range n.nodes {
		loaded := func() (at time.Time) {
			resp, err := client.Get("http://" + node.monitor + "/varz")
			if err != nil {
				return at
			}
			defer resp.Body.Close()
			var v struct {
				ConfigLoadTime time.Time `json:"config_load_time"`
			}
			if err := json.NewDecoder(resp.Body).Decode(&v); err != nil {
				return at
			}
			return v.ConfigLoadTime
		}
		before := loaded()
		if before.IsZero() {
			n.t.Fatalf("%s does not say when it was configured", name)
		}
		if out, err := exec.Command(filepath.Join(dir, "nats-server"), "--signal", "reload="+filepath.Join(n.dir, name+".pid")).CombinedOutput(); err != nil {
			n.t.Fatalf("%v\n%s", err, out)
		}
		streamstest.Eventually(n.t, name+" to reload", func() bool { return loaded().After(before) })
	}
}

// restart stops and starts one server after the other, each once the one before
// is whole again: every client and route connects anew.
func (n *shippedNATS) restart() {
	n.t.Helper()
	for _, name := range slices.Sorted(maps.Keys(n.nodes)) {
		node := n.nodes[name]
		if err := node.cmd.Process.Signal(syscall.SIGTERM); err != nil {
			n.t.Fatal(err)
		}
		_ = node.cmd.Wait() // its exit code says nothing
		n.start(name)
		streamstest.Eventually(n.t, name+" to be healthy again", func() bool {
			resp, err := client.Get("http://" + node.monitor + "/healthz")
			if err != nil {
				return false
			}
			resp.Body.Close()
			return resp.StatusCode == http.StatusOK
		})
	}
}

// TestNATSCertificatesRotateWithoutARestart follows the README's steps while
// clients post: the CA, the servers' certificates and the services' are
// replaced, with two CAs trusted meanwhile, and not one post is refused. Then
// every connection is made anew, so that nothing lives on from the old ones.
func TestNATSCertificatesRotateWithoutARestart(t *testing.T) {
	t.Parallel()
	n, p := newShippedPipeline(t)

	var (
		mu       sync.Mutex
		accepted = map[string]bool{}
		refused  atomic.Int64
		stop     = make(chan struct{})
		poster   sync.WaitGroup
	)
	poster.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(10 * time.Millisecond):
			}
			id := fmt.Sprint("rotated-", i)
			if status, _ := p.post(id); status != http.StatusAccepted {
				refused.Add(1)
				continue
			}
			mu.Lock()
			accepted[id] = true
			mu.Unlock()
		}
	})
	var halt sync.Once
	quiet := func() { halt.Do(func() { close(stop) }); poster.Wait() }
	t.Cleanup(quiet)
	goesOn := func(after string) {
		t.Helper()
		mu.Lock()
		before := len(accepted)
		mu.Unlock()
		streamstest.Eventually(t, "posts accepted after "+after, func() bool { mu.Lock(); defer mu.Unlock(); return len(accepted) >= before+20 })
	}

	users := []string{}
	for _, u := range streams.AllPermissions() {
		users = append(users, u.User)
	}
	everywhere := func(cas ...*authority) {
		for _, name := range append(users, "server") {
			trust(t, filepath.Join(n.dir, name), cas...)
		}
		n.reload()
	}
	old, next := n.authority, newAuthority(t)
	old.issue(filepath.Join(n.dir, "late"), streams.UserIngest)
	goesOn("the start")

	everywhere(old, next)
	goesOn("both CAs were trusted")
	next.issue(filepath.Join(n.dir, "server"), "localhost")
	trust(t, filepath.Join(n.dir, "server"), old, next)
	n.reload()
	goesOn("the servers' certificates were replaced")
	// The services take theirs when they connect next; old and new are welcome.
	n.connect(t, streams.UserIngest)
	for _, user := range users {
		next.issue(filepath.Join(n.dir, user), user)
		trust(t, filepath.Join(n.dir, user), old, next)
	}
	n.connect(t, streams.UserIngest)
	everywhere(next)
	goesOn("the old CA was removed")
	if r := refused.Load(); r != 0 {
		t.Errorf("%d posts were refused during the rotation", r)
	}

	n.restart()
	p.ready("ingest", "prefetcher", "persister")
	goesOn("every connection was made anew")
	quiet()
	p.accountedAt(n.connect(t, streams.UserStreamctl), accepted)

	// Whoever still has the old certificate is out, and says so.
	late := n.config("late")
	trust(t, filepath.Join(n.dir, "late"), next)
	c, err := streams.Connect(late, streamstest.Logger(t), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	streamstest.Eventually(t, "the old certificate to be refused", func() bool { return strings.Contains(fmt.Sprint(c.Err()), "certificate") })
	// ... until it is replaced, without a restart of its own.
	next.issue(filepath.Join(n.dir, "late"), streams.UserIngest)
	streamstest.Eventually(t, "the new certificate to be taken", func() bool { return c.Err() == nil })
}

// TestRedisCARotatesWithoutARestart follows the README's steps: the services
// find Redis again each time, without a restart of their own.
func TestRedisCARotatesWithoutARestart(t *testing.T) {
	t.Parallel()
	nats := streamstest.NewEmptyNATS(t)
	old, next := newAuthority(t), newAuthority(t)
	r := newShippedRedis(t, old)
	p := newPipelineAt(t, func(service string) []string {
		env := []string{"NATS_URL=" + nats.URL}
		if service == "prefetcher" || service == "persister" {
			r.secret(service, service+"-1")
			env = append(env, r.env(service)...)
		}
		return env
	})
	p.apply()
	services := []string{"ingest", "prefetcher", "persister"}
	p.start(services...)
	p.ready(services...)
	works := func(id string) {
		t.Helper()
		p.rdb = r.client(t, r.url("scorer", "scorer-1"))
		if status, answer := p.post(id); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
		p.eventually(id, record.Ready)
	}
	works("old")
	trust(t, r.dir, old, next)
	works("both")
	next.issue(r.dir, "localhost")
	trust(t, r.dir, old, next)
	r.restart()
	works("new")
	trust(t, r.dir, next)
	r.restart() // so that every connection is made anew
	works("only-the-new")
	trust(t, r.dir, old)
	r.restart()
	streamstest.Eventually(t, "the persister to distrust a server of another CA", func() bool { return p.readyz("persister") != nil })
}
