//go:build unix

package faults

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// echoServer answers with what it is sent.
func echoServer(t *testing.T) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() { _, _ = io.Copy(c, c); c.Close() }()
		}
	}()
	return ln.Addr().String()
}

func TestLink(t *testing.T) {
	t.Parallel()
	l, err := newLink("a", "b", echoServer(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	dial := func() net.Conn {
		c, err := net.Dial("tcp", l.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	// ask returns what came back within d.
	ask := func(c net.Conn, text string, d time.Duration) (string, error) {
		if _, err := c.Write([]byte(text)); err != nil {
			return "", err
		}
		if err := c.SetReadDeadline(time.Now().Add(d)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, len(text))
		_, err := io.ReadFull(c, b)
		return string(b), err
	}
	c := dial()
	if got, err := ask(c, "hello", time.Minute); got != "hello" {
		t.Fatal(got, err)
	}

	begin := time.Now()
	l.set(trouble{Delay: 50 * time.Millisecond})
	if got, err := ask(c, "slow", time.Minute); got != "slow" || time.Since(begin) < 100*time.Millisecond {
		t.Errorf("%q %v after %v, want twice the delay", got, err, time.Since(begin))
	}
	begin = time.Now()
	l.set(trouble{Rate: 1000})
	if _, err := ask(c, string(make([]byte, 100)), time.Minute); err != nil || time.Since(begin) < 200*time.Millisecond {
		t.Errorf("%v after %v, want a tenth of a second each way", err, time.Since(begin))
	}

	l.set(trouble{Stall: true})
	if got, err := ask(c, "stalled", 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%q passed a stalled link: %v", got, err)
	}
	l.set(trouble{})
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, len("stalled"))
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "stalled" {
		t.Errorf("after the stall: %q %v", b, err)
	}

	l.cut()
	if got, err := ask(c, "cut", time.Minute); err == nil {
		t.Errorf("%q passed a connection that was cut", got)
	}
	l.set(trouble{Refuse: true})
	if c, err := net.Dial("tcp", l.addr); err == nil { // else it was refused at once
		if got, err := ask(c, "refused", time.Minute); err == nil {
			t.Errorf("%q passed a link that refuses", got)
		}
		c.Close()
	}
	l.set(trouble{})

	for _, after := range []bool{false, true} {
		fired := make(chan struct{}, 1)
		l.arm(&trip{pattern: "now", up: true, after: after, do: func() { fired <- struct{}{} }})
		c := dial()
		if got, err := ask(c, "not yet", time.Minute); got != "not yet" {
			t.Errorf("%q %v", got, err)
		}
		if got, err := ask(c, "now!", time.Minute); (err == nil) != after {
			t.Errorf("handed on after the trip is %v: %q %v", after, got, err)
		}
		<-fired
	}
}
