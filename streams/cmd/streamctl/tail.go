package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// streamNamed returns the stream that a word of the command line means: its
// name, its short name, or a stage that reads it.
func streamNamed(word string) (string, error) {
	switch word {
	case streams.StagePrefetcher:
		return streams.StreamIngest, nil
	case streams.StagePersister:
		return streams.StreamEnriched, nil
	}
	for _, name := range []string{streams.StreamIngest, streams.StreamEnriched, streams.StreamBackfill, streams.StreamDead} {
		if word == name || "FP_"+strings.ToUpper(word) == name {
			return name, nil
		}
	}
	return "", usageError{errors.New("want a stream: ingest, enriched, backfill or dead; or the stage that reads it: prefetcher or persister")}
}

// seenEvent is a message as tail and show print it.
type seenEvent struct {
	step
	Subscriber int64           `json:"subscriber_id"`
	RequestID  string          `json:"request_id,omitempty"`
	Body       json.RawMessage `json:"body"`
}

// tailFlags are those of tail and show.
type tailFlags struct {
	commonFlags
	selection
	since, until timeFlag
	fromSeq      uint64
	limit        int
	reveal       bool
	stream       string
}

// tailPeriod is how often tail looks for something new.
const tailPeriod = 250 * time.Millisecond

func (f *tailFlags) parse(fs *flag.FlagSet, args []string) error {
	f.commonFlags.declare(fs)
	f.selection.declare(fs)
	fs.Var(&f.since, "since", "those stored at or after this `time`")
	fs.StringVar(&f.Reason, "reason", "", "dead letters given up for this `reason` alone")
	fs.BoolVar(&f.reveal, "reveal", false, "show personal data; FP_AUDIT keeps who did")
	words, err := parseMixed(fs, args, 1)
	if err != nil {
		return err
	}
	if f.stream, err = streamNamed(strings.Join(words, "")); err != nil {
		return err
	}
	return f.check()
}

// connected connects, and has what is revealed audited.
func (f *tailFlags) connected(ctx context.Context, e env, verb string, fs *flag.FlagSet, do func(*streams.Conn) (int, error)) (int, error) {
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if !f.reveal {
		return do(conn)
	}
	return e.audited(ctx, conn, verb, []string{f.stream}, fs, func() (int, error) { return do(conn) })
}

func show(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f tailFlags
	fs.Var(&f.until, "until", "those stored at or before this `time`")
	fs.Uint64Var(&f.fromSeq, "from-seq", 0, "those from this `sequence` on")
	fs.IntVar(&f.limit, "limit", 100, "`N` events at most, 0 for all")
	if err := f.parse(fs, args); err != nil {
		return 0, err
	}
	return f.connected(ctx, e, "show", fs, func(conn *streams.Conn) (int, error) {
		in, err := findSpan(ctx, conn.JS, f.stream, f.since.Time, f.until.Time)
		if err != nil {
			return 0, err
		}
		in.From = max(in.From, f.fromSeq)
		_, n, err := f.print(ctx, e.stdout, conn, in)
		if err == nil && n == 0 {
			return exitNone, nil
		}
		return exitDone, err
	})
}

func tail(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f tailFlags
	if err := f.parse(fs, args); err != nil {
		return 0, err
	}
	return f.connected(ctx, e, "tail", fs, func(conn *streams.Conn) (int, error) {
		s, err := conn.JS.Stream(ctx, f.stream)
		if err != nil {
			return 0, fmt.Errorf("look up stream %s: %w", f.stream, err)
		}
		in := span{Stream: f.stream, From: s.CachedInfo().State.LastSeq + 1}
		if !f.since.IsZero() {
			if in, err = findSpan(ctx, conn.JS, f.stream, f.since.Time, time.Time{}); err != nil {
				return 0, err
			}
		}
		in.To = 1<<64 - 2 // whatever comes
		for {
			last, _, err := f.print(ctx, e.stdout, conn, in)
			if err != nil && ctx.Err() == nil {
				return 0, err
			}
			in.From = max(in.From, last+1)
			if wait(ctx, tailPeriod) != nil {
				return exitDone, nil
			}
		}
	})
}

// errEnough ends a scan.
var errEnough = errors.New("enough")

// print prints what is selected of a span, and returns the last sequence it
// looked at, selected or not.
func (f *tailFlags) print(ctx context.Context, w io.Writer, conn *streams.Conn, in span) (last uint64, n int, err error) {
	err = scan(ctx, conn, in, f.subject(f.stream), func(m *jetstream.RawStreamMsg) error {
		if f.matches(m) {
			if f.limit > 0 && n == f.limit {
				return errEnough
			}
			n++
			if err := f.printOne(w, m); err != nil {
				return err
			}
		}
		last = m.Sequence
		return nil
	})
	if errors.Is(err, errEnough) {
		err = nil
	}
	return last, n, err
}

func (f *tailFlags) printOne(w io.Writer, m *jetstream.RawStreamMsg) error {
	ev := seenEvent{
		step: newStep(f.stream, m, nil), Subscriber: streams.SubjectSubscriber(m.Subject), RequestID: requestID(m.Data),
		Body: shown(m.Data, f.reveal),
	}
	ev.Waits = false // not looked up
	if f.json {
		return printJSON(w, ev)
	}
	fmt.Fprintf(w, "%s  %d  subscriber %d  %s  %s %s\n", ev.Stored.UTC().Format(time.RFC3339), ev.Sequence, ev.Subscriber, ev.RequestID, ev.Status, ev.Reason)
	fmt.Fprintf(w, "    %s\n", ev.Body)
	return nil
}

// shown returns a body as JSON, masked unless it is to be revealed.
func shown(body []byte, reveal bool) json.RawMessage {
	if !reveal {
		return masked(body)
	}
	if json.Valid(body) {
		return body
	}
	text, err := json.Marshal(body) // base64
	if err != nil {
		return json.RawMessage("null")
	}
	return text
}
