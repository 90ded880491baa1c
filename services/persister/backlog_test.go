package persister

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// The backlog of BenchmarkBacklog.
const (
	backlog     = 100_000
	recordBytes = 4400
)

// BenchmarkBacklog drains a backlog of 100,000 records of 4.4 KB, consuming
// and acking included, into an empty Redis, with the guard and with bare SETs
// in its place, and with the guard over a marker of each, and compares them
// with redis-benchmark in the same run:
//
//	go test -run='^$' -bench=Backlog -benchtime=1x ./services/persister
//
// One run of each counts; servers, persister and load share the machine.
func BenchmarkBacklog(b *testing.B) {
	ops.CollectSeldom() // as the program does
	rds := streamstest.NewRedis(b)
	rdb := client(b, rds.URL())
	n := streamstest.NewNATS(b)
	c := n.Connect("bench")
	publishBacklog(b, c)

	drain := func(store recordStore, marked bool) float64 {
		if err := rdb.FlushAll(b.Context()).Err(); err != nil {
			b.Fatal(err)
		}
		if marked {
			markBacklog(b, rdb)
		}
		if _, err := c.JS.ResetConsumerToSequence(b.Context(), streams.StreamEnriched, streams.DurablePersister, 1); err != nil {
			b.Fatal(err)
		}
		cfg := ReadConfig(ops.NewSettings(func(name string) string {
			return map[string]string{"NATS_URL": n.URL, "REDIS_URL": rds.URL()}[name]
		}))
		ctx, cancel := context.WithCancel(b.Context())
		done := make(chan error, 1)
		durable, err := c.JS.Consumer(b.Context(), streams.StreamEnriched, streams.DurablePersister)
		if err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		go func() {
			done <- runWith(ctx, cfg, ops.NewProcessLogger("persister", slog.New(slog.DiscardHandler)), rdb, func() recordStore { return store })
		}()
		for {
			i, err := durable.Info(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			if i.NumPending == 0 && i.NumAckPending == 0 {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		took := time.Since(start)
		cancel()
		if err := <-done; err != nil {
			b.Fatal(err)
		}
		if got := rdb.DBSize(b.Context()).Val(); got != backlog {
			b.Fatalf("%d records in Redis", got)
		}
		return backlog / took.Seconds()
	}
	for b.Loop() {
		before := redisBenchmark(b, rds)
		guarded := drain(newStore(rdb, 24*time.Hour), false)
		between := redisBenchmark(b, rds)
		bare := drain(bareStore{rdb, 24 * time.Hour}, false)
		marked := drain(newStore(rdb, 24*time.Hour), true)
		after := redisBenchmark(b, rds)
		yardstick := (before + between + after) / 3
		b.ReportMetric(guarded, "records/s")
		b.ReportMetric(yardstick, "redis-benchmark/s")
		b.ReportMetric(guarded/yardstick, "of-redis-benchmark")
		b.ReportMetric(guarded/bare, "of-unguarded")
		b.ReportMetric(marked/yardstick, "over-markers-of-redis-benchmark")
		b.ReportMetric(marked/bare, "over-markers-of-unguarded")
	}
}

func publishBacklog(b *testing.B, c *streams.Conn) {
	b.Helper()
	js, err := jetstream.New(c.NC, jetstream.WithPublishAsyncMaxPending(1024))
	if err != nil {
		b.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range backlog {
		r := ofBacklog(i, record.Ready)
		small, err := r.Encode()
		if err != nil {
			b.Fatal(err)
		}
		r.Event = fmt.Appendf(nil, `{"event_id":"%s","pad":"%s"}`, r.RequestID, pad(rng, recordBytes-len(small)-10))
		body, err := r.Encode()
		if err != nil {
			b.Fatal(err)
		}
		if _, err := js.PublishMsgAsync(&nats.Msg{Subject: streams.EnrichedSubject(r.SubscriberID), Data: body}); err != nil {
			b.Fatal(err)
		}
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(2 * time.Minute):
		b.Fatal("the backlog is not stored")
	}
}

// markBacklog writes the markers of the backlog.
func markBacklog(b *testing.B, rdb redis.UniversalClient) {
	b.Helper()
	const batch = 1000
	s := newStore(rdb, 24*time.Hour)
	for i := 0; i < backlog; i += batch {
		marks := make([]*write, batch)
		for k := range marks {
			r := ofBacklog(i+k, record.Pending)
			body, err := r.Encode()
			if err != nil {
				b.Fatal(err)
			}
			marks[k] = &write{rec: r, body: body}
		}
		s.put(b.Context(), time.Now(), marks)
		for _, w := range marks {
			if w.err != nil || w.outcome != written {
				b.Fatalf("a marker is %s: %v", w.outcome, w.err)
			}
		}
	}
}

// ofBacklog is record i of the backlog, without its event.
func ofBacklog(i int, status record.Status) record.Record {
	return rec(fmt.Sprint("bench-", i), 1+int64(i%100), status, time.Duration(i))
}

func pad(rng *rand.Rand, n int) string {
	var s strings.Builder
	for s.Len() < n {
		s.WriteString(strconv.FormatUint(rng.Uint64(), 36))
		s.WriteString(" some-text ")
	}
	return s.String()[:n]
}

// redisBenchmark returns the SETs per second of redis-benchmark, 4.4 KB each
// from 50 connections.
func redisBenchmark(b *testing.B, rds *streamstest.Redis) float64 {
	b.Helper()
	_, port, _ := net.SplitHostPort(rds.Addr)
	out, err := exec.CommandContext(b.Context(), "redis-benchmark", "-p", port, "-t", "set", "-n", strconv.Itoa(backlog), "-d", strconv.Itoa(recordBytes), "-c", "50", "--csv").Output()
	if err != nil {
		b.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	fields := strings.Split(lines[len(lines)-1], ",")
	rate, err := strconv.ParseFloat(strings.Trim(fields[1], `"`), 64)
	if err != nil {
		b.Fatalf("%s: %v", out, err)
	}
	return rate
}

// bareStore is what the guard costs nothing in: one pipeline of SETs.
type bareStore struct {
	rdb redis.UniversalClient
	ttl time.Duration
}

func (s bareStore) put(ctx context.Context, _ time.Time, batch []*write) {
	pipe := s.rdb.Pipeline()
	for _, w := range batch {
		pipe.SetArgs(ctx, record.Key(w.rec.RequestID), w.body, redis.SetArgs{ExpireAt: w.rec.AcceptedAt.Add(s.ttl)})
	}
	cmds, _ := pipe.Exec(ctx)
	for i, w := range batch {
		w.outcome, w.err = written, cmds[i].Err()
	}
}
