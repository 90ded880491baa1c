//go:build unix

package faults

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	mrand "math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/streams"
)

const (
	nodes    = 3 // of the NATS cluster
	replicas = 2 // of each service
)

// The stages by the names of their processes.
const (
	edge       = "edge"
	prefetcher = "prefetcher"
	persister  = "persister"
)

// client is how the run itself speaks HTTP, apart from the load.
var client = &http.Client{Timeout: 2 * time.Second}

// system is the pipeline as it runs in production, on one machine: every part
// a process of its own, and a proxy on every path between two of them.
type system struct {
	dir   string
	rate  int
	spawn *spawner

	natsAddrs  [nodes]string
	redisAddr  string
	vendorAddr string
	edgeAddrs  [replicas]string
	ops        map[string]string // operators' ports, by process
	procs      map[string]*process
	links      []*link

	conn *streams.Conn
	rdb  *redis.Client

	full fullDisk

	mu      sync.Mutex
	crashes []string
	apiKey  string // that clients use now
	keys    []ingest.KeyEntry
	serial  int // of keys made
	vendor  string
	loss    sync.RWMutex // held for writing while Redis loses its data
	epoch   int          // of Redis's data, under loss
	losses  []time.Time  // when that changed
	planted []place      // messages that are no events
}

// build makes the programs of the pipeline.
func build(ctx context.Context, dir string) error {
	const prefix = "github.com/idenza/fingerprint-prefetch/"
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator),
		prefix+"services/ingest/cmd/ingest", prefix+"services/prefetcher/cmd/prefetcher", prefix+"services/persister/cmd/persister", prefix+"streams/cmd/streamctl")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the services: %w\n%s", err, out)
	}
	return nil
}

// programs are those of the stages.
var programs = [...]string{"ingest", "prefetcher", "persister"}

// version returns what the programs in dir say of themselves: one line when
// they are of one version.
func version(ctx context.Context, dir string) (string, error) {
	var said []string
	for _, program := range programs {
		out, err := exec.CommandContext(ctx, filepath.Join(dir, program), "--version").Output()
		if err != nil {
			return "", fmt.Errorf("%s --version: %w", filepath.Join(dir, program), err)
		}
		said = append(said, strings.TrimSpace(strings.TrimPrefix(string(out), program+" ")))
	}
	return strings.Join(slices.Compact(said), ", "), nil
}

// newSystem lays everything out in dir and starts nothing. bin holds the
// pipeline's programs; old, if not empty, those of an earlier version, of which
// the second of each stage is one at first.
func newSystem(dir, bin, old string, rate int) (_ *system, err error) {
	s := &system{dir: dir, rate: rate, spawn: newSpawner(), ops: map[string]string{}, procs: map[string]*process{}}
	defer func() {
		if err != nil {
			s.stop()
		}
	}()
	redisServer, err := exec.LookPath("redis-server")
	if err != nil {
		return nil, errors.New("redis-server is not installed; `make redis-server` installs it on Debian, elsewhere install Redis 7 or later")
	}
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	for _, sub := range []string{"logs", "redis"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, err //nolint:wrapcheck // names the directory
		}
	}
	var ports ports
	if err := s.addNATS(self, &ports); err != nil {
		return nil, err
	}
	s.redisAddr = ports.free()
	_, port, _ := net.SplitHostPort(s.redisAddr)
	// As in deployments/k8s, apart from who may connect, and that the file of
	// all writes is never rewritten: it is read at the end.
	s.add("redis", redisServer, nil, "--port", port, "--bind", "127.0.0.1", "--dir", filepath.Join(dir, "redis"),
		"--appendonly", "yes", "--appendfsync", "everysec", "--auto-aof-rewrite-percentage", "0", "--save", "", "--maxmemory", "2gb", "--maxmemory-policy", "noeviction")
	s.vendor = "vendor-key-0"
	s.vendorAddr = ports.free()
	s.add("vendor", self, nil, "faults", serveArg, "vendor", s.vendorAddr, s.vendor)
	if err := s.writeVendorKey(); err != nil {
		return nil, err
	}
	key, err := s.addKey()
	if err != nil {
		return nil, err
	}
	s.useKey(key)
	if err := s.addServices(bin, old, &ports); err != nil {
		return nil, err
	}
	// Not through a proxy: nothing that checks or repairs depends on a fault.
	if s.conn, err = streams.Connect(streams.ConnectConfig{Name: "faults", URL: s.natsURL()}, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err != nil {
		return nil, err
	}
	s.rdb = redis.NewClient(&redis.Options{Addr: s.redisAddr, MaxRetries: -1, DialTimeout: 500 * time.Millisecond, ReadTimeout: time.Second, WriteTimeout: time.Second, ContextTimeoutEnabled: true})
	return s, nil
}

