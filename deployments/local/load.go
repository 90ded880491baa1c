package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// loadAtOnce bounds the posts under way of --load. When as many wait, the edge
// does not keep up, and more would only wait with them.
const loadAtOnce = 512

// maxLoad is more than the embedded servers keep up with.
const maxLoad = 10_000

// load posts rate events a second until ctx is done, each with an id of its
// own, whether or not the edge keeps up, and returns how many it accepted and
// how many not.
func (s *stack) load(ctx context.Context, rate float64) (accepted, refused int64) {
	run := rand.Text()[:8]
	var ok, bad atomic.Int64
	var wg sync.WaitGroup
	places := make(chan struct{}, loadAtOnce)
	begin := time.Now()
	for n := 0; ; n++ {
		due := begin.Add(time.Duration(float64(n) / rate * float64(time.Second)))
		select {
		case <-ctx.Done():
			wg.Wait()
			return ok.Load(), bad.Load()
		case <-time.After(time.Until(due)):
		}
		select {
		case places <- struct{}{}:
		default:
			bad.Add(1)
			continue
		}
		wg.Go(func() {
			defer func() { <-places }()
			body := fmt.Sprintf(`{"request_id":"%s-%d","subscriber_id":%d,"session_id":"load-session","user_id":"load-user"}`, run, n, 1+n%100)
			// A post under way is finished: it may be stored already.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
			defer cancel()
			if status, _, err := s.post(ctx, body); err == nil && status[:3] == "202" {
				ok.Add(1)
			} else {
				bad.Add(1)
			}
		})
	}
}
