package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// replayReport is the part of streamctl's JSON that the tests rely on.
type replayReport struct {
	ID      string            `json:"id"`
	Settled bool              `json:"settled"`
	Counts  map[string]uint64 `json:"counts"`
	Outcome struct {
		InStream uint64            `json:"in_stream"`
		Agrees   bool              `json:"agrees"`
		Results  map[string]uint64 `json:"results"`
		Dead     map[string]uint64 `json:"dead"`
		Records  map[string]uint64 `json:"records"`
	} `json:"outcome"`
}

// operate prepares a run of streamctl that also knows Redis.
func (p *pipeline) operate(args ...string) (cmd *exec.Cmd, stdout *bytes.Buffer) {
	p.t.Helper()
	dir, _ := build()
	cmd = exec.CommandContext(p.t.Context(), filepath.Join(dir, "streamctl"), args...)
	cmd.Env = append(p.servers("streamctl"), "REDIS_URL="+p.redis.URL())
	stdout = &bytes.Buffer{}
	cmd.Stdout, cmd.Stderr = stdout, p.t.Output()
	return cmd, stdout
}

// operated runs streamctl, expects an exit code and reads its JSON into v.
func (p *pipeline) operated(code int, v any, args ...string) {
	p.t.Helper()
	cmd, stdout := p.operate(append(args, "--json")...)
	err := cmd.Run()
	exit, failed := errors.AsType[*exec.ExitError](err)
	if got := cmd.ProcessState.ExitCode(); got != code || err != nil && !failed {
		p.t.Fatalf("streamctl %v: exit %d, %v %v\n%s", args, got, err, exit, stdout)
	}
	if v == nil {
		return
	}
	if err := json.Unmarshal(stdout.Bytes(), v); err != nil {
		p.t.Fatalf("streamctl %v: %v\n%s", args, err, stdout)
	}
}

// seed stores bodies as fast as the stream takes them.
func (p *pipeline) seed(subject string, bodies [][]byte) {
	p.t.Helper()
	js := p.nats.Connect("seed").JS
	for chunk := range slices.Chunk(bodies, 1000) {
		var acks []jetstream.PubAckFuture
		for _, b := range chunk {
			f, err := js.PublishMsgAsync(&nats.Msg{Subject: subject, Data: b})
			if err != nil {
				p.t.Fatal(err)
			}
			acks = append(acks, f)
		}
		for _, f := range acks {
			select {
			case <-f.Ok():
			case err := <-f.Err():
				p.t.Fatal(err)
			}
		}
	}
}

func (p *pipeline) encode(v any) []byte {
	p.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

func userEvent(id, user string) streams.Event {
	return streams.Event{Schema: streams.EventSchema, RequestID: id, SubscriberID: 12, SessionID: "s", UserID: user}
}

// records returns every record there is.
func (p *pipeline) records() map[string]string {
	p.t.Helper()
	keys, err := p.rdb.Keys(p.t.Context(), record.KeyPrefix+"*").Result()
	if err != nil {
		p.t.Fatal(err)
	}
	all := map[string]string{}
	for chunk := range slices.Chunk(keys, 1000) {
		values, err := p.rdb.MGet(p.t.Context(), chunk...).Result()
		if err != nil {
			p.t.Fatal(err)
		}
		for i, v := range values {
			all[chunk[i]], _ = v.(string) // "" is one that expired since
		}
	}
	return all
}

// Redis is flushed and every live record of 20,000 comes back, without a call
// to the vendor; at once again, inside the dedupe window.
func TestReplayBringsEveryRecordBack(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	const live, expired = 19_900, 100
	now := time.Now()
	bodies := make([][]byte, 0, live+expired)
	for i := range live + expired {
		at := now.Add(time.Duration(i-live) * time.Millisecond)
		if i >= live {
			at = now.Add(-25 * time.Hour)
		}
		r := streams.NewRecord(userEvent(fmt.Sprint("e", i), "user@example.com"), at, record.Ready, "")
		r.Signals = &record.Signals{}
		if i%10 == 3 {
			r.Status, r.Reason, r.Signals = record.NotFound, record.EventNotFound, nil
		}
		b, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, b)
	}
	p.seed(streams.EnrichedSubject(12), bodies)
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	if status, answer := p.post("posted"); status != http.StatusAccepted {
		t.Fatalf("%d %s", status, answer)
	}
	p.eventually("posted", record.Ready)
	streamstest.Eventually(t, "all records", func() bool {
		n, err := p.rdb.DBSize(t.Context()).Result()
		return err == nil && n == live+1
	})
	before, calls := p.records(), p.sim.Calls()
	for range 2 {
		if err := p.rdb.FlushAll(t.Context()).Err(); err != nil {
			t.Fatal(err)
		}
		var r replayReport
		p.operated(0, &r, "replay", "--stage", "persister", "--since", "1h", "--rate", "0")
		want := map[string]uint64{
			"copied": live + 1, "past_record_life": expired, "present": 0, "already_ready": 0, "invalid": 0, "past_vendor_retention": 0, "vendor_calls": 0,
		}
		if d := cmp.Diff(want, r.Counts); d != "" {
			t.Errorf("counts, -want +got\n%s", d)
		}
		records := map[string]uint64{"ready": live/10*9 + 1, "not_found": live / 10}
		if d := cmp.Diff(records, r.Outcome.Records); d != "" || !r.Settled || !r.Outcome.Agrees || len(r.Outcome.Dead) != 0 {
			t.Errorf("outcome %+v, -want +got\n%s", r, d)
		}
		if after := p.records(); !cmp.Equal(before, after) {
			t.Errorf("%d records before and %d after, or others", len(before), len(after))
		}
	}
	if n := p.sim.Calls(); n != calls {
		t.Errorf("%d calls to the vendor for the replays", n-calls)
	}
}

