package streams_test

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// The ids are part of the contract: during a rolling upgrade two versions
// must take the same event for the same.
func TestMessageIDsAreStable(t *testing.T) {
	t.Parallel()
	e := streams.Event{Schema: 1, RequestID: "1708102555327.NLOjmg", SubscriberID: 12, SessionID: "s", UserID: "u@example.com"}
	r := streams.NewRecord(e, time.Date(2026, 11, 23, 9, 8, 7, 6, time.UTC), record.NotFound, record.EventNotFound)
	for name, id := range map[string][2]string{
		"event":    {e.MessageID(), "0fcbb4348b208aa73b40e960ff704dc6"},
		"derived":  {streams.DerivedMessageID(r, ""), "0a5394a6d5f08a1a55910fba134e710e"},
		"replayed": {streams.DerivedMessageID(r, "replay-1"), "b476f6825fd3250c7c9e0e509abfe8f5"},
	} {
		if id[0] != id[1] {
			t.Errorf("%s: %s, want %s", name, id[0], id[1])
		}
	}
}

func TestMessageIDTellsEventsApart(t *testing.T) {
	t.Parallel()
	base := streams.Event{Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "cd", UserID: "ef"}
	distinct := map[string]streams.Event{
		"base":                 base,
		"request_id":           {Schema: 1, RequestID: "aB", SubscriberID: 1, SessionID: "cd", UserID: "ef"},
		"subscriber_id":        {Schema: 1, RequestID: "ab", SubscriberID: 2, SessionID: "cd", UserID: "ef"},
		"session_id":           {Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "c", UserID: "ef"},
		"user_id":              {Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "cd", UserID: "e"},
		"boundary to the left": {Schema: 1, RequestID: "abc", SubscriberID: 1, SessionID: "d", UserID: "ef"},
		"boundary to right":    {Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "cde", UserID: "f"},
		"one field":            {Schema: 1, RequestID: "abcdef", SubscriberID: 1},
		"swapped":              {Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "ef", UserID: "cd"},
		"lengths as content":   {Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "cd\x00\x00\x00\x00\x00\x00\x00\x02ef"},
	}
	ids := map[string]string{}
	for name, e := range distinct {
		id := e.MessageID()
		if other, ok := ids[id]; ok {
			t.Errorf("%s and %s have the same id", name, other)
		}
		ids[id] = name
		if same := e; same.MessageID() != id {
			t.Errorf("%s: the id of a copy differs", name)
		}
	}
}

func TestDerivedMessageIDTellsOutcomesAndReplaysApart(t *testing.T) {
	t.Parallel()
	e := streams.Event{Schema: 1, RequestID: "ab", SubscriberID: 1, SessionID: "cd", UserID: "ef"}
	at := time.Date(2026, 11, 23, 9, 8, 7, 6, time.UTC)
	derived := func(at time.Time, s record.Status, why record.Reason, replay string) string {
		return streams.DerivedMessageID(streams.NewRecord(e, at, s, why), replay)
	}
	ids := map[string]string{"ingest": e.MessageID()}
	for name, id := range map[string]string{
		"ready":                derived(at, record.Ready, "", ""),
		"a nanosecond later":   derived(at.Add(1), record.Ready, "", ""),
		"not found":            derived(at, record.NotFound, record.EventNotFound, ""),
		"failed":               derived(at, record.Failed, record.TooOld, ""),
		"failed differently":   derived(at, record.Failed, record.UpstreamUnavailable, ""),
		"replayed":             derived(at, record.Ready, "", "r1"),
		"replayed once more":   derived(at, record.Ready, "", "r2"),
		"replayed, as failed":  derived(at, record.Failed, record.TooOld, "r1"),
		"a replay like reason": derived(at, record.Failed, "", "too_old"),
	} {
		for other, have := range ids {
			if have == id {
				t.Errorf("%s and %s have the same id", name, other)
			}
		}
		ids[name] = id
	}
	// What a second look learns besides the outcome makes no other message.
	r := streams.NewRecord(e, at, record.Ready, "")
	r.Attempts, r.FetchedAt, r.Event = 7, record.At(at.Add(time.Hour)), json.RawMessage(`{}`)
	if streams.DerivedMessageID(r, "") != ids["ready"] {
		t.Error("the id depends on more than event, acceptance, outcome and replay")
	}
	if zone := at.In(time.FixedZone("east", 3600)); derived(zone, record.Ready, "", "") != ids["ready"] {
		t.Error("the id depends on the time zone")
	}
}

