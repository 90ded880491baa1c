package persister

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

func TestTrimKeepsTheVendorsBytes(t *testing.T) {
	t.Parallel()
	event := `{ "event_id":"x","n":1.50 ,"raw_device_attributes":{"a":{"b":[1,2]}}, "u":"é<>&"}`
	for detail, want := range map[EventDetail]string{
		EventLean: `{ "event_id":"x","n":1.50, "u":"é<>&"}`, EventFull: event, EventNone: "",
	} {
		got, err := trim([]byte(event), detail)
		if err != nil || string(got) != want {
			t.Errorf("%s: %s (%v), want %s", detail, got, err, want)
		}
	}
	for in, want := range map[string]string{
		`{"raw_device_attributes":1,"a":2}`:                             `{"a":2}`,
		`{"a":2,"raw_device_attributes":[]}`:                            `{"a":2}`,
		`{"raw_device_attributes":[]}`:                                  `{}`,
		`{"raw_device_attributes":1,"raw_device_attributes":2}`:         `{}`,
		`{"raw_device_attributes":1 , "raw_device_attributes":2,"a":3}`: `{"a":3}`,
		`{"a":{"raw_device_attributes":1}}`:                             `{"a":{"raw_device_attributes":1}}`,
		`{"a":"raw_device_attributes\""}`:                               `{"a":"raw_device_attributes\""}`,
	} {
		if got, err := trim([]byte(in), EventLean); err != nil || string(got) != want {
			t.Errorf("%s: %s (%v), want %s", in, got, err, want)
		}
	}
	for _, in := range []string{`1`, `[]`, `{`, `{}{}`, `{},"x":1`, `{"a":1,}`, `{"a" 1}`, ` `} {
		for _, detail := range []EventDetail{EventLean, EventFull, EventNone} {
			if got, err := trim([]byte(in), detail); err == nil {
				t.Errorf("%s: %s is taken for an object: %s", detail, in, got)
			}
		}
	}
}

// Whatever the bytes: prepare takes what the record package can decode, the
// body it returns starts with the head of the record it returns, and nothing
// but the dropped part is lost.
func FuzzPrepare(f *testing.F) {
	files, err := filepath.Glob("../../streams/testdata/wire/record-*.json")
	if err != nil || len(files) < 5 {
		f.Fatalf("%d golden records, %v", len(files), err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
		f.Add(append([]byte(" "), b...))
		f.Add(append(b[:len(b):len(b)], '\n'))
		f.Add(bytes.Replace(b, []byte(`{`), []byte(`{"event":{},`), 1))
		f.Add(bytes.Replace(b, []byte(`"request_id"`), []byte(`"status":"failed","request_id"`), 1))
		f.Add(bytes.Replace(b, []byte(`"request_id"`), []byte(`"later":{"a":1,"event":2},"request_id"`), 1))
		f.Add(bytes.Replace(b, []byte(`"event":{`), []byte(`"event":{"raw_device_attributes":{"x":[1]},`), 1))
		f.Add(append(b[:len(b)-1:len(b)-1], `,"event":{"a":1},"event":{"b":2}}`...))
		f.Add(append(b[:len(b)-1:len(b)-1], `,"event":{"a":1},"later":3}`...))
		f.Add(append(b[:len(b)-1:len(b)-1], `,"event":[]}`...))
		f.Add(bytes.Replace(b, []byte(`"schema":1`), []byte(`"schema":2`), 1))
		f.Add(b[:len(b)/2])
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		want, wantErr := record.Decode(data)
		for _, detail := range []EventDetail{EventLean, EventFull, EventNone} {
			rec, body, err := prepare(data, detail)
			if errors.Is(err, record.ErrNewer) != errors.Is(wantErr, record.ErrNewer) {
				t.Fatalf("%v, want %v", err, wantErr)
			}
			if err != nil {
				if wantErr == nil && len(want.Event) == 0 {
					t.Fatal(err)
				}
				continue
			}
			if wantErr != nil {
				t.Fatalf("taken, but %v", wantErr)
			}
			if !bytes.HasPrefix(body, appendHead(nil, rec)) {
				t.Fatalf("%s does not start with %s", body, appendHead(nil, rec))
			}
			got, err := record.Decode(body)
			if err != nil {
				t.Fatalf("%v: %s", err, body)
			}
			event, err := trim(want.Event, detail)
			if err != nil {
				t.Fatalf("an event that cannot be trimmed was taken: %v", err)
			}
			if !bytes.Equal(bytes.TrimSpace(got.Event), bytes.TrimSpace(event)) {
				t.Fatalf("event %s, want %s", got.Event, event)
			}
			rest := want
			got.Event, rest.Event = nil, nil
			a, _ := json.Marshal(got)
			b, _ := json.Marshal(rest)
			c, _ := json.Marshal(rec)
			if !bytes.Equal(a, b) || !bytes.Equal(b, c) {
				t.Fatalf("stored %s\nreturned %s\nwant %s", a, c, b)
			}
		}
	})
}