// A plan's numbers are those of the run, the vendor's own count included; and
// killed at a random point and gone on with, the run asks for each event once.
func TestKilledReplayAsksForEachEventOnce(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.procs["prefetcher"].env = append(p.procs["prefetcher"].env, "REDIS_URL="+p.redis.URL(), "FINGERPRINT_TIMEOUT=20s") // a busy machine makes no second calls
	p.apply()
	const missing, present, forgotten = 400, 100, 20
	bodies := make([][]byte, 0, missing+present+forgotten)
	var ids []string
	add := func(format string, n int) {
		for i := range n {
			ids = append(ids, fmt.Sprintf(format, i))
			bodies = append(bodies, p.encode(userEvent(ids[len(ids)-1], "user@example.com")))
		}
	}
	add("missing-%d", missing)
	add("present-%d", present)
	add(fmt.Sprint(time.Now().Add(-800*time.Hour).UnixMilli())+".old%03d", forgotten)
	p.seed(streams.IngestSubject(12), bodies)
	p.start("prefetcher", "persister")
	for _, id := range ids[:missing+present] {
		p.eventually(id, record.Ready)
	}
	for _, id := range ids[missing+present:] {
		p.eventually(id, record.NotFound)
	}
	until := time.Now().Format(time.RFC3339Nano)
	var keys []string
	for _, id := range ids[:missing] {
		keys = append(keys, record.Key(id))
	}
	if err := p.rdb.Del(t.Context(), keys...).Err(); err != nil {
		t.Fatal(err)
	}
	line := []string{"replay", "--stage", "prefetcher", "--since", "1h", "--until", until, "--rate", "500"}
	var plan, ran replayReport
	p.operated(0, &plan, append(line, "--dry-run")...)
	want := map[string]uint64{
		"copied": missing + present + forgotten, "already_ready": present, "past_vendor_retention": forgotten, "vendor_calls": missing,
		"past_record_life": 0, "present": 0, "invalid": 0,
	}
	if d := cmp.Diff(want, plan.Counts); d != "" {
		t.Fatalf("plan, -want +got\n%s", d)
	}
	calls, callsFor := p.sim.Calls(), map[string]int{}
	for _, id := range ids {
		callsFor[id] = p.sim.CallsFor(id)
	}

	cmd, _ := p.operate(line...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	backfill, err := p.nats.Connect("test").JS.Stream(t.Context(), streams.StreamBackfill)
	if err != nil {
		t.Fatal(err)
	}
	point := 1 + rand.Uint64N(missing)
	streamstest.Eventually(t, fmt.Sprint(point, " copies"), func() bool {
		info, err := backfill.Info(t.Context())
		return err == nil && info.State.LastSeq >= point
	})
	_ = cmd.Process.Kill()
	_ = cmd.Wait() // "signal: killed" is what was asked for
	var status struct {
		Replays []struct {
			ID string `json:"id"`
		} `json:"replays"`
	}
	p.operated(0, &status, "status")
	if len(status.Replays) != 1 {
		t.Fatalf("%+v: killed at %d, it was through", status, point)
	}
	p.operated(0, &ran, "replay", "--resume", status.Replays[0].ID)
	if d := cmp.Diff(plan.Counts, ran.Counts); d != "" {
		t.Errorf("killed at %d; -plan +run\n%s", point, d)
	}
	if o := ran.Outcome; !ran.Settled || !o.Agrees || o.InStream != uint64(len(ids)) ||
		o.Records["ready"] != missing+present || o.Records["not_found"] != forgotten || len(o.Records) != 2 || len(o.Dead) != 0 {
		t.Errorf("killed at %d; %+v", point, ran)
	}
	if n := p.sim.Calls() - calls; n != missing {
		t.Errorf("killed at %d; %d calls, the plan says %d", point, n, missing)
	}
	for _, id := range ids[:missing] {
		if n := p.sim.CallsFor(id) - callsFor[id]; n != 1 {
			t.Errorf("killed at %d; %s was asked for %d times", point, id, n)
		}
	}
}

// trace is right about an event wherever it is.
func TestTraceKnowsEveryPlace(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	post := func(id string, subscriber int, user string) {
		t.Helper()
		if status, answer := p.send(fmt.Sprintf(`{"request_id":%q,"subscriber_id":%d,"session_id":"s","user_id":%q}`, id, subscriber, user)); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
	}
	p.sim.Always("rejected", fingerprintsim.Fault{Status: http.StatusBadRequest})
	for _, id := range []string{"ready", "rejected", "taken"} {
		post(id, 12, "user@example.com")
	}
	post("erased", 12, "erase-me@example.com")
	p.eventually("ready", record.Ready)
	p.eventually("taken", record.Ready)
	p.eventually("erased", record.Ready)
	p.eventually("rejected", record.Rejected)
	post("taken", 13, "user@example.com") // another subscriber's id: a dead letter
	old := streams.NewRecord(userEvent("expired", "user@example.com"), time.Now().Add(-25*time.Hour), record.NotFound, record.EventNotFound)
	p.seed(streams.EnrichedSubject(12), [][]byte{p.encode(old)})
	p.operated(0, nil, "erase", "--user-id", "erase-me@example.com")
	streamstest.Eventually(t, "a dead letter and nothing waiting", func() bool {
		cmd, _ := p.operate("dead", "list", "--request-id", "taken")
		waiting := 0.0
		for _, ref := range [][2]string{{streams.StreamIngest, streams.DurablePrefetcher}, {streams.StreamEnriched, streams.DurablePersister}} {
			waiting += p.lag(ref[0], ref[1])
		}
		return cmd.Run() == nil && waiting == 0
	})
	p.operated(0, nil, "pause", streams.DurablePrefetcher, "--for", "10m")
	post("waiting", 12, "user@example.com")
	for id, want := range map[string]string{
		"ready": "ready", "rejected": "rejected", "waiting": "waiting", "expired": "expired", "erased": "erased", "nobody": "not_found_anywhere",
	} {
		var r struct {
			Place string `json:"place"`
		}
		code := 0
		if id == "nobody" {
			code = 3
		}
		p.operated(code, &r, "trace", id)
		if r.Place != want && !(id == "waiting" && r.Place == "pending") {
			t.Errorf("%s is %s, want %s", id, r.Place, want)
		}
	}
	// The other subscriber's event is dead, and the record stays the first's.
	cmd, out := p.operate("trace", "taken")
	if err := cmd.Run(); err != nil || !strings.Contains(out.String(), "dead foreign_subscriber") || !strings.Contains(out.String(), "ready: its record is there") {
		t.Errorf("%v, %s", err, out)
	}
}

// lag returns the messages a durable has not finished.
func (p *pipeline) lag(stream, durable string) float64 {
	p.t.Helper()
	l, err := streams.ReadLag(p.t.Context(), p.nats.Connect("lag").JS, stream, durable)
	if err != nil {
		p.t.Fatal(err)
	}
	return float64(l.Messages())
}

// A person is erased from every stream and record while the pipeline works,
// and a replay of everything does not bring the person back.
func TestErasedStaysErased(t *testing.T) {
	t.Parallel()
	p := newPipeline(t)
	p.apply()
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	const planted = "planted@example.com"
	p.sim.Always("in-flight", fingerprintsim.Fault{Status: http.StatusNotFound}) // in the prefetcher's hands until it is there
	var ids []string
	post := func(id, user string) {
		t.Helper()
		if status, answer := p.send(fmt.Sprintf(`{"request_id":%q,"subscriber_id":12,"session_id":"s","user_id":%q}`, id, user)); status != http.StatusAccepted {
			t.Fatalf("%d %s", status, answer)
		}
	}
	post("in-flight", planted)
	for i := range 50 {
		ids = append(ids, fmt.Sprint("e", i))
		post(ids[i], []string{planted, "other@example.com"}[i%2])
	}
	for _, id := range ids {
		p.eventually(id, record.Ready)
	}
	p.seed(streams.DeadSubject(streams.StagePrefetcher, 12), [][]byte{p.encode(userEvent("dead", planted))})
	p.operated(0, nil, "replay", "--stage", "persister", "--since", "1h") // copies in FP_BACKFILL
	holds := func() (places []string) {
		js := p.nats.Connect("look").JS
		for _, d := range streams.Definition(streams.Limits{}) {
			s, err := js.Stream(t.Context(), d.Stream.Name)
			if err != nil {
				t.Fatal(err)
			}
			for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
				if m, err := s.GetMsg(t.Context(), seq); err == nil && (bytes.Contains(m.Data, []byte(planted)) || strings.Contains(fmt.Sprint(m.Header), planted)) {
					places = append(places, fmt.Sprint(d.Stream.Name, " ", seq))
				}
			}
		}
		for key, value := range p.records() {
			if strings.Contains(value, planted) {
				places = append(places, key)
			}
		}
		return places
	}
	if n := len(holds()); n < 26+25+25+1+25 {
		t.Fatalf("planted in %d places", n)
	}
	// The event in hand comes out while the erasure waits for it.
	time.AfterFunc(500*time.Millisecond, func() { p.sim.Clear("in-flight") })
	var receipt struct {
		Records    int            `json:"records"`
		Events     int            `json:"events"`
		Passes     int            `json:"passes"`
		Streams    map[string]int `json:"streams"`
		OutOfReach []string       `json:"out_of_reach"`
	}
	cmd, out := p.operate("erase", "--user-id", "-", "--json")
	cmd.Stdin = strings.NewReader(planted)
	if err := cmd.Run(); err != nil || strings.Contains(out.String(), planted) {
		t.Fatalf("%v, %s", err, out)
	}
	if err := json.Unmarshal(out.Bytes(), &receipt); err != nil {
		t.Fatal(err)
	}
	if receipt.Events != 27 || receipt.Records < 26 || receipt.Passes < 2 || len(receipt.OutOfReach) == 0 || len(receipt.Streams) != 4 {
		t.Errorf("%+v", receipt)
	}
	if places := holds(); len(places) != 0 {
		t.Errorf("after the erasure still in %v", places)
	}
	p.operated(0, nil, "replay", "--stage", "prefetcher", "--since", "1h", "--rate", "0", "--force")
	p.operated(0, nil, "replay", "--stage", "persister", "--since", "1h")
	if places := holds(); len(places) != 0 {
		t.Errorf("after the replays in %v", places)
	}
	for i, id := range ids {
		if want := []record.Status{"", record.Ready}[i%2]; p.status(id) != want {
			t.Errorf("%s is %q, want %q", id, p.status(id), want)
		}
	}
}

