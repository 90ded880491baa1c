//go:build unix

// Package faults puts the real processes of the pipeline under load, breaks
// one thing after the other, and accounts for every event that was accepted.
//
//	go run ./deployments/local faults --duration 10m --seed 7
//
// A run has these parts: a calm start, in which the services' metrics must add
// up; a random mix of faults (safety: nothing is lost whatever happens); single
// faults kept up (liveness: the rest goes on); a calm end; and the check. The
// schedule follows from the seed alone.
package faults

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// options are the command line.
type options struct {
	seed     uint64
	duration time.Duration
	steady   time.Duration
	rate     float64
	only     []string
	bin      string
	oldBin   string
	strict   bool
	keep     bool
	json     bool
}

// repeat is the command line that gives the same schedule.
func (o options) repeat() string {
	s := fmt.Sprintf("faults --seed %d --duration %v --steady %v --rate %g", o.seed, o.duration, o.steady, o.rate)
	if len(o.only) > 0 {
		s += " --only '" + strings.Join(o.only, ",") + "'"
	}
	if o.oldBin != "" {
		s += " --old-bin " + o.oldBin
	}
	return s
}

// Main runs the sub-command and returns the exit code: 0 nothing was found, 1
// something was, or the run could not be made, 2 bad usage. It stops soon when
// ctx is done, and still checks and reports.
func Main(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == serveArg {
		if err := serve(ctx, args[1:]); err != nil {
			fmt.Fprintln(stderr, "local faults:", err)
			return 1
		}
		return 0
	}
	var o options
	fs := flag.NewFlagSet("faults", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.Uint64Var(&o.seed, "seed", 0, "seed of the schedule and of what is posted; 0 takes one at random and prints it")
	fs.DurationVar(&o.duration, "duration", 2*time.Minute, "length of the random mix; 0 for none")
	fs.DurationVar(&o.steady, "steady", 15*time.Second, "how long each single fault is kept up after the mix; 0 for none")
	fs.Float64Var(&o.rate, "rate", 200, "posts per second")
	only := fs.String("only", "", "these `FAULTS` alone, comma-separated; a name may end in *")
	list := fs.Bool("list", false, "list the faults and exit")
	fs.BoolVar(&o.json, "json", false, "print the report as JSON")
	fs.BoolVar(&o.keep, "keep", false, "keep the directory also when nothing was found")
	fs.StringVar(&o.bin, "bin", "", "use the programs in `DIR` (make build) instead of building them")
	fs.StringVar(&o.oldBin, "old-bin", "", "run one replica of each service from `DIR`, the programs of an earlier version; roll- faults change new for old and old for new")
	fs.BoolVar(&o.strict, "strict-gaps", false, "fail when clients were without a 202 for longer than the limit of the fault (a busy machine has gaps of its own)")
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "local faults: unknown argument %q; see --help\n", fs.Arg(0))
		return 2
	case o.rate < 1 || o.duration < 0 || o.steady < 0:
		fmt.Fprintln(stderr, "local faults: --rate is at least 1, and the lengths are not negative")
		return 2
	}
	if *list {
		for _, f := range catalog() {
			fmt.Fprintf(stdout, "%-34s %-8s %s\n", f.name, limitText(f.gap, f.back), f.doc)
		}
		return 0
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if len(choose(catalog(), []string{name})) == 0 {
			fmt.Fprintf(stderr, "local faults: --only: no fault is called %q; see --list\n", name)
			return 2
		}
	}
	if o.seed == 0 {
		var b [4]byte
		_, _ = rand.Read(b[:]) // never fails
		o.seed = 1 + uint64(binary.NativeEndian.Uint32(b[:]))
	}
	rep, err := run(ctx, o, stderr)
	if err != nil {
		fmt.Fprintln(stderr, "local faults:", err)
		return 1
	}
	if o.json {
		enc := json.NewEncoder(stdout)
		enc.SetIndent("", "  ")
		_ = enc.Encode(rep) // to a terminal or a pipe that is gone
	} else {
		rep.print(stdout)
	}
	if rep.failed() {
		return 1
	}
	return 0
}

