package prefetcher

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
)

const (
	// secretKey and private must not show up in any error.
	secretKey = "sk_Qm7secret"
	private   = "jane@example.com"
)

// vendor serves h and returns a client of it whose calls may take timeout.
func vendor(t *testing.T, h http.Handler, timeout time.Duration) *Fingerprint {
	t.Helper()
	srv := httptest.NewUnstartedServer(h)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.Start()
	t.Cleanup(srv.Close)
	return client(srv.URL, timeout)
}

func client(baseURL string, timeout time.Duration) *Fingerprint {
	return NewFingerprint(baseURL, func() string { return secretKey }, timeout, 4)
}

// ask makes one call and checks what holds for every answer.
func ask(t *testing.T, f *Fingerprint) Answer {
	t.Helper()
	a := f.Event(t.Context(), sampleID)
	checkAnswer(t, a)
	return a
}

func checkAnswer(t *testing.T, a Answer) {
	t.Helper()
	if (a.Outcome == Found) != (a.Err == nil) || (a.Outcome == Found) != (a.Body != nil) {
		t.Errorf("outcome %v with error %v and a body of %d bytes", a.Outcome, a.Err, len(a.Body))
	}
	if a.Err == nil {
		return
	}
	for _, s := range []string{secretKey, private, sampleID} {
		if strings.Contains(a.Err.Error(), s) {
			t.Errorf("error contains %q: %v", s, a.Err)
		}
	}
}

func TestEventFound(t *testing.T) {
	t.Parallel()
	sim := fingerprintsim.New(fingerprintsim.Options{Key: secretKey})
	a := ask(t, vendor(t, sim, 5*time.Second))
	if a.Outcome != Found {
		t.Fatalf("outcome %v, want found: %v", a.Outcome, a.Err)
	}
	body := fingerprintsim.Event(sampleID, sampleAt)
	if diff := cmp.Diff(string(body), string(a.Body)); diff != "" {
		t.Errorf("body is not the vendor's (-want +got):\n%s", diff)
	}
	want, err := Project(body)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, a.Projection); diff != "" {
		t.Errorf("projection differs (-want +got):\n%s", diff)
	}
	if a.Status != http.StatusOK || a.Code != "" || a.RetryAfter != 0 {
		t.Errorf("status %d, code %q, retry after %v", a.Status, a.Code, a.RetryAfter)
	}
}

func TestEventRequest(t *testing.T) {
	t.Parallel()
	var got *http.Request
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		w.WriteHeader(http.StatusNotFound)
	}))
	t.Cleanup(srv.Close)
	a := client(srv.URL+"/", 5*time.Second).Event(t.Context(), "1A_b-3.x")
	if a.Outcome != NotFound {
		t.Fatalf("outcome %v: %v", a.Outcome, a.Err)
	}
	if got.Method != http.MethodGet || got.RequestURI != "/v4/events/1A_b-3.x" {
		t.Errorf("%s %s", got.Method, got.RequestURI)
	}
	if ua := got.UserAgent(); !strings.HasPrefix(ua, "fingerprint-prefetch/") || strings.HasSuffix(ua, "/") {
		t.Errorf("User-Agent: %s", ua)
	}
	got.Header.Del("User-Agent")
	want := http.Header{"Authorization": {"Bearer " + secretKey}, "Accept": {"application/json"}}
	if diff := cmp.Diff(want, got.Header); diff != "" {
		t.Errorf("headers (-want +got):\n%s", diff)
	}
}

func TestEventAsksForTheKeyEveryTime(t *testing.T) {
	t.Parallel()
	sim := fingerprintsim.New(fingerprintsim.Options{Key: "new"})
	srv := httptest.NewServer(sim)
	t.Cleanup(srv.Close)
	key := "old"
	f := NewFingerprint(srv.URL, func() string { return key }, 5*time.Second, 1)
	for _, tt := range []struct {
		key  string
		want Outcome
	}{{"old", Misconfigured}, {"new", Found}, {"", Misconfigured}, {"new\nnew", Misconfigured}} {
		key = tt.key
		if a := ask(t, f); a.Outcome != tt.want {
			t.Errorf("key %q: outcome %v, want %v: %v", tt.key, a.Outcome, tt.want, a.Err)
		}
	}
	if n := sim.Calls(); n != 3 {
		t.Errorf("%d calls, want 3: a key that cannot be sent is not", n)
	}
}

