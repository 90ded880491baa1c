package streams

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// ConnectConfig says how to reach NATS.
type ConnectConfig struct {
	// Name of the service: connection name and inbox prefix.
	Name string
	// URL is one server or a comma-separated list, nats:// or tls://.
	URL string
	// CredsFile, CAFile, CertFile and KeyFile are optional paths. They are
	// read at each connect, so that rotation needs no restart.
	CredsFile, CAFile, CertFile, KeyFile string
}

// ReadConnectConfig reads the NATS_* settings of a service.
func ReadConnectConfig(s *ops.Settings, name string) ConnectConfig {
	c := ConnectConfig{
		Name:      name,
		URL:       s.String("NATS_URL", nats.DefaultURL, "NATS servers, comma-separated"),
		CredsFile: s.Path("NATS_CREDS_FILE", "NATS credentials file"),
		CAFile:    s.Path("NATS_CA_FILE", "CA that signed the NATS servers' certificates"),
		CertFile:  s.Path("NATS_CERT_FILE", "client certificate for NATS"),
		KeyFile:   s.Path("NATS_KEY_FILE", "key of the client certificate for NATS"),
	}
	if (c.CertFile == "") != (c.KeyFile == "") {
		s.Fail("NATS_CERT_FILE", "needs NATS_KEY_FILE, and the other way round")
	}
	return c
}

// Conn is a connection to NATS that outlives every fault it can. It is safe
// for concurrent use.
type Conn struct {
	NC *nats.Conn
	JS jetstream.JetStream

	closed chan struct{}
	failed atomic.Pointer[error] // why the last attempt to connect failed
}

// Connect returns soon, connected or not: a service starts before its
// servers do, and one that accepts and says nothing costs two seconds. It fails only on a configuration that can never work.
//
// What the options are for:
//   - a hung server is noticed by pings within 6 s (the default takes 4 min),
//     and a full socket to it within 2 s (a minute), as no ping gets past that;
//   - nothing is buffered while disconnected: a publish the caller was told
//     had failed must not be stored later;
//   - failed authentication is retried for ever, else a rotated password
//     closes the connection for good after the second refusal;
//   - an own inbox prefix, so that a service's permissions can keep it from
//     reading other services' replies.
func Connect(cfg ConnectConfig, log *slog.Logger, reg prometheus.Registerer) (*Conn, error) {
	m := newConnMetrics(reg)
	c := &Conn{closed: make(chan struct{})}
	opts := []nats.Option{
		nats.Name(cfg.Name),
		nats.CustomInboxPrefix("_INBOX_" + cfg.Name),
		nats.Timeout(2 * time.Second),
		nats.PingInterval(2 * time.Second),
		nats.MaxPingsOutstanding(2),
		nats.FlusherTimeout(2 * time.Second),
		nats.ReconnectOnFlusherError(),
		nats.MaxReconnects(-1),
		nats.ReconnectWait(100 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 400*time.Millisecond),
		nats.RetryOnFailedConnect(true),
		nats.ReconnectBufSize(-1),
		nats.IgnoreAuthErrorAbort(),
		nats.ConnectHandler(func(nc *nats.Conn) {
			m.connected.Set(1)
			log.Info("nats connected", "server", nc.ConnectedServerName())
		}),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			m.connected.Set(0)
			if err == nil { // our own Close
				return
			}
			m.disconnects.Inc()
			log.Warn("nats disconnected", "err", err)
		}),
		nats.ReconnectHandler(func(nc *nats.Conn) {
			m.connected.Set(1)
			m.reconnects.Inc()
			log.Info("nats reconnected", "server", nc.ConnectedServerName())
		}),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) {
			c.failed.Store(&err)
			log.Debug("cannot connect to nats", "err", err)
		}),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) {
			m.asyncErrors.WithLabelValues(asyncErrorKind(err)).Inc()
			log.Warn("nats reported an error", "err", err)
		}),
		nats.ClosedHandler(func(*nats.Conn) {
			m.connected.Set(0)
			close(c.closed)
		}),
	}
	if cfg.CredsFile != "" {
		opts = append(opts, nats.UserCredentials(cfg.CredsFile))
	}
	if cfg.CertFile != "" {
		opts = append(opts, nats.ClientTLSConfig(func() (tls.Certificate, error) {
			return tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
		}, nil))
	}
	if cfg.CAFile != "" { // after the certificate, whose option forgets the CA
		opts = append(opts, nats.RootCAs(cfg.CAFile))
	}
	var err error
	if c.NC, err = nats.Connect(cfg.URL, opts...); err != nil {
		if _, ok := errors.AsType[*url.Error](err); ok {
			err = errors.New("not a URL") // the error would quote it, password included
		}
		return nil, fmt.Errorf("NATS_URL: connect to nats: %w", err)
	}
	if c.JS, err = jetstream.New(c.NC); err != nil {
		c.NC.Close()
		return nil, fmt.Errorf("open jetstream: %w", err)
	}
	return c, nil
}