// choose returns the faults of those names, all without any.
func choose(all []fault, names []string) (chosen []fault) {
	for _, f := range all {
		if len(names) == 0 || slices.ContainsFunc(names, func(n string) bool {
			prefix, star := strings.CutSuffix(n, "*")
			return n == f.name || star && strings.HasPrefix(f.name, prefix)
		}) {
			chosen = append(chosen, f)
		}
	}
	return chosen
}

// runner is one run.
type runner struct {
	options
	sys    *system
	load   *load
	watch  *watch
	faults []fault
	rep    *report
	out    *progress

	begun time.Time
	quiet time.Time              // when the load with faults ended
	parts map[string]*sync.Mutex // held while a fault of the part is up

	mu     sync.Mutex
	active map[string]bool
	fine   []time.Time // when the pipeline had caught up
}

func run(ctx context.Context, o options, stderr io.Writer) (_ *report, err error) {
	dir, err := os.MkdirTemp("", "fingerprint-prefetch-faults-")
	if err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	rep := &report{Seed: o.seed, Rate: o.rate, Dir: dir, StrictGaps: o.strict, Repeat: o.repeat()}
	defer func() {
		if err == nil && !rep.failed() && !o.keep {
			os.RemoveAll(dir)
			rep.Dir = ""
		} else if err != nil {
			err = fmt.Errorf("%w; everything is in %s", err, dir)
		}
	}()
	fmt.Fprintf(stderr, "faults: seed %d, in %s\n", o.seed, dir)
	bin := o.bin
	if bin == "" {
		bin = filepath.Join(dir, "bin")
		if err := build(ctx, bin); err != nil {
			return nil, err
		}
	}
	if o.oldBin != "" {
		rep.Versions = &versions{Ran: map[string][]string{}}
		if rep.Versions.New, err = version(ctx, bin); err == nil {
			rep.Versions.Old, err = version(ctx, o.oldBin)
		}
		if err != nil {
			return nil, err
		}
	}
	sys, err := newSystem(dir, bin, o.oldBin, int(o.rate))
	if err != nil {
		return nil, err
	}
	defer sys.stop()
	if err := sys.start(ctx); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	r := &runner{options: o, sys: sys, watch: newWatch(sys), rep: rep, parts: map[string]*sync.Mutex{}, active: map[string]bool{}, begun: time.Now()}
	r.load = newLoad(sys, o.seed, r.watch)
	for _, f := range choose(catalog(), o.only) {
		if r.parts[f.part] == nil {
			r.parts[f.part] = &sync.Mutex{}
		}
		if f.needs != nil {
			if err := f.needs(sys); err != nil {
				rep.Skipped = append(rep.Skipped, fmt.Sprintf("%s: %v", f.name, err))
				fmt.Fprintf(stderr, "faults: SKIPPED %s: %v\n", f.name, err)
				continue
			}
		}
		r.faults = append(r.faults, f)
	}
	watchCtx, stopWatch := context.WithCancel(context.WithoutCancel(ctx))
	var watching sync.WaitGroup
	watching.Go(func() { r.watch.run(watchCtx) })
	r.out = newProgress(stderr, r)
	watching.Go(func() { r.out.run(watchCtx) })
	watching.Go(func() { r.observe(watchCtx) })
	defer func() {
		stopWatch()
		watching.Wait()
	}()

	r.calm(ctx, "start")
	r.mixAndSteady(ctx)
	// Interrupted or not: what was accepted is accounted for.
	ctx = context.WithoutCancel(ctx)
	waiting := r.drain(ctx)
	if waiting == 0 {
		r.calm(ctx, "end")
		waiting = r.drain(ctx)
	}
	stopWatch()
	watching.Wait()
	limit, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	posts := r.load.all()
	h, err := sys.collect(limit, posts)
	if err != nil {
		return nil, fmt.Errorf("collect what is there at the end: %w", err)
	}
	h.Waiting, h.Seen = waiting, append(h.Seen, r.watch.backwards...)
	rep.Verdict = check(h)
	sys.mu.Lock()
	rep.Crashes = slices.Clone(sys.crashes)
	sys.mu.Unlock()
	if rep.Versions != nil {
		for _, name := range sys.services() {
			if p := sys.procs[name]; p.other != "" {
				rep.Versions.Ran[name] = p.versions()
			}
		}
	}
	rep.finish(posts, r.begun, r.quiet, r.fine)
	return rep, nil
}

