//go:build unix

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// flow is what must go on while a fault is kept up for ever.
type flow uint

const (
	accepts  flow = 1 << iota // posts are answered 202
	fetches                   // the vendor's events get into FP_ENRICHED
	persists                  // and from there into Redis
	refuses                   // where nothing can be stored: a prompt 503

	everything = accepts | fetches | persists
)

// fault is one thing that can be broken.
type fault struct {
	name, doc string
	// part is what it breaks. Two faults of one part never overlap.
	part     string
	min, max time.Duration
	// before keeps it to the first part of a mix; 0 is any time.
	before float64
	// gap is how long there may be no 202 because of it, and back how long
	// after it was mended where nothing can be accepted before.
	gap, back time.Duration
	// steady is what must go on while it is kept up; 0 means that it is
	// nothing that can be kept up.
	steady flow
	// begin breaks it and says what it hit. mend may be called later with any
	// context and brings it back; it returns once it has been done, not once
	// the pipeline has caught up.
	begin func(ctx context.Context, s *system, pick uint64) (target string, mend func(context.Context) error, err error)
	// needs says why it cannot be done here.
	needs func(*system) error
}

func catalog() []fault {
	all := processFaults()
	all = append(all, pointFaults()...)
	all = append(all, natsFaults()...)
	all = append(all, redisFaults()...)
	all = append(all, vendorFaults()...)
	all = append(all, linkFaults()...)
	all = append(all, otherFaults()...)
	for i, f := range all {
		if f.gap == 0 && f.back == 0 {
			all[i].gap = gapLimit
		}
	}
	return all
}

// How long clients may be without a 202. One part of two or an outage behind
// the stream must not be felt at the edge; NATS needs time to elect a leader.
const (
	gapLimit    = 500 * time.Millisecond
	leaderLimit = 10 * time.Second
	backLimit   = 15 * time.Second // after all of NATS is back
)

// sec is short for lengths of faults.
func sec(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func one(stage string, pick uint64) string { return fmt.Sprintf("%s-%d", stage, 1+pick%replicas) }

// restart is how most process faults end.
func (s *system) restart(name string) func(context.Context) error {
	return func(context.Context) error { return s.procs[name].start() }
}

func processFaults() (all []fault) {
	steady := map[string]flow{edge: everything, prefetcher: everything, persister: everything}
	for _, stage := range []string{edge, prefetcher, persister} {
		all = append(all, fault{
			name: "kill-" + stage, doc: "kill -9 of one " + stage, part: stage, min: sec(0.5), max: sec(5), steady: steady[stage],
			begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
				name := one(stage, pick)
				s.procs[name].kill()
				return name, s.restart(name), nil
			},
		}, fault{
			name: "freeze-" + stage, doc: "SIGSTOP and SIGCONT of one " + stage, part: stage, min: sec(1), max: sec(8),
			begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
				name := one(stage, pick)
				s.procs[name].signal(syscall.SIGSTOP)
				return name, func(context.Context) error { s.procs[name].signal(syscall.SIGCONT); return nil }, nil
			},
		}, fault{
			name: "roll-" + stage, doc: "rolling SIGTERM of both, as a new version is rolled out; with --old-bin new becomes old and old new", part: stage, min: sec(4), max: sec(6),
			begin: func(ctx context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
				for i := range replicas {
					name := fmt.Sprintf("%s-%d", stage, i+1)
					limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), 25*time.Second)
					s.answers(limit, name)
					err := s.procs[name].terminate(limit)
					s.procs[name].swap()
					if err == nil {
						err = s.procs[name].start()
					}
					if err == nil {
						err = poll(limit, func() error { return s.healthy(limit, name) })
					}
					cancel()
					if err != nil {
						return stage, s.restart(name), err
					}
				}
				return stage, func(context.Context) error { return nil }, nil
			},
		})
	}
	all = append(all, fault{
		name: "freeze-prefetcher-long", doc: "SIGSTOP of one prefetcher past AckWait: what it holds is given to the other, and what it does late must harm nothing",
		part: prefetcher, min: streams.AckWait + sec(5), max: streams.AckWait + sec(8),
		begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
			name := one(prefetcher, pick)
			s.procs[name].signal(syscall.SIGSTOP)
			return name, func(context.Context) error { s.procs[name].signal(syscall.SIGCONT); return nil }, nil
		},
	})
	return all
}

