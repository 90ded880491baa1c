package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// feedFlags are those of replay and of dead redrive.
type feedFlags struct {
	commonFlags
	feeder
	since, until timeFlag
	fromSeq      uint64
	resume       string
	noWait       bool
	recordTTL    time.Duration
	fs           *flag.FlagSet
}

// The default rates: for the prefetcher the vendor's own limit, five calls per
// second; for the persister one that leaves the servers to live traffic.
const (
	defaultRate          = 5
	defaultPersisterRate = 500
)

func (f *feedFlags) declare(fs *flag.FlagSet) {
	f.fs = fs
	f.commonFlags.declare(fs)
	f.selection.declare(fs)
	fs.Var(&f.since, "since", "those stored at or after this `time`")
	fs.Var(&f.until, "until", "those stored at or before this `time`; else now")
	fs.Uint64Var(&f.fromSeq, "from-seq", 0, "those from this `sequence` on")
	fs.BoolVar(&f.OnlyMissing, "only-missing", false, "leave out events with a ready record; needs REDIS_URL")
	fs.BoolVar(&f.Force, "force", false, "have the vendor asked again although a ready record is there")
	fs.Float64Var(&f.Rate, "rate", 0, "copies per second at most, 0 is unlimited; the vendor's quota holds anyway (5 unless all are for the persister, then 500)")
	fs.DurationVar(&f.recordTTL, "record-ttl", 0, "life of a record, instead of RECORD_TTL")
	fs.StringVar(&f.resume, "resume", "", "go on with the run of this `ID`")
	fs.BoolVar(&f.DryRun, "dry-run", false, "print the plan and change nothing")
	fs.BoolVar(&f.noWait, "no-wait", false, "return when everything is copied, before the stages have finished it")
}

// given reports whether the command line has a flag.
func (f *feedFlags) given(name string) bool {
	found := false
	f.fs.Visit(func(f *flag.Flag) { found = found || f.Name == name })
	return found
}

// check looks at what both verbs share.
func (f *feedFlags) check() error {
	if f.resume != "" {
		var other error
		f.fs.Visit(func(g *flag.Flag) {
			switch g.Name {
			case "resume", "json", "timeout", "no-wait", "context":
			default:
				other = usageError{fmt.Errorf("--resume knows --%s and the rest by itself", g.Name)}
			}
		})
		return other
	}
	if err := f.selection.check(); err != nil {
		return err
	}
	if f.Rate < 0 || f.recordTTL < 0 {
		return usageError{errors.New("--rate and --record-ttl are not negative")}
	}
	if !f.given("rate") {
		f.Rate = defaultRate
		if f.Stage == streams.StagePersister {
			f.Rate = defaultPersisterRate
		}
	}
	return nil
}

// limits reads the services' settings that a plan has to know.
func (e env) limits(recordTTL time.Duration) (limits, error) {
	s := ops.NewSettings(e.getenv)
	l := readLimits(s)
	if err := s.Err(); err != nil {
		return limits{}, fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	if recordTTL > 0 {
		l.RecordTTL = recordTTL
	}
	return l, nil
}

func readLimits(s *ops.Settings) limits {
	const day = 24 * time.Hour
	return limits{
		RecordTTL: s.Duration("RECORD_TTL", day, time.Minute, 72*time.Hour, "life of a record, as the persister has it"),
		MaxAge:    s.Duration("PREFETCH_MAX_AGE", 23*time.Hour, time.Minute, 72*time.Hour, "age at which events are given up, as the prefetcher has it"),
		Retention: s.Duration("FINGERPRINT_RETENTION", 30*day, 0, 10*365*day, "how long the vendor keeps events, as the prefetcher has it; 0 means for ever"),
	}
}

func replay(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f feedFlags
	f.declare(fs)
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	switch {
	case f.resume != "":
	case f.Stage == "":
		return 0, usageError{errors.New("--stage is prefetcher or persister")}
	case f.since.IsZero() && f.fromSeq == 0 && f.RequestID == "":
		return 0, usageError{errors.New("say from where: --since, --from-seq or --request-id")}
	}
	if err := f.check(); err != nil {
		return 0, err
	}
	return f.run(ctx, e)
}

// run does what the command line says.
func (f *feedFlags) run(ctx context.Context, e env) (int, error) {
	r := &f.feeder
	var err error
	if r.Limits, err = e.limits(f.recordTTL); err != nil {
		return 0, err
	}
	if r.records, err = e.records(); err != nil {
		return 0, err
	}
	defer r.records.close()
	if r.OnlyMissing && r.records.rdb == nil {
		return 0, usageError{errors.New("--only-missing needs REDIS_URL")}
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := r.prepare(ctx, conn, f.resume, f.since.Time, f.until.Time, f.fromSeq); err != nil {
		return 0, err
	}
	if r.DryRun {
		return f.feed(ctx, e)
	}
	return e.audited(ctx, conn, r.verb(), []string{r.ID}, f.fs, func() (int, error) { return f.feed(ctx, e) })
}

// feed makes the copies, waits for what becomes of them, and reports.
func (f *feedFlags) feed(ctx context.Context, e env) (int, error) {
	r := &f.feeder
	if !r.DryRun {
		fmt.Fprintf(e.stderr, "%s %s of %s %d to %d\n", r.verb(), r.ID, r.Span.Stream, r.Next, r.Span.To)
	}
	bar := newProgress(e.stderr)
	err := r.run(ctx, bar)
	if err == nil && !r.DryRun && !f.noWait {
		r.Waiting, err = r.settle(ctx, bar)
	}
	bar.end()
	if err != nil && ctx.Err() == nil {
		return 0, fmt.Errorf("%w; go on with --resume %s", err, r.ID)
	}
	if r.Rate > 0 {
		r.Seconds = float64(r.Counts.Copied) / r.Rate
	}
	code := exitDone
	switch {
	case !r.Done || r.Waiting != "":
		code = exitLeft
	case r.Counts.Copied == 0:
		code = exitNone
	}
	if f.json {
		if err := printJSON(e.stdout, r.feedState); err != nil {
			return 0, err
		}
	} else {
		r.print(e)
	}
	if r.Outcome != nil && !r.Outcome.Agrees {
		return 0, fmt.Errorf("%d copies were made, but FP_BACKFILL has %d of them, and %d were finished and purged", r.Counts.Copied, r.Outcome.InStream, r.Outcome.Purged)
	}
	return code, nil
}
