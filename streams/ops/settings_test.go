package ops_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

func settings(env map[string]string) *ops.Settings {
	return ops.NewSettings(func(name string) string { return env[name] })
}

// write returns the path of a file with this content.
func write(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "value")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestSettingsRead(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		env  map[string]string
		read func(*ops.Settings) any
		want any
	}{
		"string":             {map[string]string{"A": "x"}, func(s *ops.Settings) any { return s.String("A", "d", "") }, "x"},
		"string default":     {nil, func(s *ops.Settings) any { return s.String("A", "d", "") }, "d"},
		"string from a file": {map[string]string{"A_FILE": write(t, " x y \n")}, func(s *ops.Settings) any { return s.String("A", "d", "") }, "x y"},
		"secret":             {map[string]string{"A": "x"}, func(s *ops.Settings) any { return string(s.Secret("A", "")) }, "x"},
		"secret from a file": {map[string]string{"A_FILE": write(t, "x\n")}, func(s *ops.Settings) any { return string(s.Secret("A", "")) }, "x"},
		"one of":             {map[string]string{"A": "b"}, func(s *ops.Settings) any { return s.OneOf("A", "", "a", "b") }, "b"},
		"one of, default":    {nil, func(s *ops.Settings) any { return s.OneOf("A", "", "a", "b") }, "a"},
		"duration":           {map[string]string{"A": "90s"}, func(s *ops.Settings) any { return s.Duration("A", time.Hour, 0, time.Hour, "") }, 90 * time.Second},
		"duration default":   {nil, func(s *ops.Settings) any { return s.Duration("A", time.Minute, 0, time.Hour, "") }, time.Minute},
		"duration bounds":    {map[string]string{"A": "1h"}, func(s *ops.Settings) any { return s.Duration("A", time.Minute, time.Hour, time.Hour, "") }, time.Hour},
		"int":                {map[string]string{"A": "7"}, func(s *ops.Settings) any { return s.Int("A", 1, 7, 7, "") }, 7},
		"int default":        {nil, func(s *ops.Settings) any { return s.Int("A", 3, 1, 9, "") }, 3},
		"rate":               {map[string]string{"A": "2.5"}, func(s *ops.Settings) any { return s.Rate("A", 5, "") }, 2.5},
		"rate unlimited":     {map[string]string{"A": "0"}, func(s *ops.Settings) any { return s.Rate("A", 5, "") }, 0.0},
		"rate default":       {nil, func(s *ops.Settings) any { return s.Rate("A", 5, "") }, 5.0},
		"addr":               {map[string]string{"A": "[::1]:80"}, func(s *ops.Settings) any { return s.Addr("A", ":8080", "") }, "[::1]:80"},
		"url":                {map[string]string{"A": "rediss://u:p@h/0"}, func(s *ops.Settings) any { return s.URL("A", "", "", "redis", "rediss") }, "rediss://u:p@h/0"},
		"url, none":          {nil, func(s *ops.Settings) any { return s.URL("A", "", "", "redis") }, ""},
		"path, none":         {nil, func(s *ops.Settings) any { return s.Path("A_FILE", "") }, ""},
	} {
		s := settings(c.env)
		got := c.read(s)
		if err := s.Err(); err != nil || got != c.want {
			t.Errorf("%s: %v, %v, want %v", name, got, err, c.want)
		}
	}
	path := write(t, "content")
	s := settings(map[string]string{"A_FILE": path})
	if got := s.Path("A_FILE", ""); got != path || s.Err() != nil {
		t.Errorf("path %q, %v", got, s.Err())
	}
}

