package ingest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

func TestNewKey(t *testing.T) {
	t.Parallel()
	form := regexp.MustCompile(`^fpk_live_[a-z0-9-]{1,32}_[0-9A-Za-z]{49}$`)
	seen := map[string]bool{}
	for range 100 {
		key, entry, err := NewKey("acme-1", SomeSubscribers(12), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		if id, ok := keyID([]byte(key)); !ok || string(id) != "acme-1" || !form.MatchString(key) || seen[key] {
			t.Fatalf("%s: id %q, %v", key, id, ok)
		}
		seen[key] = true
		if entry.ID != "acme-1" || len(entry.SHA256) != 64 || strings.Contains(entry.SHA256, key) {
			t.Fatalf("%+v", entry)
		}
	}
	small, _, err := NewKey("a", AllSubscribers(), bytes.NewReader(make([]byte, 32)))
	if err != nil || small != "fpk_live_a_"+strings.Repeat("0", 43)+"2BzK5Q" {
		t.Errorf("%s, %v", small, err)
	}
	large, _, err := NewKey("a", AllSubscribers(), bytes.NewReader(bytes.Repeat([]byte{0xff}, 32)))
	if err != nil || len(large) != len(small) {
		t.Errorf("%s, %v", large, err)
	}
}

func TestNewKeyRefuses(t *testing.T) {
	t.Parallel()
	for _, id := range []string{"", "Acme", "acme_1", "acme 1", "acmé", "a\n", strings.Repeat("a", 33)} {
		if key, _, err := NewKey(id, AllSubscribers(), rand.Reader); err == nil || key != "" {
			t.Errorf("%q: no error", id)
		}
	}
	if _, _, err := NewKey("acme", Subscribers{}, rand.Reader); err == nil {
		t.Error("no subscriber: no error")
	}
	if _, _, err := NewKey("acme", AllSubscribers(), iotest.ErrReader(errors.New("no entropy"))); err == nil {
		t.Error("no random bytes: no error")
	}
}

// TestKeyChecksum: no single wrong character gets past the checksum.
func TestKeyChecksum(t *testing.T) {
	t.Parallel()
	key, _ := testKey(t, "acme-1", "12")
	for i := range len(key) {
		for _, c := range "aZ0-_" {
			typo := key[:i] + string(c) + key[i+1:]
			if _, ok := keyID([]byte(typo)); ok && typo != key {
				t.Errorf("%s is taken for a key", typo)
			}
		}
	}
	for _, other := range []string{"", "fpk_live_", "fpk_live_acme-1_", key + "0", key[:len(key)-1], " " + key, key + "\n", strings.ToUpper(key)} {
		if _, ok := keyID([]byte(other)); ok {
			t.Errorf("%q is taken for a key", other)
		}
	}
}

func TestSubscribers(t *testing.T) {
	t.Parallel()
	some, err := ParseSubscribers("12,13")
	if err != nil || !some.Contains(12) || !some.Contains(13) || some.Contains(14) || some.Contains(0) || some.String() != "12,13" {
		t.Errorf("%v, %v", some, err)
	}
	all, err := ParseSubscribers("*")
	if err != nil || !all.Contains(1) || !all.Contains(maxSubscriberID) || all.String() != "*" {
		t.Errorf("%v, %v", all, err)
	}
	if (Subscribers{}).Contains(0) {
		t.Error("the empty set contains 0")
	}
	for _, bad := range []string{"", "0", "-1", "+1", "012", "1.0", "12,", ",12", "12, 13", "*,12", "acme", "9007199254740992"} {
		if s, err := ParseSubscribers(bad); err == nil {
			t.Errorf("%q is read as %v", bad, s)
		}
	}
}

func TestParseKeys(t *testing.T) {
	t.Parallel()
	hash := strings.Repeat("ab", 32)
	set, err := parseKeys([]byte(`[
		{"id":"acme-1","sha256":"` + hash + `","subscribers":[12,13],"not_before":"2026-01-01T00:00:00Z","not_after":"2027-01-01T02:00:00+02:00","rate_limit":50},
		{"id":"acme-2","sha256":"` + strings.Repeat("CD", 32) + `","subscribers":["*"],"rate_limit":0}
	]`))
	if err != nil {
		t.Fatal(err)
	}
	first, second := set["acme-1"], set["acme-2"]
	if len(set) != 2 || first.SHA256 != hash || !first.Subscribers.Contains(13) || first.Subscribers.Contains(14) || *first.RateLimit != 50 ||
		!first.NotBefore.Equal(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)) || !first.NotAfter.Equal(time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC)) {
		t.Errorf("%+v", first)
	}
	if !second.Subscribers.Contains(14) || *second.RateLimit != 0 || !second.NotAfter.IsZero() || second.hash[0] != 0xcd {
		t.Errorf("%+v", second)
	}
}

