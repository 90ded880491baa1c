package prefetcher

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/singleflight"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// The vendor answers 404 for what is not there yet and for what never was.
// An event counts as never there after this budget, counted from the first
// 404 and not from the event's age, and after so many looks.
const (
	notFoundBudget = 30 * time.Second
	notFoundLooks  = 3
)

// lookAgain is how long after each 404 the next look is.
func lookAgain(looks int) time.Duration {
	schedule := [...]time.Duration{
		500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 15 * time.Second,
	}
	return schedule[min(looks, len(schedule))-1]
}

// backoff is how long after the n-th failure in a row an event is tried again:
// doubling from half a second to a minute, plus or minus a quarter.
func backoff(n int) time.Duration {
	d := min(500*time.Millisecond<<min(n-1, 10), time.Minute)
	return d*3/4 + rand.N(d/2)
}

// newerSchemaWait is how long an event of a newer version waits for a newer
// replica before this one looks at it again.
const newerSchemaWait = 30 * time.Second

// eventGetter answers one call about one event. *Fingerprint is the real one.
type eventGetter interface {
	Event(ctx context.Context, id string) Answer
}

// publisher stores a message and returns once the stream has it.
type publisher interface {
	Publish(ctx context.Context, m streams.Message) (streams.Ack, error)
}

// recordGetter returns the record of a request id, nil when there is none or it
// cannot be had.
type recordGetter interface {
	Record(ctx context.Context, id string) *record.Record
}

// handler decides about accepted events.
type handler struct {
	vendor    eventGetter
	publisher publisher
	records   recordGetter // nil without Redis
	quota     *quota
	breaker   breaker
	places    places
	flights   singleflight.Group // calls under way, by request id
	live      lane
	backlog   lane
	maxAge    time.Duration
	fresh     time.Duration // age from which a live event makes way for newer ones
	retention time.Duration // of the vendor's events; 0 is unlimited
	now       func() time.Time
	metrics   *metrics
	tracer    trace.Tracer // nil records nothing
}

// lane holds one for each call under way, or waiting for its token: so a token
// is spent the moment it is had, and the rate is the vendor's too. Live events
// and backfill have one each, since backfill waits long.
type lane chan struct{}

// look is what is known about an event from earlier looks at it.
type look struct {
	attempts  int       // calls spent
	fetchedAt time.Time // of the last answer
	failures  int       // transient ones in a row
	reason    record.Reason
	notFound  int       // 404s
	since     time.Time // of the first one

	// end is set once it is known how the event ends; what remains is to
	// publish it. It is kept so that a stream that refuses it costs no
	// second call.
	end       *record.Record
	dead      streams.DeadReason // set when the event also is to be dead-lettered
	published bool               // what remains is the dead letter
}

// handle looks at one event: at most one call, at most one result.
func (h *handler) handle(ctx context.Context, d *streams.Delivery) streams.Decision {
	if d.Heartbeat() {
		return h.passOn(ctx, d)
	}
	e, err := streams.DecodeEvent(d.Data)
	switch {
	case errors.Is(err, streams.ErrNewerSchema):
		return streams.RetryAfter(newerSchemaWait, err)
	case err != nil:
		return streams.DeadLetter(streams.DeadUndecodable, err)
	}
	d.RequestID = e.RequestID
	ctx, span := streams.StartSpan(d.Context(ctx), h.tracer, "prefetch", trace.SpanKindConsumer)
	defer span.End()
	l, ok := d.Memo.(*look)
	if !ok {
		l = &look{}
		d.Memo = l
	}
	if span.IsRecording() {
		span.SetAttributes(attribute.String("fp.request_id", e.RequestID), attribute.String("fp.mode", d.Mode()), attribute.Int("fp.look", d.Looks+1))
	}
	if l.end == nil {
		if d.Mode() == "live" {
			crowded := h.places.enter(e.SubscriberID)
			defer h.places.leave(e.SubscriberID)
			if dec, settled := h.makeWay(ctx, d, e, l, crowded); settled {
				return dec
			}
		}
		if dec, done := h.ask(ctx, d, e, l); !done {
			return dec
		}
	}
	return h.conclude(ctx, d, l)
}

// passOn publishes a heartbeat's record, without a call; a copy of a heartbeat
// proves nothing. It says nothing about the vendor, so it ends no hold.
func (h *handler) passOn(ctx context.Context, d *streams.Delivery) streams.Decision {
	if d.Mode() == "backfill" {
		h.metrics.skipped.WithLabelValues("heartbeat").Inc()
		return streams.Moved()
	}
	m, err := streams.HeartbeatRecord(d.AcceptedAt)
	if err != nil {
		return streams.DeadLetter(streams.DeadUndecodable, err)
	}
	if _, err := h.publisher.Publish(context.WithoutCancel(ctx), m); err != nil {
		return streams.Hold(streams.CauseNATS, err)
	}
	h.metrics.heartbeat(d.AcceptedAt)
	return streams.Moved()
}

