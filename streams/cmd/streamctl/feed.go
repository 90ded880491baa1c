package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
)

const (
	// replayBucket keeps the state of replays and redrives, one key each.
	replayBucket = "FP_REPLAYS"
	// headerReplaySequence carries the original's sequence on a copy, so that
	// a resumed replay sees how far it had got.
	headerReplaySequence = "Fp-Replay-Sequence"
	// headerReplayReady is "1" on a copy of an event that had its record when
	// it was copied: a resumed replay counts what was true then.
	headerReplayReady = "Fp-Replay-Ready"
	// headerRedrives counts on a copy how often its event was redriven for
	// this stage; a dead letter has the headers of what it was made of.
	headerRedrives = "Fp-Redrives"
	// maxRedrives is how often a message is redriven: what fails a fourth
	// time wants another remedy.
	maxRedrives = 3
	// The cursor is saved after this many copies or this long.
	saveCopies = 100
	savePeriod = 5 * time.Second
	// burstPeriod is how far apart the bursts of copies are.
	burstPeriod = 40 * time.Millisecond
)

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
	// LastCopy that of the last one for each stage.
	FirstCopy uint64            `json:"first_copy,omitempty"`
	LastCopy  map[string]uint64 `json:"last_copy,omitempty"`
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

// publisher stores a message and returns once the stream has it.
type publisher interface {
	Publish(ctx context.Context, m streams.Message) (streams.Ack, error)
}

// feeder runs one replay or redrive.
type feeder struct {
	feedState
	conn    *streams.Conn
	pub     publisher
	records *records
	dead    jetstream.Stream // of a redrive
	kv      jetstream.KeyValue
	rev     uint64
	// replaced dead letters are deleted once the cursor is past them.
	replaced []uint64
}

// prepare opens what a run needs and settles what it reads, once and for all;
// resume names a run to go on with.
func (r *feeder) prepare(ctx context.Context, conn *streams.Conn, resume string, since, until time.Time, fromSeq uint64) error {
	r.conn, r.pub = conn, streams.NewPublisher(conn.JS, prometheus.NewRegistry())
	if resume != "" {
		if err := r.load(ctx, resume); err != nil {
			return err
		}
	} else {
		var err error
		if r.Span, err = findSpan(ctx, conn.JS, r.source(), since, until); err != nil {
			return err
		}
		r.Span.From = max(r.Span.From, fromSeq)
		r.ID, r.Started, r.Next = strings.ToLower(rand.Text()[:10]), time.Now().UTC(), r.Span.From
		if !r.DryRun {
			if err := r.create(ctx); err != nil {
				return err
			}
		}
	}
	if r.Redrive {
		var err error
		if r.dead, err = conn.JS.Stream(ctx, streams.StreamDead); err != nil {
			return fmt.Errorf("look up stream %s: %w", streams.StreamDead, err)
		}
	}
	return nil
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
	s.LastCopy[stage] = max(s.LastCopy[stage], sequence)
}

// run deals with what is left of the span. It returns nil with Done unset
// when ctx is done.
func (r *feeder) run(ctx context.Context, p *progress) error {
	var made map[uint64]bool
	if !r.DryRun {
		var err error
		if made, err = r.made(ctx); err != nil {
			return err
		}
		if r.Redrive { // killed between a save and what follows it
			for seq := range made {
				if seq < r.Next {
					r.replaced = append(r.replaced, seq)
				}
			}
		}
	}
	p.begin(r.Next, r.Span.To+1)
	start, saved, savedAt, n := time.Now(), time.Now(), 0, 0
	room := newRoom(time.Now())
	// A batch is looked at as a whole, so at a low rate it is a small one.
	size := batchSize
	if r.Rate > 0 && !r.DryRun {
		size = max(1, min(size, int(r.Rate)))
	}
	err := scanBatches(ctx, r.conn, span{r.Span.Stream, r.Next, r.Span.To}, r.subject(r.source()), size, func(batch []*jetstream.RawStreamMsg) error {
		items := r.items(batch)
		if err := r.records.look(ctx, items); err != nil {
			return err
		}
		// Without a rate as many copies are made at once as the stages have
		// room for, with one in small bursts: these cost everybody less than as
		// many single ones, and between them live events have the stages to
		// themselves.
		step := batchSize
		if r.Rate > 0 && !r.DryRun {
			step = max(1, min(int(r.Rate*burstPeriod.Seconds()), batchSize))
		}
		for len(items) > 0 {
			part := items
			if !r.DryRun {
				part = items[:min(step, room.left, len(items))]
			}
			items = items[len(part):]
			copied := r.Counts.Copied
			if err := r.part(ctx, part, made); err != nil {
				return err
			}
			r.Next = part[len(part)-1].Sequence + 1
			p.show(r.Next, fmt.Sprintf("%d copied", r.Counts.Copied))
			if r.DryRun || r.Counts.Copied == copied {
				continue
			}
			n += int(r.Counts.Copied - copied)
			room.left -= int(r.Counts.Copied - copied)
			if n-savedAt >= saveCopies || time.Since(saved) > savePeriod {
				if err := r.save(ctx); err != nil {
					return err
				}
				saved, savedAt = time.Now(), n
			}
			if room.left <= 0 {
				if err := r.makeWay(ctx, p, room, n); err != nil {
					return err
				}
			}
			if r.Rate > 0 {
				if err := wait(ctx, time.Until(start.Add(time.Duration(float64(n)/r.Rate*float64(time.Second))))); err != nil {
					return err
				}
			}
		}
		return ctx.Err() //nolint:wrapcheck // judged by the caller
	})
	if err == nil {
		r.Done, r.Next = true, r.Span.To+1
	}
	p.end()
	if r.DryRun {
		return err
	}
	// Also when ctx is done: the cursor is what --resume goes on from.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if saveErr := r.save(last); saveErr != nil {
		return errors.Join(err, saveErr)
	}
	return err
}

