package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// person is whose events are erased. The user id is never printed, logged or
// kept.
type person struct {
	userID     string
	subscriber int64
}

// owns reports whether a body, stored under a subject of this subscriber (0 is
// none), belongs to the person. What cannot be read belongs to whoever it
// names anywhere.
func (p person) owns(subscriber int64, body []byte) bool {
	var b struct {
		UserID       *string `json:"user_id"`
		SubscriberID int64   `json:"subscriber_id"`
	}
	readable := json.Unmarshal(body, &b) == nil && b.UserID != nil
	if p.subscriber != 0 && p.subscriber != subscriber && (subscriber != 0 || p.subscriber != b.SubscriberID) {
		return false
	}
	switch {
	case p.userID == "":
		return true
	case readable && *b.UserID == p.userID:
		return true
	}
	return !readable && bytes.Contains(body, []byte(p.userID))
}

// erasure is the receipt.
type erasure struct {
	DryRun bool      `json:"dry_run,omitempty"`
	At     time.Time `json:"at"`
	// Streams is how many messages went from each, Records how many records.
	Streams map[string]int `json:"streams"`
	Records int            `json:"records"`
	// Events is how many different request ids these had.
	Events int `json:"events"`
	// Passes were made until one found nothing more on the streams.
	Passes int `json:"passes"`
	// Left says why the person may not be gone yet; empty when it is.
	Left string `json:"left,omitempty"`
	// OutOfReach is what the tool cannot erase.
	OutOfReach []string `json:"out_of_reach"`
}

func outOfReach() []string {
	return []string{
		"backups and snapshots of the NATS and Redis volumes",
		"Redis append-only files until they are rewritten (BGREWRITEAOF), RDB files until the next save",
		"mirrors of the streams and other copies that consumers or scorers made",
		"the vendor's own copy: ask Fingerprint to delete the visitor",
	}
}

// eraser erases one person.
type eraser struct {
	person
	erasure
	conn *streams.Conn
	rdb  redis.UniversalClient
	next map[string]uint64 // first sequence of each stream not looked at yet
	ids  map[string]bool   // request ids found
	keys map[string]bool   // records found
	// floors are the ack floors of the durables, as far as they are known.
	floors map[string]uint64
	// held messages are in a stage's hands and wait for the next pass.
	held int
	// force erases them all the same.
	force bool
}

func erase(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	var p person
	fs.StringVar(&p.userID, "user-id", "", "events of this `user`; - reads it from standard input, where no process list shows it")
	fs.Int64Var(&p.subscriber, "subscriber", 0, "events of subscriber `N`; with --user-id, of that user there")
	dryRun := fs.Bool("dry-run", false, "count, and erase nothing")
	yes := fs.Bool("yes", false, "do not ask on a terminal")
	patience := fs.Duration("wait", 2*time.Minute, "how `long` to wait until what is in the stages' hands has settled")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	if p.userID == "-" {
		b, err := io.ReadAll(io.LimitReader(e.stdin, 4096))
		if err != nil {
			return 0, fmt.Errorf("read the user id: %w", err)
		}
		if p.userID = strings.TrimRight(string(b), "\r\n"); p.userID == "" {
			return 0, usageError{errors.New("no user id on standard input")}
		}
	}
	if p.userID == "" && p.subscriber == 0 || p.subscriber < 0 {
		return 0, usageError{errors.New("say whose events: --user-id or --subscriber")}
	}
	rdb, err := e.redis()
	if err != nil {
		return 0, err
	}
	if rdb == nil {
		return 0, usageError{errors.New("REDIS_URL must say where the records are")}
	}
	defer rdb.Close()
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	r := &eraser{person: p, conn: conn, rdb: rdb, next: map[string]uint64{}, ids: map[string]bool{}, keys: map[string]bool{}, floors: map[string]uint64{}, erasure: erasure{
		DryRun: *dryRun, At: time.Now().UTC(), Streams: map[string]int{}, OutOfReach: outOfReach(),
	}}
	var code int
	if *dryRun {
		_, err = r.pass(ctx)
		code = r.code()
	} else {
		if !*yes && isTerminal(e.stdin) && !e.confirm("Erase every event of this user or subscriber for good?") {
			return exitLeft, nil
		}
		code, err = e.audited(ctx, conn, "erase", nil, fs, func() (int, error) {
			err := r.run(ctx, *patience)
			return r.code(), err
		})
	}
	if err != nil {
		return 0, err
	}
	if f.json {
		return code, printJSON(e.stdout, r.erasure)
	}
	r.print(e.stdout)
	return code, nil
}

