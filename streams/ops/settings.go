package ops

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Secret is a value that never appears in a log, an error or a %v.
type Secret string

const redacted = "[redacted]"

// String returns a placeholder; convert with string(s) to use the value.
func (Secret) String() string { return redacted }

// GoString is for %#v.
func (Secret) GoString() string { return redacted }

// LogValue is for slog.
func (Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText is for JSON, also of a struct that holds a secret.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// Settings reads environment variables, remembers every fault, and knows what
// was asked for, so that --help and the README can be checked against the
// code. NAME_FILE, where set, names a file that holds the value of NAME.
// It is not safe for concurrent use.
type Settings struct {
	getenv func(string) string
	faults []error
	asked  []Setting
}

// Setting documents one environment variable.
type Setting struct{ Name, Default, Doc string }

// NewSettings reads through getenv, usually os.Getenv.
func NewSettings(getenv func(string) string) *Settings { return &Settings{getenv: getenv} }

// Err returns every fault so far, one a line, or nil.
func (s *Settings) Err() error { return errors.Join(s.faults...) }

// Asked lists the settings read, in order.
func (s *Settings) Asked() []Setting { return slices.Clone(s.asked) }

// Fail records a fault found by the caller.
func (s *Settings) Fail(name, format string, args ...any) {
	s.faults = append(s.faults, fmt.Errorf("%s: %s", name, fmt.Sprintf(format, args...)))
}

// lookup returns the value of name or def. White space around a value read
// from a file is dropped, since editors end files with a newline.
func (s *Settings) lookup(name, def, doc string) string {
	s.asked = append(s.asked, Setting{Name: name, Default: def, Doc: doc})
	file := s.getenv(name + "_FILE")
	v := s.getenv(name)
	switch {
	case file != "" && v != "":
		s.Fail(name, "set together with %s_FILE; choose one", name)
	case file != "":
		b, err := os.ReadFile(file)
		if err != nil {
			s.Fail(name+"_FILE", "%v", err)
			return def
		}
		v = strings.TrimSpace(string(b))
		if v == "" {
			s.Fail(name+"_FILE", "%s is empty", file)
		}
	}
	if v == "" {
		return def
	}
	return v
}

// String reads any text.
func (s *Settings) String(name, def, doc string) string { return s.lookup(name, def, doc) }

// Secret reads a value that must not be shown.
func (s *Settings) Secret(name, doc string) Secret { return Secret(s.lookup(name, "", doc)) }

// RotatingSecret reads a value that must not be shown. The function it returns
// gives the value in force: when it came from a file, that is looked at again
// every second, so that a rotated secret needs no restart; a file that cannot
// be read leaves the last value in force. The function is safe for concurrent
// use.
func (s *Settings) RotatingSecret(name, doc string) func() Secret {
	v := Secret(s.lookup(name, "", doc))
	file := s.getenv(name + "_FILE")
	if file == "" {
		return func() Secret { return v }
	}
	var mu sync.Mutex
	read := time.Now()
	return func() Secret {
		mu.Lock()
		defer mu.Unlock()
		if now := time.Now(); now.Sub(read) >= time.Second {
			read = now
			if b, err := os.ReadFile(file); err == nil {
				if s := strings.TrimSpace(string(b)); s != "" {
					v = Secret(s)
				}
			}
		}
		return v
	}
}

// Path reads the name of a file that must be readable, if set. The name of
// the setting ends in _FILE by itself.
func (s *Settings) Path(name, doc string) string {
	s.asked = append(s.asked, Setting{Name: name, Doc: doc})
	p := s.getenv(name)
	if p == "" {
		return ""
	}
	f, err := os.Open(p)
	if err != nil {
		s.Fail(name, "%v", err)
		return p
	}
	f.Close()
	return p
}

// OneOf reads one of the given words; the first is the default.
func (s *Settings) OneOf(name, doc string, words ...string) string {
	v := s.lookup(name, words[0], doc)
	if !slices.Contains(words, v) {
		s.Fail(name, "%q is none of %s", v, strings.Join(words, ", "))
	}
	return v
}

// Duration reads a Go duration such as 30s, from lo to hi.
func (s *Settings) Duration(name string, def, lo, hi time.Duration, doc string) time.Duration {
	v := s.lookup(name, def.String(), doc)
	d, err := time.ParseDuration(v)
	if err != nil {
		s.Fail(name, "%q is not a duration such as 30s or 2h", v)
		return def
	}
	if d < lo || d > hi {
		s.Fail(name, "%v is outside %v to %v", d, lo, hi)
	}
	return d
}

// Int reads a whole number from lo to hi.
func (s *Settings) Int(name string, def, lo, hi int, doc string) int {
	v := s.lookup(name, strconv.Itoa(def), doc)
	n, err := strconv.Atoi(v)
	if err != nil {
		s.Fail(name, "%q is not a whole number", v)
		return def
	}
	if n < lo || n > hi {
		s.Fail(name, "%d is outside %d to %d", n, lo, hi)
	}
	return n
}

// Rate reads a number of events per second; 0 means unlimited.
func (s *Settings) Rate(name string, def float64, doc string) float64 {
	v := s.lookup(name, strconv.FormatFloat(def, 'g', -1, 64), doc)
	f, err := strconv.ParseFloat(v, 64)
	if err != nil || f < 0 || math.IsNaN(f) || math.IsInf(f, 0) {
		s.Fail(name, "%q is not a rate per second (0 means unlimited)", v)
		return def
	}
	return f
}

// Addr reads a host:port to listen on.
func (s *Settings) Addr(name, def, doc string) string {
	v := s.lookup(name, def, doc)
	if _, _, err := net.SplitHostPort(v); err != nil {
		s.Fail(name, "%q is not host:port", v)
	}
	return v
}

// URL reads an absolute URL with one of the given schemes and no credentials
// shown in its errors; empty is allowed when def is empty.
func (s *Settings) URL(name, def, doc string, schemes ...string) string {
	v := s.lookup(name, def, doc)
	if v == "" {
		return v
	}
	u, err := url.Parse(v)
	if err != nil || u.Host == "" || !slices.Contains(schemes, u.Scheme) {
		s.Fail(name, "not a URL with the scheme %s", strings.Join(schemes, " or "))
	}
	return v
}

// WithoutPassword returns comma-separated server URLs without their
// credentials, for people to read.
func WithoutPassword(urls string) string {
	list := strings.Split(urls, ",")
	for i, u := range list {
		scheme, rest, ok := strings.Cut(u, "://")
		if ok {
			scheme += "://"
		} else {
			scheme, rest = "", u
		}
		list[i] = scheme + rest[strings.LastIndexByte(rest, '@')+1:]
	}
	return strings.Join(list, ",")
}
