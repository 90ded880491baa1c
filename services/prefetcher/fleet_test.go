package prefetcher

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
	"github.com/idenza/fingerprint-prefetch/streams"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/redisclient"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

func fleet(t *testing.T, r *streamstest.Redis, rate, share float64) *fleetBucket {
	t.Helper()
	rdb, err := redisclient.New(r.URL())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { rdb.Close() })
	return newFleetBucket(rdb, rate, newLocalBucket(share, time.Now), streamstest.Logger(t))
}

func TestFleetBucketIsOneForAll(t *testing.T) {
	t.Parallel()
	const rate = 200
	r := streamstest.NewRedis(t)
	start := time.Now()
	var calls atomic.Int64
	var wg sync.WaitGroup
	for range 3 {
		b := fleet(t, r, rate, rate/3)
		wg.Go(func() {
			for time.Since(start) < 2*time.Second {
				got, wait := b.take(t.Context(), firstLook, 3)
				calls.Add(int64(got))
				if got < 3 {
					time.Sleep(wait)
				}
			}
		})
	}
	wg.Wait()
	// A second's worth at the start, then the rate.
	if n, most := float64(calls.Load()), rate+rate*time.Since(start).Seconds()+1; n > most || n < 2*rate {
		t.Errorf("%v calls, want at most %v and hardly less", n, most)
	}
	b := fleet(t, r, rate, rate/3)
	if n, _ := b.take(t.Context(), backfill, 100); n != 0 {
		t.Errorf("%d calls for a backfill out of a drained bucket", n)
	}
}

func TestFleetPauseStopsAllReplicas(t *testing.T) {
	t.Parallel()
	r := streamstest.NewRedis(t)
	a, b := fleet(t, r, 1000, 1), fleet(t, r, 1000, 1)
	a.pause(t.Context(), time.Minute)
	a.pause(t.Context(), time.Second)
	if got, wait := b.take(t.Context(), firstLook, 1); got != 0 || wait < 55*time.Second {
		t.Errorf("%d calls of another replica in a pause, next in %v", got, wait)
	}
}

// With Redis away a replica neither stalls nor runs free.
func TestFleetFallsBackToItsShare(t *testing.T) {
	t.Parallel()
	r := streamstest.NewRedis(t)
	b := fleet(t, r, 100, 10)
	go b.run(t.Context())
	if got, _ := b.take(t.Context(), firstLook, 1); got != 1 || !b.shared() {
		t.Fatal("no call out of a new bucket")
	}
	for name, fault := range map[string]struct{ begin, end func() }{
		"frozen": {r.Freeze, r.Thaw}, "killed": {r.Kill, r.Start},
	} {
		fault.begin()
		start, calls := time.Now(), 0
		for calls < 5 {
			got, wait := b.take(t.Context(), firstLook, 1)
			if calls += got; got == 0 {
				time.Sleep(wait)
			}
		}
		took := time.Since(start)
		if b.shared() || took < 300*time.Millisecond { // 10/s from an empty bucket
			t.Errorf("%s: 5 calls in %v, shared %v", name, took, b.shared())
		}
		fault.end()
		streamstest.Eventually(t, "the shared quota after "+name, b.shared)
		// What the shares spent meanwhile is spent: not the whole burst again.
		if got, _ := b.take(t.Context(), firstLook, 300); got > 150 {
			t.Errorf("%s: %d calls at once after Redis came back", name, got)
		}
	}
}

