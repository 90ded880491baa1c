package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

const (
	// replayBucket keeps the state of replays, one key each.
	replayBucket = "FP_REPLAYS"
	// headerReplaySequence carries the original's sequence on a copy, so that
	// a resumed replay sees how far it had got.
	headerReplaySequence = "Fp-Replay-Sequence"
	// maxOutstanding bounds what waits in FP_BACKFILL, so that a stopped
	// replay soon stops having effects.
	maxOutstanding = 1000
	// cursorEvery is how many copies are made between two looks at the lag
	// and two saves of the cursor.
	cursorEvery = 100
)

// replayCounts is what a replay does with the messages of its span. A plan
// and a run that see the same streams and records have the same counts.
type replayCounts struct {
	// Copied messages went to FP_BACKFILL, or would.
	Copied uint64 `json:"copied"`
	// PastLife ones would make a record that has expired.
	PastLife uint64 `json:"past_record_life"`
	// Present ones have a ready record and --only-missing leaves them out.
	Present uint64 `json:"present"`
	// Ready of the copied ones have a ready record all the same.
	Ready uint64 `json:"already_ready"`
	// Invalid ones are no events or too large to copy.
	Invalid uint64 `json:"invalid"`
	// VendorCalls is how many of the copied ones the vendor is asked about,
	// at least once each.
	VendorCalls uint64 `json:"vendor_calls"`
}

// replayState is a replay: what was asked for, and how far it has got.
type replayState struct {
	ID          string        `json:"id"`
	Stage       string        `json:"stage"`
	Span        span          `json:"span"`
	Subscriber  int64         `json:"subscriber_id,omitempty"`
	RequestID   string        `json:"request_id,omitempty"`
	OnlyMissing bool          `json:"only_missing,omitempty"`
	Force       bool          `json:"force,omitempty"`
	Rate        float64       `json:"rate"`
	RecordTTL   time.Duration `json:"record_ttl_ns"`
	Started     time.Time     `json:"started"`
	Updated     time.Time     `json:"updated"`
	// Next is the first sequence that is not dealt with.
	Next   uint64       `json:"next"`
	Done   bool         `json:"done"`
	DryRun bool         `json:"dry_run,omitempty"`
	Counts replayCounts `json:"counts"`
	// Seconds the copies take at the rate, 0 when it is unlimited.
	Seconds float64 `json:"seconds_at_rate,omitempty"`
}

// replayer runs one replay.
type replayer struct {
	replayState
	conn *streams.Conn
	pub  *streams.Publisher
	rdb  redis.UniversalClient // nil: records cannot be looked at
	kv   jetstream.KeyValue
	rev  uint64
}