// pointFaults kill a process between two named steps of its work, by what
// passes on the wire.
func pointFaults() (all []fault) {
	type point struct {
		stage, name, to, pattern string
		up, after                bool
	}
	for _, p := range []point{
		{edge, "before-publish", "nats", "HPUB fp.ingest.", true, false},
		{edge, "after-publish", "nats", "HPUB fp.ingest.", true, true},
		{edge, "before-puback", "nats", `{"stream":"FP_INGEST"`, false, false},
		{prefetcher, "before-call", "vendor", "GET /v4/events/", true, false},
		{prefetcher, "before-answer", "vendor", "HTTP/1.1 200", false, false},
		{prefetcher, "before-publish", "nats", "HPUB fp.enriched.", true, false},
		{prefetcher, "before-puback", "nats", `{"stream":"FP_ENRICHED"`, false, false},
		{prefetcher, "before-ack", "nats", "PUB $JS.ACK.", true, false},
		{persister, "before-write", "redis", "fp:prefetch:", true, false},
		{persister, "before-written", "redis", "written", false, false},
		{persister, "before-ack", "nats", "PUB $JS.ACK.", true, false},
	} {
		all = append(all, fault{
			name: "kill-" + p.stage + "-" + p.name, part: p.stage, min: sec(1), max: sec(3),
			doc: "kill -9 of one " + p.stage + " at that very point of its work with the " + p.to,
			begin: func(ctx context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
				name := one(p.stage, pick)
				links := s.linksOf(name, p.to)
				fired := make(chan struct{}, len(links))
				for _, l := range links {
					l.arm(&trip{pattern: p.pattern, up: p.up, after: p.after, do: func() {
						s.procs[name].kill()
						fired <- struct{}{}
					}})
				}
				disarm := func() {
					for _, l := range links {
						l.arm(nil)
					}
				}
				defer disarm()
				select {
				case <-fired:
					return name, s.restart(name), nil
				case <-time.After(10 * time.Second):
					return name, s.restart(name), errPoint
				case <-ctx.Done():
					return name, s.restart(name), nil
				}
			},
		})
	}
	return all
}

// errPoint is no fault of the pipeline's: at that time it did not do that.
var errPoint = errors.New("the point was not reached in 10 s")

