package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// backup is one stream as a server hands it out: what it is, and an archive.
type backup struct {
	Config, State json.RawMessage
	chunks        [][]byte
}

// ask sends a request of JetStream's API; its error is the server's.
func ask(nc *nats.Conn, subject string, body []byte, answer any) error {
	m, err := nc.Request(subject, body, 30*time.Second)
	if err != nil {
		return fmt.Errorf("%s: %w", subject, err)
	}
	var failed struct{ Error *struct{ Description string } }
	if err := errors.Join(json.Unmarshal(m.Data, &failed), json.Unmarshal(m.Data, answer)); err != nil {
		return fmt.Errorf("%s: %w", subject, err)
	}
	if failed.Error != nil {
		return fmt.Errorf("%s: %s", subject, failed.Error.Description)
	}
	return nil
}

// takeBackup copies a stream and its durables out, as the nats command does.
func takeBackup(nc *nats.Conn, stream string) (backup, error) {
	var b backup
	inbox := nc.NewInbox()
	sub, err := nc.SubscribeSync(inbox)
	if err != nil {
		return b, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := ask(nc, "$JS.API.STREAM.SNAPSHOT."+stream, fmt.Appendf(nil, `{"deliver_subject":%q}`, inbox), &b); err != nil {
		return b, err
	}
	for {
		m, err := sub.NextMsg(10 * time.Second)
		if err != nil {
			return b, fmt.Errorf("next chunk of %s: %w", stream, err)
		}
		if len(m.Data) == 0 { // the end, and how it went
			if status := m.Header.Get("Status"); status != "" && status != "204" {
				return b, fmt.Errorf("backup of %s: %s %s", stream, status, m.Header.Get("Description"))
			}
			return b, nil
		}
		b.chunks = append(b.chunks, m.Data)
		if m.Reply != "" {
			if err := m.Respond(nil); err != nil {
				return b, err
			}
		}
	}
}

// restore puts a stream back.
func (b backup) restore(nc *nats.Conn, stream string) error {
	var to struct {
		DeliverSubject string `json:"deliver_subject"`
	}
	if err := ask(nc, "$JS.API.STREAM.RESTORE."+stream, fmt.Appendf(nil, `{"config":%s,"state":%s}`, b.Config, b.State), &to); err != nil {
		return err
	}
	// Another server of the cluster may be the one that receives, and the news
	// of that still be under way to ours. Nobody has the chunk then.
	for deadline := time.Now().Add(10 * time.Second); ; {
		_, err := nc.Request(to.DeliverSubject, b.chunks[0], 10*time.Second)
		if err == nil {
			break
		}
		if !errors.Is(err, nats.ErrNoResponders) || time.Now().After(deadline) {
			return fmt.Errorf("send the first chunk of %s: %w", stream, err)
		}
	}
	for _, chunk := range b.chunks[1:] {
		if _, err := nc.Request(to.DeliverSubject, chunk, 10*time.Second); err != nil {
			return fmt.Errorf("send a chunk of %s: %w", stream, err)
		}
	}
	return ask(nc, to.DeliverSubject, nil, &struct{}{})
}

// TestAllDisksLostAndRestored is the worst line of the README's table, with the
// user backup: every NATS disk and Redis are lost. The streams come back from
// the backup with their durables where they were, so that nothing is asked of
// the vendor twice; the records come back from the streams.
func TestAllDisksLostAndRestored(t *testing.T) {
	t.Parallel()
	n, p := newShippedPipeline(t)
	services := []string{"ingest", "prefetcher", "persister"}
	const events = 20
	accept := func(id string) {
		t.Helper()
		if status, answer := p.post(id); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
		p.eventually(id, record.Ready)
	}
	for i := range events {
		accept(fmt.Sprint("kept-", i))
	}
	p.streamctl("replay", "--stage", "persister", "--since", "1h") // for a state of replays
	settled := n.connect(t, streams.UserStreamctl)
	for _, d := range streams.Definition(streams.Limits{}) {
		for _, c := range d.Durables {
			streamstest.Eventually(t, c.Durable+" to be done", func() bool {
				l, err := streams.ReadLag(t.Context(), settled.JS, d.Stream.Name, c.Durable)
				return err == nil && l.Messages() == 0
			})
		}
	}
	names := []string{"KV_FP_REPLAYS"}
	for _, d := range streams.Definition(streams.Limits{}) {
		names = append(names, d.Stream.Name)
	}
	backups := map[string]backup{}
	user := n.connect(t, streams.UserBackup)
	for _, name := range names {
		b, err := takeBackup(user.NC, name)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.restore(user.NC, name); err == nil {
			t.Errorf("%s was restored over what is there", name)
		}
		backups[name] = b
	}

	for _, name := range services {
		if err := p.kill(name, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
	}
	for name, node := range n.nodes {
		_ = node.cmd.Process.Kill() // is running
		_ = node.cmd.Wait()         // its exit code says nothing
		if err := os.RemoveAll(filepath.Join(n.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.rdb.FlushAll(t.Context()).Err(); err != nil {
		t.Fatal(err)
	}
	for name := range n.nodes {
		n.start(name)
	}
	streamstest.Eventually(t, "a cluster without streams", func() bool {
		var names struct{ Total *int }
		return ask(user.NC, "$JS.API.STREAM.NAMES", nil, &names) == nil && names.Total != nil && *names.Total == 0
	})
	for _, name := range names {
		if err := backups[name].restore(user.NC, name); err != nil {
			t.Fatal(err)
		}
	}
	if out := p.streamctl("diff", "--replicas=3", "--timeout=50s"); out != "no differences\n" {
		t.Errorf("what was restored is not what was there:\n%s", out)
	}

	calls := p.sim.Calls()
	p.start(services...)
	p.ready(services...)
	p.streamctl("replay", "--stage", "persister", "--since", "24h", "--only-missing")
	for i := range events {
		p.eventually(fmt.Sprint("kept-", i), record.Ready)
	}
	if again := p.sim.Calls() - calls; again != 0 {
		t.Errorf("the vendor was asked again, %d times", again)
	}
	accept("after")
}
