package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"sort"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// commonFlags are those of every verb that reads.
type commonFlags struct {
	json    bool
	timeout time.Duration
}

func (f *commonFlags) declare(fs *flag.FlagSet) {
	fs.BoolVar(&f.json, "json", false, "print JSON")
	fs.DurationVar(&f.timeout, "timeout", 30*time.Second, "how `long` to wait for NATS to answer")
}

// parseMixed reads flags before, between and after up to n arguments, as
// kubectl and nats do.
func parseMixed(fs *flag.FlagSet, args []string, n int) ([]string, error) {
	var words []string
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err //nolint:wrapcheck // a word to run
			}
			return nil, usageError{err}
		}
		if fs.NArg() == 0 {
			return words, nil
		}
		if len(words) == n {
			return nil, usageError{fmt.Errorf("unknown argument %q", fs.Arg(0))}
		}
		words, args = append(words, fs.Arg(0)), fs.Args()[1:]
	}
}

// timeFlag is a point in time: RFC 3339, or a duration such as 2h before now.
type timeFlag struct{ time.Time }

func (f *timeFlag) String() string { return "" }

// Set implements flag.Value.
func (f *timeFlag) Set(v string) error {
	if d, err := time.ParseDuration(v); err == nil && d >= 0 {
		f.Time = time.Now().Add(-d)
		return nil
	}
	t, err := time.Parse(time.RFC3339Nano, v)
	if err != nil {
		return errors.New("want a duration such as 2h, or a time such as 2026-01-02T15:04:05Z")
	}
	f.Time = t
	return nil
}

// span is a range of a stream: sequences From to To, both included. It is
// empty when From is beyond To.
type span struct {
	Stream   string `json:"stream"`
	From, To uint64
}

// findSpan returns the messages of a stream stored at since or later and not
// after until; a zero time is no bound. It searches by halves, a direct get
// each.
func findSpan(ctx context.Context, js jetstream.JetStream, stream string, since, until time.Time) (span, error) {
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return span{}, fmt.Errorf("look up stream %s: %w", stream, err)
	}
	state := s.CachedInfo().State
	out := span{Stream: stream, From: max(state.FirstSeq, 1), To: state.LastSeq}
	if state.Msgs == 0 {
		return span{Stream: stream, From: 1}, nil
	}
	first := func(past func(time.Time) bool) (uint64, error) {
		var failed error
		n := sort.Search(int(out.To-out.From+1), func(i int) bool {
			if failed != nil {
				return true
			}
			m, err := s.GetMsg(ctx, out.From+uint64(i), jetstream.WithGetMsgSubject(">"))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return true // beyond the last
			}
			if err != nil {
				failed = err
				return true
			}
			return past(m.Time)
		})
		if failed != nil {
			return 0, fmt.Errorf("look for a time in %s: %w", stream, failed)
		}
		return out.From + uint64(n), nil
	}
	from, to := out.From, out.To
	if !since.IsZero() {
		if from, err = first(func(t time.Time) bool { return !t.Before(since) }); err != nil {
			return span{}, err
		}
	}
	if !until.IsZero() {
		next, err := first(func(t time.Time) bool { return t.After(until) })
		if err != nil {
			return span{}, err
		}
		to = next - 1
	}
	out.From, out.To = from, to
	return out, nil
}

// scan calls each for the messages of a span that match a subject, in order,
// with one direct get per message: it needs no consumer and no right to make
// one.
func scan(ctx context.Context, js jetstream.JetStream, in span, subject string, each func(*jetstream.RawStreamMsg) error) error {
	if in.From > in.To {
		return nil
	}
	s, err := js.Stream(ctx, in.Stream)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", in.Stream, err)
	}
	for seq := in.From; seq <= in.To; seq++ {
		m, err := s.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(subject))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read %s from %d: %w", in.Stream, seq, err)
		}
		if m.Sequence > in.To {
			return nil
		}
		if err := each(m); err != nil {
			return err
		}
		seq = m.Sequence
	}
	return nil
}

// subscriberToken is the subject token that selects a subscriber, 0 for all.
func subscriberToken(id int64) string {
	if id == 0 {
		return "*"
	}
	return strconv.FormatInt(id, 10)
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}
