//go:build unix

package faults

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

var t0 = time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)

// sound is a history in which everything is as it should be: one event of each
// kind that a run makes.
func sound() history {
	h := history{Records: map[string]final{}, First: map[string]int64{}}
	at := t0
	handed := func(id string, subscriber int64, session string, want record.Status, a answer) *post {
		at = at.Add(time.Second)
		p := &post{ID: id, Subscriber: subscriber, Session: session, User: "u", Want: want, Sent: at, Done: at, Answer: a, Tries: 1}
		h.Posts = append(h.Posts, p)
		return p
	}
	store := func(p *post) stored {
		s := stored{p.event(), p.Done}
		h.Stored = append(h.Stored, s)
		return s
	}
	end := func(s stored, status record.Status) {
		h.Records[s.ID] = final{s.event, status, s.AcceptedAt, true}
		h.First[s.ID] = s.Subscriber
	}
	end(store(handed("ready", 12, "s", record.Ready, accepted)), record.Ready)
	handed("ready", 12, "s", record.Ready, accepted) // the same again
	end(store(handed("never", 12, "s", record.NotFound, accepted)), record.NotFound)
	end(store(handed("bad", 12, "s", record.Rejected, accepted)), record.Rejected)
	end(store(handed("recovered", 12, "s", record.Ready, unsure)), record.Ready)
	handed("unknown", 12, "s", record.Ready, unsure)
	handed("refused", 12, "s", "", refused)
	store(handed("changed", 12, "old", record.Ready, accepted))
	end(store(handed("changed", 12, "new", record.Ready, accepted)), record.Ready)
	end(store(handed("contested", 12, "s", record.Ready, accepted)), record.Ready)
	theirs := store(handed("contested", 112, "s", record.Ready, accepted))
	h.Dead = append(h.Dead, deadLetter{theirs.event, "foreign_subscriber", "FP_ENRICHED", 10})
	h.Poison = []place{{"FP_INGEST", 99}}
	h.Dead = append(h.Dead, deadLetter{event{}, "undecodable", "FP_INGEST", 99})
	return h
}

func TestCheckSoundHistory(t *testing.T) {
	t.Parallel()
	v := check(sound())
	if v.failed() || len(v.Findings) > 0 {
		t.Errorf("found %v", v.Findings)
	}
	want := map[class]int{ok: 8, recovered: 1, unknown: 1, rejected: 1}
	for _, c := range classes() {
		if v.Counts[c] != want[c] {
			t.Errorf("%d %s, want %d", v.Counts[c], c, want[c])
		}
	}
	if v.Sum != (conservation{Stored: 8, Ready: 4, Negative: 2, Superseded: 1, Dead: 1}) {
		t.Errorf("sum %+v", v.Sum)
	}
}

