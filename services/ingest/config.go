package ingest

import (
	"net"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Config says how to run the edge.
type Config struct {
	// Addr is the host:port of the public API (INGEST_ADDR, ":8080").
	Addr string
	// Listener is used instead of Addr when set, and closed by Run.
	Listener net.Listener
	// APIKeysFile is the path of the keys file (INGEST_API_KEYS_FILE), read
	// again every two seconds.
	APIKeysFile string
	// PublishTimeout is how long a client waits for the stream's ack at most,
	// all attempts together (INGEST_PUBLISH_TIMEOUT, 1.5s).
	PublishTimeout time.Duration
	// ShutdownGrace is how long the edge goes on accepting after it was told
	// to stop, so that load balancers can notice (SHUTDOWN_GRACE, 5s).
	ShutdownGrace time.Duration
	// ShutdownTimeout is how long the requests under way may take after that
	// (SHUTDOWN_TIMEOUT, 20s).
	ShutdownTimeout time.Duration
	// NATS says where the streams are.
	NATS streams.ConnectConfig
}

// ReadConfig reads the settings of the edge; their faults are kept in s.
func ReadConfig(s *ops.Settings) Config {
	cfg := Config{
		Addr:        s.Addr("INGEST_ADDR", ":8080", "the public API listens here"),
		APIKeysFile: s.Path("INGEST_API_KEYS_FILE", "JSON list of API keys' hashes; required"),
		// With the time to read a request it stays below the time to answer one.
		PublishTimeout:  s.Duration("INGEST_PUBLISH_TIMEOUT", 1500*time.Millisecond, 100*time.Millisecond, 4*time.Second, "longest wait for the stream's ack"),
		ShutdownGrace:   s.Duration("SHUTDOWN_GRACE", 5*time.Second, 0, 5*time.Minute, "goes on accepting for this long after SIGTERM"),
		ShutdownTimeout: s.Duration("SHUTDOWN_TIMEOUT", 20*time.Second, time.Second, 5*time.Minute, "longest wait for requests under way after that"),
		NATS:            streams.ReadConnectConfig(s, "ingest"),
	}
	if cfg.APIKeysFile == "" {
		s.Fail("INGEST_API_KEYS_FILE", "required; `ingest keygen` makes a key and its entry")
	}
	return cfg
}
