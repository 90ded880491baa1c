package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

func streamctl(t *testing.T, url string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, func(name string) string { return map[string]string{"NATS_URL": url}[name] }, &out, &errs)
	return code, out.String(), errs.String()
}

func TestApplyThenDiff(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	if code, out, _ := streamctl(t, n.URL, "diff"); code != exitLeft || strings.Count(out, "\n+ ")+1 != 9 {
		t.Errorf("diff of an empty server: exit %d\n%s", code, out)
	}
	if code, out, errs := streamctl(t, n.URL, "apply"); code != exitDone || !strings.Contains(out, "+ FP_INGEST/prefetcher\n") {
		t.Fatalf("exit %d\n%s%s", code, out, errs)
	}
	if code, out, _ := streamctl(t, n.URL, "apply"); code != exitDone || out != "nothing to change\n" {
		t.Errorf("second apply: exit %d\n%s", code, out)
	}
	if code, out, _ := streamctl(t, n.URL, "diff"); code != exitDone || out != "no differences\n" {
		t.Errorf("diff: exit %d\n%s", code, out)
	}
	js := n.Connect("drift").JS
	d := streams.Definition(streams.Limits{})[0]
	d.Durables[0].MaxAckPending = 7
	if _, err := js.UpdateConsumer(t.Context(), d.Stream.Name, d.Durables[0]); err != nil {
		t.Fatal(err)
	}
	code, out, _ := streamctl(t, n.URL, "diff", "--json", "--max-bytes", "FP_DEAD=2GiB")
	var changes []streams.Change
	if err := json.Unmarshal([]byte(out), &changes); err != nil {
		t.Fatal(err)
	}
	if code != exitLeft || len(changes) != 2 ||
		changes[0] != (streams.Change{Object: "FP_INGEST/prefetcher", Field: "max_ack_pending", Have: "7", Want: "20000"}) ||
		changes[1] != (streams.Change{Object: "FP_DEAD", Field: "max_bytes", Have: "1073741824", Want: "2147483648"}) {
		t.Errorf("exit %d, %+v", code, changes)
	}
}

func TestApplyRefusesLoss(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	js := n.Connect("test").JS
	for range 10 {
		if _, err := js.Publish(t.Context(), streams.IngestSubject(1), make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
	}
	messages := func() uint64 {
		s, err := js.Stream(t.Context(), streams.StreamIngest)
		if err != nil {
			t.Fatal(err)
		}
		return s.CachedInfo().State.Msgs
	}
	if code, _, errs := streamctl(t, n.URL, "apply", "--max-bytes", "FP_INGEST=4KiB"); code != exitFailed || !strings.Contains(errs, "--allow-loss") || messages() != 10 {
		t.Errorf("exit %d, %s, %d messages left", code, errs, messages())
	}
	if code, _, errs := streamctl(t, n.URL, "apply", "--max-bytes", "FP_INGEST=4KiB", "--allow-loss"); code != exitDone {
		t.Errorf("exit %d, %s", code, errs)
	}
}

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{}, {"nonsense"}, {"apply", "stray"}, {"apply", "--nonsense"}, {"apply", "--replicas", "2"},
		{"apply", "--max-bytes", "FP_NONE=1"}, {"apply", "--max-bytes", "FP_DEAD=much"}, {"diff", "--max-bytes", "FP_DEAD=-1"},
	} {
		if code, _, errs := streamctl(t, "", args...); code != exitUsage || errs == "" {
			t.Errorf("%v: exit %d, %q", args, code, errs)
		}
	}
	for _, args := range [][]string{{"--help"}, {"apply", "--help"}, {"--version"}} {
		if code, _, _ := streamctl(t, "", args...); code != exitDone {
			t.Errorf("%v: exit %d", args, code)
		}
	}
}

func TestUnreachableServerIsNamedWithoutItsPassword(t *testing.T) {
	t.Parallel()
	addr := streamstest.FreeAddr(t)
	begin := time.Now()
	code, _, errs := streamctl(t, "nats://user:hunter2@"+addr, "apply", "--timeout", "300ms")
	if code != exitFailed || !strings.Contains(errs, addr) || strings.Contains(errs, "hunter2") {
		t.Errorf("exit %d, %s", code, errs)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}
