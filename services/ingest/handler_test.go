package ingest

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

var update = flag.Bool("update", false, "write the golden bodies of TestContract")

// TestContract is the HTTP contract. Bodies are in testdata/contract, a file
// for each row.
func TestContract(t *testing.T) {
	t.Parallel()
	const good = `{"request_id":"1A2B3C4D5E","subscriber_id":12,"session_id":"8f14e45f-ceea","user_id":"jane.doe@example.com"}`
	without := func(member string) string {
		return regexp.MustCompile(`"`+member+`":("[^"]*"|\d+),?`).ReplaceAllString(good, "")
	}
	with := func(member, raw string) string {
		return regexp.MustCompile(`"`+member+`":("[^"]*"|\d+)`).ReplaceAllLiteralString(good, `"`+member+`":`+raw)
	}
	header := func(name string, values ...string) func(*http.Request) {
		return func(r *http.Request) { r.Header[name] = values }
	}
	target := func(method, path string) func(*http.Request) {
		return func(r *http.Request) { r.Method, r.URL.Path = method, path }
	}
	chunked := func(r *http.Request) { r.Body, r.ContentLength = io.NopCloser(r.Body), -1 }

	var (
		full publisherFunc = func(context.Context, streams.Message) (streams.Ack, error) {
			return streams.Ack{}, streams.ErrStreamFull
		}
		again   publisherFunc = func(context.Context, streams.Message) (streams.Ack, error) { return streams.Ack{Duplicate: true}, nil }
		panics  publisherFunc = func(context.Context, streams.Message) (streams.Ack, error) { panic("bug with jane.doe@example.com") }
		noKey                 = func(*edge) string { return "" }
		acme                  = func(e *edge) string { return e.acme }
		admin                 = func(e *edge) string { return e.admin }
		expired               = func(e *edge) string { return e.expired }
		revoked               = func(e *edge) string { return e.revoked }
		forged                = func(e *edge) string { return strings.Replace(e.revoked, "gone", "acme-1", 1) }
	)
	closes := map[string]string{"Connection": "close"}
	challenge := map[string]string{"Connection": "close", "Www-Authenticate": `ApiKey realm="ingest"`}
	retry := map[string]string{"Retry-After": "1"}
	tests := map[string]struct {
		publisher publisherFunc
		key       func(*edge) string
		body      string
		change    func(*http.Request)
		status    int
		outcome   outcome
		headers   map[string]string
	}{
		"accepted":                    {stored, acme, good, nil, 202, accepted, nil},
		"accepted subscriber string":  {stored, acme, with("subscriber_id", `"12"`), nil, 202, accepted, nil},
		"accepted unknown member":     {stored, acme, with("user_id", `"jane.doe@example.com","sdk":{"v":4}`), nil, 202, accepted, nil},
		"accepted escapes":            {stored, acme, with("user_id", `"\u003cj\"\u00e9\\\ud83d\ude00>"`), nil, 202, accepted, nil},
		"accepted by a key for all":   {stored, admin, with("subscriber_id", `9007199254740991`), nil, 202, accepted, nil},
		"accepted charset":            {stored, acme, good, header("Content-Type", `Application/JSON; Charset="UTF-8"`), 202, accepted, nil},
		"accepted chunked":            {stored, acme, good, chunked, 202, accepted, closes},
		"accepted query":              {stored, acme, good, func(r *http.Request) { r.URL.RawQuery = "x=1" }, 202, accepted, nil},
		"accepted before":             {again, acme, good, nil, 202, duplicate, map[string]string{"Idempotent-Replayed": "true"}},
		"accepted 64 KiB":             {stored, acme, good + strings.Repeat(" ", maxBody-len(good)), nil, 202, accepted, nil},
		"accepted 64 KiB chunked":     {stored, acme, good + strings.Repeat(" ", maxBody-len(good)), chunked, 202, accepted, closes},
		"missing request_id":          {stored, acme, without("request_id"), nil, 400, invalid, nil},
		"missing subscriber_id":       {stored, acme, without("subscriber_id"), nil, 400, invalid, nil},
		"missing session_id":          {stored, acme, without("session_id"), nil, 400, invalid, nil},
		"missing user_id":             {stored, acme, strings.Replace(without("user_id"), ",}", "}", 1), nil, 400, invalid, nil},
		"missing all":                 {stored, acme, `{}`, nil, 400, invalid, nil},
		"null":                        {stored, acme, with("session_id", `null`), nil, 400, invalid, nil},
		"empty":                       {stored, acme, with("user_id", `""`), nil, 400, invalid, nil},
		"missing beats malformed":     {stored, acme, `{"request_id":"/","subscriber_id":0,"session_id":" "}`, nil, 400, invalid, nil},
		"malformed request_id":        {stored, acme, with("request_id", `"../v4"`), nil, 400, invalid, nil},
		"malformed subscriber_id":     {stored, acme, with("subscriber_id", `1e2`), nil, 400, invalid, nil},
		"malformed session_id":        {stored, acme, with("session_id", `7`), nil, 400, invalid, nil},
		"malformed user_id":           {stored, acme, with("user_id", `" jane"`), nil, 400, invalid, nil},
		"malformed before forbidden":  {stored, acme, strings.Replace(with("subscriber_id", `13`), "jane", " ", 1), nil, 400, invalid, nil},
		"no body":                     {stored, acme, ``, nil, 400, invalid, nil},
		"no JSON":                     {stored, acme, `request_id=1A2B3C4D5E`, nil, 400, invalid, nil},
		"JSON list":                   {stored, acme, `[` + good + `]`, nil, 400, invalid, nil},
		"JSON twice":                  {stored, acme, good + good, nil, 400, invalid, nil},
		"JSON duplicate name":         {stored, acme, with("user_id", `"a","user_id":"b"`), nil, 400, invalid, nil},
		"JSON broken UTF-8":           {stored, acme, with("user_id", "\"\xff\""), nil, 400, invalid, nil},
		"no key":                      {stored, noKey, good, nil, 401, unauthorized, challenge},
		"empty key":                   {stored, noKey, good, header("X-Api-Key", ""), 401, unauthorized, challenge},
		"key in the query only":       {stored, noKey, good, func(r *http.Request) { r.URL.RawQuery = "X-API-Key=x&api_key=x" }, 401, unauthorized, challenge},
		"key as bearer only":          {stored, noKey, good, header("Authorization", "Bearer x"), 401, unauthorized, challenge},
		"key of no form":              {stored, noKey, good, header("X-Api-Key", "secret"), 401, unauthorized, challenge},
		"key unknown":                 {stored, revoked, good, nil, 401, unauthorized, challenge},
		"key forged":                  {stored, forged, good, nil, 401, unauthorized, challenge},
		"key expired":                 {stored, expired, good, nil, 401, unauthorized, challenge},
		"key twice":                   {stored, acme, good, func(r *http.Request) { r.Header["X-Api-Key"] = append(r.Header["X-Api-Key"], "x") }, 401, unauthorized, challenge},
		"key before size and type":    {stored, noKey, strings.Repeat(" ", maxBody+1), header("Content-Type", "text/plain"), 401, unauthorized, challenge},
		"another subscriber":          {stored, acme, with("subscriber_id", `13`), nil, 403, forbidden, nil},
		"unknown path":                {stored, acme, good, target("POST", "/fingerprint/ingests"), 404, notFound, closes},
		"path with a slash":           {stored, acme, good, target("POST", "/fingerprint/ingest/"), 404, notFound, closes},
		"path in another case":        {stored, acme, good, target("POST", "/Fingerprint/ingest"), 404, notFound, closes},
		"path of the operators":       {stored, acme, "", target("GET", "/metrics"), 404, notFound, nil},
		"path before key":             {stored, noKey, "", target("GET", "/"), 404, notFound, nil},
		"method GET":                  {stored, acme, "", target("GET", ingestPath), 405, notFound, map[string]string{"Allow": "POST"}},
		"method OPTIONS":              {stored, noKey, "", target("OPTIONS", ingestPath), 405, notFound, map[string]string{"Allow": "POST"}},
		"method TRACE":                {stored, noKey, "", target("TRACE", ingestPath), 405, notFound, map[string]string{"Allow": "POST"}},
		"method PUT":                  {stored, noKey, good, target("PUT", ingestPath), 405, notFound, map[string]string{"Allow": "POST", "Connection": "close"}},
		"method of our own":           {stored, noKey, "", target("BREW", ingestPath), 405, notFound, map[string]string{"Allow": "POST"}},
		"too large":                   {stored, acme, good + strings.Repeat(" ", maxBody), nil, 413, tooLarge, closes},
		"too large chunked":           {stored, acme, good + strings.Repeat(" ", maxBody), chunked, 413, tooLarge, closes},
		"too large before type":       {stored, acme, good + strings.Repeat(" ", maxBody), header("Content-Type"), 413, tooLarge, closes},
		"type missing":                {stored, acme, good, header("Content-Type"), 415, unsupportedMedia, nil},
		"type of a form":              {stored, acme, good, header("Content-Type", "application/x-www-form-urlencoded"), 415, unsupportedMedia, nil},
		"type text":                   {stored, acme, good, header("Content-Type", "text/json"), 415, unsupportedMedia, nil},
		"type twice":                  {stored, acme, good, header("Content-Type", "application/json", "application/json"), 415, unsupportedMedia, nil},
		"type list":                   {stored, acme, good, header("Content-Type", "application/json, text/plain"), 415, unsupportedMedia, nil},
		"type in another charset":     {stored, acme, good, header("Content-Type", "application/json; charset=latin1"), 415, unsupportedMedia, nil},
		"type with other parameter":   {stored, acme, good, header("Content-Type", "application/json; version=1"), 415, unsupportedMedia, nil},
		"type before body":            {stored, acme, `{`, header("Content-Type", "text/plain"), 415, unsupportedMedia, nil},
		"content coding":              {stored, acme, good, header("Content-Encoding", "gzip"), 415, unsupportedMedia, nil},
		"stream full":                 {full, acme, good, nil, 503, unavailable, retry},
		"stream full after forbidden": {full, acme, with("subscriber_id", `13`), nil, 403, forbidden, nil},
		"bug":                         {panics, acme, good, nil, 500, internalError, nil},
	}
	seen := map[string]bool{}
	for name := range tests {
		seen[golden(name)] = true
	}
	files, err := filepath.Glob("testdata/contract/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if !seen[f] {
			t.Errorf("%s belongs to no row", f)
		}
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			published := make(chan streams.Message, 1)
			e := newEdge(t, func(ctx context.Context, m streams.Message) (streams.Ack, error) {
				published <- m
				return test.publisher(ctx, m)
			})
			r := request(t, e.listen(t), test.key(e), test.body)
			if test.change != nil {
				test.change(r)
			}
			got := send(t, r)

			if got.StatusCode != test.status {
				t.Errorf("status %d, want %d", got.StatusCode, test.status)
			}
			compareGolden(t, golden(name), got.body)
			if h := got.Header.Get("Content-Type"); h != "application/json; charset=UTF-8" {
				t.Errorf("Content-Type %q", h)
			}
			if h := got.Header.Get("Cache-Control"); h != "no-store" {
				t.Errorf("Cache-Control %q", h)
			}
			if h := got.Header.Get("X-Request-Id"); !regexp.MustCompile(`^[0-9a-f]{32}$`).MatchString(h) {
				t.Errorf("X-Request-Id %q", h)
			}
			headers := map[string]string{}
			for _, name := range []string{"Allow", "Idempotent-Replayed", "Retry-After", "Www-Authenticate"} {
				if h := got.Header.Get(name); h != "" {
					headers[name] = h
				}
			}
			if got.Close {
				headers["Connection"] = "close"
			}
			if diff := cmp.Diff(test.headers, headers, cmp.Transformer("nil", func(m map[string]string) map[string]string {
				return maps.Collect(maps.All(m)) // nil is as good as empty
			})); diff != "" {
				t.Error(diff)
			}
			reachedStream := test.status == 202 || test.status >= 500
			if n := len(published); (n == 1) != reachedStream {
				t.Errorf("%d publishes", n)
			}
			streamstest.Eventually(t, "the request to be counted", func() bool {
				return testutil.ToFloat64(e.metrics.requests.WithLabelValues(string(test.outcome))) == 1
			})
		})
	}
}

