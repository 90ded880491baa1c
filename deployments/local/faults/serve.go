//go:build unix

package faults

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
)

// serveArg is the hidden word that makes this program one of its own servers:
// what can be killed has to be a process of its own.
const serveArg = "serve"

func serve(ctx context.Context, args []string) error {
	switch {
	case len(args) == 2 && args[0] == "nats":
		return serveNATS(ctx, args[1])
	case len(args) == 3 && args[0] == "vendor":
		return serveVendor(ctx, args[1], args[2])
	}
	return errors.New("want nats CONFIG or vendor ADDR KEY")
}

func serveNATS(ctx context.Context, file string) error {
	opts, err := server.ProcessConfigFile(file)
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	opts.NoSigs = true
	srv, err := server.NewServer(opts)
	if err != nil {
		return fmt.Errorf("nats-server: %w", err)
	}
	srv.ConfigureLogger()
	srv.Start()
	<-ctx.Done()
	srv.Shutdown()
	srv.WaitForShutdown()
	return nil
}

// What the vendor's API takes here, less than the real one's so that the run
// needs fewer calls at once.
const vendorLatency, vendorJitter = 20 * time.Millisecond, 20 * time.Millisecond

func serveVendor(ctx context.Context, addr, key string) error {
	srv := &http.Server{
		Addr:              addr,
		Handler:           fingerprintsim.New(fingerprintsim.Options{Key: key, Latency: vendorLatency, Jitter: vendorJitter}),
		ReadHeaderTimeout: 5 * time.Second,
	}
	context.AfterFunc(ctx, func() { srv.Close() })
	if err := srv.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("vendor: %w", err)
	}
	return nil
}
