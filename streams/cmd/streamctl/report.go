package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// outcome is what became of the copies, read from the streams and from Redis
// and not from what the run believes.
type outcome struct {
	// InStream is how many copies FP_BACKFILL has.
	InStream uint64 `json:"in_stream"`
	// Purged is how many more it had until the exporter made room: it purges
	// only what the stages have finished. Records leaves them out.
	Purged uint64 `json:"finished_and_purged,omitempty"`
	// Agrees is whether both together are what was copied.
	Agrees bool `json:"agrees"`
	// Results the prefetcher left on FP_ENRICHED, by status.
	Results map[string]uint64 `json:"results,omitempty"`
	// Dead letters made of the copies or of their results, by reason.
	Dead map[string]uint64 `json:"dead,omitempty"`
	// Records of the copied events now, by status; also absent, earlier (of an
	// earlier event with this id) and foreign (another subscriber's). Without
	// REDIS_URL it is not there.
	Records map[string]uint64 `json:"records,omitempty"`
}

// idleFor is how long a stage may do nothing about what waits for it until a
// run no longer waits for the stage.
const idleFor = 10 * time.Second

// settle waits until the stages have finished the copies, and what came of
// them, and then looks at the outcome. It returns with Settled unset when ctx
// is done or a stage does nothing; why says which.
func (r *feeder) settle(ctx context.Context, p *progress) (why string, err error) {
	if len(r.LastCopy) == 0 {
		r.Settled = true
		return "", r.save(ctx)
	}
	for _, stage := range slices.Sorted(maps.Keys(r.LastCopy)) {
		if why, err = r.finished(ctx, p, streams.StreamBackfill, stage+"-backfill", r.LastCopy[stage]); err != nil || why != "" {
			return why, err
		}
	}
	if r.LastCopy[streams.StagePrefetcher] > 0 {
		s, err := r.conn.JS.Stream(ctx, streams.StreamEnriched)
		if err != nil {
			return "", fmt.Errorf("look up stream %s: %w", streams.StreamEnriched, err)
		}
		if why, err = r.finished(ctx, p, streams.StreamEnriched, streams.DurablePersister, s.CachedInfo().State.LastSeq); err != nil || why != "" {
			return why, err
		}
	}
	p.end()
	if r.Outcome, err = r.look(ctx); err != nil {
		return "", err
	}
	r.Settled = true
	return "", r.save(ctx)
}

// finished waits until a durable has finished everything up to a sequence.
func (r *feeder) finished(ctx context.Context, p *progress, stream, durable string, upTo uint64) (why string, err error) {
	moved, last := time.Now(), uint64(0)
	for {
		var c jetstream.Consumer
		err := keepTrying(ctx, func() (err error) {
			c, err = r.conn.JS.Consumer(ctx, stream, durable)
			return err
		})
		if err != nil {
			return "", fmt.Errorf("look up durable %s of %s: %w", durable, stream, err)
		}
		info := c.CachedInfo()
		left := info.NumPending + uint64(max(info.NumAckPending, 0))
		// The floor stays behind after deletions.
		if info.AckFloor.Stream >= upTo || left == 0 {
			return "", nil
		}
		now := time.Now()
		if done := info.AckFloor.Stream + info.Delivered.Consumer; done != last || info.NumWaiting > 0 || info.NumAckPending > 0 {
			moved, last = now, done
		}
		switch {
		case info.Paused:
			return durable + " is paused", nil
		case now.Sub(moved) > idleFor:
			return "nobody works on " + durable, nil
		}
		p.say(fmt.Sprintf("%s has %d messages left", durable, left))
		if wait(ctx, 100*time.Millisecond) != nil {
			return "interrupted", nil
		}
	}
}