// Everything that can go wrong is planted in a sound history, and must be found
// as what it is.
func TestCheckFindsWhatIsPlanted(t *testing.T) {
	t.Parallel()
	forget := func(h *history, id string) {
		h.Stored = slices.DeleteFunc(h.Stored, func(s stored) bool { return s.ID == id })
		delete(h.Records, id)
	}
	change := func(h *history, id string, f func(*final)) {
		r := h.Records[id]
		f(&r)
		h.Records[id] = r
	}
	for name, tt := range map[string]struct {
		plant func(*history)
		class class
	}{
		"a 202 that was not stored":           {func(h *history) { forget(h, "ready") }, lost},
		"a record gone":                       {func(h *history) { delete(h.Records, "ready") }, lost},
		"a negative record gone":              {func(h *history) { delete(h.Records, "never") }, lost},
		"a recovered event without an end":    {func(h *history) { delete(h.Records, "recovered") }, lost},
		"a pending record for ever":           {func(h *history) { change(h, "ready", func(r *final) { r.Status = record.Pending }) }, lost},
		"a foreign event without dead letter": {func(h *history) { h.Dead = h.Dead[1:] }, lost},
		"poison without dead letter":          {func(h *history) { h.Dead = h.Dead[:1] }, lost},
		"an event not at its end":             {func(h *history) { delete(h.Records, "ready"); h.Waiting = 1 }, stuck},
		"an event nobody handed in": {func(h *history) {
			e := event{"invented", 12, "s", "u"}
			h.Stored = append(h.Stored, stored{e, t0})
			h.Records["invented"] = final{e, record.Ready, t0, true}
		}, unexpected},
		"a record of nothing stored": {func(h *history) {
			h.Records["unknown"] = final{event{"unknown", 12, "s", "u"}, record.Ready, t0, true}
		}, unexpected},
		"a refused event stored": {func(h *history) {
			e := event{"refused", 12, "s", "u"}
			h.Stored = append(h.Stored, stored{e, t0})
			h.Records["refused"] = final{e, record.Ready, t0, true}
		}, unexpected},
		"a record with another session": {func(h *history) { change(h, "ready", func(r *final) { r.Session = "x" }) }, unexpected},
		"a record of a time that is none": {func(h *history) {
			change(h, "ready", func(r *final) { r.AcceptedAt = r.AcceptedAt.Add(time.Millisecond) })
		}, unexpected},
		"a dead letter of nobody's": {func(h *history) {
			h.Dead = append(h.Dead, deadLetter{event{"ready", 12, "other", "u"}, "foreign_subscriber", "FP_ENRICHED", 11})
		}, unexpected},
		"a refusal the vendor did not mean": {func(h *history) { change(h, "ready", func(r *final) { r.Status = record.NotFound }) }, wrong},
		"a failure although it was there":   {func(h *history) { change(h, "ready", func(r *final) { r.Status = record.Failed }) }, wrong},
		"a find although it was not there":  {func(h *history) { change(h, "never", func(r *final) { r.Status = record.Ready }) }, wrong},
		"another id's data":                 {func(h *history) { change(h, "ready", func(r *final) { r.Right = false }) }, wrong},
		"a valid event refused": {func(h *history) {
			h.Posts = append(h.Posts, &post{ID: "fine", Subscriber: 12, Session: "s", User: "u", Want: record.Ready, Answer: refused})
		}, wrong},
		"a foreign overwrite": {func(h *history) {
			h.Records["contested"] = final{event{"contested", 112, "s", "u"}, record.Ready, h.Stored[len(h.Stored)-1].AcceptedAt, true}
			h.Dead[0].event.Subscriber = 12
		}, foreign},
		"the later of two subscribers written first": {func(h *history) {
			h.Records["contested"] = final{event{"contested", 112, "s", "u"}, record.Ready, h.Stored[len(h.Stored)-1].AcceptedAt, true}
			h.First["contested"] = 112
			h.Dead[0].event.Subscriber = 12
		}, overtaken},
		"a record that was never written":      {func(h *history) { delete(h.First, "ready") }, unexpected},
		"a record of somebody who never asked": {func(h *history) { change(h, "ready", func(r *final) { r.Subscriber = 13 }) }, foreign},
		"an older event over a newer": {func(h *history) {
			i := slices.IndexFunc(h.Stored, func(s stored) bool { return s.Session == "old" })
			h.Records["changed"] = final{h.Stored[i].event, record.Ready, h.Stored[i].AcceptedAt, true}
		}, backwards},
		"a good event dead-lettered": {func(h *history) {
			h.Dead = append(h.Dead, deadLetter{event{"ready", 12, "s", "u"}, "exhausted", "FP_INGEST", 1})
		}, givenUp},
		"an event stored twice": {func(h *history) { h.Stored = append(h.Stored, stored{h.Stored[0].event, t0}) }, duplicate},
		"a result stored twice": {func(h *history) { h.Repeated = 1 }, duplicate},
		"seen during the run":   {func(h *history) { h.Seen = []finding{{backwards, "ready", "ready became pending"}} }, backwards},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := sound()
			before := check(h)
			tt.plant(&h)
			v := check(h)
			if v.Counts[tt.class] <= before.Counts[tt.class] {
				t.Errorf("not found as %s: %v %v", tt.class, v.Counts, v.Findings)
			}
			if tt.class.bad() != v.failed() {
				t.Errorf("failed is %v with %v", v.failed(), v.Findings)
			}
			if s := v.Sum; s.Stored != s.Ready+s.Negative+s.Superseded+s.Dead+s.Waiting+s.Missing {
				t.Errorf("the sum does not add up: %+v", s)
			}
		})
	}
}

