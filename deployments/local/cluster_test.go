package main

import (
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestClusterLosesItsLeaderUnderLoad kills the server that leads FP_INGEST
// while clients post, on the configuration that ships: nothing that was
// answered 202 is lost, and posts are accepted again within ten seconds.
func TestClusterLosesItsLeaderUnderLoad(t *testing.T) {
	t.Parallel()
	n, p := newShippedPipeline(t)
	admin := n.connect(t, streams.UserStreamctl)

	type answer struct{ begun, ended time.Time }
	var (
		mu       sync.Mutex
		accepted = map[string]bool{}
		answers  []answer
		next     atomic.Int64
		stop     = make(chan struct{})
		clients  sync.WaitGroup
	)
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(accepted) }
	for range 8 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				id, begun := fmt.Sprint("leader-", next.Add(1)), time.Now()
				if status, _ := p.post(id); status == http.StatusAccepted {
					mu.Lock()
					accepted[id] = true
					answers = append(answers, answer{begun, time.Now()})
					mu.Unlock()
				}
			}
		})
	}
	var halt sync.Once
	t.Cleanup(func() { halt.Do(func() { close(stop) }); clients.Wait() })

	const each = 300
	streamstest.Eventually(t, "load", func() bool { return count() >= each })
	st, err := admin.JS.Stream(t.Context(), streams.StreamIngest)
	if err != nil {
		t.Fatal(err)
	}
	leader := st.CachedInfo().Cluster.Leader
	killed := time.Now()
	if err := n.nodes[leader].cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	before := count()
	streamstest.Eventually(t, "load after "+leader+" is gone", func() bool { return count() >= before+each })
	halt.Do(func() { close(stop) })
	clients.Wait()

	var again time.Duration
	for _, a := range answers {
		if d := a.ended.Sub(killed); a.begun.After(killed) && (again == 0 || d < again) {
			again = d
		}
	}
	t.Logf("%d accepted; %s killed after %d; accepting again %v later", len(accepted), leader, before, again)
	if again == 0 || again > 10*time.Second {
		t.Errorf("accepting again after %v", again)
	}
	n.start(leader) // it catches up from the others
	p.accountedAt(admin, accepted)
}