func TestEventStatus(t *testing.T) {
	t.Parallel()
	object := func(code string) string {
		return fmt.Sprintf(`{"error":{"code":%q,"message":"%s said so"}}`, code, private)
	}
	const page = "<html>" + private + "</html>"
	type reply struct {
		status            int
		contentType, body string
		header            string // Retry-After
	}
	tests := map[string]struct {
		reply reply
		want  Answer // Outcome, Code and RetryAfter
	}{
		"404":                          {reply{404, "application/json", object("event_not_found"), ""}, Answer{Outcome: NotFound, Code: "event_not_found"}},
		"404 old code":                 {reply{404, "application/json", object("request_not_found"), ""}, Answer{Outcome: NotFound, Code: "request_not_found"}},
		"404 string form":              {reply{404, "application/json", `{"error":"event_not_found"}`, ""}, Answer{Outcome: NotFound, Code: "event_not_found"}},
		"404 free text":                {reply{404, "application/json", `{"error":"` + private + `"}`, ""}, Answer{Outcome: NotFound}},
		"404 no body":                  {reply{404, "", "", ""}, Answer{Outcome: NotFound}},
		"404 page":                     {reply{404, "text/html; charset=utf-8", page, ""}, Answer{Outcome: Transient}},
		"400 id":                       {reply{400, "application/json", object("request_cannot_be_parsed"), ""}, Answer{Outcome: Rejected, Code: "request_cannot_be_parsed"}},
		"400 read timeout":             {reply{400, "application/json", object("request_read_timeout"), ""}, Answer{Outcome: Transient, Code: "request_read_timeout"}},
		"400 ruleset":                  {reply{400, "application/json", object("ruleset_not_found"), ""}, Answer{Outcome: Misconfigured, Code: "ruleset_not_found"}},
		"400 unknown code":             {reply{400, "application/json", object(private), ""}, Answer{Outcome: Transient}},
		"400 page":                     {reply{400, "text/html", page, ""}, Answer{Outcome: Transient}},
		"403 secret_api_key_required":  {reply{403, "application/json", object("secret_api_key_required"), ""}, Answer{Outcome: Misconfigured, Code: "secret_api_key_required"}},
		"403 secret_api_key_not_found": {reply{403, "application/json", object("secret_api_key_not_found"), ""}, Answer{Outcome: Misconfigured, Code: "secret_api_key_not_found"}},
		"403 subscription_not_active":  {reply{403, "application/json", object("subscription_not_active"), ""}, Answer{Outcome: Misconfigured, Code: "subscription_not_active"}},
		"403 wrong_region":             {reply{403, "application/json", object("wrong_region"), ""}, Answer{Outcome: Misconfigured, Code: "wrong_region"}},
		"403 feature_not_enabled":      {reply{403, "application/json", object("feature_not_enabled"), ""}, Answer{Outcome: Misconfigured, Code: "feature_not_enabled"}},
		"403 code of another status":   {reply{403, "application/json", object("event_not_found"), ""}, Answer{Outcome: Transient, Code: "event_not_found"}},
		"403 unknown code":             {reply{403, "application/json", object("forbidden"), ""}, Answer{Outcome: Transient}},
		"403 page":                     {reply{403, "text/html", page, ""}, Answer{Outcome: Transient}},
		"401 with a documented code":   {reply{401, "application/json", object("secret_api_key_not_found"), ""}, Answer{Outcome: Misconfigured, Code: "secret_api_key_not_found"}},
		"401 page":                     {reply{401, "text/html", page, ""}, Answer{Outcome: Transient}},
		"429":                          {reply{429, "application/json", object("too_many_requests"), ""}, Answer{Outcome: Throttled, Code: "too_many_requests"}},
		"429 seconds":                  {reply{429, "application/json", `{"error":"too many requests"}`, "2"}, Answer{Outcome: Throttled, RetryAfter: 2 * time.Second}},
		"429 far":                      {reply{429, "", "", "86400"}, Answer{Outcome: Throttled, RetryAfter: time.Hour}},
		"429 past date":                {reply{429, "", "", "Mon, 02 Jan 2006 15:04:05 GMT"}, Answer{Outcome: Throttled}},
		"429 nonsense":                 {reply{429, "", "", "soon"}, Answer{Outcome: Throttled}},
		"429 page":                     {reply{429, "text/html", page, ""}, Answer{Outcome: Throttled}},
		"500":                          {reply{500, "application/json", object("failed"), ""}, Answer{Outcome: Transient, Code: "failed"}},
		"502 page":                     {reply{502, "text/html", page, ""}, Answer{Outcome: Transient}},
		"503 with Retry-After":         {reply{503, "application/json", object("service_unavailable"), "30"}, Answer{Outcome: Transient, Code: "service_unavailable", RetryAfter: 30 * time.Second}},
		"504":                          {reply{504, "application/json", object("failed"), ""}, Answer{Outcome: Transient, Code: "failed"}},
		"408":                          {reply{408, "", "", ""}, Answer{Outcome: Transient}},
		"405":                          {reply{405, "", "", ""}, Answer{Outcome: Transient}},
		"204":                          {reply{204, "", "", ""}, Answer{Outcome: Transient}},
		"500 long page":                {reply{500, "text/html", strings.Repeat(page, 1<<16), ""}, Answer{Outcome: Transient}},
		"500 error of another type":    {reply{500, "application/json", `{"error":["failed"]}`, ""}, Answer{Outcome: Transient}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := ask(t, vendor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", tt.reply.contentType)
				if tt.reply.header != "" {
					w.Header().Set("Retry-After", tt.reply.header)
				}
				w.WriteHeader(tt.reply.status)
				_, _ = io.WriteString(w, tt.reply.body)
			}), 5*time.Second))
			if got.Status != tt.reply.status {
				t.Errorf("status %d, want %d", got.Status, tt.reply.status)
			}
			got = Answer{Outcome: got.Outcome, Code: got.Code, RetryAfter: got.RetryAfter}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("answer differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	for v, want := range map[string]time.Duration{
		"":                              0,
		"0":                             0,
		"17":                            17 * time.Second,
		"3600":                          time.Hour,
		"3601":                          time.Hour,
		"4294967295":                    time.Hour,
		"-5":                            0,
		"1.5":                           0,
		"Tue, 24 Nov 2026 12:00:42 GMT": 42 * time.Second,
		"Tue, 24 Nov 2026 11:59:59 GMT": 0,
		"Wed, 25 Nov 2026 12:00:00 GMT": time.Hour,
	} {
		if got := retryAfter(v, now); got != want {
			t.Errorf("retryAfter(%q) = %v, want %v", v, got, want)
		}
	}
}