// mixAndSteady is everything with load and faults. It ends early when ctx is
// done, with everything mended.
func (r *runner) mixAndSteady(ctx context.Context) {
	loadCtx, stop := context.WithCancel(ctx)
	defer stop()
	var loading sync.WaitGroup
	loading.Go(func() { r.load.run(loadCtx, r.rate, false) })
	r.out.say("mix")
	sleep(ctx, 4*time.Second) // something to look back on

	begin := time.Now()
	var faults sync.WaitGroup
	for _, st := range plan(r.seed, r.duration, r.faults) {
		if !sleep(ctx, time.Until(begin.Add(st.At))) {
			break
		}
		f := r.faults[slices.IndexFunc(r.faults, func(f fault) bool { return f.name == st.Name })]
		faults.Go(func() { r.up(ctx, f, st) })
	}
	faults.Wait()
	if r.steady > 0 {
		r.out.say("between single faults")
		for i, f := range r.faults {
			if f.steady != 0 && ctx.Err() == nil {
				r.keepUp(ctx, f, r.seed+uint64(i))
			}
		}
	}
	r.out.say("catching up")
	r.settled(ctx, time.Minute)
	r.quiet = time.Now()
	stop()
	loading.Wait()
}

// up has one fault for a while.
func (r *runner) up(ctx context.Context, f fault, st step) {
	mu := r.parts[f.part]
	mu.Lock()
	defer mu.Unlock()
	if ctx.Err() != nil {
		return
	}
	e := r.begin(ctx, f, st.Pick)
	sleep(ctx, st.For)
	r.mend(ctx, e)
	r.settled(ctx, rest)
}

// begin breaks something and writes it down.
func (r *runner) begin(ctx context.Context, f fault, pick uint64) *entry {
	r.mu.Lock()
	e := &entry{Name: f.name, Part: f.part, Limit: f.gap, Back: f.back, at: time.Now()}
	r.active[f.name] = true
	r.rep.Faults = append(r.rep.Faults, e)
	r.mu.Unlock()
	var err error
	e.Target, e.undo, err = f.begin(ctx, r.sys, pick)
	e.note(err)
	return e
}

// mendWithin is generous: a replay of everything takes its time on a machine
// that is busy.
const mendWithin = 20 * time.Minute

// mend ends a fault. It is done also when ctx is.
func (r *runner) mend(ctx context.Context, e *entry) {
	if e.undo != nil {
		limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), mendWithin)
		e.note(e.undo(limit))
		cancel()
	}
	e.mended = time.Now()
	r.mu.Lock()
	delete(r.active, e.Name)
	r.mu.Unlock()
}

// behind is how old the oldest due event may be for the pipeline to count as
// caught up.
const behind = 2 * time.Second

var errBehind = errors.New("has not caught up")

// caughtUp returns nil while events are accepted and become records at once.
func (r *runner) caughtUp() error {
	if _, _, oldest := r.watch.state(); oldest > behind || time.Since(time.Unix(0, r.load.latest.Load())) > time.Second {
		return errBehind
	}
	return nil
}

// settled waits until the pipeline has caught up, for so long at most.
func (r *runner) settled(ctx context.Context, most time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	_ = poll(ctx, r.caughtUp) // the report says what did not
}

// observe writes down when the pipeline had caught up, until ctx is done.
func (r *runner) observe(ctx context.Context) {
	for sleep(ctx, watchEvery/2) {
		if r.caughtUp() == nil {
			r.mu.Lock()
			r.fine = append(r.fine, time.Now())
			r.mu.Unlock()
		}
	}
}

