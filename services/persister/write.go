package persister

import (
	"context"
	"crypto/sha1"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
	"go.opentelemetry.io/otel/trace"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

//go:embed guard.lua
var guard string

// outcome is what became of one record.
type outcome string

const (
	written    outcome = "written"
	superseded outcome = "superseded" // something larger stands there
	foreign    outcome = "foreign"    // another subscriber's record stands there
	unreadable outcome = "unreadable" // something that is no record stands there
	expired    outcome = "expired"    // its time was over; nothing was written
)

// write is one record to be written.
type write struct {
	rec  record.Record
	body []byte
	ctx  context.Context // of its trace
	span trace.Span
	// Set by store.
	outcome outcome
	created bool // nothing stood there
	err     error
}

// store writes records to Redis, guarded. It is safe for concurrent use.
type store struct {
	rdb redis.UniversalClient
	ttl time.Duration
	sha string
	// absent is whether most of the last batch stood nowhere yet; then a batch
	// of many or more is tried without the script.
	absent atomic.Bool
	many   int
}

func newStore(rdb redis.UniversalClient, ttl time.Duration) *store {
	sum := sha1.Sum([]byte(guard)) // the name Redis knows a script by
	return &store{rdb: rdb, ttl: ttl, sha: hex.EncodeToString(sum[:]), many: 32}
}

// put writes a batch in one pipeline and sets each write's outcome or error.
// An error means that nothing is known about that record but that repeating
// the write is safe.
func (s *store) put(ctx context.Context, now time.Time, batch []*write) {
	due := make([]*write, 0, len(batch))
	for _, w := range batch {
		if !s.expiry(w.rec).After(now) {
			w.outcome = expired
			continue
		}
		due = append(due, w)
	}
	// Where nothing stands there is nothing to guard, and the script costs
	// Redis three copies of a record instead of one: a backlog after Redis
	// lost its data goes without.
	guarded := due
	if len(due) >= s.many && s.absent.Load() {
		guarded = s.create(ctx, due)
	}
	s.run(ctx, guarded, s.sha, redis.Pipeliner.EvalSha)
	// A server that has just started, or was failed over to, does not know
	// the script: send it along once.
	var unknown []*write
	for _, w := range guarded {
		if redis.HasErrorPrefix(w.err, "NOSCRIPT") {
			unknown = append(unknown, w)
		}
	}
	s.run(ctx, unknown, guard, redis.Pipeliner.Eval)

	created := 0
	for _, w := range due {
		if w.created {
			created++
		}
	}
	s.absent.Store(2*created > len(due))
}

// create writes each record where nothing stands, and returns those where
// something does.
func (s *store) create(ctx context.Context, batch []*write) (exist []*write) {
	pipe := s.rdb.Pipeline()
	cmds := make([]*redis.Cmd, len(batch))
	for i, w := range batch {
		cmds[i] = pipe.Do(ctx, "set", record.Key(w.rec.RequestID), w.body, "pxat", s.expiry(w.rec).UnixMilli(), "nx")
	}
	_, _ = pipe.Exec(ctx) // each command carries its own error
	for i, w := range batch {
		switch err := cmds[i].Err(); {
		case errors.Is(err, redis.Nil):
			exist = append(exist, w)
		case err != nil:
			w.err = fmt.Errorf("write record: %w", err)
		default:
			w.outcome, w.created = written, true
		}
	}
	return exist
}

func (s *store) expiry(r record.Record) time.Time { return r.AcceptedAt.Add(s.ttl) }

type evalFunc func(p redis.Pipeliner, ctx context.Context, script string, keys []string, args ...any) *redis.Cmd

func (s *store) run(ctx context.Context, batch []*write, script string, eval evalFunc) {
	if len(batch) == 0 {
		return
	}
	pipe := s.rdb.Pipeline()
	cmds := make([]*redis.Cmd, len(batch))
	for i, w := range batch {
		cmds[i] = eval(pipe, ctx, script, []string{record.Key(w.rec.RequestID)},
			w.body, string(w.rec.Status), w.rec.AcceptedAt.String(), w.rec.SubscriberID, s.expiry(w.rec).UnixMilli())
	}
	_, _ = pipe.Exec(ctx) // each command carries its own error
	for i, w := range batch {
		reply, err := cmds[i].Text()
		w.outcome, w.err = outcome(reply), err
		if w.created = reply == "created"; w.created {
			w.outcome = written
		}
		switch {
		case wrongType(err):
			w.outcome, w.err = unreadable, nil
		case err != nil:
			w.err = fmt.Errorf("write record: %w", err)
		case w.outcome != written && w.outcome != superseded && w.outcome != foreign && w.outcome != unreadable:
			w.err = errors.New("write record: reply is none of the script's")
		}
	}
}

// wrongType reports whether a key holds a list, a hash or the like. Redis puts
// the name of the script before an error raised inside it.
func wrongType(err error) bool { return err != nil && strings.Contains(err.Error(), "WRONGTYPE") }
