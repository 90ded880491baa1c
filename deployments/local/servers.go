package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/nats-io/nats-server/v2/server"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher/fingerprintsim"
)

// Where the embedded servers listen if the port is free, so that tools with
// their usual defaults find them.
const (
	usualNATSPort    = 4222
	usualRedisPort   = 6379
	usualMonitorPort = 9100
)

// simLatency and simJitter are about what the vendor's API takes.
const (
	simLatency = 80 * time.Millisecond
	simJitter  = 40 * time.Millisecond
)

func (s *stack) startNATS(dir string) (url string, err error) {
	srv, err := server.NewServer(&server.Options{
		ServerName: "local", Host: "127.0.0.1", Port: usualPort(usualNATSPort), JetStream: true, StoreDir: dir,
		NoSigs: true, NoLog: true,
	})
	if err != nil {
		return "", fmt.Errorf("start nats-server in %s: %w", dir, err)
	}
	s.undo = append(s.undo, func() error { srv.Shutdown(); srv.WaitForShutdown(); return nil })
	srv.Start()
	if !srv.ReadyForConnections(20 * time.Second) {
		return "", fmt.Errorf("nats-server in %s does not start; is another stack using the directory?", dir)
	}
	if !srv.JetStreamEnabled() {
		return "", fmt.Errorf("nats-server cannot use %s for its streams", dir)
	}
	return srv.ClientURL(), nil
}

func (s *stack) startRedis() (url string, err error) {
	r := miniredis.NewMiniRedis()
	port := usualPort(usualRedisPort)
	if err := r.StartAddr(net.JoinHostPort("127.0.0.1", strconv.Itoa(max(port, 0)))); err != nil {
		return "", fmt.Errorf("start embedded redis: %w", err)
	}
	// Its clock stands still unless moved.
	ctx, cancel := context.WithCancel(context.Background())
	var clock sync.WaitGroup
	clock.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				r.FastForward(time.Second)
			}
		}
	})
	s.undo = append(s.undo, func() error { cancel(); clock.Wait(); r.Close(); return nil })
	return "redis://" + r.Addr() + "/0", nil
}

// usualPort returns port, or -1 for any when it is taken.
func usualPort(port int) int {
	ln, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return -1
	}
	ln.Close()
	return port
}

func (s *stack) startSim() (url string, err error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("start the Fingerprint simulator: %w", err)
	}
	srv := &http.Server{
		Handler:           fingerprintsim.New(fingerprintsim.Options{Key: "sim", Latency: simLatency, Jitter: simJitter}),
		ReadHeaderTimeout: 5 * time.Second,
	}
	go srv.Serve(ln) //nolint:errcheck // ends with Close
	s.undo = append(s.undo, srv.Close)
	return "http://" + ln.Addr().String(), nil
}