func golden(name string) string {
	return "testdata/contract/" + strings.ReplaceAll(name, " ", "_") + ".json"
}

func compareGolden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got+"\n"); diff != "" {
		t.Errorf("%s:\n%s", file, diff)
	}
}

func TestPublishedMessage(t *testing.T) {
	t.Parallel()
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	var got streams.Message
	e := newEdge(t, func(_ context.Context, m streams.Message) (streams.Ack, error) { got = m; return streams.Ack{}, nil })
	r := request(t, "edge", e.acme, body("user_id", `"\u0041\""`))
	r.Header.Set("traceparent", trace)
	serve(e, r)
	want := streams.Event{Schema: 1, RequestID: "1A2B3C4D5E", SubscriberID: 12, SessionID: "s-1", UserID: `A"`}
	if diff := cmp.Diff(streams.Message{
		Stream: "FP_INGEST", Subject: "fp.ingest.12", ID: want.MessageID(), TraceParent: trace,
		Body: []byte(`{"schema":1,"request_id":"1A2B3C4D5E","subscriber_id":12,"session_id":"s-1","user_id":"A\""}`),
	}, got); diff != "" {
		t.Error(diff)
	}
}

func serve(e *edge, r *http.Request) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	e.echo.ServeHTTP(w, r)
	return w
}

