package streams_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// logBuffer keeps what was logged.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) Logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

func closed(c *streams.Conn) bool {
	select {
	case <-c.Closed():
		return true
	default:
		return false
	}
}

// refused waits until the server has refused the connection often enough for
// a client with default options to give up for good.
func refused(t *testing.T, c *streams.Conn, reg *prometheus.Registry) {
	t.Helper()
	streamstest.Eventually(t, "four refusals", func() bool { return mustMetric(t, reg, "fp_nats_async_errors_total", "auth") >= 4 || closed(c) })
	if closed(c) {
		t.Fatal("the connection closed for good")
	}
}

// A password is rotated on the server first and in the client's secret later,
// or rotated and rolled back: the connection waits.
func TestConnSurvivesAChangedPassword(t *testing.T) {
	t.Parallel()
	srv := newOwnServer(t)
	srv.start(server.Options{Username: "svc", Password: "old-password"})
	var log logBuffer
	reg := prometheus.NewRegistry()
	c, err := streams.Connect(streams.ConnectConfig{Name: "svc", URL: "nats://svc:old-password@" + srv.Addr}, log.Logger(), reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)

	srv.start(server.Options{Username: "svc", Password: "new-password"})
	refused(t, c, reg)
	if err := c.Err(); err == nil {
		t.Error("no error while refused")
	}
	if v := mustMetric(t, reg, "fp_nats_connected"); v != 0 {
		t.Errorf("fp_nats_connected = %v while refused", v)
	}
	srv.start(server.Options{Username: "svc", Password: "old-password"})
	streamstest.Eventually(t, "the connection won back", c.NC.IsConnected)
	streamstest.Eventually(t, "its metrics", func() bool {
		return mustMetric(t, reg, "fp_nats_connected") == 1 && mustMetric(t, reg, "fp_nats_reconnects_total") == 1
	})
	if v := mustMetric(t, reg, "fp_nats_disconnects_total"); v < 1 {
		t.Errorf("fp_nats_disconnects_total = %v", v)
	}
	if strings.Contains(log.String(), "password") {
		t.Errorf("a password was logged:\n%s", log.String())
	}
}

// operator is what it takes to issue credentials files.
type operator struct {
	t       *testing.T
	claims  *jwt.OperatorClaims
	account nkeys.KeyPair
	res     server.MemAccResolver
}

func newOperator(t *testing.T) *operator {
	t.Helper()
	o := &operator{t: t}
	op, err := nkeys.CreateOperator()
	o.check(err)
	o.account, err = nkeys.CreateAccount()
	o.check(err)
	o.claims = jwt.NewOperatorClaims(o.public(op))
	text, err := o.claims.Encode(op)
	o.check(err)
	o.claims, err = jwt.DecodeOperatorClaims(text)
	o.check(err)
	account, err := jwt.NewAccountClaims(o.public(o.account)).Encode(op)
	o.check(err)
	o.check(o.res.Store(o.public(o.account), account))
	return o
}

func (o *operator) check(err error) {
	o.t.Helper()
	if err != nil {
		o.t.Fatal(err)
	}
}

func (o *operator) public(k nkeys.KeyPair) string {
	o.t.Helper()
	p, err := k.PublicKey()
	o.check(err)
	return p
}

func (o *operator) options() server.Options {
	return server.Options{TrustedOperators: []*jwt.OperatorClaims{o.claims}, AccountResolver: &o.res}
}

// issue writes credentials that expire.
func (o *operator) issue(file string, expires time.Time) {
	o.t.Helper()
	user, err := nkeys.CreateUser()
	o.check(err)
	claims := jwt.NewUserClaims(o.public(user))
	claims.Expires = expires.Unix()
	text, err := claims.Encode(o.account)
	o.check(err)
	seed, err := user.Seed()
	o.check(err)
	creds, err := jwt.FormatUserConfig(text, seed)
	o.check(err)
	o.check(os.WriteFile(file, creds, 0o600))
}

