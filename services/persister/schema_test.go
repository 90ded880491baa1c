package persister

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

const (
	schemaFile = "../../streams/record/record.schema.json"
	scorerPage = "../../streams/record/README.md"
)

func recordSchema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	s, err := jsonschema.NewCompiler().Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func validate(s *jsonschema.Schema, body []byte) error {
	v, err := jsonschema.UnmarshalJSON(bytes.NewReader(body))
	if err != nil {
		return err
	}
	return s.Validate(v)
}

func goldenRecords(t *testing.T) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("../../streams/testdata/wire/record-*.json")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d golden records, %v", len(files), err)
	}
	out := map[string][]byte{}
	for _, f := range files {
		if out[filepath.Base(f)], err = os.ReadFile(f); err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestSchemaAcceptsGoldenRecords(t *testing.T) {
	t.Parallel()
	s := recordSchema(t)
	for name, body := range goldenRecords(t) {
		if err := validate(s, body); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The schema refuses what a reader would trip over.
func TestSchemaRefuses(t *testing.T) {
	t.Parallel()
	s := recordSchema(t)
	golden := goldenRecords(t)
	for name, c := range map[string]struct{ file, old, new string }{
		"unknown status":          {"record-v1-failed.json", `"failed"`, `"lost"`},
		"unknown reason":          {"record-v1-failed.json", `"upstream_unavailable"`, `"bad_weather"`},
		"an outage's reason":      {"record-v1-not_found.json", `"event_not_found"`, `"upstream_unavailable"`},
		"a forger's reason":       {"record-v1-failed.json", `"upstream_unavailable"`, `"event_not_found"`},
		"no reason":               {"record-v1-rejected.json", `"reason":"event_id_invalid",`, ``},
		"ready with a reason":     {"record-v1-ready.json", `"request_id"`, `"reason":"poison","request_id"`},
		"ready without signals":   {"record-v1-ready.json", `"signals":`, `"other":`},
		"a signal missing":        {"record-v1-ready.json", `"tor":false,`, ``},
		"a signal of other type":  {"record-v1-ready.json", `"tor":false`, `"tor":"false"`},
		"subscriber as text":      {"record-v1-pending.json", `"subscriber_id":12345`, `"subscriber_id":"12345"`},
		"a time of another width": {"record-v1-pending.json", `.000060000Z`, `.00006Z`},
		"pending with signals":    {"record-v1-pending.json", `"request_id"`, `"signals":{},"request_id"`},
	} {
		body := bytes.Replace(golden[c.file], []byte(c.old), []byte(c.new), 1)
		if bytes.Equal(body, golden[c.file]) {
			t.Errorf("%s: nothing changed", name)
		}
		if validate(s, body) == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

// The schema describes every member the Go types have, and no other.
func TestSchemaNamesEveryMember(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	type object struct {
		Required   []string
		Properties map[string]any
	}
	var schema struct {
		object
		Defs map[string]object `json:"$defs"`
	}
	if err := json.Unmarshal(b, &schema); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		object object
		typ    reflect.Type
	}{
		{schema.object, reflect.TypeFor[record.Record]()},
		{schema.Defs["checks"], reflect.TypeFor[record.Checks]()},
		{schema.Defs["signals"], reflect.TypeFor[record.Signals]()},
	} {
		var members, always []string
		for f := range c.typ.Fields() {
			name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
			members = append(members, name)
			if options == "" {
				always = append(always, name)
			}
		}
		var described []string
		for name := range c.object.Properties {
			described = append(described, name)
		}
		slices.Sort(members)
		slices.Sort(described)
		if !slices.Equal(members, described) {
			t.Errorf("%s: members %v, described %v", c.typ, members, described)
		}
		if !slices.Equal(always, c.object.Required) {
			t.Errorf("%s: always there %v, required %v", c.typ, always, c.object.Required)
		}
	}
}

// What a real persister leaves in Redis, at every level of detail, is what the
// schema says.
func TestSchemaAcceptsWhatIsWritten(t *testing.T) {
	t.Parallel()
	s := recordSchema(t)
	for _, detail := range []EventDetail{EventLean, EventFull, EventNone} {
		t.Run(string(detail), func(t *testing.T) {
			t.Parallel()
			r := start(t, streamstest.NewRedis(t), "RECORD_EVENT="+string(detail), "RECORD_TTL=72h")
			var want []string
			add := func(rec record.Record, stream, subject string, body []byte) {
				r.publish(stream, subject, rec.RequestID, body)
				want = append(want, rec.RequestID)
			}
			for name, body := range goldenRecords(t) {
				rec, err := record.Decode(body)
				if err != nil {
					t.Fatal(err)
				}
				rec.AcceptedAt, rec.RequestID = record.At(time.Now()), strings.TrimSuffix(name, ".json")
				if rec.Status == record.Pending {
					e := streams.Event{Schema: 1, RequestID: rec.RequestID, SubscriberID: rec.SubscriberID, SessionID: rec.SessionID, UserID: rec.UserID}
					body, _ := json.Marshal(e)
					add(rec, streams.StreamIngest, streams.IngestSubject(rec.SubscriberID), body)
					continue
				}
				if body, err = rec.Encode(); err != nil {
					t.Fatal(err)
				}
				add(rec, streams.StreamEnriched, streams.EnrichedSubject(rec.SubscriberID), body)
			}
			for _, id := range want {
				streamstest.Eventually(t, id, func() bool { return r.status(id) != "" })
				body, err := r.rdb.Get(t.Context(), record.Key(id)).Bytes()
				if err != nil {
					t.Fatal(err)
				}
				if err := validate(s, body); err != nil {
					t.Errorf("%s: %v", id, err)
				}
			}
		})
	}
}

// block returns what the scorer page shows in a language.
func blocks(t *testing.T, language string) []string {
	t.Helper()
	page, err := os.ReadFile(scorerPage)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, m := range regexp.MustCompile("(?s)```"+language+"\n(.*?)```").FindAllSubmatch(page, -1) {
		out = append(out, string(m[1]))
	}
	return out
}

func TestScorerPageShowsEveryStatus(t *testing.T) {
	t.Parallel()
	s := recordSchema(t)
	var seen []string
	for _, b := range blocks(t, "json") {
		if err := validate(s, []byte(b)); err != nil {
			t.Errorf("%v\n%s", err, b)
		}
		rec, err := record.Decode([]byte(b))
		if err != nil {
			t.Errorf("%v\n%s", err, b)
		}
		seen = append(seen, string(rec.Status))
	}
	if want := []string{"pending", "ready", "not_found", "rejected", "failed"}; !slices.Equal(seen, want) {
		t.Errorf("the page shows %v, want %v", seen, want)
	}
}

// The readers on the scorer page run, and agree.
func TestScorerPageReadersWork(t *testing.T) {
	t.Parallel()
	rds := streamstest.NewRedis(t)
	rdb := client(t, rds.URL())
	for _, b := range blocks(t, "json") {
		rec, err := record.Decode([]byte(b))
		if err != nil {
			t.Fatal(err)
		}
		if err := rdb.Set(t.Context(), record.Key(string(rec.Status)), strings.Replace(b, `"request_id":"`+rec.RequestID, `"request_id":"`+string(rec.Status), 1), 0).Err(); err != nil {
			t.Fatal(err)
		}
	}
	ready := rdb.Get(t.Context(), record.Key("ready")).Val()
	nameless := strings.Replace(ready, `"visitor_id":"Ibk1527CUFmcnjLwIs4A9"`, `"visitor_id":null`, 1)
	if nameless == ready {
		t.Fatal("the page's ready record has another visitor")
	}
	if err := rdb.Set(t.Context(), record.Key("nameless"), strings.Replace(nameless, `"request_id":"ready"`, `"request_id":"nameless"`, 1), 0).Err(); err != nil {
		t.Fatal(err)
	}
	goReader, pyReader := blocks(t, "go"), blocks(t, "python")
	if len(goReader) != 1 || len(pyReader) != 1 {
		t.Fatalf("%d readers in Go, %d in Python", len(goReader), len(pyReader))
	}
	dir := t.TempDir()
	file := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	bin := filepath.Join(dir, "scorer")
	run(t, "go", "build", "-o", bin, file("main.go", goReader[0]))
	script := file("scorer.py", pyReader[0]+pythonMain)
	for _, c := range []struct {
		subscriber int
		id, want   string
	}{
		{12, "ready", "ready, visitor Ibk1527CUFmcnjLwIs4A9"},
		{12, "nameless", "ready, visitor not told"},
		{12, "pending", "pending"},
		{12, "not_found", "negative, event_not_found"},
		{12, "rejected", "negative, event_id_invalid"},
		{12, "failed", "negative, upstream_unavailable"},
		{12, "never", "absent"},
		{1, "ready", "foreign"},
	} {
		if got := run(t, bin, rds.Addr, strconv.Itoa(c.subscriber), c.id); got != c.want {
			t.Errorf("Go, %s: %s, want %s", c.id, got, c.want)
		}
		if got := run(t, "python3", script, rds.Addr, strconv.Itoa(c.subscriber), c.id); got != c.want {
			t.Errorf("Python, %s: %s, want %s", c.id, got, c.want)
		}
	}
}

// pythonMain stands for a Redis client, which the standard library has not.
const pythonMain = `
import socket
import sys

host, port = sys.argv[1].split(":")
conn = socket.create_connection((host, int(port)))
replies = conn.makefile("rb")


def get(key):
    key = key.encode()
    conn.sendall(b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n" % (len(key), key))
    size = int(replies.readline()[1:])
    return None if size < 0 else replies.read(size + 2)[:-2]


outcome, record = lookup_wait(get, int(sys.argv[2]), sys.argv[3], 0.3)
if outcome == "ready":
    print("ready, visitor", record["signals"]["visitor_id"] or "not told")
elif outcome == "negative":
    print("negative,", record["reason"])
else:
    print(outcome)
`

// run returns what a command prints. A command that is not there fails the
// test.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).Output()
	if err != nil {
		detail := ""
		if e, ok := errors.AsType[*exec.ExitError](err); ok {
			detail = string(e.Stderr)
		}
		t.Fatal(fmt.Errorf("%s: %w\n%s", name, err, detail))
	}
	return strings.TrimSpace(string(out))
}