func TestStrangersAreNotAskedForTheirBody(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	addr := e.listen(t)
	expect := func(key string) *rawConn {
		c := dial(t, addr)
		c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "Content-Length: "+strconv.Itoa(len(typicalBody)),
			"Expect: 100-continue", "X-API-Key: "+key, "", "")
		return c
	}
	stranger := expect(e.revoked)
	if got := stranger.answer(); got.StatusCode != 401 {
		t.Errorf("stranger: %s", got.Status)
	}
	stranger.closed()

	client := expect(e.acme)
	line, err := client.r.ReadString('\n')
	if err != nil || !strings.Contains(line, "100 Continue") {
		t.Fatalf("client: %q, %v", line, err)
	}
	if _, err := client.r.ReadString('\n'); err != nil { // the empty line after it
		t.Fatal(err)
	}
	client.send(typicalBody)
	if got := client.answer(); got.StatusCode != 202 {
		t.Errorf("client: %s", got.Status)
	}
}

// TestNoRequestWithinARequest sends what net/http takes for one chunked
// request and a proxy may take for another.
func TestNoRequestWithinARequest(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	c := dial(t, e.listen(t))
	c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "X-API-Key: "+e.acme,
		"Content-Length: 4", "Transfer-Encoding: chunked", "",
		strconv.FormatInt(int64(len(typicalBody)), 16), typicalBody, "0", "",
		"GET /metrics HTTP/1.1", "Host: edge", "", "")
	if got := c.answer(); got.StatusCode != 202 || !got.Close {
		t.Errorf("%s, close %v", got.Status, got.Close)
	}
	c.closed()
}

