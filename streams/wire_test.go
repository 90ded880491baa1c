package streams_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// wireEvent and its records are what the golden files in testdata/wire hold.
func wireEvent() streams.Event {
	return streams.Event{Schema: 1, RequestID: "1708102555327.NLOjmg", SubscriberID: 12345, SessionID: "sess-7f3a", UserID: `jürgen+"q"<x>@example.com`}
}

func wireAcceptedAt() time.Time { return time.Date(2026, 11, 23, 9, 8, 7, 60_000, time.UTC) }

func wireRecords() map[string]record.Record {
	negative := func(s record.Status, why record.Reason, attempts int) record.Record {
		r := streams.NewRecord(wireEvent(), wireAcceptedAt(), s, why)
		r.FetchedAt, r.Attempts = record.At(wireAcceptedAt().Add(31*time.Second)), attempts
		return r
	}
	ready := streams.NewRecord(wireEvent(), wireAcceptedAt(), record.Ready, "")
	ready.FetchedAt, ready.Attempts, ready.Source = record.At(wireAcceptedAt().Add(320*time.Millisecond)), 2, record.SourceAPI
	ready.Checks = &record.Checks{
		AgeMS: new(int64(812)), Fresh: new(true), Replayed: new(false), EventIDMatch: true,
		LinkedIDMatch: record.LinkedSession, SignalsComplete: true,
	}
	ready.Signals = &record.Signals{
		VisitorID: new("Ibk1527CUFmcnjLwIs4A9"), VisitorFound: new(true), Confidence: new(0.97),
		FirstSeenAt: new(int64(1705000000000)), LastSeenAt: new(int64(1708102000000)), IdentifiedAt: new(int64(1708102555327)),
		LinkedID: new("sess-7f3a"), IPAddress: new("203.0.113.9"), URL: new("https://shop.example/pay?a=1&b=2"), UserAgent: new("Mozilla/5.0"),
		Bot: new("not_detected"), VPN: new(false), VPNConfidence: new("high"), Proxy: new(true), ProxyConfidence: new("low"), ProxyType: new("residential"),
		Tor: new(false), AttackSource: new(false), EmailSpam: new(false), Datacenter: new(false), CountryCode: new("DE"), ASNType: new("isp"),
		Tampering: new(false), AntiDetectBrowser: new(false), Incognito: new(true), VirtualMachine: new(false), DeveloperTools: new(false),
		HighActivityDevice: new(false), Events24h: new(int64(3)), DistinctIP24h: new(int64(1)), SuspectScore: new(int64(7)),
	}
	// Spaces, escapes and number forms are the vendor's and stay.
	ready.Event = json.RawMessage(`{"event_id": "1708102555327.NLOjmg", "timestamp":1.708102555327e12 ,"url":"https:\/\/shop.example\/pay?a=1&b=2","note":"\u00fc < ü","tags":[ ]}`)
	return map[string]record.Record{
		"ready":     ready,
		"pending":   streams.NewRecord(wireEvent(), wireAcceptedAt(), record.Pending, ""),
		"not_found": negative(record.NotFound, record.EventNotFound, 5),
		"rejected":  negative(record.Rejected, record.EventIDInvalid, 1),
		"failed":    negative(record.Failed, record.UpstreamUnavailable, 9),
	}
}

// What is written today is, byte for byte, what the golden file holds. A
// change of the form needs a new file beside the old one, which other
// versions and old messages still have.
func TestWireFormat(t *testing.T) {
	t.Parallel()
	equal := func(file string, got []byte, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", file, err)
			return
		}
		want, err := os.ReadFile(filepath.Join("testdata", "wire", file))
		if err != nil {
			t.Error(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s: written\n%s\nwant\n%s", file, got, want)
		}
	}
	got, err := json.Marshal(wireEvent())
	equal("event-v1.json", got, err)
	for name, r := range wireRecords() {
		got, err := r.Encode()
		equal("record-v1-"+name+".json", got, err)
	}
}

// Every form that was ever written can be read for ever: replays hand out old
// messages. This test reads whatever lies there and never writes it anew.
func TestWireFilesDecodeForEver(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/wire/*.json")
	if err != nil || len(files) < 6 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		future := bytes.Replace(b, []byte(`{`), []byte(`{"a_future_member":{"deep":[1,"two"]},`), 1)
		name := strings.TrimSuffix(filepath.Base(file), ".json")
		kind, rest, _ := strings.Cut(name, "-")
		_, status, _ := strings.Cut(rest, "-")
		switch kind {
		case "event":
			for _, b := range [][]byte{b, future} {
				if e, err := streams.DecodeEvent(b); err != nil || e != wireEvent() {
					t.Errorf("%s: %+v, %v", name, e, err)
				}
			}
		case "record":
			r, err := record.Decode(b)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			e := wireEvent()
			if string(r.Status) != status || !r.AcceptedAt.Equal(wireAcceptedAt()) || r.SubscriberID != e.SubscriberID ||
				r.RequestID != e.RequestID || r.SessionID != e.SessionID || r.UserID != e.UserID {
				t.Errorf("%s: %+v", name, r)
			}
			if r.Status == record.Ready && (r.Checks == nil || *r.Signals.VisitorID == "" || !json.Valid(r.Event)) {
				t.Errorf("%s: without data: %+v", name, r)
			}
			if negative := r.Status.Terminal() && r.Status != record.Ready; negative != (r.Reason != "") {
				t.Errorf("%s: reason %q", name, r.Reason)
			}
			later, err := record.Decode(future)
			if err != nil {
				t.Errorf("%s with a member of the future: %v", name, err)
			}
			if d := cmp.Diff(r, later); d != "" {
				t.Errorf("%s with a member of the future: -want +got\n%s", name, d)
			}
		default:
			t.Errorf("%s is neither an event nor a record", name)
		}
	}
}

// A newer message is told from a broken one even when its known members have
// changed their type: it waits for a newer replica and is not given up.
func TestNewerSchemaIsRecognised(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{
		"same members":    `{"schema":2,"status":"ready","accepted_at":"2026-11-23T09:08:07.000000000Z","subscriber_id":12,"request_id":"A","session_id":"s","user_id":"u"}`,
		"other types":     `{"schema":2,"status":["ready"],"accepted_at":1700000000,"subscriber_id":"12","request_id":{"id":"A"},"session_id":1,"user_id":null}`,
		"other members":   `{"schema":7}`,
		"a status of its": `{"schema":2,"status":"superseded"}`,
	} {
		if _, err := streams.DecodeEvent([]byte(body)); !errors.Is(err, streams.ErrNewerSchema) {
			t.Errorf("%s: event: %v", name, err)
		}
		if _, err := record.Decode([]byte(body)); !errors.Is(err, record.ErrNewer) {
			t.Errorf("%s: record: %v", name, err)
		}
	}
	for name, body := range map[string]string{
		"schema as text": `{"schema":"2"}`, "no schema": `{}`, "negative": `{"schema":-1}`, "cut short": `{"schema":2`, "list": `[2]`, "nothing": ``,
	} {
		if _, err := streams.DecodeEvent([]byte(body)); err == nil || errors.Is(err, streams.ErrNewerSchema) {
			t.Errorf("%s: event: %v", name, err)
		}
		if _, err := record.Decode([]byte(body)); err == nil || errors.Is(err, record.ErrNewer) {
			t.Errorf("%s: record: %v", name, err)
		}
	}
}
