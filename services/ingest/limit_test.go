package ingest

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

func TestLimiterAdmitsRateAndOneSecondOfBurst(t *testing.T) {
	t.Parallel()
	for rate, burst := range map[float64]int{0.5: 1, 1: 1, 10: 10, 1000: 1000} {
		l, now, n := newLimiter(rate), time.Unix(1, 0), 0
		for l.take(now).ok {
			n++
		}
		if n != burst {
			t.Errorf("rate %v: burst of %d, want %d", rate, n, burst)
		}
		n = 0
		for range 1000 {
			now = now.Add(10 * time.Millisecond)
			for l.take(now).ok {
				n++
			}
		}
		if want := int(rate * 10); n != want {
			t.Errorf("rate %v: %d in ten seconds, want %d", rate, n, want)
		}
		a := l.take(now)
		if a.ok || a.retry <= 0 || a.retry > time.Duration(float64(time.Second)/rate) || !l.take(now.Add(a.retry)).ok {
			t.Errorf("rate %v: told to come back after %v", rate, a.retry)
		}
	}
	if newLimiter(0) != nil {
		t.Error("rate 0 is not unlimited")
	}
}

func TestLimiterIsExactUnderConcurrency(t *testing.T) {
	t.Parallel()
	l, now := newLimiter(500), time.Unix(1, 0)
	var admitted [8]int
	var wg sync.WaitGroup
	for g := range admitted {
		wg.Go(func() {
			for range 200 {
				if l.take(now).ok {
					admitted[g]++
				}
			}
		})
	}
	wg.Wait()
	total := 0
	for _, n := range admitted {
		total += n
	}
	if total != 500 {
		t.Errorf("%d admitted, want 500", total)
	}
}

const goodBody = `{"request_id":"1A2B3C4D5E","subscriber_id":12,"session_id":"s","user_id":"u"}`

// A key past its rate is told when to come back, and other keys do not notice.
func TestRateLimitIsPerKey(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	_, acme := testKey(t, "acme-1", "12")
	_, admin := testKey(t, "admin", "*")
	two := 2.0
	acme.RateLimit = &two
	writeKeys(t, e.keysFile, acme, admin)
	e.keys.reload()
	addr := e.listen(t)
	do := func(key string) answer { return send(t, request(t, addr, key, goodBody)) }
	var statuses []int
	var last answer
	for range 3 {
		last = do(e.acme)
		statuses = append(statuses, last.StatusCode)
	}
	if statuses[0] != 202 || statuses[1] != 202 || statuses[2] != 429 {
		t.Fatalf("statuses %v", statuses)
	}
	for name, want := range map[string]string{"Retry-After": "1", "RateLimit-Limit": "2", "RateLimit-Remaining": "0", "RateLimit-Reset": "1"} {
		if got := last.Header.Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if resp := do(e.admin); resp.StatusCode != 202 {
		t.Errorf("another key: %d", resp.StatusCode)
	}
}

// Past the limit on requests at once the answer is a quick 503.
func TestOverloadIsShed(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}, 2), make(chan struct{})
	e := newEdge(t, func(context.Context, streams.Message) (streams.Ack, error) {
		entered <- struct{}{}
		<-release
		return streams.Ack{Sequence: 1}, nil
	})
	e.server.maxInflight = 2
	addr := e.listen(t)
	do := func(key string) answer { return send(t, request(t, addr, key, goodBody)) }
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if resp := do(e.acme); resp.StatusCode != 202 {
				t.Errorf("one of the first two: %d", resp.StatusCode)
			}
		})
	}
	<-entered
	<-entered
	if resp := do(e.acme); resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
		t.Errorf("the third: %d", resp.StatusCode)
	}
	if resp := do("nonsense"); resp.StatusCode != 401 {
		t.Errorf("a stranger: %d", resp.StatusCode)
	}
	close(release)
	wg.Wait()
	if resp := do(e.acme); resp.StatusCode != 202 {
		t.Errorf("afterwards: %d", resp.StatusCode)
	}
}
