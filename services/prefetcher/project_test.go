package prefetcher

import (
	"bytes"
	"encoding/json"
	"flag"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

var update = flag.Bool("update", false, "rewrite the golden files of this package's projections")

const sampleID = "1763958999000.wEb000"

var sampleAt = time.UnixMilli(1763958999000)

func TestProjectGolden(t *testing.T) {
	t.Parallel()
	events := map[string][]byte{"web": fingerprintsim.Event(sampleID, sampleAt)}
	for _, name := range []string{"edge", "partial", "wrapped"} {
		b, err := os.ReadFile(filepath.Join("testdata", name+".event.json"))
		if err != nil {
			t.Fatal(err)
		}
		events[name] = b
	}
	for name, event := range events {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := Project(event)
			if err != nil {
				t.Fatal(err)
			}
			got, err := json.MarshalIndent(p, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			golden := filepath.Join("testdata", name+".projection.json")
			if *update {
				if err := os.WriteFile(golden, got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("projection differs (-want +got):\n%s", diff)
			}
		})
	}
}

// mapping is the contract between the vendor's names and ours, one row a
// field: where it is in the event, a value, and the signal it becomes.
var mapping = []struct{ path, value, signal string }{
	{"timestamp", `1708102555327`, "identified_at_ms"},
	{"identification.visitor_id", `"abc"`, "visitor_id"},
	{"identification.visitor_found", `true`, "visitor_found"},
	{"identification.confidence.score", `0.97`, "confidence"},
	{"identification.first_seen_at", `1700000000001`, "first_seen_at_ms"},
	{"identification.last_seen_at", `1700000000002`, "last_seen_at_ms"},
	{"linked_id", `"s-1"`, "linked_id"},
	{"ip_address", `"203.0.113.1"`, "ip_address"},
	{"url", `"https://example.com/a?b=<c>"`, "url"},
	{"user_agent", `"Mozilla/5.0"`, "user_agent"},
	{"bot", `"bad"`, "bot"},
	{"bot_type", `"headless"`, "bot_type"},
	{"vpn", `true`, "vpn"},
	{"vpn_confidence", `"high"`, "vpn_confidence"},
	{"proxy", `true`, "proxy"},
	{"proxy_confidence", `"low"`, "proxy_confidence"},
	{"proxy_details.proxy_type", `"residential"`, "proxy_type"},
	{"ip_blocklist.tor_node", `true`, "tor"},
	{"ip_blocklist.attack_source", `true`, "attack_source"},
	{"ip_blocklist.email_spam", `true`, "email_spam"},
	{"ip_info.v4.datacenter_result", `true`, "datacenter"},
	{"ip_info.v6.datacenter_result", `true`, "datacenter"},
	{"ip_info.v4.geolocation.country_code", `"CZ"`, "country_code"},
	{"ip_info.v6.geolocation.country_code", `"DE"`, "country_code"},
	{"ip_info.v4.asn_type", `"isp"`, "asn_type"},
	{"ip_info.v6.asn_type", `"hosting"`, "asn_type"},
	{"tampering", `true`, "tampering"},
	{"tampering_details.anti_detect_browser", `true`, "anti_detect_browser"},
	{"incognito", `false`, "incognito"},
	{"virtual_machine", `false`, "virtual_machine"},
	{"developer_tools", `false`, "developer_tools"},
	{"high_activity_device", `false`, "high_activity_device"},
	{"velocity.events.24_hours", `11`, "events_24h"},
	{"velocity.distinct_ip.24_hours", `2`, "distinct_ip_24h"},
	{"suspect_score", `8`, "suspect_score"},
}

// nest returns the members that lead to value, braces left out:
// nest("a.b", "1") is "a":{"b":1}.
func nest(path, value string) string {
	names := strings.Split(path, ".")
	return `"` + strings.Join(names, `":{"`) + `":` + value + strings.Repeat("}", len(names)-1)
}

// signals returns the signals of an event that are not null.
func signals(t *testing.T, event string) map[string]any {
	t.Helper()
	p, err := Project([]byte(event))
	if err != nil {
		t.Fatalf("Project(%s): %v", event, err)
	}
	b, err := json.Marshal(p.Signals)
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]any
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(all, func(_ string, v any) bool { return v == nil })
	return all
}

