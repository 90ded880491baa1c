package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// auditEntry is a message of FP_AUDIT. Each use of a verb leaves two with the
// same id: one before anything is done, and one with the outcome.
type auditEntry struct {
	ID   string    `json:"id"`
	At   time.Time `json:"at"`
	Verb string    `json:"verb"`
	// Arguments hold no personal data.
	Arguments []string `json:"arguments"`
	NATSUser  string   `json:"nats_user,omitempty"`
	OSUser    string   `json:"os_user"`
	Host      string   `json:"host"`
	// Outcome is started, done, failed, nothing_matched or stopped.
	Outcome string `json:"outcome"`
}

// Who names the person as far as it is known.
func (a auditEntry) who() string {
	who := a.OSUser + "@" + a.Host
	if a.NATSUser != "" {
		who += " as " + a.NATSUser
	}
	return who
}

// auditErased is the verb of messages that list what was erased.
const auditErased = "erased"

// audited does something between two entries of FP_AUDIT; without the first
// one it is not done. words are the verb's arguments.
func (e env) audited(ctx context.Context, conn *streams.Conn, verb string, words []string, fs *flag.FlagSet, do func() (int, error)) (int, error) {
	a := auditEntry{ID: strings.ToLower(rand.Text()[:10]), Verb: verb, Arguments: words, NATSUser: natsUser(ctx, conn), Outcome: "started"}
	if a.Arguments == nil {
		a.Arguments = []string{}
	}
	fs.Visit(func(f *flag.Flag) {
		switch f.Name {
		case "json", "timeout", "context", "yes": // say nothing about what is done
		case "user-id":
			a.Arguments = append(a.Arguments, "--user-id ***")
		default:
			a.Arguments = append(a.Arguments, "--"+f.Name+" "+f.Value.String())
		}
	})
	a.OSUser, a.Host = osUser()
	pub := streams.NewPublisher(conn.JS, prometheus.NewRegistry())
	if err := a.write(ctx, pub); err != nil {
		return 0, fmt.Errorf("%w; nothing was done (streamctl apply makes the stream, and NATS must allow its subject)", err)
	}
	code, err := do()
	switch {
	case err != nil:
		a.Outcome = "failed"
	case code == exitNone:
		a.Outcome = "nothing_matched"
	case code == exitLeft:
		a.Outcome = "stopped"
	default:
		a.Outcome = "done"
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	return code, errors.Join(err, a.write(last, pub))
}

func (a *auditEntry) write(ctx context.Context, pub *streams.Publisher) error {
	a.At = time.Now().UTC()
	b, err := json.Marshal(a)
	if err != nil {
		return fmt.Errorf("encode the audit: %w", err)
	}
	_, err = pub.Publish(ctx, streams.Message{
		Stream: streams.StreamAudit, Subject: streams.AuditSubject(strings.ReplaceAll(a.Verb, " ", "_")), ID: a.ID + ":" + a.Outcome, Body: b,
	})
	return err //nolint:wrapcheck // says what it did
}

// natsUser asks the server, which alone knows whom a certificate stands for;
// empty when it does not say.
func natsUser(ctx context.Context, conn *streams.Conn) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	m, err := conn.NC.RequestWithContext(ctx, "$SYS.REQ.USER.INFO", nil)
	if err != nil {
		return ""
	}
	var info struct {
		Data struct {
			User string `json:"user"`
		} `json:"data"`
	}
	if json.Unmarshal(m.Data, &info) != nil {
		return ""
	}
	return info.Data.User
}

func osUser() (name, host string) {
	name, host = "unknown", "unknown"
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if h, err := os.Hostname(); err == nil {
		host = h
	}
	return name, host
}

func audit(ctx context.Context, e env, fs *flag.FlagSet, args []string) (int, error) {
	var f commonFlags
	f.declare(fs)
	var since, until timeFlag
	fs.Var(&since, "since", "what was done at or after this `time`")
	fs.Var(&until, "until", "what was done at or before this `time`")
	verb := fs.String("verb", "", "this `verb` alone, such as replay")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	connCtx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	conn, err := e.connect(connCtx)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	in, err := findSpan(ctx, conn.JS, streams.StreamAudit, since.Time, until.Time)
	if err != nil {
		return 0, err
	}
	// The second entry of an id says what became of the first.
	found, place := []auditEntry{}, map[string]int{}
	err = scan(ctx, conn, in, ">", func(m *jetstream.RawStreamMsg) error {
		var a auditEntry
		if m.Subject == streams.AuditSubject(auditErased) || json.Unmarshal(m.Data, &a) != nil || *verb != "" && a.Verb != *verb {
			return nil
		}
		if i, ok := place[a.ID]; ok {
			found[i].Outcome = a.Outcome
			return nil
		}
		place[a.ID] = len(found)
		found = append(found, a)
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
	for _, a := range found {
		fmt.Fprintf(e.stdout, "%s  %s  %s  %s\n", a.At.Format(time.RFC3339), a.Verb, a.Outcome, a.who())
		if len(a.Arguments) > 0 {
			fmt.Fprintf(e.stdout, "    %s\n", strings.Join(a.Arguments, " "))
		}
	}
	if len(found) == 0 {
		fmt.Fprintln(e.stdout, "nothing matches")
	}
	return code, nil
}

// erasedHash stands for a request id in FP_AUDIT, so that trace can tell an
// erased event from one that never was. Ids are random: whoever has one can
// ask for it, and nobody can go the other way.
func erasedHash(requestID string) string {
	sum := sha256.Sum256([]byte("erased:" + requestID))
	return hex.EncodeToString(sum[:8])
}

// erasedNote is the body of a message that lists what was erased.
type erasedNote struct {
	At     time.Time `json:"at"`
	Hashes []string  `json:"hashes"`
}

// noteErased lists erased ids in FP_AUDIT, a thousand to a message.
func noteErased(ctx context.Context, conn *streams.Conn, hashes []string) error {
	pub := streams.NewPublisher(conn.JS, prometheus.NewRegistry())
	for len(hashes) > 0 {
		n := min(len(hashes), 1000)
		b, err := json.Marshal(erasedNote{time.Now().UTC(), hashes[:n]})
		if err != nil {
			return fmt.Errorf("encode the audit: %w", err)
		}
		if _, err := pub.Publish(ctx, streams.Message{
			Stream: streams.StreamAudit, Subject: streams.AuditSubject(auditErased), ID: "erased:" + rand.Text(), Body: b,
		}); err != nil {
			return err //nolint:wrapcheck // says what it did
		}
		hashes = hashes[n:]
	}
	return nil
}

// erasedAt returns when an event was erased last, zero for never.
func erasedAt(ctx context.Context, conn *streams.Conn, requestID string) (time.Time, error) {
	in, err := findSpan(ctx, conn.JS, streams.StreamAudit, time.Time{}, time.Time{})
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	hash, at := erasedHash(requestID), time.Time{}
	err = scan(ctx, conn, in, streams.AuditSubject(auditErased), func(m *jetstream.RawStreamMsg) error {
		var note erasedNote
		if json.Unmarshal(m.Data, &note) == nil {
			for _, h := range note.Hashes {
				if h == hash {
					at = note.At
				}
			}
		}
		return nil
	})
	return at, err
}
