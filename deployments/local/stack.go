package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/services/persister"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// stack is everything that runs, and how to reach it.
type stack struct {
	ingestURL string
	opsAddrs  []string // of ingest, prefetcher, persister
	natsURL   string
	redisURL  string
	simURL    string // empty when the real vendor is asked
	apiKey    string // for clients
	client    *http.Client

	failed chan error
	// undo is run backwards by stop.
	undo []func() error
}

// start brings up the servers that are to be embedded and then the services.
func start(ctx context.Context, o options, getenv func(string) string, logs io.Writer) (_ *stack, err error) {
	s := &stack{failed: make(chan error, 3), client: &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: loadAtOnce}}}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	dir := o.data
	if dir == "" {
		if dir, err = os.MkdirTemp("", "fingerprint-prefetch-"); err != nil {
			return nil, fmt.Errorf("make a directory for the streams: %w", err)
		}
		s.undo = append(s.undo, func() error { return os.RemoveAll(dir) })
	} else if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("--data: %w", err)
	}
	external := func(name string) bool { return o.real && (getenv(name) != "" || getenv(name+"_FILE") != "") }

	env := map[string]string{
		"INGEST_ADDR": "127.0.0.1:8080", "OPS_ADDR": "127.0.0.1:9101",
		"LOG_LEVEL": "warn", "LOG_FORMAT": "text", "SHUTDOWN_GRACE": "0s",
	}
	if s.natsURL = getenv("NATS_URL"); !external("NATS_URL") {
		if s.natsURL, err = s.startNATS(filepath.Join(dir, "nats")); err != nil {
			return nil, err
		}
		env["NATS_URL"] = s.natsURL
	}
	if s.redisURL = getenv("REDIS_URL"); !external("REDIS_URL") {
		if s.redisURL, err = s.startRedis(); err != nil {
			return nil, err
		}
		env["REDIS_URL"] = s.redisURL
	}
	if !external("FINGERPRINT_API_KEY") {
		if s.simURL, err = s.startSim(); err != nil {
			return nil, err
		}
		env["FINGERPRINT_BASE_URL"], env["FINGERPRINT_API_KEY"] = s.simURL, "sim"
		env["FINGERPRINT_RATE_LIMIT"], env["FINGERPRINT_RETENTION"] = "0", "0s" // the simulator knows every id
	}
	if env["INGEST_API_KEYS_FILE"], err = s.makeKey(dir); err != nil {
		return nil, err
	}
	lookup := layered(env, getenv, o.real)
	if err := s.prepareStreams(ctx, lookup, external("NATS_URL"), o.data != ""); err != nil {
		return nil, err
	}
	return s, s.startServices(ctx, lookup, logs)
}

// layered answers for a setting with what the user set, where that may count,
// or else with the stack's own value.
func layered(own map[string]string, getenv func(string) string, real bool) func(string) string {
	return func(name string) string {
		prefix, _, _ := strings.Cut(name, "_")
		switch prefix {
		case "NATS", "REDIS", "FINGERPRINT":
			if !real || own[strings.TrimSuffix(name, "_FILE")] != "" {
				return own[name]
			}
		default:
			// The stack's clients need the stack's key.
			if strings.HasPrefix(name, "INGEST_API_KEYS") {
				return own[name]
			}
		}
		if v := getenv(name); v != "" {
			return v
		}
		return own[name]
	}
}

// makeKey makes an API key for this run, good for every subscriber, and
// returns the keys file.
func (s *stack) makeKey(dir string) (path string, err error) {
	key, entry, err := ingest.NewKey("local", ingest.AllSubscribers(), rand.Reader)
	if err != nil {
		return "", fmt.Errorf("make an API key: %w", err)
	}
	s.apiKey = key
	b, err := json.Marshal([]ingest.KeyEntry{entry})
	if err != nil {
		return "", fmt.Errorf("make an API key: %w", err)
	}
	path = filepath.Join(dir, "keys.json")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		return "", fmt.Errorf("make an API key: %w", err)
	}
	return path, nil
}

