//go:build unix

package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// report is what a run found.
type report struct {
	Seed     uint64        `json:"seed"`
	Rate     float64       `json:"posts_per_second"`
	Length   time.Duration `json:"length_ns"`
	Posts    int           `json:"posts"`
	Accepted int           `json:"accepted"`
	// Versions is there when two were run.
	Versions *versions     `json:"versions,omitempty"`
	Faults   []*entry      `json:"faults"`
	Steady   []steadyEntry `json:"steady,omitempty"`
	Skipped  []string      `json:"skipped,omitempty"`
	Metrics  []metricsSum  `json:"metrics"`
	Verdict  verdict       `json:"verdict"`
	// Drain is how long the end took, Gap the longest time without a 202.
	Drain time.Duration `json:"drain_ns"`
	Gap   time.Duration `json:"longest_gap_ns"`
	// Over are the gaps longer than the faults of that time allow. They fail
	// the run with StrictGaps: else they may be the machine's.
	Over       []overGap `json:"gaps_over_limit,omitempty"`
	StrictGaps bool      `json:"strict_gaps"`
	// Crashes are processes that ended unasked; Problems what else failed.
	Crashes  []string `json:"crashes,omitempty"`
	Problems []string `json:"problems,omitempty"`
	// Repeat is the command line of the same schedule.
	Repeat string `json:"repeat"`
	// Dir is where everything is, when it was kept.
	Dir string `json:"dir,omitempty"`
}

// versions are the two of a run with --old-bin.
type versions struct {
	New string `json:"new"`
	Old string `json:"old"`
	// Ran says for each process which of them it was, in order.
	Ran map[string][]string `json:"ran"`
}

// overGap is a time without a 202 that is longer than allowed.
type overGap struct {
	At     time.Duration `json:"at_ns"`
	Gap    time.Duration `json:"gap_ns"`
	Limit  time.Duration `json:"limit_ns"` // of this very gap, from its start
	Faults []string      `json:"faults"`   // up, or just mended
}

// entry is one fault as it was.
type entry struct {
	Name   string `json:"fault"`
	Part   string `json:"part"`
	Target string `json:"target,omitempty"`
	// At is when it began, counted from the start of the run; For is how long
	// it was up; mending included.
	At  time.Duration `json:"at_ns"`
	For time.Duration `json:"for_ns"`
	// Gap is the longest time without a 202 from its beginning to its
	// recovery, 10 s after its end at most.
	Gap time.Duration `json:"gap_ns"`
	// Limit is how long a gap the fault excuses; with Back instead it excuses
	// any that ends so long after its mending. Over is set when a gap of its
	// time was longer than it and every other fault of that moment excuse.
	Limit time.Duration `json:"gap_limit_ns,omitempty"`
	Back  time.Duration `json:"back_limit_ns,omitempty"`
	Over  bool          `json:"gap_over_limit,omitempty"`
	// Recovery is from the mending until events became records at once again;
	// -1 when they did not any more.
	Recovery time.Duration `json:"recovery_ns"`
	// Posts and Accepted are those sent while it was up.
	Posts    int `json:"posts"`
	Accepted int `json:"accepted"`
	// Alone is false when another fault was up at the same time: gap and
	// recovery may be that one's.
	Alone bool   `json:"alone"`
	Note  string `json:"note,omitempty"`
	Bad   bool   `json:"failed,omitempty"`

	undo              func(context.Context) error
	at, mended, until time.Time // until: what it may still explain
}

func (e *entry) note(err error) {
	if err == nil {
		return
	}
	e.Note = strings.TrimPrefix(e.Note+"; "+err.Error(), "; ")
	e.Bad = e.Bad || !errors.Is(err, errPoint)
}

func (r *report) failed() bool {
	return r.Verdict.failed() || len(r.Crashes) > 0 || len(r.Problems) > 0 ||
		slices.ContainsFunc(r.Faults, func(e *entry) bool { return e.Bad || e.Recovery < 0 }) ||
		slices.ContainsFunc(r.Steady, func(s steadyEntry) bool { return len(s.Missing) > 0 }) ||
		r.StrictGaps && len(r.Over) > 0
}

