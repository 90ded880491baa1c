package record_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// random makes arbitrary records; the seed is printed when a test fails.
type random struct{ *rand.Rand }

func newRandom(t *testing.T) random {
	seed := rand.Uint64()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	})
	return random{rand.New(rand.NewPCG(seed, 0))}
}

// text returns anything a string can hold: quotes, control characters, pieces
// of JSON, broken UTF-8.
func (r random) text() string {
	pieces := []string{`"`, `\`, `{`, `}`, `,"schema":9`, `"status":"ready"`, "\x00", "\n", "\xff", "ü", "\u2028", "<", "&", "\U0001F600", "a", "9"}
	var b strings.Builder
	for range r.IntN(8) {
		b.WriteString(pieces[r.IntN(len(pieces))])
	}
	return b.String()
}

func (r random) time() time.Time {
	// All of the years 0 to 9999, and often near each other.
	low, high := time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC).Unix(), time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC).Unix()
	if r.IntN(2) == 0 {
		low, high = 1_700_000_000, 1_700_000_002
	}
	nanos := []int64{0, 1, 10, 999_999_999, 500_000_000, r.Int64N(1e9)}
	return time.Unix(low+r.Int64N(high-low+1), nanos[r.IntN(len(nanos))]).In(time.FixedZone("", r.IntN(100_000)-50_000))
}

func maybe[T any](r random, v T) *T {
	if r.IntN(2) == 0 {
		return nil
	}
	return &v
}

func (r random) record() record.Record {
	statuses := []record.Status{record.Pending, record.Ready, record.NotFound, record.Rejected, record.Failed}
	rec := record.Record{
		Schema: record.Schema, Status: statuses[r.IntN(len(statuses))], AcceptedAt: record.At(r.time()), SubscriberID: 1 + r.Int64N(1<<53-1),
		Reason: record.Reason(r.text()), RequestID: "x" + r.text(), SessionID: r.text(), UserID: r.text(), Attempts: r.IntN(3),
		Source: record.Source(r.text()), Checks: maybe(r, record.Checks{AgeMS: maybe(r, r.Int64()), EventIDMatch: r.IntN(2) == 0}),
		Signals: &record.Signals{VisitorID: maybe(r, r.text()), UserAgent: maybe(r, r.text()), Confidence: maybe(r, r.Float64())},
	}
	if r.IntN(2) == 0 {
		rec.FetchedAt = record.At(r.time())
	}
	if r.IntN(2) == 0 {
		b, _ := json.Marshal(map[string]string{r.text(): r.text()})
		rec.Event = append(append([]byte(" "), b...), '\n')
	}
	return rec
}

// The script in Redis reads the head as text: whatever the record holds, its
// first four members come first, in this order and in this form.
func TestHeadComesFirst(t *testing.T) {
	t.Parallel()
	head := regexp.MustCompile(`\A\{"schema":1,"status":"(pending|ready|not_found|rejected|failed)","accepted_at":"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z","subscriber_id":([1-9]\d*),"`)
	r := newRandom(t)
	for range 2000 {
		rec := r.record()
		b, err := rec.Encode()
		if err != nil {
			t.Fatal(err)
		}
		m := head.FindSubmatch(b)
		if m == nil {
			t.Fatalf("no head: %s", b)
		}
		var whole record.Record
		if err := json.Unmarshal(b, &whole); err != nil {
			t.Fatalf("%v: %s", err, b)
		}
		if string(m[1]) != string(whole.Status) || whole.SubscriberID != rec.SubscriberID || !whole.AcceptedAt.Equal(rec.AcceptedAt.Time) {
			t.Fatalf("head and record differ: %s", b)
		}
		if again, err := record.Decode(b); err != nil || again.Status != rec.Status {
			t.Fatalf("%v: %s", err, b)
		}
	}
}

func TestEncodeCopiesTheEventUntouched(t *testing.T) {
	t.Parallel()
	for name, event := range map[string]string{
		"spaces and line breaks": "{ \"a\" :\n\t1 }",
		"escapes":                `{"url":"https:\/\/a\/?b&c","x":"\u00e9\u003c<"}`,
		"numbers":                `{"a":1e400,"b":1.0,"c":-0,"d":123456789012345678901234567890}`,
		"order, doubles":         `{"b":1,"a":2,"b":3}`,
		"around it":              " {} \n",
		"not an object":          `[1,2]`,
	} {
		rec := newRandom(t).record()
		rec.Event = json.RawMessage(event)
		b, err := rec.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if want := `,"event":` + event + `}`; !bytes.HasSuffix(b, []byte(want)) {
			t.Errorf("%s: %s\ndoes not end in %s", name, b, want)
		}
		if string(rec.Event) != event {
			t.Errorf("%s: Encode changed the record", name)
		}
	}
	for _, none := range []json.RawMessage{nil, {}} {
		rec := newRandom(t).record()
		rec.Event = none
		b, err := rec.Encode()
		if err != nil || bytes.Contains(b, []byte(`,"event":`)) {
			t.Errorf("without an event: %s, %v", b, err)
		}
	}
}

func TestDecodeReturnsWhatWasEncoded(t *testing.T) {
	t.Parallel()
	r := newRandom(t)
	for range 2000 {
		rec := r.record()
		// Broken UTF-8 is replaced on the way, so compare the second trip.
		b, err := rec.Encode()
		if err != nil {
			t.Fatal(err)
		}
		first, err := record.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if b, err = first.Encode(); err != nil {
			t.Fatal(err)
		}
		second, err := record.Decode(b)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(first, second); d != "" {
			t.Fatalf("-first +second\n%s", d)
		}
	}
}

func TestTextOrderIsTimeOrder(t *testing.T) {
	t.Parallel()
	r := newRandom(t)
	inOrder := func(a, b time.Time) {
		t.Helper()
		for _, x := range []time.Time{a, b} {
			if y := x.UTC().Year(); y < 0 || y > 9999 {
				return
			}
		}
		ta, tb := record.At(a).String(), record.At(b).String()
		if len(ta) != len("2006-01-02T15:04:05.000000000Z") || len(ta) != len(tb) {
			t.Fatalf("%q, %q: not of one width", ta, tb)
		}
		if text, want := strings.Compare(ta, tb), a.Compare(b); text != want {
			t.Fatalf("%s, %s: text order %d, time order %d", ta, tb, text, want)
		}
	}
	for range 20_000 {
		a := r.time()
		inOrder(a, r.time())
		inOrder(a, a.Add(time.Duration(r.IntN(3)-1)))
	}
}

func TestTimeKeepsEveryNanosecond(t *testing.T) {
	t.Parallel()
	r := newRandom(t)
	for range 2000 {
		at := record.At(r.time())
		if y := at.Year(); y < 0 || y > 9999 {
			continue
		}
		b, err := json.Marshal(at)
		if err != nil {
			t.Fatal(err)
		}
		if string(b) != `"`+at.String()+`"` {
			t.Fatalf("JSON %s, text %s", b, at)
		}
		var back record.Time
		if err := json.Unmarshal(b, &back); err != nil || !back.Equal(at.Time) || back.Location() != time.UTC {
			t.Fatalf("%s came back as %v, %v", b, back, err)
		}
	}
}

func TestTimeYearBounds(t *testing.T) {
	t.Parallel()
	first, last := time.Date(0, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(9999, 12, 31, 23, 59, 59, 999_999_999, time.UTC)
	for _, at := range []time.Time{first, last} {
		if _, err := json.Marshal(record.At(at)); err != nil {
			t.Errorf("%v: %v", at, err)
		}
	}
	for _, at := range []time.Time{first.Add(-1), last.Add(1)} {
		if b, err := json.Marshal(record.At(at)); err == nil {
			t.Errorf("%v written as %s", at, b)
		}
		rec := record.Record{Schema: 1, Status: record.Pending, AcceptedAt: record.At(at), SubscriberID: 1, RequestID: "A"}
		if b, err := rec.Encode(); err == nil {
			t.Errorf("a record of %v written as %s", at, b)
		}
	}
	for _, text := range []string{`"0000-01-01T00:00:00+00:01"`, `"9999-12-31T23:59:59-00:01"`, `"yesterday"`, `7`, `{}`} {
		var at record.Time
		if err := json.Unmarshal([]byte(text), &at); err == nil {
			t.Errorf("%s read as %v", text, at)
		}
	}
	var at record.Time
	if err := json.Unmarshal([]byte(`"2026-11-23T10:08:07.5+01:00"`), &at); err != nil || at.String() != "2026-11-23T09:08:07.500000000Z" {
		t.Errorf("%v, %v", at, err)
	}
}

func TestDecodeRefuses(t *testing.T) {
	t.Parallel()
	valid := `{"schema":1,"status":"failed","accepted_at":"2026-11-23T09:08:07.000000000Z","subscriber_id":12,"reason":"too_old","request_id":"A","session_id":"s","user_id":"u"}`
	if _, err := record.Decode([]byte(valid)); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string][2]string{
		"schema 0":         {`"schema":1`, `"schema":0`},
		"unknown status":   {`"failed"`, `"lost"`},
		"no status":        {`"failed"`, `""`},
		"no accepted_at":   {`"2026-11-23T09:08:07.000000000Z"`, `null`},
		"accepted_at":      {`"2026-11-23T09:08:07.000000000Z"`, `"secret"`},
		"no subscriber":    {`"subscriber_id":12`, `"subscriber_id":0`},
		"no request_id":    {`"request_id":"A"`, `"request_id":""`},
		"ready, no signal": {`"failed"`, `"ready"`},
		"wrong type":       {`"u"`, `["secret"]`},
		"cut short":        {`}`, ``},
		"two":              {`}`, `}{}`},
	} {
		body := strings.Replace(valid, change[0], change[1], 1)
		if body == valid {
			t.Fatalf("%s: nothing changed", name)
		}
		_, err := record.Decode([]byte(body))
		if err == nil || errors.Is(err, record.ErrNewer) {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v quotes what was read", name, err)
		}
	}
	if _, err := record.Decode([]byte(strings.Replace(valid, `"schema":1`, `"schema":2`, 1))); !errors.Is(err, record.ErrNewer) {
		t.Errorf("schema 2: %v", err)
	}
}

func TestStatusTerminal(t *testing.T) {
	t.Parallel()
	for s, want := range map[record.Status]bool{
		record.Pending: false, record.Ready: true, record.NotFound: true, record.Rejected: true, record.Failed: true, "": false, "other": false,
	} {
		if s.Terminal() != want {
			t.Errorf("%q: %v", s, !want)
		}
	}
}

func TestKey(t *testing.T) {
	t.Parallel()
	if k := record.Key("1708102555327.NLOjmg"); k != "fp:prefetch:1708102555327.NLOjmg" {
		t.Error(k)
	}
}