// Credentials run out; new ones are put in place some time later. They are
// read at each connect, so the connection comes back without a restart.
func TestConnTakesRotatedCredentials(t *testing.T) {
	t.Parallel()
	o := newOperator(t)
	srv := newOwnServer(t)
	srv.start(o.options())
	file := filepath.Join(t.TempDir(), "svc.creds")
	o.issue(file, time.Now().Add(3*time.Second))
	c, reg := connect(t, streams.ConnectConfig{Name: "svc", URL: "nats://" + srv.Addr, CredsFile: file})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	refused(t, c, reg)
	o.issue(file, time.Now().Add(time.Hour))
	streamstest.Eventually(t, "the connection won back", c.NC.IsConnected)
}

// authority signs certificates and writes them to files.
type authority struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key = a.sign("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// sign writes <name>.pem and <name>.key.
func (a *authority) sign(name string, tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl.SerialNumber, tmpl.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".pem", "CERTIFICATE", der)
	a.write(name+".key", "EC PRIVATE KEY", keyDER)
	return cert, key
}

func (a *authority) write(file, kind string, der []byte) {
	a.t.Helper()
	if err := os.WriteFile(a.path(file), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

func (a *authority) path(file string) string { return filepath.Join(a.dir, file) }

// A private CA and a client certificate together, as in production; and the
// CA's file is put right while the service runs.
func TestConnWithClientCertificateAndPrivateCA(t *testing.T) {
	t.Parallel()
	ca, stranger := newAuthority(t), newAuthority(t)
	ca.sign("server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	ca.sign("client", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	pair, err := tls.LoadX509KeyPair(ca.path("server.pem"), ca.path("server.key"))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	srv := newOwnServer(t)
	srv.start(server.Options{
		TLSTimeout: 2, TLS: true, TLSVerify: true,
		TLSConfig: &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12},
	})
	caFile := stranger.path("ca.pem")
	c, _ := connect(t, streams.ConnectConfig{
		Name: "svc", URL: "tls://" + srv.Addr, CAFile: caFile, CertFile: ca.path("client.pem"), KeyFile: ca.path("client.key"),
	})
	streamstest.Eventually(t, "the reason", func() bool { return strings.Contains(fmt.Sprint(c.Err()), "x509") })
	right, err := os.ReadFile(ca.path("ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(caFile, right, 0o600); err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	if err := c.Err(); err != nil {
		t.Error(err)
	}

	// Without the certificate the server refuses.
	bare, _ := connect(t, streams.ConnectConfig{Name: "bare", URL: "tls://" + srv.Addr, CAFile: caFile})
	streamstest.Eventually(t, "the reason", func() bool { return strings.Contains(fmt.Sprint(bare.Err()), "certificate") })
}

func TestConnStartsBeforeItsServer(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	n.Stop()
	c, reg := connect(t, streams.ConnectConfig{Name: "early", URL: n.URL})
	p := streams.NewPublisher(c.JS, prometheus.NewRegistry())
	if _, err := p.Publish(t.Context(), message("early")); err == nil {
		t.Error("acked by nobody")
	}
	streamstest.Eventually(t, "the reason", func() bool {
		return strings.Contains(fmt.Sprint(c.Ready(t.Context(), streams.StreamIngest)), "connection refused")
	})
	n.Start()
	streamstest.Eventually(t, "readiness", func() bool { return c.Ready(t.Context(), streams.StreamIngest) == nil })
	streamstest.Eventually(t, "its metric", func() bool { return mustMetric(t, reg, "fp_nats_connected") == 1 })
	if err := c.Ready(t.Context(), "FP_NONE"); err == nil {
		t.Error("ready although the stream does not exist")
	}
	if _, err := p.Publish(t.Context(), message("later")); err != nil {
		t.Error(err)
	}
	if n := stored(t, c.JS, streams.StreamIngest); n["early"] != 0 || n["later"] != 1 {
		t.Errorf("stored %v", n)
	}
}

// A hung server closes nothing; only pings tell. The client then connects
// anew, here to the same server through a connection that works.
func TestConnNoticesAHungServer(t *testing.T) {
	t.Parallel()
	n := streamstest.NewNATS(t)
	px := newProxy(t, n.URL)
	c, reg := connect(t, streams.ConnectConfig{Name: "svc", URL: px.URL})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	px.hangOpen()
	start := time.Now()
	streamstest.Eventually(t, "a new connection", func() bool { return mustMetric(t, reg, "fp_nats_reconnects_total") == 1 })
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("took %v", took)
	}
	if err := c.Ready(t.Context(), streams.StreamIngest); err != nil {
		t.Error(err)
	}
}

// A refused permission shows in this metric and nowhere else: to the caller
// it is a publish without an answer.
func TestConnCountsRefusedPermissions(t *testing.T) {
	t.Parallel()
	srv := newOwnServer(t)
	srv.start(server.Options{
		JetStream: true, StoreDir: t.TempDir(),
		Users: []*server.User{{Username: "ingest", Password: "pw", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Allow: []string{"fp.ingest.*"}}, Subscribe: &server.SubjectPermission{Allow: []string{"_INBOX_ingest.>"}},
		}}},
	})
	c, reg := connect(t, streams.ConnectConfig{Name: "ingest", URL: "nats://ingest:pw@" + srv.Addr})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	pub := prometheus.NewRegistry()
	m := message("a")
	m.Stream, m.Subject = streams.StreamEnriched, streams.EnrichedSubject(12)
	p := &publishing{t: t, reg: pub, Publisher: streams.NewPublisher(c.JS, pub)}
	_, err := p.Publish(t.Context(), m)
	p.expect(err, streams.ErrUnsure, "unsure")
	streamstest.Eventually(t, "the refusals counted", func() bool {
		return mustMetric(t, reg, "fp_nats_async_errors_total", "permission") == 3
	})
	for _, kind := range []string{"auth", "slow_consumer", "other"} {
		if v := mustMetric(t, reg, "fp_nats_async_errors_total", kind); v != 0 {
			t.Errorf("%s = %v", kind, v)
		}
	}
	if !c.NC.IsConnected() {
		t.Error("a refused permission cost the connection")
	}
}

