package prefetcher

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http/httptrace"
	"os"
	"os/exec"
	"strconv"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// The test binary is also the prefetcher, and the one that kills itself.
func TestMain(m *testing.M) {
	if os.Getenv("PREFETCHER_PROCESS") != "" {
		os.Exit(ops.Main(Program()))
	}
	if at := os.Getenv("KILL_AT"); at != "" {
		if err := prefetchUntilKilled(at); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1) // it should have been killed
	}
	os.Exit(m.Run())
}

// assassin kills the process the n-th time it comes to a boundary.
type assassin struct {
	vendor    eventGetter
	publisher publisher
	at        string
	left      atomic.Int64
	published atomic.Bool
}

func (a *assassin) boundary(name string) {
	if name == a.at && a.left.Add(-1) == 0 {
		_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

func (a *assassin) Event(ctx context.Context, id string) Answer {
	// With one event at a time the one before has been acked by now.
	if a.published.Load() {
		a.boundary("acked")
	}
	a.boundary("delivered")
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		WroteRequest: func(httptrace.WroteRequestInfo) { a.boundary("called") },
	})
	answer := a.vendor.Event(ctx, id)
	a.boundary("answered")
	return answer
}

func (a *assassin) Publish(ctx context.Context, m streams.Message) (streams.Ack, error) {
	ack, err := a.publisher.Publish(ctx, m)
	if err == nil {
		a.published.Store(true)
		a.boundary("published")
	}
	return ack, err
}

func prefetchUntilKilled(at string) error {
	s := ops.NewSettings(os.Getenv)
	cfg := ReadConfig(s)
	if err := s.Err(); err != nil {
		return err
	}
	p := ops.NewProcessLogger("prefetcher", slog.New(slog.DiscardHandler))
	conn, err := streams.Connect(cfg.NATS, p.Log, p.Registry)
	if err != nil {
		return err
	}
	pub := streams.NewPublisher(conn.JS, p.Registry)
	n, err := strconv.Atoi(os.Getenv("KILL_AFTER"))
	if err != nil {
		return err
	}
	a := &assassin{at: at, publisher: pub, vendor: NewFingerprint(cfg.BaseURL, func() string { return "key" }, cfg.Timeout, 1)}
	a.left.Store(int64(n))
	return run(context.Background(), cfg, p, conn, a, a, pub)
}

// Promise 1 and 2 for this stage: kill -9 at each boundary loses nothing,
// makes nothing twice, and costs one more call at most for the event that was
// in flight.
func TestKillNineAtEachBoundary(t *testing.T) {
	t.Parallel()
	const kills, most = 20, 4
	for _, at := range []string{"delivered", "called", "answered", "published", "acked"} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			r := start(t, fingerprintsim.Options{Key: "key"}, nil)
			if err := r.stop(); err != nil {
				t.Fatal(err)
			}
			all := ids("id", kills*(most+2))
			r.accept(all...)
			for range kills {
				cmd := exec.Command(os.Args[0])
				cmd.Stderr = t.Output()
				cmd.Env = append(os.Environ(), "KILL_AT="+at, "KILL_AFTER="+strconv.Itoa(1+rand.IntN(most)), "PREFETCH_CONCURRENCY=1")
				for k, v := range r.settings {
					cmd.Env = append(cmd.Env, k+"="+v)
				}
				_ = cmd.Run()
				if s := cmd.ProcessState.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != syscall.SIGKILL {
					t.Fatalf("ended with %v, want killed", cmd.ProcessState)
				}
			}
			r.replica(ops.NewProcessLogger("prefetcher", streamstest.Logger(t)))
			for _, id := range all {
				if got := r.end(id); got.Status != record.Ready {
					t.Errorf("%s is %s", id, got.Status)
				}
			}
			// In flight is what was delivered and whose ack had not reached the
			// server: each delivery may cost one call, and no more.
			if n, deliveries := r.sim.Calls(), r.deliveries(); n > deliveries {
				t.Errorf("%d calls for %d deliveries of %d events", n, deliveries, len(all))
			}
			if r.dead() != 0 {
				t.Errorf("%d dead letters", r.dead())
			}
			t.Logf("%d calls for %d events, %d deliveries and %d kills", r.sim.Calls(), len(all), r.deliveries(), kills)
		})
	}
}