func (r *erasure) code() int {
	switch {
	case r.Left != "":
		return exitLeft
	case len(r.Streams) == 0 && r.Records == 0:
		return exitNone
	}
	return exitDone
}

// run makes passes until one finds nothing more on the streams. What a stage
// has in hand is left alone until the stage has settled it: its message is the
// only sign of when that is, and what comes out of the stage is for the next
// pass.
func (r *eraser) run(ctx context.Context, patience time.Duration) error {
	deadline := time.Now().Add(patience)
	for {
		noted := maps.Clone(r.ids)
		found, err := r.pass(ctx)
		if noteErr := r.note(ctx, noted); noteErr != nil && err == nil {
			err = noteErr
		}
		switch {
		case ctx.Err() != nil:
			r.Left = "interrupted"
			return nil
		case err != nil || r.force:
			return err
		case r.Passes > 1 && found == 0 && r.held == 0:
			return nil
		case r.Passes > 1 && time.Now().After(deadline):
			r.Left = "events of this person still arrive; erase again"
			r.force = true
			continue
		}
		// In the order of the data, so that what one stage hands on is
		// settled by the next.
		for _, stage := range []string{streams.StagePrefetcher, streams.StagePersister} {
			why, err := r.settle(ctx, stage, deadline)
			if err != nil {
				return err
			}
			if why != "" {
				r.Left, r.force = why, true
			}
		}
	}
}

// note lists the ids that are new since noted.
func (r *eraser) note(ctx context.Context, noted map[string]bool) error {
	var hashes []string
	for id := range r.ids {
		if !noted[id] {
			hashes = append(hashes, erasedHash(id))
		}
	}
	slices.Sort(hashes) // and not in the order they were found
	return noteErased(context.WithoutCancel(ctx), r.conn, hashes)
}

// settle waits until the durables of a stage are through with what they have
// been handed so far.
func (r *eraser) settle(ctx context.Context, stage string, deadline time.Time) (why string, err error) {
	for _, d := range streams.Definition(streams.Limits{}) {
		for _, c := range d.Durables {
			if !strings.HasPrefix(c.Durable, stage) {
				continue
			}
			handed := uint64(0)
			for first := true; ; first = false {
				cons, err := r.conn.JS.Consumer(ctx, d.Stream.Name, c.Durable)
				if err != nil {
					return "", fmt.Errorf("look up durable %s of %s: %w", c.Durable, d.Stream.Name, err)
				}
				info := cons.CachedInfo()
				if first {
					handed = info.Delivered.Stream
				}
				if info.NumAckPending == 0 || info.AckFloor.Stream >= handed {
					break
				}
				if time.Now().After(deadline) {
					return c.Durable + " still has messages in hand that may be this person's; erase again", nil
				}
				if wait(ctx, 200*time.Millisecond) != nil {
					return "interrupted", nil
				}
			}
		}
	}
	return "", nil
}

// pass erases what is there now: messages first, so that no stage makes
// records of them any more.
func (r *eraser) pass(ctx context.Context) (found int, err error) {
	r.Passes++
	r.held = 0
	for _, d := range streams.Definition(streams.Limits{}) {
		if d.Stream.Name == streams.StreamAudit { // holds nothing personal
			continue
		}
		n, err := r.messages(ctx, d)
		if err != nil {
			return found, err
		}
		found += n
		if n > 0 {
			r.Streams[d.Stream.Name] += n
		}
	}
	err = r.eraseRecords(ctx)
	r.Events = len(r.ids)
	return found, err
}

func (r *eraser) messages(ctx context.Context, d streams.StreamDefinition) (found int, err error) {
	stream := d.Stream.Name
	s, err := r.conn.JS.Stream(ctx, stream)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", stream, err)
	}
	state := s.CachedInfo().State
	in := span{Stream: stream, From: max(state.FirstSeq, r.next[stream], 1), To: state.LastSeq}
	next := in.To + 1
	err = scan(ctx, r.conn, in, ">", func(m *jetstream.RawStreamMsg) error {
		if !r.owns(streams.SubjectSubscriber(m.Subject), m.Data) {
			return nil
		}
		if id := requestID(m.Data); id != "" {
			r.ids[id] = true
		}
		if !r.DryRun {
			inHand, err := r.inHand(ctx, s, d.Durables, m)
			if err != nil {
				return err
			}
			if inHand && !r.force {
				r.held++
				next = min(next, m.Sequence)
				return nil
			}
			// Overwritten on disk, and not only dropped from the index.
			if was, err := deleteMessage(ctx, s, m.Sequence, s.SecureDeleteMsg); err != nil || !was {
				return err
			}
		}
		found++
		return nil
	})
	if err == nil {
		r.next[stream] = next
	}
	return found, err
}

