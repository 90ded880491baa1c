package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// authority is a CA as an operator would have it: it signs the servers and the
// services of one deployment and nothing else.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key = a.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

func (a *authority) sign(tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	if tmpl.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
		a.t.Fatal(err)
	}
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
	return cert, key
}

// issue writes a Secret's three files to dir: a certificate for the names, its
// key and the CA.
func (a *authority) issue(dir string, names ...string) {
	a.t.Helper()
	cert, key := a.sign(&x509.Certificate{
		DNSNames: names, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		a.t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"tls.crt": {Type: "CERTIFICATE", Bytes: cert.Raw},
		"tls.key": {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	trust(a.t, dir, a)
}

// trust writes a Secret's ca.crt.
func trust(t *testing.T, dir string, cas ...*authority) {
	t.Helper()
	var bundle []byte
	for _, ca := range cas {
		bundle = append(bundle, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})...)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), bundle, 0o600); err != nil {
		t.Fatal(err)
	}
}

// shippedNATS is a cluster of three nats-server processes that run the
// configuration of deployments/k8s. Paths, ports and addresses are its own;
// the name "localhost" stands for those of the pods.
type shippedNATS struct {
	t   *testing.T
	dir string
	*authority
	nodes map[string]*natsNode
}

type natsNode struct {
	addr, cluster, monitor, conf string
	cmd                          *exec.Cmd
}

func newShippedNATS(t *testing.T) *shippedNATS {
	t.Helper()
	if _, err := build(); err != nil {
		t.Fatal(err)
	}
	n := &shippedNATS{t: t, dir: t.TempDir(), authority: newAuthority(t), nodes: map[string]*natsNode{}}
	n.issue(filepath.Join(n.dir, "server"), "localhost")
	for _, p := range streams.AllPermissions() {
		n.issue(filepath.Join(n.dir, p.User), p.User)
	}
	shipped := readFile(t, "../k8s/components/nats/nats.conf")
	routes := []string{}
	for i := range 3 {
		name := fmt.Sprint("nats-", i)
		n.nodes[name] = &natsNode{addr: streamstest.FreeAddr(t), cluster: streamstest.FreeAddr(t), monitor: streamstest.FreeAddr(t), conf: filepath.Join(n.dir, name+".conf")}
		routes = append(routes, name+".nats-headless:6222", localhost(n.nodes[name].cluster))
	}
	for name, node := range n.nodes {
		conf := strings.NewReplacer(append(routes,
			"$POD_NAME", name,
			"0.0.0.0:4222", node.addr, "0.0.0.0:6222", node.cluster, "0.0.0.0:8222", node.monitor,
			"/run/secrets/nats", filepath.Join(n.dir, "server"),
			"/run/nats", n.dir, "nats.pid", name+".pid",
			"/data", filepath.Join(n.dir, name),
		)...).Replace(shipped)
		for _, left := range []string{"0.0.0.0", "/run/secrets", "headless"} {
			if strings.Contains(conf, left) {
				t.Fatalf("nats.conf still says %s", left)
			}
		}
		if err := os.WriteFile(node.conf, []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(n.dir, "users.conf"), []byte(readFile(t, "../k8s/components/nats/users.conf")), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, node := range n.nodes {
		opts, err := server.ProcessConfigFile(node.conf)
		if err != nil {
			t.Fatal(err)
		}
		if !opts.SyncAlways || !opts.TLSMap || !opts.Cluster.TLSCheckKnownURLs || opts.ServerName != name {
			t.Fatalf("%s: sync always %v, users from certificates %v, routes from known names %v", opts.ServerName, opts.SyncAlways, opts.TLSMap, opts.Cluster.TLSCheckKnownURLs)
		}
		n.start(name)
	}
	return n
}

func readFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// localhost gives an address by the name in the servers' certificate.
func localhost(addr string) string {
	_, port, _ := net.SplitHostPort(addr)
	return net.JoinHostPort("localhost", port)
}

func (n *shippedNATS) start(name string) {
	n.t.Helper()
	dir, _ := build()
	n.nodes[name].cmd = startProcess(n.t, filepath.Join(dir, "nats-server"), "--config", n.nodes[name].conf)
}

// startProcess runs a server for the length of the test.
func startProcess(t *testing.T, binary string, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // may have ended already
		_ = cmd.Wait()
	})
	return cmd
}

// config is how a user reaches the cluster: by its certificate, whatever its
// service calls itself.
func (n *shippedNATS) config(user string) streams.ConnectConfig {
	urls := []string{}
	for _, node := range n.nodes {
		urls = append(urls, "tls://"+localhost(node.addr))
	}
	dir := filepath.Join(n.dir, user)
	return streams.ConnectConfig{
		Name: user, URL: strings.Join(urls, ","),
		CAFile: filepath.Join(dir, "ca.crt"), CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key"),
	}
}

