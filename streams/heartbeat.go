package streams

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// A heartbeat is a synthetic event that proves the pipeline alive when no
// client sends anything. It goes where events go: FP_INGEST, the prefetcher,
// FP_ENRICHED, the persister, a record in Redis. Only the call to the vendor
// is left out, since it would cost quota. Each stage exports the time of the
// last one it passed on.
const (
	// HeartbeatSubscriber owns the heartbeats. It is one more than the
	// largest number a client may send.
	HeartbeatSubscriber = 1 << 53
	// heartbeatID is outside the grammar of request ids, so no client can
	// take its record.
	heartbeatID = "_heartbeat"
	// HeartbeatPeriod is how often one is sent.
	HeartbeatPeriod = 15 * time.Second
)

// Heartbeat reports whether d is a heartbeat or a copy of one.
func (d *Delivery) Heartbeat() bool { return SubjectSubscriber(d.Subject) == HeartbeatSubscriber }

// HeartbeatRecord returns the record of a heartbeat, and the message that
// brings it to the persister.
func HeartbeatRecord(acceptedAt time.Time) (Message, error) {
	r := NewRecord(Event{RequestID: heartbeatID, SubscriberID: HeartbeatSubscriber}, acceptedAt, record.Ready, "")
	r.Signals = &record.Signals{}
	body, err := r.Encode()
	if err != nil {
		return Message{}, fmt.Errorf("encode heartbeat: %w", err)
	}
	return Message{Stream: StreamEnriched, Subject: EnrichedSubject(HeartbeatSubscriber), ID: DerivedMessageID(r, ""), Body: body}, nil
}

// HeartbeatGauge registers the time of the last heartbeat that stage passed
// on, and returns what sets it. There is no series before the first.
func HeartbeatGauge(reg prometheus.Registerer, stage string) (passed func(sent time.Time)) {
	g := promauto.With(reg).NewGaugeVec(prometheus.GaugeOpts{
		Name: "fp_stage_heartbeat_timestamp_seconds",
		Help: "When the latest heartbeat was stored that this stage passed on; the persister has written its record.",
	}, []string{"stage"})
	return func(sent time.Time) { g.WithLabelValues(stage).Set(float64(sent.UnixMilli()) / 1000) }
}

// RunHeartbeat sends a heartbeat every [HeartbeatPeriod] until ctx is done.
func RunHeartbeat(ctx context.Context, pub *Publisher, log *slog.Logger, reg prometheus.Registerer) {
	sent := HeartbeatGauge(reg, "exporter")
	for {
		now := time.Now()
		body, err := json.Marshal(Event{Schema: EventSchema, RequestID: heartbeatID, SubscriberID: HeartbeatSubscriber})
		if err == nil {
			_, err = pub.Publish(ctx, Message{
				Stream: StreamIngest, Subject: IngestSubject(HeartbeatSubscriber),
				ID: "heartbeat:" + strconv.FormatInt(now.UnixNano(), 10), Body: body,
			})
		}
		pause := HeartbeatPeriod
		if err == nil {
			sent(now)
		} else {
			log.Debug("cannot send heartbeat", "err", err)
			pause = time.Second
		}
		if !sleep(ctx, pause) {
			return
		}
	}
}