// After Redis lost its data an id of two subscribers is settled anew: the one
// who is replayed first has overtaken nobody.
func TestCheckContestedIDAfterRedisLostIt(t *testing.T) {
	t.Parallel()
	h := sound()
	ours, theirs := event{"contested", 12, "s", "u"}, event{"contested", 112, "s", "u"}
	h.Records["contested"] = final{theirs, record.Ready, h.Stored[len(h.Stored)-1].AcceptedAt, true}
	h.First["contested"], h.Dead[0].event = 112, ours
	h.Losses = []time.Time{t0.Add(time.Hour)}
	if v := check(h); v.failed() || v.Counts[overtaken] != 0 {
		t.Errorf("after a loss: %v %v", v.Counts, v.Findings)
	}
}

func TestWatchSeesWhatGoesBackwards(t *testing.T) {
	t.Parallel()
	const early, late = "2026-11-24T12:00:00.000000000Z", "2026-11-24T12:00:01.000000000Z"
	value := func(status, at, subscriber string) string {
		return `{"schema":1,"status":"` + status + `","accepted_at":"` + at + `","subscriber_id":` + subscriber + `,"request_id":"x"`
	}
	for name, tt := range map[string]struct {
		values []string
		lost   bool // Redis lost its data in between
		want   class
	}{
		"forward":                {values: []string{"", value("pending", early, "12"), value("not_found", early, "12"), value("ready", early, "12"), value("ready", late, "12")}},
		"pending of a newer":     {values: []string{value("not_found", early, "12"), value("pending", late, "12")}},
		"ready to pending":       {values: []string{value("ready", early, "12"), value("pending", late, "12")}, want: backwards},
		"ready to failed":        {values: []string{value("ready", early, "12"), value("failed", late, "12")}, want: backwards},
		"newer to older":         {values: []string{value("ready", late, "12"), value("ready", early, "12")}, want: backwards},
		"not found to pending":   {values: []string{value("not_found", early, "12"), value("pending", early, "12")}, want: backwards},
		"gone":                   {values: []string{value("ready", early, "12"), ""}, want: backwards},
		"gone with all":          {values: []string{value("ready", early, "12"), ""}, lost: true},
		"back after all is lost": {values: []string{value("ready", early, "12"), value("pending", early, "12")}, lost: true},
		"another subscriber's":   {values: []string{value("ready", early, "12"), value("ready", late, "13")}, want: foreign},
		"no record":              {values: []string{"x"}, want: unexpected},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w, s := newWatch(nil), &seen{id: "x"}
			for i, v := range tt.values {
				epoch := 0
				if tt.lost {
					epoch = i
				}
				w.saw(s, epoch, v)
			}
			var got class
			if len(w.backwards) > 0 {
				got = w.backwards[0].Class
			}
			if got != tt.want || len(w.backwards) > 1 {
				t.Errorf("found %v, want %q", w.backwards, tt.want)
			}
		})
	}
}

func TestLongestGap(t *testing.T) {
	t.Parallel()
	at := func(s ...int) (times []time.Time) {
		for _, n := range s {
			times = append(times, t0.Add(time.Duration(n)*time.Second))
		}
		return times
	}
	times := at(0, 1, 2, 9, 10, 30)
	for _, tt := range []struct{ from, to, want int }{{0, 2, 1}, {3, 5, 7}, {2, 3, 7}, {9, 10, 1}, {10, 11, 20}} {
		if got := longestGap(times, at(tt.from)[0], at(tt.to)[0]); got != time.Duration(tt.want)*time.Second {
			t.Errorf("from %d to %d: %v, want %d s", tt.from, tt.to, got, tt.want)
		}
	}
}

