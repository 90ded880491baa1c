// Package redisclient opens Redis the same way everywhere: one form of URL,
// short limits, and no repeats behind the caller's back.
package redisclient

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/url"
	"os"
	"time"

	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// The library's own lines would stand unstructured among ours; every error they
// tell of is returned as well. Its logger is one for the process.
func init() { logging.Disable() }

// stepTimeout bounds each step of a Redis command. The library's defaults
// wait ten seconds and repeat by themselves what may have been done already;
// repeating is the stage's decision.
const stepTimeout = 500 * time.Millisecond

// Config says how to reach Redis.
type Config struct {
	// URL returns the URL in force, in one of the forms of [New]. Its user and
	// password are asked for at each connect, so that rotating them needs no
	// restart; the rest is read once.
	URL func() ops.Secret
	// CAFile is the path of the CA that signed the servers' certificates, for
	// rediss://; empty for those of the system. It is read at each connect.
	CAFile string
}

// ReadConfig reads the REDIS_* settings of a program; def is the URL without
// REDIS_URL. Faults are kept in s.
func ReadConfig(s *ops.Settings, def, doc string) Config {
	url := s.RotatingSecret("REDIS_URL", doc)
	c := Config{
		URL:    func() ops.Secret { return cmp.Or(url(), ops.Secret(def)) },
		CAFile: s.Path("REDIS_CA_FILE", "CA that signed the Redis servers' certificates, instead of the system's"),
	}
	if !c.Set() {
		return c
	}
	rdb, err := Open(c)
	if err != nil {
		s.Fail("REDIS_URL", "%v", err)
		return c
	}
	_ = rdb.Close() // it has not connected
	return c
}

// Set reports whether there is a Redis at all.
func (c Config) Set() bool { return c.URL() != "" }

// New is [Open] for a URL that does not change.
func New(rawURL string) (redis.UniversalClient, error) {
	return Open(Config{URL: func() ops.Secret { return ops.Secret(rawURL) }})
}

// Open returns a client for a URL that names a single server (redis://,
// rediss://), a cluster (?addr= for each further node) or sentinels
// (?master_name=). It does not connect. Its errors do not show the URL, which
// may hold a password.
func Open(c Config) (redis.UniversalClient, error) {
	o, err := parse(string(c.URL()))
	if err != nil {
		return nil, err
	}
	username, password := o.Username, o.Password
	o.CredentialsProvider = func() (string, string) {
		if now, err := parse(string(c.URL())); err == nil {
			return now.Username, now.Password
		}
		return username, password // a broken edit changes nothing
	}
	if c.CAFile != "" {
		if o.TLSConfig == nil {
			return nil, fmt.Errorf("REDIS_CA_FILE is of use with rediss:// only")
		}
		base := o.TLSConfig
		o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
			pem, err := os.ReadFile(c.CAFile)
			if err != nil {
				return nil, fmt.Errorf("read the CA of Redis: %w", err)
			}
			conf := base.Clone()
			conf.RootCAs = x509.NewCertPool()
			if !conf.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("read the CA of Redis: no certificate in %s", c.CAFile)
			}
			d := tls.Dialer{NetDialer: &net.Dialer{Timeout: stepTimeout}, Config: conf}
			return d.DialContext(ctx, network, addr) //nolint:wrapcheck // the library says what for
		}
	}
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = stepTimeout, stepTimeout, stepTimeout, stepTimeout
	o.MaxRetries, o.DialerRetries = -1, 1
	o.ContextTimeoutEnabled = true
	o.DisableIdentity = true // CLIENT SETINFO is more than the ACL user may do
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	return redis.NewUniversalClient(o), nil
}

// parse reads who is meant and by which credentials.
func parse(rawURL string) (*redis.UniversalOptions, error) {
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
	return o, nil
}
