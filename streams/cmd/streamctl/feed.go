package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/idenza/fingerprint-prefetch/streams"
)

const (
	// headerReplaySequence carries the original's sequence on a copy, so that
	// a resumed replay sees how far it had got.
	headerReplaySequence = "Fp-Replay-Sequence"
	// headerReplayReady is "1" on a copy of an event that had its record when
	// it was copied: a resumed replay counts what was true then.
	headerReplayReady = "Fp-Replay-Ready"
	// headerRedrives counts on a copy how often its event was redriven for
	// this stage; a dead letter has the headers of what it was made of.
	headerRedrives = "Fp-Redrives"
	// maxRedrives is how often a message is redriven: what fails a fourth
	// time wants another remedy.
	maxRedrives = 3
	// The cursor is saved after this many copies or this long.
	saveCopies = 100
	savePeriod = 5 * time.Second
	// burstPeriod is how far apart the bursts of copies are.
	burstPeriod = 40 * time.Millisecond
)

// publisher stores a message and returns once the stream has it.
type publisher interface {
	Publish(ctx context.Context, m streams.Message) (streams.Ack, error)
}

// feeder runs one replay or redrive.
type feeder struct {
	feedState
	conn    *streams.Conn
	pub     publisher
	records *records
	dead    jetstream.Stream // of a redrive
	kv      jetstream.KeyValue
	rev     uint64
	// replaced dead letters are deleted once the cursor is past them.
	replaced []uint64
}

// prepare opens what a run needs and settles what it reads, once and for all;
// resume names a run to go on with.
func (r *feeder) prepare(ctx context.Context, conn *streams.Conn, resume string, since, until time.Time, fromSeq uint64) error {
	r.conn, r.pub = conn, streams.NewPublisher(conn.JS, prometheus.NewRegistry())
	if resume != "" {
		if err := r.load(ctx, resume); err != nil {
			return err
		}
	} else {
		var err error
		if r.Span, err = findSpan(ctx, conn.JS, r.source(), since, until); err != nil {
			return err
		}
		r.Span.From = max(r.Span.From, fromSeq)
		r.ID, r.Started, r.Next = strings.ToLower(rand.Text()[:10]), time.Now().UTC(), r.Span.From
		if !r.DryRun {
			if err := r.create(ctx); err != nil {
				return err
			}
		}
	}
	if r.Redrive {
		var err error
		if r.dead, err = conn.JS.Stream(ctx, streams.StreamDead); err != nil {
			return fmt.Errorf("look up stream %s: %w", streams.StreamDead, err)
		}
	}
	return nil
}

// run deals with what is left of the span. It returns nil with Done unset
// when ctx is done.
func (r *feeder) run(ctx context.Context, p *progress) error {
	var made map[uint64]bool
	if !r.DryRun {
		var err error
		if made, err = r.made(ctx); err != nil {
			return err
		}
		if r.Redrive { // killed between a save and what follows it
			for seq := range made {
				if seq < r.Next {
					r.replaced = append(r.replaced, seq)
				}
			}
		}
	}
	p.begin(r.Next, r.Span.To+1)
	start, saved, savedAt, n := time.Now(), time.Now(), 0, 0
	room := newRoom(time.Now())
	// A batch is looked at as a whole, so at a low rate it is a small one.
	size := batchSize
	if r.Rate > 0 && !r.DryRun {
		size = max(1, min(size, int(r.Rate)))
	}
	err := scanBatches(ctx, r.conn, span{r.Span.Stream, r.Next, r.Span.To}, r.subject(r.source()), size, func(batch []*jetstream.RawStreamMsg) error {
		items := r.items(batch)
		if err := r.records.look(ctx, items); err != nil {
			return err
		}
		// Without a rate as many copies are made at once as the stages have
		// room for, with one in small bursts: these cost everybody less than as
		// many single ones, and between them live events have the stages to
		// themselves.
		step := batchSize
		if r.Rate > 0 && !r.DryRun {
			step = max(1, min(int(r.Rate*burstPeriod.Seconds()), batchSize))
		}
		for len(items) > 0 {
			part := items
			if !r.DryRun {
				part = items[:min(step, room.left, len(items))]
			}
			items = items[len(part):]
			copied := r.Counts.Copied
			if err := r.part(ctx, part, made); err != nil {
				return err
			}
			r.Next = part[len(part)-1].Sequence + 1
			p.show(r.Next, fmt.Sprintf("%d copied", r.Counts.Copied))
			if r.DryRun || r.Counts.Copied == copied {
				continue
			}
			n += int(r.Counts.Copied - copied)
			room.left -= int(r.Counts.Copied - copied)
			if n-savedAt >= saveCopies || time.Since(saved) > savePeriod {
				if err := r.save(ctx); err != nil {
					return err
				}
				saved, savedAt = time.Now(), n
			}
			if room.left <= 0 {
				if err := r.makeWay(ctx, p, room, n); err != nil {
					return err
				}
			}
			if r.Rate > 0 {
				if err := wait(ctx, time.Until(start.Add(time.Duration(float64(n)/r.Rate*float64(time.Second))))); err != nil {
					return err
				}
			}
		}
		return ctx.Err() //nolint:wrapcheck // judged by the caller
	})
	if err == nil {
		r.Done, r.Next = true, r.Span.To+1
	}
	p.end()
	if r.DryRun {
		return err
	}
	// Also when ctx is done: the cursor is what --resume goes on from.
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	if saveErr := r.save(last); saveErr != nil {
		return errors.Join(err, saveErr)
	}
	return err
}

