package ingest

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

func keygen(args ...string) (code int, stdout, stderr string) {
	var out, errs bytes.Buffer
	code = Keygen(args, rand.Reader, &out, &errs)
	return code, out.String(), errs.String()
}

// TestKeygenRoundTrip: what is printed goes into the keys file as it is, and
// the key then opens the door.
func TestKeygenRoundTrip(t *testing.T) {
	t.Parallel()
	t.Run("json", func(t *testing.T) {
		t.Parallel()
		code, stdout, stderr := keygen("--id", "acme-1", "--subscriber", "12,13", "--json")
		var out struct {
			Key   string          `json:"key"`
			Entry json.RawMessage `json:"entry"`
		}
		if err := json.Unmarshal([]byte(stdout), &out); code != 0 || stderr != "" || err != nil {
			t.Fatalf("%d, %q, %v", code, stderr, err)
		}
		checkPrinted(t, out.Key, string(out.Entry), 12, 13)
	})
	t.Run("text", func(t *testing.T) {
		t.Parallel()
		code, stdout, stderr := keygen("-id=acme-1", "-subscriber=*")
		found := regexp.MustCompile(`(?s)  (fpk_live_\S+)\n.*  (\{.*\})\n`).FindStringSubmatch(stdout)
		if code != 0 || stderr != "" || found == nil || strings.Count(stdout, "fpk_live_") != 1 {
			t.Fatalf("%d, %q: %s", code, stderr, stdout)
		}
		checkPrinted(t, found[1], found[2], 12, 13, 14)
	})
}

func checkPrinted(t *testing.T, key, entry string, subscribers ...int64) {
	t.Helper()
	if strings.Contains(entry, key) {
		t.Error("the entry holds the key")
	}
	set, err := parseKeys([]byte("[" + entry + "]"))
	if err != nil {
		t.Fatal(err)
	}
	got, reason := set.check([]string{key}, time.Now())
	if got == nil {
		t.Fatal(reason)
	}
	for _, s := range subscribers {
		if !got.Subscribers.Contains(s) {
			t.Errorf("not good for subscriber %d", s)
		}
	}
}

func TestKeygenUsage(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{
		"nothing":         nil,
		"no id":           {"--subscriber", "12"},
		"bad id":          {"--id", "Acme", "--subscriber", "12"},
		"no subscriber":   {"--id", "acme"},
		"bad subscriber":  {"--id", "acme", "--subscriber", "twelve"},
		"subscriber 0":    {"--id", "acme", "--subscriber", "0"},
		"unknown flag":    {"--id", "acme", "--subscriber", "12", "--yaml"},
		"one word more":   {"--id", "acme", "--subscriber", "12", "13"},
		"flag for a word": {"--id", "--subscriber", "12"},
	} {
		code, stdout, stderr := keygen(args...)
		if code != 2 || stdout != "" || !strings.Contains(stderr, "Usage: ingest keygen") {
			t.Errorf("%s: %d, %q, %q", name, code, stdout, stderr)
		}
	}
	if code, stdout, stderr := keygen("--help"); code != 0 || stderr != "" || !strings.Contains(stdout, "Usage: ingest keygen") {
		t.Errorf("help: %d, %q, %q", code, stdout, stderr)
	}
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestKeygenFails(t *testing.T) {
	t.Parallel()
	args := []string{"--id", "acme", "--subscriber", "12"}
	var stdout, stderr bytes.Buffer
	if code := Keygen(args, iotest.ErrReader(errors.New("no entropy")), &stdout, &stderr); code != 1 || stdout.Len() > 0 || stderr.Len() == 0 {
		t.Errorf("no random bytes: %d", code)
	}
	if code := Keygen(args, rand.Reader, brokenPipe{}, &stderr); code != 1 {
		t.Errorf("nobody reads: %d", code)
	}
}
