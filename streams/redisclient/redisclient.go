// Package redisclient opens Redis the same way everywhere: one form of URL,
// short limits, and no repeats behind the caller's back.
package redisclient

import (
	"fmt"
	"net/url"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// The library's own lines would stand unstructured among ours; every error they
// tell of is returned as well. Its logger is one for the process.
func init() { logging.Disable() }

// stepTimeout bounds each step of a Redis command. The library's defaults
// wait ten seconds and repeat by themselves what may have been done already;
// repeating is the stage's decision.
const stepTimeout = 500 * time.Millisecond

// New returns a client for a URL that names a single server (redis://,
// rediss://), a cluster (?addr= for each further node) or sentinels
// (?master_name=). It does not connect. Its errors do not show the URL, which
// may hold a password.
func New(rawURL string) (redis.UniversalClient, error) {
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
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = stepTimeout, stepTimeout, stepTimeout, stepTimeout
	o.MaxRetries, o.DialerRetries = -1, 1
	o.ContextTimeoutEnabled = true
	o.DisableIdentity = true // CLIENT SETINFO is more than the ACL user may do
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return redis.NewUniversalClient(o), nil
}