func TestProjectMapsEachField(t *testing.T) {
	t.Parallel()
	mapped := map[string]bool{}
	for _, m := range mapping {
		var want any
		if err := json.Unmarshal([]byte(m.value), &want); err != nil {
			t.Fatal(err)
		}
		got := signals(t, "{"+nest(m.path, m.value)+"}")
		if diff := cmp.Diff(map[string]any{m.signal: want}, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", m.path, diff)
		}
		mapped[m.signal] = true
	}
	b, err := json.Marshal(record.Signals{})
	if err != nil {
		t.Fatal(err)
	}
	var all map[string]any
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	for name := range all {
		if !mapped[name] {
			t.Errorf("no event member becomes the signal %s", name)
		}
	}
}

// TestProjectNullsOnlyTheFieldOfAnotherType puts every kind of value in every
// place on the way to every field, next to a field that must survive.
func TestProjectNullsOnlyTheFieldOfAnotherType(t *testing.T) {
	t.Parallel()
	want := map[string]any{"bot": "good"}
	for _, m := range mapping {
		if m.path == "bot" {
			continue
		}
		names := strings.Split(m.path, ".")
		for depth := 1; depth <= len(names); depth++ {
			path := strings.Join(names[:depth], ".")
			for _, v := range []string{`null`, `true`, `-7.25`, `"text"`, `[]`, `[{"result":true}]`, `{}`, `{"result":null}`, `{"x":{"result":1}}`} {
				if depth == len(names) && sameType(m.value, v) {
					continue
				}
				got := signals(t, `{`+nest(path, v)+`,"bot":"good"}`)
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s = %s (-want +got):\n%s", path, v, diff)
				}
			}
		}
	}
}

// sameType reports whether v fits where value does; of the numbers tried, none
// is an integer.
func sameType(value, v string) bool {
	number := func(k jsontext.Kind) bool { return k == '0' }
	boolean := func(k jsontext.Kind) bool { return k == 't' || k == 'f' }
	a, b := jsontext.Value(value).Kind(), jsontext.Value(v).Kind()
	return a == b && !number(a) || boolean(a) && boolean(b) || number(b) && strings.Contains(value, ".") && number(a)
}

func TestProjectTolerates(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("u", maxString)
	tests := map[string]struct {
		event string
		want  map[string]any
	}{
		"nothing at all":                 {` {} `, map[string]any{}},
		"members of tomorrow":            {`{"new":{"vpn":true},"list":[[{"vpn":true}]],"vpn":false}`, map[string]any{"vpn": false}},
		"object form of a signal":        {`{"vpn":{"confidence":"low","result":true,"methods":{"result":false}}}`, map[string]any{"vpn": true}},
		"whole number with a fraction":   {`{"suspect_score":8.0}`, map[string]any{"suspect_score": 8.0}},
		"number with a fraction":         {`{"suspect_score":8.5}`, map[string]any{}},
		"integer others would round":     {`{"timestamp":9007199254740993}`, map[string]any{}},
		"number no float can hold":       {`{"identification":{"confidence":{"score":1e999}},"suspect_score":-1e999}`, map[string]any{}},
		"IPv4 wins, whatever the order":  {`{"ip_info":{"v6":{"asn_type":"six"},"v4":{"asn_type":"four"}}}`, map[string]any{"asn_type": "four"}},
		"IPv4 without that member":       {`{"ip_info":{"v4":{"asn_type":"four"},"v6":{"datacenter_result":true}}}`, map[string]any{"asn_type": "four", "datacenter": true}},
		"escaped names":                  {`{"v\u0070n":true}`, map[string]any{"vpn": true}},
		"names in another case":          {`{"VPN":true}`, map[string]any{}},
		"duplicate names":                {`{"tags":{"a":1,"a":2},"bot":"bad","bot":"good","bot":7}`, map[string]any{"bot": "good"}},
		"lone surrogate":                 {`{"tags":"\ud800","bot":"\ud800"}`, map[string]any{"bot": "\uFFFD"}},
		"broken UTF-8":                   {"{\"tags\":\"\xff\",\"bot\":\"b\xffd\"}", map[string]any{"bot": "b\uFFFDd"}},
		"string just short enough":       {`{"url":"` + long + `"}`, map[string]any{"url": long}},
		"string too long for the signal": {`{"url":"` + long + `u"}`, map[string]any{}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tt.want, signals(t, tt.event)); diff != "" {
				t.Errorf("signals differ (-want +got):\n%s", diff)
			}
		})
	}
}

