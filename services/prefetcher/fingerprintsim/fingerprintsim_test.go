package fingerprintsim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const id = "1763958999000.wEb000"

// get calls sim without a socket.
func get(sim *Sim, id, authorization string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodGet, "/v4/events/"+id, nil)
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	w := httptest.NewRecorder()
	sim.ServeHTTP(w, r)
	return w
}

func TestEvent(t *testing.T) {
	t.Parallel()
	sim := New(Options{})
	w := get(sim, id, "Bearer x")
	if w.Code != http.StatusOK || w.Header().Get("Content-Type") != "application/json" {
		t.Fatalf("%d %s", w.Code, w.Header().Get("Content-Type"))
	}
	var event struct {
		EventID        string `json:"event_id"`
		Timestamp      int64  `json:"timestamp"`
		Identification struct {
			VisitorID string `json:"visitor_id"`
		} `json:"identification"`
	}
	var members map[string]any
	if err := errors.Join(json.Unmarshal(w.Body.Bytes(), &event), json.Unmarshal(w.Body.Bytes(), &members)); err != nil {
		t.Fatal(err)
	}
	if event.EventID != id || event.Timestamp != 1763958999000 || len(event.Identification.VisitorID) != 20 {
		t.Errorf("event %+v", event)
	}
	if n := w.Body.Len(); len(members) < 55 || n < 4<<10 || n > 7<<10 {
		t.Errorf("%d members in %d bytes: not the size of a real one", len(members), n)
	}
	if strings.Contains(w.Body.String(), "{{") {
		t.Error("placeholder left in the event")
	}
	if again := get(sim, id, "Bearer x"); !bytes.Equal(again.Body.Bytes(), w.Body.Bytes()) {
		t.Error("the same id was answered differently")
	}
	if other := get(sim, "1763958999000.oThEr1", "Bearer x"); strings.Contains(other.Body.String(), event.Identification.VisitorID) {
		t.Error("two ids share a visitor")
	}
}

func TestEventOfAnOpaqueIDIsRecentAndStable(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim := New(Options{})
		first := get(sim, "1A2B3C4D5E", "Bearer x").Body.Bytes()
		var event struct{ Timestamp int64 }
		if err := json.Unmarshal(first, &event); err != nil {
			t.Fatal(err)
		}
		if age := time.Since(time.UnixMilli(event.Timestamp)); age != 1500*time.Millisecond {
			t.Errorf("age %v", age)
		}
		time.Sleep(time.Hour)
		if again := get(sim, "1A2B3C4D5E", "Bearer x").Body.Bytes(); !bytes.Equal(first, again) {
			t.Error("the event changed with time")
		}
	})
}

func TestKey(t *testing.T) {
	t.Parallel()
	sim := New(Options{Key: "right"})
	for authorization, want := range map[string]string{
		"":             "secret_api_key_required",
		"Bearer ":      "secret_api_key_required",
		"Bearer wrong": "secret_api_key_not_found",
		"Bearer right": "",
	} {
		w := get(sim, id, authorization)
		if got := code(t, w); got != want {
			t.Errorf("Authorization %q: %d %s, want %q", authorization, w.Code, w.Body, want)
		}
	}
	if diff := cmp.Diff(map[int]int{200: 1, 403: 3}, sim.CountsByStatus()); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

// code returns the vendor's error code, "" for a 200.
func code(t *testing.T, w *httptest.ResponseRecorder) string {
	t.Helper()
	if w.Code == http.StatusOK {
		return ""
	}
	var e struct {
		Error struct{ Code, Message string }
	}
	if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil {
		t.Fatalf("%s: %v", w.Body, err)
	}
	return e.Error.Code
}

func TestFaultStatus(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		fault Fault
		code  string
	}{
		{Fault{}, ""},
		{Fault{Status: 400}, "request_cannot_be_parsed"},
		{Fault{Status: 400, Code: "ruleset_not_found"}, "ruleset_not_found"},
		{Fault{Status: 401, Code: "secret_api_key_not_found"}, "secret_api_key_not_found"},
		{Fault{Status: 403}, "secret_api_key_not_found"},
		{Fault{Status: 403, Code: "wrong_region"}, "wrong_region"},
		{Fault{Status: 404}, "event_not_found"},
		{Fault{Status: 429, RetryAfter: "2"}, "too_many_requests"},
		{Fault{Status: 500}, "failed"},
		{Fault{Status: 503}, "service_unavailable"},
		{Fault{Status: 504}, "failed"},
	} {
		sim := New(Options{})
		sim.SetFault(&tt.fault)
		w := get(sim, id, "Bearer x")
		if w.Code != tt.fault.status() || code(t, w) != tt.code || w.Header().Get("Retry-After") != tt.fault.RetryAfter {
			t.Errorf("%+v: %d %v %s", tt.fault, w.Code, w.Header(), w.Body)
		}
	}
}

