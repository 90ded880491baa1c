package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// streamStatus is one line of status. Bytes and MaxBytes are in bytes; the
// times are absent from an empty stream.
type streamStatus struct {
	Stream   string    `json:"stream"`
	Messages uint64    `json:"messages"`
	Bytes    uint64    `json:"bytes"`
	MaxBytes int64     `json:"max_bytes"`
	First    time.Time `json:"first,omitzero"`
	Last     time.Time `json:"last,omitzero"`
}

// durableStatus is one line of status.
type durableStatus struct {
	Stream   string `json:"stream"`
	Durable  string `json:"durable"`
	Pending  uint64 `json:"pending"`
	InFlight uint64 `json:"in_flight"`
	// OldestSeconds is the age of the oldest unfinished message.
	OldestSeconds float64 `json:"oldest_seconds"`
	// State is done, working, idle (messages wait and nobody asks for them)
	// or paused.
	State string `json:"state"`
}

type statusReport struct {
	Streams  []streamStatus  `json:"streams"`
	Durables []durableStatus `json:"durables"`
}

// watchPeriod is gentle to the server: consumer info is not free.
const watchPeriod = 2 * time.Second

func status(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	watch := fs.Bool("watch", false, "show again every two seconds until Ctrl-C")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	for {
		once, cancel := context.WithTimeout(ctx, f.timeout)
		r, err := readStatus(once, conn)
		cancel()
		if err != nil {
			if *watch && ctx.Err() != nil {
				return exitDone, nil
			}
			return 0, err
		}
		if *watch && !f.json {
			fmt.Fprint(e.stdout, "\x1b[H\x1b[2J")
		}
		if f.json {
			err = printJSON(e.stdout, r)
		} else {
			printStatus(e.stdout, r)
		}
		if err != nil || !*watch {
			return exitDone, err
		}
		select {
		case <-ctx.Done():
			return exitDone, nil
		case <-time.After(watchPeriod):
		}
	}
}

func readStatus(ctx context.Context, conn *streams.Conn) (statusReport, error) {
	var r statusReport
	now := time.Now()
	for _, d := range streams.Definition(streams.Limits{}) {
		s, err := conn.JS.Stream(ctx, d.Stream.Name)
		if err != nil {
			return r, fmt.Errorf("look up stream %s: %w", d.Stream.Name, err)
		}
		info := s.CachedInfo()
		line := streamStatus{Stream: d.Stream.Name, Messages: info.State.Msgs, Bytes: info.State.Bytes, MaxBytes: info.Config.MaxBytes}
		if info.State.Msgs > 0 {
			line.First, line.Last = info.State.FirstTime, info.State.LastTime
		}
		r.Streams = append(r.Streams, line)
		for _, c := range d.Durables {
			consumer, err := s.Consumer(ctx, c.Durable)
			if err != nil {
				return r, fmt.Errorf("look up durable %s of %s: %w", c.Durable, d.Stream.Name, err)
			}
			lag, err := streams.ReadLag(ctx, conn.JS, d.Stream.Name, c.Durable)
			if err != nil {
				return r, err //nolint:wrapcheck // says what it did
			}
			state, info := "working", consumer.CachedInfo()
			switch {
			case info.Paused:
				state = "paused"
			case lag.Messages() == 0:
				state = "done"
			case info.NumWaiting == 0 && lag.InFlight == 0:
				state = "idle"
			}
			r.Durables = append(r.Durables, durableStatus{
				Stream: d.Stream.Name, Durable: c.Durable, Pending: lag.Pending, InFlight: lag.InFlight,
				OldestSeconds: lag.Seconds(now), State: state,
			})
		}
	}
	return r, nil
}

func printStatus(w io.Writer, r statusReport) {
	now := time.Now()
	age := func(t time.Time) string {
		if t.IsZero() {
			return "-"
		}
		return now.Sub(t).Round(time.Second).String()
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "STREAM\tMESSAGES\tBYTES\tOF LIMIT\tFIRST AGE\tLAST AGE")
	for _, s := range r.Streams {
		share := "-"
		if s.MaxBytes > 0 {
			share = fmt.Sprintf("%.1f%%", 100*float64(s.Bytes)/float64(s.MaxBytes))
		}
		fmt.Fprintf(t, "%s\t%d\t%d\t%s\t%s\t%s\n", s.Stream, s.Messages, s.Bytes, share, age(s.First), age(s.Last))
	}
	t.Flush()
	fmt.Fprintln(w)
	fmt.Fprintln(t, "DURABLE\tPENDING\tIN FLIGHT\tOLDEST\tSTATE")
	for _, d := range r.Durables {
		fmt.Fprintf(t, "%s\t%d\t%d\t%.0fs\t%s\n", d.Durable, d.Pending, d.InFlight, d.OldestSeconds, d.State)
	}
	t.Flush()
}