func TestSettingsRefuse(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		value string
		read  func(*ops.Settings)
	}{
		"word":             {"c", func(s *ops.Settings) { s.OneOf("A", "", "a", "b") }},
		"word, other case": {"B", func(s *ops.Settings) { s.OneOf("A", "", "a", "b") }},
		"duration":         {"30", func(s *ops.Settings) { s.Duration("A", time.Second, 0, time.Hour, "") }},
		"too short":        {"1s", func(s *ops.Settings) { s.Duration("A", time.Minute, time.Minute, time.Hour, "") }},
		"too long":         {"2h", func(s *ops.Settings) { s.Duration("A", time.Minute, time.Minute, time.Hour, "") }},
		"negative":         {"-1s", func(s *ops.Settings) { s.Duration("A", time.Minute, 0, time.Hour, "") }},
		"int":              {"1.5", func(s *ops.Settings) { s.Int("A", 1, 0, math.MaxInt, "") }},
		"int too small":    {"0", func(s *ops.Settings) { s.Int("A", 1, 1, 5, "") }},
		"int too large":    {"6", func(s *ops.Settings) { s.Int("A", 1, 1, 5, "") }},
		"rate":             {"5/s", func(s *ops.Settings) { s.Rate("A", 1, "") }},
		"rate negative":    {"-1", func(s *ops.Settings) { s.Rate("A", 1, "") }},
		"rate NaN":         {"NaN", func(s *ops.Settings) { s.Rate("A", 1, "") }},
		"rate infinite":    {"+Inf", func(s *ops.Settings) { s.Rate("A", 1, "") }},
		"addr":             {"8080", func(s *ops.Settings) { s.Addr("A", ":1", "") }},
		"url scheme":       {"http://h", func(s *ops.Settings) { s.URL("A", "", "", "redis") }},
		"url without host": {"redis:", func(s *ops.Settings) { s.URL("A", "", "", "redis") }},
		"url malformed":    {"redis://u:hunter2%zz@h", func(s *ops.Settings) { s.URL("A", "", "", "redis") }},
		"path":             {"/nowhere/at/all", func(s *ops.Settings) { s.Path("A", "") }},
	} {
		s := settings(map[string]string{"A": c.value})
		c.read(s)
		err := s.Err()
		if err == nil || !strings.HasPrefix(err.Error(), "A: ") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(fmt.Sprint(err), "hunter2") {
			t.Errorf("%s: %v shows a password", name, err)
		}
	}
}

// One start tells everything that is wrong, a line each.
func TestSettingsNameEveryFaultAtOnce(t *testing.T) {
	t.Parallel()
	s := settings(map[string]string{
		"INT": "x", "DURATION": "y", "BOTH": "hunter2", "BOTH_FILE": "/etc/hostname", "GONE_FILE": "/nowhere/at/all", "EMPTY_FILE": write(t, " \n"),
	})
	s.Int("INT", 1, 0, 9, "a number")
	s.Duration("DURATION", time.Second, 0, time.Hour, "a time")
	s.Secret("BOTH", "a secret")
	s.String("GONE", "d", "a text")
	s.Secret("EMPTY", "another secret")
	s.Int("FINE", 1, 0, 9, "right")
	s.Fail("OWN", "does not fit %s", "INT")
	lines := strings.Split(fmt.Sprint(s.Err()), "\n")
	want := []string{"INT: ", "DURATION: ", "BOTH: ", "GONE_FILE: ", "EMPTY_FILE: ", "OWN: does not fit INT"}
	if len(lines) != len(want) {
		t.Fatalf("%d lines, want %d:\n%v", len(lines), len(want), s.Err())
	}
	for i, w := range want {
		if !strings.HasPrefix(lines[i], w) {
			t.Errorf("line %d: %q, want %q…", i, lines[i], w)
		}
	}
	if !strings.Contains(lines[2], "BOTH_FILE") || strings.Contains(lines[2], "hunter2") {
		t.Errorf("both set: %q", lines[2])
	}
	asked := []ops.Setting{
		{Name: "INT", Default: "1", Doc: "a number"}, {Name: "DURATION", Default: "1s", Doc: "a time"}, {Name: "BOTH", Doc: "a secret"},
		{Name: "GONE", Default: "d", Doc: "a text"}, {Name: "EMPTY", Doc: "another secret"}, {Name: "FINE", Default: "1", Doc: "right"},
	}
	if d := cmp.Diff(asked, s.Asked()); d != "" {
		t.Errorf("-want +got\n%s", d)
	}
}

