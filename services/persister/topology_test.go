package persister

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// A batch is split by slot, moved slots are followed, and a node that is away
// holds the stage until it is back.
func TestRedisCluster(t *testing.T) {
	t.Parallel()
	nodes, url := streamstest.NewRedisCluster(t)
	r := start(t, nodes[0], "REDIS_URL="+url)
	r.rdb = client(t, url)
	batch := func(name string) (recs []record.Record) {
		for i := range 100 {
			recs = append(recs, rec(fmt.Sprint(name, "-", i), 1, record.Ready, 0))
		}
		return recs
	}
	written := func(recs []record.Record) {
		t.Helper()
		for _, want := range recs {
			r.eventually(want.RequestID, record.Ready)
		}
	}
	first := batch("first")
	r.enriched(first...)
	written(first)
	for _, n := range nodes {
		c := redis.NewClient(&redis.Options{Addr: n.Addr})
		if size := c.DBSize(t.Context()).Val(); size < 10 {
			t.Errorf("%s holds %d of 100 records", n.Addr, size)
		}
		c.Close()
	}

	// The persister knows the slots by now: what moves must be found by
	// following MOVED.
	id := func(n *streamstest.Redis) string {
		c := redis.NewClient(&redis.Options{Addr: n.Addr})
		defer c.Close()
		return c.Do(t.Context(), "CLUSTER", "MYID").Val().(string)
	}
	run(t, "redis-cli", "--cluster", "reshard", nodes[0].Addr, "--cluster-from", id(nodes[0]), "--cluster-to", id(nodes[1]), "--cluster-slots", "3000", "--cluster-yes")
	moved := batch("moved")
	r.enriched(moved...)
	written(moved)
	written(first)

	nodes[2].Freeze()
	during := batch("during")
	r.enriched(during...)
	streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
	nodes[2].Thaw()
	written(during)
	r.settled()
	if got := r.deadReasons(); len(got) != 0 {
		t.Errorf("dead letters %v", got)
	}
}

// The sentinels promote the replica when the primary dies or hangs. What was
// replicated before stays, what comes later is written to the new primary, and
// what Redis acknowledged and lost in between is written again by a replay.
func TestSentinelFailover(t *testing.T) {
	t.Parallel()
	for name, fault := range map[string]struct{ begin, end func(*streamstest.Redis) }{
		"killed": {(*streamstest.Redis).Kill, (*streamstest.Redis).Start}, // it comes back empty
		"frozen": {(*streamstest.Redis).Freeze, (*streamstest.Redis).Thaw},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			primary := streamstest.NewRedis(t)
			replica, url := streamstest.NewSentinels(t, primary)
			r := start(t, primary, "REDIS_URL="+url)
			r.rdb = client(t, url)
			promoted := client(t, replica.URL())
			published := 0
			publish := func() record.Record {
				published++
				next := rec(fmt.Sprint("id-", published), 1, record.Ready, 0)
				r.enriched(next)
				return next
			}
			batch := func() (recs []record.Record) {
				for range 100 {
					recs = append(recs, publish())
				}
				return recs
			}

			before := batch()
			r.right(before...)
			replicated(t, primary)
			around := batch() // their writes are under way
			fault.begin(primary)
			var after []record.Record
			pace := time.NewTicker(10 * time.Millisecond)
			defer pace.Stop()
			for role(t, promoted) != "master" {
				after = append(after, publish())
				<-pace.C
			}
			since := time.Now()
			after = append(after, batch()...)
			r.right(after...)
			took := time.Since(since)
			if took > 20*time.Second {
				t.Errorf("all records are there %v after the promotion", took)
			}
			r.settled()
			r.right(before...)

			// What is left of the old primary must not be written to.
			fault.end(primary)
			old := client(t, primary.URL())
			streamstest.Eventually(t, "the old primary to follow", func() bool { return role(t, old) == "slave" })
			later := batch()
			r.right(later...)

			lost := 0
			for i, want := range around {
				if r.status(want.RequestID) == "" {
					lost++
					r.replay(r.message(len(before) + i + 1))
				}
			}
			r.right(around...)
			if got := r.deadReasons(); len(got) != 0 {
				t.Errorf("dead letters %v", got)
			}
			t.Logf("the records of %d events after the fault were there %v after the promotion; Redis lost %d of the %d before", len(after), took, lost, len(around))
		})
	}
}

// replicated waits until the replica of rds has all that was written so far.
func replicated(t *testing.T, rds *streamstest.Redis) {
	t.Helper()
	c := redis.NewClient(&redis.Options{Addr: rds.Addr, PoolSize: 1})
	defer c.Close()
	conn := c.Conn() // WAIT is about the writes of its own connection, and all before
	defer conn.Close()
	if err := conn.Set(t.Context(), "marker", "", 0).Err(); err != nil {
		t.Fatal(err)
	}
	streamstest.Eventually(t, "replication", func() bool { return conn.Wait(t.Context(), 1, time.Second).Val() == 1 })
}

// role is what a server says it is: master or slave.
func role(t *testing.T, rdb redis.UniversalClient) string {
	t.Helper()
	v, err := rdb.Do(t.Context(), "ROLE").Slice()
	if err != nil {
		return err.Error()
	}
	return fmt.Sprint(v[0])
}

// The account may touch the pipeline's keys and nothing else, over TLS.
func TestRedisWithTLSAndACL(t *testing.T) {
	t.Parallel()
	certFile, keyFile := certificate(t)
	_, port, _ := net.SplitHostPort(streamstest.FreeAddr(t))
	rds := streamstest.NewRedis(t, "--tls-port", port, "--tls-cert-file", certFile, "--tls-key-file", keyFile, "--tls-auth-clients", "no")
	admin := client(t, rds.URL())
	if err := admin.Do(t.Context(), "ACL", "SETUSER", "persister", "on", ">pw", "~fp:prefetch:*",
		"-@all", "+ping", "+hello", "+auth", "+select", "+eval", "+evalsha", "+getrange", "+set").Err(); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(certFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	rdb := redis.NewClient(&redis.Options{
		Addr: "127.0.0.1:" + port, Username: "persister", Password: "pw", TLSConfig: &tls.Config{RootCAs: roots}, DisableIdentity: true,
	})
	t.Cleanup(func() { rdb.Close() })
	s := newStore(rdb, time.Hour)
	for i := range 3 { // the script unknown, then known, then superseded
		want := []outcome{written, written, superseded}[i]
		r := []record.Record{rec("A", 1, record.Pending, 0), rec("A", 1, record.Ready, 0), rec("A", 1, record.Failed, 0)}[i]
		if got := put(t, s, r); got != want {
			t.Errorf("%s: %s, want %s", r.Status, got, want)
		}
	}
	for name, err := range map[string]error{
		"another key":    rdb.Set(t.Context(), "other", "x", 0).Err(),
		"FLUSHALL":       rdb.FlushAll(t.Context()).Err(),
		"KEYS":           rdb.Keys(t.Context(), "*").Err(),
		"CONFIG":         rdb.ConfigGet(t.Context(), "*").Err(),
		"a script's key": rdb.Eval(t.Context(), "return redis.call('SET', 'other', 'x')", nil).Err(),
	} {
		if err == nil {
			t.Errorf("%s is allowed", name)
		}
	}
}

// certificate makes one for 127.0.0.1 that signs itself.
func certificate(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "redis"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: cert}, keyFile: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}