func TestParseKeysFaults(t *testing.T) {
	t.Parallel()
	key, entry := testKey(t, "acme-1", "12")
	with := func(members string) string {
		return `[{"id":"acme-1","sha256":"` + entry.SHA256 + `","subscribers":[12]` + members + `}]`
	}
	tests := map[string]struct {
		file string
		want []string
	}{
		"empty":      {``, []string{"line 1: ends too early"}},
		"cut off":    {"[\n{\"id\":\"a", []string{"line 2: ends too early"}},
		"null":       {`null`, []string{"not a JSON list"}},
		"object":     {`{"id":"acme-1"}`, []string{"line 1: wrong type"}},
		"strings":    {"[\n\"acme-1\"]", []string{"line 2: wrong type"}},
		"more after": {with("") + "x", []string{"syntax error"}},
		"comma":      {"[{},]", []string{"line 1: syntax error"}},
		"name twice": {with(`,"id":"b"`), []string{"a name occurs twice"}},
		"nothing":    {`[{}]`, []string{"entry 1: id: missing", "entry 1: sha256: missing", "entry 1: subscribers: missing"}},
		"null entry": {`[null]`, []string{"entry 1: id: missing"}},
		"unknown":    {with(`,"Id":"x","rate":5`), []string{`entry 1 (acme-1): "Id": unknown member`, `entry 1 (acme-1): "rate": unknown member`}},
		"wrong types": {
			`[{"id":1,"sha256":2,"subscribers":3,"not_before":4,"not_after":5,"rate_limit":"6"}]`,
			[]string{"entry 1: id: must be", "sha256: must be", "subscribers: must be", "not_before: must be", "not_after: must be", "rate_limit: must be"},
		},
		"nulls": {
			`[{"id":null,"sha256":null,"subscribers":null,"not_before":null,"not_after":null,"rate_limit":null}]`,
			[]string{"entry 1: id: must be", "sha256: must be", "subscribers: must be", "not_before: must be", "not_after: must be", "rate_limit: must be"},
		},
		"id":                    {strings.Replace(with(""), "acme-1", "Acme", 1), []string{"entry 1: id: must be 1 to 32"}},
		"short hash":            {strings.Replace(with(""), entry.SHA256, entry.SHA256[2:], 1), []string{"sha256: must be 64"}},
		"key instead of hash":   {strings.Replace(with(""), entry.SHA256, key, 1), []string{"sha256: must be 64"}},
		"no subscribers":        {strings.Replace(with(""), "[12]", "[]", 1), []string{"subscribers: must be a list"}},
		"subscriber as string":  {strings.Replace(with(""), "[12]", `["12"]`, 1), []string{"subscribers: must be a list"}},
		"subscriber 0":          {strings.Replace(with(""), "[12]", `[0]`, 1), []string{"subscribers: must be a list"}},
		"subscriber 1.0":        {strings.Replace(with(""), "[12]", `[1.0]`, 1), []string{"subscribers: must be a list"}},
		"star among others":     {strings.Replace(with(""), "[12]", `["*",12]`, 1), []string{"subscribers: must be a list"}},
		"day without time":      {with(`,"not_after":"2027-01-01"`), []string{"not_after: must be a time"}},
		"ends before it begins": {with(`,"not_before":"2027-01-01T00:00:00Z","not_after":"2026-01-01T00:00:00Z"`), []string{"not_after: must be later"}},
		"negative limit":        {with(`,"rate_limit":-1`), []string{"rate_limit: must be"}},
		"endless limit":         {with(`,"rate_limit":1e999`), []string{"rate_limit: must be"}},
		"id twice": {
			`[` + with("")[1:len(with(""))-1] + `,{"id":"acme-1","sha256":"` + strings.Repeat("0", 64) + `","subscribers":[1]}]`,
			[]string{"entry 2 (acme-1): id: another entry has it already"},
		},
		"hash twice": {
			`[` + with("")[1:len(with(""))-1] + `,` + strings.Replace(with("")[1:], "acme-1", "acme-2", 1),
			[]string{"entry 2 (acme-2): sha256: the same as that of entry 1 (acme-1)"},
		},
		"faults of two entries": {
			`[{"id":"a"},{"sha256":"x","subscribers":[1]}]`,
			[]string{"entry 1 (a): sha256: missing", "entry 1 (a): subscribers: missing", "entry 2: id: missing", "entry 2: sha256: must be 64"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := parseKeys([]byte(test.file))
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in %q", want, err)
				}
			}
			if strings.Contains(err.Error(), key) || strings.Contains(err.Error(), entry.SHA256) {
				t.Errorf("repeats a key or its hash: %v", err)
			}
		})
	}
}