func natsFaults() []fault {
	kill := func(s *system, i int) (string, func(context.Context) error, error) {
		s.procs[natsNode(i)].kill()
		return natsNode(i), s.restart(natsNode(i)), nil
	}
	freeze := func(s *system, i int) (string, func(context.Context) error, error) {
		p := s.procs[natsNode(i)]
		p.signal(syscall.SIGSTOP)
		return p.name, func(context.Context) error { p.signal(syscall.SIGCONT); return nil }, nil
	}
	streamNames := []string{streams.StreamIngest, streams.StreamEnriched}
	leader := func(ctx context.Context, s *system, pick uint64) (i int, err error) {
		limit, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		err = poll(limit, func() error {
			i, err = s.leader(limit, streamNames[pick%2])
			return err
		})
		return i, err
	}
	return []fault{{
		name: "kill-nats-leader", doc: "kill -9 of the node that leads FP_INGEST or FP_ENRICHED", part: "nats", min: sec(2), max: sec(8), gap: leaderLimit, steady: everything,
		begin: func(ctx context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
			i, err := leader(ctx, s, pick)
			if err != nil {
				return "", nil, err
			}
			return kill(s, i)
		},
	}, {
		name: "freeze-nats-leader", doc: "SIGSTOP of that node", part: "nats", min: sec(3), max: sec(10), gap: leaderLimit, steady: everything,
		begin: func(ctx context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
			i, err := leader(ctx, s, pick)
			if err != nil {
				return "", nil, err
			}
			return freeze(s, i)
		},
	}, {
		name: "kill-nats-any", doc: "kill -9 of any node", part: "nats", min: sec(1), max: sec(6), gap: leaderLimit,
		begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
			return kill(s, int(pick%nodes))
		},
	}, {
		name: "kill-nats-all", doc: "kill -9 of all three nodes at once", part: "nats", min: sec(0.5), max: sec(5), back: backLimit, steady: refuses,
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			for i := range nodes {
				s.procs[natsNode(i)].signal(syscall.SIGKILL)
			}
			for i := range nodes {
				s.procs[natsNode(i)].wait(context.Background())
			}
			return "all nodes", func(context.Context) error {
				var errs []error
				for i := range nodes {
					errs = append(errs, s.procs[natsNode(i)].start())
				}
				return errors.Join(errs...)
			}, nil
		},
	}, {
		name: "roll-nats", doc: "rolling SIGTERM of the nodes, each back and healthy before the next", part: "nats", min: sec(6), max: sec(8), gap: leaderLimit,
		begin: func(ctx context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			for i := range nodes {
				name := natsNode(i)
				limit, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
				err := s.procs[name].terminate(limit)
				if err == nil {
					err = s.procs[name].start()
				}
				if err == nil {
					err = poll(limit, func() error { return s.healthy(limit, name) })
				}
				cancel()
				if err != nil {
					return name, s.restart(name), err
				}
			}
			return "all nodes", func(context.Context) error { return nil }, nil
		},
	}, {
		name: "nats-disk-full", doc: "no room left for one node's streams; the node is restarted once there is", part: "nats", min: sec(4), max: sec(10), gap: leaderLimit, steady: everything,
		needs: func(s *system) error { return s.full.err },
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			name := natsNode(fullNode)
			if err := s.full.fill(); err != nil {
				return name, nil, err
			}
			return name, func(context.Context) error {
				if err := s.full.empty(); err != nil {
					return err
				}
				s.procs[name].kill()
				return s.procs[name].start()
			}, nil
		},
	}}
}

func redisFaults() []fault {
	config := func(s *system, maxmemory string) error {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		return poll(ctx, func() error { return s.rdb.ConfigSet(ctx, "maxmemory", maxmemory).Err() })
	}
	return []fault{{
		name: "kill-redis", doc: "kill -9 of Redis, which loses up to its last two seconds (AOF everysec); these are replayed", part: "redis", min: sec(0.5), max: sec(6), steady: accepts | fetches,
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			from := time.Now().Add(-15 * time.Second)
			s.loses(s.procs["redis"].kill)
			return "redis", func(ctx context.Context) error {
				if err := s.procs["redis"].start(); err != nil {
					return err
				}
				return s.replay(ctx, from, true)
			}, nil
		},
	}, {
		name: "freeze-redis", doc: "SIGSTOP of Redis", part: "redis", min: sec(1), max: sec(8), steady: accepts | fetches,
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			s.procs["redis"].signal(syscall.SIGSTOP)
			return "redis", func(context.Context) error { s.procs["redis"].signal(syscall.SIGCONT); return nil }, nil
		},
	}, {
		name: "redis-full", doc: "Redis at its maxmemory refuses every write", part: "redis", min: sec(2), max: sec(8), steady: accepts | fetches,
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			if err := config(s, "1mb"); err != nil {
				return "redis", nil, fmt.Errorf("set maxmemory: %w", err)
			}
			return "redis", func(context.Context) error { return config(s, "2gb") }, nil
		},
	}, {
		name: "redis-flush", doc: "FLUSHALL, and everything rebuilt by streamctl replay --stage persister", part: "redis", min: sec(1), max: sec(2), before: 0.3,
		begin: func(ctx context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			var err error
			s.loses(func() { err = s.rdb.FlushAll(context.WithoutCancel(ctx)).Err() })
			if err != nil {
				return "redis", nil, fmt.Errorf("flush redis: %w", err)
			}
			return "redis", func(ctx context.Context) error { return s.replay(ctx, time.Unix(0, 0), false) }, nil
		},
	}}
}

// loses runs f, in which Redis forgets, while nobody reads records.
func (s *system) loses(f func()) {
	s.loss.Lock()
	defer s.loss.Unlock()
	s.epoch++
	f()
	s.losses = append(s.losses, time.Now())
}

