package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// streamStatus is one line of status. Bytes and MaxBytes are in bytes; the
// times are absent from an empty stream.
type streamStatus struct {
	Stream   string    `json:"stream"`
	Messages uint64    `json:"messages"`
	Bytes    uint64    `json:"bytes"`
	MaxBytes int64     `json:"max_bytes"`
	First    time.Time `json:"first,omitzero"`
	Last     time.Time `json:"last,omitzero"`
}

// durableStatus is one line of status.
type durableStatus struct {
	Stream   string `json:"stream"`
	Durable  string `json:"durable"`
	Pending  uint64 `json:"pending"`
	InFlight uint64 `json:"in_flight"`
	// OldestSeconds is the age of the oldest unfinished message.
	OldestSeconds float64 `json:"oldest_seconds"`
	// State is done, working, idle (messages wait and nobody asks for them)
	// or paused.
	State string `json:"state"`
	// PausedUntil is when a pause ends.
	PausedUntil time.Time `json:"paused_until,omitzero"`
}

// quotaStatus is the vendor's quota, as the prefetchers share it in Redis.
type quotaStatus struct {
	// Tokens are the calls that may be made at once, of at most Burst.
	Tokens float64 `json:"tokens"`
	Burst  float64 `json:"burst"`
	// Rate in calls per second, 0 for no limit, is FINGERPRINT_RATE_LIMIT as
	// this process has it.
	Rate float64 `json:"rate"`
	// PausedSeconds is how long no call is made after the vendor's refusal.
	PausedSeconds float64 `json:"paused_seconds,omitempty"`
	// Used is false when no prefetcher has taken a token for an hour.
	Used bool `json:"used"`
}

// burstFactor is the prefetcher's: the bucket holds three times the rate.
const burstFactor = 3

// readQuota returns nil without REDIS_URL.
func readQuota(ctx context.Context, rdb redis.UniversalClient, rate float64) (*quotaStatus, error) {
	if rdb == nil {
		return nil, nil
	}
	now, err := rdb.Time(ctx).Result()
	if err != nil {
		return nil, fmt.Errorf("look at the quota: %w", err)
	}
	var h struct {
		Tokens float64 `redis:"tokens"`
		At     float64 `redis:"at"` // in microseconds, like the next
		Paused float64 `redis:"paused"`
	}
	got := rdb.HMGet(ctx, streams.QuotaKey, "tokens", "at", "paused")
	if err := got.Scan(&h); err != nil {
		return nil, fmt.Errorf("look at the quota: %w", err)
	}
	q := &quotaStatus{Rate: rate, Burst: max(burstFactor*rate, 1), Used: h.At != 0}
	micros := float64(now.UnixMicro())
	q.PausedSeconds = max(0, (h.Paused-micros)/1e6)
	q.Tokens = min(q.Burst, h.Tokens+max(0, micros-h.At)/1e6*rate)
	return q, nil
}

// replayStatus is a replay or redrive that is not finished.
type replayStatus struct {
	ID    string `json:"id"`
	Verb  string `json:"verb"`
	Stage string `json:"stage,omitempty"`
	// Share of the span that is dealt with, 0 to 1.
	Share   float64   `json:"share"`
	Copied  uint64    `json:"copied"`
	Updated time.Time `json:"updated"`
	// Copied is all; the stages have not finished.
	Done bool `json:"done,omitempty"`
}

// readReplays returns those that are not settled. It reads the bucket as the
// stream it is, which needs no right to make a consumer.
func readReplays(ctx context.Context, conn *streams.Conn) ([]replayStatus, error) {
	found := []replayStatus{}
	in, err := findSpan(ctx, conn.JS, "KV_"+replayBucket, time.Time{}, time.Time{})
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return found, nil
	}
	if err != nil {
		return nil, err
	}
	err = scan(ctx, conn, in, "$KV."+replayBucket+".>", func(m *jetstream.RawStreamMsg) error {
		var s feedState
		if json.Unmarshal(m.Data, &s) != nil || s.Settled {
			return nil
		}
		r := replayStatus{ID: s.ID, Verb: s.verb(), Stage: s.Stage, Share: 1, Copied: s.Counts.Copied, Updated: s.Updated, Done: s.Done}
		if !s.Done && s.Span.To >= s.Span.From {
			r.Share = float64(s.Next-s.Span.From) / float64(s.Span.To+1-s.Span.From)
		}
		found = append(found, r)
		return nil
	})
	return found, err
}

type statusReport struct {
	Streams  []streamStatus  `json:"streams"`
	Durables []durableStatus `json:"durables"`
	// Quota is there with REDIS_URL.
	Quota   *quotaStatus   `json:"quota,omitempty"`
	Replays []replayStatus `json:"replays"`
}

// watchPeriod is gentle to the server: consumer info is not free.
const watchPeriod = 2 * time.Second