// The replies a service gets are its own: with the usual permissions it can
// read its own inbox and no other.
func TestConnUsesAnInboxOfItsOwn(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	c := n.Connect("prefetcher")
	if inbox := c.NC.NewInbox(); !strings.HasPrefix(inbox, "_INBOX_prefetcher.") {
		t.Error(inbox)
	}
}

// What was handed to the connection before Close has reached the server when
// Close returns: acks above all.
func TestConnCloseFlushes(t *testing.T) {
	t.Parallel()
	srv := newOwnServer(t)
	srv.start(server.Options{})
	c, reg := connect(t, streams.ConnectConfig{Name: "svc", URL: "nats://" + srv.Addr})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	for range 5000 {
		if err := c.NC.Publish("some.subject", []byte("ack")); err != nil {
			t.Fatal(err)
		}
	}
	if closed(c) {
		t.Error("closed before Close")
	}
	c.Close()
	v, err := srv.srv.Varz(nil)
	if err != nil {
		t.Fatal(err)
	}
	if v.InMsgs != 5000 {
		t.Errorf("%d of 5000 messages had reached the server", v.InMsgs)
	}
	if !closed(c) {
		t.Error("Closed has not fired")
	}
	if v := mustMetric(t, reg, "fp_nats_connected"); v != 0 {
		t.Errorf("fp_nats_connected = %v", v)
	}
	c.Close() // once more is harmless
}

// A server that hangs holds up nobody's shutdown for long.
func TestConnClosesInTimeWithAHungServer(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	px := newProxy(t, n.URL)
	c, _ := connect(t, streams.ConnectConfig{Name: "svc", URL: px.URL})
	streamstest.Eventually(t, "nats connection", c.NC.IsConnected)
	px.hang()
	start := time.Now()
	c.Close()
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("took %v", took)
	}
}

