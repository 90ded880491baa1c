package streams_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// A dead letter carries the original's headers but not its id and what it
// expected of its stream: those would make FP_DEAD refuse or swallow it.
func TestDeadLetterKeepsTheHeadersThatAreOurs(t *testing.T) {
	s := newStage(t)
	accepted := time.Date(2026, 11, 23, 9, 8, 7, 6, time.UTC)
	_, err := s.conn.JS.PublishMsg(t.Context(), &nats.Msg{Subject: "fp.ingest.12", Data: []byte("body"), Header: nats.Header{
		"traceparent": {"00-a-b-01"}, streams.HeaderReplay: {"r1"}, streams.HeaderAcceptedAt: {accepted.Format(time.RFC3339Nano)},
	}}, jetstream.WithMsgID("original"), jetstream.WithExpectStream(streams.StreamIngest))
	if err != nil {
		t.Fatal(err)
	}
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
		return streams.DeadLetter(streams.DeadExhausted, nil)
	}))
	s.settled()
	dead := s.dead()
	if len(dead) != 1 {
		t.Fatalf("%d dead letters", len(dead))
	}
	h := dead[0].Header
	for name, want := range map[string]string{
		"traceparent": "00-a-b-01", streams.HeaderReplay: "r1", streams.HeaderAcceptedAt: "2026-11-23T09:08:07.000000006Z",
		streams.HeaderDeadReason: "exhausted", streams.HeaderDeadError: "exhausted", streams.HeaderDeadConsumer: "prefetcher", jetstream.ExpectedStreamHeader: streams.StreamDead,
	} {
		if got := h.Get(name); got != want {
			t.Errorf("%s = %q, want %q", name, got, want)
		}
	}
	if id := h.Get(jetstream.MsgIDHeader); !strings.HasPrefix(id, "dead:prefetcher:1:") {
		t.Errorf("id %q", id)
	}
	if at, err := time.Parse(time.RFC3339Nano, h.Get(streams.HeaderDeadAt)); err != nil || time.Since(at).Abs() > time.Minute {
		t.Errorf("dead at %v, %v", at, err)
	}
}

// An error's text is bounded, stays text, and cannot add a header of its own.
func TestDeadLetterErrorIsBounded(t *testing.T) {
	s := newStage(t)
	s.publish("bad")
	s.start(streams.Each(func(context.Context, *streams.Delivery) streams.Decision {
		return streams.DeadLetter(streams.DeadUndecodable, errors.New("first line\r\nFp-Dead-Reason: forged\r\n"+strings.Repeat("ü", 300)))
	}))
	s.settled()
	dead := s.dead()
	if len(dead) != 1 {
		t.Fatalf("%d dead letters", len(dead))
	}
	h := dead[0].Header
	if got := h.Values(streams.HeaderDeadReason); len(got) != 1 || got[0] != "undecodable" {
		t.Errorf("reason %q", got)
	}
	text := h.Get(streams.HeaderDeadError)
	if !strings.HasPrefix(text, "first line") || len(text) > 256 || !utf8.ValidString(text) {
		t.Errorf("%d bytes: %q", len(text), text)
	}
}

func TestSubjectSubscriber(t *testing.T) {
	t.Parallel()
	for subject, want := range map[string]int64{
		streams.IngestSubject(12): 12, streams.EnrichedSubject(1<<53 - 1): 1<<53 - 1, streams.BackfillSubject("prefetcher", 7): 7, streams.DeadSubject("persister", 0): 0,
		"fp.ingest.": 0, "fp.ingest.x": 0, "fp.ingest.-5": 0, "fp.ingest.99999999999999999999": 0, "": 0, "12": 12,
	} {
		if got := streams.SubjectSubscriber(subject); got != want {
			t.Errorf("%q: %d, want %d", subject, got, want)
		}
	}
}

func TestSubjects(t *testing.T) {
	t.Parallel()
	for got, want := range map[string]string{
		streams.IngestSubject(12): "fp.ingest.12", streams.EnrichedSubject(12): "fp.enriched.12",
		streams.BackfillSubject(streams.StagePersister, 12): "fp.backfill.persister.12", streams.DeadSubject(streams.StagePrefetcher, 0): "fp.dead.prefetcher.0",
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}
