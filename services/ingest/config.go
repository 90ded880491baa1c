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
	// RateLimit is the requests per second each key may make on this
	// replica, unless its entry says otherwise (INGEST_RATE_LIMIT, 0: no
	// limit).
	RateLimit float64
	// MaxInflight is how many requests with a good key are handled at once
	// (INGEST_MAX_INFLIGHT, 2048, which 0 means too). Each may hold a body of 64 KiB.
	MaxInflight int
	// ShutdownGrace is how long the edge goes on accepting after it was told
	// to stop, so that load balancers can notice (SHUTDOWN_GRACE, 5s).
	ShutdownGrace time.Duration
	// ShutdownTimeout is how long the requests under way may take after that
	// (SHUTDOWN_TIMEOUT, 20s).
	ShutdownTimeout time.Duration
	// NATS says where the streams are.
	NATS streams.ConnectConfig
}

// defaultInflight bounds the memory of request bodies to 128 MiB.
const defaultInflight = 2048

// ReadConfig reads the settings of the edge; their faults are kept in s.
func ReadConfig(s *ops.Settings) Config {
	cfg := Config{
		Addr:        s.Addr("INGEST_ADDR", ":8080", "the public API listens here"),
		APIKeysFile: s.Path("INGEST_API_KEYS_FILE", "JSON list of API keys' hashes; required"),
		// With the time to read a request it stays below the time to answer one.
		PublishTimeout:  s.Duration("INGEST_PUBLISH_TIMEOUT", 1500*time.Millisecond, 100*time.Millisecond, 4*time.Second, "longest wait for the stream's ack"),
		RateLimit:       s.Rate("INGEST_RATE_LIMIT", 0, "requests per second of each key on each replica, unless its entry has a rate_limit; 0 means unlimited"),
		MaxInflight:     s.Int("INGEST_MAX_INFLIGHT", defaultInflight, 1, 1<<20, "requests handled at once; more are answered 503"),
		ShutdownGrace:   s.Duration("SHUTDOWN_GRACE", 5*time.Second, 0, 5*time.Minute, "goes on accepting for this long after SIGTERM"),
		ShutdownTimeout: s.Duration("SHUTDOWN_TIMEOUT", 20*time.Second, time.Second, 5*time.Minute, "longest wait for requests under way after that"),
		NATS:            streams.ReadConnectConfig(s, "ingest"),
	}
	if cfg.APIKeysFile == "" {
		s.Fail("INGEST_API_KEYS_FILE", "required; `ingest keygen` makes a key and its entry")
	}
	return cfg
}
