//go:build unix

package faults

import (
	"bytes"
	"fmt"
	"net"
	"sync"
	"time"
)

// link is one TCP path from a process to a server, through a proxy that can
// spoil it. It is safe for concurrent use.
type link struct {
	from, to string // names, for the report
	addr     string // where the process connects
	target   string

	ln      net.Listener
	serving sync.WaitGroup

	mu      sync.Mutex
	trouble trouble
	changed chan struct{} // closed and replaced when trouble changes
	conns   map[net.Conn]struct{}
	trip    *trip
	closed  bool
}

// trouble is what a link does to its connections. The zero value is none.
type trouble struct {
	Delay  time.Duration // of every chunk, in both directions
	Stall  bool          // nothing passes, nothing is closed
	Refuse bool          // connections are closed as soon as they are made
	Rate   int           // bytes a second each way, 0 is unlimited
}

// trip runs do, once, when pattern passes in one direction: before the chunk
// is handed on, which then gets lost, or after.
type trip struct {
	pattern string
	up      bool // from the process to the server
	after   bool
	do      func()
}

// newLink listens on any port of the loopback interface.
func newLink(from, to, target string) (*link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the link from %s to %s: %w", from, to, err)
	}
	l := &link{
		from: from, to: to, addr: ln.Addr().String(), target: target, ln: ln,
		changed: make(chan struct{}), conns: map[net.Conn]struct{}{},
	}
	l.serving.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			l.serving.Go(func() { l.serve(c) })
		}
	})
	return l, nil
}

// set replaces the link's trouble. Connections are cut when it is to refuse.
func (l *link) set(t trouble) {
	l.mu.Lock()
	l.trouble = t
	close(l.changed)
	l.changed = make(chan struct{})
	l.mu.Unlock()
	if t.Refuse {
		l.cut()
	}
}

// cut breaks every connection, which both ends see as a reset.
func (l *link) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.conns {
		reset(c)
	}
}

// arm sets the trip, nil for none.
func (l *link) arm(t *trip) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.trip = t
}

func (l *link) close() {
	l.ln.Close()
	l.mu.Lock()
	l.closed, l.trouble = true, trouble{}
	close(l.changed)
	l.changed = make(chan struct{})
	for c := range l.conns {
		reset(c)
	}
	l.mu.Unlock()
	l.serving.Wait()
}

func reset(c net.Conn) {
	if tcp, ok := c.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = c.Close()
}

func (l *link) own(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.trouble.Refuse {
		reset(c)
		return false
	}
	l.conns[c] = struct{}{}
	return true
}

func (l *link) drop(c net.Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.conns, c)
	c.Close()
}

func (l *link) state() (trouble, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.trouble, l.changed
}

func (l *link) serve(down net.Conn) {
	if !l.own(down) {
		return
	}
	defer l.drop(down)
	up, err := net.DialTimeout("tcp", l.target, time.Second)
	if err != nil || !l.own(up) {
		return
	}
	defer l.drop(up)
	var both sync.WaitGroup
	both.Go(func() { l.pump(up, down, true) })
	both.Go(func() { l.pump(down, up, false) })
	both.Wait()
}

// pump copies from src to dst. Reading goes on while earlier chunks wait for
// their delay, so that a slow link is slow and not narrow.
func (l *link) pump(dst, src net.Conn, up bool) {
	type chunk struct {
		b  []byte
		at time.Time
	}
	queue := make(chan chunk, 64)
	var writing sync.WaitGroup
	writing.Go(func() {
		failed := false
		for c := range queue {
			if !failed && !l.pass(dst, c.b, c.at, up) {
				failed = true
				src.Close() // ends the reader
			}
		}
		if !failed {
			dst.Close()
		}
	})
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			queue <- chunk{bytes.Clone(buf[:n]), time.Now()}
		}
		if err != nil {
			break
		}
	}
	close(queue)
	writing.Wait()
}

// pass hands one chunk on, or returns false when the connection is over.
func (l *link) pass(dst net.Conn, b []byte, read time.Time, up bool) bool {
	t, changed := l.state()
	for t.Stall {
		<-changed
		t, changed = l.state()
	}
	if t.Delay > 0 {
		time.Sleep(time.Until(read.Add(t.Delay)))
	}
	if t.Rate > 0 {
		time.Sleep(time.Duration(float64(len(b)) / float64(t.Rate) * float64(time.Second)))
	}
	trip := l.tripped(b, up)
	if trip != nil && !trip.after {
		trip.do()
		return false
	}
	_, err := dst.Write(b)
	if trip != nil {
		trip.do()
	}
	return err == nil
}

// tripped returns the trip, disarmed, if b sets it off. A pattern that two
// chunks share is missed; the next one will do.
func (l *link) tripped(b []byte, up bool) *trip {
	l.mu.Lock()
	defer l.mu.Unlock()
	t := l.trip
	if t == nil || t.up != up || !bytes.Contains(b, []byte(t.pattern)) {
		return nil
	}
	l.trip = nil
	return t
}