func TestSecretIsNeverShown(t *testing.T) {
	t.Parallel()
	const value = "hunter2"
	secret := settings(map[string]string{"A": value}).Secret("A", "")
	type config struct {
		Key  ops.Secret
		Keys []ops.Secret
		Ptr  *ops.Secret
		Any  any
	}
	cfg := config{secret, []ops.Secret{secret}, &secret, secret}
	shown := map[string]string{}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		shown[verb] = fmt.Sprintf(verb, secret)
		shown[verb+" of a struct"] = fmt.Sprintf(verb, cfg)
		shown[verb+" of a pointer"] = fmt.Sprintf(verb, &cfg)
	}
	shown["Sprint"] = fmt.Sprint(secret, cfg)
	shown["error"] = fmt.Errorf("key %v: %w", secret, os.ErrInvalid).Error()
	for name, v := range map[string]any{"JSON": secret, "JSON of a struct": cfg, "JSON of a map": map[string]ops.Secret{"key": secret}} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		shown[name] = string(b)
	}
	var b bytes.Buffer
	for _, h := range []slog.Handler{slog.NewJSONHandler(&b, nil), slog.NewTextHandler(&b, nil)} {
		log := slog.New(h)
		log.Info("config", "key", secret, "config", cfg, "pointer", &cfg, "err", fmt.Errorf("%v", cfg))
		log.With("key", secret).WithGroup("g").Info("config", slog.Any("config", cfg))
	}
	shown["slog"] = b.String()
	for how, text := range shown {
		// %x and the like work on what is shown, so look for that as well.
		if strings.Contains(text, value) || strings.Contains(text, fmt.Sprintf("%x", value)) {
			t.Errorf("%s shows it: %s", how, text)
		}
	}
	if shown["%v"] != "[redacted]" || string(secret) != value {
		t.Errorf("%q, %q", shown["%v"], string(secret))
	}
}

func TestRotatingSecretPicksUpAChangedFile(t *testing.T) {
	t.Parallel()
	path := write(t, "first\n")
	synctest.Test(t, func(t *testing.T) {
		s := settings(map[string]string{"KEY_FILE": path})
		key := s.RotatingSecret("KEY", "")
		if err := s.Err(); err != nil {
			t.Fatal(err)
		}
		expect := func(want string) {
			t.Helper()
			if got := string(key()); got != want {
				t.Errorf("%q, want %q", got, want)
			}
		}
		put := func(content string) {
			t.Helper()
			if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		expect("first")
		put("second\n")
		expect("first") // looked at once a second at most
		time.Sleep(time.Second)
		expect("second")
		for _, broken := range []func(){func() { put("") }, func() { put(" \n") }, func() { os.Remove(path) }} {
			broken()
			time.Sleep(time.Second)
			expect("second")
		}
		put("third")
		time.Sleep(time.Second)
		expect("third")
	})
	key := settings(map[string]string{"KEY": "fixed"}).RotatingSecret("KEY", "")
	if string(key()) != "fixed" {
		t.Error("a secret from the environment is lost")
	}
	s := settings(map[string]string{"KEY_FILE": "/nowhere/at/all"})
	s.RotatingSecret("KEY", "")
	if s.Err() == nil {
		t.Error("no fault for a file that does not exist at the start")
	}
}

func TestWithoutPassword(t *testing.T) {
	t.Parallel()
	for urls, want := range map[string]string{
		"nats://127.0.0.1:4222":          "nats://127.0.0.1:4222",
		"nats://u:p@h:4222":              "nats://h:4222",
		"nats://token@h":                 "nats://h",
		"tls://u:p@ss@h:1,tls://u:p@h:2": "tls://h:1,tls://h:2",
		"u:p@h:1,h:2":                    "h:1,h:2",
		"redis://:p@h/0":                 "redis://h/0",
		"rediss://u:p:/@h?db=1":          "rediss://h?db=1",
		"nats://u:a://b@h":               "nats://h",
		"":                               "",
	} {
		if got := ops.WithoutPassword(urls); got != want {
			t.Errorf("%q: %q, want %q", urls, got, want)
		}
	}
}
