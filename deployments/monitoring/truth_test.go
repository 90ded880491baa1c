package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestConservation runs into one fault after another and then adds up, from
// metrics alone: what was stored has ended or waits.
func TestConservation(t *testing.T) {
	p := newPipeline(t)
	sent := 0
	post := func(n int) {
		for range n {
			sent++
			p.post(fmt.Sprintf("id-%d", sent), int64(sent%7+1)) // a 503 may be stored too, and then counts
		}
	}
	post(50)
	p.post("id-1", 99) // another subscriber's
	admin := p.nats.Connect("test")
	publish := func(stream, subject, body string, header nats.Header) {
		t.Helper()
		pub := streams.NewPublisher(admin.JS, prometheus.NewRegistry())
		if _, err := pub.Publish(t.Context(), streams.Message{Stream: stream, Subject: subject, ID: subject + body, Header: header, Body: []byte(body)}); err != nil {
			t.Fatal(err)
		}
	}
	publish(streams.StreamIngest, streams.IngestSubject(5), "not an event", nil)
	streamstest.Eventually(t, "a first record", func() bool { return p.sum("fp_pipeline_end_to_end_seconds") >= 50 })
	// A replay of something that is ready, and of a heartbeat.
	copied := nats.Header{streams.HeaderAcceptedAt: {time.Now().Add(-time.Hour).UTC().Format(time.RFC3339Nano)}, streams.HeaderReplay: {"r"}}
	publish(streams.StreamBackfill, streams.BackfillSubject(streams.StagePrefetcher, 3), `{"schema":1,"request_id":"id-2","subscriber_id":3,"session_id":"s","user_id":"u"}`, copied)
	publish(streams.StreamBackfill, streams.BackfillSubject(streams.StagePrefetcher, streams.HeartbeatSubscriber), `{}`, copied)

	p.sim.SetFault(&fingerprintsim.Fault{Status: 503})
	post(30)
	streamstest.Eventually(t, "a hold", func() bool { return p.sum("fp_stage_holding", "cause", "fingerprint") > 0 })
	p.sim.SetFault(nil)
	p.redis.Kill()
	post(30)
	streamstest.Eventually(t, "a hold", func() bool { return p.sum("fp_stage_holding", "cause", "redis") > 0 })
	p.redis.Start()
	for _, name := range []string{"persister", "prefetcher"} {
		post(30)
		p.stop[name]()
		post(30)
		p.start(name)
	}
	p.nats.Stop()
	post(3)
	p.nats.Start()
	streamstest.Eventually(t, "the edge to accept again", func() bool {
		sent++
		return p.post(fmt.Sprintf("id-%d", sent), 1) == http.StatusAccepted
	})
	post(50)

	var stored, ended, waiting float64
	deadline := time.Now().Add(time.Minute)
	for {
		stored, waiting = 0, 0
		exporter := p.gather("exporter") // one scrape, as Prometheus sees it
		for _, stream := range []string{"FP_INGEST", "FP_BACKFILL"} {
			stored += sumOf(exporter["fp_stream_last_sequence"], []string{"stream", stream})
		}
		for _, consumer := range []string{"prefetcher", "prefetcher-backfill", "persister", "persister-backfill"} {
			waiting += sumOf(exporter["fp_consumer_lag_messages"], []string{"consumer", consumer}) + sumOf(exporter["fp_consumer_ack_pending_messages"], []string{"consumer", consumer})
		}
		stored -= p.sum("fp_prefetch_moved_total")
		ended = p.sum("fp_persist_records_total") - p.sum("fp_persist_records_total", "status", "pending") +
			p.sum("fp_prefetch_skipped_total") - p.sum("fp_prefetch_skipped_total", "reason", "retention") +
			p.sum("fp_stage_dead_lettered_total", "reason", "undecodable")
		if stored == ended && waiting == 0 && stored > float64(sent-10) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("stored %v, ended %v, waiting %v of %d sent", stored, ended, waiting, sent)
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("%v stored, as many ended", stored)
}

// TestLagGrowsWhileItsStageIsFrozen stops every process of a stage as kill
// -STOP does: nobody of that stage can count any more, and the age of what
// waits still grows by a second a second.
func TestLagGrowsWhileItsStageIsFrozen(t *testing.T) {
	f := newFleet(t, services...)
	f.signal("persister", syscall.SIGSTOP)
	if code := f.post("1A2B3C4D5E", 12); code != http.StatusAccepted {
		t.Fatalf("answer %d", code)
	}
	lag := func() float64 {
		page, err := get(t, f.ops["exporter"], "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(page) {
			if strings.HasPrefix(line, `fp_consumer_lag_seconds{consumer="persister",`) {
				v, err := strconv.ParseFloat(strings.Fields(line)[1], 64)
				if err != nil {
					t.Fatal(err)
				}
				return v
			}
		}
		return 0
	}
	// More than a poll takes: a message that only passed by is gone by then.
	streamstest.Eventually(t, "lag", func() bool { return lag() > 6 })
	from, begun := lag(), time.Now()
	for i := range 10 {
		<-time.After(time.Second) // what is measured is time itself
		grown, took := lag()-from, time.Since(begun).Seconds()
		if share := grown / took; i > 1 && (share < 0.95 || share > 1.05) {
			t.Fatalf("after %.2f s lag has grown by %.2f s", took, grown)
		}
	}
	f.signal("persister", syscall.SIGCONT)
	streamstest.Eventually(t, "no lag", func() bool { return lag() == 0 })
}

// TestScrapesAskNATSNothing counts everything that passes through NATS while
// every service is scraped hundreds of times.
func TestScrapesAskNATSNothing(t *testing.T) {
	p := newPipeline(t)
	streamstest.Eventually(t, "a heartbeat at its end", func() bool {
		return p.sum("fp_stage_heartbeat_timestamp_seconds", "stage", "persister") > 0
	})
	conn := p.nats.Connect("listener")
	var messages atomic.Int64
	if _, err := conn.NC.Subscribe(">", func(*nats.Msg) { messages.Add(1) }); err != nil {
		t.Fatal(err)
	}
	if err := conn.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	count := func(scrapes int) int64 {
		begun, before := time.Now(), messages.Load()
		for range scrapes {
			for _, name := range services {
				w := httptest.NewRecorder()
				p.processes[name].Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
				if w.Code != http.StatusOK || w.Body.Len() < 1000 {
					t.Fatalf("%s answers %d", name, w.Code)
				}
			}
		}
		if err := conn.NC.Flush(); err != nil {
			t.Fatal(err)
		}
		n := messages.Load() - before
		t.Logf("%d messages in %v with %d scrapes", n, time.Since(begun), 4*scrapes)
		// The pulls and polls that go on anyway.
		return n - int64(time.Since(begun).Seconds()*200)
	}
	if n := count(200); n > 200 {
		t.Errorf("%d messages too many for 800 scrapes", n)
	}
}

// BenchmarkScrape is the time of one scrape of each service, while events go
// through.
func BenchmarkScrape(b *testing.B) {
	p := newPipeline(b)
	done := make(chan struct{})
	var load sync.WaitGroup
	load.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-time.After(5 * time.Millisecond):
				p.post(fmt.Sprintf("id-%d", i), int64(i%100+1))
			}
		}
	})
	defer load.Wait()
	defer close(done)
	for _, name := range services {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				p.processes[name].Handler().ServeHTTP(httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil))
			}
		})
	}
}