// look reads the outcome.
func (r *feeder) look(ctx context.Context) (*outcome, error) {
	o := &outcome{Results: map[string]uint64{}, Dead: map[string]uint64{}}
	if r.records.rdb != nil {
		o.Records = map[string]uint64{}
	}
	last := uint64(0)
	for _, seq := range r.LastCopy {
		last = max(last, seq)
	}
	copies := span{Stream: streams.StreamBackfill, From: r.FirstCopy, To: last}
	err := scanBatches(ctx, r.conn, copies, r.backfillSubject(), batchSize, func(batch []*jetstream.RawStreamMsg) error {
		var items []*item
		for _, m := range batch {
			if m.Header.Get(streams.HeaderReplay) == r.ID {
				items = append(items, newItem(m, backfillStage(m.Subject)))
			}
		}
		o.InStream += uint64(len(items))
		if o.Records == nil {
			return nil
		}
		heads, err := r.records.read(ctx, items)
		if err != nil {
			return err
		}
		for i, h := range heads {
			o.Records[h.about(items[i])]++
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if o.InStream < r.Counts.Copied {
		most, err := r.purged(ctx)
		if err != nil {
			return nil, err
		}
		o.Purged = min(r.Counts.Copied-o.InStream, most)
	}
	o.Agrees = o.InStream+o.Purged == r.Counts.Copied
	for stream, count := range map[string]func(*jetstream.RawStreamMsg){
		streams.StreamEnriched: func(m *jetstream.RawStreamMsg) { o.Results[newStep("", m, nil).Status]++ },
		streams.StreamDead:     func(m *jetstream.RawStreamMsg) { o.Dead[m.Header.Get(streams.HeaderDeadReason)]++ },
	} {
		if stream == streams.StreamEnriched && r.LastCopy[streams.StagePrefetcher] == 0 {
			continue
		}
		in, err := findSpan(ctx, r.conn.JS, stream, r.Started.Add(-time.Minute), time.Time{}) // clocks differ
		if err != nil {
			return nil, err
		}
		if err := scan(ctx, r.conn, in, ">", func(m *jetstream.RawStreamMsg) error {
			if m.Header.Get(streams.HeaderReplay) == r.ID {
				count(m)
			}
			return nil
		}); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// purged returns how many copies the janitor may have purged, at most. It
// purges a stage's messages from the oldest on, so what it took lies between
// the stage's first copy and the first message the stage still has.
func (r *feeder) purged(ctx context.Context) (most uint64, err error) {
	s, err := r.conn.JS.Stream(ctx, streams.StreamBackfill)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", streams.StreamBackfill, err)
	}
	// Age takes what is unfinished as well.
	if age := s.CachedInfo().Config.MaxAge; age > 0 && time.Since(r.Started) >= age {
		return 0, nil
	}
	for stage, first := range r.FirstCopies {
		end := r.LastCopy[stage] + 1
		m, err := s.GetMsg(ctx, first, jetstream.WithGetMsgSubject("fp.backfill."+stage+".*"))
		switch {
		case err == nil:
			end = min(end, m.Sequence)
		case !errors.Is(err, jetstream.ErrMsgNotFound): // else it has none any more
			return 0, fmt.Errorf("look for the first copy in %s: %w", streams.StreamBackfill, err)
		}
		most += end - first
	}
	return most, nil
}

// about says what a record is to an event.
func (h *recordHead) about(it *item) string {
	switch {
	case h == nil:
		return "absent"
	case h.subscriber != it.subscriber:
		return "foreign"
	case h.accepted.Before(it.accepted):
		return "earlier"
	}
	return string(h.status)
}

// print writes the report.
func (r *feeder) print(e env) {
	w := e.stdout
	switch {
	case r.DryRun:
		fmt.Fprintf(w, "plan for %s %d to %d; nothing was changed\n", r.Span.Stream, r.Span.From, r.Span.To)
	case !r.Done:
		fmt.Fprintf(w, "%s %s stopped; go on with: streamctl %s --resume %s\n", r.verb(), r.ID, r.verb(), r.ID)
	case r.Waiting != "":
		fmt.Fprintf(w, "%s %s is copied, but not finished: %s;\nlook again with: streamctl %s --resume %s\n", r.verb(), r.ID, r.Waiting, r.verb(), r.ID)
	default:
		fmt.Fprintf(w, "%s %s is done\n", r.verb(), r.ID)
	}
	c := r.Counts
	row := func(what string, n uint64) { fmt.Fprintf(w, "  %-22s %d\n", what, n) }
	row("copied", c.Copied)
	row("of them ready", c.Ready)
	row("past vendor retention", c.PastRetention)
	row("vendor calls", c.VendorCalls)
	row("past record life", c.PastLife)
	row("left out, present", c.Present)
	row("invalid", c.Invalid)
	if r.Redrive {
		row("redriven three times", c.UsedUp)
	}
	if r.records.rdb == nil {
		fmt.Fprintln(w, "  (REDIS_URL is not set: existing records were not looked at)")
	}
	if r.DryRun && r.Seconds > 0 {
		fmt.Fprintf(w, "  %-22s %v at %g/s\n", "takes at least", time.Duration(math.Ceil(r.Seconds))*time.Second, r.Rate)
	}
	if o := r.Outcome; o != nil {
		fmt.Fprintf(w, "what the streams say\n")
		row("copies", o.InStream)
		if o.Purged > 0 {
			row("finished and purged", o.Purged)
		}
		list := func(what string, counts map[string]uint64) {
			var parts []string
			for _, k := range slices.Sorted(maps.Keys(counts)) {
				parts = append(parts, fmt.Sprintf("%d %s", counts[k], k))
			}
			if len(parts) > 0 {
				fmt.Fprintf(w, "  %-22s %s\n", what, strings.Join(parts, ", "))
			}
		}
		list("fetched", o.Results)
		list("dead letters", o.Dead)
		list("records now", o.Records)
	}
}
