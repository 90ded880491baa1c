//go:build unix

package faults

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// class is what became of a post, or what is wrong with a record: the classes
// of Jepsen's queue tests, and what a pipeline can do wrong beyond them.
type class string

const (
	ok        class = "ok"        // accepted, and at its right end
	recovered class = "recovered" // not accepted as far as the client knows, and at its right end
	unknown   class = "unknown"   // not accepted as far as the client knows, and nowhere
	rejected  class = "rejected"  // refused for good, and nowhere

	lost       class = "lost"       // accepted, and nowhere; or stored, and without an end
	stuck      class = "stuck"      // stored, and still not at its end
	unexpected class = "unexpected" // there, and nobody had handed it in, or it was refused
	wrong      class = "wrong"      // ended otherwise than the vendor says
	foreign    class = "foreign"    // under an id of another subscriber's
	backwards  class = "backwards"  // replaced by something worse
	givenUp    class = "given up"   // dead-lettered although nothing was wrong with it

	duplicate class = "duplicate" // the same effect twice; seen by nobody but counted
	overtaken class = "overtaken" // another subscriber's event accepted later was the first to be written
)

// classes lists them in the order of the report.
func classes() []class {
	return []class{ok, recovered, unknown, rejected, duplicate, overtaken, lost, stuck, unexpected, wrong, foreign, backwards, givenUp}
}

// bad reports whether one of a class fails the run.
func (c class) bad() bool {
	switch c {
	case ok, recovered, unknown, rejected, duplicate, overtaken:
		return false
	}
	return true
}

// finding is one thing worth a line in the report.
type finding struct {
	Class class  `json:"class"`
	ID    string `json:"request_id"`
	Text  string `json:"text"`
}

// event identifies what a client handed in.
type event struct {
	ID            string
	Subscriber    int64
	Session, User string
}

func (p *post) event() event { return event{p.ID, p.Subscriber, p.Session, p.User} }

// stored is a message of FP_INGEST.
type stored struct {
	event
	AcceptedAt time.Time
}

// final is a record at the end.
type final struct {
	event
	Status     record.Status
	AcceptedAt time.Time
	// Right is whether the vendor's data are those of this id.
	Right bool
}

// deadLetter is a message of FP_DEAD; event is empty when it holds none.
type deadLetter struct {
	event
	Reason string
	Stream string
	Seq    uint64
}

// place is a message's in a stream.
type place struct {
	Stream string
	Seq    uint64
}

// history is everything a run leaves behind.
type history struct {
	Posts   []*post
	Stored  []stored
	Records map[string]final // by request id
	Dead    []deadLetter
	Poison  []place // messages planted that are no events
	// Repeated is how many messages of FP_ENRICHED have the id of another.
	Repeated int
	// Waiting is how many messages the stages had not finished at the end.
	Waiting uint64
	// Losses are the times at which Redis lost data. To whom an id posted by
	// two subscribers belongs is settled anew by what is replayed first.
	Losses []time.Time
	// First is whose record was written first since then, by request id.
	First map[string]int64
	// Seen are findings of the watch, and in what Redis wrote down.
	Seen []finding
}

// verdict is the judgement on a history.
type verdict struct {
	Counts   map[class]int `json:"counts"`
	Findings []finding     `json:"findings,omitempty"`
	// Sum is where every stored event ended.
	Sum conservation `json:"conservation"`
}

// conservation is the sum that must come out: Stored is all the others
// together.
type conservation struct {
	Stored     int `json:"stored"`
	Ready      int `json:"ready"`
	Negative   int `json:"negative"`
	Superseded int `json:"superseded"`
	Dead       int `json:"dead_without_record"`
	Waiting    int `json:"waiting"`
	Missing    int `json:"missing"`
}

func (v verdict) failed() bool {
	return slices.ContainsFunc(classes(), func(c class) bool { return c.bad() && v.Counts[c] > 0 })
}