func TestEventMalformed(t *testing.T) {
	t.Parallel()
	event := fingerprintsim.Event(sampleID, sampleAt)
	var bomb bytes.Buffer
	z := gzip.NewWriter(&bomb)
	_, _ = z.Write(append(bytes.Repeat([]byte(" "), 16<<20), event...))
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		contentType, encoding string
		body                  []byte
	}{
		"empty":             {"application/json", "", nil},
		"truncated":         {"application/json", "", event[:len(event)/2]},
		"not an object":     {"application/json", "", []byte(`["` + private + `"]`)},
		"no event_id":       {"application/json", "", []byte(`{"timestamp":1,"linked_id":"` + private + `"}`)},
		"event_id a number": {"application/json", "", []byte(`{"event_id":1763958999000}`)},
		"other event_id":    {"application/json", "", fingerprintsim.Event(private, sampleAt)},
		"event_id's case":   {"application/json", "", fingerprintsim.Event(strings.ToUpper(sampleID), sampleAt)},
		"HTML":              {"text/html", "", []byte("<html>" + private + "</html>")},
		"event as HTML":     {"text/html; charset=utf-8", "", event},
		"broken type":       {"application/json; =" + private, "", event},
		"oversize":          {"application/json", "", append(bytes.Repeat([]byte(" "), maxEvent), event...)},
		"gzip bomb":         {"application/json", "gzip", bomb.Bytes()},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := ask(t, vendor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", tt.contentType)
				if tt.encoding != "" {
					w.Header().Set("Content-Encoding", tt.encoding)
				}
				_, _ = w.Write(tt.body)
			}), 5*time.Second))
			if a.Outcome != Malformed || a.Status != http.StatusOK {
				t.Errorf("outcome %v, status %d, want malformed, 200: %v", a.Outcome, a.Status, a.Err)
			}
		})
	}
}

func TestEventStillFound(t *testing.T) {
	t.Parallel()
	event := fingerprintsim.Event(sampleID, sampleAt)
	tests := map[string]struct {
		contentType string
		body, want  []byte
	}{
		"largest":          {"application/json", append(bytes.Repeat([]byte(" "), maxEvent-len(event)), event...), append(bytes.Repeat([]byte(" "), maxEvent-len(event)), event...)},
		"charset":          {"Application/JSON; charset=utf-8", event, event},
		"no content type":  {"", event, event},
		"lone surrogate":   {"application/json", []byte(`{"event_id":"` + sampleID + `","tags":"\ud800"}`), []byte(`{"event_id":"` + sampleID + `","tags":"\ud800"}`)},
		"broken UTF-8":     {"application/json", []byte(`{"event_id":"` + sampleID + "\",\"tags\":\"\xff\"}"), []byte(`{"event_id":"` + sampleID + "\",\"tags\":\"\uFFFD\"}")},
		"nothing but this": {"application/json", []byte(`{"event_id":"` + sampleID + `"}`), []byte(`{"event_id":"` + sampleID + `"}`)},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := ask(t, vendor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.Header()["Content-Type"] = nil // else net/http guesses one
				if tt.contentType != "" {
					w.Header().Set("Content-Type", tt.contentType)
				}
				_, _ = w.Write(tt.body)
			}), 5*time.Second))
			if a.Outcome != Found {
				t.Fatalf("outcome %v, want found: %v", a.Outcome, a.Err)
			}
			if !bytes.Equal(a.Body, tt.want) {
				t.Errorf("body of %d bytes is not the %d expected", len(a.Body), len(tt.want))
			}
		})
	}
}