func TestFaultBody(t *testing.T) {
	t.Parallel()
	normal := string(Event(id, time.UnixMilli(1763958999000)))
	for name, tt := range map[string]struct {
		fault       Fault
		contentType string
		ok          func(body string) bool
	}{
		"truncated":       {Fault{Garbage: Truncated}, "application/json", func(b string) bool { return len(b) > 1000 && len(b) < len(normal) && strings.HasPrefix(normal, b) }},
		"html":            {Fault{Garbage: HTML}, "text/html; charset=utf-8", func(b string) bool { return strings.HasPrefix(b, "<html>") }},
		"html 403":        {Fault{Status: 403, Garbage: HTML}, "text/html; charset=utf-8", func(b string) bool { return strings.Contains(b, "403 Forbidden") }},
		"bad gateway":     {Fault{Status: 502}, "text/html; charset=utf-8", func(b string) bool { return strings.Contains(b, "502 Bad Gateway") }},
		"empty":           {Fault{Garbage: Empty}, "application/json", func(b string) bool { return b == "" }},
		"other id":        {Fault{Garbage: OtherID}, "application/json", func(b string) bool { return json.Valid([]byte(b)) && !strings.Contains(b, `"`+id+`"`) }},
		"oversize":        {Fault{Garbage: Oversize}, "application/json", func(b string) bool { return json.Valid([]byte(b)) && strings.Contains(b, id) && len(b) > 1<<20 }},
		"body":            {Fault{Body: []byte("x")}, "application/json", func(b string) bool { return b == "x" }},
		"body and status": {Fault{Status: 418, Body: []byte("{}")}, "application/json", func(b string) bool { return b == "{}" }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			sim := New(Options{})
			sim.SetFault(&tt.fault)
			w := get(sim, id, "Bearer x")
			if w.Code != tt.fault.status() || w.Header().Get("Content-Type") != tt.contentType || !tt.ok(w.Body.String()) {
				t.Errorf("%d %v %.200s", w.Code, w.Header(), w.Body)
			}
		})
	}
}