// replay has the persister see again what was stored since then, as an
// operator would: until the tool says that it is done.
func (s *system) replay(ctx context.Context, since time.Time, onlyMissing bool) error {
	first := []string{"replay", "--stage", streams.StagePersister, "--since", since.UTC().Format(time.RFC3339)}
	if onlyMissing {
		first = append(first, "--only-missing")
	}
	args := first
	for {
		begin := time.Now()
		out, err := s.streamctl(ctx, args...)
		s.logReplay(args, time.Since(begin), out)
		if err == nil || exitCode(err) == 3 { // nothing to replay
			return nil
		}
		if _, rest, ok := strings.Cut(out, "--resume "); ok {
			args = []string{"replay", "--resume", strings.Fields(rest)[0]}
		}
		if !sleep(ctx, time.Second) {
			return fmt.Errorf("streamctl %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// logReplay keeps what the tool said beside the logs of the services.
func (s *system) logReplay(args []string, took time.Duration, out string) {
	f, err := os.OpenFile(filepath.Join(s.dir, "logs", "streamctl.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return
	}
	defer f.Close()
	fmt.Fprintf(f, "%s streamctl %s, after %v:\n%s", time.Now().Format(time.RFC3339), strings.Join(args, " "), took, out)
}

func exitCode(err error) int {
	var e interface{ ExitCode() int }
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

func vendorFaults() (all []fault) {
	type answer struct {
		name, json string
		max        float64
		steady     flow
	}
	for _, a := range []answer{
		{"429", `{"status":429}`, 6, accepts},
		{"429-retry-after", `{"status":429,"retry_after":"2"}`, 6, 0},
		{"500", `{"status":500}`, 6, 0},
		{"502", `{"status":502}`, 6, 0},
		{"503", `{"status":503}`, 8, accepts},
		{"504", `{"status":504}`, 6, 0},
		{"403", `{"status":403}`, 6, accepts},
		{"403-page", `{"status":403,"garbage":"html"}`, 6, 0},
		{"401", `{"status":401,"code":"secret_api_key_not_found"}`, 6, 0},
		{"wrong-region", `{"status":403,"code":"wrong_region"}`, 6, 0},
		// Well below the time after which 404 means never.
		{"404", `{"status":404}`, 6, 0},
		{"hang", `{"hang":true}`, 8, accepts},
		{"reset", `{"reset":true}`, 6, 0},
		{"slow", `{"delay":"1.5s"}`, 8, 0},
		{"truncated", `{"garbage":"truncated"}`, 6, 0},
		{"page", `{"garbage":"html"}`, 6, 0},
		{"empty", `{"garbage":"empty"}`, 6, 0},
		{"other-id", `{"garbage":"other_id"}`, 6, 0},
		{"oversize", `{"garbage":"oversize"}`, 4, 0},
		{"drip", `{"garbage":"drip"}`, 6, 0},
		{"cut", `{"garbage":"cut"}`, 6, 0},
	} {
		all = append(all, fault{
			name: "vendor-" + a.name, doc: "the vendor answers every call with " + a.json, part: "vendor", min: sec(1), max: sec(a.max), steady: a.steady,
			begin: func(ctx context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
				err := s.sim(ctx, "fault", a.json)
				return "vendor", func(ctx context.Context) error { return s.sim(ctx, "fault", "null") }, err
			},
		})
	}
	return append(all, fault{
		name: "vendor-quota", doc: "the vendor allows a quarter of the calls it should", part: "vendor", min: sec(3), max: sec(8),
		begin: func(ctx context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			err := s.sim(ctx, "rate", fmt.Sprintf(`{"rate":%d,"burst":10}`, max(s.rate/4, 1)))
			return "vendor", func(ctx context.Context) error { return s.sim(ctx, "rate", `{"rate":0}`) }, err
		},
	}, fault{
		name: "vendor-away", doc: "connections to the vendor are refused", part: "vendor", min: sec(1), max: sec(8), steady: accepts,
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			return "vendor", s.spoil(s.linksOf(prefetcher, "vendor"), trouble{Refuse: true}), nil
		},
	}, fault{
		name: "vendor-key", doc: "the vendor's key is rotated: refused until the file of the prefetchers has the new one", part: "vendor", min: sec(1), max: sec(6),
		begin: func(ctx context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
			key := fmt.Sprintf("vendor-key-%d", pick)
			err := s.sim(ctx, "key", `"`+key+`"`)
			return "vendor", func(context.Context) error {
				s.vendor = key
				return s.writeVendorKey()
			}, err
		},
	})
}

// spoil puts links into trouble and returns what ends it.
func (s *system) spoil(links []*link, t trouble) func(context.Context) error {
	for _, l := range links {
		l.set(t)
	}
	return func(context.Context) error {
		for _, l := range links {
			l.set(trouble{})
		}
		return nil
	}
}

func linkFaults() (all []fault) {
	type path struct{ stage, to string }
	for _, p := range []path{{edge, "nats"}, {prefetcher, "nats"}, {persister, "nats"}, {prefetcher, "redis"}, {persister, "redis"}, {prefetcher, "vendor"}} {
		between := fmt.Sprintf("between one %s and %s", p.stage, p.to)
		add := func(name, doc string, t trouble) {
			all = append(all, fault{
				name: name + "-" + p.stage + "-" + p.to, doc: doc + " " + between, part: p.stage, min: sec(1), max: sec(7),
				begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
					name := one(p.stage, pick)
					return name + " to " + p.to, s.spoil(s.linksOf(name, p.to), t), nil
				},
			})
		}
		add("slow", "200 ms more each way", trouble{Delay: 200 * time.Millisecond})
		add("narrow", "100 KB/s each way", trouble{Rate: 100_000})
		add("stall", "nothing passes and nothing is closed", trouble{Stall: true})
		all = append(all, fault{
			name: "cut-" + p.stage + "-" + p.to, doc: "connections are reset again and again " + between, part: p.stage, min: sec(1), max: sec(5),
			begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
				name := one(p.stage, pick)
				ctx, cancel := context.WithCancel(context.Background())
				done := make(chan struct{})
				go func() {
					defer close(done)
					for {
						for _, l := range s.linksOf(name, p.to) {
							l.cut()
						}
						if !sleep(ctx, 300*time.Millisecond) {
							return
						}
					}
				}()
				return name + " to " + p.to, func(context.Context) error { cancel(); <-done; return nil }, nil
			},
		})
	}
	return append(all, fault{
		name: "stall-nats", doc: "nothing passes and nothing is closed between any service and NATS", part: "nats", min: sec(2), max: sec(7), back: backLimit, steady: refuses,
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			return "all services to NATS", s.spoil(s.linksOf("", "nats"), trouble{Stall: true}), nil
		},
	})
}

func otherFaults() []fault {
	return []fault{{
		name: "client-keys", doc: "the clients' key is rotated: the new one is added, used, and the old one revoked", part: "keys", min: sec(6), max: sec(8),
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			key, err := s.addKey()
			return "keys file", func(ctx context.Context) error {
				s.useKey(key)
				sleep(ctx, patience+time.Second) // what is under way has the old one
				return s.dropOldKeys()
			}, err
		},
	}, {
		name: "keys-broken", doc: "a broken edit of the keys file: the old keys stay in force", part: "keys", min: sec(3), max: sec(8),
		begin: func(_ context.Context, s *system, _ uint64) (string, func(context.Context) error, error) {
			err := replace(s.keysFile(), []byte(`[{"id":"half-writ`))
			return "keys file", func(context.Context) error { return s.writeKeys() }, err
		},
	}, {
		name: "poison", doc: "messages that are no events, straight into the streams", part: "messages", min: sec(1), max: sec(5), steady: everything,
		begin: func(_ context.Context, s *system, pick uint64) (string, func(context.Context) error, error) {
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan struct{})
			go func() {
				defer close(done)
				for n := pick; sleep(ctx, 100*time.Millisecond); n++ {
					s.poison(ctx, n)
				}
			}()
			return "FP_INGEST and FP_ENRICHED", func(context.Context) error { cancel(); <-done; return nil }, nil
		},
	}}
}