func TestEndlessChunksAreCutOff(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	c := dial(t, e.listen(t))
	c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "X-API-Key: "+e.acme,
		"Transfer-Encoding: chunked", "", "100000", strings.Repeat(" ", maxBody+1)) // of a MiB, and then nothing
	if got := c.answer(); got.StatusCode != 413 || !got.Close {
		t.Errorf("%s, close %v", got.Status, got.Close)
	}
}

func TestUnfinishedBody(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	c := dial(t, e.listen(t))
	c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "X-API-Key: "+e.acme,
		"Transfer-Encoding: chunked", "", "1", "{", "no length", "")
	got := c.answer()
	if want := `{"error":"Invalid JSON in request body: ends too early or comes too slowly"}`; got.StatusCode != 400 || got.body != want || !got.Close {
		t.Errorf("%s, close %v: %s", got.Status, got.Close, got.body)
	}
	c.closed()
}

// Who says little and slowly is cut off: after 5 s without the whole head, and
// after 10 s without the whole body.
func TestSlowClientsAreCutOff(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	addr := e.listen(t)
	for name, head := range map[string][]string{
		"head": {"POST /fingerprint/ingest HTTP/1.1", "Host: edge", "X-Slow: 1"},
		"body": {"POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "X-API-Key: " + e.acme, "Content-Length: 1000", "", "{"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			start := time.Now()
			if _, err := io.WriteString(c, strings.Join(head, "\r\n")); err != nil {
				t.Fatal(err)
			}
			if err := c.SetReadDeadline(start.Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("after %v: %v", time.Since(start), err)
			}
		})
	}
}

