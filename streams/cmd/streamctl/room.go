package main

import (
	"context"
	"fmt"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// room is how many copies the stages have room for. What waits in FP_BACKFILL
// is bounded, so that a stopped replay soon stops having effects, and by time
// rather than number: live events that make way for newer ones come behind it.
type room struct {
	left    int // how many more before another look
	allowed int
	at      time.Time
	done    int // copies finished by then
}

const (
	minOutstanding = 20
	maxOutstanding = 1000
	// outstandingFor is how long the stages need for what may wait.
	outstandingFor = 2 * time.Second
)

func newRoom(now time.Time) *room {
	return &room{left: minOutstanding, allowed: minOutstanding, at: now}
}

// look takes in that of so many copies some wait, and reports whether there is
// room for more.
func (r *room) look(now time.Time, copies, waiting int) bool {
	took, done := now.Sub(r.at), copies-waiting
	switch {
	case waiting == 0: // they were waiting for the replay
		r.allowed = 2 * r.allowed
		r.at, r.done = now, done
	case took > outstandingFor/4:
		r.allowed = int(float64(done-r.done) / took.Seconds() * outstandingFor.Seconds())
		r.at, r.done = now, done
	}
	r.allowed = max(minOutstanding, min(r.allowed, maxOutstanding))
	r.left = r.allowed - waiting
	return waiting <= r.allowed/2
}

// makeWay waits until the stages have room for the next copies.
func (r *feeder) makeWay(ctx context.Context, p *progress, room *room, copies int) error {
	for {
		waiting := uint64(0)
		for stage := range r.LastCopy {
			var lag streams.Lag
			err := keepTrying(ctx, func() (err error) {
				lag, err = streams.ReadLag(ctx, r.conn.JS, streams.StreamBackfill, stage+"-backfill")
				return err
			})
			if err != nil {
				return err //nolint:wrapcheck // says what it did
			}
			waiting = max(waiting, lag.Messages())
		}
		if room.look(time.Now(), copies, int(waiting)) {
			return nil
		}
		p.say(fmt.Sprintf("%d copied, %d wait for their stage", r.Counts.Copied, waiting))
		if err := wait(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}
