package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"slices"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// deadLetter is one message of FP_DEAD. Body is there for show alone.
type deadLetter struct {
	Sequence   uint64          `json:"sequence"`
	At         string          `json:"at"`
	Stage      string          `json:"stage"`
	Reason     string          `json:"reason"`
	Error      string          `json:"error"`
	Subscriber int64           `json:"subscriber_id"`
	RequestID  string          `json:"request_id,omitempty"`
	Stream     string          `json:"from_stream"`
	From       string          `json:"from_sequence"`
	Deliveries string          `json:"deliveries"`
	AcceptedAt string          `json:"accepted_at"`
	Body       json.RawMessage `json:"body,omitempty"`
}

func newDeadLetter(m *jetstream.RawStreamMsg) deadLetter {
	return deadLetter{
		Sequence: m.Sequence, At: m.Header.Get(streams.HeaderDeadAt), Stage: m.Header.Get(streams.HeaderDeadStage),
		Reason: m.Header.Get(streams.HeaderDeadReason), Error: m.Header.Get(streams.HeaderDeadError),
		Subscriber: streams.SubjectSubscriber(m.Subject), RequestID: requestID(m.Data),
		Stream: m.Header.Get(streams.HeaderDeadStream), From: m.Header.Get(streams.HeaderDeadSequence),
		Deliveries: m.Header.Get(streams.HeaderDeadDeliveries), AcceptedAt: m.Header.Get(streams.HeaderAcceptedAt),
	}
}

// requestID returns the request id of a body of any stream, or "" when it has
// none that is valid.
func requestID(body []byte) string {
	var b struct {
		RequestID string `json:"request_id"`
	}
	if json.Unmarshal(body, &b) != nil || !streams.ValidRequestID(b.RequestID) {
		return ""
	}
	return b.RequestID
}

// masked returns a body without its personal data: the members known to hold
// none are kept, and everything else says only that it was there.
func masked(body []byte) json.RawMessage {
	var in map[string]json.RawMessage
	if json.Unmarshal(body, &in) != nil {
		return json.RawMessage(fmt.Sprintf(`"(%d bytes, not a JSON object)"`, len(body)))
	}
	open := []string{"schema", "request_id", "subscriber_id", "status", "reason", "accepted_at", "fetched_at", "attempts", "source", "checks"}
	for k := range in {
		if !slices.Contains(open, k) {
			in[k] = json.RawMessage(`"***"`)
		}
	}
	out, err := json.Marshal(in)
	if err != nil {
		return json.RawMessage(`"***"`)
	}
	return out
}

func dead(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	var since timeFlag
	stage := fs.String("stage", "", "list only those of this `stage`: prefetcher or persister")
	reason := fs.String("reason", "", "list only those given up for this `reason`")
	subscriber := fs.Int64("subscriber", 0, "list only those of subscriber `N`")
	fs.Var(&since, "since", "list only those given up at or after this `time`")
	reveal := fs.Bool("reveal", false, "show personal data")
	words, err := parseMixed(fs, args, 2)
	if err != nil {
		return 0, err
	}
	var seq uint64
	switch {
	case len(words) == 1 && words[0] == "list":
	case len(words) == 2 && words[0] == "show":
		if seq, err = strconv.ParseUint(words[1], 10, 64); err != nil || seq == 0 {
			return 0, usageError{errors.New("show wants the sequence that list prints")}
		}
	default:
		return 0, usageError{errors.New("want list, or show SEQUENCE")}
	}
	if *stage != "" && *stage != streams.StagePrefetcher && *stage != streams.StagePersister {
		return 0, usageError{errors.New("--stage is prefetcher or persister")}
	}
	if *reason != "" && !slices.Contains(streams.DeadReasons(), streams.DeadReason(*reason)) {
		return 0, usageError{fmt.Errorf("--reason is one of %v", streams.DeadReasons())}
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if seq != 0 {
		return deadShow(ctx, e, conn, seq, *reveal)
	}
	in, err := findSpan(ctx, conn.JS, streams.StreamDead, since.Time, time.Time{})
	if err != nil {
		return 0, err
	}
	token := *stage
	if token == "" {
		token = "*"
	}
	found := []deadLetter{}
	err = scan(ctx, conn, in, "fp.dead."+token+"."+subscriberToken(*subscriber), func(m *jetstream.RawStreamMsg) error {
		if d := newDeadLetter(m); *reason == "" || d.Reason == *reason {
			found = append(found, d)
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	code := exitDone
	if len(found) == 0 {
		code = exitNone
	}
	if f.json {
		return code, printJSON(e.stdout, found)
	}
	if len(found) == 0 {
		fmt.Fprintln(e.stdout, "no dead letter matches")
		return code, nil
	}
	t := tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SEQ\tSTAGE\tREASON\tSUBSCRIBER\tREQUEST ID")
	for _, d := range found {
		fmt.Fprintf(t, "%d\t%s\t%s\t%d\t%s\n", d.Sequence, d.Stage, d.Reason, d.Subscriber, d.RequestID)
	}
	t.Flush()
	return code, nil
}

func deadShow(ctx context.Context, e env, conn *streams.Conn, seq uint64, reveal bool) (int, error) {
	s, err := conn.JS.Stream(ctx, streams.StreamDead)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", streams.StreamDead, err)
	}
	m, err := s.GetMsg(ctx, seq)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		fmt.Fprintf(e.stderr, "no dead letter has sequence %d\n", seq)
		return exitNone, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read %s at %d: %w", streams.StreamDead, seq, err)
	}
	d := newDeadLetter(m)
	d.Body = masked(m.Data)
	if reveal {
		d.Body = m.Data
		if !json.Valid(m.Data) {
			d.Body, _ = json.Marshal(m.Data) // base64
		}
	}
	return exitDone, printJSON(e.stdout, d)
}