// inHand reports whether a stage may have been handed a message and not have
// settled it. The server forgets about that when a message is deleted.
func (r *eraser) inHand(ctx context.Context, s jetstream.Stream, durables []jetstream.ConsumerConfig, m *jetstream.RawStreamMsg) (bool, error) {
	for _, c := range durables {
		if !strings.HasPrefix(m.Subject, strings.TrimSuffix(c.FilterSubject, "*")) || m.Sequence <= r.floors[c.Durable] {
			continue
		}
		cons, err := s.Consumer(ctx, c.Durable)
		if err != nil {
			return false, fmt.Errorf("look up durable %s: %w", c.Durable, err)
		}
		info := cons.CachedInfo()
		r.floors[c.Durable] = info.AckFloor.Stream
		if info.NumAckPending > 0 && m.Sequence > info.AckFloor.Stream && m.Sequence <= info.Delivered.Stream {
			return true, nil
		}
	}
	return false, nil
}

// eraseRecords looks at every record: one may have outlived its messages.
func (r *eraser) eraseRecords(ctx context.Context) error {
	cluster, ok := r.rdb.(*redis.ClusterClient)
	if !ok {
		return r.recordsOf(ctx, r.rdb)
	}
	// Each node knows its own keys alone.
	var mu sync.Mutex
	if err := cluster.ForEachMaster(ctx, func(ctx context.Context, node *redis.Client) error {
		mu.Lock()
		defer mu.Unlock()
		return r.recordsOf(ctx, node)
	}); err != nil {
		return fmt.Errorf("on a node of the cluster: %w", err)
	}
	return nil
}

// recordScan is how many keys one step of a scan looks at.
const recordScan = 200

func (r *eraser) recordsOf(ctx context.Context, node redis.Cmdable) error {
	cursor := uint64(0)
	for {
		keys, next, err := node.Scan(ctx, cursor, record.KeyPrefix+"*", recordScan).Result()
		if err != nil {
			return fmt.Errorf("look for records: %w", err)
		}
		pipe := r.rdb.Pipeline()
		gets := make([]*redis.StringCmd, len(keys))
		for i, key := range keys {
			gets[i] = pipe.Get(ctx, key)
		}
		// Each answer is looked at below.
		_, _ = pipe.Exec(ctx)
		for i, key := range keys {
			body, err := gets[i].Bytes()
			if err := r.eraseRecord(ctx, key, body, err); err != nil {
				return err
			}
		}
		if cursor = next; cursor == 0 {
			return nil
		}
	}
}

// deleteSame deletes a key if it still holds what was looked at.
const deleteSame = `if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0`

func (r *eraser) eraseRecord(ctx context.Context, key string, body []byte, err error) error {
	for {
		if errors.Is(err, redis.Nil) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("look at a record: %w", err)
		}
		if !r.owns(0, body) {
			return nil
		}
		if !r.DryRun {
			n, evalErr := r.rdb.Eval(ctx, deleteSame, []string{key}, body).Int()
			if evalErr != nil {
				return fmt.Errorf("erase a record: %w", evalErr)
			}
			if n == 0 { // somebody wrote it since
				body, err = r.rdb.Get(ctx, key).Bytes()
				continue
			}
		}
		r.ids[strings.TrimPrefix(key, record.KeyPrefix)] = true
		if !r.keys[key] { // a scan may name a key twice
			r.keys[key] = true
			r.Records++
		}
		return nil
	}
}

func (r *erasure) print(w io.Writer) {
	verb := "erased"
	if r.DryRun {
		verb = "would erase"
	}
	fmt.Fprintf(w, "%s, by %s\n", verb, r.At.Format(time.RFC3339))
	for _, name := range slices.Sorted(maps.Keys(r.Streams)) {
		fmt.Fprintf(w, "  %-12s %d messages\n", name, r.Streams[name])
	}
	fmt.Fprintf(w, "  %-12s %d records\n  of %d events, in %d passes\n", "Redis", r.Records, r.Events, r.Passes)
	if r.Left != "" {
		fmt.Fprintf(w, "NOT FINISHED: %s\n", r.Left)
	}
	fmt.Fprintln(w, "out of reach:")
	for _, s := range r.OutOfReach {
		fmt.Fprintf(w, "  - %s\n", s)
	}
	if !r.DryRun {
		fmt.Fprintln(w, "kept: request ids in logs, and hashes of them in FP_AUDIT")
	}
}
