// Package fingerprintsim is a double of the Fingerprint Server API v4 for
// tests and for the local stack. It answers GET /v4/events/{id} as the vendor
// does, checks the key, can hold a true rate limit, and fails on request: for
// every id, for one id once, a few times or always.
//
//	sim := fingerprintsim.New(fingerprintsim.Options{Key: "secret"})
//	srv := httptest.NewServer(sim)
//	sim.Script("1708102555327.NLOjmg", fingerprintsim.Fault{Status: 404}, fingerprintsim.Fault{Status: 404})
//
// While it runs it is controlled over HTTP as well, without a key:
//
//	curl $SIM/sim/stats
//	curl -X PUT $SIM/sim/fault -d '{"status":503}'                       # every call
//	curl -X PUT $SIM/sim/fault -d '{"status":429,"retry_after":"2"}'
//	curl -X PUT $SIM/sim/fault -d '{"hang":true}'                        # or "reset":true
//	curl -X PUT $SIM/sim/fault -d '{"delay":"1.5s"}'                     # slow, but right
//	curl -X PUT $SIM/sim/fault -d '{"garbage":"truncated"}'              # empty, html, other_id, oversize, drip, cut
//	curl -X PUT $SIM/sim/fault -d '{"status":403,"garbage":"html"}'      # a gateway's page
//	curl -X PUT $SIM/sim/fault -d '{"status":403,"body":"{\"error\":\"forbidden\"}"}'
//	curl -X PUT $SIM/sim/fault -d null                                   # healthy again
//	curl -X PUT $SIM/sim/fault/ID -d '[{"status":404},{"status":404}]'   # one a call, then normal
//	curl -X PUT $SIM/sim/fault/ID -d '{"status":404}'                    # always; null clears
//	curl -X PUT $SIM/sim/rate -d '{"rate":5,"burst":15}'                 # calls a second; 0 is no limit
//	curl -X PUT $SIM/sim/key -d '"secret"'                               # the key to require
//	curl -X PUT $SIM/sim/latency -d '{"latency":"80ms","jitter":"40ms"}'
package fingerprintsim

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/json"
	"maps"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Options configure a Sim. The zero value is a fast, healthy, unlimited vendor
// that accepts any key.
type Options struct {
	// Key is the secret key to require. Empty accepts any key, but not none.
	Key string
	// Every answer takes Latency and, at random, up to Jitter more.
	Latency, Jitter time.Duration
	// Rand makes the jitter repeatable; nil seeds it at random.
	Rand rand.Source
	// Rate is the true limit in calls per second, with bursts of Burst;
	// 0 is no limit. The vendor's default is 5 with bursts of 15.
	Rate  float64
	Burst int
}

// Sim is the double. It is safe for concurrent use.
type Sim struct {
	mux *http.ServeMux

	mu       sync.Mutex
	key      string
	latency  time.Duration
	jitter   time.Duration
	rand     *rand.Rand
	limiter  *rate.Limiter // nil for no limit
	fault    *Fault
	events   map[string]*event
	calls    int
	statuses map[int]int
}

// event is what is known about one id.
type event struct {
	at     time.Time
	calls  int
	script []Fault
	always *Fault
}

// New returns a Sim.
func New(o Options) *Sim {
	if o.Rand == nil {
		o.Rand = rand.NewPCG(rand.Uint64(), rand.Uint64())
	}
	s := &Sim{
		mux:      http.NewServeMux(),
		key:      o.Key,
		latency:  o.Latency,
		jitter:   o.Jitter,
		rand:     rand.New(o.Rand),
		events:   map[string]*event{},
		statuses: map[int]int{},
	}
	s.SetRate(o.Rate, o.Burst)
	s.mux.HandleFunc("GET /v4/events/{id}", s.serveEvent)
	s.handleControl()
	return s
}

// ServeHTTP implements http.Handler.
func (s *Sim) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// SetFault makes every call fail that has no fault of its own; nil ends it.
func (s *Sim) SetFault(f *Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// Script makes the next calls for id fail, one fault a call; a zero Fault
// among them is a normal answer. It replaces an earlier script.
func (s *Sim) Script(id string, faults ...Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.event(id).script = faults
}

// Always makes every call for id fail that its script does not cover. With the
// zero Fault the id is answered normally, whatever SetFault says.
func (s *Sim) Always(id string, f Fault) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.event(id).always = &f
}

// Clear takes back Script and Always for id.
func (s *Sim) Clear(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.event(id)
	e.script, e.always = nil, nil
}