// drain waits until nothing is unfinished, and returns how many messages were
// when time was up.
func (r *runner) drain(ctx context.Context) (waiting uint64) {
	r.out.say("draining")
	limit, cancel := context.WithTimeout(ctx, drainWithin)
	defer cancel()
	start := time.Now()
	err := poll(limit, func() (err error) {
		if waiting, err = r.sys.waiting(limit); err == nil && waiting > 0 {
			err = errBehind
		}
		return err
	})
	r.rep.Drain = max(r.rep.Drain, time.Since(start))
	if err != nil {
		r.rep.Problems = append(r.rep.Problems, fmt.Sprintf("%d messages unfinished %v after the last fault: %v", waiting, drainWithin, err))
		return max(waiting, 1)
	}
	return 0
}

// drainWithin is the promise after the last fault: the vendor's 404 budget of
// 30 s, AckWait, and 15 s to get going.
const drainWithin = 30*time.Second + streams.AckWait + 15*time.Second

// calmPosts are the events of a calm part.
const calmPosts = 300

// calm posts some events while nothing is broken and compares the services'
// metrics before and after: what the edges accepted, the prefetchers must have
// concluded and the persisters written.
func (r *runner) calm(ctx context.Context, name string) {
	r.out.say("calm " + name)
	problem := func(format string, args ...any) {
		if ctx.Err() == nil {
			r.rep.Problems = append(r.rep.Problems, "calm "+name+": "+fmt.Sprintf(format, args...))
		}
	}
	limit, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if err := r.sys.ready(limit); err != nil {
		problem("not ready: %v", err)
		return
	}
	before, err := r.sum(limit)
	if err != nil {
		problem("%v", err)
		return
	}
	first := len(r.load.all())
	loadCtx, stop := context.WithTimeout(limit, sec(calmPosts/min(r.rate, 100)))
	r.load.run(loadCtx, min(r.rate, 100), true)
	stop()
	if err := poll(limit, func() error {
		n, err := r.sys.waiting(limit)
		if err == nil && n > 0 {
			err = errBehind
		}
		return err
	}); err != nil {
		problem("not drained: %v", err)
		return
	}
	after, err := r.sum(limit)
	if err != nil {
		problem("%v", err)
		return
	}
	d := metricsSum{Part: name, Accepted: after.Accepted - before.Accepted, Concluded: after.Concluded - before.Concluded, Written: after.Written - before.Written}
	for _, p := range r.load.all()[first:] {
		if p.Tries > 1 || p.Answer == unsure {
			d.Unsure++
		}
	}
	r.rep.Metrics = append(r.rep.Metrics, d)
	if !d.addUp() {
		problem("the metrics do not add up: %.0f accepted, %.0f concluded, %.0f written", d.Accepted, d.Concluded, d.Written)
	}
}

// metricsSum is what the services count of the same events.
type metricsSum struct {
	Part      string  `json:"part"`
	Accepted  float64 `json:"accepted"`
	Concluded float64 `json:"concluded"`
	Written   float64 `json:"written"`
	// Unsure is how many posts were answered 503 or not at all, at first: the
	// edge may have stored one and not know, and count its repeat as a
	// duplicate. On a machine that is too busy that happens with nothing broken.
	Unsure int `json:"unsure"`
}

// addUp reports whether every event accepted was concluded and written once.
func (d metricsSum) addUp() bool {
	return d.Accepted > 0 && d.Concluded == d.Written && d.Accepted <= d.Concluded && d.Concluded <= d.Accepted+float64(d.Unsure)
}

func (r *runner) sum(ctx context.Context) (m metricsSum, err error) {
	if m.Accepted, err = r.sys.metric(ctx, edge, "fp_ingest_requests_total", `outcome="accepted"`); err != nil {
		return m, err
	}
	if m.Concluded, err = r.sys.metric(ctx, prefetcher, "fp_prefetch_results_total"); err != nil {
		return m, err
	}
	for _, status := range []string{"ready", "not_found", "rejected", "failed"} {
		n, err := r.sys.metric(ctx, persister, "fp_persist_records_total", `status="`+status+`"`)
		if err != nil {
			return m, err
		}
		m.Written += n
	}
	return m, nil
}
