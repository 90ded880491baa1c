package persister

import (
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
)

// Config is what the persister needs to know.
type Config struct {
	NATS streams.ConnectConfig
	// Redis says where records go.
	Redis redisclient.Config
	// TTL is how long after its acceptance an event's record lives.
	TTL time.Duration
	// Event says how much of the vendor's event a record keeps.
	Event EventDetail
	// Batch is how many records one pipeline writes at most; Linger how long
	// a smaller one waits for more while another is being written.
	Batch  int
	Linger time.Duration
	// ShutdownTimeout bounds how long writes under way may take after SIGTERM.
	ShutdownTimeout time.Duration
}

// EventDetail is how much of the vendor's event a record keeps.
type EventDetail string

const (
	// EventLean drops the raw device attributes, a third of the bytes.
	EventLean EventDetail = "lean"
	// EventFull keeps every byte.
	EventFull EventDetail = "full"
	// EventNone keeps the signals alone.
	EventNone EventDetail = "none"
)

// ReadConfig reads the persister's settings.
func ReadConfig(s *ops.Settings) Config {
	return Config{
		NATS:  streams.ReadConnectConfig(s, streams.StagePersister),
		Redis: redisclient.ReadConfig(s, "redis://127.0.0.1:6379/0", "where records go: redis://, rediss://, ?addr= for a cluster, ?master_name= for sentinels (default redis://127.0.0.1:6379/0); user and password in a file are read again at each connect"),
		TTL:   s.Duration("RECORD_TTL", 24*time.Hour, time.Minute, 72*time.Hour, "life of a record from the event's acceptance on; at most what FP_ENRICHED keeps"),
		Event: EventDetail(s.OneOf("RECORD_EVENT", "how much of the vendor's event a record keeps: lean drops raw device attributes",
			string(EventLean), string(EventFull), string(EventNone))),
		Batch:           s.Int("PERSIST_BATCH", 256, 1, 4096, "records written by one pipeline at most"),
		Linger:          s.Duration("PERSIST_LINGER", time.Millisecond, 0, time.Second, "how long a small batch waits for more while another is being written"),
		ShutdownTimeout: s.Duration("SHUTDOWN_TIMEOUT", 20*time.Second, time.Second, 10*time.Minute, "how long calls under way may take after SIGTERM"),
	}
}