func TestValidRequestID(t *testing.T) {
	t.Parallel()
	for id, want := range map[string]bool{
		"1A2B3C4D5E": true, "1708102555327.NLOjmg": true, "a": true, "0": true, "a-b_c": true, "a.-": true, "a._b": true, "a.b.c": true, "a-": true, "a_": true,
		strings.Repeat("x", 64): true, strings.Repeat("x", 65): false,
		"": false, ".": false, "a.": false, ".a": false, "a..b": false, "-a": false, "_a": false, "a b": false, " a": false, "a ": false, "a\n": false,
		"a/b": false, "../a": false, "a*": false, "a>": false, "a:b": false, "a%2e": false, "ä": false, "a\x00": false, "a\xff": false, "\u017f": false, "１": false,
	} {
		if got := streams.ValidRequestID(id); got != want {
			t.Errorf("%q: %v, want %v", id, got, want)
		}
	}
}

func FuzzValidRequestID(f *testing.F) {
	for _, id := range []string{"", "1708102555327.NLOjmg", "a..b", ".a", "a.", "-a", "a-", "é", strings.Repeat("a", 64), strings.Repeat("a.", 33), "a\n"} {
		f.Add(id)
	}
	grammar := regexp.MustCompile(`\A[0-9A-Za-z][0-9A-Za-z_-]*(\.[0-9A-Za-z_-]+)*\z`)
	f.Fuzz(func(t *testing.T, id string) {
		want := len(id) <= 64 && grammar.MatchString(id)
		if got := streams.ValidRequestID(id); got != want {
			t.Errorf("%q: %v, want %v", id, got, want)
		}
	})
}

func TestDecodeEventRefuses(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"nothing":               ``,
		"null":                  `null`,
		"no JSON":               `request_id=A`,
		"two objects":           `{"schema":1,"request_id":"A","subscriber_id":1}{}`,
		"no schema":             `{"request_id":"A","subscriber_id":1}`,
		"no request_id":         `{"schema":1,"subscriber_id":1}`,
		"request_id malformed":  `{"schema":1,"request_id":"a b","subscriber_id":1}`,
		"request_id a number":   `{"schema":1,"request_id":7,"subscriber_id":1}`,
		"no subscriber_id":      `{"schema":1,"request_id":"A"}`,
		"subscriber_id below 1": `{"schema":1,"request_id":"A","subscriber_id":0}`,
		"subscriber_id a text":  `{"schema":1,"request_id":"A","subscriber_id":"1"}`,
		"subscriber_id huge":    `{"schema":1,"request_id":"A","subscriber_id":9223372036854775808}`,
	} {
		if e, err := streams.DecodeEvent([]byte(body)); err == nil || e != (streams.Event{}) {
			t.Errorf("%s: %+v, %v", name, e, err)
		}
	}
}

// Errors end up in logs and in headers, bodies hold personal data.
func FuzzDecodeErrorsNeverQuoteTheBody(f *testing.F) {
	const marker = "8675309123"
	for _, body := range []string{
		`MARK`, `"MARK"`, `{"MARK":1}`, `{"schema":MARK}`, `{"schema":"MARK"}`, `{"schema":1,"request_id":"MARK MARK"}`, `{"schema":1,"request_id":["MARK"]}`,
		`{"schema":1,"request_id":"A","subscriber_id":MARKMARK}`, `{"schema":1,"request_id":"A","subscriber_id":-MARK}`, `{"schema":1,"subscriber_id":1.MARK}`,
		`{"schema":1,"accepted_at":"MARK"}`, `{"schema":1,"accepted_at":MARK}`, `{"schema":1,"status":"MARK"}`, `{"schema":1,"attempts":MARKMARK}`,
		`{"schema":1,"session_id":MARK}`, `{"schema":1,"user_id":{"MARK":`, `{"schema":1,"fetched_at":"MARK-11-23T00:00:00Z"}`, `{"schema":1,"signals":{"confidence":"MARK"}}`, `\uMARK`, `{"a":"\uMARK"}`,
	} {
		f.Add(body)
	}
	f.Fuzz(func(t *testing.T, body string) {
		body = strings.ReplaceAll(body, "MARK", marker)
		_, eventErr := streams.DecodeEvent([]byte(body))
		_, recordErr := record.Decode([]byte(body))
		for _, err := range []error{eventErr, recordErr} {
			if text := fmt.Sprintf("%v %+v", err, err); err != nil && strings.Contains(text, marker) && !newerSchema(body, marker) {
				t.Errorf("%s\nquotes %s", text, body)
			}
		}
	})
}

// newerSchema reports whether the marker is the schema number, the one thing
// an error may tell.
func newerSchema(body, marker string) bool {
	var v struct {
		Schema json.Number `json:"schema"`
	}
	_ = json.Unmarshal([]byte(body), &v) // goes on past wrong types elsewhere
	return strings.Contains(v.Schema.String(), marker)
}
