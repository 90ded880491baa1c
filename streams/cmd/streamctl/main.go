// Command streamctl is the operators' tool for the pipeline's streams.
//
//	streamctl apply    create or update streams and durables
//	streamctl diff     show what apply would change
//	streamctl status   show streams and durables
//	streamctl tail     follow what is stored in a stream
//	streamctl show     print what is in a stream
//	streamctl trace    follow one event through everything
//	streamctl dead     list, show, redrive and purge dead letters
//	streamctl replay   have a stage see events again
//	streamctl pause    stop deliveries to a durable for a while
//	streamctl resume   end a pause
//	streamctl erase    erase a person's events everywhere
//	streamctl audit    show who changed or revealed what
//	streamctl exporter serve every durable's lag, make room in full streams, send heartbeats
//
// It reaches NATS by the same NATS_* settings as the services, or by a context
// of the nats command that --context or NATS_CONTEXT names. Results go to
// standard output, everything else to standard error. Exit codes:
//
//	0  done
//	1  failed
//	2  bad usage or settings
//	3  nothing matched
//	4  stopped with work left; for diff: there are differences
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"
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
	exitNone   = 3 // nothing matched
	// exitLeft: stopped with work left. For diff: there are differences.
	exitLeft = 4
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // from here on a second signal kills
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdin, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// env is what a verb runs in.
type env struct {
	getenv         func(string) string
	stdin          io.Reader
	stdout, stderr io.Writer
	// context is the value of --context, once that is parsed.
	context *string
}

// confirm asks on a person's terminal; anything but a yes is a no.
func (e env) confirm(question string) bool {
	fmt.Fprint(e.stderr, question, " [y/N] ")
	answer, _ := bufio.NewReader(e.stdin).ReadString('\n') // no answer is a no
	answer = strings.ToLower(strings.TrimSpace(answer))
	return answer == "y" || answer == "yes"
}

// verb is one word of the command line. Its run declares the verb's flags on
// fs, parses args with [parse], and returns the exit code.
type verb struct {
	name, args, summary string
	run                 func(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error)
}

func verbs() []verb {
	return []verb{
		{"apply", "[--replicas N] [--max-bytes STREAM=SIZE]… [--allow-loss] [--json] [--timeout 30s]", "create or update streams and durables", apply},
		{"diff", "[--replicas N] [--max-bytes STREAM=SIZE]… [--json] [--timeout 30s]", "show what apply would change, and change nothing; exit code 4 if there is something", diff},
		{"status", "[--watch] [--json] [--timeout 30s]", "show streams and durables: sizes, lag in messages and seconds, who is stuck", status},
		{"tail", "STREAM [--subscriber N] [--request-id ID] [--since TIME] [--reveal] [--json]", "follow a stream (ingest, enriched, backfill, dead), personal data masked unless --reveal", tail},
		{"show", "STREAM [--subscriber N] [--request-id ID] [--since TIME] [--until TIME] [--from-seq N] [--limit N] [--reveal] [--json]", "print what is in a stream, personal data masked unless --reveal", show},
		{"trace", "REQUEST_ID [--since TIME] [--record-ttl 24h] [--json]", "follow one event through the streams to its record, and say where it is now", trace},
		{"dead", "list|show SEQUENCE|redrive|purge [--stage S] [--reason R] [--subscriber N] [--request-id ID] [--since TIME] [--until TIME] [--json]", "dead letters: show masks personal data unless --reveal; redrive has the flags of replay, and --all; purge asks first unless --yes", dead},
		{"replay", "--stage STAGE --since TIME [--until TIME] [--only-missing] [--dry-run] [--rate N] [--json] | --resume ID", "have a stage see events again, behind live traffic", replay},
		{"pause", "DURABLE --for 1h|--until TIME [--json]", "have the server deliver nothing to a durable for a while; status shows it", pause},
		{"resume", "DURABLE [--json]", "end a pause", resume},
		{"erase", "--user-id USER | --subscriber N [--dry-run] [--json]", "erase a person's events from every stream, dead letter and record; says what it cannot reach", erase},
		{"audit", "[--since TIME] [--until TIME] [--verb V] [--json]", "who replayed, redrove, purged, erased, paused or revealed what, and when", audit},
		{"exporter", "", "serve the lag of every durable on OPS_ADDR (:9104), purge finished history from streams that fill up, and send heartbeats; settings as a service's", exporter},
	}
}