// item is a message that is selected.
type item struct {
	*jetstream.RawStreamMsg
	id         string // empty for what is no event
	stage      string
	subscriber int64
	accepted   time.Time
	record     *recordHead // what is in Redis; nil when nothing is
	ready      bool        // it has its record, or had when it was copied
	made       bool        // it has been copied
}

// key names the event among those of all subscribers.
func (it item) key() string { return strconv.FormatInt(it.subscriber, 10) + "/" + it.id }

// redrives is how often the event was redriven for this stage.
func (it *item) redrives() int {
	n, _ := strconv.Atoi(it.Header.Get(headerRedrives)) // absent is none
	return n
}

func newItem(m *jetstream.RawStreamMsg, stage string) *item {
	return &item{
		RawStreamMsg: m, id: requestID(m.Data), stage: stage,
		subscriber: streams.SubjectSubscriber(m.Subject), accepted: newStep("", m, nil).AcceptedAt,
	}
}

// items returns the messages of a batch that the selection is about.
func (r *feeder) items(batch []*jetstream.RawStreamMsg) []*item {
	var items []*item
	for _, m := range batch {
		stage := r.Stage
		if r.Redrive {
			stage = backfillStage(m.Subject)
		}
		if r.matches(m) {
			items = append(items, newItem(m, stage))
		}
	}
	return items
}

// part counts some messages and copies those that are to be and have not been.
// It counts all of them or none: what a part that failed has copied, the next
// run finds.
func (r *feeder) part(ctx context.Context, items []*item, made map[uint64]bool) error {
	counts := r.Counts
	var wanted []*item
	for _, it := range items {
		it.ready = it.record.readyFor(it)
		if ready, ok := made[it.Sequence]; ok {
			it.made, it.ready = true, ready
		}
		if r.wants(&counts, it) {
			wanted = append(wanted, it)
		}
	}
	sequences, errs := make([]uint64, len(wanted)), make([]error, len(wanted))
	var wg sync.WaitGroup
	for i, it := range wanted {
		if it.made || r.DryRun {
			continue
		}
		wg.Go(func() { sequences[i], errs[i] = r.copy(ctx, it) })
	}
	wg.Wait()
	for i, it := range wanted {
		switch {
		case errors.Is(errs[i], streams.ErrTooLarge):
			counts.Invalid++
			continue
		case errs[i] != nil:
			return errs[i]
		case sequences[i] != 0:
			r.copied(it.stage, sequences[i])
		}
		r.count(&counts, it)
	}
	r.Counts = counts
	if r.Redrive && !r.DryRun {
		for i, it := range wanted {
			if errs[i] == nil {
				r.replaced = append(r.replaced, it.Sequence)
			}
		}
	}
	return ctx.Err() //nolint:wrapcheck // judged by the caller
}

// wants reports whether a message is to be copied, and counts why not.
func (r *feeder) wants(c *feedCounts, it *item) bool {
	switch {
	case it.id == "" && !r.Redrive: // a dead letter may be an event to a newer stage
		c.Invalid++
	case r.Started.Sub(it.accepted) >= r.Limits.life(it.stage):
		c.PastLife++
	case it.made:
		return true
	case r.Redrive && it.redrives() >= maxRedrives:
		c.UsedUp++
	case r.OnlyMissing && it.ready:
		c.Present++
	default:
		return true
	}
	return false
}

// count counts a message that is copied.
func (r *feeder) count(c *feedCounts, it *item) {
	c.Copied++
	if it.ready {
		c.Ready++
	}
	if it.stage != streams.StagePrefetcher || it.ready && !r.Force {
		return
	}
	if t, ok := idTime(it.id); ok && r.Limits.Retention > 0 && r.Started.Sub(t) > r.Limits.Retention {
		c.PastRetention++
	} else {
		c.VendorCalls++
	}
}

// copy stores the copy. Its message id is made of the replay and the
// original's sequence: a repeat is absorbed, and no earlier copy swallows it.
func (r *feeder) copy(ctx context.Context, it *item) (sequence uint64, err error) {
	seq := strconv.FormatUint(it.Sequence, 10)
	h := nats.Header{
		streams.HeaderReplay: {r.ID}, headerReplaySequence: {seq},
		streams.HeaderAcceptedAt: {it.accepted.UTC().Format(time.RFC3339Nano)},
	}
	if r.Force && it.stage == streams.StagePrefetcher {
		h.Set(streams.HeaderForce, "1")
	}
	if it.ready {
		h.Set(headerReplayReady, "1")
	}
	if r.Redrive {
		h.Set(headerRedrives, strconv.Itoa(it.redrives()+1))
	}
	for {
		ack, err := r.pub.Publish(ctx, streams.Message{
			Stream: streams.StreamBackfill, Subject: streams.BackfillSubject(it.stage, it.subscriber),
			ID: "replay:" + r.ID + ":" + seq, Header: h, Body: it.Data, TraceParent: it.Header.Get(streams.HeaderTraceParent),
		})
		if err == nil {
			return ack.Sequence, nil
		}
		if errors.Is(err, streams.ErrTooLarge) || errors.Is(err, streams.ErrRefused) {
			return 0, err //nolint:wrapcheck // says what it did
		}
		if wait(ctx, time.Second) != nil {
			return 0, err //nolint:wrapcheck // says what it did
		}
	}
}
