package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// replayBucket keeps the state of replays and redrives, one key each.
const replayBucket = "FP_REPLAYS"

// feedCounts is what a replay or redrive does with the messages of its span.
// A plan and a run that see the same streams and records have the same counts.
type feedCounts struct {
	// Copied messages went to FP_BACKFILL, or would.
	Copied uint64 `json:"copied"`
	// PastLife ones are too old for their stage: the record has expired, or
	// the prefetcher would give them up.
	PastLife uint64 `json:"past_record_life"`
	// Present ones have a ready record and --only-missing leaves them out.
	Present uint64 `json:"present"`
	// Ready of the copied ones have a ready record all the same.
	Ready uint64 `json:"already_ready"`
	// Invalid ones are no events or too large to copy.
	Invalid uint64 `json:"invalid"`
	// UsedUp ones have been redriven three times.
	UsedUp uint64 `json:"redriven_three_times,omitempty"`
	// PastRetention of the copied ones have an id that the vendor has
	// forgotten: they become not_found without a call.
	PastRetention uint64 `json:"past_vendor_retention"`
	// VendorCalls is how many of the copied ones the vendor is asked about,
	// at least once each.
	VendorCalls uint64 `json:"vendor_calls"`
}

// feedState is a replay or a redrive: what was asked for, and how far it got.
type feedState struct {
	ID string `json:"id"`
	// Redrive: the span is one of dead letters, which a copy replaces.
	Redrive bool `json:"redrive,omitempty"`
	selection
	Span        span      `json:"span"`
	OnlyMissing bool      `json:"only_missing,omitempty"`
	Force       bool      `json:"force,omitempty"`
	Rate        float64   `json:"rate"`
	Limits      limits    `json:"limits"`
	Started     time.Time `json:"started"`
	Updated     time.Time `json:"updated"`
	// Next is the first sequence that is not dealt with.
	Next uint64 `json:"next"`
	// Done: all copies are made. Settled: the stages have finished them.
	Done    bool       `json:"done"`
	Settled bool       `json:"settled"`
	DryRun  bool       `json:"dry_run,omitempty"`
	Counts  feedCounts `json:"counts"`
	// FirstCopy is the sequence of the first copy on FP_BACKFILL, and
	// FirstCopies and LastCopy those of the first and the last one for each
	// stage.
	FirstCopy   uint64            `json:"first_copy,omitempty"`
	FirstCopies map[string]uint64 `json:"first_copies,omitempty"`
	LastCopy    map[string]uint64 `json:"last_copy,omitempty"`
	// Seconds the copies take at the rate, 0 when it is unlimited.
	Seconds float64 `json:"seconds_at_rate,omitempty"`
	// Waiting says why the stages have not finished.
	Waiting string `json:"waiting,omitempty"`
	// Outcome is there once the stages have finished.
	Outcome *outcome `json:"outcome,omitempty"`
}

// verb is the command line's word for it.
func (s *feedState) verb() string {
	if s.Redrive {
		return "dead redrive"
	}
	return "replay"
}

// limits are the services' settings that decide what a copy can still do.
type limits struct {
	// RecordTTL and MaxAge are RECORD_TTL and PREFETCH_MAX_AGE.
	RecordTTL time.Duration `json:"record_ttl_ns"`
	MaxAge    time.Duration `json:"prefetch_max_age_ns"`
	// Retention is FINGERPRINT_RETENTION, 0 for ever.
	Retention time.Duration `json:"vendor_retention_ns"`
}

// life is the age at which a stage can make nothing of an event any more.
func (l limits) life(stage string) time.Duration {
	if stage == streams.StagePrefetcher {
		return min(l.RecordTTL, l.MaxAge)
	}
	return l.RecordTTL
}

// source is the stream that is read.
func (s *feedState) source() string {
	switch {
	case s.Redrive:
		return streams.StreamDead
	case s.Stage == streams.StagePrefetcher:
		return streams.StreamIngest
	}
	return streams.StreamEnriched
}

func (r *feeder) create(ctx context.Context) error {
	backfill, err := r.conn.JS.Stream(ctx, streams.StreamBackfill)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", streams.StreamBackfill, err)
	}
	if r.kv, err = r.conn.JS.CreateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: replayBucket, Description: "state of replays", History: 1, TTL: 30 * 24 * time.Hour, Storage: jetstream.FileStorage,
		Replicas: backfill.CachedInfo().Config.Replicas, // as safe as what it is about
	}); err != nil && !errors.Is(err, jetstream.ErrBucketExists) {
		return fmt.Errorf("create bucket %s: %w", replayBucket, err)
	}
	if r.kv == nil {
		if r.kv, err = r.conn.JS.KeyValue(ctx, replayBucket); err != nil {
			return fmt.Errorf("open bucket %s: %w", replayBucket, err)
		}
	}
	return r.save(ctx)
}

