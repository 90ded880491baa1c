package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// streamOf returns the stream of a durable; errors name the durables there
// are.
func streamOf(durable string) (string, error) {
	var names []string
	for _, d := range streams.Definition(streams.Limits{}) {
		for _, c := range d.Durables {
			if c.Durable == durable {
				return d.Stream.Name, nil
			}
			names = append(names, c.Durable)
		}
	}
	return "", usageError{fmt.Errorf("want a durable: %s", strings.Join(names, ", "))}
}

// pause has the server deliver nothing to a durable for a while. What a stage
// has in hand it finishes.
func pause(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var until timeFlag
	length := fs.Duration("for", 0, "how `long`")
	fs.Var(&until, "until", "resume at this RFC 3339 `time`")
	return setPause(ctx, e, fs, args, func() (time.Time, error) {
		switch {
		case (*length == 0) == until.IsZero():
			return time.Time{}, usageError{errors.New("say how long: --for or --until")}
		case *length != 0:
			until.Time = time.Now().Add(*length)
		}
		if !until.After(time.Now()) {
			return time.Time{}, usageError{errors.New("that time is over")}
		}
		return until.Time, nil
	})
}

// resume ends a pause.
func resume(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	return setPause(ctx, e, fs, args, func() (time.Time, error) { return time.Time{}, nil })
}

func setPause(ctx context.Context, e env, fs *flag.FlagSet, args []string, until func() (time.Time, error)) (int, error) {
	var f commonFlags
	f.declare(fs)
	words, err := parseMixed(fs, args, 1)
	if err != nil {
		return 0, err
	}
	durable := strings.Join(words, "")
	stream, err := streamOf(durable)
	if err != nil {
		return 0, err
	}
	end, err := until()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	verb := "pause"
	if end.IsZero() {
		verb = "resume"
	}
	return e.audited(ctx, conn, verb, words, fs, func() (int, error) {
		resp, err := conn.JS.PauseConsumer(ctx, stream, durable, end)
		if err != nil {
			return 0, fmt.Errorf("%s %s: %w", verb, durable, err)
		}
		return exitDone, printPause(e, stream, durable, resp, f.json)
	})
}

func printPause(e env, stream, durable string, resp *jetstream.ConsumerPauseResponse, asJSON bool) error {
	if asJSON {
		var until *time.Time
		if resp.Paused {
			until = &resp.PauseUntil
		}
		return printJSON(e.stdout, struct {
			Stream  string     `json:"stream"`
			Durable string     `json:"durable"`
			Paused  bool       `json:"paused"`
			Until   *time.Time `json:"until,omitempty"`
		}{stream, durable, resp.Paused, until})
	}
	if resp.Paused {
		fmt.Fprintf(e.stdout, "%s is paused until %s\n", durable, resp.PauseUntil.UTC().Format(time.RFC3339))
	} else {
		fmt.Fprintf(e.stdout, "%s is not paused\n", durable)
	}
	return nil
}
