package main

import (
	"context"
	"flag"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// exporterConfig are the exporter's settings.
type exporterConfig struct {
	nats streams.ConnectConfig
	// recordTTL is the persister's: FP_ENRICHED younger than it is kept.
	recordTTL time.Duration
}

// exporterProgram is the one verb that is a service.
func exporterProgram() ops.Program[exporterConfig] {
	return ops.Program[exporterConfig]{
		Name: "exporter", Summary: "serves the lag of every durable, purges finished history from streams that fill up, and sends heartbeats", OpsAddr: ":9104",
		Config: func(s *ops.Settings) exporterConfig {
			return exporterConfig{streams.ReadConnectConfig(s, streams.UserExporter), s.Duration("RECORD_TTL", 24*time.Hour, time.Minute, 72*time.Hour, "life of a record, as the persister has it: FP_ENRICHED younger than this is never purged")}
		},
		Run: func(ctx context.Context, cfg exporterConfig, p *ops.Process) error {
			conn, err := streams.Connect(cfg.nats, p.Log, p.Registry)
			if err != nil {
				return err //nolint:wrapcheck // says what it was doing
			}
			defer conn.Close()
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			lost := make(chan error, 1)
			go func() {
				select {
				case <-conn.Closed():
					lost <- streams.ErrClosed
					cancel()
				case <-ctx.Done():
				}
			}()
			streams.RunExporter(ctx, conn, p, cfg.recordTTL)
			select {
			case err := <-lost:
				return err
			default:
				return nil
			}
		},
	}
}

func exporter(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	if err := parse(fs, args); err != nil {
		return exitUsage, err
	}
	getenv, err := e.settings()
	if err != nil {
		return exitFailed, err
	}
	if err := exporterProgram().Serve(ctx, getenv, e.stdout); err != nil {
		return exitFailed, err //nolint:wrapcheck // says what it was doing
	}
	return exitDone, nil
}