// TestFaultConnection has the faults that take a socket.
func TestFaultConnection(t *testing.T) {
	t.Parallel()
	sim := New(Options{})
	srv := httptest.NewServer(sim)
	t.Cleanup(srv.Close)
	open := func(ctx context.Context) (io.ReadCloser, error) {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/v4/events/"+id, nil)
		if err != nil {
			return nil, err
		}
		r.Header.Set("Authorization", "Bearer x")
		resp, err := srv.Client().Do(r)
		if err != nil {
			return nil, err
		}
		return resp.Body, nil
	}

	sim.SetFault(&Fault{Reset: true})
	if _, err := open(t.Context()); !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.EOF) {
		t.Errorf("reset: %v", err)
	}

	sim.SetFault(&Fault{Garbage: Cut})
	body, err := open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if b, err := io.ReadAll(body); len(b) == 0 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("cut: %d bytes, %v", len(b), err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	sim.SetFault(&Fault{Garbage: Drip})
	body, err = open(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if _, err := io.ReadFull(body, make([]byte, 2)); err != nil {
		t.Errorf("drip: %v", err)
	}
	cancel()

	for name, f := range map[string]Fault{"hang": {Hang: true}, "delay": {Delay: time.Hour}} {
		sim.SetFault(&f)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		if _, err := open(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
	}
}

func TestPrecedence(t *testing.T) {
	t.Parallel()
	sim := New(Options{})
	sim.SetFault(&Fault{Status: 500})
	sim.Always("always", Fault{Status: 404})
	sim.Always("healthy", Fault{})
	sim.Script("script", Fault{Status: 404}, Fault{}, Fault{Status: 429})
	sim.Always("script", Fault{Status: 504})
	statuses := func(id string, n int) []int {
		var got []int
		for range n {
			got = append(got, get(sim, id, "Bearer x").Code)
		}
		return got
	}
	for id, want := range map[string][]int{
		"other":   {500, 500},
		"always":  {404, 404},
		"healthy": {200, 200},
		"script":  {404, 200, 429, 504, 504},
	} {
		if diff := cmp.Diff(want, statuses(id, len(want))); diff != "" {
			t.Errorf("%s (-want +got):\n%s", id, diff)
		}
		if n := sim.CallsFor(id); n != len(want) {
			t.Errorf("%d calls for %s, want %d", n, id, len(want))
		}
	}
	sim.Clear("script")
	sim.SetFault(nil)
	if diff := cmp.Diff([]int{200, 400}, append(statuses("script", 1), statuses("a:b", 1)...)); diff != "" {
		t.Errorf("healthy (-want +got):\n%s", diff)
	}
	if n, m := sim.Calls(), sim.CallsFor("never"); n != 13 || m != 0 {
		t.Errorf("%d calls, %d for an id never asked for", n, m)
	}
}

func TestRate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		sim := New(Options{Rate: 5})
		found := func() int {
			n := 0
			for range 30 {
				if get(sim, id, "Bearer x").Code == http.StatusOK {
					n++
				}
			}
			return n
		}
		if n := found(); n != 15 {
			t.Errorf("%d of 30 at once, want a burst of 15", n)
		}
		time.Sleep(time.Second)
		if n := found(); n != 5 {
			t.Errorf("%d of 30 a second later, want 5", n)
		}
		sim.SetRate(0, 0)
		if n := found(); n != 30 {
			t.Errorf("%d of 30 without a limit", n)
		}
	})
}

func TestLatency(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		times := func() []time.Duration {
			sim := New(Options{Latency: 80 * time.Millisecond, Jitter: 40 * time.Millisecond, Rand: rand.NewPCG(1, 2)})
			var got []time.Duration
			for range 20 {
				start := time.Now()
				get(sim, id, "Bearer x")
				d := time.Since(start)
				if d < 80*time.Millisecond || d >= 120*time.Millisecond {
					t.Errorf("answered after %v", d)
				}
				got = append(got, d)
			}
			return got
		}
		first := times()
		if diff := cmp.Diff(first, times()); diff != "" {
			t.Errorf("the same seed took other times:\n%s", diff)
		}
		if first[0] == first[1] {
			t.Error("no jitter")
		}

		sim := New(Options{})
		sim.SetLatency(time.Second, 0)
		sim.SetFault(&Fault{Status: 503, Delay: time.Minute})
		start := time.Now()
		get(sim, id, "Bearer x")
		if d := time.Since(start); d != time.Minute+time.Second {
			t.Errorf("latency and delay took %v", d)
		}
	})
}