// item is a message that is selected.
type item struct {
	*jetstream.RawStreamMsg
	id         string // empty for what is no event
	stage      string
	subscriber int64
	accepted   time.Time
	record     *recordHead // what is in Redis; nil when nothing is
	ready      bool        // it has its record, or had when it was copied
	made       bool        // it has been copied
}

// key names the event among those of all subscribers.
func (it item) key() string { return strconv.FormatInt(it.subscriber, 10) + "/" + it.id }

// redrives is how often the event was redriven for this stage.
func (it *item) redrives() int {
	n, _ := strconv.Atoi(it.Header.Get(headerRedrives)) // absent is none
	return n
}

func newItem(m *jetstream.RawStreamMsg, stage string) *item {
	return &item{
		RawStreamMsg: m, id: requestID(m.Data), stage: stage,
		subscriber: streams.SubjectSubscriber(m.Subject), accepted: newStep("", m, nil).AcceptedAt,
	}
}

// items returns the messages of a batch that the selection is about.
func (r *feeder) items(batch []*jetstream.RawStreamMsg) []*item {
	var items []*item
	for _, m := range batch {
		stage := r.Stage
		if r.Redrive {
			stage = backfillStage(m.Subject)
		}
		if r.matches(m) {
			items = append(items, newItem(m, stage))
		}
	}
	return items
}

// part counts some messages and copies those that are to be and have not been.
// It counts all of them or none: what a part that failed has copied, the next
// run finds.
func (r *feeder) part(ctx context.Context, items []*item, made map[uint64]bool) error {
	counts := r.Counts
	var wanted []*item
	for _, it := range items {
		it.ready = it.record.readyFor(it)
		if ready, ok := made[it.Sequence]; ok {
			it.made, it.ready = true, ready
		}
		if r.wants(&counts, it) {
			wanted = append(wanted, it)
		}
	}
	sequences, errs := make([]uint64, len(wanted)), make([]error, len(wanted))
	var wg sync.WaitGroup
	for i, it := range wanted {
		if it.made || r.DryRun {
			continue
		}
		wg.Go(func() { sequences[i], errs[i] = r.copy(ctx, it) })
	}
	wg.Wait()
	for i, it := range wanted {
		switch {
		case errors.Is(errs[i], streams.ErrTooLarge):
			counts.Invalid++
			continue
		case errs[i] != nil:
			return errs[i]
		case sequences[i] != 0:
			r.copied(it.stage, sequences[i])
		}
		r.count(&counts, it)
	}
	r.Counts = counts
	if r.Redrive && !r.DryRun {
		for i, it := range wanted {
			if errs[i] == nil {
				r.replaced = append(r.replaced, it.Sequence)
			}
		}
	}
	return ctx.Err() //nolint:wrapcheck // judged by the caller
}

// wants reports whether a message is to be copied, and counts why not.
func (r *feeder) wants(c *feedCounts, it *item) bool {
	switch {
	case it.id == "" && !r.Redrive: // a dead letter may be an event to a newer stage
		c.Invalid++
	case r.Started.Sub(it.accepted) >= r.Limits.life(it.stage):
		c.PastLife++
	case it.made:
		return true
	case r.Redrive && it.redrives() >= maxRedrives:
		c.UsedUp++
	case r.OnlyMissing && it.ready:
		c.Present++
	default:
		return true
	}
	return false
}

// count counts a message that is copied.
func (r *feeder) count(c *feedCounts, it *item) {
	c.Copied++
	if it.ready {
		c.Ready++
	}
	if it.stage != streams.StagePrefetcher || it.ready && !r.Force {
		return
	}
	if t, ok := idTime(it.id); ok && r.Limits.Retention > 0 && r.Started.Sub(t) > r.Limits.Retention {
		c.PastRetention++
	} else {
		c.VendorCalls++
	}
}

// copy stores the copy. Its message id is made of the replay and the
// original's sequence: a repeat is absorbed, and no earlier copy swallows it.
func (r *feeder) copy(ctx context.Context, it *item) (sequence uint64, err error) {
	seq := strconv.FormatUint(it.Sequence, 10)
	h := nats.Header{
		streams.HeaderReplay: {r.ID}, headerReplaySequence: {seq},
		streams.HeaderAcceptedAt: {it.accepted.UTC().Format(time.RFC3339Nano)},
	}
	if r.Force && it.stage == streams.StagePrefetcher {
		h.Set(streams.HeaderForce, "1")
	}
	if it.ready {
		h.Set(headerReplayReady, "1")
	}
	if r.Redrive {
		h.Set(headerRedrives, strconv.Itoa(it.redrives()+1))
	}
	for {
		ack, err := r.pub.Publish(ctx, streams.Message{
			Stream: streams.StreamBackfill, Subject: streams.BackfillSubject(it.stage, it.subscriber),
			ID: "replay:" + r.ID + ":" + seq, Header: h, Body: it.Data, TraceParent: it.Header.Get(streams.HeaderTraceParent),
		})
		if err == nil {
			return ack.Sequence, nil
		}
		if errors.Is(err, streams.ErrTooLarge) || errors.Is(err, streams.ErrRefused) {
			return 0, err //nolint:wrapcheck // says what it did
		}
		if wait(ctx, time.Second) != nil {
			return 0, err //nolint:wrapcheck // says what it did
		}
	}
}

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

// wait returns after d, or with an error when ctx is done.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(max(d, 0))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx) //nolint:wrapcheck // judged by the caller
	case <-t.C:
		return nil
	}
}