// finish works out the times of a run that began at begun and whose load with
// faults ended at quiet; fine are those at which the pipeline had caught up.
func (r *report) finish(posts []*post, begun, quiet time.Time, fine []time.Time) {
	r.Length = time.Since(begun)
	r.Posts = len(posts)
	var oks []time.Time
	for _, p := range posts {
		if p.Answer == accepted {
			r.Accepted++
			if p.Done.Before(quiet) {
				oks = append(oks, p.Done)
			}
		}
	}
	slices.SortFunc(oks, time.Time.Compare)
	for _, e := range r.Faults {
		e.At, e.For = e.at.Sub(begun), e.mended.Sub(e.at)
		longest := max(10*time.Second, e.Back)
		e.until = e.mended.Add(longest)
		if i, _ := slices.BinarySearchFunc(fine, e.mended, time.Time.Compare); i == len(fine) {
			e.Recovery = -1
		} else {
			e.Recovery = fine[i].Sub(e.mended)
			e.until = e.mended.Add(min(e.Recovery+time.Second, longest))
		}
		e.Alone = !slices.ContainsFunc(r.Faults, func(o *entry) bool { return o != e && o.at.Before(e.until) && o.mended.Add(rest).After(e.at) })
		e.Gap = longestGap(oks, e.at, e.until)
		r.Gap = max(r.Gap, e.Gap)
		for _, p := range posts {
			if p.Sent.After(e.at) && p.Sent.Before(e.mended) {
				e.Posts++
				if p.Answer == accepted {
					e.Accepted++
				}
			}
		}
	}
	r.judgeGaps(oks, begun)
}

// judgeGaps finds the gaps that are longer than the faults of their time
// excuse. Of several faults the one that excuses most counts: which of them
// caused a gap cannot be seen.
func (r *report) judgeGaps(oks []time.Time, begun time.Time) {
	for i := 1; i < len(oks); i++ {
		from, to := oks[i-1], oks[i]
		if to.Sub(from) <= gapLimit { // every fault excuses that
			continue
		}
		var excused time.Duration
		var of []*entry
		for _, e := range r.Faults {
			if !from.Before(e.until) || !to.After(e.at) {
				continue
			}
			of = append(of, e)
			limit := e.Limit
			if e.Back > 0 {
				limit = e.mended.Add(e.Back).Sub(from)
			}
			excused = max(excused, limit)
		}
		if len(of) == 0 || to.Sub(from) <= excused {
			continue
		}
		over := overGap{At: from.Sub(begun), Gap: to.Sub(from), Limit: excused}
		for _, e := range of {
			e.Over = true
			over.Faults = append(over.Faults, e.Name)
		}
		r.Over = append(r.Over, over)
	}
}

// limitText shows what a fault excuses.
func limitText(gap, back time.Duration) string {
	if back > 0 {
		return fmt.Sprintf("end+%g", back.Seconds())
	}
	return fmt.Sprintf("%.2f", gap.Seconds())
}

// longestGap returns the longest time between two of the sorted times, of which
// at least a part lies between from and to.
func longestGap(times []time.Time, from, to time.Time) (gap time.Duration) {
	i, _ := slices.BinarySearchFunc(times, from.Add(1), time.Time.Compare)
	for i = max(i, 1); i < len(times) && times[i-1].Before(to); i++ {
		gap = max(gap, times[i].Sub(times[i-1]))
	}
	return gap
}

// mostLines is how many findings of a kind the report shows.
const mostLines = 40