func TestEventThroughTheSimulatorsFaults(t *testing.T) {
	t.Parallel()
	const soon = 200 * time.Millisecond
	tests := map[string]struct {
		fault fingerprintsim.Fault
		want  Outcome
	}{
		"hang":      {fingerprintsim.Fault{Hang: true}, Transient},
		"too slow":  {fingerprintsim.Fault{Delay: time.Minute}, Transient},
		"drip":      {fingerprintsim.Fault{Garbage: fingerprintsim.Drip}, Transient},
		"reset":     {fingerprintsim.Fault{Reset: true}, Transient},
		"cut":       {fingerprintsim.Fault{Garbage: fingerprintsim.Cut}, Transient},
		"truncated": {fingerprintsim.Fault{Garbage: fingerprintsim.Truncated}, Malformed},
		"other id":  {fingerprintsim.Fault{Garbage: fingerprintsim.OtherID}, Malformed},
		"oversize":  {fingerprintsim.Fault{Garbage: fingerprintsim.Oversize}, Malformed},
		"empty":     {fingerprintsim.Fault{Garbage: fingerprintsim.Empty}, Malformed},
		"html":      {fingerprintsim.Fault{Garbage: fingerprintsim.HTML}, Malformed},
		"html 403":  {fingerprintsim.Fault{Status: 403, Garbage: fingerprintsim.HTML}, Transient},
		"bad id":    {fingerprintsim.Fault{Status: 400}, Rejected},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := fingerprintsim.New(fingerprintsim.Options{})
			sim.SetFault(&tt.fault)
			timeout := 10 * time.Second
			if tt.want == Transient {
				timeout = soon
			}
			start := time.Now()
			a := ask(t, vendor(t, sim, timeout))
			if a.Outcome != tt.want {
				t.Errorf("outcome %v, want %v: %v", a.Outcome, tt.want, a.Err)
			}
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("took %v with a timeout of %v", d, timeout)
			}
		})
	}
}

func TestEventNotFoundThenFound(t *testing.T) {
	t.Parallel()
	sim := fingerprintsim.New(fingerprintsim.Options{})
	sim.Script(sampleID, fingerprintsim.Fault{Status: 404}, fingerprintsim.Fault{Status: 404})
	f := vendor(t, sim, 5*time.Second)
	for i, want := range []Outcome{NotFound, NotFound, Found} {
		if a := ask(t, f); a.Outcome != want {
			t.Errorf("call %d: outcome %v, want %v", i+1, a.Outcome, want)
		}
	}
}

func TestEventDoesNotFollowRedirects(t *testing.T) {
	t.Parallel()
	var visits atomic.Int32
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { visits.Add(1) }))
	t.Cleanup(other.Close)
	for _, location := range []string{other.URL, "/v4/events/" + private, "%zz" + private} {
		for _, status := range []int{301, 302, 303, 307, 308} {
			var calls atomic.Int32
			a := ask(t, vendor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				calls.Add(1)
				w.Header().Set("Location", location)
				w.WriteHeader(status)
			}), 5*time.Second))
			if a.Outcome != Transient || a.Status != status || calls.Load() != 1 {
				t.Errorf("%d to %s: outcome %v, status %d, %d calls", status, location, a.Outcome, a.Status, calls.Load())
			}
		}
	}
	if n := visits.Load(); n != 0 {
		t.Errorf("the other host was called %d times", n)
	}
}

