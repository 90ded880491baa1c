package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
)

// records looks at what is in Redis; without REDIS_URL it sees nothing.
type records struct {
	rdb redis.UniversalClient
	// seen holds what was looked at, so that a replay is not misled by its own
	// effects when an event is there twice.
	seen map[string]*recordHead
}

// recordHead is what a record says about an event: not more than that.
type recordHead struct {
	status     record.Status
	accepted   time.Time
	subscriber int64
}

// readyFor reports whether an event has its record, by the prefetcher's own
// rule: ready, of the same subscriber, and not of an earlier event.
func (h *recordHead) readyFor(it *item) bool {
	return h != nil && h.status == record.Ready && h.subscriber == it.subscriber && !h.accepted.Before(it.accepted)
}

// redis returns a client of REDIS_URL, or nil when it is not set.
func (e env) redis() (redis.UniversalClient, error) {
	s := ops.NewSettings(e.getenv)
	cfg := readRedis(s)
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%w:\n%w", ops.ErrSettings, err)
	}
	if !cfg.Set() {
		return nil, nil
	}
	c, err := redisclient.Open(cfg)
	if err != nil {
		return nil, fmt.Errorf("%w:\nREDIS_URL: %w", ops.ErrSettings, err)
	}
	return c, nil
}

func readRedis(s *ops.Settings) redisclient.Config {
	return redisclient.ReadConfig(s, "", "where the records and the vendor's quota are, in the persister's form; without it they are not looked at")
}

func (e env) records() (*records, error) {
	rdb, err := e.redis()
	return &records{rdb: rdb, seen: map[string]*recordHead{}}, err
}

func (r *records) close() {
	if r.rdb != nil {
		r.rdb.Close()
	}
}

// look sets the record of each item, as it was when first looked at.
func (r *records) look(ctx context.Context, items []*item) error {
	if r.rdb == nil {
		return nil
	}
	var fresh []*item
	for _, it := range items {
		if _, ok := r.seen[it.key()]; !ok && it.id != "" {
			fresh = append(fresh, it)
		}
	}
	heads, err := r.read(ctx, fresh)
	if err != nil {
		return err
	}
	for i, it := range fresh {
		r.seen[it.key()] = heads[i]
	}
	for _, it := range items {
		it.record = r.seen[it.key()]
	}
	return nil
}

// read returns the record of each item now, nil where there is none that can
// be read.
func (r *records) read(ctx context.Context, items []*item) ([]*recordHead, error) {
	if len(items) == 0 {
		return nil, nil
	}
	heads := make([]*recordHead, len(items))
	err := keepTrying(ctx, func() error {
		pipe := r.rdb.Pipeline()
		gets := make([]*redis.StringCmd, len(items))
		for i, it := range items {
			gets[i] = pipe.Get(ctx, record.Key(it.id))
		}
		// Each answer is looked at below.
		_, _ = pipe.Exec(ctx)
		for i, get := range gets {
			b, err := get.Bytes()
			if errors.Is(err, redis.Nil) {
				continue
			}
			if err != nil {
				return fmt.Errorf("look at a record: %w", err)
			}
			if rec, err := record.Decode(b); err == nil {
				heads[i] = &recordHead{rec.Status, rec.AcceptedAt.Time, rec.SubscriberID}
			}
		}
		return nil
	})
	return heads, err
}
