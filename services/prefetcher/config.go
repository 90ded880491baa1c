package prefetcher

import (
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
)

// Config is what the prefetcher needs to know.
type Config struct {
	NATS streams.ConnectConfig
	// APIKey returns the vendor's secret key in force.
	APIKey func() ops.Secret
	// BaseURL is the root of the vendor's host.
	BaseURL string
	// RateLimit is the vendor's quota in calls per second for all replicas
	// together, 0 for none; Replicas is how many share it.
	RateLimit float64
	Replicas  int
	// Timeout bounds one call, body included.
	Timeout time.Duration
	// Concurrency is how many calls to the vendor are under way at once, live ones
	// and backfill each.
	Concurrency int
	// Redis is where the replicas share the quota and ready records are seen,
	// if it is set.
	Redis redisclient.Config
	// FreshWithin is the age from which a live event makes way for newer ones.
	FreshWithin time.Duration
	// Retention is how long the vendor keeps events, 0 for ever.
	Retention time.Duration
	// MaxAge is how long after its acceptance an event is worth fetching.
	MaxAge time.Duration
	// ShutdownTimeout bounds how long calls under way may take after SIGTERM.
	ShutdownTimeout time.Duration
}

// ReadConfig reads the prefetcher's settings.
func ReadConfig(s *ops.Settings) Config {
	c := Config{
		NATS:            streams.ReadConnectConfig(s, streams.StagePrefetcher),
		APIKey:          s.RotatingSecret("FINGERPRINT_API_KEY", "secret key of the Fingerprint Server API; a file is read again when it changes"),
		BaseURL:         RegionURL(s.OneOf("FINGERPRINT_REGION", "region of the Fingerprint workspace", "us", "eu", "ap")),
		RateLimit:       s.Rate("FINGERPRINT_RATE_LIMIT", 5, "calls per second the vendor allows for all replicas together; 0 means unlimited"),
		Timeout:         s.Duration("FINGERPRINT_TIMEOUT", 5*time.Second, 100*time.Millisecond, 20*time.Second, "longest call, body included"),
		Concurrency:     s.Int("PREFETCH_CONCURRENCY", 64, 1, 4096, "calls under way at once, live ones and backfill each"),
		MaxAge:          s.Duration("PREFETCH_MAX_AGE", 23*time.Hour, time.Minute, 72*time.Hour, "age from which an event is given up; below RECORD_TTL, so that the failed record is still seen"),
		FreshWithin:     s.Duration("PREFETCH_FRESH_WITHIN", time.Minute, time.Second, 72*time.Hour, "age from which a live event moves to FP_BACKFILL while newer ones wait"),
		Retention:       s.Duration("FINGERPRINT_RETENTION", 30*24*time.Hour, 0, 10*365*24*time.Hour, "how long the vendor keeps events; older ids are not asked for; 0 means for ever"),
		Redis:           redisclient.ReadConfig(s, "", "where replicas share the quota and ready records are seen, in the persister's form; empty for neither"),
		Replicas:        s.Int("PREFETCH_REPLICAS", 1, 1, 1000, "replicas that share the rate limit, for when Redis is away or not used"),
		ShutdownTimeout: s.Duration("SHUTDOWN_TIMEOUT", 20*time.Second, time.Second, 10*time.Minute, "how long calls under way may take after SIGTERM"),
	}
	if u := s.URL("FINGERPRINT_BASE_URL", "", "root of the vendor's host, instead of the region's", "http", "https"); u != "" {
		c.BaseURL = u
	}
	return c
}
