package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// step is one place where an event was found.
type step struct {
	Stream   string    `json:"stream"`
	Sequence uint64    `json:"sequence"`
	Stored   time.Time `json:"stored"`
	Status   string    `json:"status,omitempty"`
	Reason   string    `json:"reason,omitempty"`
	Attempts int       `json:"attempts,omitempty"`
	Replay   string    `json:"replay,omitempty"`
	// Stage the copy on FP_BACKFILL is for.
	Stage string `json:"stage,omitempty"`
	// AcceptedAt is when FP_INGEST stored the original.
	AcceptedAt time.Time `json:"accepted_at"`
	// Waits is set when the stage has not finished the message.
	Waits bool `json:"waits,omitempty"`
}

// traceReport says where an event is. Place is closed: not_found_anywhere, erased,
// waiting, dead, expired, finished (no record could be looked up or none is there), or
// the status of its record.
type traceReport struct {
	RequestID string `json:"request_id"`
	Place     string `json:"place"`
	Why       string `json:"why"`
	// Since is how far back the streams were looked at. WholeDead is set when
	// FP_DEAD, which keeps longest, was looked at from its beginning instead.
	Since      time.Time `json:"since"`
	WholeDead  bool      `json:"whole_dead,omitempty"`
	Steps      []step    `json:"steps"`
	TTLSeconds float64   `json:"ttl_seconds,omitempty"`
}

// from returns how far back a stream is looked at, zero for all of it.
func (r *traceReport) from(stream string) time.Time {
	if r.WholeDead && stream == streams.StreamDead {
		return time.Time{}
	}
	return r.Since
}

// newTrace settles how far back the streams are looked at for an event; a zero
// since is one that was not given.
func newTrace(id string, since time.Time) traceReport {
	r := traceReport{RequestID: id, Since: since, Steps: []step{}}
	if !since.IsZero() {
		return r
	}
	if t, ok := idTime(id); ok {
		r.Since = t.Add(-time.Minute) // clocks differ
	} else {
		// What the other streams keep. An event that was given up is there for
		// longer.
		r.Since, r.WholeDead = time.Now().Add(-72*time.Hour), true
	}
	return r
}

// idTime returns when the vendor made an id such as 1708102555327.NLOjmg, by
// the prefetcher's rule.
func idTime(id string) (time.Time, bool) {
	ms, rest, _ := strings.Cut(id, ".")
	n, err := strconv.ParseUint(ms, 10, 63)
	t := time.UnixMilli(int64(n))
	return t, err == nil && len(ms) == 13 && len(rest) == 6 && !strings.ContainsAny(rest, "._-") && t.Before(time.Now())
}