func replay(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	var since, until timeFlag
	r := &replayer{}
	fs.StringVar(&r.Stage, "stage", "", "`stage` that sees the events again: prefetcher fetches, persister rewrites records")
	fs.Var(&since, "since", "events stored at or after this `time`")
	fs.Var(&until, "until", "events stored at or before this `time`; else now")
	fromSeq := fs.Uint64("from-seq", 0, "events from this `sequence` on")
	fs.Int64Var(&r.Subscriber, "subscriber", 0, "events of subscriber `N` alone")
	fs.StringVar(&r.RequestID, "request-id", "", "the event of this `id` alone")
	fs.BoolVar(&r.OnlyMissing, "only-missing", false, "leave out events with a ready record; needs REDIS_URL")
	fs.BoolVar(&r.Force, "force", false, "have the vendor asked again although a ready record is there")
	fs.Float64Var(&r.Rate, "rate", 0, "copies per second at most, 0 is unlimited; the vendor's quota holds anyway (default 5 for the prefetcher)")
	fs.DurationVar(&r.RecordTTL, "record-ttl", 24*time.Hour, "life of a record, the persister's RECORD_TTL")
	resume := fs.String("resume", "", "go on with the replay of this `ID`")
	dryRun := fs.Bool("dry-run", false, "print the plan and change nothing")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	switch {
	case *resume != "" && r.Stage != "":
		return 0, usageError{errors.New("--resume knows the stage and the rest by itself")}
	case *resume == "" && r.Stage != streams.StagePrefetcher && r.Stage != streams.StagePersister:
		return 0, usageError{errors.New("--stage is prefetcher or persister")}
	case *resume == "" && since.IsZero() && *fromSeq == 0 && r.RequestID == "":
		return 0, usageError{errors.New("say from where: --since, --from-seq or --request-id")}
	case r.RequestID != "" && !streams.ValidRequestID(r.RequestID):
		return 0, usageError{errors.New("--request-id is no request id")}
	case r.Rate < 0 || r.RecordTTL <= 0 || r.Subscriber < 0:
		return 0, usageError{errors.New("--rate, --record-ttl and --subscriber are not negative")}
	}
	if r.Stage == streams.StagePrefetcher && !given["rate"] {
		r.Rate = 5
	}
	var err error
	if r.rdb, err = e.redis(); err != nil {
		return 0, err
	}
	if r.rdb != nil {
		defer r.rdb.Close()
	} else if r.OnlyMissing {
		return 0, usageError{errors.New("--only-missing needs REDIS_URL")}
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	if r.conn, err = e.connect(connCtx); err != nil {
		return 0, err
	}
	defer r.conn.Close()
	r.pub = streams.NewPublisher(r.conn.JS, prometheus.NewRegistry())

	if *resume != "" {
		err = r.load(ctx, *resume)
	} else {
		err = r.plan(ctx, since.Time, until.Time, *fromSeq)
	}
	if err != nil {
		return 0, err
	}
	if r.DryRun = *dryRun; !r.DryRun && *resume == "" {
		if err := r.create(ctx); err != nil {
			return 0, err
		}
	}
	if !r.DryRun {
		fmt.Fprintf(e.stderr, "replay %s of %s %d to %d\n", r.ID, r.Span.Stream, r.Next, r.Span.To)
	}
	err = r.run(ctx, func() {
		fmt.Fprintf(e.stderr, "at %d of %d, %d copied\n", r.Next, r.Span.To, r.Counts.Copied)
	})
	if err != nil && ctx.Err() == nil {
		return 0, fmt.Errorf("%w; go on with --resume %s", err, r.ID)
	}
	if r.Rate > 0 {
		r.Seconds = float64(r.Counts.Copied) / r.Rate
	}
	code := exitDone
	switch {
	case !r.Done:
		code = exitLeft
	case r.Counts.Copied == 0:
		code = exitNone
	}
	if f.json {
		return code, printJSON(e.stdout, r.replayState)
	}
	r.print(e)
	return code, nil
}

func (r *replayer) print(e env) {
	switch {
	case r.DryRun:
		fmt.Fprintf(e.stdout, "plan for %s %d to %d; nothing was changed\n", r.Span.Stream, r.Span.From, r.Span.To)
	case r.Done:
		fmt.Fprintf(e.stdout, "replay %s is done\n", r.ID)
	default:
		fmt.Fprintf(e.stdout, "replay %s stopped; go on with: streamctl replay --resume %s\n", r.ID, r.ID)
	}
	c := r.Counts
	fmt.Fprintf(e.stdout, "  copied            %d\n  of them ready     %d\n  vendor calls      %d\n  past record life  %d\n  left out, present %d\n  invalid           %d\n",
		c.Copied, c.Ready, c.VendorCalls, c.PastLife, c.Present, c.Invalid)
	if r.rdb == nil {
		fmt.Fprintln(e.stdout, "  (REDIS_URL is not set: existing records were not looked at)")
	}
	if r.Seconds > 0 {
		fmt.Fprintf(e.stdout, "  takes at least    %v at %g/s\n", time.Duration(r.Seconds*float64(time.Second)).Round(time.Second), r.Rate)
	}
}

// plan settles what a new replay reads, once and for all.
func (r *replayer) plan(ctx context.Context, since, until time.Time, fromSeq uint64) error {
	stream := streams.StreamEnriched
	if r.Stage == streams.StagePrefetcher {
		stream = streams.StreamIngest
	}
	var err error
	if r.Span, err = findSpan(ctx, r.conn.JS, stream, since, until); err != nil {
		return err
	}
	r.Span.From = max(r.Span.From, fromSeq)
	r.ID, r.Started, r.Next = strings.ToLower(rand.Text()[:10]), time.Now().UTC(), r.Span.From
	return nil
}

func (r *replayer) create(ctx context.Context) error {
	var err error
	if r.kv, err = r.conn.JS.CreateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket: replayBucket, Description: "state of replays", History: 1, TTL: 30 * 24 * time.Hour, Storage: jetstream.FileStorage,
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
func (r *replayer) save(ctx context.Context) error {
	r.Updated = time.Now().UTC()
	b, err := json.Marshal(r.replayState)
	if err != nil {
		return fmt.Errorf("encode replay %s: %w", r.ID, err)
	}
	rev, err := r.kv.Update(ctx, r.ID, b, r.rev)
	if err != nil {
		return fmt.Errorf("save replay %s: %w", r.ID, err)
	}
	r.rev = rev
	return nil
}

// load reads the state of a replay and moves its cursor past the copies that
// were made after it was saved.
func (r *replayer) load(ctx context.Context, id string) error {
	var err error
	if r.kv, err = r.conn.JS.KeyValue(ctx, replayBucket); err != nil {
		return fmt.Errorf("open bucket %s: %w", replayBucket, err)
	}
	entry, err := r.kv.Get(ctx, id)
	if err != nil {
		return fmt.Errorf("read replay %s: %w", id, err)
	}
	if err := json.Unmarshal(entry.Value(), &r.replayState); err != nil {
		return fmt.Errorf("read replay %s: %w", id, err)
	}
	r.rev = entry.Revision()
	return nil
}

// made returns the sequences of the originals that were copied since the
// state was saved. The dedupe window forgets; the stream does not.
func (r *replayer) made(ctx context.Context) (map[uint64]bool, error) {
	in, err := findSpan(ctx, r.conn.JS, streams.StreamBackfill, r.Updated.Add(-time.Minute), time.Time{}) // clocks differ
	if err != nil {
		return nil, err
	}
	seqs := map[uint64]bool{}
	err = scan(ctx, r.conn, in, "fp.backfill."+r.Stage+".*", func(m *jetstream.RawStreamMsg) error {
		if m.Header.Get(streams.HeaderReplay) == r.ID {
			if n, err := strconv.ParseUint(m.Header.Get(headerReplaySequence), 10, 64); err == nil {
				seqs[n] = true
			}
		}
		return nil
	})
	return seqs, err
}

// run deals with what is left of the span. It returns nil with Done unset
// when ctx is done.
func (r *replayer) run(ctx context.Context, progress func()) error {
	var made map[uint64]bool
	if !r.DryRun {
		var err error
		if made, err = r.made(ctx); err != nil {
			return err
		}
	}
	source := "fp.enriched." + subscriberToken(r.Subscriber)
	if r.Stage == streams.StagePrefetcher {
		source = "fp.ingest." + subscriberToken(r.Subscriber)
	}
	start, n := time.Now(), 0
	err := scan(ctx, r.conn, span{r.Span.Stream, r.Next, r.Span.To}, source, func(m *jetstream.RawStreamMsg) error {
		copied := r.Counts.Copied
		if err := r.one(ctx, m, made[m.Sequence]); err != nil {
			return err
		}
		r.Next = m.Sequence + 1
		if r.DryRun || r.Counts.Copied == copied {
			return ctx.Err() //nolint:wrapcheck // judged by run
		}
		if n++; n%cursorEvery == 0 {
			progress()
			if err := r.save(ctx); err != nil {
				return err
			}
			if err := r.makeWay(ctx); err != nil {
				return err
			}
		}
		if r.Rate > 0 {
			return wait(ctx, time.Until(start.Add(time.Duration(float64(n)/r.Rate*float64(time.Second)))))
		}
		return ctx.Err() //nolint:wrapcheck // judged by run
	})
	if err == nil {
		r.Done, r.Next = true, r.Span.To+1
	}
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

// one counts a message and copies it unless it has been.
func (r *replayer) one(ctx context.Context, m *jetstream.RawStreamMsg, made bool) error {
	id := requestID(m.Data)
	if r.RequestID != "" && id != r.RequestID {
		return nil
	}
	if id == "" {
		r.Counts.Invalid++
		return nil
	}
	accepted := newStep(r.Span.Stream, m, nil).AcceptedAt
	if r.Started.Sub(accepted) >= r.RecordTTL {
		r.Counts.PastLife++
		return nil
	}
	ready, err := r.isReady(ctx, id)
	if err != nil {
		return err
	}
	if ready && r.OnlyMissing && !made {
		r.Counts.Present++
		return nil
	}
	if !made && !r.DryRun {
		err := r.copy(ctx, m, accepted)
		if errors.Is(err, streams.ErrTooLarge) {
			r.Counts.Invalid++
			return nil
		}
		if err != nil {
			return err
		}
	}
	r.Counts.Copied++
	if ready {
		r.Counts.Ready++
	}
	if r.Stage == streams.StagePrefetcher && (!ready || r.Force) {
		r.Counts.VendorCalls++
	}
	return nil
}

func (r *replayer) isReady(ctx context.Context, id string) (bool, error) {
	if r.rdb == nil {
		return false, nil
	}
	b, err := r.rdb.Get(ctx, record.Key(id)).Bytes()
	if errors.Is(err, redis.Nil) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at a record: %w", err)
	}
	rec, err := record.Decode(b)
	return err == nil && rec.Status == record.Ready, nil
}

// copy stores the copy. Its message id is made of the replay and the
// original's sequence: a repeat is absorbed, and no earlier copy swallows it.
func (r *replayer) copy(ctx context.Context, m *jetstream.RawStreamMsg, accepted time.Time) error {
	seq := strconv.FormatUint(m.Sequence, 10)
	h := nats.Header{
		streams.HeaderReplay: {r.ID}, headerReplaySequence: {seq},
		streams.HeaderAcceptedAt: {accepted.UTC().Format(time.RFC3339Nano)},
	}
	if r.Force && r.Stage == streams.StagePrefetcher {
		h.Set(streams.HeaderForce, "1")
	}
	for {
		_, err := r.pub.Publish(ctx, streams.Message{
			Stream: streams.StreamBackfill, Subject: streams.BackfillSubject(r.Stage, streams.SubjectSubscriber(m.Subject)),
			ID: "replay:" + r.ID + ":" + seq, Header: h, Body: m.Data, TraceParent: m.Header.Get(streams.HeaderTraceParent),
		})
		if err == nil || errors.Is(err, streams.ErrTooLarge) || errors.Is(err, streams.ErrRefused) {
			return err //nolint:wrapcheck // says what it did
		}
		if wait(ctx, time.Second) != nil {
			return err //nolint:wrapcheck // says what it did
		}
	}
}

// makeWay waits until the stage has room for the next copies.
func (r *replayer) makeWay(ctx context.Context) error {
	for {
		lag, err := streams.ReadLag(ctx, r.conn.JS, streams.StreamBackfill, r.Stage+"-backfill")
		if err != nil {
			return err //nolint:wrapcheck // says what it did
		}
		if lag.Messages()+cursorEvery <= maxOutstanding {
			return nil
		}
		if err := wait(ctx, 100*time.Millisecond); err != nil {
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