// What a slow client may cost until it is cut off: its connection's buffers,
// what it has sent, and no more.
func TestSlowClientsCostLittleMemory(t *testing.T) {
	e := newEdge(t, stored)
	addr := e.listen(t)
	inUse := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	const clients, most = 500, 48 << 10
	for name, text := range map[string]string{
		"head": "POST /fingerprint/ingest HTTP/1.1\r\nHost: edge\r\nX-Slow: " + strings.Repeat("x", 15<<10),
		"body": "POST /fingerprint/ingest HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\nX-API-Key: " + e.acme + "\r\nContent-Length: 65536\r\n\r\n{",
		"idle": "POST /nowhere HTTP/1.1\r\nHost: edge\r\nContent-Length: 0\r\n\r\n",
	} {
		before, goroutines := inUse(), runtime.NumGoroutine()
		var conns []net.Conn
		for range clients {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			conns = append(conns, c)
			if _, err := io.WriteString(c, text); err != nil {
				t.Fatal(err)
			}
			if name == "idle" {
				if _, err := bufio.NewReader(c).ReadString('\n'); err != nil {
					t.Fatal(err)
				}
			}
		}
		if name == "body" {
			streamstest.Eventually(t, "all of them being handled", func() bool { return e.inflight.Load() == clients })
		}
		each := (int64(inUse()) - int64(before)) / clients
		t.Logf("%s: %d bytes for each of %d", name, each, clients)
		if each > most {
			t.Errorf("%s: %d bytes for each of %d, want %d at most", name, each, clients, most)
		}
		for _, c := range conns {
			c.Close()
		}
		streamstest.Eventually(t, "their connections closed", func() bool { return runtime.NumGoroutine() <= goroutines })
	}
}

func TestHeadersTooLarge(t *testing.T) {
	t.Parallel()
	c := dial(t, newEdge(t, stored).listen(t))
	c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "X-Long: "+strings.Repeat("x", 24<<10), "", "")
	if got := c.answer(); got.StatusCode != 431 {
		t.Error(got.Status)
	}
}

func TestOptionsOfTheServer(t *testing.T) {
	t.Parallel()
	c := dial(t, newEdge(t, stored).listen(t))
	c.send("OPTIONS * HTTP/1.1", "Host: edge", "", "")
	if got := c.answer(); got.StatusCode != 404 {
		t.Error(got.Status)
	}
}

func TestConnectionIsKept(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	c := dial(t, e.listen(t))
	ids := map[string]bool{}
	for range 3 {
		c.send("POST /fingerprint/ingest HTTP/1.1", "Host: edge", "Content-Type: application/json", "X-API-Key: "+e.acme,
			"Content-Length: "+strconv.Itoa(len(typicalBody)), "", typicalBody)
		got := c.answer()
		if got.StatusCode != 202 || got.Close {
			t.Fatalf("%s, close %v", got.Status, got.Close)
		}
		ids[got.Header.Get("X-Request-Id")] = true
	}
	if len(ids) != 3 {
		t.Error("X-Request-Id repeats")
	}
}

// TestPublishTimeout: a stream that never answers costs the client exactly
// the publish timeout.
func TestPublishTimeout(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t, func(ctx context.Context, _ streams.Message) (streams.Ack, error) {
			<-ctx.Done()
			return streams.Ack{}, ctx.Err()
		})
		start := time.Now()
		w := serve(e, request(t, "edge", e.acme, typicalBody))
		if took := time.Since(start); w.Code != 503 || took != 1500*time.Millisecond {
			t.Errorf("%d after %v", w.Code, took)
		}
	})
}