// Gaps are planted in a history with a 202 every 50 ms, and judged by the
// faults of their time.
func TestGapsAreJudgedByTheirFaults(t *testing.T) {
	t.Parallel()
	s := func(n float64) time.Time { return t0.Add(sec(n)) }
	type up struct {
		name     string
		from, to float64
	}
	type gap struct{ from, to float64 }
	for name, tt := range map[string]struct {
		faults []up
		gaps   []gap
		over   []string // the faults of each gap that is too long
		marked []string
	}{
		"nothing":                      {faults: []up{{"kill-edge", 10, 12}}},
		"an edge, just felt":           {faults: []up{{"kill-edge", 10, 12}}, gaps: []gap{{10, 10.45}}},
		"an edge, too long":            {faults: []up{{"kill-edge", 10, 12}}, gaps: []gap{{10, 10.6}}, over: []string{"kill-edge"}, marked: []string{"kill-edge"}},
		"Redis, too long":              {faults: []up{{"kill-redis", 10, 12}}, gaps: []gap{{11, 13}}, over: []string{"kill-redis"}, marked: []string{"kill-redis"}},
		"the vendor, too long":         {faults: []up{{"vendor-503", 10, 12}}, gaps: []gap{{11, 11.7}}, over: []string{"vendor-503"}, marked: []string{"vendor-503"}},
		"a prefetcher after its end":   {faults: []up{{"kill-prefetcher", 10, 12}}, gaps: []gap{{12.5, 13.5}}, over: []string{"kill-prefetcher"}, marked: []string{"kill-prefetcher"}},
		"long before and after":        {faults: []up{{"kill-edge", 10, 12}}, gaps: []gap{{5, 7}, {30, 32}}},
		"a leader, felt":               {faults: []up{{"kill-nats-leader", 10, 15}}, gaps: []gap{{10, 19}}},
		"a leader, too long":           {faults: []up{{"kill-nats-leader", 10, 15}}, gaps: []gap{{10, 20.5}}, over: []string{"kill-nats-leader"}, marked: []string{"kill-nats-leader"}},
		"all of NATS":                  {faults: []up{{"kill-nats-all", 10, 40}}, gaps: []gap{{10, 54}}},
		"all of NATS, twice":           {faults: []up{{"kill-nats-all", 10, 40}}, gaps: []gap{{10, 47}, {47.5, 54}}},
		"all of NATS, too long":        {faults: []up{{"kill-nats-all", 10, 40}}, gaps: []gap{{10, 55.5}}, over: []string{"kill-nats-all"}, marked: []string{"kill-nats-all"}},
		"stalled, not back at once":    {faults: []up{{"stall-nats", 10, 15}}, gaps: []gap{{10, 31}}, over: []string{"stall-nats"}, marked: []string{"stall-nats"}},
		"an edge while NATS is away":   {faults: []up{{"kill-edge", 12, 14}, {"kill-nats-all", 10, 15}}, gaps: []gap{{10, 25}}},
		"an edge while a leader goes":  {faults: []up{{"kill-edge", 12, 14}, {"kill-nats-leader", 10, 15}}, gaps: []gap{{13, 18}}},
		"an edge and Redis":            {faults: []up{{"kill-edge", 10, 14}, {"kill-redis", 11, 15}}, gaps: []gap{{12, 13}}, over: []string{"kill-edge kill-redis"}, marked: []string{"kill-edge", "kill-redis"}},
		"two gaps, one of them NATS's": {faults: []up{{"kill-edge", 10, 30}, {"kill-nats-leader", 20, 25}}, gaps: []gap{{12, 13}, {20, 28}}, over: []string{"kill-edge"}, marked: []string{"kill-edge"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var posts []*post
			for at := 0.0; at < 100; at += 0.05 {
				if !slices.ContainsFunc(tt.gaps, func(g gap) bool { return g.from < at && at < g.to }) {
					posts = append(posts, &post{Sent: s(at), Done: s(at), Answer: accepted})
				}
			}
			var r report
			for _, u := range tt.faults {
				f := choose(catalog(), []string{u.name})[0]
				r.Faults = append(r.Faults, &entry{Name: f.name, Limit: f.gap, Back: f.back, at: s(u.from), mended: s(u.to)})
			}
			r.finish(posts, t0, s(100), []time.Time{s(60)})
			var over, marked []string
			for _, o := range r.Over {
				over = append(over, strings.Join(o.Faults, " "))
			}
			for _, e := range r.Faults {
				if e.Over {
					marked = append(marked, e.Name)
				}
			}
			if !slices.Equal(over, tt.over) || !slices.Equal(marked, tt.marked) {
				t.Errorf("over the limit: %+v, marked %v", r.Over, marked)
			}
			if r.failed() {
				t.Error("a gap fails the run unasked")
			}
			if r.StrictGaps = true; r.failed() != (len(tt.over) > 0) {
				t.Errorf("failed is %v with --strict-gaps", r.failed())
			}
		})
	}
}