// Without a limit there is nothing to share, and nobody to tell of it.
func TestQuotaSharedSaysWhetherAReplicaKeepsToItself(t *testing.T) {
	t.Parallel()
	fleetAway := newFleetBucket(nil, 100, newLocalBucket(50, time.Now), streamstest.Logger(t))
	fleetAway.away.Store(true)
	for name, tt := range map[string]struct {
		q    *quota
		want float64
	}{
		"no limit":          {newQuota(newLocalBucket(0, time.Now), true), 1},
		"a limit, no Redis": {newQuota(newLocalBucket(50, time.Now), false), 0},
		"Redis":             {newQuota(newFleetBucket(nil, 100, newLocalBucket(50, time.Now), streamstest.Logger(t)), false), 1},
		"Redis away":        {newQuota(fleetAway, false), 0},
	} {
		reg := prometheus.NewRegistry()
		newMetrics(reg, tt.q)
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := -1.0
		for _, f := range families {
			if f.GetName() == "fp_prefetch_quota_shared" {
				got = f.GetMetric()[0].GetGauge().GetValue()
			}
		}
		if got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}

// The shipped Redis user is enough for the script and for reading records.
func TestPrefetchersRedisUserSuffices(t *testing.T) {
	t.Parallel()
	acl := &bytes.Buffer{}
	sum := sha256.Sum256([]byte("p"))
	hash := []string{hex.EncodeToString(sum[:])}
	if err := streams.WriteRedisACL(acl, map[string][]string{"persister": hash, "prefetcher": hash, "scorer": hash}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "users.acl")
	if err := os.WriteFile(file, acl.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	rdb, err := redisclient.New("redis://prefetcher:p@" + streamstest.NewRedis(t, "--aclfile", file).Addr + "/0")
	if err != nil {
		t.Fatal(err)
	}
	defer rdb.Close()
	b := newFleetBucket(rdb, 10, newLocalBucket(1, time.Now), streamstest.Logger(t))
	if got, _ := b.take(t.Context(), firstLook, 2); got != 2 || !b.shared() {
		t.Errorf("%d tokens, shared %v", got, b.shared())
	}
	if err := rdb.Get(t.Context(), record.Key("A")).Err(); !errors.Is(err, redis.Nil) {
		t.Error(err)
	}
}

// Promise 4: the vendor's quota holds over all replicas, and is used up.
func TestThreeReplicasKeepTheQuota(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		rate, events int
		used         float64 // of the rate, at least; at a high one the machine is what counts
	}{{20, 1000, 0.95}, {100, 700, 0}} {
		t.Run(fmt.Sprint(tt.rate), func(t *testing.T) {
			t.Parallel()
			redis := streamstest.NewRedis(t)
			r := start(t, fingerprintsim.Options{Key: "key", Rate: float64(tt.rate), Burst: burstFactor * tt.rate}, map[string]string{
				"FINGERPRINT_RATE_LIMIT": fmt.Sprint(tt.rate), "PREFETCH_REPLICAS": "3", "REDIS_URL": redis.URL(), "FINGERPRINT_TIMEOUT": "5s",
			})
			for range 2 {
				r.replica(ops.NewProcessLogger("prefetcher", streamstest.Logger(t)))
			}
			all := ids("id", tt.events)
			for i, id := range all { // of many subscribers: one's flood would go by way of FP_BACKFILL
				r.acceptFrom(1+int64(i%20), id)
			}
			var fetched []time.Time
			for _, id := range all {
				got := r.end(id)
				if got.Status != record.Ready {
					t.Errorf("%s is %s", id, got.Status)
				}
				fetched = append(fetched, got.FetchedAt.Time)
			}
			took := slices.MaxFunc(fetched, time.Time.Compare).Sub(slices.MinFunc(fetched, time.Time.Compare))
			calls := r.sim.CountsByStatus()
			if calls[200] != tt.events || calls[200]+calls[429] != r.sim.Calls() {
				t.Errorf("answers by status %v to %d events", calls, tt.events)
			}
			if calls[429] > tt.events/100 {
				t.Errorf("%d of %d calls were 429", calls[429], r.sim.Calls())
			}
			// A new bucket has a second's worth in it; the rest comes at the rate.
			// A machine with time to spare uses all of it.
			sustained := float64(tt.events-tt.rate) / took.Seconds()
			if least := tt.used * float64(tt.rate); sustained < least {
				t.Errorf("%.1f/s sustained, want at least %.1f", sustained, least)
			}
			t.Logf("%d events in %v, %.1f/s sustained of %d, answers by status %v", tt.events, took, sustained, tt.rate, calls)
		})
	}
}
