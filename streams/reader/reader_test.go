package reader_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/reader"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// Every golden record, of every schema version there ever was, has its
// outcome.
func TestLookupReadsEveryGoldenRecord(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("../testdata/wire/record-*.json")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	outcomes := map[string]reader.Outcome{
		"ready": reader.Ready, "pending": reader.Pending,
		"not_found": reader.Negative, "rejected": reader.Negative, "failed": reader.Negative,
	}
	for _, file := range files {
		body, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var counted []reader.Outcome
		r := reader.Reader{
			Get: func(_ context.Context, key string) ([]byte, error) {
				if key != "fp:prefetch:1708102555327.NLOjmg" {
					t.Errorf("asked for %s", key)
				}
				return body, nil
			},
			Count: func(o reader.Outcome) { counted = append(counted, o) },
		}
		_, status, _ := strings.Cut(strings.TrimPrefix(strings.TrimSuffix(filepath.Base(file), ".json"), "record-"), "-")
		res, err := r.Lookup(t.Context(), 12345, "1708102555327.NLOjmg")
		if err != nil || res.Outcome != outcomes[status] || string(res.Record.Status) != status {
			t.Errorf("%s: %s, status %s, %v", file, res.Outcome, res.Record.Status, err)
		}
		if res.Outcome == reader.Negative && res.Record.Reason == "" {
			t.Errorf("%s: without a reason", file)
		}
		// To anybody else it is foreign and shows nothing.
		res, err = r.Lookup(t.Context(), 1234, "1708102555327.NLOjmg")
		if err != nil || res.Outcome != reader.Foreign || res.Record.RequestID != "" {
			t.Errorf("%s read by another subscriber: %+v, %v", file, res, err)
		}
		if want := []reader.Outcome{outcomes[status], reader.Foreign}; !slices.Equal(counted, want) {
			t.Errorf("%s: counted %v, want %v", file, counted, want)
		}
	}
}

func TestLookupFails(t *testing.T) {
	t.Parallel()
	away := errors.New("away")
	newer := `{"schema":2,"status":"ready","accepted_at":"2026-11-23T09:08:07.000000000Z","subscriber_id":12,"request_id":"A"}`
	tests := map[string]struct {
		value string
		err   error
		want  error // nil: any
	}{
		"Redis is away":  {"", away, away},
		"a newer record": {newer, nil, record.ErrNewer},
		"no record":      {"secret", nil, nil},
		"empty":          {"", nil, nil},
		"of another id":  {pending("B"), nil, nil},
		"cut short":      {`{"schema":1,"status":"ready"}`, nil, nil},
	}
	for name, tt := range tests {
		var counted []reader.Outcome
		r := reader.Reader{
			Get:   func(context.Context, string) ([]byte, error) { return []byte(tt.value), tt.err },
			Count: func(o reader.Outcome) { counted = append(counted, o) },
		}
		res, err := r.Lookup(t.Context(), 12, "A")
		if err == nil || tt.want != nil && !errors.Is(err, tt.want) || strings.Contains(fmt.Sprint(err), "secret") {
			t.Errorf("%s: %v", name, err)
		}
		if res.Outcome != reader.Failed || !slices.Equal(counted, []reader.Outcome{reader.Failed}) {
			t.Errorf("%s: %s, counted %v", name, res.Outcome, counted)
		}
	}
}

func pending(id string) string { return head(record.Pending, id) }

func head(s record.Status, id string) string {
	b, err := record.Record{
		Schema: 1, Status: s, AcceptedAt: record.At(time.Unix(1_800_000_000, 0)), SubscriberID: 12,
		RequestID: id, Signals: &record.Signals{},
	}.Encode()
	if err != nil {
		panic(err)
	}
	return string(b)
}