// makeWay moves a live event to FP_BACKFILL when newer ones wait behind it and
// it is too old to go before them, or its subscriber has taken half of the
// places. It returns true when the event is settled by that.
func (h *handler) makeWay(ctx context.Context, d *streams.Delivery, e streams.Event, l *look, crowded bool) (streams.Decision, bool) {
	age := h.now().Sub(d.AcceptedAt)
	old := age > h.fresh
	switch {
	case !d.NewerWait || !old && !crowded:
		return streams.Decision{}, false
	case l.notFound > 0 || age > h.maxAge || d.Poison():
		// Its looks would start anew, or it ends here and now anyway.
		return streams.Decision{}, false
	}
	m := streams.Message{
		Stream: streams.StreamBackfill, Subject: streams.BackfillSubject(streams.StagePrefetcher, e.SubscriberID),
		ID:          streams.DerivedMessageID(streams.NewRecord(e, d.AcceptedAt, record.Pending, ""), ""),
		TraceParent: streams.TraceParent(ctx), Header: d.CopyHeader(), Body: d.Data,
	}
	switch _, err := h.publisher.Publish(context.WithoutCancel(ctx), m); {
	case errors.Is(err, streams.ErrStreamFull):
		return streams.Decision{}, false // nowhere to go: then in its turn
	case err != nil:
		return streams.Hold(streams.CauseNATS, err), true
	}
	reason := "old"
	if !old {
		reason = "crowded"
	}
	h.metrics.moved.WithLabelValues(reason).Inc()
	return streams.Moved(), true
}

// ask makes a call unless the event is past it, and either sets l.end and
// returns true, or returns what to do until the next look.
func (h *handler) ask(ctx context.Context, d *streams.Delivery, e streams.Event, l *look) (streams.Decision, bool) {
	end := func(status record.Status, reason record.Reason) (streams.Decision, bool) {
		r := streams.NewRecord(e, d.AcceptedAt, status, reason)
		r.Attempts = l.attempts
		if l.attempts > 0 {
			r.FetchedAt = record.At(l.fetchedAt)
		}
		l.end = &r
		return streams.Decision{}, true
	}
	switch {
	case d.Poison():
		l.dead = streams.DeadPoison
		return end(record.Failed, record.Poison)
	case h.now().Sub(d.AcceptedAt) > h.maxAge:
		l.dead = streams.DeadExhausted
		if l.reason == "" {
			l.reason = record.TooOld
		}
		return end(record.Failed, l.reason)
	}

	if d.Mode() == "backfill" && l.attempts == 0 && h.isReady(ctx, d, e) {
		h.metrics.skipped.WithLabelValues("ready").Inc()
		return streams.Done(), false
	}
	if h.retention > 0 {
		if made, ok := madeAt(e.RequestID); ok && h.now().Sub(made) > h.retention {
			h.metrics.skipped.WithLabelValues("retention").Inc()
			return end(record.NotFound, record.EventNotFound)
		}
	}

	a, later, err := h.call(ctx, callPriority(d, l), e)
	switch {
	case err != nil:
		return streams.RetryAfter(0, err), false
	case later > 0:
		return streams.RetryAfter(later, errNoToken), false
	}
	l.attempts++
	l.fetchedAt = h.now()

	switch a.Outcome {
	case Found:
		h.breaker.ok()
		dec, done := end(record.Ready, "")
		checks := a.Checks(e.RequestID, e.SessionID, e.UserID, d.AcceptedAt)
		l.end.Source, l.end.Checks, l.end.Signals, l.end.Event = record.SourceAPI, &checks, &a.Signals, a.Body
		return dec, done
	case Rejected:
		h.breaker.ok()
		return end(record.Rejected, record.EventIDInvalid)
	case NotFound:
		h.breaker.ok()
		if l.notFound == 0 {
			l.since = l.fetchedAt
		}
		l.notFound++
		if l.notFound >= notFoundLooks && l.fetchedAt.Sub(l.since) >= notFoundBudget {
			return end(record.NotFound, record.EventNotFound)
		}
		return streams.RetryAfter(lookAgain(l.notFound), a.Err), false
	case Throttled:
		pause := a.RetryAfter
		if pause == 0 {
			pause = throttlePause
		}
		h.quota.pause(ctx, pause)
		l.reason = record.UpstreamUnavailable
		return streams.RetryAfter(0, a.Err), false
	case Misconfigured:
		l.reason = record.Configuration
		if h.breaker.fail(a.Outcome, e.RequestID) {
			return streams.Hold(streams.CauseConfiguration, a.Err), false
		}
	case Malformed:
		l.reason = record.UpstreamMalformed
		if h.breaker.fail(a.Outcome, e.RequestID) {
			return streams.Hold(streams.CauseVendor, a.Err), false
		}
	default: // Transient
		l.reason = record.UpstreamUnavailable
		if h.breaker.fail(a.Outcome, e.RequestID) {
			return streams.Hold(streams.CauseVendor, a.Err), false
		}
	}
	l.failures++
	return streams.RetryAfter(backoff(l.failures), a.Err), false
}

