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
	Redrives   string          `json:"redrives,omitempty"`
	Body       json.RawMessage `json:"body,omitempty"`
}

func newDeadLetter(m *jetstream.RawStreamMsg) deadLetter {
	return deadLetter{
		Sequence: m.Sequence, At: m.Header.Get(streams.HeaderDeadAt), Stage: m.Header.Get(streams.HeaderDeadStage),
		Reason: m.Header.Get(streams.HeaderDeadReason), Error: m.Header.Get(streams.HeaderDeadError),
		Subscriber: streams.SubjectSubscriber(m.Subject), RequestID: requestID(m.Data),
		Stream: m.Header.Get(streams.HeaderDeadStream), From: m.Header.Get(streams.HeaderDeadSequence),
		Deliveries: m.Header.Get(streams.HeaderDeadDeliveries), AcceptedAt: m.Header.Get(streams.HeaderAcceptedAt),
		Redrives: m.Header.Get(headerRedrives),
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

// dead has verbs of its own.
func dead(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	word := ""
	if len(args) > 0 {
		word = args[0]
	}
	switch word {
	case "list", "show", "purge":
		return deadLook(ctx, e, fs, word, args[1:])
	case "redrive":
		return redrive(ctx, e, fs, args[1:])
	case "-h", "-help", "--help":
		return deadLook(ctx, e, fs, "list", args) // each word's own flags: streamctl dead redrive --help
	}
	return 0, usageError{errors.New("want list, show SEQUENCE, redrive or purge")}
}

// redrive gives dead letters to their stages again.
func redrive(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f feedFlags
	f.Redrive = true
	f.declare(fs)
	fs.StringVar(&f.Reason, "reason", "", "those given up for this `reason` alone")
	all := fs.Bool("all", false, "every dead letter there is")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	if err := f.check(); err != nil {
		return 0, err
	}
	if f.resume == "" && !*all && f.selection == (selection{}) && f.since.IsZero() && f.until.IsZero() && f.fromSeq == 0 {
		return 0, usageError{errors.New("say which: --stage, --reason, --subscriber, --request-id, --since, --until, --from-seq or --all")}
	}
	return f.run(ctx, e)
}

// deadLook lists, shows or deletes dead letters.
func deadLook(ctx context.Context, e env, fs *flag.FlagSet, word string, args []string) (int, error) {
	var f commonFlags
	var sel selection
	var since, until timeFlag
	f.declare(fs)
	sel.declare(fs)
	fs.StringVar(&sel.Reason, "reason", "", "those given up for this `reason` alone")
	fs.Var(&since, "since", "those given up at or after this `time`")
	fs.Var(&until, "until", "those given up at or before this `time`")
	var reveal, yes, all bool
	switch word {
	case "show":
		fs.BoolVar(&reveal, "reveal", false, "show personal data")
	case "purge":
		fs.BoolVar(&yes, "yes", false, "do not ask")
		fs.BoolVar(&all, "all", false, "every dead letter there is")
	}
	words, err := parseMixed(fs, args, 1)
	if err != nil {
		return 0, err
	}
	if err := sel.check(); err != nil {
		return 0, err
	}
	var seq uint64
	switch {
	case word == "show":
		if len(words) == 1 {
			seq, _ = strconv.ParseUint(words[0], 10, 64) // 0 is no sequence
		}
		if seq == 0 {
			return 0, usageError{errors.New("show wants the sequence that list prints")}
		}
	case len(words) > 0:
		return 0, usageError{fmt.Errorf("unknown argument %q", words[0])}
	case word == "purge" && !all && sel == (selection{}) && since.IsZero() && until.IsZero():
		return 0, usageError{errors.New("say which: --stage, --reason, --subscriber, --request-id, --since, --until or --all")}
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if seq != 0 && reveal {
		return e.audited(ctx, conn, "dead show", words, fs, func() (int, error) { return deadShow(ctx, e, conn, seq, true) })
	}
	if seq != 0 {
		return deadShow(ctx, e, conn, seq, false)
	}
	in, err := findSpan(ctx, conn.JS, streams.StreamDead, since.Time, until.Time)
	if err != nil {
		return 0, err
	}
	found := []deadLetter{}
	err = scan(ctx, conn, in, sel.subject(streams.StreamDead), func(m *jetstream.RawStreamMsg) error {
		if sel.matches(m) {
			found = append(found, newDeadLetter(m))
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	if word == "purge" {
		if len(found) == 0 {
			return exitNone, printPurge(e, f.json, 0, 0)
		}
		if !yes && !e.confirm(fmt.Sprintf("Delete %d dead letters for good?", len(found))) {
			return exitLeft, nil
		}
		return e.audited(ctx, conn, "dead purge", nil, fs, func() (int, error) { return purge(ctx, e, conn, found, f.json) })
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

// purge deletes what was found, and nothing that came since.
func purge(ctx context.Context, e env, conn *streams.Conn, found []deadLetter, asJSON bool) (int, error) {
	s, err := conn.JS.Stream(ctx, streams.StreamDead)
	if err != nil {
		return 0, fmt.Errorf("look up stream %s: %w", streams.StreamDead, err)
	}
	code, purged := exitDone, 0
	for _, d := range found {
		was, err := deleteMessage(ctx, s, d.Sequence, s.DeleteMsg)
		if ctx.Err() != nil {
			code = exitLeft
			break
		}
		if err != nil {
			return 0, err
		}
		if was {
			purged++
		}
	}
	return code, printPurge(e, asJSON, len(found), purged)
}

func printPurge(e env, asJSON bool, matched, purged int) error {
	if asJSON {
		return printJSON(e.stdout, struct {
			Matched int `json:"matched"`
			Purged  int `json:"purged"`
		}{matched, purged})
	}
	fmt.Fprintf(e.stdout, "purged %d of %d matching dead letters\n", purged, matched)
	return nil
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
	d.Body = shown(m.Data, reveal)
	return exitDone, printJSON(e.stdout, d)
}
