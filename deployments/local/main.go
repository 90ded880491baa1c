// Command local runs the whole pipeline in one process, with nothing to
// install but Go: an embedded nats-server with JetStream on disk, an embedded
// Redis, a double of the Fingerprint API, and the three services through their
// own Run functions and settings.
//
//	go run ./deployments/local           do the job once, then serve until Ctrl-C
//	go run ./deployments/local --once    do the job once and exit
//	go run ./deployments/local --monitor --load 50   watch it work under load
//	go run ./deployments/local bench     how fast the edge is, beside bare parts
//	go run ./deployments/local faults    break things under load, and account for every event
//	go run ./deployments/local --help    everything else
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/idenza/fingerprint-prefetch/deployments/local/faults"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // from here on a second signal kills
	code := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

const usage = `local runs the whole pipeline in one process on embedded servers.

  go run ./deployments/local [--once] [--data DIR] [--real] [--monitor] [--load N]
  go run ./deployments/local bench      how fast the edge is, beside bare parts
  go run ./deployments/local bench pipeline
                                        how fast the whole pipeline is, and where its limit lies
  go run ./deployments/local faults     break things under load, and account for every event

`

const settingsHelp = `
Settings, from the environment:
  INGEST_ADDR   127.0.0.1:8080   where clients post
  OPS_ADDR      127.0.0.1:9101   operators' port of ingest; prefetcher and persister take the next two
  LOG_LEVEL     warn             lowest level logged, to stderr
  LOG_FORMAT    text             form of log lines
  and every RECORD_, PERSIST_, PREFETCH_ and SHUTDOWN_ setting of the services.
With --real also NATS_*, REDIS_URL and FINGERPRINT_*; without it they change nothing.
`

// options are the command line.
type options struct {
	once, real, monitor bool
	load                float64 // events a second
	data                string
}

// run is main without the process: it returns the exit code, 0 done, 1 failed,
// 2 bad usage or settings.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) int {
	if len(args) > 0 && args[0] == "bench" {
		return benchEdge(ctx, args[1:], stdout, stderr)
	}
	if len(args) > 0 && args[0] == "faults" {
		return faults.Main(ctx, args[1:], stdout, stderr)
	}
	var o options
	fs := flag.NewFlagSet("local", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.BoolVar(&o.once, "once", false, "exit after doing the job once")
	fs.BoolVar(&o.real, "real", false, "use the servers that NATS_URL, REDIS_URL and FINGERPRINT_API_KEY name, as far as set")
	fs.StringVar(&o.data, "data", "", "keep the streams in `DIR` and rebuild the records from them at the next start")
	fs.BoolVar(&o.monitor, "monitor", false, "serve a page that draws the pipeline's metrics as they change")
	fs.Float64Var(&o.load, "load", 0, "send `N` events a second until Ctrl-C")
	version := fs.Bool("version", false, "print the version")
	fs.Usage = func() {
		fmt.Fprint(fs.Output(), usage)
		fs.PrintDefaults()
		fmt.Fprint(fs.Output(), settingsHelp)
	}
	switch err := fs.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err != nil:
		return 2
	case fs.NArg() > 0:
		fmt.Fprintf(stderr, "local: unknown argument %q; see --help\n", fs.Arg(0))
		return 2
	case o.once && (o.monitor || o.load != 0) || o.load < 0 || o.load > maxLoad:
		fmt.Fprintf(stderr, "local: --load is 0 to %d events a second, and neither it nor --monitor goes with --once\n", maxLoad)
		return 2
	case *version:
		v, revision := ops.Version()
		fmt.Fprintln(stdout, "local", v, revision)
		return 0
	}
	err := serve(ctx, o, getenv, stdout, stderr)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, ops.ErrSettings):
		fmt.Fprintln(stderr, err)
		return 2
	default:
		fmt.Fprintln(stderr, "local:", err)
		return 1
	}
}

// serve starts everything, shows the job once, and waits for the end.
func serve(ctx context.Context, o options, getenv func(string) string, stdout, stderr io.Writer) (err error) {
	s, err := start(ctx, o, getenv, stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.ready(ctx); err != nil {
		return err
	}
	s.describe(stdout)
	if err := s.showJob(ctx, stdout); err != nil {
		return err
	}
	if o.once {
		return nil
	}
	if o.monitor {
		url, err := s.serveMonitor()
		if err != nil {
			return err
		}
		fmt.Fprintf(stdout, "\nWatch it: %s\n", url)
	}
	if o.load > 0 {
		fmt.Fprintf(stdout, "\nSending %g events a second.\n", o.load)
		loadCtx, stopLoad := context.WithCancel(ctx)
		sent := make(chan [2]int64, 1)
		go func() {
			accepted, refused := s.load(loadCtx, o.load)
			sent <- [2]int64{accepted, refused}
		}()
		defer func() { // after the last line below: one writer at a time
			stopLoad()
			n := <-sent
			fmt.Fprintf(stdout, "Sent %d events: %d accepted, %d not.\n", n[0]+n[1], n[0], n[1])
		}()
	}
	fmt.Fprintln(stdout, "\nServing until Ctrl-C.")
	select {
	case <-ctx.Done():
		fmt.Fprintln(stdout, "\nStopping: finishing what is in hand.")
		return nil
	case err := <-s.failed:
		return err
	}
}