func TestProjectRefusesWhatIsNotOneObject(t *testing.T) {
	t.Parallel()
	for name, event := range map[string]string{
		"nothing":              ``,
		"white space":          " \n",
		"null":                 `null`,
		"array":                `[{"event_id":"secret"}]`,
		"string":               `"secret"`,
		"HTML":                 `<html>secret</html>`,
		"two objects":          `{"event_id":"secret"}{}`,
		"text after it":        `{"event_id":"secret"}secret`,
		"no closing brace":     `{"event_id":"secret"`,
		"mismatched brackets":  `{"secret":[}`,
		"single quotes":        `{'secret':1}`,
		"control character":    "{\"secret\":\"\x01\"}",
		"fault in a skipped":   `{"tags":{"secret":[1,2,,3]}}`,
		"fault in a read":      `{"identification":{"visitor_id":secret}}`,
		"number of another":    `{"suspect_score":0x10,"secret":1}`,
		"comma before the end": `{"secret":1,}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := Project([]byte(event))
			if err == nil {
				t.Fatal("no error")
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("error quotes the event: %v", err)
			}
		})
	}
}

func TestProjectRefusesEveryTruncation(t *testing.T) {
	t.Parallel()
	event := fingerprintsim.Event(sampleID, sampleAt)
	for n := range event {
		if _, err := Project(event[:n]); err == nil {
			t.Fatalf("no error for the first %d of %d bytes", n, len(event))
		}
	}
}

func TestProjectLeavesItsInputAlone(t *testing.T) {
	t.Parallel()
	event := fingerprintsim.Event(sampleID, sampleAt)
	before := bytes.Clone(event)
	p, err := Project(event)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, event) {
		t.Error("input changed")
	}
	clear(event)
	if got := *p.Signals.IPAddress; got != "203.0.113.64" {
		t.Errorf("ip_address = %q after the input was overwritten", got)
	}
}

func TestChecks(t *testing.T) {
	t.Parallel()
	at := time.UnixMilli(1763959000000)
	ptr := func(s string) *string { return &s }
	before := func(d time.Duration) int64 { return at.Add(-d).UnixMilli() }
	yes, no := true, false
	ms := func(d time.Duration) *int64 { n := d.Milliseconds(); return &n }

	tests := map[string]struct {
		p    Projection
		want record.Checks
	}{
		"nothing known": {Projection{}, record.Checks{LinkedIDMatch: record.LinkedAbsent}},
		"fresh": {
			Projection{EventID: "id", Timestamp: before(1500 * time.Millisecond), Complete: true, Replayed: &no},
			record.Checks{AgeMS: ms(1500 * time.Millisecond), Fresh: &yes, Replayed: &no, EventIDMatch: true, LinkedIDMatch: record.LinkedAbsent, SignalsComplete: true},
		},
		"just fresh": {
			Projection{Timestamp: before(record.FreshWithin)},
			record.Checks{AgeMS: ms(record.FreshWithin), Fresh: &yes, LinkedIDMatch: record.LinkedAbsent},
		},
		"just stale": {
			Projection{Timestamp: before(record.FreshWithin + time.Millisecond)},
			record.Checks{AgeMS: ms(record.FreshWithin + time.Millisecond), Fresh: &no, LinkedIDMatch: record.LinkedAbsent},
		},
		"clock skew": {
			Projection{Timestamp: before(-record.ClockSkew)},
			record.Checks{AgeMS: ms(-record.ClockSkew), Fresh: &yes, LinkedIDMatch: record.LinkedAbsent},
		},
		"from the future": {
			Projection{Timestamp: before(-record.ClockSkew - time.Millisecond)},
			record.Checks{AgeMS: ms(-record.ClockSkew - time.Millisecond), Fresh: &no, LinkedIDMatch: record.LinkedAbsent},
		},
		"session":        {Projection{LinkedID: ptr("session")}, record.Checks{LinkedIDMatch: record.LinkedSession}},
		"user":           {Projection{LinkedID: ptr("user")}, record.Checks{LinkedIDMatch: record.LinkedUser}},
		"neither":        {Projection{LinkedID: ptr("Session")}, record.Checks{LinkedIDMatch: record.LinkedNone}},
		"empty":          {Projection{LinkedID: ptr("")}, record.Checks{LinkedIDMatch: record.LinkedAbsent}},
		"other event id": {Projection{EventID: "ID"}, record.Checks{LinkedIDMatch: record.LinkedAbsent}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if diff := cmp.Diff(tt.want, tt.p.Checks("id", "session", "user", at)); diff != "" {
				t.Errorf("checks differ (-want +got):\n%s", diff)
			}
		})
	}

	far := Projection{Timestamp: maxInt}.Checks("id", "session", "user", at)
	if *far.Fresh || *far.AgeMS >= 0 {
		t.Errorf("the farthest timestamp: age %d ms, fresh %v", *far.AgeMS, *far.Fresh)
	}
}

// FuzzProject compares with a slow reading through encoding/json.
func FuzzProject(f *testing.F) {
	f.Add(fingerprintsim.Event(sampleID, sampleAt))
	for _, m := range mapping {
		f.Add([]byte("{" + nest(m.path, m.value) + "}"))
	}
	files, err := filepath.Glob("testdata/*.event.json")
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Project(b)
		if !json.Valid(b) || jsontext.Value(b).Kind() != '{' {
			if err == nil {
				t.Fatal("accepted what is not a JSON object")
			}
			return
		}
		if err != nil {
			t.Fatalf("refused a JSON object: %v", err)
		}
		if _, err := json.Marshal(p); err != nil {
			t.Fatalf("projection cannot be written: %v", err)
		}
		if !jsontext.Value(b).IsValid() {
			return // duplicate names and broken Unicode have no one right reading
		}
		var event map[string]any
		d := json.NewDecoder(bytes.NewReader(b))
		d.UseNumber()
		if err := d.Decode(&event); err != nil {
			t.Fatal(err)
		}
		want := Projection{Complete: true}
		if s, ok := event["event_id"].(string); ok && len(s) <= maxString {
			want.EventID = s
		}
		want.Signals.Confidence = slowNumber(event, "identification", "confidence", "score")
		if n := slowNumber(event, "velocity", "events", "24_hours"); n != nil && *n == math.Trunc(*n) && math.Abs(*n) <= maxInt {
			i := int64(*n)
			want.Signals.Events24h = &i
		}
		want.Signals.VPN = slowBool(event, "vpn")
		want.Signals.Tor = slowBool(event, "ip_blocklist", "tor_node")
		if slow(event, "incremental_identification_status") == "partially_completed" {
			want.Complete = false
			want.Signals.Events24h, want.Signals.VPN, want.Signals.Tor = nil, nil, nil
		}
		got := Projection{EventID: p.EventID, Complete: p.Complete, Signals: record.Signals{
			Confidence: p.Signals.Confidence, Events24h: p.Signals.Events24h, VPN: p.Signals.VPN, Tor: p.Signals.Tor,
		}}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("the slow reading differs (-slow +fast):\n%s", diff)
		}
	})
}

func slow(v any, path ...string) any {
	for _, name := range path {
		object, _ := v.(map[string]any)
		v = object[name]
	}
	return v
}

func slowNumber(event map[string]any, path ...string) *float64 {
	n, ok := slow(event, path...).(json.Number)
	if !ok {
		return nil
	}
	f, err := n.Float64()
	if err != nil {
		return nil
	}
	return &f
}

func slowBool(event map[string]any, path ...string) *bool {
	v := slow(event, path...)
	if object, ok := v.(map[string]any); ok {
		v = object["result"]
	}
	b, ok := v.(bool)
	if !ok {
		return nil
	}
	return &b
}

func BenchmarkProject(b *testing.B) {
	event := fingerprintsim.Event(sampleID, sampleAt)
	b.SetBytes(int64(len(event)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Project(event); err != nil {
			b.Fatal(err)
		}
	}
}