// TestPublishThatDoesNotReturn: as above when the publisher cannot be stopped.
// Until it lets go of them, its messages count as requests in flight.
func TestPublishThatDoesNotReturn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		stuck := make(chan struct{})
		e := newEdge(t, func(context.Context, streams.Message) (streams.Ack, error) {
			<-stuck
			return streams.Ack{}, nil
		})
		e.maxInflight = 2
		for i, want := range []struct {
			took time.Duration
			text string
		}{{1500 * time.Millisecond, errStream.text}, {1500 * time.Millisecond, errStream.text}, {0, errOverload.text}} {
			start := time.Now()
			w := serve(e, request(t, "edge", e.acme, typicalBody))
			if took := time.Since(start); w.Code != 503 || took != want.took || !strings.Contains(w.Body.String(), want.text) {
				t.Errorf("request %d: %d after %v: %s", i, w.Code, took, w.Body)
			}
		}
		close(stuck)
		synctest.Wait()
		if w := serve(e, request(t, "edge", e.acme, typicalBody)); w.Code != 202 {
			t.Errorf("%d %s", w.Code, w.Body)
		}
	})
}

func TestPublishOutlivesTheClient(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	e := newEdge(t, func(publish context.Context, _ streams.Message) (streams.Ack, error) {
		cancel()
		return streams.Ack{}, publish.Err()
	})
	r := request(t, "edge", e.acme, typicalBody).WithContext(ctx)
	if w := serve(e, r); w.Code != 202 {
		t.Errorf("status %d", w.Code)
	}
}

// TestPersonalDataStaysInPayloads: whatever happens, neither logs nor answers
// other than the 202 nor metrics show user_id, session_id or a key.
func TestPersonalDataStaysInPayloads(t *testing.T) {
	t.Parallel()
	const user, session = "jane.doe@example.com", "s3ss10n-of-jane"
	good := `{"request_id":"1A2B3C4D5E","subscriber_id":12,"session_id":"` + session + `","user_id":"` + user + `"}`
	publishers := map[string]publisherFunc{
		"stored": stored,
		"fails":  func(context.Context, streams.Message) (streams.Ack, error) { return streams.Ack{}, errors.New("no") },
		"panics": func(_ context.Context, m streams.Message) (streams.Ack, error) { panic(string(m.Body)) },
		"panics with an error": func(_ context.Context, m streams.Message) (streams.Ack, error) {
			panic(errors.New(string(m.Body)))
		},
		"panics by itself": func(_ context.Context, m streams.Message) (streams.Ack, error) {
			_ = m.Body[len(m.Body)]
			return streams.Ack{}, nil
		},
	}
	for name, p := range publishers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEdge(t, p)
			addr := e.listen(t)
			requests := []*http.Request{
				request(t, addr, e.acme, good),
				request(t, addr, e.revoked, good),
				request(t, addr, e.acme[:len(e.acme)-1], good),
				request(t, addr, e.acme, strings.Replace(good, ":12", ":13", 1)),
				request(t, addr, e.acme, strings.Replace(good, "1A2B", user, 1)),
				request(t, addr, e.acme, strings.Replace(good, ":12", `:"`+user+`"`, 1)),
				request(t, addr, e.acme, strings.Replace(good, user, user+" ", 1)),
				request(t, addr, e.acme, strings.Replace(good, session, session+`\u0000`, 1)),
				request(t, addr, e.acme, good[:len(good)-1]),
				request(t, addr, e.acme, good+user),
				request(t, addr, e.acme, strings.Replace(good, `"user_id"`, `"`+user+`":1,"`+user+`"`, 1)),
				request(t, addr, e.acme, good, func(r *http.Request) { r.URL.Path = "/" + user }),
				request(t, addr, e.acme, good, func(r *http.Request) { r.Header.Set("Content-Type", user) }),
				request(t, addr, user, good),
			}
			for i, r := range requests {
				if got := send(t, r); got.StatusCode != 202 && (strings.Contains(got.body, "jane") || strings.Contains(got.body, "fpk_")) {
					t.Errorf("request %d: %s", i, got.body)
				}
			}
			if logs := e.logs.String(); strings.Contains(logs, "jane") || strings.Contains(logs, keyPrefix) {
				t.Error(logs)
			} else if strings.Count(logs, "request answered") < len(requests)-1 {
				t.Errorf("nothing logged, nothing proven: %s", logs)
			}
			families, err := e.registry.Gather()
			if text := fmt.Sprint(families); err != nil || strings.Contains(text, "jane") || strings.Contains(text, keyPrefix) {
				t.Errorf("%v\n%s", err, text)
			}
		})
	}
}

