// Command streamctl is the operators' tool for the pipeline's streams.
//
//	streamctl apply    create or update streams and durables
//	streamctl diff     show what apply would change
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Exit codes of every verb.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
	// exitLeft: stopped with work left. For diff: there are differences.
	exitLeft = 4
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// env is what a verb runs in.
type env struct {
	getenv         func(string) string
	stdout, stderr io.Writer
}

// verb is one word of the command line.
type verb struct {
	name, args, summary string
	run                 func(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error)
}

func verbs() []verb {
	return []verb{
		{"apply", "[--replicas N] [--max-bytes STREAM=SIZE]… [--allow-loss]", "create or update streams and durables", apply},
		{"diff", "[--replicas N] [--max-bytes STREAM=SIZE]…", "show what apply would change, and change nothing", diff},
	}
}

// usageError is a fault of the command line.
type usageError struct{ error }

func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(args) == 0 {
		help(stderr)
		return exitUsage
	}
	switch args[0] {
	case "--help", "-help", "-h", "help":
		help(stdout)
		return exitDone
	case "--version", "-version":
		version, revision := ops.Version()
		fmt.Fprintln(stdout, "streamctl", version, revision)
		return exitDone
	}
	for _, v := range verbs() {
		if v.name != args[0] {
			continue
		}
		fs := flag.NewFlagSet(v.name, flag.ContinueOnError)
		fs.SetOutput(stderr)
		fs.Usage = func() {
			fmt.Fprintf(fs.Output(), "streamctl %s %s\n\n%s\n\n", v.name, v.args, v.summary)
			fs.PrintDefaults()
		}
		code, err := v.run(ctx, env{getenv, stdout, stderr}, fs, args[1:])
		_, badUsage := errors.AsType[usageError](err)
		switch {
		case errors.Is(err, flag.ErrHelp):
			return exitDone
		case badUsage || errors.Is(err, ops.ErrSettings):
			fmt.Fprintln(stderr, err)
			return exitUsage
		case err != nil:
			fmt.Fprintf(stderr, "streamctl %s: %v\n", v.name, err)
			return exitFailed
		}
		return code
	}
	fmt.Fprintf(stderr, "streamctl: unknown verb %q\n\n", args[0])
	help(stderr)
	return exitUsage
}

func help(w io.Writer) {
	fmt.Fprint(w, "streamctl is the operators' tool for the pipeline's streams.\n\n")
	for _, v := range verbs() {
		fmt.Fprintf(w, "  streamctl %s %s\n        %s\n", v.name, v.args, v.summary)
	}
	fmt.Fprint(w, "\nstreamctl VERB --help lists a verb's flags.\nExit codes: 0 done, 1 failed, 2 usage, 4 stopped with work left (diff: there are differences).\n\nSettings (environment):\n")
	s := ops.NewSettings(func(string) string { return "" })
	streams.ReadConnectConfig(s, "streamctl")
	ops.PrintSettings(w, s.Asked())
}

// connect reaches NATS within ctx. Errors name the servers without
// credentials.
func (e env) connect(ctx context.Context) (*streams.Conn, error) {
	s := ops.NewSettings(e.getenv)
	cfg := streams.ReadConnectConfig(s, "streamctl")
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	c, err := streams.Connect(cfg, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		return nil, err
	}
	for tick := time.NewTicker(20 * time.Millisecond); !c.NC.IsConnected(); {
		select {
		case <-ctx.Done():
			tick.Stop()
			defer c.Close()
			err := c.NC.LastError()
			if err == nil {
				err = context.Cause(ctx)
			}
			return nil, fmt.Errorf("no connection to %s: %w", ops.WithoutPassword(cfg.URL), err)
		case <-tick.C:
		}
	}
	return c, nil
}
