package ingest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// fuzzPublisher decides by the event whether the stream takes it, and keeps
// what it was given.
type fuzzPublisher struct {
	mu        sync.Mutex
	published []streams.Message
}

func (p *fuzzPublisher) publish(_ context.Context, m streams.Message) (streams.Ack, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.published = append(p.published, m)
	switch m.ID[len(m.ID)-1] {
	case 'a', 'A', '0':
		return streams.Ack{}, streams.ErrStreamFull
	case 'b', 'B', '1':
		return streams.Ack{Duplicate: true}, nil
	}
	return streams.Ack{Sequence: uint64(len(p.published))}, nil
}

// take returns what was published since the last take.
func (p *fuzzPublisher) take() []streams.Message {
	p.mu.Lock()
	defer p.mu.Unlock()
	defer func() { p.published = nil }()
	return p.published
}

// listenUnix serves the edge on a Unix socket: a fuzzer opens more
// connections than there are ports.
func (e *edge) listenUnix(t testing.TB) (addr string) {
	t.Helper()
	addr = filepath.Join(t.TempDir(), "edge")
	ln, err := net.Listen("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := e.httpServer()
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	t.Cleanup(func() {
		srv.Close()
		if err := <-done; !errors.Is(err, http.ErrServerClosed) {
			t.Error(err)
		}
	})
	return addr
}

// refusalTexts matches every text that a refusal may have, with the places of
// numbers left open. Whatever else an answer said would come from the request.
func refusalTexts() *regexp.Regexp {
	const name = `'(request_id|subscriber_id|session_id|user_id)'`
	alternatives := []string{
		`Missing ` + name + ` in request body`,
		`Invalid ` + name + ` in request body: must (be a string|be an integer|be an integer in plain digits|be from 1 to \d+|be 1 to \d+ bytes of UTF-8|` +
			`be 1 to 64 characters, dot-separated tokens of A-Z, a-z, 0-9, _ and -, beginning with a letter or digit|not begin or end with white space|` +
			`not contain control, bidirectional override, line separator or noncharacter code points)`,
		`Invalid JSON in request body: (empty|must be an object|must end after the object|ends too early|ends too early or comes too slowly|syntax error( at byte \d+)?|` +
			`not UTF-8|a name occurs twice in one object|nested deeper than 32|a name differs from ` + name + ` in upper and lower case only)`,
	}
	for _, r := range []refusal{errNoKey, errBadKey, errSubscriber, errPath, errMethod, errTooLarge, errType, errCoding, errRate, errOverload, errStream} {
		alternatives = append(alternatives, regexp.QuoteMeta(r.text))
	}
	return regexp.MustCompile(`^(` + strings.Join(alternatives, "|") + `)$`)
}

// FuzzHandler sends raw bytes to the server that clients talk to: head, with
// $KEY and $LEN replaced by a good key and the body's length, and then body.
// Whatever they are, no answer is a bug's, every one has the form of the
// contract and repeats nothing but an accepted event, and 202 is said of what
// was published, with the fields of the request, and of nothing else.
func FuzzHandler(f *testing.F) {
	const good = "POST /fingerprint/ingest HTTP/1.1\r\nHost: edge\r\nContent-Type: application/json\r\nX-API-Key: $KEY\r\nContent-Length: $LEN\r\n\r\n"
	chunked := strings.Replace(good, "Content-Length: $LEN", "Transfer-Encoding: chunked", 1)
	inChunks := strconv.FormatInt(int64(len(typicalBody)), 16) + "\r\n" + typicalBody + "\r\n0\r\n\r\n"
	for _, seed := range [][2]string{
		{good, typicalBody}, {good, body("subscriber_id", `"12"`)}, {good, body("user_id", `"\ud83d\ude00\""`)},
		{good, body("user_id", `" x"`)}, {good, body("subscriber_id", `13`)}, {good, `{}`}, {good, "\xff"}, {good, ""},
		{strings.Replace(good, "$KEY", "x", 1), typicalBody},
		{strings.Replace(good, "X-API-Key: $KEY\r\n", "", 1), typicalBody},
		{strings.Replace(good, "X-API-Key", "X-API-Key: $KEY\r\nX-API-Key", 1), typicalBody},
		{strings.Replace(good, "$LEN", "$LEN\r\nTransfer-Encoding: chunked", 1), inChunks},
		{strings.Replace(good, "$LEN", "99999999", 1), typicalBody},
		{strings.Replace(good, "$LEN", "2", 1), "{}" + "GET /openapi.json HTTP/1.1\r\nHost: edge\r\n\r\n"},
		{strings.Replace(good, "application/json", "application/json; charset=utf-8", 1), typicalBody},
		{strings.Replace(good, "application/json", "text/plain", 1), typicalBody},
		{strings.Replace(good, "Host: edge", "Host: edge\r\nExpect: 100-continue", 1), typicalBody},
		{strings.Replace(good, "Host: edge", "Host: edge\r\nContent-Encoding: gzip", 1), typicalBody},
		{strings.Replace(good, "Host: edge", "Host: edge\r\nTraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", 1), typicalBody},
		{strings.Replace(good, "HTTP/1.1", "HTTP/1.0", 1), typicalBody},
		{strings.Replace(good, "POST", "PUT", 1), typicalBody},
		{strings.Replace(good, "POST /fingerprint/ingest", "OPTIONS *", 1), ""},
		{strings.Replace(good, "/fingerprint/ingest", "/fingerprint/%69ngest?x=%zz", 1), typicalBody},
		{chunked, inChunks}, {chunked, "1\r\n{\r\nno length\r\n"}, {chunked, "0\r\nTrailer: x\r\n\r\n"},
		{good, typicalBody + strings.ReplaceAll(good, "$LEN", "2") + "{}"},
		{"GET /openapi.json HTTP/1.1\r\nHost: edge\r\n\r\n", "HEAD / HTTP/1.1\r\nHost: edge\r\n\r\n"},
		{"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", ""}, {"\x16\x03\x01", ""}, {"GET http://[::1 HTTP/1.1\r\n\r\n", ""},
	} {
		f.Add([]byte(seed[0]), []byte(seed[1]))
	}
	var p fuzzPublisher
	e := newEdge(f, p.publish)
	e.log = slog.New(slog.DiscardHandler)
	addr, texts := e.listenUnix(f), refusalTexts()

	f.Fuzz(func(t *testing.T, head, body []byte) {
		raw := bytes.ReplaceAll(head, []byte("$KEY"), []byte(e.acme))
		raw = bytes.ReplaceAll(raw, []byte("$LEN"), strconv.AppendInt(nil, int64(len(body)), 10))
		raw = append(raw, body...)
		answers, asked := bufio.NewReader(bytes.NewReader(exchangeRaw(t, addr, raw))), bufio.NewReader(bytes.NewReader(raw))
		published := p.take()
		for {
			if _, err := answers.Peek(1); err == io.EOF {
				break
			}
			r, sent := readRequest(asked)
			a := readFinal(t, answers, r)
			if a.Header.Get("X-Request-Id") == "" { // refused before any handler
				if !slices.Contains([]int{400, 417, 431, 501, 505}, a.StatusCode) {
					t.Fatalf("net/http: %s %s", a.Status, a.body)
				}
				break // the last one, and with a body even for HEAD
			}
			checkAnswer(t, texts, a, r != nil && r.Method == http.MethodHead)
			if a.StatusCode != 202 && !strings.Contains(a.body, errStream.text) {
				continue
			}
			if len(published) == 0 {
				t.Fatalf("%d without a publish", a.StatusCode)
			}
			checkPublished(t, published[0], a, sent)
			published = published[1:]
		}
		if len(published) > 0 {
			t.Fatalf("%d publishes that no answer tells of", len(published))
		}
	})
}

// exchangeRaw sends raw on a connection of its own and returns all that comes
// back until the server closes it.
func exchangeRaw(t *testing.T, addr string, raw []byte) []byte {
	t.Helper()
	c, err := net.Dial("unix", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, _ = c.Write(raw) // the server may hang up in the middle
	_ = c.(*net.UnixConn).CloseWrite()
	all, err := io.ReadAll(c)
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		t.Fatalf("no end after %q", all)
	}
	return all
}

// readRequest returns what the standard library takes for the next request,
// nil if for none, and its body.
func readRequest(asked *bufio.Reader) (*http.Request, []byte) {
	r, err := http.ReadRequest(asked)
	if err != nil {
		return nil, nil
	}
	sent, _ := io.ReadAll(r.Body) // may be cut
	return r, sent
}

// readFinal reads the next answer that is not a 100 Continue.
func readFinal(t *testing.T, answers *bufio.Reader, r *http.Request) answer {
	t.Helper()
	for {
		resp, err := http.ReadResponse(answers, r)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode >= 200 {
			return read(t, resp)
		}
	}
}

// checkAnswer holds an answer of a handler against the contract.
func checkAnswer(t *testing.T, texts *regexp.Regexp, a answer, head bool) {
	t.Helper()
	h := a.Header
	if a.StatusCode >= 500 && a.StatusCode != 503 {
		t.Fatalf("%s %s", a.Status, a.body)
	}
	if h.Get("Content-Type") != contentTypeJSON || h.Get("Cache-Control") != "no-store" || len(h.Get("X-Request-Id")) != 32 {
		t.Fatalf("%s with headers %v", a.Status, h)
	}
	for name, due := range map[string]bool{
		"Allow": a.StatusCode == 405, "Www-Authenticate": a.StatusCode == 401, "Retry-After": a.StatusCode == 503,
	} {
		if (h.Get(name) != "") != due {
			t.Fatalf("%s with %s %q", a.Status, name, h.Get(name))
		}
	}
	if (a.StatusCode == 401 || a.StatusCode == 413) && !a.Close {
		t.Fatalf("%s keeps the connection", a.Status)
	}
	switch {
	case head && a.body == "":
	case a.StatusCode == 200:
		if a.body != string(openAPI) {
			t.Fatalf("200 %s", a.body)
		}
	case a.StatusCode == 202: // see checkPublished
	default:
		var refused struct {
			Error string `json:"error"`
		}
		d := json.NewDecoder(strings.NewReader(a.body))
		d.DisallowUnknownFields()
		if err := d.Decode(&refused); err != nil || !texts.MatchString(refused.Error) {
			t.Fatalf("%s %s: %v", a.Status, a.body, err)
		}
	}
}

// checkPublished checks that what was published is what the request's body
// says, as encoding/json reads it, and what the answer repeats.
func checkPublished(t *testing.T, m streams.Message, a answer, sent []byte) {
	t.Helper()
	got, err := streams.DecodeEvent(m.Body)
	if err != nil {
		t.Fatalf("published %q: %v", m.Body, err)
	}
	var in struct {
		RequestID    string          `json:"request_id"`
		SubscriberID json.RawMessage `json:"subscriber_id"`
		SessionID    string          `json:"session_id"`
		UserID       string          `json:"user_id"`
	}
	if err := json.Unmarshal(sent, &in); err != nil {
		t.Fatalf("published, and refused by encoding/json: %v", err)
	}
	var subscriber string
	if err := json.Unmarshal(in.SubscriberID, &subscriber); err != nil {
		subscriber = string(in.SubscriberID)
	}
	want := streams.Event{Schema: 1, RequestID: in.RequestID, SubscriberID: 12, SessionID: in.SessionID, UserID: in.UserID}
	if got != want || subscriber != "12" || m.Subject != "fp.ingest.12" || m.Stream != streams.StreamIngest || m.ID != want.MessageID() {
		t.Fatalf("sent %+v of %s, published %+v on %s as %s", want, subscriber, got, m.Subject, m.ID)
	}
	if a.StatusCode == 503 {
		return
	}
	var out struct {
		Status, Mode string
		RedisKeys    []string `json:"redis_keys"`
		UserID       string   `json:"user_id"`
		SessionID    string   `json:"session_id"`
	}
	if err := json.Unmarshal([]byte(a.body), &out); err != nil {
		t.Fatal(err)
	}
	if out.Status != "accepted" || out.Mode != "prefetch_pipeline" || !slices.Equal(out.RedisKeys, []string{record.Key(want.RequestID)}) ||
		out.UserID != want.UserID || out.SessionID != want.SessionID {
		t.Fatalf("published %+v, answered %s", want, a.body)
	}
}
