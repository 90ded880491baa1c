package ingest

import (
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// document is the part of an OpenAPI document this test reads.
type document struct {
	OpenAPI string
	Paths   map[string]map[string]struct {
		Responses map[string]struct {
			Headers map[string]json.RawMessage
			Content map[string]struct{ Schema ref }
		}
	}
	Components struct {
		Schemas map[string]struct {
			Required   []string
			Properties map[string]json.RawMessage
		}
	}
}

type ref struct {
	Ref string `json:"$ref"`
}

// Every answer of the real handler is in the document, with the members and
// the headers it describes, and every status in the document has been seen.
func TestOpenAPIDescribesTheRealAnswers(t *testing.T) {
	t.Parallel()
	e := newEdge(t, stored)
	addr := e.listen(t)
	get := send(t, request(t, addr, "", "", func(r *http.Request) {
		r.Method, r.URL.Path, r.Body, r.ContentLength = http.MethodGet, openAPIPath, nil, 0
	}))
	if get.StatusCode != http.StatusOK {
		t.Fatalf("%s: %d %s", openAPIPath, get.StatusCode, get.body)
	}
	var doc document
	if err := json.Unmarshal([]byte(get.body), &doc); err != nil || !strings.HasPrefix(doc.OpenAPI, "3.1.") {
		t.Fatalf("%v, version %q", err, doc.OpenAPI)
	}
	responses := doc.Paths[ingestPath]["post"].Responses
	seen := map[string]bool{}
	check := func(a answer) {
		t.Helper()
		status := strconv.Itoa(a.StatusCode)
		seen[status] = true
		described, ok := responses[status]
		if !ok {
			t.Errorf("%s is not described", status)
			return
		}
		var body map[string]json.RawMessage
		if err := json.Unmarshal([]byte(a.body), &body); err != nil {
			t.Errorf("%s: %v", status, err)
		}
		schema := doc.Components.Schemas[strings.TrimPrefix(described.Content["application/json"].Schema.Ref, "#/components/schemas/")]
		if diff := cmp.Diff(slices.Sorted(maps.Keys(schema.Properties)), slices.Sorted(maps.Keys(body))); diff != "" {
			t.Errorf("%s: members described and sent differ:\n%s", status, diff)
		}
		for _, name := range []string{"Retry-After", "WWW-Authenticate", "RateLimit-Limit", "RateLimit-Remaining", "RateLimit-Reset", "Idempotent-Replayed"} {
			if _, described := described.Headers[name]; a.Header.Get(name) != "" && !described {
				t.Errorf("%s: header %s is sent and not described", status, name)
			}
		}
	}
	post := func(p publisherFunc, key, body string, change ...func(*http.Request)) {
		t.Helper()
		e.publisher = p
		check(send(t, request(t, addr, key, body, change...)))
	}
	post(stored, e.acme, goodBody)
	post(func(context.Context, streams.Message) (streams.Ack, error) { return streams.Ack{Duplicate: true}, nil }, e.acme, goodBody)
	post(stored, e.acme, `{}`)
	post(stored, e.revoked, goodBody)
	post(stored, e.acme, strings.Replace(goodBody, "12", "13", 1))
	post(stored, e.acme, strings.Repeat(" ", maxBody+1))
	post(stored, e.acme, goodBody, func(r *http.Request) { r.Header.Set("Content-Type", "text/plain") })
	post(func(context.Context, streams.Message) (streams.Ack, error) { panic("bug") }, e.acme, goodBody)
	post(func(context.Context, streams.Message) (streams.Ack, error) { return streams.Ack{}, streams.ErrUnsure }, e.acme, goodBody)
	_, acme := testKey(t, "acme-1", "12")
	one := 1.0
	acme.RateLimit = &one
	writeKeys(t, e.keysFile, acme)
	e.keys.reload()
	post(stored, e.acme, goodBody)
	post(stored, e.acme, goodBody)
	if diff := cmp.Diff(slices.Sorted(maps.Keys(responses)), slices.Sorted(maps.Keys(seen))); diff != "" {
		t.Errorf("statuses described and seen differ:\n%s", diff)
	}
}