// SetRate replaces the limit, in calls per second; 0 is no limit. A burst
// below 1 becomes three times the rate, as at the vendor.
func (s *Sim) SetRate(perSecond float64, burst int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.limiter = nil
	if perSecond > 0 {
		if burst < 1 {
			burst = max(int(3*perSecond), 1)
		}
		s.limiter = rate.NewLimiter(rate.Limit(perSecond), burst)
	}
}

// SetKey replaces the secret key to require, as when it is rotated.
func (s *Sim) SetKey(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key = key
}

// SetLatency replaces the time an answer takes.
func (s *Sim) SetLatency(latency, jitter time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.latency, s.jitter = latency, jitter
}

// Calls returns the number of calls for events, refused ones included.
func (s *Sim) Calls() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

// CallsFor returns the number of calls for one id.
func (s *Sim) CallsFor(id string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.events[id]; e != nil {
		return e.calls
	}
	return 0
}

// CountsByStatus returns the calls by status decided on; 0 stands for calls
// that get no answer. A call counts on arrival, before its latency.
func (s *Sim) CountsByStatus() map[int]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.statuses)
}

// event returns what is known about id, which is kept for good: an id is
// answered with the same bytes every time. s.mu is held.
func (s *Sim) event(id string) *event {
	e := s.events[id]
	if e == nil {
		e = &event{at: identifiedAt(id, time.Now())}
		s.events[id] = e
	}
	return e
}

// serveEvent answers GET /v4/events/{id}.
func (s *Sim) serveEvent(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	f, at, wait := s.next(id, r.Header.Get("Authorization"))
	select {
	case <-time.After(wait):
		f.serve(w, r, id, at)
	case <-r.Context().Done():
	}
}

// next decides on a call for id and counts it.
func (s *Sim) next(id, authorization string) (f Fault, at time.Time, wait time.Duration) {
	key, _ := strings.CutPrefix(authorization, "Bearer ")
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.event(id)
	switch {
	case key == "":
		f = Fault{Status: http.StatusForbidden, Code: "secret_api_key_required"}
	case s.key != "" && key != s.key:
		f = Fault{Status: http.StatusForbidden, Code: "secret_api_key_not_found"}
	case s.limiter != nil && !s.limiter.Allow():
		f = Fault{Status: http.StatusTooManyRequests}
	case len(e.script) > 0:
		f, e.script = e.script[0], e.script[1:]
	case e.always != nil:
		f = *e.always
	case s.fault != nil:
		f = *s.fault
	case !plain(id):
		f = Fault{Status: http.StatusBadRequest}
	}
	wait = s.latency + f.Delay
	if s.jitter > 0 {
		wait += time.Duration(s.rand.Int64N(int64(s.jitter)))
	}
	s.calls++
	e.calls++
	s.statuses[f.status()]++
	return f, e.at, wait
}

// plain reports whether id is made of what the vendor's ids are made of. What
// the real API says about other ids is not known; here it is a 400.
func plain(id string) bool {
	return !strings.ContainsFunc(id, func(r rune) bool {
		return !('0' <= r && r <= '9' || 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z' || strings.ContainsRune("._-", r))
	})
}

// identifiedAt returns the time an id was made. The vendor's own ids begin
// with it, in Unix milliseconds of 13 digits; others are taken to be as old as
// a browser's way to the first call.
func identifiedAt(id string, now time.Time) time.Time {
	prefix, _, _ := strings.Cut(id, ".")
	if ms, err := strconv.ParseInt(prefix, 10, 64); err == nil && len(prefix) == 13 && ms > 0 {
		return time.UnixMilli(ms)
	}
	return now.Add(-1500 * time.Millisecond)
}

//go:embed event.json
var eventJSON []byte

// eventTemplate is event.json without white space, as the vendor sends it.
var eventTemplate = func() string {
	var b bytes.Buffer
	if err := json.Compact(&b, eventJSON); err != nil {
		panic(err) // the embedded file is not JSON
	}
	return b.String()
}()

// Event returns the event the simulator answers for id when the browser was
// identified at the given time: about 6 KB in the form of the vendor's v4, with
// a visitor id that follows from id.
func Event(id string, at time.Time) []byte {
	return []byte(strings.NewReplacer(
		"{{event_id}}", id,
		"{{visitor_id}}", visitorID(id),
		"1700000000000", strconv.FormatInt(at.UnixMilli(), 10),
	).Replace(eventTemplate))
}

// visitorID returns 20 alphanumerics, the form of the vendor's.
func visitorID(id string) string {
	const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	sum := sha256.Sum256([]byte(id))
	b := make([]byte, 20)
	for i := range b {
		b[i] = alphabet[int(sum[i])%len(alphabet)]
	}
	return string(b)
}