// ports gives out addresses nobody listens on, each once. They lie below those
// the kernel gives out by itself, which would otherwise take one while its
// server is down.
type ports struct{ given map[int]bool }

func (p *ports) free() string {
	if p.given == nil {
		p.given = map[int]bool{}
	}
	for {
		port := 10_000 + mrand.IntN(20_000)
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
		if p.given[port] {
			continue
		}
		if ln, err := net.Listen("tcp", addr); err == nil {
			ln.Close()
			p.given[port] = true
			return addr
		}
	}
}

func (s *system) add(name, path string, env []string, args ...string) {
	s.procs[name] = &process{
		name: name, path: path, args: args, env: env, logs: filepath.Join(s.dir, "logs"), spawn: s.spawn,
		crashed: func(name string, err error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.crashes = append(s.crashes, fmt.Sprintf("%s ended by itself: %v; see %s", name, err, filepath.Join(s.dir, "logs", name+".log")))
		},
	}
}

func natsNode(i int) string { return fmt.Sprintf("nats-%d", i+1) }

func (s *system) addNATS(self string, ports *ports) error {
	var cluster [nodes]string
	for i := range nodes {
		s.natsAddrs[i], cluster[i] = ports.free(), ports.free()
	}
	for i := range nodes {
		name := natsNode(i)
		store := filepath.Join(s.dir, name)
		if err := os.MkdirAll(store, 0o700); err != nil {
			return err //nolint:wrapcheck // names the directory
		}
		if i == fullNode {
			s.full.mount(store)
		}
		http := ports.free()
		s.ops[name] = http
		// As in deployments/k8s, apart from who may connect. Servers tell
		// clients of no other server: that would be a way round the proxies.
		conf := fmt.Sprintf("server_name: %s\nlisten: %q\nhttp: %q\nlog_file: %q\n"+
			"jetstream { store_dir: %q, max_memory_store: 64MB, max_file_store: 20GB, sync_interval: always }\n"+
			"cluster { name: faults, listen: %q, no_advertise: true, routes: [%s] }\n",
			name, s.natsAddrs[i], http, filepath.Join(s.dir, "logs", name+".server.log"), store, cluster[i],
			"nats-route://"+strings.Join(cluster[:], ", nats-route://"))
		file := filepath.Join(s.dir, name+".conf")
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			return err //nolint:wrapcheck // names the file
		}
		s.add(name, self, nil, "faults", serveArg, "nats", file)
	}
	return nil
}

func (s *system) natsURL() string {
	return "nats://" + strings.Join(s.natsAddrs[:], ",nats://")
}

// link puts a proxy between a process and a server and returns its address.
func (s *system) link(from, to, target string) (string, error) {
	l, err := newLink(from, to, target)
	if err != nil {
		return "", err
	}
	s.links = append(s.links, l)
	return l.addr, nil
}

// linksOf returns the links between a process and a server, each given by
// the beginning of its name.
func (s *system) linksOf(from, to string) []*link {
	return slices.DeleteFunc(slices.Clone(s.links), func(l *link) bool {
		return !strings.HasPrefix(l.from, from) || !strings.HasPrefix(l.to, to)
	})
}

func (s *system) addServices(bin, old string, ports *ports) error {
	for i := range replicas {
		for _, stage := range []string{edge, prefetcher, persister} {
			name := fmt.Sprintf("%s-%d", stage, i+1)
			var nats []string
			for n := range nodes {
				addr, err := s.link(name, natsNode(n), s.natsAddrs[n])
				if err != nil {
					return err
				}
				nats = append(nats, "nats://"+addr)
			}
			s.ops[name] = ports.free()
			env := []string{"NATS_URL=" + strings.Join(nats, ","), "OPS_ADDR=" + s.ops[name], "LOG_FORMAT=text"}
			var redis string
			if stage != edge {
				addr, err := s.link(name, "redis", s.redisAddr)
				if err != nil {
					return err
				}
				redis = "REDIS_URL=redis://" + addr + "/0"
			}
			program := stage
			switch stage {
			case edge:
				program = "ingest"
				s.edgeAddrs[i] = ports.free()
				env = append(env, "INGEST_ADDR="+s.edgeAddrs[i], "INGEST_API_KEYS_FILE="+s.keysFile(), "SHUTDOWN_GRACE=1s")
			case prefetcher:
				vendor, err := s.link(name, "vendor", s.vendorAddr)
				if err != nil {
					return err
				}
				// The quota is there, and shared, and never in the way.
				env = append(env, redis, "FINGERPRINT_BASE_URL=http://"+vendor, "FINGERPRINT_API_KEY_FILE="+s.vendorKeyFile(),
					"FINGERPRINT_TIMEOUT=2s", "FINGERPRINT_RATE_LIMIT="+strconv.Itoa(5*s.rate), "PREFETCH_REPLICAS="+strconv.Itoa(replicas),
					"PREFETCH_FRESH_WITHIN=15s")
			case persister:
				env = append(env, redis)
			}
			s.add(name, filepath.Join(bin, program), env)
			if old != "" {
				s.procs[name].other = filepath.Join(old, program)
				if i%2 == 1 {
					s.procs[name].swap()
				}
			}
		}
	}
	// Makes room while a replay fills FP_BACKFILL, as in production.
	s.ops["exporter"] = ports.free()
	s.add("exporter", filepath.Join(bin, "streamctl"), []string{"NATS_URL=" + s.natsURL(), "OPS_ADDR=" + s.ops["exporter"], "LOG_FORMAT=text"}, "exporter")
	s.add("streamctl", filepath.Join(bin, "streamctl"), []string{"NATS_URL=" + s.natsURL(), "REDIS_URL=redis://" + s.redisAddr + "/0"})
	return nil
}

