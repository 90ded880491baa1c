package persister

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams/record"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// proxy stands between the persister and Redis and spoils what Redis answers.
type proxy struct {
	addr, target string

	mu    sync.Mutex
	spoil func(reply []byte) (pass []byte, goOn bool) // nil: nothing
	conns map[net.Conn]struct{}
	done  bool
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	ln, err := new(net.ListenConfig).Listen(context.Background(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{addr: ln.Addr().String(), target: target, conns: map[net.Conn]struct{}{}}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		ln.Close()
		p.set(nil)
		p.mu.Lock()
		p.done = true
		for c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		serving.Wait()
	})
	return p
}

// set changes what becomes of replies from now on.
func (p *proxy) set(spoil func([]byte) ([]byte, bool)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.spoil = spoil
}

func (p *proxy) own(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done {
		c.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *proxy) drop(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	c.Close()
}

func (p *proxy) serve(down net.Conn) {
	if !p.own(down) {
		return
	}
	defer p.drop(down)
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	up, err := net.Dial("tcp", target)
	if err != nil || !p.own(up) {
		return
	}
	defer p.drop(up)
	go func() {
		_, _ = io.Copy(up, down) // either end may go at any time
		up.Close()
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := up.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		spoil := p.spoil
		p.mu.Unlock()
		pass, goOn := buf[:n], true
		if spoil != nil {
			pass, goOn = spoil(buf[:n])
		}
		if _, err := down.Write(pass); err != nil || !goOn {
			return
		}
	}
}

// Whatever happens on the way to Redis: the stage holds or goes slower,
// nothing is dead-lettered, and every record is right once the way is free.
// Writes whose answer was lost were done; repeating them is harmless.
func TestRedisConnectionFaults(t *testing.T) {
	t.Parallel()
	reply := func(text string) func([]byte) ([]byte, bool) {
		return func(b []byte) ([]byte, bool) {
			// One error for each answer there was.
			return []byte(strings.Repeat(text+"\r\n", strings.Count(string(b), "$")+strings.Count(string(b), "-"))), false
		}
	}
	for name, c := range map[string]struct {
		spoil func([]byte) ([]byte, bool)
		holds bool
	}{
		"hangs":        {func([]byte) ([]byte, bool) { return nil, true }, true},
		"resets":       {func([]byte) ([]byte, bool) { return nil, false }, true},
		"half a reply": {func(b []byte) ([]byte, bool) { return b[:len(b)/2], false }, true},
		"half, hangs":  {func(b []byte) ([]byte, bool) { return b[:len(b)/2], true }, true},
		"not RESP":     {func([]byte) ([]byte, bool) { return []byte("HTTP/1.1 200 OK\r\n\r\n"), false }, true},
		"loading":      {reply("-LOADING Redis is loading the dataset in memory"), true},
		"slow":         {func(b []byte) ([]byte, bool) { time.Sleep(100 * time.Millisecond); return b, true }, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			rds := streamstest.NewRedis(t)
			p := newProxy(t, rds.Addr)
			r := start(t, rds, "REDIS_URL=redis://"+p.addr+"/0")
			r.enriched(rec("before", 1, record.Ready, 0))
			r.eventually("before", record.Ready)
			p.set(c.spoil)
			var during []record.Record
			for i := range 30 {
				during = append(during, rec(fmt.Sprint("during-", i), 1, record.Ready, 0))
			}
			r.enriched(during...)
			if c.holds {
				streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
				p.set(nil)
			}
			for _, d := range during {
				r.eventually(d.RequestID, record.Ready)
			}
			r.settled()
			p.set(nil)
			if got := r.deadReasons(); len(got) != 0 {
				t.Errorf("dead letters %v", got)
			}
			streamstest.Eventually(t, "ready again", func() bool { return r.proc.Health.Err() == nil })
		})
	}
}

// A wrong password holds the stage until Redis accepts it.
func TestRedisRefusesThePassword(t *testing.T) {
	t.Parallel()
	rds := streamstest.NewRedis(t, "--requirepass", "old")
	r := start(t, rds, "REDIS_URL=redis://:new@"+rds.Addr+"/0")
	r.rdb = client(t, "redis://:old@"+rds.Addr+"/0")
	r.enriched(rec("A", 1, record.Ready, 0))
	streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
	if err := r.rdb.Do(t.Context(), "ACL", "SETUSER", "default", ">new").Err(); err != nil {
		t.Fatal(err)
	}
	r.eventually("A", record.Ready)
	r.settled()
	if got := r.deadReasons(); len(got) != 0 {
		t.Errorf("dead letters %v", got)
	}
}

// A replica that never got the writes is promoted: what Redis acknowledged and
// lost is written again by a replay, and what comes meanwhile waits.
func TestRedisReplicaPromoted(t *testing.T) {
	t.Parallel()
	primary, replica := streamstest.NewRedis(t), streamstest.NewRedis(t)
	p := newProxy(t, primary.Addr)
	r := start(t, primary, "REDIS_URL=redis://"+p.addr+"/0")
	r.enriched(rec("lost", 1, record.Ready, 0))
	r.eventually("lost", record.Ready)

	// The address now leads to a server that is still a replica, and
	// refuses to be written to.
	r.rdb = client(t, replica.URL())
	r.rdb.SlaveOf(t.Context(), "127.0.0.1", "1")
	p.redirect(replica.Addr)
	primary.Kill()
	r.enriched(rec("during", 1, record.Ready, 0))
	streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
	r.rdb.SlaveOf(t.Context(), "NO", "ONE")
	r.eventually("during", record.Ready)
	r.settled()

	r.replay(r.message(1))
	r.eventually("lost", record.Ready)
	if got := r.deadReasons(); len(got) != 0 {
		t.Errorf("dead letters %v", got)
	}
}

// The primary changes places with its replica by hand. The address leads to the
// new one, as a DNS name would, but connections to the old one stay open: they
// must be given up, since all it says is that it cannot be written to.
func TestRedisSwitchover(t *testing.T) {
	t.Parallel()
	primary, replica := streamstest.NewRedis(t), streamstest.NewRedis(t)
	old, promoted := client(t, primary.URL()), client(t, replica.URL())
	replicaOf := func(c redis.UniversalClient, of *streamstest.Redis) {
		host, port, _ := net.SplitHostPort(of.Addr)
		if err := c.SlaveOf(t.Context(), host, port).Err(); err != nil {
			t.Fatal(err)
		}
	}
	replicaOf(promoted, primary)
	p := newProxy(t, primary.Addr)
	r := start(t, primary, "REDIS_URL=redis://"+p.addr+"/0")
	batch := func(name string) (recs []record.Record) {
		for i := range 50 {
			recs = append(recs, rec(fmt.Sprint(name, "-", i), 1, record.Ready, 0))
		}
		r.enriched(recs...)
		return recs
	}
	before := batch("before")
	r.right(before...)
	replicated(t, primary)

	if err := promoted.SlaveOf(t.Context(), "NO", "ONE").Err(); err != nil {
		t.Fatal(err)
	}
	replicaOf(old, replica)
	during := batch("during")
	streamstest.Eventually(t, "the stage to hold", func() bool { return holding(r) })
	p.lead(replica.Addr)
	after := batch("after")
	r.rdb = promoted
	r.right(slices.Concat(before, during, after)...)
	r.settled()
	if got := r.deadReasons(); len(got) != 0 {
		t.Errorf("dead letters %v", got)
	}
}

// lead leads new connections elsewhere.
func (p *proxy) lead(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// redirect leads new connections elsewhere and closes the old ones.
func (p *proxy) redirect(target string) {
	p.lead(target)
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}