// parse reads the flags of a verb that takes no further arguments.
func parse(fs *flag.FlagSet, args []string) error {
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err //nolint:wrapcheck // a word to run
		}
		return usageError{err}
	}
	if fs.NArg() > 0 {
		return usageError{fmt.Errorf("unknown argument %q", fs.Arg(0))}
	}
	return nil
}

// usageError is a fault of the command line.
type usageError struct{ error }

func run(ctx context.Context, args []string, getenv func(string) string, stdin io.Reader, stdout, stderr io.Writer) int {
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
		fs.SetOutput(io.Discard) // run prints what there is to say
		context := fs.String("context", getenv("NATS_CONTEXT"), "`NAME` of a context of the nats command; NATS_* settings go before it")
		code, err := v.run(ctx, env{getenv, stdin, stdout, stderr, context}, fs, args[1:])
		_, badUsage := errors.AsType[usageError](err)
		switch {
		case errors.Is(err, flag.ErrHelp):
			fmt.Fprintf(stdout, "streamctl %s %s\n\n%s\n\n", v.name, v.args, v.summary)
			printFlags(stdout, fs)
			return exitDone
		case badUsage:
			fmt.Fprintf(stderr, "streamctl %s: %v; see streamctl %s --help\n", v.name, err, v.name)
			return exitUsage
		case errors.Is(err, ops.ErrSettings):
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

// printFlags writes flags as a table.
func printFlags(w io.Writer, fs *flag.FlagSet) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fs.VisitAll(func(f *flag.Flag) {
		name, text := flag.UnquoteUsage(f)
		if f.DefValue != "" && f.DefValue != "false" {
			text += " (default " + f.DefValue + ")"
		}
		fmt.Fprintf(t, "  --%s %s\t%s\n", f.Name, name, text)
	})
	t.Flush()
}

func help(w io.Writer) {
	fmt.Fprint(w, "streamctl is the operators' tool for the pipeline's streams.\n\n")
	for _, v := range verbs() {
		fmt.Fprintf(w, "  streamctl %s %s\n        %s\n", v.name, v.args, v.summary)
	}
	fmt.Fprint(w, "\nstreamctl VERB --help lists a verb's flags.\nExit codes: 0 done, 1 failed, 2 usage, 3 nothing matched, 4 stopped with work left (diff: there are differences).\n\nSettings (environment):\n")
	s := ops.NewSettings(func(string) string { return "" })
	streams.ReadConnectConfig(s, "streamctl")
	readRedis(s)
	readLimits(s)
	readRate(s)
	ops.PrintSettings(w, s.Asked())
}

// connect reaches NATS within ctx. Errors name the servers without
// credentials.
func (e env) connect(ctx context.Context) (*streams.Conn, error) {
	getenv, err := e.settings()
	if err != nil {
		return nil, err
	}
	s := ops.NewSettings(getenv)
	cfg := streams.ReadConnectConfig(s, "streamctl")
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	// A permission the server refuses shows in the log alone.
	log := slog.New(slog.NewTextHandler(e.stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	c, err := streams.Connect(cfg, log, prometheus.NewRegistry())
	if err != nil {
		return nil, fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	err = retry(ctx, func(context.Context) error { return c.Err() })
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("NATS at %s: %w", ops.WithoutPassword(cfg.URL), err)
	}
	return c, nil
}

// retry calls try until it succeeds or ctx is done: servers and their
// JetStream may be starting up. It returns what try said last.
func retry(ctx context.Context, try func(context.Context) error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	var last error
	for {
		err := once(ctx, try)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil { // else it only says that time is up
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w (%w)", last, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// once bounds one try, so that a request that got lost does not use up the
// time for all of them.
func once(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	return try(ctx)
}
