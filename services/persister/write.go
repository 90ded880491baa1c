package persister

import (
	"context"
	"crypto/sha1"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
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
	foreign    outcome = "foreign"    // another subscriber's record stands there, or its marker of an earlier event
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
	err     error
}

// store writes records to Redis, guarded. It is safe for concurrent use.
type store struct {
	rdb redis.UniversalClient
	ttl time.Duration
	sha string
}

func newStore(rdb redis.UniversalClient, ttl time.Duration) *store {
	sum := sha1.Sum([]byte(guard)) // the name Redis knows a script by
	return &store{rdb: rdb, ttl: ttl, sha: hex.EncodeToString(sum[:])}
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
	if len(due) == 0 {
		return
	}
	s.run(ctx, due, s.sha, redis.Pipeliner.EvalSha)
	// A server that has just started, or was failed over to, does not know
	// the script: send it along once.
	var unknown []*write
	for _, w := range due {
		if redis.HasErrorPrefix(w.err, "NOSCRIPT") {
			unknown = append(unknown, w)
		}
	}
	if len(unknown) > 0 {
		s.run(ctx, unknown, guard, redis.Pipeliner.Eval)
	}
}

func (s *store) expiry(r record.Record) time.Time { return r.AcceptedAt.Add(s.ttl) }

type evalFunc func(p redis.Pipeliner, ctx context.Context, script string, keys []string, args ...any) *redis.Cmd

func (s *store) run(ctx context.Context, batch []*write, script string, eval evalFunc) {
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
