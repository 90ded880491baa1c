// Package streamstest gives tests real servers: an embedded nats-server with
// JetStream on disk, and a redis-server process of their own.
package streamstest

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// NATS is an embedded server that can be stopped and started again with its
// data.
type NATS struct {
	URL string

	t    testing.TB
	opts server.Options
	srv  *server.Server
}

// NewNATS starts a server for the length of the test, with the streams of
// [streams.Definition] in place.
func NewNATS(t testing.TB) *NATS {
	t.Helper()
	n := NewEmptyNATS(t)
	c := n.Connect("setup")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := streams.Ensure(ctx, c.JS, streams.Limits{Replicas: 1}, false); err != nil {
		t.Fatal(err)
	}
	return n
}

// NewEmptyNATS starts a server without any stream.
func NewEmptyNATS(t testing.TB) *NATS {
	t.Helper()
	n := &NATS{t: t, opts: server.Options{
		ServerName: "test", Host: "127.0.0.1", JetStream: true, StoreDir: t.TempDir(),
		NoSigs: true, NoLog: true,
	}}
	_, port, _ := net.SplitHostPort(FreeAddr(t))
	n.opts.Port, _ = strconv.Atoi(port)
	n.Start()
	t.Cleanup(n.Stop)
	return n
}

// Start starts the server, always on the same port.
func (n *NATS) Start() {
	n.t.Helper()
	opts := n.opts
	srv, err := server.NewServer(&opts)
	if err != nil {
		n.t.Fatal(err)
	}
	srv.Start()
	if !srv.ReadyForConnections(20 * time.Second) {
		n.t.Fatal("nats-server does not start")
	}
	n.srv, n.URL = srv, srv.ClientURL()
}

// Stop shuts the server down; Start brings it back with its streams.
func (n *NATS) Stop() {
	if n.srv == nil {
		return
	}
	n.srv.Shutdown()
	n.srv.WaitForShutdown()
	n.srv = nil
}

// Connect returns a connection that is closed with the test.
func (n *NATS) Connect(name string) *streams.Conn {
	n.t.Helper()
	c, err := streams.Connect(streams.ConnectConfig{Name: name, URL: n.URL}, Logger(n.t), prometheus.NewRegistry())
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(c.Close)
	Eventually(n.t, "nats connection", c.NC.IsConnected)
	return c
}

// Logger writes to the test's output.
func Logger(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// Eventually polls until ok is true and fails the test after a minute.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for: %s", what)
		}
	}
}

// Redis is a redis-server process that can be killed, frozen and started
// again on its port.
type Redis struct {
	Addr string

	t    testing.TB
	args []string
	cmd  *exec.Cmd
}

// URL returns the redis:// form of the address.
func (r *Redis) URL() string { return "redis://" + r.Addr + "/0" }

// NewRedis starts a redis-server without persistence for the length of the
// test; args are added to its command line. The test fails when there is no
// redis-server: a skipped test proves nothing.
func NewRedis(t testing.TB, args ...string) *Redis {
	t.Helper()
	r := &Redis{t: t, Addr: FreeAddr(t)}
	_, port, _ := net.SplitHostPort(r.Addr)
	r.args = append([]string{
		"--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no",
		"--dir", t.TempDir(), "--loglevel", "warning",
	}, args...)
	r.Start()
	t.Cleanup(r.Kill)
	return r
}

// Start starts the process and waits until its port accepts.
func (r *Redis) Start() {
	r.t.Helper()
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		r.t.Fatal("redis-server is not installed; `make test` installs it on Debian, elsewhere install Redis 7 or later")
	}
	r.cmd = exec.Command(bin, r.args...)
	r.cmd.Stdout, r.cmd.Stderr = r.t.Output(), r.t.Output()
	if err := r.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	Eventually(r.t, "redis-server on "+r.Addr, func() bool {
		c, err := net.DialTimeout("tcp", r.Addr, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// Kill ends the process as kill -9 does.
func (r *Redis) Kill() {
	if r.cmd == nil {
		return
	}
	_ = r.cmd.Process.Kill()
	_ = r.cmd.Wait() // "signal: killed" is what was asked for
	r.cmd = nil
}

// Freeze and Thaw stop and continue the process.
func (r *Redis) Freeze() { r.signal(syscall.SIGSTOP) }

// Thaw continues a frozen process.
func (r *Redis) Thaw() { r.signal(syscall.SIGCONT) }

func (r *Redis) signal(s os.Signal) {
	r.t.Helper()
	if err := r.cmd.Process.Signal(s); err != nil {
		r.t.Fatal(err)
	}
}

// FreeAddr returns a loopback address nobody listens on at the moment. Its
// port is below those the kernel gives out by itself, which would otherwise
// take it while the server of a test is down.
func FreeAddr(t testing.TB) string {
	t.Helper()
	for range 100 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(10_000+rand.IntN(20_000)))
		if ln, err := net.Listen("tcp", addr); err == nil {
			ln.Close()
			return addr
		}
	}
	t.Fatal("no free port")
	return ""
}