// isReady reports whether what a copy asks for is there already.
func (h *handler) isReady(ctx context.Context, d *streams.Delivery, e streams.Event) bool {
	if h.records == nil || d.Header.Get(streams.HeaderForce) == "1" {
		return false
	}
	r := h.records.Record(ctx, e.RequestID)
	return r != nil && r.Status == record.Ready && r.SubscriberID == e.SubscriberID && !r.AcceptedAt.Before(d.AcceptedAt)
}

var errNoToken = errors.New("no call to spare for a later look")

// call makes a call when the quota allows it. An id that is being asked for
// already is not asked for twice. A later look does not wait for its token,
// since it would keep a first one from its place: later then says when to come
// again.
func (h *handler) call(ctx context.Context, p priority, e streams.Event) (a Answer, later time.Duration, err error) {
	type flown struct {
		answer Answer
		later  time.Duration
	}
	lane, flight := h.live, "live "+e.RequestID
	if p == backfill { // nothing live waits for its token
		lane, flight = h.backlog, "backfill "+e.RequestID
	}
	mine := false
	v, err, _ := h.flights.Do(flight, func() (any, error) {
		mine = true
		start := h.now()
		if p == laterLook {
			select {
			case lane <- struct{}{}:
			default:
				return flown{later: time.Second + rand.N(time.Second)}, nil
			}
		} else {
			select {
			case lane <- struct{}{}:
			case <-ctx.Done():
				return flown{}, context.Cause(ctx)
			}
		}
		defer func() { <-lane }()
		if p == laterLook {
			if d := h.quota.try(ctx, p); d > 0 {
				return flown{later: d + rand.N(d)}, nil
			}
		} else if err := h.quota.wait(ctx, p, e.SubscriberID); err != nil {
			return flown{}, err
		}
		if ctx.Err() != nil {
			return flown{}, context.Cause(ctx)
		}
		asked := h.now()
		h.metrics.wait.Observe(asked.Sub(start).Seconds())
		// Once begun, a call is finished even when the process stops: it
		// is paid for, and has a time limit of its own.
		callCtx, span := streams.StartSpan(context.WithoutCancel(ctx), h.tracer, "GET /v4/events/{event_id}", trace.SpanKindClient)
		a := h.vendor.Event(callCtx, e.RequestID)
		if span.IsRecording() {
			span.SetAttributes(attribute.String("fp.outcome", a.Outcome.String()))
			if a.Err != nil && a.Outcome != NotFound {
				span.SetStatus(codes.Error, a.Outcome.String())
			}
			span.End()
		}
		h.metrics.call(callCtx, a.Outcome, h.now().Sub(asked))
		return flown{answer: a}, nil
	})
	if err != nil {
		return Answer{}, 0, err
	}
	f := v.(flown)
	if !mine && f.later == 0 {
		h.metrics.coalesced.Inc()
	}
	return f.answer, f.later, nil
}

// madeAt reads the time from an id of the vendor's own form: 13 digits of Unix
// milliseconds, a dot and six alphanumerics.
func madeAt(id string) (time.Time, bool) {
	ms, rest, _ := strings.Cut(id, ".")
	if len(ms) != 13 || len(rest) != 6 || strings.ContainsAny(rest, "._-") {
		return time.Time{}, false
	}
	n, err := strconv.ParseUint(ms, 10, 63)
	if err != nil {
		return time.Time{}, false
	}
	return time.UnixMilli(int64(n)), true
}

func callPriority(d *streams.Delivery, l *look) priority {
	switch {
	case d.Mode() == "backfill":
		return backfill
	case l.notFound > 0:
		return laterLook
	}
	return firstLook
}

// conclude publishes how the event ended, once, and has it dead-lettered if it
// is to be.
func (h *handler) conclude(ctx context.Context, d *streams.Delivery, l *look) streams.Decision {
	if !l.published {
		if dec := h.publish(ctx, d, l); !dec.IsDone() {
			return dec
		}
		l.published = true
	}
	if l.dead != "" {
		return streams.DeadLetter(l.dead, fmt.Errorf("%s after %d calls", l.end.Reason, l.attempts))
	}
	return streams.Done()
}

func (h *handler) publish(ctx context.Context, d *streams.Delivery, l *look) streams.Decision {
	body, err := l.end.Encode()
	if err != nil {
		return streams.DeadLetter(streams.DeadUndecodable, err)
	}
	m := streams.Message{
		Stream: streams.StreamEnriched, Subject: streams.EnrichedSubject(l.end.SubscriberID),
		ID: streams.DerivedMessageID(*l.end, d.Replay), TraceParent: streams.TraceParent(ctx), Body: body,
	}
	if d.Mode() == "backfill" {
		m.Header = d.CopyHeader()
	}
	if _, err := h.publisher.Publish(context.WithoutCancel(ctx), m); err != nil {
		return streams.Hold(streams.CauseNATS, err)
	}
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		span.SetAttributes(attribute.String("fp.status", string(l.end.Status)), attribute.String("fp.reason", string(l.end.Reason)))
	}
	h.metrics.results.WithLabelValues(string(l.end.Status), string(l.end.Reason)).Inc()
	return streams.Done()
}