func trace(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	var since timeFlag
	ttl := fs.Duration("record-ttl", 0, "life of a record, instead of RECORD_TTL")
	fs.Var(&since, "since", "look from this `time` on; else from the id's own, else 72h back and at all of FP_DEAD")
	words, err := parseMixed(fs, args, 1)
	if err != nil {
		return 0, err
	}
	if len(words) != 1 || !streams.ValidRequestID(words[0]) {
		return 0, usageError{errors.New("want one request id")}
	}
	r := newTrace(words[0], since.Time)
	limits, err := e.limits(*ttl)
	if err != nil {
		return 0, err
	}
	rdb, err := e.redis()
	if err != nil {
		return 0, err
	}
	if rdb != nil {
		defer rdb.Close()
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := r.read(ctx, conn, rdb, limits.RecordTTL); err != nil {
		return 0, err
	}
	code := exitDone
	if r.Place == "not_found_anywhere" {
		code = exitNone
	}
	if f.json {
		return code, printJSON(e.stdout, r)
	}
	t := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	for _, s := range r.Steps {
		fmt.Fprintf(t, "%s\t%s\t%d\t%s %s\n", s.Stored.UTC().Format(time.RFC3339), s.Stream, s.Sequence, s.Status, s.Reason)
	}
	t.Flush()
	looked := "looked from " + r.Since.UTC().Format(time.RFC3339) + " on"
	if r.WholeDead {
		looked += ", and at all of " + streams.StreamDead
	}
	fmt.Fprintf(e.stdout, "%s: %s\n(%s)\n", r.Place, r.Why, looked)
	return code, nil
}

// durableOf returns the durable that finishes a message, "" for none.
func durableOf(stream, subject string) string {
	switch {
	case stream == streams.StreamIngest:
		return streams.DurablePrefetcher
	case stream == streams.StreamEnriched:
		return streams.DurablePersister
	case strings.HasPrefix(subject, "fp.backfill."+streams.StagePrefetcher+"."):
		return streams.DurablePrefetcherBackfill
	case stream == streams.StreamBackfill:
		return streams.DurablePersisterBackfill
	}
	return ""
}

// read looks for an event everywhere: records in Redis first in the
// verdict, since they are what the scorer sees.
func (r *traceReport) read(ctx context.Context, conn *streams.Conn, rdb redis.UniversalClient, ttl time.Duration) error {
	id := r.RequestID
	floors := map[string]uint64{}
	for _, d := range streams.Definition(streams.Limits{}) {
		if d.Stream.Name == streams.StreamAudit {
			continue
		}
		for _, c := range d.Durables {
			consumer, err := conn.JS.Consumer(ctx, d.Stream.Name, c.Durable)
			if err != nil {
				return fmt.Errorf("look up durable %s of %s: %w", c.Durable, d.Stream.Name, err)
			}
			floors[c.Durable] = consumer.CachedInfo().AckFloor.Stream
		}
		in, err := findSpan(ctx, conn.JS, d.Stream.Name, r.from(d.Stream.Name), time.Time{})
		if err != nil {
			return err
		}
		err = scan(ctx, conn, in, ">", func(m *jetstream.RawStreamMsg) error {
			if !bytes.Contains(m.Data, []byte(id)) || requestID(m.Data) != id {
				return nil
			}
			r.Steps = append(r.Steps, newStep(d.Stream.Name, m, floors))
			return nil
		})
		if err != nil {
			return err
		}
	}
	r.Place, r.Why = r.verdict(ttl)
	if len(r.Steps) == 0 {
		at, err := erasedAt(ctx, conn, id)
		if err != nil {
			return err
		}
		if !at.IsZero() {
			r.Place, r.Why = "erased", fmt.Sprintf("by an operator, %s; see streamctl audit", at.UTC().Format(time.RFC3339))
		}
	}
	if rdb == nil {
		if r.Place == "finished" {
			r.Why += "; set REDIS_URL to look at the record"
		}
		return nil
	}
	pipe := rdb.Pipeline()
	get, left := pipe.Get(ctx, record.Key(id)), pipe.PTTL(ctx, record.Key(id))
	if _, err := pipe.Exec(ctx); err != nil && !errors.Is(err, redis.Nil) {
		return fmt.Errorf("read the record: %w", err)
	}
	if body, err := get.Bytes(); err == nil {
		rec, err := record.Decode(body)
		if err != nil {
			return fmt.Errorf("read the record: %w", err)
		}
		r.TTLSeconds = left.Val().Seconds()
		if rec.Status != record.Pending || len(r.Steps) == 0 {
			r.Place = string(rec.Status)
			r.Why = fmt.Sprintf("its record is there, accepted %s, %v left", rec.AcceptedAt, left.Val().Round(time.Second))
		}
	}
	return nil
}

func newStep(stream string, m *jetstream.RawStreamMsg, floors map[string]uint64) step {
	s := step{Stream: stream, Sequence: m.Sequence, Stored: m.Time, AcceptedAt: m.Time, Replay: m.Header.Get(streams.HeaderReplay)}
	if t, err := time.Parse(time.RFC3339Nano, m.Header.Get(streams.HeaderAcceptedAt)); err == nil {
		s.AcceptedAt = t
	}
	var body struct {
		Status   string    `json:"status"`
		Reason   string    `json:"reason"`
		Attempts int       `json:"attempts"`
		Accepted time.Time `json:"accepted_at"`
	}
	if json.Unmarshal(m.Data, &body) == nil {
		s.Status, s.Reason, s.Attempts = body.Status, body.Reason, body.Attempts
		if !body.Accepted.IsZero() {
			s.AcceptedAt = body.Accepted
		}
	}
	if stream == streams.StreamDead {
		s.Status, s.Reason = "dead", m.Header.Get(streams.HeaderDeadReason)
	}
	if durable := durableOf(stream, m.Subject); durable != "" {
		s.Stage = strings.TrimSuffix(durable, "-backfill")
		s.Waits = m.Sequence > floors[durable]
	}
	return s
}

// verdict judges by the streams alone. What was stored last counts: a stage
// acks out of order, so an older message above its floor may be finished.
func (r *traceReport) verdict(ttl time.Duration) (place, why string) {
	if len(r.Steps) == 0 {
		return "not_found_anywhere", "in no stream: never accepted, or older than the streams keep"
	}
	last := r.Steps[0]
	for _, s := range r.Steps {
		if !s.Stored.Before(last.Stored) {
			last = s
		}
	}
	switch {
	case last.Stream == streams.StreamDead:
		return "dead", fmt.Sprintf("given up: %s; streamctl dead show %d", last.Reason, last.Sequence)
	case last.Waits:
		return "waiting", fmt.Sprintf("for the %s, since %s", last.Stage, last.Stored.UTC().Format(time.RFC3339))
	case time.Since(last.AcceptedAt) > ttl:
		return "expired", fmt.Sprintf("its record's life of %v is over", ttl)
	}
	return "finished", fmt.Sprintf("the %s is done with it", last.Stage)
}