func (s *system) keysFile() string      { return filepath.Join(s.dir, "keys.json") }
func (s *system) vendorKeyFile() string { return filepath.Join(s.dir, "vendor-key") }

// addKey makes another client's key, which edges know within seconds.
func (s *system) addKey() (string, error) {
	s.mu.Lock()
	s.serial++
	id := fmt.Sprintf("client-%d", s.serial)
	s.mu.Unlock()
	key, entry, err := ingest.NewKey(id, ingest.AllSubscribers(), rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make an API key: %w", err)
	}
	s.mu.Lock()
	s.keys = append(s.keys, entry)
	s.mu.Unlock()
	return key, s.writeKeys()
}

// dropOldKeys revokes every key but the newest.
func (s *system) dropOldKeys() error {
	s.mu.Lock()
	s.keys = s.keys[len(s.keys)-1:]
	s.mu.Unlock()
	return s.writeKeys()
}

// useKey has clients use the key from now on.
func (s *system) useKey(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.apiKey = key
}

func (s *system) key() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.apiKey
}

// writeKeys replaces the edges' keys file in one step.
func (s *system) writeKeys() error {
	s.mu.Lock()
	b, err := json.Marshal(s.keys)
	s.mu.Unlock()
	if err != nil {
		return fmt.Errorf("write keys: %w", err)
	}
	return replace(s.keysFile(), b)
}

func (s *system) writeVendorKey() error { return replace(s.vendorKeyFile(), []byte(s.vendor+"\n")) }

func replace(file string, b []byte) error {
	if err := os.WriteFile(file+".new", b, 0o600); err != nil {
		return err //nolint:wrapcheck // names the file
	}
	return os.Rename(file+".new", file) //nolint:wrapcheck // names the files
}

// start brings everything up and waits until it is ready.
func (s *system) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, name := range s.servers() {
		if err := s.procs[name].start(); err != nil {
			return err
		}
	}
	if out, err := s.streamctl(ctx, "apply", "--replicas", strconv.Itoa(nodes), "--timeout", "40s"); err != nil {
		return fmt.Errorf("streamctl apply: %w\n%s", err, out)
	}
	for _, name := range s.services() {
		if err := s.procs[name].start(); err != nil {
			return err
		}
	}
	return s.ready(ctx)
}

func (s *system) servers() []string {
	return []string{natsNode(0), natsNode(1), natsNode(2), "redis", "vendor"}
}

// services are named in the order of the data.
func (s *system) services() (names []string) {
	for _, stage := range []string{edge, prefetcher, persister} {
		for i := range replicas {
			names = append(names, fmt.Sprintf("%s-%d", stage, i+1))
		}
	}
	return append(names, "exporter")
}

