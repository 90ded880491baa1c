package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// applyFlags are those of apply and diff.
type applyFlags struct {
	limits  streams.Limits
	json    bool
	timeout time.Duration
}

func (f *applyFlags) parse(fs *flag.FlagSet, args []string) error {
	// A deployment was given its replicas and sizes once. Whoever changes one
	// of them, or repairs a durable, need not know the others.
	f.limits = streams.Limits{Keep: true, MaxBytes: map[string]int64{}}
	fs.IntVar(&f.limits.Replicas, "replicas", 0, "copies of each stream, `N` = 1, 3 or 5; 0 leaves them as they are, and a new stream gets those of the others, the first ones 1")
	fs.Func("max-bytes", "size limit of a stream as `STREAM=SIZE`, such as FP_INGEST=20GiB, instead of the one it has, or of a new one's default; repeatable", f.maxBytes)
	fs.BoolVar(&f.json, "json", false, "print the changes as a JSON list")
	fs.DurationVar(&f.timeout, "timeout", 30*time.Second, "how `long` to wait for NATS and its answers")
	if err := parse(fs, args); err != nil {
		return err
	}
	switch {
	case f.timeout <= 0:
		return usageError{fmt.Errorf("--timeout %v is no time at all", f.timeout)}
	case !slices.Contains([]int{0, 1, 3, 5}, f.limits.Replicas):
		return usageError{fmt.Errorf("--replicas %d is none of 1, 3 and 5", f.limits.Replicas)}
	}
	return nil
}

func (f *applyFlags) maxBytes(v string) error {
	name, size, ok := strings.Cut(v, "=")
	if !ok {
		return errors.New("want STREAM=SIZE")
	}
	known := false
	for _, d := range streams.Definition(streams.Limits{}) {
		known = known || d.Stream.Name == name
	}
	if !known {
		return fmt.Errorf("no stream is called %q", name)
	}
	if _, ok := f.limits.MaxBytes[name]; ok {
		return fmt.Errorf("%s is given twice", name)
	}
	n, err := parseSize(size)
	if err != nil {
		return err
	}
	f.limits.MaxBytes[name] = n
	return nil
}

// parseSize reads bytes: 1048576, 500MiB, 2GiB, 1TiB.
func parseSize(s string) (int64, error) {
	unit := int64(1)
	for suffix, u := range map[string]int64{"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40} {
		if rest, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = rest, u
			break
		}
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n <= 0 || n > math.MaxInt64/unit {
		return 0, errors.New("want a size such as 1048576, 500MiB or 2GiB")
	}
	return n * unit, nil
}

func apply(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f applyFlags
	allowLoss := fs.Bool("allow-loss", false, "also make changes that drop messages, copies of them, or the room for new ones")
	if err := f.parse(fs, args); err != nil {
		return 0, err
	}
	ctx, cancel := f.limit(ctx)
	defer cancel()
	conn, err := e.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if _, err := f.diff(ctx, conn); err != nil {
		return 0, err
	}
	changes, err := streams.Ensure(ctx, conn.JS, f.limits, *allowLoss)
	if errors.Is(err, streams.ErrWouldLose) {
		return 0, fmt.Errorf("nothing changed: %w; --allow-loss makes it all the same", err)
	}
	if err != nil {
		return 0, err
	}
	return exitDone, printChanges(e.stdout, changes, f.json, "nothing to change")
}

func diff(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f applyFlags
	if err := f.parse(fs, args); err != nil {
		return 0, err
	}
	ctx, cancel := f.limit(ctx)
	defer cancel()
	conn, err := e.connect(ctx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	changes, err := f.diff(ctx, conn)
	if err != nil {
		return 0, err
	}
	code := exitDone
	if len(changes) > 0 {
		code = exitLeft
	}
	return code, printChanges(e.stdout, changes, f.json, "no differences")
}

func (f *applyFlags) limit(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, f.timeout, fmt.Errorf("gave up after %v", f.timeout))
}

// diff waits until the server of the streams answers.
func (f *applyFlags) diff(ctx context.Context, conn *streams.Conn) (changes []streams.Change, err error) {
	err = retry(ctx, func(ctx context.Context) error {
		changes, err = streams.Diff(ctx, conn.JS, f.limits)
		return err //nolint:wrapcheck // says what it did
	})
	return changes, err
}

func printChanges(w io.Writer, changes []streams.Change, asJSON bool, none string) error {
	if asJSON {
		if changes == nil {
			changes = []streams.Change{}
		}
		if err := json.NewEncoder(w).Encode(changes); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		return nil
	}
	if len(changes) == 0 {
		fmt.Fprintln(w, none)
	}
	for _, c := range changes {
		fmt.Fprintln(w, c)
	}
	return nil
}