func TestMetricsAddUp(t *testing.T) {
	t.Parallel()
	for d, want := range map[metricsSum]bool{
		{Accepted: 300, Concluded: 300, Written: 300}:            true,
		{Accepted: 298, Concluded: 300, Written: 300, Unsure: 2}: true,
		{Accepted: 298, Concluded: 298, Written: 298, Unsure: 2}: true,
		{Accepted: 298, Concluded: 300, Written: 300, Unsure: 1}: false,
		{Accepted: 300, Concluded: 299, Written: 299}:            false,
		{Accepted: 300, Concluded: 300, Written: 299}:            false,
		{Accepted: 300, Concluded: 301, Written: 301}:            false,
		{}: false,
	} {
		if got := d.addUp(); got != want {
			t.Errorf("%+v adds up: %v", d, got)
		}
	}
}

func TestPlan(t *testing.T) {
	t.Parallel()
	all := catalog()
	byName := map[string]fault{}
	for _, f := range all {
		if f.name == "" || f.doc == "" || f.part == "" || f.begin == nil || f.min <= 0 || f.max < f.min || (f.gap > 0) == (f.back > 0) {
			t.Errorf("fault %q is not whole", f.name)
		}
		byName[f.name] = f
	}
	if len(byName) != len(all) {
		t.Error("two faults have one name")
	}
	used := map[string]int{}
	for seed := range uint64(200) {
		steps := plan(seed, 10*time.Minute, all)
		if !slices.Equal(steps, plan(seed, 10*time.Minute, all)) {
			t.Fatalf("seed %d: the schedule cannot be repeated", seed)
		}
		if seed > 0 && slices.Equal(steps, plan(seed-1, 10*time.Minute, all)) {
			t.Fatalf("seeds %d and %d have one schedule", seed-1, seed)
		}
		if len(steps) < 100 {
			t.Errorf("seed %d: %d faults in ten minutes", seed, len(steps))
		}
		until := map[string]time.Duration{}
		for i, st := range steps {
			f := byName[st.Name]
			used[st.Name]++
			if i > 0 && st.At < steps[i-1].At || st.At < until[f.part] {
				t.Fatalf("seed %d: %s at %v overlaps a fault of %s", seed, st.Name, st.At, f.part)
			}
			if st.For < f.min || st.For > f.max || st.At+st.For > 10*time.Minute || f.before > 0 && st.At > 3*time.Minute {
				t.Fatalf("seed %d: %s at %v for %v", seed, st.Name, st.At, st.For)
			}
			until[f.part] = st.At + st.For
		}
	}
	if len(used) != len(all) {
		t.Errorf("only %d of %d faults came up", len(used), len(all))
		for name := range maps.Keys(byName) {
			if used[name] == 0 {
				t.Error(name, "never")
			}
		}
	}
}

func TestChoose(t *testing.T) {
	t.Parallel()
	for names, want := range map[string]int{"kill-redis": 1, "vendor-*": 24, "nothing": 0} {
		if got := len(choose(catalog(), []string{names})); got != want {
			t.Errorf("%s: %d faults, want %d", names, got, want)
		}
	}
	if len(choose(catalog(), nil)) != len(catalog()) {
		t.Error("without names not all")
	}
}