// What the client library cannot recover from ends in Closed, which a service
// answers by exiting. A subject beyond the server's line limit is one.
func TestConnClosedFiresWhenTheConnectionIsGoneForGood(t *testing.T) {
	t.Parallel()
	n := streamstest.NewEmptyNATS(t)
	c := n.Connect("svc")
	if err := c.NC.Publish(strings.Repeat("x", 5000), nil); err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "the end", func() bool { return closed(c) })
	if err := c.Ready(t.Context(), streams.StreamIngest); err == nil {
		t.Error("ready without a connection")
	}
}

func TestConnectRefusesWhatCanNeverWork(t *testing.T) {
	t.Parallel()
	garbage := filepath.Join(t.TempDir(), "garbage.pem")
	if err := os.WriteFile(garbage, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]streams.ConnectConfig{
		"URL malformed":       {URL: "nats://svc:hunter%zz2@127.0.0.1:4222"},
		"port malformed":      {URL: "nats://127.0.0.1:hunter2"},
		"one of two":          {URL: "nats://127.0.0.1:4222,nats://svc:hun ter2@ho st:4222"},
		"CA no certificate":   {URL: "tls://127.0.0.1:4222", CAFile: garbage},
		"no certificate":      {URL: "tls://127.0.0.1:4222", CertFile: garbage, KeyFile: garbage},
		"certificate missing": {URL: "tls://127.0.0.1:4222", CertFile: garbage + "x", KeyFile: garbage},
	} {
		cfg.Name = "svc"
		c, err := streams.Connect(cfg, streamstest.Logger(t), prometheus.NewRegistry())
		if err == nil {
			c.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		if strings.Contains(err.Error(), "hunter") || strings.Contains(err.Error(), "zz") || strings.Contains(err.Error(), "ter2") {
			t.Errorf("%s: the error quotes the password: %v", name, err)
		}
	}
}

func TestReadConnectConfig(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("content of "+name+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, c := range map[string]struct {
		env    map[string]string
		want   streams.ConnectConfig
		faults []string
	}{
		"nothing set": {want: streams.ConnectConfig{Name: "svc", URL: nats.DefaultURL}},
		"all": {
			env: map[string]string{
				"NATS_URL": "tls://a:1,tls://b:2", "NATS_CREDS_FILE": file("creds"), "NATS_CA_FILE": file("ca"), "NATS_CERT_FILE": file("cert"), "NATS_KEY_FILE": file("key"),
			},
			want: streams.ConnectConfig{Name: "svc", URL: "tls://a:1,tls://b:2", CredsFile: dir + "/creds", CAFile: dir + "/ca", CertFile: dir + "/cert", KeyFile: dir + "/key"},
		},
		"a URL from a file": {
			env:  map[string]string{"NATS_URL_FILE": file("url")},
			want: streams.ConnectConfig{Name: "svc", URL: "content of url"},
		},
		"certificate without key": {env: map[string]string{"NATS_CERT_FILE": file("cert")}, faults: []string{"NATS_CERT_FILE"}},
		"key without certificate": {env: map[string]string{"NATS_KEY_FILE": file("key")}, faults: []string{"NATS_KEY_FILE"}},
		"files missing": {
			env:    map[string]string{"NATS_CREDS_FILE": "/nowhere/1", "NATS_CA_FILE": "/nowhere/2"},
			faults: []string{"NATS_CREDS_FILE", "NATS_CA_FILE"},
		},
	} {
		s := ops.NewSettings(func(name string) string { return c.env[name] })
		got := streams.ReadConnectConfig(s, "svc")
		err := s.Err()
		if (err != nil) != (c.faults != nil) {
			t.Errorf("%s: %v", name, err)
		}
		for _, f := range c.faults {
			if !strings.Contains(fmt.Sprint(err), f) {
				t.Errorf("%s: %v does not name %s", name, err, f)
			}
		}
		if d := cmp.Diff(c.want, got); c.faults == nil && d != "" {
			t.Errorf("%s: -want +got\n%s", name, d)
		}
	}
}
