//go:build unix

package faults

import (
	"context"
	"fmt"
	"net/http"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// steadyEntry is one fault that was kept up, and what went on meanwhile.
type steadyEntry struct {
	Name     string   `json:"fault"`
	Posts    int      `json:"posts"`
	Accepted int      `json:"accepted"`
	Fetched  uint64   `json:"fetched"`
	Readable int      `json:"readable"`
	Missing  []string `json:"missing,omitempty"` // what should have gone on and did not
}

// settleWithin is what a fault that is kept up may take before the rest goes
// on: a new NATS leader takes most of it.
const settleWithin = 10 * time.Second

// promptly is how long a refusal may take, with a little for the client.
const promptly = 2*time.Second + 300*time.Millisecond

// keepUp has one fault for as long as the options say and measures what goes
// on after it settled.
func (r *runner) keepUp(ctx context.Context, f fault, pick uint64) {
	r.settled(ctx, 2*time.Minute)
	e := r.begin(ctx, f, pick)
	defer r.mend(ctx, e)
	if !sleep(ctx, settleWithin) {
		return
	}
	begin := time.Now()
	fetched, finished := r.fetched(ctx), r.readable()
	if !sleep(ctx, max(r.steady-settleWithin, 3*time.Second)) {
		return
	}
	end := time.Now()
	s := steadyEntry{Name: f.name, Fetched: r.fetched(ctx) - fetched, Readable: r.readable() - finished}
	sleep(ctx, 2*patience) // for the answers of what was posted at the end
	slow, other := 0, 0
	for _, p := range r.load.all() {
		if p.Want == "" || p.Sent.Before(begin) || p.Sent.After(end) {
			continue
		}
		s.Posts++
		if p.Answer == accepted {
			s.Accepted++
		}
		if p.Took > promptly {
			slow++
		}
		if p.Status != http.StatusServiceUnavailable {
			other++
		}
	}
	missing := func(format string, args ...any) { s.Missing = append(s.Missing, fmt.Sprintf(format, args...)) }
	enough := s.Posts * 8 / 10
	switch {
	case s.Posts == 0:
		missing("no post at all")
	case f.steady&accepts != 0 && s.Accepted < s.Posts*99/100:
		missing("%d of %d accepted", s.Accepted, s.Posts)
	}
	if f.steady&fetches != 0 && int(s.Fetched) < enough {
		missing("%d fetched for %d posts", s.Fetched, s.Posts)
	}
	if f.steady&persists != 0 && s.Readable < enough {
		missing("%d became readable for %d posts", s.Readable, s.Posts)
	}
	if f.steady&refuses != 0 && (slow > 0 || other > 0) {
		missing("of %d posts %d were answered after more than %v, %d otherwise than with 503", s.Posts, slow, promptly, other)
	}
	r.rep.Steady = append(r.rep.Steady, s)
}

// fetched returns how far FP_ENRICHED has got, 0 while that cannot be seen.
func (r *runner) fetched(ctx context.Context) (seq uint64) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_ = poll(ctx, func() error {
		st, err := r.sys.conn.JS.Stream(ctx, streams.StreamEnriched)
		if err == nil {
			seq = st.CachedInfo().State.LastSeq
		}
		return err //nolint:wrapcheck // asked again
	})
	return seq
}

func (r *runner) readable() int {
	finished, _, _ := r.watch.state()
	return finished
}
