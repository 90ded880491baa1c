//go:build unix

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// answer is what a client knows about its event in the end.
type answer string

const (
	accepted answer = "accepted" // 202
	refused  answer = "refused"  // 400, 401: it must not be stored
	unsure   answer = "unsure"   // 503 or none: it may have been stored
)

// post is one event handed in by a client, and what became of it there.
type post struct {
	ID         string
	Subscriber int64
	Session    string
	User       string
	// Want is how its record is to end; empty for one that is to be refused.
	Want record.Status
	// Late is set when the vendor does not know it at first.
	Late bool

	Sent, Done time.Time
	Answer     answer
	// Status and Took are those of the first try, 0 for no answer.
	Status int
	Took   time.Duration
	Tries  int
}

// patience is how long a client waits for an answer.
const patience = 2500 * time.Millisecond

// mostUnderWay bounds the posts under way, which only matters when edges do
// not answer at all.
const mostUnderWay = 8192

// load is open-loop clients: they post at a rate, whether or not answers come,
// try once more at the other edge, and write everything down.
type load struct {
	sys     *system
	seed    uint64
	watch   *watch
	http    *http.Client
	avoid   [replicas]atomic.Int64 // until when, Unix ns: as a load balancer would
	turn    atomic.Uint64
	sent    atomic.Int64
	ok      atomic.Int64
	latest  atomic.Int64 // time of the latest 202, Unix ns
	working sync.WaitGroup

	mu     sync.Mutex
	posts  []*post
	recent []*post // accepted ones, for duplicates
}

func newLoad(s *system, seed uint64, w *watch) *load {
	return &load{sys: s, seed: seed, watch: w, http: &http.Client{
		Timeout: patience, Transport: &http.Transport{MaxIdleConnsPerHost: 512, MaxIdleConns: 2048},
	}}
}

// run posts until ctx is done; plain ones alone, or also those that are
// duplicates, changed, foreign, unknown to the vendor, late there or invalid.
// It returns when every post has its answer.
func (l *load) run(ctx context.Context, rate float64, plain bool) {
	places := make(chan struct{}, mostUnderWay)
	begin := time.Now()
	for n := 1; ; n++ {
		due := begin.Add(time.Duration(float64(n) / rate * float64(time.Second)))
		if d := time.Until(due); d > 0 && !sleep(ctx, d) || ctx.Err() != nil {
			break
		}
		places <- struct{}{}
		l.working.Go(func() {
			defer func() { <-places }()
			l.one(due, plain)
		})
	}
	l.working.Wait()
}

// one makes and sends the next post. What it is follows from the seed.
func (l *load) one(due time.Time, plain bool) {
	n := l.sent.Add(1)
	r := rand.New(rand.NewPCG(l.seed, uint64(n)))
	p := &post{
		ID: fmt.Sprintf("%d.%06s", time.Now().UnixMilli(), strconv.FormatInt(n, 36)), Subscriber: 10 + r.Int64N(20),
		Session: "session-" + strconv.FormatInt(n, 10), User: fmt.Sprintf("user-%d@example.com", n), Want: record.Ready, Sent: due,
	}
	p.ID = strings.ReplaceAll(p.ID, " ", "0")
	body, key, ctx := "", l.sys.key(), context.Background()
	if !plain {
		switch x := r.IntN(1000); {
		case x < 30: // the same again
			if old := l.old(r); old != nil {
				p.ID, p.Subscriber, p.Session, p.User, p.Want = old.ID, old.Subscriber, old.Session, old.User, old.Want
			}
		case x < 40: // the same id with other content: the newer stands
			if old := l.old(r); old != nil {
				p.ID, p.Subscriber = old.ID, old.Subscriber
			}
		case x < 45: // somebody else's id
			if old := l.old(r); old != nil {
				p.ID, p.Subscriber = old.ID, old.Subscriber+100
			}
		case x < 65: // there only later, and then for sure: with a fault of the vendor's on top it might count as never there
			p.Late = true
			_ = errors.Join(l.sys.sim(ctx, "fault/"+p.ID, `{}`), l.sys.sim(ctx, "fault/"+p.ID, `[{"status":404},{"status":404}]`)) // else it is there at once
		case x < 70: // never there
			p.Want = l.told(p.ID, `{"status":404}`, record.NotFound)
		case x < 73:
			p.Want = l.told(p.ID, `{"status":400}`, record.Rejected)
		case x < 76:
			p.Want, body = "", fmt.Sprintf(`{"request_id":%q,"subscriber_id":%d,"session_id":%q}`, p.ID, p.Subscriber, p.Session)
		case x < 80:
			p.Want, key = "", "fpk_live_guess"
		}
	}
	if body == "" {
		b, _ := json.Marshal(map[string]any{"request_id": p.ID, "subscriber_id": p.Subscriber, "session_id": p.Session, "user_id": p.User}) // cannot fail
		body = string(b)
	}
	l.send(p, body, key)
	p.Done = time.Now()
	if p.Answer == accepted {
		l.ok.Add(1)
		l.latest.Store(p.Done.UnixNano())
		l.watch.add(p)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.posts = append(l.posts, p)
	if p.Answer == accepted && p.Want == record.Ready {
		l.recent = append(l.recent, p)
		if len(l.recent) > 4000 {
			l.recent = append(l.recent[:0], l.recent[2000:]...)
		}
	}
}

// told has the vendor answer for an id in that way, and returns how its record
// is to end. It takes until the vendor has heard: when that is not sure,
// neither is the record's end.
func (l *load) told(id, fault string, want record.Status) record.Status {
	_ = poll(context.Background(), func() error { return l.sys.sim(context.Background(), "fault/"+id, fault) })
	return want
}

// old returns an earlier post whose record is there by now, unless nothing is.
func (l *load) old(r *rand.Rand) *post {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.recent) == 0 {
		return nil
	}
	p := l.recent[r.IntN(len(l.recent))]
	if time.Since(p.Done) < 3*time.Second {
		return nil
	}
	return p
}

// send posts a body to one edge, and once more to the other if need be.
func (l *load) send(p *post, body, key string) {
	p.Answer = unsure
	at := int(l.turn.Add(1) % replicas)
	for try := range 2 {
		if now := time.Now().UnixNano(); l.avoid[at].Load() > now && l.avoid[(at+1)%replicas].Load() <= now {
			at = (at + 1) % replicas
		}
		begin := time.Now()
		status := l.try(at, body, key)
		if try == 0 {
			p.Status, p.Took = status, time.Since(begin)
		}
		p.Tries++
		switch {
		case status == http.StatusAccepted:
			p.Answer = accepted
			return
		case status >= 400 && status < 500:
			if try == 0 { // else it may have been stored by the first
				p.Answer = refused
			}
			return
		case status == 0:
			l.avoid[at].Store(time.Now().Add(time.Second).UnixNano())
		}
		at = (at + 1) % replicas
	}
}

// try returns the status, 0 when there was no whole answer.
func (l *load) try(at int, body, key string) int {
	req, err := http.NewRequest(http.MethodPost, "http://"+l.sys.edgeAddrs[at]+"/fingerprint/ingest", strings.NewReader(body))
	if err != nil {
		return 0
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", key)
	resp, err := l.http.Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return 0
	}
	return resp.StatusCode
}

// all returns the posts that have their answer.
func (l *load) all() []*post {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]*post(nil), l.posts...)
}