func status(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	watch := fs.Bool("watch", false, "show again every two seconds until Ctrl-C")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	rdb, err := e.redis()
	if err != nil {
		return 0, err
	}
	if rdb != nil {
		defer rdb.Close()
	}
	settings := ops.NewSettings(e.getenv)
	rate := readRate(settings)
	if err := settings.Err(); err != nil {
		return 0, fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	for {
		once, cancel := context.WithTimeout(ctx, f.timeout)
		r, err := readStatus(once, conn)
		if err == nil {
			r.Quota, err = readQuota(once, rdb, rate)
		}
		if err == nil {
			r.Replays, err = readReplays(once, conn)
		}
		cancel()
		if err != nil {
			if *watch && ctx.Err() != nil {
				return exitDone, nil
			}
			return 0, err
		}
		if *watch && !f.json {
			fmt.Fprint(e.stdout, "\x1b[H\x1b[2J")
		}
		if f.json {
			err = printJSON(e.stdout, r)
		} else {
			printStatus(e.stdout, r)
		}
		if err != nil || !*watch {
			return exitDone, err
		}
		select {
		case <-ctx.Done():
			return exitDone, nil
		case <-time.After(watchPeriod):
		}
	}
}

func readStatus(ctx context.Context, conn *streams.Conn) (statusReport, error) {
	var r statusReport
	now := time.Now()
	for _, d := range streams.Definition(streams.Limits{}) {
		s, err := conn.JS.Stream(ctx, d.Stream.Name)
		if err != nil {
			return r, fmt.Errorf("look up stream %s: %w", d.Stream.Name, err)
		}
		info := s.CachedInfo()
		line := streamStatus{Stream: d.Stream.Name, Messages: info.State.Msgs, Bytes: info.State.Bytes, MaxBytes: info.Config.MaxBytes}
		if info.State.Msgs > 0 {
			line.First, line.Last = info.State.FirstTime, info.State.LastTime
		}
		r.Streams = append(r.Streams, line)
		for _, c := range d.Durables {
			consumer, err := s.Consumer(ctx, c.Durable)
			if err != nil {
				return r, fmt.Errorf("look up durable %s of %s: %w", c.Durable, d.Stream.Name, err)
			}
			lag, err := streams.ReadLag(ctx, conn.JS, d.Stream.Name, c.Durable)
			if err != nil {
				return r, err //nolint:wrapcheck // says what it did
			}
			state, info := "working", consumer.CachedInfo()
			switch {
			case info.Paused:
				state = "paused"
			case lag.Messages() == 0:
				state = "done"
			case info.NumWaiting == 0 && lag.InFlight == 0:
				state = "idle"
			}
			line := durableStatus{
				Stream: d.Stream.Name, Durable: c.Durable, Pending: lag.Pending, InFlight: lag.InFlight,
				OldestSeconds: lag.Seconds(now), State: state,
			}
			if info.Paused {
				line.PausedUntil = now.Add(info.PauseRemaining).UTC().Truncate(time.Second)
			}
			r.Durables = append(r.Durables, line)
		}
	}
	return r, nil
}

func printStatus(w io.Writer, r statusReport) {
	now := time.Now()
	age := func(t time.Time) string {
		if t.IsZero() {
			return "-"
		}
		return now.Sub(t).Round(time.Second).String()
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STREAM\tMESSAGES\tBYTES\tOF LIMIT\tFIRST AGE\tLAST AGE")
	for _, s := range r.Streams {
		share := "-"
		if s.MaxBytes > 0 {
			share = fmt.Sprintf("%.1f%%", 100*float64(s.Bytes)/float64(s.MaxBytes))
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\t%s\n", s.Stream, s.Messages, s.Bytes, share, age(s.First), age(s.Last))
	}
	t.Flush()
	fmt.Fprintln(w)
	fmt.Fprintln(t, "DURABLE\tPENDING\tIN FLIGHT\tOLDEST\tSTATE")
	for _, d := range r.Durables {
		state := d.State
		if !d.PausedUntil.IsZero() {
			state += " until " + d.PausedUntil.Format(time.RFC3339)
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%.0fs\t%s\n", d.Durable, d.Pending, d.InFlight, d.OldestSeconds, state)
	}
	t.Flush()
	if q := r.Quota; q != nil {
		fmt.Fprintln(w)
		switch {
		case !q.Used:
			fmt.Fprintln(w, "vendor's quota: not used within the hour")
		case q.Rate == 0:
			fmt.Fprintln(w, "vendor's quota: no limit is set")
		default:
			fmt.Fprintf(w, "vendor's quota: %.1f of %.0f calls at once, %g per second\n", q.Tokens, q.Burst, q.Rate)
		}
		if q.PausedSeconds > 0 {
			fmt.Fprintf(w, "the vendor refuses calls: none for %.1fs\n", q.PausedSeconds)
		}
	}
	if len(r.Replays) > 0 {
		fmt.Fprintln(w)
		fmt.Fprintln(t, "UNFINISHED\tID\tSTAGE\tREAD\tCOPIED\tLAST SAVED")
		for _, p := range r.Replays {
			fmt.Fprintf(t, "%s\t%s\t%s\t%.0f%%\t%d\t%s ago\n", p.Verb, p.ID, p.Stage, 100*p.Share, p.Copied, age(p.Updated))
		}
		t.Flush()
	}
}

// readRate reads the prefetcher's setting, for what status says of the quota.
func readRate(s *ops.Settings) float64 {
	return s.Rate("FINGERPRINT_RATE_LIMIT", defaultRate, "the vendor's calls per second for the fleet, as the prefetcher has it")
}
