//go:build unix

package faults

import (
	"context"
	"fmt"
	"math/rand/v2"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// watch is a scorer that never tires: it looks at the records of accepted
// events while the run goes on, knows what is unfinished, and notices a record
// that goes backwards.
type watch struct {
	sys *system

	mu         sync.Mutex
	unfinished []*seen // oldest first
	finished   []*seen
	byID       map[string]*seen
	backwards  []finding
}

// seen is what the watch last saw of an id.
type seen struct {
	id     string
	plain  bool // neither late nor unknown at the vendor, so it is due at once
	since  time.Time
	epoch  int
	head   head
	exists bool
}

// head is what the first members of a record say.
type head struct {
	Status     record.Status
	AcceptedAt string
	Subscriber int64
}

// rank orders the records of one id: of two the larger stands.
func (h head) rank() string {
	ready, end := "0", "1"
	if h.Status == record.Ready {
		ready = "1"
	}
	if h.Status == record.Pending {
		end = "0"
	}
	return ready + h.AcceptedAt + end
}

func newWatch(s *system) *watch { return &watch{sys: s, byID: map[string]*seen{}} }

// add has an accepted event watched.
func (w *watch) add(p *post) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.byID[p.ID] != nil {
		return
	}
	s := &seen{id: p.ID, plain: p.Want == record.Ready && !p.Late, since: p.Done}
	w.byID[p.ID] = s
	w.unfinished = append(w.unfinished, s)
}

// state returns how many ids have a terminal record, how many have not, and
// the age of the oldest of these that is due.
func (w *watch) state() (finished, unfinished int, oldest time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range w.unfinished {
		if s.plain {
			oldest = time.Since(s.since)
			break
		}
	}
	return len(w.finished), len(w.unfinished), oldest
}

const (
	watchEvery  = 200 * time.Millisecond
	watchOldest = 600 // unfinished ones looked at each time
	watchRandom = 100 // finished ones
)

// run looks until ctx is done.
func (w *watch) run(ctx context.Context) {
	for sleep(ctx, watchEvery) {
		w.look(ctx)
	}
}

func (w *watch) look(ctx context.Context) {
	w.sys.loss.RLock()
	defer w.sys.loss.RUnlock()
	epoch := w.sys.epoch
	w.mu.Lock()
	batch := append([]*seen(nil), w.unfinished[:min(len(w.unfinished), watchOldest)]...)
	if n := len(w.unfinished); n > watchOldest { // the newest too: the oldest may be waiting for the vendor
		batch = append(batch, w.unfinished[max(watchOldest, n-watchOldest):]...)
	}
	for range min(watchRandom, len(w.finished)) {
		batch = append(batch, w.finished[rand.IntN(len(w.finished))])
	}
	w.mu.Unlock()
	if len(batch) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	cmds, err := w.sys.rdb.Pipelined(ctx, func(p redis.Pipeliner) error {
		for _, s := range batch {
			p.GetRange(ctx, record.Key(s.id), 0, headBytes-1)
		}
		return nil
	})
	if err != nil {
		return // Redis is away
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i, cmd := range cmds {
		w.saw(batch[i], epoch, cmd.(*redis.StringCmd).Val())
	}
	var still []*seen
	for _, s := range w.unfinished {
		if s.head.Status.Terminal() {
			w.finished = append(w.finished, s)
		} else {
			still = append(still, s)
		}
	}
	w.unfinished = still
}

// headBytes is more than the first members take.
const headBytes = 160

var headForm = regexp.MustCompile(`^\{"schema":\d+,"status":"([a-z_]+)","accepted_at":"([^"]+)","subscriber_id":(\d+)[,}]`)

// saw compares what is there with what was there. w.mu is held.
func (w *watch) saw(s *seen, epoch int, value string) {
	if c, text := s.next(epoch, value); c != "" {
		w.backwards = append(w.backwards, finding{c, s.id, "seen during the run: " + text})
	}
}

// next compares the head of a record with the one before, and returns what is
// wrong with it, if anything. Redis loses nothing within an epoch.
func (s *seen) next(epoch int, value string) (c class, text string) {
	same := s.exists && s.epoch == epoch
	if value == "" {
		if s.exists = s.exists && !same; same {
			return backwards, fmt.Sprintf("a %s record vanished", s.head.Status)
		}
		return "", ""
	}
	m := headForm.FindStringSubmatch(value)
	if m == nil {
		return unexpected, "the key holds something that is no record"
	}
	n, _ := strconv.ParseInt(m[3], 10, 64) // digits, by the form
	before, now := s.head, head{record.Status(m[1]), m[2], n}
	s.head, s.exists, s.epoch = now, true, epoch
	switch {
	case same && now.Subscriber != before.Subscriber:
		return foreign, fmt.Sprintf("a record of subscriber %d became subscriber %d's", before.Subscriber, now.Subscriber)
	case same && now.rank() < before.rank():
		return backwards, fmt.Sprintf("%s of %s became %s of %s", before.Status, before.AcceptedAt, now.Status, now.AcceptedAt)
	}
	return "", ""
}