// BenchmarkLiveDuringReplay posts events one after the other, five times
// alone and five times beside a replay of 20,000 records, in turn, and reports
// the medians of the time from the request to the ready record.
func BenchmarkLiveDuringReplay(b *testing.B) {
	p := newPipeline(b)
	p.logs = &lockedBuffer{}
	p.apply()
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	const events = 20_000
	var bodies [][]byte
	for i := range events {
		r := streams.NewRecord(userEvent(fmt.Sprint("e", i), "user@example.com"), time.Now(), record.Ready, "")
		r.Signals = &record.Signals{}
		bodies = append(bodies, p.encode(r))
	}
	p.seed(streams.EnrichedSubject(12), bodies)
	n := 0
	median := func() time.Duration {
		var took []time.Duration
		for range 200 {
			n++
			id, start := fmt.Sprint("live", n), time.Now()
			if status, answer := p.post(id); status != http.StatusAccepted {
				b.Fatalf("%d %s", status, answer)
			}
			for p.status(id) != record.Ready {
				time.Sleep(100 * time.Microsecond)
			}
			took = append(took, time.Since(start))
		}
		slices.Sort(took)
		return took[len(took)/2]
	}
	median() // warm
	var alone, beside []time.Duration
	for b.Loop() {
		for range 5 {
			alone = append(alone, median())
			cmd, _ := p.operate("replay", "--stage", "persister", "--from-seq", "1")
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			beside = append(beside, median())
			if err := cmd.Process.Signal(os.Interrupt); err != nil {
				b.Log("the replay was over before the events were")
			}
			_ = cmd.Wait() // exit code 4: stopped with work left
		}
	}
	slices.Sort(alone)
	slices.Sort(beside)
	a, w := alone[len(alone)/2], beside[len(beside)/2]
	b.ReportMetric(float64(a.Microseconds())/1000, "ms-alone")
	b.ReportMetric(float64(w.Microseconds())/1000, "ms-beside")
	b.ReportMetric(float64(w)/float64(a), "ratio")
}