// Closed is closed when the connection is gone for good, which a service
// answers by exiting: it would never come back by itself.
func (c *Conn) Closed() <-chan struct{} { return c.closed }

// ErrClosed is what a service returns when Closed happens before its stop.
var ErrClosed = errors.New("nats connection closed for good")

// Err returns nil while connected, else why not, as far as that is known.
func (c *Conn) Err() error {
	if c.NC.IsConnected() {
		return nil
	}
	err := c.NC.LastError()
	if failed := c.failed.Load(); err == nil && failed != nil {
		err = *failed
	}
	if err == nil {
		return errors.New("not connected")
	}
	return fmt.Errorf("not connected: %w", err)
}

// Ready returns nil when the stream answers now: what readiness means for
// whoever publishes to it.
func (c *Conn) Ready(ctx context.Context, stream string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if err := c.Err(); err != nil {
		return err
	}
	if _, err := c.JS.Stream(ctx, stream); err != nil {
		return fmt.Errorf("look up stream %s: %w", stream, err)
	}
	return nil
}

// WatchReady keeps the part "nats" of a service's health true to [Conn.Ready],
// until ctx is done.
func (c *Conn) WatchReady(ctx context.Context, health *ops.Health, stream string) {
	for {
		health.Set("nats", c.Ready(ctx, stream))
		if !sleep(ctx, time.Second) {
			return
		}
	}
}

// Close sends what is still in the socket's buffer, acks above all, and
// closes. It takes at most two seconds.
func (c *Conn) Close() {
	if c.NC.IsConnected() {
		_ = c.NC.FlushTimeout(2 * time.Second) // best effort: what is lost is delivered again
	}
	c.NC.Close()
	<-c.closed
}

type connMetrics struct {
	connected               prometheus.Gauge
	disconnects, reconnects prometheus.Counter
	asyncErrors             *prometheus.CounterVec
}

func newConnMetrics(reg prometheus.Registerer) *connMetrics {
	f := promauto.With(reg)
	m := &connMetrics{
		connected:   f.NewGauge(prometheus.GaugeOpts{Name: "fp_nats_connected", Help: "1 while connected to a NATS server."}),
		disconnects: f.NewCounter(prometheus.CounterOpts{Name: "fp_nats_disconnects_total", Help: "Connections to NATS lost."}),
		reconnects:  f.NewCounter(prometheus.CounterOpts{Name: "fp_nats_reconnects_total", Help: "Connections to NATS won back."}),
		asyncErrors: f.NewCounterVec(prometheus.CounterOpts{Name: "fp_nats_async_errors_total", Help: "Errors NATS reported outside any call. A refused permission shows here and nowhere else: the call itself only times out."}, []string{"kind"}),
	}
	for _, k := range []string{"permission", "auth", "slow_consumer", "other"} {
		m.asyncErrors.WithLabelValues(k)
	}
	return m
}

func asyncErrorKind(err error) string {
	switch {
	case errors.Is(err, nats.ErrPermissionViolation):
		return "permission"
	case errors.Is(err, nats.ErrAuthorization), errors.Is(err, nats.ErrAuthExpired), errors.Is(err, nats.ErrAuthRevoked),
		errors.Is(err, nats.ErrAccountAuthExpired):
		return "auth"
	case errors.Is(err, nats.ErrSlowConsumer):
		return "slow_consumer"
	case strings.Contains(strings.ToLower(err.Error()), "authorization"):
		return "auth"
	}
	return "other"
}
