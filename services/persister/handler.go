package persister

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// handler decides about records and pending markers.
type handler struct {
	store   recordStore
	detail  EventDetail
	metrics *metrics
	now     func() time.Time
	tracer  trace.Tracer // nil records nothing
}

// recordStore is the part of store a handler needs.
type recordStore interface {
	// put sets outcome or err of each write; an error is never the record's
	// own fault.
	put(ctx context.Context, now time.Time, batch []*write)
}

// newerSchemaWait is how long a message of a newer version waits for a newer
// replica before this one looks at it again.
const newerSchemaWait = 30 * time.Second

// persist writes what FP_ENRICHED and FP_BACKFILL carry.
func (h *handler) persist(ctx context.Context, batch []*streams.Delivery) []streams.Decision {
	return h.handle(ctx, batch, h.decode)
}

func (h *handler) decode(d *streams.Delivery) (*write, streams.Decision) {
	rec, body, err := prepare(d.Data, h.detail)
	switch {
	case errors.Is(err, record.ErrNewer):
		return nil, streams.RetryAfter(newerSchemaWait, err)
	case err != nil:
		return nil, streams.DeadLetter(streams.DeadUndecodable, err)
	case !rec.Status.Terminal():
		return nil, streams.DeadLetter(streams.DeadUndecodable, fmt.Errorf("a %s record has no place here", rec.Status))
	}
	return &write{rec: rec, body: body}, streams.Decision{}
}

// mark writes a pending marker for what FP_INGEST carries. It is a courtesy:
// whatever is wrong with the message is for the prefetcher to say.
func (h *handler) mark(ctx context.Context, batch []*streams.Delivery) []streams.Decision {
	decisions := h.handle(ctx, batch, func(d *streams.Delivery) (*write, streams.Decision) {
		e, err := streams.DecodeEvent(d.Data)
		if err != nil {
			return nil, streams.Moved() // Redis was not asked
		}
		rec := streams.NewRecord(e, d.AcceptedAt, record.Pending, "")
		body, err := rec.Encode()
		if err != nil {
			return nil, streams.Done()
		}
		return &write{rec: rec, body: body}, streams.Decision{}
	})
	for i, dec := range decisions {
		if dec.GivesUp() {
			decisions[i] = streams.Done()
		}
	}
	return decisions
}

// handle prepares each delivery, writes those that are records in one batch,
// and turns what became of them into decisions.
func (h *handler) handle(ctx context.Context, batch []*streams.Delivery, prepare func(*streams.Delivery) (*write, streams.Decision)) []streams.Decision {
	decisions := make([]streams.Decision, len(batch))
	writes := make([]*write, 0, len(batch))
	index := make([]int, 0, len(batch))
	for i, d := range batch {
		if d.Poison() {
			decisions[i] = streams.DeadLetter(streams.DeadPoison, errors.New("handling it kept failing hard"))
			continue
		}
		w, dec := prepare(d)
		if w == nil {
			decisions[i] = dec
			continue
		}
		d.RequestID = w.rec.RequestID
		w.ctx, w.span = streams.StartSpan(d.Context(ctx), h.tracer, "persist", trace.SpanKindConsumer)
		writes, index = append(writes, w), append(index, i)
	}
	if len(writes) == 0 {
		return decisions
	}
	start := time.Now()
	// Once begun, a write is finished even when the process stops: it takes
	// half a second at most.
	h.store.put(context.WithoutCancel(ctx), h.now(), writes)
	h.metrics.batch(len(writes), time.Since(start))
	for k, w := range writes {
		d := batch[index[k]]
		decisions[index[k]] = decide(w)
		w.endSpan(len(writes))
		if w.err == nil {
			h.metrics.record(w, d, h.now())
		}
	}
	return decisions
}

// endSpan ends the span of a write in a batch of n.
func (w *write) endSpan(n int) {
	if !w.span.IsRecording() {
		return
	}
	w.span.SetAttributes(attribute.String("fp.request_id", w.rec.RequestID), attribute.String("fp.status", string(w.rec.Status)),
		attribute.String("fp.outcome", string(w.outcome)), attribute.String("db.system.name", "redis"), attribute.Int("db.operation.batch.size", n))
	if w.err != nil {
		w.span.SetStatus(codes.Error, "not written")
	}
	w.span.End()
}

func decide(w *write) streams.Decision {
	switch {
	case w.err != nil:
		return streams.Hold(streams.CauseRedis, w.err)
	case w.outcome == expired:
		return streams.Moved() // Redis was not asked
	case w.outcome == foreign:
		return streams.DeadLetter(streams.DeadForeign, errors.New("the record belongs to another subscriber"))
	case w.outcome == unreadable:
		return streams.DeadLetter(streams.DeadUnwritable, errors.New("the key holds something that is not a record"))
	}
	return streams.Done()
}