// BenchmarkLiveDuringRefetch posts events at 80 % of a quota of 200 calls a
// second, five times alone and five times beside a replay of 10,000 events for
// the prefetcher, in turn, and reports the medians of the 99th percentile of
// the time from stored to fetched, and how many calls a second were left to the
// replay.
func BenchmarkLiveDuringRefetch(b *testing.B) {
	const quota, rate, seconds, replayed = 200, 160, 10, 10_000
	p := newPipeline(b)
	p.logs = &lockedBuffer{}
	p.sim.SetLatency(50*time.Millisecond, 0)
	p.sim.SetRate(quota, 3*quota)
	p.procs["prefetcher"].env = append(p.procs["prefetcher"].env, fmt.Sprint("FINGERPRINT_RATE_LIMIT=", quota), "REDIS_URL="+p.redis.URL())
	p.apply()
	var bodies [][]byte
	for i := range replayed {
		bodies = append(bodies, p.encode(userEvent(fmt.Sprint("e", i), "user@example.com")))
	}
	p.seed(streams.IngestSubject(12), bodies)
	js := p.nats.Connect("bench").JS
	if _, err := js.ResetConsumerToSequence(b.Context(), streams.StreamIngest, streams.DurablePrefetcher, replayed+1); err != nil {
		b.Fatal(err)
	}
	p.start("ingest", "prefetcher", "persister")
	p.ready("ingest", "prefetcher", "persister")
	idle := func() {
		streamstest.Eventually(b, "nothing to be fetched", func() bool {
			for stream, durable := range map[string]string{streams.StreamIngest: streams.DurablePrefetcher, streams.StreamBackfill: streams.DurablePrefetcherBackfill} {
				if l, err := streams.ReadLag(b.Context(), js, stream, durable); err != nil || l.Messages() > 0 {
					return false
				}
			}
			return true
		})
	}
	enriched, err := js.Stream(b.Context(), streams.StreamEnriched)
	if err != nil {
		b.Fatal(err)
	}
	n := 0
	// run posts for some seconds and returns the 99th percentile, and how many
	// results there were of the replay meanwhile.
	run := func() (p99 time.Duration, copies int) {
		before, err := enriched.Info(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		begin := time.Now()
		var posting sync.WaitGroup
		for i := range rate * seconds {
			n++
			id := fmt.Sprint("live", n)
			posting.Go(func() {
				time.Sleep(time.Until(begin.Add(time.Duration(i) * time.Second / rate)))
				if status, answer := p.post(id); status != http.StatusAccepted {
					b.Errorf("%d %s", status, answer)
				}
			})
		}
		posting.Wait()
		var took []time.Duration
		for seq := before.State.LastSeq + 1; len(took) < rate*seconds; seq++ {
			var m *jetstream.RawStreamMsg
			streamstest.Eventually(b, "the next result", func() bool {
				m, err = enriched.GetMsg(b.Context(), seq)
				return err == nil
			})
			if m.Header.Get(streams.HeaderReplay) != "" {
				copies++
				continue
			}
			r, err := record.Decode(m.Data)
			if err != nil {
				b.Fatal(err)
			}
			took = append(took, m.Time.Sub(r.AcceptedAt.Time))
		}
		slices.Sort(took)
		return took[len(took)*99/100], copies
	}
	run() // warm
	var alone, beside []time.Duration
	left := 0
	for b.Loop() {
		for range 5 {
			idle()
			p99, _ := run()
			alone = append(alone, p99)
			cmd, _ := p.operate("replay", "--stage", "prefetcher", "--from-seq", "1", "--force", "--rate", "0")
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			p99, copies := run()
			beside, left = append(beside, p99), left+copies
			_ = cmd.Process.Signal(os.Interrupt)
			_ = cmd.Wait() // exit code 4: stopped with work left
		}
	}
	slices.Sort(alone)
	slices.Sort(beside)
	a, w := alone[len(alone)/2], beside[len(beside)/2]
	b.ReportMetric(float64(a.Microseconds())/1000, "p99-ms-alone")
	b.ReportMetric(float64(w.Microseconds())/1000, "p99-ms-beside")
	b.ReportMetric(float64(w)/float64(a), "ratio")
	b.ReportMetric(float64(left)/float64(len(beside)*seconds), "replayed/s")
	b.ReportMetric(float64(p.sim.CountsByStatus()[http.StatusTooManyRequests]), "429s")
	b.ReportMetric(0, "ns/op")
}