func TestKeyCheck(t *testing.T) {
	t.Parallel()
	now := time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	key, entry := testKey(t, "acme-1", "12")
	second, secondEntry := testKey(t, "acme-2", "12")
	limited, limitedEntry := testKey(t, "limited", "12")
	limitedEntry.NotBefore, limitedEntry.NotAfter = now, now.Add(time.Hour)
	unknown, _ := testKey(t, "gone", "12")
	sameID, _, err := NewKey("acme-1", AllSubscribers(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	file, err := json.Marshal([]KeyEntry{entry, secondEntry, limitedEntry})
	if err != nil {
		t.Fatal(err)
	}
	set, err := parseKeys(file)
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]struct {
		values []string
		at     time.Time
		id     string
		reason authReason
	}{
		"good":              {[]string{key}, now, "acme-1", ""},
		"client's second":   {[]string{second}, now, "acme-2", ""},
		"absent":            {nil, now, "", keyMissing},
		"empty":             {[]string{""}, now, "", keyMissing},
		"twice":             {[]string{key, key}, now, "", keyMalformed},
		"empty and good":    {[]string{"", key}, now, "", keyMalformed},
		"nonsense":          {[]string{"nonsense"}, now, "", keyMalformed},
		"very long":         {[]string{strings.Repeat("x", 10000)}, now, "", keyMalformed},
		"hash of the key":   {[]string{entry.SHA256}, now, "", keyMalformed},
		"typo":              {[]string{key[:20] + "!" + key[21:]}, now, "", keyMalformed},
		"unknown":           {[]string{unknown}, now, "", keyUnknown},
		"another secret":    {[]string{sameID}, now, "", keyMismatch},
		"first moment":      {[]string{limited}, now, "limited", ""},
		"before":            {[]string{limited}, now.Add(-1), "", keyTooEarly},
		"last moment":       {[]string{limited}, now.Add(time.Hour - 1), "limited", ""},
		"after":             {[]string{limited}, now.Add(time.Hour), "", keyExpired},
		"good in 100 years": {[]string{key}, now.AddDate(100, 0, 0), "acme-1", ""},
	}
	for name, test := range tests {
		got, reason := set.check(test.values, test.at)
		if reason != test.reason || (got == nil) != (test.id == "") || got != nil && got.ID != test.id {
			t.Errorf("%s: %v, %q", name, got, reason)
		}
	}
}

// ring is a keyring on a file of the test's.
type ring struct {
	*keyring
	path string
	logs *logBuffer
}

func newRing(t *testing.T, path string) ring {
	t.Helper()
	r := ring{path: path, logs: new(logBuffer)}
	var err error
	if r.keyring, err = loadKeyring(path, 0, r.logs.logger(), newMetrics(prometheus.NewRegistry())); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r ring) good(key string) bool {
	k, _ := r.check([]string{key}, time.Now())
	return k != nil
}

func TestKeyringReload(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "keys.json")
	key, entry := testKey(t, "acme-1", "12")
	next, nextEntry := testKey(t, "acme-2", "12")
	writeKeys(t, path, entry)
	r := newRing(t, path)
	state := func() []any {
		return []any{r.good(key), r.good(next), testutil.ToFloat64(r.metrics.keys), testutil.ToFloat64(r.metrics.keysCurrent)}
	}
	step := func(name string, want ...any) {
		t.Helper()
		r.reload()
		r.reload() // nothing changes at the next look
		if diff := cmp.Diff(want, state()); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
	writeKeys(t, path, entry, nextEntry)
	step("a key added", true, true, 2.0, 1.0)
	writeKeys(t, path, nextEntry)
	step("a key revoked", false, true, 1.0, 1.0)
	if err := os.WriteFile(path, []byte(`[{"id":`), 0o600); err != nil {
		t.Fatal(err)
	}
	step("a broken edit", false, true, 1.0, 0.0)
	if n := strings.Count(r.logs.String(), "not reloaded"); n != 1 {
		t.Errorf("said %d times:\n%s", n, r.logs)
	}
	writeKeys(t, path, nextEntry)
	step("the edit undone", false, true, 1.0, 1.0)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	step("the file gone", false, true, 1.0, 0.0)
	writeKeys(t, path, entry)
	step("the file back, with another key", true, false, 1.0, 1.0)
	writeKeys(t, path)
	step("all revoked", false, false, 0.0, 1.0)
	if logs := r.logs.String(); strings.Contains(logs, entry.SHA256) || strings.Contains(logs, key) {
		t.Error(logs)
	}
}

// TestKeyringFollowsSymlinks swaps the file as Kubernetes does with a secret:
// keys.json → ..data/keys.json, ..data → a directory that is replaced.
func TestKeyringFollowsSymlinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	link := func(to, name string) {
		t.Helper()
		if err := os.Symlink(to, filepath.Join(dir, "new")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "new"), filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	version := func(name string, entry KeyEntry) {
		t.Helper()
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		writeKeys(t, filepath.Join(dir, name, "keys.json"), entry)
		link(name, "..data")
	}
	key, entry := testKey(t, "acme-1", "12")
	next, nextEntry := testKey(t, "acme-2", "12")
	version("..v1", entry)
	link("..data/keys.json", "keys.json")
	r := newRing(t, filepath.Join(dir, "keys.json"))
	version("..v2", nextEntry)
	r.reload()
	if r.good(key) || !r.good(next) {
		t.Error("the new version is not in force")
	}
}

func TestKeyringWatch(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "keys.json")
		key, entry := testKey(t, "acme-1", "12")
		next, nextEntry := testKey(t, "acme-2", "12")
		writeKeys(t, path, entry)
		r := newRing(t, path)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); r.watch(ctx, 2*time.Second) }()
		writeKeys(t, path, nextEntry)
		time.Sleep(2*time.Second + 1) // of the bubble's clock
		synctest.Wait()
		if r.good(key) || !r.good(next) {
			t.Error("the edit is not in force after one interval")
		}
		cancel()
		<-done
	})
}

func TestNoKeysAtTheStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, content := range map[string]string{"empty.json": "", "none.json": "[]", "broken.json": "[{}]"} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := loadKeyring(path, 0, new(logBuffer).logger(), newMetrics(prometheus.NewRegistry())); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := loadKeyring(filepath.Join(dir, "absent.json"), 0, new(logBuffer).logger(), newMetrics(prometheus.NewRegistry())); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}
