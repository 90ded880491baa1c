package streams

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// Change is one difference between the definition and what the server has.
type Change struct {
	// Object is a stream, or stream/durable.
	Object string `json:"object"`
	// Field is empty when the whole object is missing.
	Field string `json:"field,omitempty"`
	Have  string `json:"have,omitempty"`
	Want  string `json:"want,omitempty"`
	// Loses says what making the change would cost: messages, copies of
	// them, or the room for new ones. Empty when it costs nothing.
	Loses string `json:"loses,omitempty"`
}

// String describes the change in one line.
func (c Change) String() string {
	if c.Field == "" {
		return "+ " + c.Object
	}
	s := fmt.Sprintf("~ %s  %s: %s -> %s", c.Object, c.Field, c.Have, c.Want)
	if c.Loses != "" {
		s += "  (" + c.Loses + ")"
	}
	return s
}

// ErrWouldLose is returned by Ensure instead of making a change that costs
// messages, copies of them, or the room for new ones.
var ErrWouldLose = errors.New("the change would lose something")

// Diff returns what Ensure would change, and changes nothing.
func Diff(ctx context.Context, js jetstream.JetStream, l Limits) ([]Change, error) {
	changes, _, err := diff(ctx, js, l)
	return changes, err
}

// diff returns the changes, and the definition they lead to.
func diff(ctx context.Context, js jetstream.JetStream, l Limits) ([]Change, []StreamDefinition, error) {
	defs := Definition(l)
	have := map[string]jetstream.Stream{}
	for _, d := range defs {
		name := d.Stream.Name
		s, err := js.Stream(ctx, name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			continue
		}
		if err != nil {
			return nil, nil, fmt.Errorf("look up stream %s: %w", name, err)
		}
		have[name] = s
	}
	if l.Keep {
		keep(defs, have, l)
	}
	var all []Change
	for _, d := range defs {
		changes, err := diffStream(ctx, have[d.Stream.Name], d)
		if err != nil {
			return nil, nil, err
		}
		all = append(all, changes...)
	}
	return all, defs, nil
}

// keep puts into a definition what the server has of that which l leaves open.
// A stream that is missing gets as many copies as the others have.
func keep(defs []StreamDefinition, have map[string]jetstream.Stream, l Limits) {
	most := 1
	for _, s := range have {
		most = max(most, s.CachedInfo().Config.Replicas)
	}
	for i := range defs {
		d := &defs[i].Stream
		s := have[d.Name]
		if l.Replicas == 0 {
			d.Replicas = most
			if s != nil {
				d.Replicas = s.CachedInfo().Config.Replicas
			}
		}
		if _, named := l.MaxBytes[d.Name]; !named && s != nil {
			d.MaxBytes = s.CachedInfo().Config.MaxBytes
		}
	}
}

// Ensure creates or updates every stream and durable of the definition and
// returns what it changed. It is idempotent. Unless allowLoss is set, it stops
// with ErrWouldLose before it touches anything when a change would lose
// something; the changes it returns then are those it did not make.
func Ensure(ctx context.Context, js jetstream.JetStream, l Limits, allowLoss bool) ([]Change, error) {
	changes, defs, err := diff(ctx, js, l)
	if err != nil {
		return nil, err
	}
	for _, c := range changes {
		if c.Loses != "" && !allowLoss {
			return changes, fmt.Errorf("%s: %w", c, ErrWouldLose)
		}
	}
	if len(changes) == 0 {
		return nil, nil
	}
	for _, d := range defs {
		if _, err := js.CreateOrUpdateStream(ctx, d.Stream); err != nil {
			return nil, fmt.Errorf("apply stream %s: %w", d.Stream.Name, err)
		}
		for _, c := range d.Durables {
			if _, err := js.CreateOrUpdateConsumer(ctx, d.Stream.Name, c); err != nil {
				return nil, fmt.Errorf("apply durable %s/%s: %w", d.Stream.Name, c.Durable, err)
			}
		}
	}
	return changes, nil
}