func (v *verdict) add(c class, id, format string, args ...any) {
	v.Counts[c]++
	if c.bad() {
		v.Findings = append(v.Findings, finding{c, id, fmt.Sprintf(format, args...)})
	}
}

// check judges a history. Every post gets one class; a record or a dead letter
// that is wrong is counted on top.
func check(h history) verdict {
	v := verdict{Counts: map[class]int{}}
	for _, f := range h.Seen {
		v.add(f.Class, f.ID, "%s", f.Text)
	}
	posts := map[event][]*post{}
	want := map[string]record.Status{}
	for _, p := range h.Posts {
		posts[p.event()] = append(posts[p.event()], p)
		if p.Want != "" {
			want[p.ID] = p.Want
		}
	}
	byID := map[string][]stored{}
	for _, s := range h.Stored {
		byID[s.ID] = append(byID[s.ID], s)
	}
	for id := range byID { // by acceptance
		slices.SortFunc(byID[id], func(a, b stored) int { return a.AcceptedAt.Compare(b.AcceptedAt) })
	}
	dead := v.checkDead(h, posts)

	// What became of each stored event.
	ended := map[event]class{}
	for id, all := range byID {
		rec, exists := h.Records[id]
		if exists {
			v.checkRecord(rec, all, want[id], h)
		}
		times := map[event]int{}
		for _, s := range all {
			times[s.event]++
			v.Sum.Stored++
			c := v.fate(h, s, rec, exists, dead)
			if times[s.event] > 1 {
				v.Counts[duplicate]++
			} else {
				ended[s.event] = c
			}
			if _, handedIn := posts[s.event]; !handedIn {
				v.add(unexpected, id, "FP_INGEST holds an event that nobody handed in")
			}
		}
	}
	for id := range h.Records {
		if byID[id] == nil {
			v.add(unexpected, id, "there is a record, and FP_INGEST holds nothing of this id")
		}
	}
	v.Counts[duplicate] += h.Repeated

	for e, all := range posts {
		c, isStored := ended[e]
		for _, p := range all {
			switch {
			case !isStored && p.Answer == accepted:
				v.add(lost, e.ID, "answered 202 at %s, and FP_INGEST does not hold it", p.Done.Format(time.RFC3339Nano))
			case !isStored && p.Answer == refused && p.Want != "":
				v.add(wrong, e.ID, "refused with %d although nothing was wrong with it", p.Status)
			case !isStored && p.Answer == refused:
				v.add(rejected, e.ID, "")
			case !isStored:
				v.add(unknown, e.ID, "")
			case p.Answer == refused && !slices.ContainsFunc(all, func(p *post) bool { return p.Answer != refused }):
				v.add(unexpected, e.ID, "refused with %d, and stored all the same", p.Status)
			case c != ok:
				v.add(c, e.ID, "%s", v.why(c, p))
			case p.Answer == unsure:
				v.add(recovered, e.ID, "")
			default:
				v.add(ok, e.ID, "")
			}
		}
	}
	slices.SortFunc(v.Findings, func(a, b finding) int { return cmp.Or(cmp.Compare(a.Class, b.Class), cmp.Compare(a.ID, b.ID)) })
	return v
}

func (*verdict) why(c class, p *post) string {
	if c == stuck {
		return fmt.Sprintf("%s at %s, and not at its end yet", p.Answer, p.Done.Format(time.RFC3339Nano))
	}
	return fmt.Sprintf("%s at %s and stored, but there is neither a record nor a dead letter, and nothing waits", p.Answer, p.Done.Format(time.RFC3339Nano))
}

