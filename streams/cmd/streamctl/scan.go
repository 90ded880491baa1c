package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"sort"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// commonFlags are those of every verb that reads.
type commonFlags struct {
	json    bool
	timeout time.Duration
}

func (f *commonFlags) declare(fs *flag.FlagSet) {
	fs.BoolVar(&f.json, "json", false, "print JSON")
	fs.DurationVar(&f.timeout, "timeout", 30*time.Second, "how `long` to wait for NATS to answer")
}

// parseMixed reads flags before, between and after up to n arguments, as
// kubectl and nats do.
func parseMixed(fs *flag.FlagSet, args []string, n int) ([]string, error) {
	var words []string
	for {
		if err := fs.Parse(args); err != nil {
			if errors.Is(err, flag.ErrHelp) {
				return nil, err //nolint:wrapcheck // a word to run
			}
			return nil, usageError{err}
		}
		if fs.NArg() == 0 {
			return words, nil
		}
		if len(words) == n {
			return nil, usageError{fmt.Errorf("unknown argument %q", fs.Arg(0))}
		}
		words, args = append(words, fs.Arg(0)), fs.Args()[1:]
	}
}

// timeFlag is a point in time: RFC 3339, or a duration such as 2h before now.
type timeFlag struct{ time.Time }

// String implements flag.Value; it is empty for no time.
func (f *timeFlag) String() string {
	if f == nil || f.IsZero() {
		return ""
	}
	return f.UTC().Format(time.RFC3339)
}

// Set implements flag.Value.
func (f *timeFlag) Set(v string) error {
	if d, err := time.ParseDuration(v); err == nil && d >= 0 {
		f.Time = time.Now().Add(-d)
		return nil
	}
	t, err := time.Parse(time.RFC3339Nano, v)
	if err != nil {
		return errors.New("want a duration such as 2h, or a time such as 2026-01-02T15:04:05Z")
	}
	f.Time = t
	return nil
}

// selection says which messages a verb is about. What is empty does not matter.
type selection struct {
	Stage      string `json:"stage,omitempty"`
	Subscriber int64  `json:"subscriber_id,omitempty"`
	RequestID  string `json:"request_id,omitempty"`
	// Reason of dead letters.
	Reason string `json:"reason,omitempty"`
}

// declare adds the flags that every selection has.
func (s *selection) declare(fs *flag.FlagSet) {
	fs.StringVar(&s.Stage, "stage", "", "`stage` concerned: prefetcher or persister")
	fs.Int64Var(&s.Subscriber, "subscriber", 0, "those of subscriber `N` alone")
	fs.StringVar(&s.RequestID, "request-id", "", "those with this request `id` alone")
}

func (s *selection) check() error {
	switch {
	case s.Stage != "" && s.Stage != streams.StagePrefetcher && s.Stage != streams.StagePersister:
		return usageError{errors.New("--stage is prefetcher or persister")}
	case s.RequestID != "" && !streams.ValidRequestID(s.RequestID):
		return usageError{errors.New("--request-id is no request id")}
	case s.Subscriber < 0:
		return usageError{errors.New("--subscriber is not negative")}
	case s.Reason != "" && !slices.Contains(streams.DeadReasons(), streams.DeadReason(s.Reason)):
		return usageError{fmt.Errorf("--reason is one of %v", streams.DeadReasons())}
	}
	return nil
}

// subject matches, in a stream, no fewer messages than the selection does.
func (s *selection) subject(stream string) string {
	stage := cmp.Or(s.Stage, "*")
	switch stream {
	case streams.StreamIngest:
		return "fp.ingest." + subscriberToken(s.Subscriber)
	case streams.StreamEnriched:
		return "fp.enriched." + subscriberToken(s.Subscriber)
	case streams.StreamBackfill:
		return "fp.backfill." + stage + "." + subscriberToken(s.Subscriber)
	}
	return "fp.dead." + stage + "." + subscriberToken(s.Subscriber)
}

// matches looks at what the filter of subject does not say. Heartbeats are
// nobody's business here.
func (s *selection) matches(m *jetstream.RawStreamMsg) bool {
	return streams.SubjectSubscriber(m.Subject) != streams.HeartbeatSubscriber && (s.Reason == "" || m.Header.Get(streams.HeaderDeadReason) == s.Reason) &&
		(s.RequestID == "" || requestID(m.Data) == s.RequestID)
}

// span is a range of a stream: sequences From to To, both included. It is
// empty when From is beyond To.
type span struct {
	Stream   string `json:"stream"`
	From, To uint64
}

// findSpan returns the messages of a stream stored at since or later and not
// after until; a zero time is no bound. It searches by halves, a direct get
// each.
func findSpan(ctx context.Context, js jetstream.JetStream, stream string, since, until time.Time) (span, error) {
	s, err := js.Stream(ctx, stream)
	if err != nil {
		return span{}, fmt.Errorf("look up stream %s: %w", stream, err)
	}
	state := s.CachedInfo().State
	out := span{Stream: stream, From: max(state.FirstSeq, 1), To: state.LastSeq}
	if state.Msgs == 0 {
		return span{Stream: stream, From: 1}, nil
	}
	first := func(past func(time.Time) bool) (uint64, error) {
		var failed error
		n := sort.Search(int(out.To-out.From+1), func(i int) bool {
			if failed != nil {
				return true
			}
			m, err := s.GetMsg(ctx, out.From+uint64(i), jetstream.WithGetMsgSubject(">"))
			if errors.Is(err, jetstream.ErrMsgNotFound) {
				return true // beyond the last
			}
			if err != nil {
				failed = err
				return true
			}
			return past(m.Time)
		})
		if failed != nil {
			return 0, fmt.Errorf("look for a time in %s: %w", stream, failed)
		}
		return out.From + uint64(n), nil
	}
	from, to := out.From, out.To
	if !since.IsZero() {
		if from, err = first(func(t time.Time) bool { return !t.Before(since) }); err != nil {
			return span{}, err
		}
	}
	if !until.IsZero() {
		next, err := first(func(t time.Time) bool { return t.After(until) })
		if err != nil {
			return span{}, err
		}
		to = next - 1
	}
	out.From, out.To = from, to
	return out, nil
}