func (r *report) print(w io.Writer) {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f", d.Seconds()) }
	if v := r.Versions; v != nil {
		fmt.Fprintf(w, "\nVersions: new is %s, old is %s\n", v.New, v.Old)
		for _, name := range slices.Sorted(maps.Keys(v.Ran)) {
			fmt.Fprintf(w, "  %-14s %s\n", name, strings.Join(v.Ran[name], ", "))
		}
	}
	fmt.Fprintf(w, "\nTimeline (seconds; gap: longest time without a 202, ! over the limit; * while another fault was up as well)\n\n")
	fmt.Fprintf(w, "%8s %7s %-34s %-26s %7s %7s %9s %10s\n", "at", "for", "fault", "target", "gap", "limit", "recovery", "accepted")
	for _, e := range r.Faults {
		star := "*"
		if e.Alone {
			star = " "
		}
		recovery := "never"
		if e.Recovery >= 0 {
			recovery = ms(e.Recovery)
		}
		gap := ms(e.Gap)
		if e.Over {
			gap += "!"
		}
		line := fmt.Sprintf("%8s %7s %-34s %-26s %7s%s %6s %9s %5d/%-5d %s",
			ms(e.At), ms(e.For), e.Name, e.Target, gap, star, limitText(e.Limit, e.Back), recovery, e.Accepted, e.Posts, e.Note)
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	if len(r.Steady) > 0 {
		fmt.Fprintf(w, "\nOne fault kept up\n\n%-34s %9s %9s %9s %9s  %s\n", "fault", "posts", "accepted", "fetched", "readable", "missing")
		for _, s := range r.Steady {
			fmt.Fprintf(w, "%-34s %9d %9d %9d %9d  %s\n", s.Name, s.Posts, s.Accepted, s.Fetched, s.Readable, cmpOr(strings.Join(s.Missing, "; "), "nothing"))
		}
	}
	fmt.Fprintf(w, "\nWhat became of every post\n\n")
	for _, c := range classes() {
		note := ""
		if c.bad() && r.Verdict.Counts[c] > 0 {
			note = "   <- FOUND"
		}
		fmt.Fprintf(w, "  %-12s %8d%s\n", c, r.Verdict.Counts[c], note)
	}
	s := r.Verdict.Sum
	fmt.Fprintf(w, "\nConservation: %d stored = %d ready + %d negative + %d superseded + %d dead without record + %d waiting + %d missing\n",
		s.Stored, s.Ready, s.Negative, s.Superseded, s.Dead, s.Waiting, s.Missing)
	for _, m := range r.Metrics {
		fmt.Fprintf(w, "Metrics, calm %s: %.0f accepted, %d more perhaps; %.0f concluded, %.0f written\n", m.Part, m.Accepted, m.Unsure, m.Concluded, m.Written)
	}
	parts := map[string]time.Duration{}
	for _, e := range r.Faults {
		if e.Alone {
			parts[e.Part] = max(parts[e.Part], e.Gap)
		}
	}
	for _, part := range slices.Sorted(maps.Keys(parts)) {
		fmt.Fprintf(w, "Longest gap with a fault of %s alone: %s s\n", part, ms(parts[part]))
	}
	fmt.Fprintf(w, "%d faults in %v, %d posts, %d accepted, longest gap %s s, drained in %s s\n",
		len(r.Faults), r.Length.Round(time.Second), r.Posts, r.Accepted, ms(r.Gap), ms(r.Drain))
	verdict := "WARNING"
	if r.StrictGaps {
		verdict = "FOUND"
	}
	for i, o := range r.Over {
		if i == mostLines {
			fmt.Fprintf(w, "… and %d more gaps over their limit\n", len(r.Over)-mostLines)
			break
		}
		fmt.Fprintf(w, "%s no 202 for %s s from %s s on; allowed are %s s with %s\n", verdict, ms(o.Gap), ms(o.At), ms(o.Limit), strings.Join(o.Faults, " and "))
	}
	if len(r.Over) == 0 && len(r.Faults) > 0 {
		fmt.Fprintln(w, "No gap was over its limit.")
	}
	for _, text := range r.Skipped {
		fmt.Fprintln(w, "SKIPPED", text)
	}
	for i, f := range r.Verdict.Findings {
		if i == mostLines {
			fmt.Fprintf(w, "… and %d more\n", len(r.Verdict.Findings)-mostLines)
			break
		}
		fmt.Fprintf(w, "FOUND %s %s: %s\n", f.Class, f.ID, f.Text)
	}
	for _, text := range slices.Concat(r.Crashes, r.Problems) {
		fmt.Fprintln(w, "FOUND", text)
	}
	if !r.failed() {
		fmt.Fprintf(w, "Nothing was found. Seed %d.\n", r.Seed)
		return
	}
	fmt.Fprintf(w, "\nRepeat with: %s\nLogs, streams and records are in %s\n", r.Repeat, r.Dir)
}

func cmpOr(s, def string) string {
	if s == "" {
		return def
	}
	return s
}

// progress shows on a terminal how a long run goes, in one line that is written
// over; elsewhere a line every ten seconds.
type progress struct {
	w        io.Writer
	r        *runner
	terminal bool

	mu   sync.Mutex
	what string
}

func newProgress(w io.Writer, r *runner) *progress {
	p := &progress{w: w, r: r}
	if f, ok := w.(*os.File); ok {
		st, err := f.Stat()
		null, nullErr := os.Stat(os.DevNull) // a character device too
		p.terminal = err == nil && st.Mode()&os.ModeCharDevice != 0 && (nullErr != nil || !os.SameFile(st, null))
	}
	return p
}

// say names the part of the run, when no fault is up.
func (p *progress) say(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what = what
}

func (p *progress) run(ctx context.Context) {
	every := 10 * time.Second
	if p.terminal {
		every = time.Second
	}
	for sleep(ctx, every) {
		p.r.mu.Lock()
		up := make([]string, 0, len(p.r.active))
		for name := range p.r.active {
			up = append(up, name)
		}
		n := len(p.r.rep.Faults)
		p.r.mu.Unlock()
		slices.Sort(up)
		what := strings.Join(up, " ")
		if what == "" {
			p.mu.Lock()
			what = p.what
			p.mu.Unlock()
		}
		finished, unfinished, oldest := p.r.watch.state()
		line := fmt.Sprintf("%4.0f s  %d faults  %d posted  %d accepted  %d readable  %d not yet, the oldest %.1f s  %s",
			time.Since(p.r.begun).Seconds(), n, p.r.load.sent.Load(), p.r.load.ok.Load(), finished, unfinished, oldest.Seconds(), what)
		if p.terminal {
			fmt.Fprintf(p.w, "\r\x1b[K%s", line)
		} else {
			fmt.Fprintln(p.w, line)
		}
	}
	if p.terminal {
		fmt.Fprint(p.w, "\r\x1b[K")
	}
}
