// Package streams is the contract between the stages: the names of streams,
// subjects and durables, what travels on them, and the one way to publish and
// to consume.
//
//	client ─POST─▶ ingest ─fp.ingest.<sub>─▶ FP_INGEST ─▶ prefetcher ─fp.enriched.<sub>─▶ FP_ENRICHED ─▶ persister ─▶ Redis
//	                                                          └───────── fp.dead.<stage>.<sub> ─▶ FP_DEAD
//	                 replays, redrives: fp.backfill.<stage>.<sub> ─▶ FP_BACKFILL ─▶ the same stages
//
// A stage is a [Consumer] with a handler that returns a [Decision]; only the
// consumer acknowledges. One actor, streamctl apply, creates what [Ensure]
// defines; the services look it up and need no right to create anything.
package streams

import (
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// The streams.
const (
	StreamIngest   = "FP_INGEST"   // accepted ingest events
	StreamEnriched = "FP_ENRICHED" // records: an event with its data, or its negative outcome
	StreamBackfill = "FP_BACKFILL" // copies of the above: replays, redrives, live events too old to go first
	StreamDead     = "FP_DEAD"     // what was given up on, and why; for people
	StreamAudit    = "FP_AUDIT"    // who used streamctl to change or reveal something; no personal data
)

// The stages, by the name of their service.
const (
	StagePrefetcher = "prefetcher"
	StagePersister  = "persister"
)

// The durable consumers.
const (
	DurablePrefetcher         = "prefetcher"
	DurablePrefetcherBackfill = "prefetcher-backfill"
	DurablePersister          = "persister"
	DurablePersisterBackfill  = "persister-backfill"
	// DurablePending writes pending markers from FP_INGEST: a courtesy to
	// scorers, which never holds anything else up.
	DurablePending = "persister-pending"
)

// A subject ends in the subscriber's number and holds nothing else of a
// client's: request ids contain dots, and a long subject would make the server
// close the connection for good.

// IngestSubject returns fp.ingest.<subscriber>.
func IngestSubject(subscriberID int64) string { return subject("fp.ingest.", subscriberID) }

// EnrichedSubject returns fp.enriched.<subscriber>.
func EnrichedSubject(subscriberID int64) string { return subject("fp.enriched.", subscriberID) }

// BackfillSubject returns fp.backfill.<stage>.<subscriber>.
func BackfillSubject(stage string, subscriberID int64) string {
	return subject("fp.backfill."+stage+".", subscriberID)
}

// DeadSubject returns fp.dead.<stage>.<subscriber>; subscriber 0 stands for a
// message whose subject does not say.
func DeadSubject(stage string, subscriberID int64) string {
	return subject("fp.dead."+stage+".", subscriberID)
}

// AuditSubject returns fp.audit.<verb>, for a word of streamctl's.
func AuditSubject(verb string) string { return "fp.audit." + verb }

func subject(prefix string, subscriberID int64) string {
	return string(strconv.AppendInt([]byte(prefix), subscriberID, 10))
}

// QuotaKey is where the prefetchers share the vendor's quota in Redis. There is
// one workspace and key of the vendor's per deployment, so there is one.
const QuotaKey = "fp:quota:fingerprint"

// AckWait is how long the server waits for an ack or a sign of progress before
// it hands a message to another replica.
const AckWait = 30 * time.Second

// dedupeWindow bounds how long a repeated message id is recognised. The server
// keeps every id of the window in memory, about 130 bytes each.
const dedupeWindow = 10 * time.Minute

// Limits is what differs between deployments.
type Limits struct {
	// Replicas of each stream: 1 locally, 3 in production.
	Replicas int
	// MaxBytes overrides the size limit of streams by name, in bytes.
	MaxBytes map[string]int64
	// Keep has Diff and Ensure leave as the server has it what Replicas, at 0,
	// and MaxBytes do not name. A stream that is missing gets the replicas of
	// the others.
	Keep bool
}

const (
	kib = 1 << 10
	gib = 1 << 30
)

// Definition returns every stream with its durables: the only definition
// there is.
//
// All streams keep by limits, so that history can be replayed; refuse new
// messages when full, since dropping old ones would lose events nobody has
// processed; and allow deletion, since a person may have to be erased. Only
// FP_AUDIT, which holds nothing personal, does not.
// Durables deliver everything and never give up by themselves: a server-side
// delivery limit would drop messages silently.
func Definition(l Limits) []StreamDefinition {
	stream := func(name, subjects string, maxAge time.Duration, maxMsg int32, maxBytes int64, durables ...jetstream.ConsumerConfig) StreamDefinition {
		if n, ok := l.MaxBytes[name]; ok {
			maxBytes = n
		}
		return StreamDefinition{
			Stream: jetstream.StreamConfig{
				Name: name, Subjects: []string{subjects},
				// Not compressed: after a kill -9, nats-server 2.15.2 may append to a
				// block that it had compressed, on every replica at once, and the
				// stream can neither be read nor written any more. The fault suite
				// (seed 11, kill-nats-*) found that.
				Storage: jetstream.FileStorage, Compression: jetstream.NoCompression, Replicas: max(l.Replicas, 1),
				Retention: jetstream.LimitsPolicy, Discard: jetstream.DiscardNew,
				MaxAge: maxAge, MaxMsgSize: maxMsg, MaxBytes: maxBytes, MaxMsgs: -1, MaxMsgsPerSubject: -1, MaxConsumers: -1,
				Duplicates: dedupeWindow, AllowDirect: true,
			},
			Durables: durables,
		}
	}
	durable := func(name, filter string) jetstream.ConsumerConfig {
		return jetstream.ConsumerConfig{
			Durable: name, FilterSubject: filter, DeliverPolicy: jetstream.DeliverAllPolicy,
			AckPolicy: jetstream.AckExplicitPolicy, AckWait: AckWait, MaxDeliver: -1,
			// Shared by all replicas, parked messages included.
			MaxAckPending: 20_000, MaxWaiting: 512, ReplayPolicy: jetstream.ReplayInstantPolicy,
		}
	}
	// What is evidence cannot be deleted, and the server refuses to change that
	// later.
	audit := stream(StreamAudit, "fp.audit.*", 365*24*time.Hour, 64*kib, gib/4)
	audit.Stream.DenyDelete, audit.Stream.DenyPurge = true, true
	return []StreamDefinition{
		stream(StreamIngest, "fp.ingest.*", 72*time.Hour, 96*kib, 1*gib,
			durable(DurablePrefetcher, "fp.ingest.*"), durable(DurablePending, "fp.ingest.*")),
		stream(StreamEnriched, "fp.enriched.*", 72*time.Hour, 512*kib, 4*gib,
			durable(DurablePersister, "fp.enriched.*")),
		stream(StreamBackfill, "fp.backfill.*.*", 72*time.Hour, 512*kib, 1*gib,
			durable(DurablePrefetcherBackfill, "fp.backfill.prefetcher.*"), durable(DurablePersisterBackfill, "fp.backfill.persister.*")),
		stream(StreamDead, "fp.dead.*.*", 7*24*time.Hour, 640*kib, 1*gib),
		audit,
	}
}

// StreamDefinition is one stream and the durables that read it.
type StreamDefinition struct {
	Stream   jetstream.StreamConfig
	Durables []jetstream.ConsumerConfig
}