// diffStream compares a stream, nil for one that is missing, with its definition.
func diffStream(ctx context.Context, s jetstream.Stream, d StreamDefinition) ([]Change, error) {
	name := d.Stream.Name
	if s == nil {
		changes := []Change{{Object: name}}
		for _, c := range d.Durables {
			changes = append(changes, Change{Object: name + "/" + c.Durable})
		}
		return changes, nil
	}
	info := s.CachedInfo()
	f := differ{object: name}
	have, want := info.Config, d.Stream
	f.compare("subjects", have.Subjects, want.Subjects)
	f.compare("storage", have.Storage, want.Storage)
	f.compare("compression", have.Compression, want.Compression)
	f.compare("replicas", have.Replicas, want.Replicas, loses(want.Replicas < have.Replicas, "drops copies"))
	f.compare("retention", have.Retention, want.Retention)
	f.compare("discard", have.Discard, want.Discard)
	f.compare("discard_new_per_subject", have.DiscardNewPerSubject, want.DiscardNewPerSubject)
	f.compare("max_age", have.MaxAge, want.MaxAge, loses(lessAge(want.MaxAge, have.MaxAge) && info.State.Msgs > 0, "drops messages"))
	f.compare("max_msg_size", have.MaxMsgSize, want.MaxMsgSize)
	f.compare("max_bytes", have.MaxBytes, want.MaxBytes,
		loses(want.MaxBytes >= 0 && uint64(want.MaxBytes) < info.State.Bytes, "leaves no room for new messages"))
	f.compare("max_msgs", have.MaxMsgs, want.MaxMsgs)
	f.compare("max_msgs_per_subject", have.MaxMsgsPerSubject, want.MaxMsgsPerSubject)
	f.compare("max_consumers", have.MaxConsumers, want.MaxConsumers)
	f.compare("duplicate_window", have.Duplicates, want.Duplicates)
	f.compare("no_ack", have.NoAck, want.NoAck)
	f.compare("allow_direct", have.AllowDirect, want.AllowDirect)
	f.compare("allow_rollup", have.AllowRollup, want.AllowRollup)
	f.compare("deny_delete", have.DenyDelete, want.DenyDelete)
	f.compare("deny_purge", have.DenyPurge, want.DenyPurge)
	f.compare("sealed", have.Sealed, want.Sealed)
	f.compare("mirror", have.Mirror != nil, want.Mirror != nil)
	f.compare("sources", len(have.Sources), len(want.Sources))
	f.compare("subject_transform", have.SubjectTransform != nil, want.SubjectTransform != nil)
	f.compare("republish", have.RePublish != nil, want.RePublish != nil)
	for _, c := range d.Durables {
		object := name + "/" + c.Durable
		cons, err := s.Consumer(ctx, c.Durable)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			f.changes = append(f.changes, Change{Object: object})
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look up durable %s: %w", object, err)
		}
		f.object = object
		have := cons.CachedInfo().Config
		f.compare("filter_subject", have.FilterSubject, c.FilterSubject)
		f.compare("filter_subjects", have.FilterSubjects, c.FilterSubjects)
		f.compare("deliver_policy", have.DeliverPolicy, c.DeliverPolicy)
		f.compare("deliver_subject", have.DeliverSubject, c.DeliverSubject)
		f.compare("replay_policy", have.ReplayPolicy, c.ReplayPolicy)
		f.compare("headers_only", have.HeadersOnly, c.HeadersOnly)
		f.compare("ack_policy", have.AckPolicy, c.AckPolicy)
		f.compare("ack_wait", have.AckWait, c.AckWait)
		f.compare("max_deliver", have.MaxDeliver, c.MaxDeliver)
		f.compare("max_ack_pending", have.MaxAckPending, c.MaxAckPending)
		f.compare("max_waiting", have.MaxWaiting, c.MaxWaiting)
		f.compare("max_batch", have.MaxRequestBatch, c.MaxRequestBatch)
		f.compare("max_expires", have.MaxRequestExpires, c.MaxRequestExpires)
		f.compare("max_bytes", have.MaxRequestMaxBytes, c.MaxRequestMaxBytes)
		f.compare("backoff", have.BackOff, c.BackOff)
		f.compare("inactive_threshold", have.InactiveThreshold, c.InactiveThreshold)
		f.compare("replicas", have.Replicas, c.Replicas)
		f.compare("mem_storage", have.MemoryStorage, c.MemoryStorage)
	}
	return f.changes, nil
}

// lessAge compares two MaxAges, 0 being for ever.
func lessAge(a, b time.Duration) bool { return a != 0 && (b == 0 || a < b) }

type differ struct {
	object  string
	changes []Change
}

func (f *differ) compare(field string, have, want any, loses ...string) {
	if h, w := fmt.Sprint(have), fmt.Sprint(want); h != w {
		f.changes = append(f.changes, Change{Object: f.object, Field: field, Have: h, Want: w, Loses: strings.Join(loses, "")})
	}
}

// loses returns what a change costs if it does.
func loses(does bool, what string) string {
	if does {
		return what
	}
	return ""
}
