package streams

import (
	"testing"
	"time"
)

// Between two looks nobody knows how old the oldest message is. One that was
// the oldest before goes on growing; one that was not has most likely been
// finished since, and a busy stage must not look seconds behind.
func TestLagOfABusyStageDoesNotGrowBetweenLooks(t *testing.T) {
	t.Parallel()
	start := time.Unix(1_700_000_000, 0)
	at := func(s float64) time.Time { return start.Add(time.Duration(s * float64(time.Second))) }
	r := reading{Lag: Lag{Oldest: at(0), Undelivered: at(0.1)}, at: at(1)}
	for name, c := range map[string]struct {
		moved, delivering       bool
		now                     float64
		unfinished, undelivered float64
	}{
		"stuck":                   {now: 4, unfinished: 4, undelivered: 3.9},
		"busy":                    {moved: true, delivering: true, now: 4, unfinished: 1, undelivered: 0.9},
		"one is parked":           {delivering: true, now: 4, unfinished: 4, undelivered: 0.9},
		"busy, and no look since": {moved: true, delivering: true, now: 12, unfinished: 12, undelivered: 11.9},
	} {
		r.moved, r.delivering = c.moved, c.delivering
		if u, d := r.seconds(at(c.now)); u != c.unfinished || d != c.undelivered {
			t.Errorf("%s: %v and %v, want %v and %v", name, u, d, c.unfinished, c.undelivered)
		}
	}
}