func TestPanicIsLoggedWithItsStack(t *testing.T) {
	t.Parallel()
	e := newEdge(t, func(context.Context, streams.Message) (streams.Ack, error) { panic("bug") })
	w := serve(e, request(t, "edge", e.acme, typicalBody))
	logs := e.logs.String()
	if !strings.Contains(logs, "TestPanicIsLoggedWithItsStack") || !strings.Contains(logs, w.Header().Get("X-Request-Id")) {
		t.Error(logs)
	}
	if n := testutil.ToFloat64(e.metrics.inflight); n != 0 {
		t.Errorf("%v requests left in flight", n)
	}
}

func TestRepeatedLogLinesAreSampled(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		e := newEdge(t, stored)
		for range 10 {
			serve(e, request(t, "edge", e.revoked, typicalBody))
		}
		time.Sleep(time.Second) // of the bubble's clock
		serve(e, request(t, "edge", e.revoked, typicalBody))
		logs := e.logs.String()
		if n := strings.Count(logs, "request without a good key"); n != 2 || !strings.Contains(logs, `"unlogged":9`) {
			t.Errorf("%d lines:\n%s", n, logs)
		}
		if n := testutil.ToFloat64(e.metrics.authFailed.WithLabelValues("unknown")); n != 11 {
			t.Errorf("%v counted", n)
		}
	})
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	forged := strings.Replace(e.revoked, "gone", "acme-1", 1)
	sum := checksum([]byte(forged[:len(forged)-checksumDigits]))
	forged = forged[:len(forged)-checksumDigits] + string(sum[:])
	for _, r := range []*http.Request{
		request(t, "edge", e.acme, typicalBody),
		request(t, "edge", e.acme, `{}`),
		request(t, "edge", e.acme, body("user_id", `5`)),
		request(t, "edge", "", typicalBody),
		request(t, "edge", "x", typicalBody),
		request(t, "edge", e.revoked, typicalBody),
		request(t, "edge", e.expired, typicalBody),
		request(t, "edge", forged, typicalBody),
	} {
		serve(e, r)
	}
	m := e.metrics
	for name, got := range map[string]float64{
		"accepted":             testutil.ToFloat64(m.requests.WithLabelValues("accepted")),
		"request_id missing":   testutil.ToFloat64(m.invalid.WithLabelValues("request_id", "missing")),
		"user_id type":         testutil.ToFloat64(m.invalid.WithLabelValues("user_id", "type")),
		"key missing":          testutil.ToFloat64(m.authFailed.WithLabelValues("missing")),
		"key malformed":        testutil.ToFloat64(m.authFailed.WithLabelValues("malformed")),
		"key unknown":          testutil.ToFloat64(m.authFailed.WithLabelValues("unknown")),
		"key expired":          testutil.ToFloat64(m.authFailed.WithLabelValues("expired")),
		"key mismatch":         testutil.ToFloat64(m.authFailed.WithLabelValues("mismatch")),
		"acme-1 accepted":      testutil.ToFloat64(m.keyRequests.WithLabelValues("acme-1", "accepted")),
		"acme-1 refused, half": testutil.ToFloat64(m.keyRequests.WithLabelValues("acme-1", "refused")) / 2,
		"keys, a third":        testutil.ToFloat64(m.keys) / 3,
		"keys current":         testutil.ToFloat64(m.keysCurrent),
	} {
		if got != 1 {
			t.Errorf("%s: %v", name, got)
		}
	}
	problems, err := testutil.GatherAndLint(e.registry)
	if err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	families, err := e.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range families {
		names = append(names, f.GetName())
		if f.GetName() == "fp_ingest_key_requests_total" && len(f.GetMetric()) != 6 {
			t.Errorf("%d series for 3 keys: a label from a request?", len(f.GetMetric()))
		}
	}
	if diff := cmp.Diff([]string{
		"fp_ingest_auth_failures_total", "fp_ingest_inflight_requests", "fp_ingest_invalid_fields_total",
		"fp_ingest_key_requests_total", "fp_ingest_keys", "fp_ingest_keys_current",
		"fp_ingest_request_duration_seconds", "fp_ingest_requests_total",
	}, slices.Sorted(slices.Values(names))); diff != "" {
		t.Error(diff)
	}
}