// fate returns where a stored event ended: ok, lost or stuck. It adds to the
// sum.
func (v *verdict) fate(h history, s stored, rec final, exists bool, dead map[event]bool) class {
	switch {
	case exists && rec.Status.Terminal() && rec.event == s.event && rec.AcceptedAt.Equal(s.AcceptedAt):
		if rec.Status == record.Ready {
			v.Sum.Ready++
		} else {
			v.Sum.Negative++
		}
		return ok
	case exists && rec.Status.Terminal() && rec.Subscriber == s.Subscriber && rec.AcceptedAt.After(s.AcceptedAt):
		v.Sum.Superseded++
		return ok
	case dead[s.event]:
		v.Sum.Dead++
		return ok
	case h.Waiting > 0:
		v.Sum.Waiting++
		return stuck
	case exists && rec.Status.Terminal() && rec.Subscriber == s.Subscriber:
		v.Sum.Superseded++ // by something older: checkRecord says so
		return ok
	}
	v.Sum.Missing++
	return lost
}

// checkRecord judges a record by what FP_INGEST holds of its id, in the order
// of acceptance, and by what the vendor knows.
func (v *verdict) checkRecord(rec final, all []stored, want record.Status, h history) {
	newest := -1
	for i, s := range all {
		if s.event == rec.event && s.AcceptedAt.Equal(rec.AcceptedAt) {
			newest = i
		}
	}
	owner, ok := h.First[rec.ID]
	if !ok {
		v.add(unexpected, rec.ID, "there is a record, and Redis wrote none down")
	}
	if owner != all[0].Subscriber && !slices.ContainsFunc(h.Losses, func(t time.Time) bool { return t.After(all[0].AcceptedAt) }) {
		v.Counts[overtaken]++
	}
	switch {
	case newest < 0 && !slices.ContainsFunc(all, func(s stored) bool { return s.Subscriber == rec.Subscriber }):
		v.add(foreign, rec.ID, "the record is subscriber %d's, who never handed in this id", rec.Subscriber)
	case newest < 0:
		v.add(unexpected, rec.ID, "the record is of no event that FP_INGEST holds")
	case rec.Subscriber != owner:
		v.add(foreign, rec.ID, "the record is subscriber %d's and the id was subscriber %d's before", rec.Subscriber, owner)
	case slices.ContainsFunc(all[newest+1:], func(s stored) bool { return s.Subscriber == rec.Subscriber }):
		v.add(backwards, rec.ID, "the record is of %s, and a newer event of the same subscriber was accepted", rec.AcceptedAt.Format(time.RFC3339Nano))
	case !rec.Status.Terminal(): // fate judges that
	case rec.Status != want:
		v.add(wrong, rec.ID, "the record is %s, and the vendor says %s", rec.Status, want)
	case rec.Status == record.Ready && !rec.Right:
		v.add(wrong, rec.ID, "the record does not hold the vendor's event of this id")
	}
}

// checkDead judges the dead letters, and returns the events that rightly ended
// there.
func (v *verdict) checkDead(h history, posts map[event][]*post) map[event]bool {
	const foreignReason, undecodableReason = "foreign_subscriber", "undecodable"
	dead := map[event]bool{}
	there := map[place]bool{}
	subscribers := map[string]map[int64]bool{}
	for e := range posts {
		if subscribers[e.ID] == nil {
			subscribers[e.ID] = map[int64]bool{}
		}
		subscribers[e.ID][e.Subscriber] = true
	}
	for _, d := range h.Dead {
		there[place{d.Stream, d.Seq}] = true
		switch {
		case d.Reason == undecodableReason && d.event == (event{}) && len(h.Poison) > 0:
		case posts[d.event] == nil:
			v.add(unexpected, d.ID, "a dead letter (%s) of an event that nobody handed in", d.Reason)
		case d.Reason == foreignReason && len(subscribers[d.ID]) > 1:
			dead[d.event] = true
		default:
			dead[d.event] = true
			v.add(givenUp, d.ID, "dead-lettered as %s", d.Reason)
		}
	}
	for _, p := range h.Poison {
		if !there[p] {
			v.add(lost, "", "message %d of %s was no event, and there is no dead letter of it", p.Seq, p.Stream)
		}
	}
	return dead
}
