package streams

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Janitor makes room in streams that fill up, by purging history that every
// working durable has finished. Streams refuse new messages when full, so
// without it finished history would end up refusing clients.
//
// What is unfinished is never purged. [DurablePending] is a courtesy and does
// not hold anything back.
type Janitor struct {
	JS  jetstream.JetStream
	Log *slog.Logger
	// Pressure is the share of a stream's size limit from which it is purged,
	// 0.8 by default.
	Pressure float64
	// KeepEnriched is the age below which FP_ENRICHED is kept whatever
	// happens: records are rebuilt from it, so it must cover their life.
	KeepEnriched time.Duration

	purged *prometheus.CounterVec
}

// NewJanitor returns a janitor with its metrics on reg.
func NewJanitor(js jetstream.JetStream, log *slog.Logger, reg prometheus.Registerer, keepEnriched time.Duration) *Janitor {
	j := &Janitor{
		JS: js, Log: log, Pressure: 0.8, KeepEnriched: keepEnriched,
		purged: promauto.With(reg).NewCounterVec(prometheus.CounterOpts{
			Name: "fp_stream_purged_messages_total", Help: "Finished messages purged because the stream was filling up.",
		}, []string{"stream"}),
	}
	for _, d := range Definition(Limits{}) {
		if len(d.Durables) > 0 {
			j.purged.WithLabelValues(d.Stream.Name)
		}
	}
	return j
}

// janitorPeriod is short against the time a stream takes to fill its last
// fifth.
const janitorPeriod = 10 * time.Second

// Run sweeps until ctx is done. Failures are logged and tried again.
func (j *Janitor) Run(ctx context.Context) {
	for {
		if err := j.Sweep(ctx); err != nil && ctx.Err() == nil {
			j.Log.Warn("cannot make room in the streams", "err", err)
		}
		if !sleep(ctx, janitorPeriod) {
			return
		}
	}
}

// Sweep purges each stream that is under pressure, once.
func (j *Janitor) Sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, janitorPeriod)
	defer cancel()
	var errs []error
	for _, d := range Definition(Limits{}) {
		if len(d.Durables) > 0 { // FP_DEAD is people's
			errs = append(errs, j.sweep(ctx, d))
		}
	}
	return errors.Join(errs...)
}

func (j *Janitor) sweep(ctx context.Context, d StreamDefinition) error {
	name := d.Stream.Name
	s, err := j.JS.Stream(ctx, name)
	if err != nil {
		return fmt.Errorf("look up stream %s: %w", name, err)
	}
	info := s.CachedInfo()
	if info.Config.MaxBytes <= 0 || float64(info.State.Bytes) < j.Pressure*float64(info.Config.MaxBytes) {
		return nil
	}
	// Everything below is kept only from here on, whatever has finished it.
	young := info.State.LastSeq + 1
	if name == StreamEnriched {
		if young, err = firstYounger(ctx, s, info.State, time.Now().Add(-j.KeepEnriched)); err != nil {
			return fmt.Errorf("look for the age to keep in %s: %w", name, err)
		}
	}
	for _, c := range d.Durables {
		if c.Durable == DurablePending {
			continue
		}
		durable, err := s.Consumer(ctx, c.Durable)
		if err != nil {
			return fmt.Errorf("look up durable %s of %s: %w", c.Durable, name, err)
		}
		// All up to the ack floor is finished. Purging by the durable's own
		// filter leaves what another durable of the stream has still to do.
		below := min(durable.CachedInfo().AckFloor.Stream+1, young)
		if below <= info.State.FirstSeq {
			continue
		}
		if err := s.Purge(ctx, jetstream.WithPurgeSubject(c.FilterSubject), jetstream.WithPurgeSequence(below)); err != nil {
			return fmt.Errorf("purge %s below %d: %w", c.FilterSubject, below, err)
		}
	}
	after, err := s.Info(ctx)
	if err != nil {
		return fmt.Errorf("look at %s after its purge: %w", name, err)
	}
	// Messages stored meanwhile make this too small, never too large.
	if n := int64(info.State.Msgs) - int64(after.State.Msgs); n > 0 {
		j.purged.WithLabelValues(name).Add(float64(n))
		j.Log.Info("purged finished messages", "stream", name, "messages", n)
	}
	return nil
}

// firstYounger returns the sequence of the first message stored after t, one
// past the last if there is none. It halves the range: about 30 gets for a
// thousand million messages.
func firstYounger(ctx context.Context, s jetstream.Stream, state jetstream.StreamState, t time.Time) (uint64, error) {
	low, high := state.FirstSeq, state.LastSeq+1
	for low < high {
		mid := low + (high-low)/2
		// The next one there is: some may have been deleted.
		msg, err := s.GetMsg(ctx, mid, jetstream.WithGetMsgSubject(">"))
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && msg.Time.After(t):
			high = mid
		case err != nil:
			return 0, err //nolint:wrapcheck // the caller says what for
		default:
			low = msg.Sequence + 1
		}
	}
	return low, nil
}

// RunExporter serves the lag of every durable and the fill of every stream,
// makes room in streams under pressure, and sends heartbeats, until ctx is
// done. It is ready while the streams answer.
func RunExporter(ctx context.Context, conn *Conn, p *ops.Process, keepEnriched time.Duration) {
	p.Health.Expect("nats")
	var refs []StreamRef
	for _, d := range Definition(Limits{}) {
		ref := StreamRef{Stream: d.Stream.Name}
		for _, c := range d.Durables {
			ref.Durables = append(ref.Durables, c.Durable)
		}
		refs = append(refs, ref)
	}
	var wg sync.WaitGroup
	wg.Go(func() { conn.WatchReady(ctx, p.Health, StreamIngest) })
	wg.Go(func() { NewLagCollector(conn.JS, p.Log, p.Registry, refs...).Run(ctx) })
	wg.Go(func() { RunHeartbeat(ctx, NewPublisher(conn.JS, p.Registry), p.Log, p.Registry) })
	wg.Go(func() { NewJanitor(conn.JS, p.Log, p.Registry, keepEnriched).Run(ctx) })
	wg.Wait()
}
