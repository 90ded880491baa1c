// Package reader looks records up the way a scorer should: one GET, one
// answer that means one thing.
//
//	r := reader.Reader{Get: get}
//	res, err := r.Lookup(ctx, 12, "1A2B3C4D5E")
//	switch {
//	case err != nil: // Redis is away: no data, and no verdict about the client
//	case res.Outcome == reader.Ready: // res.Record.Signals, .Checks, .Event
//	}
//
// It depends on the standard library alone; the Redis client is the caller's.
package reader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// Outcome is what a lookup found.
type Outcome string

const (
	// Ready: the event is there.
	Ready Outcome = "ready"
	// Negative: there will be no event; the record's Status and Reason say
	// why, and Record.Status tells a forged id from our own trouble.
	Negative Outcome = "negative"
	// Pending: accepted, and on its way.
	Pending Outcome = "pending"
	// Absent: never accepted, expired, or lost by Redis and not yet rebuilt.
	Absent Outcome = "absent"
	// Foreign: the id belongs to another subscriber. Nothing of that record
	// is handed out.
	Foreign Outcome = "foreign"
	// Failed goes with an error: nothing is known.
	Failed Outcome = "failed"
)

// Outcomes lists them all, for metrics.
func Outcomes() []Outcome { return []Outcome{Ready, Negative, Pending, Absent, Foreign, Failed} }

// Result is an outcome and, for Ready, Negative and Pending, the record.
type Result struct {
	Outcome Outcome
	Record  record.Record
}

// Reader looks records up. It is safe for concurrent use when its functions
// are.
type Reader struct {
	// Get returns the value of a Redis key, or nil when there is no such
	// key. It bounds its own time, or heeds ctx.
	Get func(ctx context.Context, key string) ([]byte, error)
	// Count, if set, is told the outcome of each lookup, once. It must not
	// block.
	Count func(Outcome)
}

// errOther is a record that does not belong under its key.
var errOther = errors.New("record of another request id")

// Lookup reads the record of a request id once. The error is Get's, or says
// that the value is no record this version can read; it wraps
// [record.ErrNewer] when only an update of the reader is missing. It holds
// nothing of the value.
func (r Reader) Lookup(ctx context.Context, subscriberID int64, requestID string) (Result, error) {
	res, err := r.read(ctx, subscriberID, requestID)
	r.count(res)
	return res, err
}

const (
	// pollMin and pollMax bound the pause between two looks. A record is
	// readable one to two milliseconds after the vendor's answer.
	pollMin = 2 * time.Millisecond
	pollMax = 32 * time.Millisecond
	// markerGrace is how long an absent record is waited for: the pending
	// marker of an accepted event follows within milliseconds. An id nobody
	// handed in must not cost a payment the whole wait.
	markerGrace = 50 * time.Millisecond
)

// LookupWait is Lookup that waits at most wait for a pending record to end,
// and at most 50 ms of it for an absent one to appear. When the time is up, or
// ctx is done after the first look, it returns what it saw last.
func (r Reader) LookupWait(ctx context.Context, subscriberID int64, requestID string, wait time.Duration) (Result, error) {
	res, err := r.wait(ctx, subscriberID, requestID, wait)
	r.count(res)
	return res, err
}

func (r Reader) wait(ctx context.Context, subscriberID int64, requestID string, wait time.Duration) (Result, error) {
	start := time.Now()
	last, err := r.read(ctx, subscriberID, requestID)
	if err != nil {
		return last, err
	}
	ctx, cancel := context.WithDeadline(ctx, start.Add(wait))
	defer cancel()
	for pause := pollMin; ; pause = min(2*pause, pollMax) {
		switch {
		case last.Outcome == Pending:
		case last.Outcome == Absent && time.Since(start) < markerGrace:
		default:
			return last, nil
		}
		select {
		case <-ctx.Done():
			return last, nil
		case <-time.After(pause):
		}
		res, err := r.read(ctx, subscriberID, requestID)
		if ctx.Err() != nil && err != nil {
			return last, nil
		}
		if err != nil {
			return res, err
		}
		last = res
	}
}

func (r Reader) read(ctx context.Context, subscriberID int64, requestID string) (Result, error) {
	b, err := r.Get(ctx, record.Key(requestID))
	if err != nil {
		return Result{Outcome: Failed}, fmt.Errorf("look up record: %w", err)
	}
	if b == nil {
		return Result{Outcome: Absent}, nil
	}
	rec, err := record.Decode(b)
	if err == nil && rec.RequestID != requestID {
		err = errOther
	}
	switch {
	case err != nil:
		return Result{Outcome: Failed}, fmt.Errorf("look up record: %w", err)
	case rec.SubscriberID != subscriberID:
		return Result{Outcome: Foreign}, nil
	case rec.Status == record.Ready:
		return Result{Outcome: Ready, Record: rec}, nil
	case rec.Status == record.Pending:
		return Result{Outcome: Pending, Record: rec}, nil
	}
	return Result{Outcome: Negative, Record: rec}, nil
}

func (r Reader) count(res Result) {
	if r.Count != nil {
		r.Count(res.Outcome)
	}
}
