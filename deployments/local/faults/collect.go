//go:build unix

package faults

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// poison stores something that is no event, and writes down where.
func (s *system) poison(ctx context.Context, n uint64) {
	bodies := []string{
		"", "not JSON", "[]", "null", `{"schema":"one"}`, `{"schema":0,"request_id":"a","subscriber_id":1}`,
		`{"schema":1,"request_id":"../a","subscriber_id":1}`, `{"schema":1,"status":"shiny","accepted_at":"yesterday"}`, "\x00\xff\xfe",
	}
	m := nats.NewMsg(streams.IngestSubject(10 + int64(n%20)))
	if n%2 == 1 {
		m.Subject = streams.EnrichedSubject(10 + int64(n%20))
	}
	m.Data = []byte(bodies[n/2%uint64(len(bodies))])
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	ack, err := s.conn.JS.PublishMsg(ctx, m)
	if err != nil {
		return // it may be there all the same: then its dead letter is one more
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.planted = append(s.planted, place{ack.Stream, ack.Sequence})
}

// collect reads everything there is once nothing waits any more.
func (s *system) collect(ctx context.Context, posts []*post) (h history, err error) {
	h = history{Posts: posts, Records: map[string]final{}, Poison: s.planted, Losses: s.losses}
	if err := s.scan(ctx, streams.StreamIngest, false, func(m jetstream.Msg, meta *jetstream.MsgMetadata) {
		if e, err := streams.DecodeEvent(m.Data()); err == nil { // else planted: its dead letter is looked for
			h.Stored = append(h.Stored, stored{event{e.RequestID, e.SubscriberID, e.SessionID, e.UserID}, meta.Timestamp.UTC()})
		}
	}); err != nil {
		return h, err
	}
	ids := map[string]bool{}
	if err := s.scan(ctx, streams.StreamEnriched, true, func(m jetstream.Msg, _ *jetstream.MsgMetadata) {
		id := m.Headers().Get(jetstream.MsgIDHeader)
		if id != "" && ids[id] {
			h.Repeated++
		}
		ids[id] = true
	}); err != nil {
		return h, err
	}
	if err := s.scan(ctx, streams.StreamDead, false, func(m jetstream.Msg, _ *jetstream.MsgMetadata) {
		d := deadLetter{Reason: m.Headers().Get(streams.HeaderDeadReason), Stream: m.Headers().Get(streams.HeaderDeadStream)}
		d.Seq, _ = strconv.ParseUint(m.Headers().Get(streams.HeaderDeadSequence), 10, 64) // else it matches nothing
		var e streams.Event
		if json.Unmarshal(m.Data(), &e) == nil && e.UserID != "" { // a record has these members too
			d.event = event{e.RequestID, e.SubscriberID, e.SessionID, e.UserID}
		} else if e.SubscriberID == streams.HeartbeatSubscriber { // never poison: every version passes it on
			d.event = event{ID: e.RequestID, Subscriber: e.SubscriberID}
		}
		h.Dead = append(h.Dead, d)
	}); err != nil {
		return h, err
	}
	wanted := map[string]bool{}
	for _, st := range h.Stored {
		wanted[st.ID] = true
	}
	for _, p := range posts {
		wanted[p.ID] = true
	}
	if err := s.readRecords(ctx, wanted, h.Records); err != nil {
		return h, err
	}
	w, err := readWritten(filepath.Join(s.dir, "redis", "appendonlydir"))
	if err != nil {
		return h, err
	}
	h.First, h.Seen = w.First, w.Found
	return h, nil
}

// scan calls f for every message of a stream.
func (s *system) scan(ctx context.Context, stream string, headersOnly bool, f func(jetstream.Msg, *jetstream.MsgMetadata)) error {
	st, err := s.conn.JS.Stream(ctx, stream)
	if err != nil {
		return fmt.Errorf("look up %s: %w", stream, err)
	}
	state := st.CachedInfo().State
	if state.Msgs == 0 {
		return nil
	}
	cons, err := st.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{HeadersOnly: headersOnly})
	if err != nil {
		return fmt.Errorf("read %s: %w", stream, err)
	}
	messages, err := cons.Messages()
	if err != nil {
		return fmt.Errorf("read %s: %w", stream, err)
	}
	defer messages.Stop()
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("read %s: %w", stream, err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("read %s: %w", stream, err)
		}
		f(m, meta)
		if meta.Sequence.Stream >= state.LastSeq {
			return nil
		}
	}
}

// readRecords reads the record of each id that has one.
func (s *system) readRecords(ctx context.Context, ids map[string]bool, into map[string]final) error {
	var batch []string
	flush := func() error {
		cmds, err := s.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
			for _, id := range batch {
				p.Get(ctx, record.Key(id))
			}
			return nil
		})
		if err != nil && !errors.Is(err, redis.Nil) {
			return fmt.Errorf("read records: %w", err)
		}
		for i, cmd := range cmds {
			b, err := cmd.(*redis.StringCmd).Bytes()
			if errors.Is(err, redis.Nil) {
				continue
			}
			r, err := record.Decode(b)
			if err != nil || r.RequestID != batch[i] {
				into[batch[i]] = final{event: event{ID: batch[i]}} // matches no event: unexpected
				continue
			}
			into[r.RequestID] = final{
				event: event{r.RequestID, r.SubscriberID, r.SessionID, r.UserID}, Status: r.Status, AcceptedAt: r.AcceptedAt.Time,
				Right: r.Checks != nil && r.Checks.EventIDMatch && len(r.Event) > 0,
			}
		}
		batch = batch[:0]
		return nil
	}
	for id := range ids {
		if batch = append(batch, id); len(batch) == 200 {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if len(batch) == 0 {
		return nil
	}
	return flush()
}