// batchSize and batchBytes bound what one direct get returns.
const (
	batchSize  = 100
	batchBytes = 4 << 20
)

// scan calls each for the messages of a span that match a subject, in order.
func scan(ctx context.Context, conn *streams.Conn, in span, subject string, each func(*jetstream.RawStreamMsg) error) error {
	return scanBatches(ctx, conn, in, subject, batchSize, func(batch []*jetstream.RawStreamMsg) error {
		for _, m := range batch {
			if err := each(m); err != nil {
				return err
			}
		}
		return nil
	})
}

// scanBatches calls each for up to size messages at a time of a span that
// match a subject, in order. It reads by direct gets, and so needs no consumer
// and no right to make one.
func scanBatches(ctx context.Context, conn *streams.Conn, in span, subject string, size int, each func([]*jetstream.RawStreamMsg) error) error {
	for next := in.From; next <= in.To; {
		var batch []*jetstream.RawStreamMsg
		var last bool
		err := keepTrying(ctx, func() (err error) {
			batch, last, err = getBatch(ctx, conn.NC, in.Stream, next, subject, size)
			return err
		})
		if err != nil {
			return fmt.Errorf("read %s from %d: %w", in.Stream, next, err)
		}
		if len(batch) > 0 {
			next = batch[len(batch)-1].Sequence + 1
		}
		for len(batch) > 0 && batch[len(batch)-1].Sequence > in.To {
			batch, last = batch[:len(batch)-1], true
		}
		if len(batch) > 0 {
			if err := each(batch); err != nil {
				return err
			}
		}
		if last {
			return nil
		}
	}
	return nil
}

// patience is how long a run puts up with a server that is away: a leader's
// election, Redis's restart. What takes longer ends it, and --resume goes on.
const patience = 30 * time.Second

// keepTrying calls do until it succeeds, is refused, ctx is done, or patience
// is over, and returns its last error.
func keepTrying(ctx context.Context, do func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := do()
		if err == nil || errors.Is(err, streams.ErrRefused) || time.Now().After(deadline) || wait(ctx, 250*time.Millisecond) != nil {
			return err
		}
	}
}

// getBatch asks for up to size messages from a sequence on, in one request
// (ADR-31 of the server's design documents). last is set when there are no
// more.
func getBatch(ctx context.Context, nc *nats.Conn, stream string, from uint64, subject string, size int) (batch []*jetstream.RawStreamMsg, last bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	request, err := json.Marshal(map[string]any{"seq": from, "next_by_subj": subject, "batch": size, "max_bytes": batchBytes})
	if err != nil {
		return nil, false, fmt.Errorf("encode: %w", err)
	}
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return nil, false, fmt.Errorf("subscribe: %w", err)
	}
	defer sub.Unsubscribe() //nolint:errcheck // fails only when the connection is closed
	if err := nc.PublishRequest("$JS.API.DIRECT.GET."+stream, inbox, request); err != nil {
		return nil, false, fmt.Errorf("request: %w", err)
	}
	for {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, false, fmt.Errorf("wait for the answer: %w", err)
		}
		switch status := m.Header.Get("Status"); status {
		case "":
		case "204":
			return batch, m.Header.Get("Nats-Num-Pending") == "0", nil
		case "404":
			return nil, true, nil
		default:
			return nil, false, fmt.Errorf("answered %s %s", status, m.Header.Get("Description"))
		}
		raw := &jetstream.RawStreamMsg{Subject: m.Header.Get(jetstream.SubjectHeader), Header: m.Header, Data: m.Data}
		if raw.Sequence, err = strconv.ParseUint(m.Header.Get(jetstream.SequenceHeader), 10, 64); err != nil {
			return nil, false, errors.New("answered without a sequence")
		}
		if raw.Time, err = time.Parse(time.RFC3339Nano, m.Header.Get(jetstream.TimeStampHeaer)); err != nil {
			return nil, false, errors.New("answered without a time")
		}
		batch = append(batch, raw)
	}
}

// deleteMessage deletes a message by one of the stream's two ways, and reports
// whether it was there.
func deleteMessage(ctx context.Context, s jetstream.Stream, seq uint64, by func(context.Context, uint64) error) (bool, error) {
	err := by(ctx, seq)
	if err == nil {
		return true, nil
	}
	// The refusal does not say why in a form to rely on.
	if errors.Is(err, jetstream.ErrMsgDeleteUnsuccessful) {
		if _, getErr := s.GetMsg(ctx, seq); errors.Is(getErr, jetstream.ErrMsgNotFound) {
			return false, nil
		}
	}
	return false, fmt.Errorf("delete %s %d: %w", s.CachedInfo().Config.Name, seq, err)
}

// subscriberToken is the subject token that selects a subscriber, 0 for all.
func subscriberToken(id int64) string {
	if id == 0 {
		return "*"
	}
	return strconv.FormatInt(id, 10)
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// wait returns after d, or with an error when ctx is done.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(max(d, 0))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx) //nolint:wrapcheck // judged by the caller
	case <-t.C:
		return nil
	}
}