// env is config as settings of a service.
func (n *shippedNATS) env(user string) []string {
	c := n.config(user)
	return []string{"NATS_URL=" + c.URL, "NATS_CA_FILE=" + c.CAFile, "NATS_CERT_FILE=" + c.CertFile, "NATS_KEY_FILE=" + c.KeyFile}
}

// connect connects as a user for the length of the test.
func (n *shippedNATS) connect(t *testing.T, user string) *streams.Conn {
	t.Helper()
	c, err := streams.Connect(n.config(user), streamstest.Logger(t), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	streamstest.Eventually(t, "connection of "+user, c.NC.IsConnected)
	return c
}

// shippedRedis is a redis-server process that runs the configuration of
// deployments/k8s, with users from the generated ACL.
type shippedRedis struct {
	t               *testing.T
	dir, addr, conf string
	cmd             *exec.Cmd
}

// newShippedRedis starts one whose users' passwords are "<user>-1".
func newShippedRedis(t *testing.T, ca *authority) *shippedRedis {
	t.Helper()
	r := &shippedRedis{t: t, dir: t.TempDir(), addr: streamstest.FreeAddr(t)}
	ca.issue(r.dir, "localhost")
	r.passwords("1")
	_, port, _ := net.SplitHostPort(r.addr)
	conf := strings.NewReplacer(
		"tls-port 6379", "tls-port "+port+"\nbind 127.0.0.1",
		"/run/secrets/redis-acl", r.dir, "/run/secrets/redis", r.dir, "dir /data", "dir "+r.dir,
	).Replace(readFile(t, "../k8s/components/redis/redis.conf"))
	r.conf = filepath.Join(r.dir, "redis.conf")
	if err := os.WriteFile(r.conf, []byte(conf), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start()
	return r
}

// passwords writes the ACL file: each user's passwords are its name and the
// suffixes.
func (r *shippedRedis) passwords(suffixes ...string) {
	r.t.Helper()
	hashes := map[string][]string{}
	for _, user := range []string{streams.RedisUserPersister, streams.RedisUserPrefetcher, streams.RedisUserScorer, streams.RedisUserStreamctl, streams.RedisUserOperator} {
		for _, s := range suffixes {
			hashes[user] = append(hashes[user], fmt.Sprintf("%x", sha256.Sum256([]byte(user+"-"+s))))
		}
	}
	acl := &bytes.Buffer{}
	if err := streams.WriteRedisACL(acl, hashes); err != nil {
		r.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(r.dir, "users.acl"), acl.Bytes(), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

func (r *shippedRedis) start() {
	r.t.Helper()
	bin, err := exec.LookPath("redis-server")
	if err != nil {
		r.t.Fatal("redis-server is not installed; `make test` installs it on Debian, elsewhere install Redis 7 or later with TLS")
	}
	r.cmd = startProcess(r.t, bin, r.conf)
	streamstest.Eventually(r.t, "redis-server on "+r.addr, func() bool {
		c, err := net.DialTimeout("tcp", r.addr, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

// restart stops it as Kubernetes does, and starts it on its data.
func (r *shippedRedis) restart() {
	r.t.Helper()
	if err := r.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		r.t.Fatal(err)
	}
	_ = r.cmd.Wait() // its exit code says nothing
	r.start()
}

// url is that of a user with a password.
func (r *shippedRedis) url(user, password string) string {
	return "rediss://" + user + ":" + password + "@" + localhost(r.addr) + "/0"
}

// env is how a service is given its Redis: the files of a Secret.
func (r *shippedRedis) env(user string) []string {
	return []string{"REDIS_URL_FILE=" + filepath.Join(r.dir, user+".url"), "REDIS_CA_FILE=" + filepath.Join(r.dir, "ca.crt")}
}

// secret writes the file of env, replacing it as the kubelet does.
func (r *shippedRedis) secret(user, password string) {
	r.t.Helper()
	name := filepath.Join(r.dir, user+".url")
	if err := os.WriteFile(name+".new", []byte(r.url(user, password)+"\n"), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		r.t.Fatal(err)
	}
}

// client connects as a user for the length of the test.
func (r *shippedRedis) client(t *testing.T, url string) redis.UniversalClient {
	t.Helper()
	c, err := redisclient.Open(redisclient.Config{URL: func() ops.Secret { return ops.Secret(url) }, CAFile: filepath.Join(r.dir, "ca.crt")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// newShippedPipeline starts the services on NATS as it ships and a plain Redis,
// and waits until they are ready.
func newShippedPipeline(t *testing.T) (*shippedNATS, *pipeline) {
	t.Helper()
	n, rs := newShippedNATS(t), streamstest.NewRedis(t)
	p := newPipelineAt(t, func(service string) []string {
		env := n.env(service)
		if service == "persister" || service == "streamctl" {
			env = append(env, "REDIS_URL="+rs.URL())
		}
		return env
	})
	p.rdb = redisClient(t, rs.URL())
	p.streamctl("apply", "--replicas=3", "--timeout=50s")
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	return n, p
}