func TestControl(t *testing.T) {
	t.Parallel()
	sim := New(Options{})
	control := func(method, path, body string) *httptest.ResponseRecorder {
		w := httptest.NewRecorder()
		sim.ServeHTTP(w, httptest.NewRequest(method, path, strings.NewReader(body)))
		return w
	}
	put := func(path, body string, want int) {
		t.Helper()
		if w := control(http.MethodPut, path, body); w.Code != want {
			t.Errorf("PUT %s %s: %d %s", path, body, w.Code, w.Body)
		}
	}
	expect := func(id string, want ...int) {
		t.Helper()
		for i, status := range want {
			if got := get(sim, id, "Bearer x").Code; got != status {
				t.Errorf("call %d for %s: %d, want %d", i+1, id, got, status)
			}
		}
	}

	put("/sim/fault", `{"status":503,"code":"failed","retry_after":"2"}`, 200)
	expect("a", 503)
	put("/sim/fault/a", `[{"status":404},{"status":404}]`, 200)
	expect("a", 404, 404, 503)
	put("/sim/fault/a", `{"status":403,"body":"{\"error\":\"forbidden\"}"}`, 200)
	expect("a", 403, 403)
	put("/sim/fault/a", `null`, 200)
	expect("a", 503)
	put("/sim/fault", `null`, 200)
	expect("a", 200)
	put("/sim/rate", `{"rate":0.001,"burst":1}`, 200)
	expect("a", 200, 429)
	put("/sim/rate", `{"rate":0}`, 200)
	put("/sim/latency", `{"latency":"1ms","jitter":"1ms"}`, 200)
	expect("a", 200)
	put("/sim/latency", `{}`, 200)
	put("/sim/key", `"rotated"`, 200)
	expect("a", 403)
	put("/sim/key", `"x"`, 200)
	expect("a", 200)

	for path, bodies := range map[string][]string{
		"/sim/fault":   {``, `{`, `{"statsu":503}`, `{"status":100}`, `{"status":"503"}`, `{"garbage":"noise"}`, `{"delay":"1"}`, `{}{}`},
		"/sim/fault/a": {``, `7`, `[{"statsu":404}]`},
		"/sim/key":     {`{"key":"x"}`},
		"/sim/rate":    {`5`, `{"rates":5}`},
		"/sim/latency": {`{"latency":80}`},
	} {
		for _, body := range bodies {
			put(path, body, 400)
		}
	}
	expect("a", 200)

	var got, want any
	if err := errors.Join(
		json.Unmarshal(control(http.MethodGet, "/sim/stats", "").Body.Bytes(), &got),
		json.Unmarshal([]byte(`{"calls":14,"ids":1,"by_status":{"200":5,"403":3,"404":2,"429":1,"503":3}}`), &want),
	); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("stats (-want +got):\n%s", diff)
	}
}

func TestFaultJSON(t *testing.T) {
	t.Parallel()
	var got []Fault
	err := json.Unmarshal([]byte(`[{"hang":true},{"reset":true},{"delay":"1.5s"},{"garbage":"cut"},{"body":""},{}]`), &got)
	if err != nil {
		t.Fatal(err)
	}
	want := []Fault{{Hang: true}, {Reset: true}, {Delay: 1500 * time.Millisecond}, {Garbage: Cut}, {Body: []byte{}}, {}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("faults (-want +got):\n%s", diff)
	}
}

func TestConcurrentUse(t *testing.T) {
	t.Parallel()
	sim := New(Options{Jitter: time.Microsecond, Rate: 1e6})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for j := range 20 {
				id := fmt.Sprintf("id-%d-%d", i, j)
				sim.Script(id, Fault{Status: 404})
				sim.SetFault(&Fault{Status: 500})
				get(sim, id, "Bearer x")
				sim.SetLatency(0, time.Microsecond)
				sim.SetRate(1e6, 1e6)
				_, _, _ = sim.Calls(), sim.CallsFor(id), sim.CountsByStatus()
			}
		})
	}
	wg.Wait()
	if n := sim.Calls(); n != 160 {
		t.Errorf("%d calls, want 160", n)
	}
}
