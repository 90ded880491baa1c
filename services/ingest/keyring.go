package ingest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"sync/atomic"
	"time"
)

// keyring holds the keys in force. All methods but reload and watch are safe
// for concurrent use.
type keyring struct {
	path      string
	rateLimit float64 // of keys that have none of their own
	log       *slog.Logger
	metrics   *metrics
	set       atomic.Pointer[keySet]

	read  [sha256.Size]byte // hash of the content that set was read from
	fault string            // what is wrong with the file since, if anything
}

// loadKeyring reads the keys file for the first time.
func loadKeyring(path string, rateLimit float64, log *slog.Logger, m *metrics) (*keyring, error) {
	k := &keyring{path: path, rateLimit: rateLimit, log: log, metrics: m}
	if err := k.load(); err != nil {
		return nil, err
	}
	if len(*k.set.Load()) == 0 {
		return nil, fmt.Errorf("%s: no keys; `ingest keygen` makes one", path)
	}
	m.keysCurrent.Set(1)
	return k, nil
}

// check is keySet.check on the keys in force.
func (k *keyring) check(values []string, now time.Time) (*apiKey, authReason) {
	return k.set.Load().check(values, now)
}

// load puts the keys of the file in force, if they are others than before.
func (k *keyring) load() error {
	// By content and not by time: a Kubernetes secret is swapped by a symbolic
	// link three levels up, and an editor may keep the time.
	b, err := os.ReadFile(k.path)
	if err != nil {
		return err // names the file already
	}
	hash := sha256.Sum256(b)
	if k.set.Load() != nil && hash == k.read {
		return nil
	}
	set, err := parseKeys(b)
	if err != nil {
		return fmt.Errorf("%s: %w", k.path, err)
	}
	for id, key := range set {
		k.limit(key)
		k.metrics.keyRequests.WithLabelValues(id, keyAccepted)
		k.metrics.keyRequests.WithLabelValues(id, keyRefused)
	}
	k.metrics.keys.Set(float64(len(set)))
	k.set.Store(&set)
	k.read = hash
	k.log.Info("api keys loaded", "keys", len(set))
	return nil
}

// limit gives a key its bucket. An edit of the file that leaves its rate alone
// leaves its bucket as full as it was.
func (k *keyring) limit(key *apiKey) {
	rate := k.rateLimit
	if key.RateLimit != nil {
		rate = *key.RateLimit
	}
	if old := k.set.Load(); old != nil {
		if was := (*old)[key.ID]; was != nil && was.limit != nil && was.limit.rate == rate {
			key.limit = was.limit
			return
		}
	}
	key.limit = newLimiter(rate)
}

// reload is load for a file that was good once: after a broken edit the old
// keys stay in force, and that is said once and not at every look. A list
// without keys is not broken: it revokes them all.
func (k *keyring) reload() {
	fault := ""
	if err := k.load(); err != nil {
		fault = err.Error()
	}
	switch {
	case fault == k.fault:
	case fault != "":
		k.log.Error("api keys not reloaded, the old ones stay in force", "err", fault)
	default:
		k.log.Info("api keys file is good again")
	}
	k.fault = fault
	if fault == "" {
		k.metrics.keysCurrent.Set(1)
	} else {
		k.metrics.keysCurrent.Set(0)
	}
}

// watch reloads at every interval until ctx is done. A revoked key is refused
// within one interval.
func (k *keyring) watch(ctx context.Context, interval time.Duration) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			k.reload()
		}
	}
}
