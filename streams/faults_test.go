package streams_test

import (
	"flag"
	"net"
	"net/url"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestMain runs more tests at once than there are processors: they wait for
// servers to fail and to come back, and compute little.
func TestMain(m *testing.M) {
	flag.Parse()
	asked := false
	flag.Visit(func(f *flag.Flag) { asked = asked || f.Name == "test.parallel" })
	if !asked {
		if err := flag.Set("test.parallel", "8"); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// proxy stands between a client and its server and can stop forwarding
// without closing anything, as a hung server or a silent firewall does.
type proxy struct {
	URL string

	target string
	ln     net.Listener
	done   sync.WaitGroup

	mu    sync.Mutex
	gates gates // of the connections to come
	conns []net.Conn
	thaws []func()
}

// gates are locked while nothing passes to the server, or from it.
type gates struct{ to, from *sync.RWMutex }

func newGates() gates { return gates{new(sync.RWMutex), new(sync.RWMutex)} }

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{URL: "nats://" + ln.Addr().String(), target: u.Host, ln: ln, gates: newGates()}
	p.done.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

func (p *proxy) accept() {
	for {
		client, err := p.ln.Accept()
		if err != nil {
			return
		}
		srv, err := net.DialTimeout("tcp", p.target, time.Second)
		if err != nil {
			client.Close()
			continue
		}
		p.mu.Lock()
		g := p.gates
		p.conns = append(p.conns, client, srv)
		p.mu.Unlock()
		p.done.Go(func() { forward(g.to, srv, client) })
		p.done.Go(func() { forward(g.from, client, srv) })
	}
}

func forward(gate *sync.RWMutex, to, from net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		gate.RLock()
		_, werr := to.Write(buf[:n])
		if err != nil || werr != nil {
			to.Close()
		}
		gate.RUnlock()
		if err != nil || werr != nil {
			return
		}
	}
}

// hang stops all forwarding, also of connections to come, until the returned
// function is called.
func (p *proxy) hang() func() {
	p.mu.Lock()
	defer p.mu.Unlock()
	g := p.gates
	g.to.Lock()
	g.from.Lock()
	thaw := sync.OnceFunc(func() { g.to.Unlock(); g.from.Unlock() })
	p.thaws = append(p.thaws, thaw)
	return thaw
}

// loseAnswers lets everything through to the server and nothing back.
func (p *proxy) loseAnswers() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gates.from.Lock()
	p.thaws = append(p.thaws, p.gates.from.Unlock)
}

// hangOpen stops the connections that are open now, for good.
func (p *proxy) hangOpen() {
	p.hang()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.gates = newGates()
}

// close cuts every connection; what hung is lost.
func (p *proxy) close() {
	p.ln.Close()
	p.mu.Lock()
	for _, c := range p.conns {
		c.Close()
	}
	for _, thaw := range p.thaws {
		thaw()
	}
	p.thaws = nil
	p.mu.Unlock()
	p.done.Wait()
}

// ownServer starts a nats-server with options of the test's, for what
// streamstest does not offer. Call start again to put it on the same port
// with other options.
type ownServer struct {
	t    *testing.T
	Addr string
	srv  *server.Server
}

func newOwnServer(t *testing.T) *ownServer {
	s := &ownServer{t: t, Addr: streamstest.FreeAddr(t)}
	t.Cleanup(s.stop)
	return s
}

func (s *ownServer) start(opts server.Options) {
	s.t.Helper()
	s.stop()
	addr, err := net.ResolveTCPAddr("tcp", s.Addr)
	if err != nil {
		s.t.Fatal(err)
	}
	opts.Host, opts.Port, opts.NoSigs, opts.NoLog = "127.0.0.1", addr.Port, true, true
	if s.srv, err = server.NewServer(&opts); err != nil {
		s.t.Fatal(err)
	}
	s.srv.Start()
	if !s.srv.ReadyForConnections(20 * time.Second) {
		s.t.Fatal("nats-server does not start")
	}
}

func (s *ownServer) stop() {
	if s.srv == nil {
		return
	}
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
	s.srv = nil
}

// connect connects to url, with its metrics on the registry it returns.
func connect(t *testing.T, cfg streams.ConnectConfig) (*streams.Conn, *prometheus.Registry) {
	t.Helper()
	reg := prometheus.NewRegistry()
	c, err := streams.Connect(cfg, streamstest.Logger(t), reg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c, reg
}

// metric returns the value of the counter or gauge that has these label
// values, in any order; ok is false when there is none.
func metric(t *testing.T, g prometheus.Gatherer, name string, values ...string) (v float64, ok bool) {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var have []string
			for _, l := range m.GetLabel() {
				have = append(have, l.GetValue())
			}
			missing := func(v string) bool { return !slices.Contains(have, v) }
			if f.GetName() == name && !slices.ContainsFunc(values, missing) {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue(), true
			}
		}
	}
	return 0, false
}

// mustMetric is metric for one that has to be there.
func mustMetric(t *testing.T, g prometheus.Gatherer, name string, values ...string) float64 {
	t.Helper()
	v, ok := metric(t, g, name, values...)
	if !ok {
		t.Fatalf("no metric %s%v", name, values)
	}
	return v
}