// streamctl runs the operators' tool and returns what it printed.
func (s *system) streamctl(ctx context.Context, args ...string) (string, error) {
	p := s.procs["streamctl"]
	cmd := exec.CommandContext(ctx, p.path, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.Env = p.env
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = &out, &out, sysProcAttr()
	if err := s.spawn.start(cmd); err != nil {
		return "", err
	}
	err := cmd.Wait()
	return out.String(), err
}

// ready waits until every server and service says that it can work.
func (s *system) ready(ctx context.Context) error {
	for _, name := range append(s.servers(), s.services()...) {
		if err := poll(ctx, func() error { return s.healthy(ctx, name) }); err != nil {
			return err
		}
	}
	return nil
}

// healthy asks one process.
func (s *system) healthy(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	url := "http://" + s.ops[name] + "/readyz"
	switch {
	case name == "redis":
		if err := s.rdb.Ping(ctx).Err(); err != nil {
			return fmt.Errorf("redis: %w", err)
		}
		return nil
	case name == "vendor":
		url = "http://" + s.vendorAddr + "/sim/stats"
	case strings.HasPrefix(name, "nats-"):
		url = "http://" + s.ops[name] + "/healthz"
	}
	if _, err := get(ctx, url); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// answers waits, ten seconds at most, until a service that was started serves
// its operators' port. A signal before that finds a process that does not know
// it yet.
func (s *system) answers(ctx context.Context, name string) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	_ = poll(ctx, func() error {
		_, err := get(ctx, "http://"+s.ops[name]+"/livez")
		return err
	})
}

// get returns the body of a 200.
func get(ctx context.Context, url string) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err //nolint:wrapcheck // names the URL
	}
	resp, err := client.Do(req)
	if err != nil {
		return "", err //nolint:wrapcheck // names the URL
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4<<20))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s: %s", url, resp.Status, strings.TrimSpace(string(b[:min(len(b), 200)])))
	}
	return string(b), nil
}

// sim controls the vendor.
func (s *system) sim(ctx context.Context, path, body string) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPut, "http://"+s.vendorAddr+"/sim/"+path, strings.NewReader(body))
	if err != nil {
		return err //nolint:wrapcheck // names the URL
	}
	resp, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("control the vendor: %w", err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("control the vendor: %s of %s", resp.Status, path)
	}
	return nil
}

// leader returns the number of the node that leads a stream.
func (s *system) leader(ctx context.Context, stream string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	st, err := s.conn.JS.Stream(ctx, stream)
	if err != nil {
		return 0, fmt.Errorf("look for the leader of %s: %w", stream, err)
	}
	if c := st.CachedInfo().Cluster; c != nil {
		for i := range nodes {
			if natsNode(i) == c.Leader {
				return i, nil
			}
		}
	}
	return 0, fmt.Errorf("%s has no leader", stream)
}

// waiting returns how many messages the stages have not finished. The pending
// markers' durable does not count: it is a courtesy.
func (s *system) waiting(ctx context.Context) (n uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, ref := range [][2]string{
		{streams.StreamIngest, streams.DurablePrefetcher}, {streams.StreamEnriched, streams.DurablePersister},
		{streams.StreamBackfill, streams.DurablePrefetcherBackfill}, {streams.StreamBackfill, streams.DurablePersisterBackfill},
	} {
		l, err := streams.ReadLag(ctx, s.conn.JS, ref[0], ref[1])
		if err != nil {
			return 0, err //nolint:wrapcheck // says what it did
		}
		n += l.Messages()
	}
	return n, nil
}

// metric sums a metric over the replicas of a stage. Only series that contain
// every one of the parts count.
func (s *system) metric(ctx context.Context, stage, name string, parts ...string) (sum float64, err error) {
	for i := range replicas {
		body, err := get(ctx, fmt.Sprintf("http://%s/metrics", s.ops[fmt.Sprintf("%s-%d", stage, i+1)]))
		if err != nil {
			return 0, err
		}
		for line := range strings.SplitSeq(body, "\n") {
			rest, ok := strings.CutPrefix(line, name)
			if !ok || rest == "" || rest[0] != '{' && rest[0] != ' ' || slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(rest, p) }) {
				continue
			}
			v, err := strconv.ParseFloat(rest[strings.LastIndexByte(rest, ' ')+1:], 64)
			if err != nil {
				return 0, fmt.Errorf("read metric %s: %w", name, err)
			}
			sum += v
		}
	}
	return sum, nil
}

// stop ends everything that runs: the services in order and with patience,
// the servers at once.
func (s *system) stop() {
	for _, p := range s.procs {
		p.signal(syscall.SIGCONT)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, name := range s.services() {
		if p := s.procs[name]; p != nil {
			p.signal(syscall.SIGTERM)
		}
	}
	for _, p := range s.procs {
		if strings.HasPrefix(p.name, "nats") || p.name == "redis" || p.name == "vendor" {
			continue
		}
		if !p.wait(ctx) {
			p.kill()
		}
	}
	if s.conn != nil {
		s.conn.Close()
	}
	if s.rdb != nil {
		s.rdb.Close()
	}
	for _, p := range s.procs {
		p.kill()
	}
	for _, l := range s.links {
		l.close()
	}
	s.full.unmount()
}
