package persister

import (
	"fmt"
	"net/url"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Config is what the persister needs to know.
type Config struct {
	NATS streams.ConnectConfig
	// RedisURL names a single server (redis://, rediss://), a cluster
	// (?addr=… for each further node) or sentinels (?master_name=…).
	RedisURL string
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
	c := Config{
		NATS:     streams.ReadConnectConfig(s, streams.StagePersister),
		RedisURL: string(s.Secret("REDIS_URL", "where records go: redis://, rediss://, ?addr= for a cluster, ?master_name= for sentinels (default redis://127.0.0.1:6379/0)")),
		TTL:      s.Duration("RECORD_TTL", 24*time.Hour, time.Minute, 72*time.Hour, "life of a record from the event's acceptance on; at most what FP_ENRICHED keeps"),
		Event: EventDetail(s.OneOf("RECORD_EVENT", "how much of the vendor's event a record keeps: lean drops raw device attributes",
			string(EventLean), string(EventFull), string(EventNone))),
		Batch:           s.Int("PERSIST_BATCH", 256, 1, 4096, "records written by one pipeline at most"),
		Linger:          s.Duration("PERSIST_LINGER", time.Millisecond, 0, time.Second, "how long a small batch waits for more while another is being written"),
		ShutdownTimeout: s.Duration("SHUTDOWN_TIMEOUT", 20*time.Second, time.Second, 10*time.Minute, "how long calls under way may take after SIGTERM"),
	}
	if c.RedisURL == "" {
		c.RedisURL = "redis://127.0.0.1:6379/0"
	}
	if _, err := newRedis(c.RedisURL); err != nil {
		s.Fail("REDIS_URL", "%v", err)
	}
	return c
}

// redisTimeout bounds each step of a Redis command. The library's defaults
// wait ten seconds and repeat by themselves what may have been done already;
// repeating is the stage's decision.
const redisTimeout = 500 * time.Millisecond

// newRedis returns a client for any form of REDIS_URL. It does not connect.
// Its errors do not show the URL, which may hold a password.
func newRedis(rawURL string) (redis.UniversalClient, error) {
	u, err := url.Parse(rawURL)
	if err != nil {
		return nil, fmt.Errorf("not a URL")
	}
	o := &redis.UniversalOptions{}
	switch q := u.Query(); {
	case q.Has("master_name"):
		f, err := redis.ParseFailoverURL(rawURL)
		if err != nil {
			return nil, fmt.Errorf("not a sentinel URL such as redis://host:26379/0?master_name=main&addr=host2:26379")
		}
		o.Addrs, o.MasterName, o.SentinelUsername, o.SentinelPassword = f.SentinelAddrs, f.MasterName, f.SentinelUsername, f.SentinelPassword
		o.Username, o.Password, o.DB, o.TLSConfig = f.Username, f.Password, f.DB, f.TLSConfig
	case q.Has("addr"):
		c, err := redis.ParseClusterURL(rawURL)
		if err != nil {
			return nil, fmt.Errorf("not a cluster URL such as redis://host:6379?addr=host2:6379")
		}
		o.Addrs, o.Username, o.Password, o.TLSConfig, o.IsClusterMode = c.Addrs, c.Username, c.Password, c.TLSConfig, true
	default:
		s, err := redis.ParseURL(rawURL)
		if err != nil {
			return nil, fmt.Errorf("not a URL such as redis://:password@host:6379/0")
		}
		o.Addrs, o.Username, o.Password, o.DB, o.TLSConfig = []string{s.Addr}, s.Username, s.Password, s.DB, s.TLSConfig
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = redisTimeout, redisTimeout, redisTimeout, redisTimeout
	o.MaxRetries, o.DialerRetries = -1, 1
	o.ContextTimeoutEnabled = true
	o.DisableIdentity = true // CLIENT SETINFO is more than the ACL user may do
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return redis.NewUniversalClient(o), nil
}