// What is pending is waited for as long as asked, what is absent only briefly,
// and what has ended not at all.
func TestLookupWait(t *testing.T) {
	t.Parallel()
	type step struct {
		from time.Duration // since the start
		body string        // empty: no key
		err  error
	}
	away := errors.New("away")
	tests := map[string]struct {
		steps        []step
		cancel       time.Duration // of ctx; 0: never
		wait         time.Duration
		want         reader.Outcome
		after, until time.Duration
		fails        bool
	}{
		"ready at once":           {steps: []step{{0, head(record.Ready, "A"), nil}}, wait: time.Second, want: reader.Ready},
		"ready meanwhile":         {steps: []step{{0, pending("A"), nil}, {300 * time.Millisecond, head(record.Ready, "A"), nil}}, wait: time.Second, want: reader.Ready, after: 300 * time.Millisecond, until: 340 * time.Millisecond},
		"negative meanwhile":      {steps: []step{{0, pending("A"), nil}, {3 * time.Millisecond, head(record.NotFound, "A"), nil}}, wait: time.Second, want: reader.Negative, after: 3 * time.Millisecond, until: 10 * time.Millisecond},
		"pending for too long":    {steps: []step{{0, pending("A"), nil}}, wait: 400 * time.Millisecond, want: reader.Pending, after: 400 * time.Millisecond, until: 400 * time.Millisecond},
		"no wait":                 {steps: []step{{0, pending("A"), nil}}, wait: 0, want: reader.Pending},
		"absent":                  {wait: time.Second, want: reader.Absent, after: 50 * time.Millisecond, until: 90 * time.Millisecond},
		"absent, less wait":       {wait: 20 * time.Millisecond, want: reader.Absent, after: 20 * time.Millisecond, until: 20 * time.Millisecond},
		"marker comes, then done": {steps: []step{{10 * time.Millisecond, pending("A"), nil}, {200 * time.Millisecond, head(record.Ready, "A"), nil}}, wait: time.Second, want: reader.Ready, after: 200 * time.Millisecond, until: 240 * time.Millisecond},
		"caller gives up":         {steps: []step{{0, pending("A"), nil}}, cancel: 100 * time.Millisecond, wait: time.Second, want: reader.Pending, after: 100 * time.Millisecond, until: 100 * time.Millisecond},
		"Redis goes away":         {steps: []step{{0, pending("A"), nil}, {time.Millisecond, "", away}}, wait: time.Second, want: reader.Failed, after: time.Millisecond, until: 10 * time.Millisecond, fails: true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				start, looks, counted := time.Now(), 0, 0
				r := reader.Reader{
					Get: func(context.Context, string) ([]byte, error) {
						looks++
						now := step{}
						for _, s := range tt.steps {
							if time.Since(start) >= s.from {
								now = s
							}
						}
						if now.body == "" {
							return nil, now.err
						}
						return []byte(now.body), now.err
					},
					Count: func(o reader.Outcome) {
						counted++
						if o != tt.want {
							t.Errorf("counted %s", o)
						}
					},
				}
				ctx := t.Context()
				if tt.cancel > 0 {
					var cancel context.CancelFunc
					ctx, cancel = context.WithTimeout(ctx, tt.cancel)
					defer cancel()
				}
				res, err := r.LookupWait(ctx, 12, "A", tt.wait)
				took := time.Since(start)
				if res.Outcome != tt.want || (err != nil) != tt.fails {
					t.Errorf("%s, %v; want %s", res.Outcome, err, tt.want)
				}
				if took < tt.after || took > tt.until {
					t.Errorf("took %v, want %v to %v", took, tt.after, tt.until)
				}
				if counted != 1 {
					t.Errorf("counted %d times", counted)
				}
				if most := 6 + int(took/(32*time.Millisecond)); looks > most {
					t.Errorf("%d looks in %v", looks, took)
				}
			})
		})
	}
}

// A scorer that imports this package gets the standard library and the record,
// and nothing else to keep up to date.
func TestDependsOnTheStandardLibraryAlone(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	const module = "github.com/idenza/fingerprint-prefetch/streams/"
	if got, want := strings.Fields(string(out)), []string{module + "record", module + "reader"}; !slices.Equal(got, want) {
		t.Errorf("depends on %v, want %v", got, want)
	}
}

func ExampleReader_Lookup() {
	redis := map[string]string{"fp:prefetch:1A2B3C4D5E": pending("1A2B3C4D5E")}
	r := reader.Reader{
		Get: func(_ context.Context, key string) ([]byte, error) {
			if v, ok := redis[key]; ok {
				return []byte(v), nil
			}
			return nil, nil
		},
		Count: func(o reader.Outcome) { fmt.Println("counted", o) },
	}
	for _, id := range []string{"1A2B3C4D5E", "never-handed-in"} {
		res, err := r.Lookup(context.Background(), 12, id)
		fmt.Println(id, res.Outcome, err)
	}
	res, _ := r.Lookup(context.Background(), 99, "1A2B3C4D5E")
	fmt.Println("to subscriber 99:", res.Outcome)
	// Output:
	// counted pending
	// 1A2B3C4D5E pending <nil>
	// counted absent
	// never-handed-in absent <nil>
	// counted foreign
	// to subscriber 99: foreign
}

func ExampleReader_LookupWait() {
	answers := []record.Status{record.Pending, record.Pending, record.Ready}
	r := reader.Reader{Get: func(context.Context, string) ([]byte, error) {
		s := answers[0]
		answers = answers[1:]
		return []byte(head(s, "1A2B3C4D5E")), nil
	}}
	res, err := r.LookupWait(context.Background(), 12, "1A2B3C4D5E", 300*time.Millisecond)
	fmt.Println(res.Outcome, err)
	// Output: ready <nil>
}
