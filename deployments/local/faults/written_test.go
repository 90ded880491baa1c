//go:build unix

package faults

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

func TestWrittenFindsWhatIsPlanted(t *testing.T) {
	t.Parallel()
	const early, late = "2026-11-24T12:00:00.000000000Z", "2026-11-24T12:00:01.000000000Z"
	set := func(id, status, at, subscriber string) []string {
		return []string{"SET", "fp:prefetch:" + id, `{"schema":1,"status":"` + status + `","accepted_at":"` + at + `","subscriber_id":` + subscriber + `,"user_id":"` + strings.Repeat("u", 200) + `"}`, "PXAT", "1"}
	}
	file := func(commands ...[]string) (b []byte) {
		for _, args := range commands {
			b = fmt.Appendf(b, "*%d\r\n", len(args))
			for _, a := range args {
				b = fmt.Appendf(b, "$%d\r\n%s\r\n", len(a), a)
			}
		}
		return b
	}
	for name, tt := range map[string]struct {
		file  []byte
		found string
		first map[string]int64
		count int
	}{
		"sound": {file: file([]string{"SELECT", "0"}, set("a", "pending", early, "12"), set("b", "ready", late, "13"), set("a", "ready", early, "12")),
			first: map[string]int64{"a": 12, "b": 13}, count: 3},
		"backwards":                  {file: file(set("a", "ready", early, "12"), set("a", "failed", late, "12")), found: "[backwards]", first: map[string]int64{"a": 12}, count: 2},
		"an overwrite and back":      {file: file(set("a", "pending", early, "12"), set("a", "pending", early, "13"), set("a", "ready", early, "12")), found: "[foreign foreign]", first: map[string]int64{"a": 12}, count: 3},
		"another's after a loss":     {file: file(set("a", "ready", early, "12"), []string{"flushall"}, set("a", "ready", late, "13")), first: map[string]int64{"a": 13}, count: 2},
		"a record removed":           {file: file(set("a", "ready", early, "12"), []string{"DEL", "fp:prefetch:a"}), found: "[unexpected]", first: map[string]int64{"a": 12}, count: 1},
		"no record":                  {file: file([]string{"SET", "fp:prefetch:a", "x"}), found: "[unexpected]", first: map[string]int64{"a": 0}, count: 1},
		"others' keys":               {file: file([]string{"HSET", "fp:quota", "t", "1"}, []string{"MULTI"}, []string{"EXEC"})},
		"a last command cut short":   {file: file(set("a", "ready", early, "12"))[:200]},
		"a last length cut short":    {file: append(file(set("a", "ready", early, "12")), "*3\r\n$"...), first: map[string]int64{"a": 12}, count: 1},
		"a value with line breaks":   {file: file([]string{"SET", "other", "*2\r\n$3\r\nDEL\r\n"}, set("a", "ready", early, "12")), first: map[string]int64{"a": 12}, count: 1},
		"the ready of a newer after": {file: file(set("a", "ready", early, "12"), set("a", "ready", late, "12")), first: map[string]int64{"a": 12}, count: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "appendonly.aof.1.incr.aof"), tt.file, 0o600); err != nil {
				t.Fatal(err)
			}
			w, err := readWritten(dir)
			if err != nil {
				t.Fatal(err)
			}
			var found []class
			for _, f := range w.Found {
				found = append(found, f.Class)
			}
			if got := strings.TrimPrefix(fmt.Sprint(found), "[]"); got != tt.found {
				t.Errorf("found %v, want %s", w.Found, tt.found)
			}
			if !maps.Equal(w.First, tt.first) || w.Count != tt.count {
				t.Errorf("first %v of %d, want %v of %d", w.First, w.Count, tt.first, tt.count)
			}
		})
	}
	if err := commands(bytes.NewReader([]byte("REDIS0009")), func([][]byte) {}); err != nil {
		t.Errorf("a start cut short: %v", err)
	}
	if err := commands(bytes.NewReader([]byte("no append-only file\r\n")), func([][]byte) {}); err == nil {
		t.Error("what is no append-only file was read")
	}
	if _, err := readWritten(t.TempDir()); err == nil {
		t.Error("no append-only file was read")
	}
}

// What a real redis-server writes down of a SET with NX and of a script, killed
// and started again in between.
func TestWrittenReadsWhatRedisWrites(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	rs := streamstest.NewRedis(t, "--dir", dir, "--appendonly", "yes", "--auto-aof-rewrite-percentage", "0")
	rdb := redis.NewClient(&redis.Options{Addr: rs.Addr})
	defer rdb.Close()
	const pending = `{"schema":1,"status":"pending","accepted_at":"2026-11-24T12:00:00.000000000Z","subscriber_id":12}`
	ctx, expiry := t.Context(), time.Now().Add(time.Hour).UnixMilli()
	do := func(args ...any) {
		t.Helper()
		if err := rdb.Do(ctx, args...).Err(); err != nil {
			t.Fatal(err)
		}
	}
	script := func(status string) {
		t.Helper()
		do("eval", `redis.call('GETRANGE', KEYS[1], 0, 9) return redis.call('SET', KEYS[1], ARGV[1], 'PXAT', ARGV[2])`, 1,
			"fp:prefetch:a", strings.Replace(pending, "pending", status, 1), expiry)
	}
	do("set", "fp:prefetch:a", pending, "pxat", expiry, "nx")
	script("ready")
	rs.Kill()
	rs.Start()
	script("failed")
	w, err := readWritten(filepath.Join(dir, "appendonlydir"))
	if err != nil {
		t.Fatal(err)
	}
	if w.Count != 3 || len(w.Found) != 1 || w.Found[0].Class != backwards || w.First["a"] != 12 {
		t.Errorf("%d writes, found %v, first %v", w.Count, w.Found, w.First)
	}
}