// prepareStreams does what streamctl apply does elsewhere. On a server that is
// not ours it creates what is missing and changes nothing. With kept streams
// it lets the persister read them from the start: Redis is empty, and the
// guard makes repeating harmless.
func (s *stack) prepareStreams(ctx context.Context, getenv func(string) string, external, kept bool) error {
	log := slog.New(slog.DiscardHandler)
	settings := ops.NewSettings(getenv)
	cfg := streams.ReadConnectConfig(settings, "local")
	if err := settings.Err(); err != nil {
		return fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	conn, err := streams.Connect(cfg, log, prometheus.NewRegistry())
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := poll(ctx, func() error {
		if !conn.NC.IsConnected() {
			return errors.New("not connected")
		}
		return nil
	}); err != nil {
		return fmt.Errorf("NATS_URL: %w", err)
	}
	limits := streams.Limits{Keep: external} // others decide there
	changes, err := streams.Diff(ctx, conn.JS, limits)
	if err != nil {
		return fmt.Errorf("look at the streams: %w", err)
	}
	if external && len(changes) > 0 && len(changes) != missing(changes) {
		return fmt.Errorf("the streams of NATS_URL differ from the definition (%s, …); see streamctl diff", changes[0])
	}
	fresh := len(changes) > 0
	if _, err := streams.Ensure(ctx, conn.JS, limits, false); err != nil {
		return err
	}
	if !kept || fresh || external {
		return nil
	}
	for _, ref := range [][2]string{{streams.StreamEnriched, streams.DurablePersister}, {streams.StreamIngest, streams.DurablePending}} {
		if err := rewind(ctx, conn.JS, ref[0], ref[1]); err != nil {
			return err
		}
	}
	return nil
}

// missing counts the objects that are not there at all.
func missing(changes []streams.Change) (n int) {
	for _, c := range changes {
		if c.Field == "" {
			n++
		}
	}
	return n
}

func rewind(ctx context.Context, js jetstream.JetStream, stream, durable string) error {
	st, err := js.Stream(ctx, stream)
	if err != nil {
		return fmt.Errorf("rewind %s: %w", durable, err)
	}
	state := st.CachedInfo().State
	if state.Msgs == 0 {
		return nil
	}
	if _, err := js.ResetConsumerToSequence(ctx, stream, durable, state.FirstSeq); err != nil {
		return fmt.Errorf("rewind %s to the start of %s: %w", durable, stream, err)
	}
	return nil
}

// startServices runs the three services on the settings, each with an
// operators' port of its own.
func (s *stack) startServices(ctx context.Context, getenv func(string) string, logs io.Writer) error {
	host, port, err := net.SplitHostPort(getenv("OPS_ADDR"))
	base, convErr := strconv.Atoi(port)
	if err != nil || convErr != nil {
		return fmt.Errorf("%w: OPS_ADDR: %q is not host:port", ops.ErrSettings, getenv("OPS_ADDR"))
	}
	// Asked for before anything starts: somebody else's answer on a port must
	// not pass for a service's.
	wanted := [][2]string{{"INGEST_ADDR", getenv("INGEST_ADDR")}}
	for i := range 3 {
		wanted = append(wanted, [2]string{"OPS_ADDR", net.JoinHostPort(host, strconv.Itoa(base+i))})
	}
	for _, w := range wanted {
		ln, err := ops.Listen(w[0], w[1])
		if err != nil {
			return err // names the setting already
		}
		ln.Close()
	}
	s.ingestURL = "http://" + getenv("INGEST_ADDR")
	// A stop is asked for by stop, in the order of the data: what the edge
	// accepted last still has stages to go through.
	run := func(i int, serve func(context.Context, func(string) string, io.Writer) error) {
		addr := net.JoinHostPort(host, strconv.Itoa(base+i))
		s.opsAddrs = append(s.opsAddrs, addr)
		ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		done := make(chan struct{})
		var result error
		go func() {
			defer close(done)
			result = serve(ctx, func(name string) string {
				if name == "OPS_ADDR" {
					return addr
				}
				return getenv(name)
			}, logs)
			if result != nil {
				s.failed <- result
			}
		}()
		s.undo = append(s.undo, func() error { cancel(); <-done; return nil })
	}
	run(2, persister.Program().Serve)
	run(1, prefetcher.Program().Serve)
	run(0, ingest.Program().Serve)
	s.opsAddrs = []string{s.opsAddrs[2], s.opsAddrs[1], s.opsAddrs[0]}
	return nil
}

// ready waits until every service says that it could do its work.
func (s *stack) ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, addr := range s.opsAddrs {
		err := poll(ctx, func() error {
			select {
			case err := <-s.failed:
				return fatal{err}
			default:
			}
			return readyz(ctx, addr)
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func readyz(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s is not ready: %s", addr, strings.TrimSpace(string(body)))
	}
	return nil
}

// fatal ends a poll.
type fatal struct{ error }

// poll calls f until it returns nil or a fatal error, or ctx is done; its
// error is f's last.
func poll(ctx context.Context, f func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		if f, ok := errors.AsType[fatal](err); ok {
			return f.error
		}
		select {
		case <-ctx.Done():
			if errors.Is(context.Cause(ctx), context.Canceled) {
				return fmt.Errorf("interrupted: %w", err)
			}
			return err
		case <-tick.C:
		}
	}
}

// stop stops the services first to last and then the servers.
func (s *stack) stop() error {
	var errs []error
	for i := len(s.undo) - 1; i >= 0; i-- {
		errs = append(errs, s.undo[i]())
	}
	s.undo = nil
	return errors.Join(errs...)
}