// save writes the state unless another process has: two that go on with one
// replay would both count.
func (r *feeder) save(ctx context.Context) error {
	r.Updated = time.Now().UTC()
	b, err := json.Marshal(r.feedState)
	if err != nil {
		return fmt.Errorf("encode replay %s: %w", r.ID, err)
	}
	var taken error // the end of it at once
	err = keepTrying(ctx, func() error {
		rev, err := r.kv.Update(ctx, r.ID, b, r.rev)
		if err == nil {
			r.rev = rev
			return nil
		}
		// It may have been stored all the same: by an earlier try, or by this
		// one if only the answer got lost.
		entry, getErr := r.kv.Get(ctx, r.ID)
		switch {
		case getErr == nil && bytes.Equal(entry.Value(), b):
			r.rev = entry.Revision()
			return nil
		case getErr == nil && entry.Revision() != r.rev:
			taken = fmt.Errorf("save replay %s: another process goes on with it", r.ID)
			return nil
		}
		return fmt.Errorf("save replay %s: %w", r.ID, err)
	})
	if err = cmp.Or(err, taken); err != nil {
		return err
	}
	return keepTrying(ctx, func() error { return r.deleteReplaced(ctx) })
}

// deleteReplaced deletes dead letters of which there are copies. A letter is
// deleted after the cursor has passed it, so that a resumed redrive does not
// miss it in its counts.
func (r *feeder) deleteReplaced(ctx context.Context) error {
	for _, seq := range r.replaced {
		if _, err := deleteMessage(ctx, r.dead, seq, r.dead.DeleteMsg); err != nil {
			return err
		}
	}
	r.replaced = r.replaced[:0]
	return nil
}

// load reads the state of a replay.
func (r *feeder) load(ctx context.Context, id string) error {
	var err error
	if r.kv, err = r.conn.JS.KeyValue(ctx, replayBucket); err != nil {
		return fmt.Errorf("open bucket %s: %w", replayBucket, err)
	}
	entry, err := r.kv.Get(ctx, id)
	if err != nil {
		return fmt.Errorf("read replay %s: %w", id, err)
	}
	redrive := r.Redrive
	if err := json.Unmarshal(entry.Value(), &r.feedState); err != nil {
		return fmt.Errorf("read replay %s: %w", id, err)
	}
	if r.Redrive != redrive {
		return usageError{fmt.Errorf("%s is a run of: streamctl %s", id, r.verb())}
	}
	r.rev = entry.Revision()
	return nil
}

// made returns the sequences of the originals that were copied since the state
// was saved, or shortly before, and whether they had their record then. The
// dedupe window forgets; the stream does not.
func (r *feeder) made(ctx context.Context) (map[uint64]bool, error) {
	in, err := findSpan(ctx, r.conn.JS, streams.StreamBackfill, r.Updated.Add(-time.Minute), time.Time{}) // clocks differ
	if err != nil {
		return nil, err
	}
	seqs := map[uint64]bool{}
	err = scan(ctx, r.conn, in, r.backfillSubject(), func(m *jetstream.RawStreamMsg) error {
		if m.Header.Get(streams.HeaderReplay) != r.ID {
			return nil
		}
		if n, err := strconv.ParseUint(m.Header.Get(headerReplaySequence), 10, 64); err == nil {
			seqs[n] = m.Header.Get(headerReplayReady) == "1"
			r.copied(backfillStage(m.Subject), m.Sequence)
		}
		return nil
	})
	return seqs, err
}

// backfillSubject matches every copy that a run may have made.
func (s *feedState) backfillSubject() string {
	if s.Stage == "" {
		return "fp.backfill.*.*"
	}
	return "fp.backfill." + s.Stage + ".*"
}

// backfillStage returns the stage a subject of FP_BACKFILL or FP_DEAD names.
func backfillStage(subject string) string {
	tokens := strings.Split(subject, ".")
	if len(tokens) != 4 {
		return ""
	}
	return tokens[2]
}

// copied notes where a copy is.
func (s *feedState) copied(stage string, sequence uint64) {
	if s.FirstCopy == 0 || sequence < s.FirstCopy {
		s.FirstCopy = sequence
	}
	if s.LastCopy == nil {
		s.LastCopy = map[string]uint64{}
	}
	if s.FirstCopies == nil {
		s.FirstCopies = map[string]uint64{}
	}
	if first := s.FirstCopies[stage]; first == 0 || sequence < first {
		s.FirstCopies[stage] = sequence
	}
	s.LastCopy[stage] = max(s.LastCopy[stage], sequence)
}
