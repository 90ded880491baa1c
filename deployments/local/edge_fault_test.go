package main

import (
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

const (
	// answerWithin bounds every answer of the edge while NATS is away.
	answerWithin = 2 * time.Second
	// backWithin bounds the time from the end of a fault to the first 202.
	backWithin = 8 * time.Second
)

// natsServer is a nats-server process, which unlike an embedded server can be
// killed and frozen.
type natsServer struct {
	t    testing.TB
	args []string
	cmd  *exec.Cmd
}

// useNATSServer puts a process in the place of the pipeline's embedded server.
// Call it before anything is started.
func (p *pipeline) useNATSServer() *natsServer {
	p.t.Helper()
	p.nats.Stop()
	addr := streamstest.FreeAddr(p.t)
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		p.t.Fatal(err)
	}
	n := &natsServer{t: p.t, args: []string{"--jetstream", "--addr", host, "--port", port, "--store_dir", p.t.TempDir()}}
	n.start()
	p.nats.URL = "nats://" + addr // for connections
	for _, pr := range p.procs {
		pr.env = append(without(pr.env, "NATS_URL"), "NATS_URL="+p.nats.URL)
	}
	return n
}

func (n *natsServer) start() {
	n.t.Helper()
	dir, _ := build()
	cmd := exec.Command(filepath.Join(dir, "nats-server"), n.args...)
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.cmd = cmd
	n.t.Cleanup(func() {
		_ = cmd.Process.Kill() // may have ended already
		_ = cmd.Wait()
	})
}

func (n *natsServer) signal(s syscall.Signal) {
	n.t.Helper()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Fatal(err)
	}
}

// posted is one request of a load and its answer.
type posted struct {
	id         string
	status     int
	answer     string
	begun, end time.Time
}

// load posts new events from a number of clients without a pause until stop
// is called, which returns them all.
func (p *pipeline) load(clients int) (count func() int64, stop func() []posted) {
	// The longest texts there are, and such as grow in JSON.
	text := strings.Repeat(`\"`, 256)
	var done atomic.Bool
	var answered atomic.Int64
	all := make([][]posted, clients)
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() {
			for i := 0; !done.Load(); i++ {
				r := posted{id: fmt.Sprintf("load-%d-%d", c, i), begun: time.Now()}
				r.status, r.answer = p.send(fmt.Sprintf(`{"request_id":%q,"subscriber_id":12,"session_id":"%s","user_id":"%s"}`, r.id, text, text))
				r.end = time.Now()
				all[c] = append(all[c], r)
				answered.Add(1)
			}
		})
	}
	stopOnce := sync.OnceValue(func() (flat []posted) {
		done.Store(true)
		wg.Wait()
		for _, a := range all {
			flat = append(flat, a...)
		}
		return flat
	})
	p.t.Cleanup(func() { stopOnce() })
	return answered.Load, stopOnce
}

// storedIDs reads the request ids of FP_INGEST.
func (p *pipeline) storedIDs() map[string]bool {
	p.t.Helper()
	st, err := p.nats.Connect("test").JS.Stream(p.t.Context(), streams.StreamIngest)
	if err != nil {
		p.t.Fatal(err)
	}
	ids := map[string]bool{}
	for seq := uint64(1); seq <= st.CachedInfo().State.LastSeq; seq++ {
		m, err := st.GetMsg(p.t.Context(), seq)
		if err != nil {
			p.t.Fatal(err)
		}
		e, err := streams.DecodeEvent(m.Data)
		if err != nil {
			p.t.Fatal(err)
		}
		ids[e.RequestID] = true
	}
	return ids
}

// Promise 1 with NATS killed under load: from then on every answer is a prompt
// 503, and none of what was refused while it was away is stored later.
func TestNATSStoppedUnderLoad(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	server := p.useNATSServer()
	streamstest.Eventually(t, "nats-server", p.nats.Connect("wait").NC.IsConnected)
	p.apply()
	p.start("ingest")
	p.ready("ingest")

	count, stop := p.load(64)
	more := func(n int64) {
		t.Helper()
		from := count()
		streamstest.Eventually(t, "more answers", func() bool { return count() > from+n })
	}
	more(500)
	server.signal(syscall.SIGKILL)
	_ = server.cmd.Wait() // "signal: killed" is what was asked for
	away := time.Now()
	more(500)
	back := time.Now()
	server.start()
	p.ready("ingest")
	more(500)

	all := stop()
	stored := p.storedIDs()
	var accepted, refused int
	for _, r := range all {
		switch {
		case r.status == http.StatusAccepted:
			accepted++
			if !stored[r.id] {
				t.Errorf("%s: 202, and not stored", r.id)
			}
		case r.status != http.StatusServiceUnavailable:
			t.Errorf("%s: %d %s", r.id, r.status, r.answer)
		}
		if took := r.end.Sub(r.begun); took > answerWithin {
			t.Errorf("%s: %d after %v", r.id, r.status, took)
		}
		if r.begun.After(away) && r.end.Before(back) {
			refused++
			if r.status != http.StatusServiceUnavailable {
				t.Errorf("%s: %d without NATS", r.id, r.status)
			}
			if stored[r.id] {
				t.Errorf("%s: refused while NATS was away, and stored later", r.id)
			}
		}
	}
	if accepted < 500 || refused < 100 || all[len(all)-1].status != http.StatusAccepted {
		t.Errorf("%d accepted, %d refused while NATS was away, at the end %d", accepted, refused, all[len(all)-1].status)
	}
	t.Logf("%d answers, %d accepted, %d refused while NATS was away", len(all), accepted, refused)
}

// Promise 1 with NATS frozen under load: answers stay bounded, and the edge is
// back soon after NATS is.
func TestNATSFrozenUnderLoad(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	server := p.useNATSServer()
	streamstest.Eventually(t, "nats-server", p.nats.Connect("wait").NC.IsConnected)
	p.apply()
	p.start("ingest")
	p.ready("ingest")

	count, stop := p.load(64)
	streamstest.Eventually(t, "answers", func() bool { return count() > 500 })
	server.signal(syscall.SIGSTOP)
	frozen := time.Now()
	streamstest.Eventually(t, "the edge to notice", func() bool { return p.readyz("ingest") != nil })
	at := count()
	streamstest.Eventually(t, "answers while frozen", func() bool { return count() > at+200 })
	thawed := time.Now()
	server.signal(syscall.SIGCONT)
	streamstest.Eventually(t, "an event to be accepted", func() bool { status, _ := p.post("after"); return status == http.StatusAccepted })
	took := time.Since(thawed)
	if took > backWithin {
		t.Errorf("back after %v", took)
	}
	all := stop()
	var longest time.Duration
	accepted, refused := 0, 0
	stored := p.storedIDs()
	for _, r := range all {
		switch {
		case r.status == http.StatusAccepted:
			accepted++
			if !stored[r.id] {
				t.Errorf("%s: 202, and not stored", r.id)
			}
		case r.status == http.StatusServiceUnavailable:
			refused++
		default: // 0 if the client's patience of five seconds was not enough
			t.Errorf("%s: %d %s", r.id, r.status, r.answer)
		}
		longest = max(longest, r.end.Sub(r.begun))
	}
	if accepted == 0 || refused < 100 {
		t.Errorf("%d accepted, %d refused", accepted, refused)
	}
	t.Logf("%d answers, %d accepted, %d refused, the slowest after %v; frozen for %v, back after %v", len(all), accepted, refused, longest, thawed.Sub(frozen), took)
}