// TestEventErrorsQuoteNothing lets the peer send back the key it was sent, in
// the places net/http quotes.
func TestEventErrorsQuoteNothing(t *testing.T) {
	t.Parallel()
	const echo = secretKey + " " + private
	for name, answer := range map[string]string{
		"status line":       echo + "\r\n\r\n",
		"protocol":          "HTTP/9.9 " + echo + "\r\n\r\n",
		"status code":       "HTTP/1.1 " + echo + "\r\n\r\n",
		"header":            "HTTP/1.1 200 OK\r\n" + echo + "\r\n\r\n",
		"length":            "HTTP/1.1 200 OK\r\nContent-Length: " + echo + "\r\n\r\n",
		"transfer encoding": "HTTP/1.1 200 OK\r\nTransfer-Encoding: " + echo + "\r\n\r\n",
		"chunk":             "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + echo + "\r\n",
		"nothing":           "",
		"long header":       "HTTP/1.1 200 OK\r\nX: " + strings.Repeat(echo, 1<<14) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a := ask(t, vendor(t, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.WriteString(conn, answer)
				_ = conn.Close()
			}), 5*time.Second))
			if a.Outcome != Transient {
				t.Errorf("outcome %v, want transient", a.Outcome)
			}
		})
	}
}

func TestEventNobodyThere(t *testing.T) {
	t.Parallel()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	url := "http://" + ln.Addr().String()
	_ = ln.Close()
	if a := ask(t, client(url, 5*time.Second)); a.Outcome != Transient || a.Status != 0 {
		t.Errorf("outcome %v, status %d", a.Outcome, a.Status)
	}
}

func TestEventBaseURLThatDoesNotParse(t *testing.T) {
	t.Parallel()
	if a := ask(t, client("http://"+private+"\x7f", 5*time.Second)); a.Outcome != Misconfigured {
		t.Errorf("outcome %v: %v", a.Outcome, a.Err)
	}
}

func TestEventVerifiesTheCertificate(t *testing.T) {
	t.Parallel()
	var calls atomic.Int32
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { calls.Add(1) }))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	t.Cleanup(srv.Close)
	a := ask(t, client(srv.URL, 5*time.Second))
	if a.Outcome != Transient || calls.Load() != 0 {
		t.Errorf("outcome %v, %d requests arrived", a.Outcome, calls.Load())
	}
	if a.Err == nil || !strings.Contains(a.Err.Error(), "certificate") {
		t.Errorf("error does not name the certificate: %v", a.Err)
	}
}

func TestEventEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	f := vendor(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		cancel()
		<-r.Context().Done()
	}), time.Minute)
	a := f.Event(ctx, sampleID)
	checkAnswer(t, a)
	if a.Outcome != Transient || !errors.Is(a.Err, context.Canceled) {
		t.Errorf("outcome %v: %v", a.Outcome, a.Err)
	}
}

// TestEventKeepsConnections makes two rounds of calls that are all under way
// at once; whatever the answers, the second round opens no connection.
func TestEventKeepsConnections(t *testing.T) {
	t.Parallel()
	replies := []struct {
		status int
		body   []byte
	}{
		{200, fingerprintsim.Event(sampleID, sampleAt)},
		{404, []byte(`{"error":{"code":"event_not_found"}}`)},
		{502, bytes.Repeat([]byte("x"), maxError+maxError/2)},
		{503, nil},
	}
	var opened atomic.Int32
	arrived := make(chan chan int, len(replies))
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		turn := make(chan int)
		arrived <- turn
		reply := replies[<-turn]
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(reply.status)
		_, _ = w.Write(reply.body)
	}))
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			opened.Add(1)
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	f := NewFingerprint(srv.URL, func() string { return secretKey }, 10*time.Second, len(replies))
	for range 2 {
		var calls sync.WaitGroup
		for range replies {
			calls.Go(func() { checkAnswer(t, f.Event(t.Context(), sampleID)) })
		}
		var turns []chan int
		for range replies {
			turns = append(turns, <-arrived)
		}
		for i, turn := range turns {
			turn <- i
		}
		calls.Wait()
	}
	if n := int(opened.Load()); n != len(replies) {
		t.Errorf("%d connections for two rounds of %d calls", n, len(replies))
	}
}

func TestRegionURL(t *testing.T) {
	t.Parallel()
	for region, want := range map[string]string{
		"us": "https://api.fpjs.io", "eu": "https://eu.api.fpjs.io", "ap": "https://ap.api.fpjs.io", "": "", "EU": "",
	} {
		if got := RegionURL(region); got != want {
			t.Errorf("RegionURL(%q) = %q, want %q", region, got, want)
		}
	}
}

func TestOutcomeString(t *testing.T) {
	t.Parallel()
	for o, want := range map[Outcome]string{
		Found: "found", NotFound: "not_found", Rejected: "rejected", Transient: "transient", Throttled: "throttled",
		Misconfigured: "misconfigured", Malformed: "malformed", 0: "outcome(0)",
	} {
		if got := o.String(); got != want {
			t.Errorf("%d is %q, want %q", int(o), got, want)
		}
	}
}
