package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// example is the event of the product's own page.
const (
	exampleID   = "1A2B3C4D5E"
	exampleBody = `{"request_id":"1A2B3C4D5E","subscriber_id":12,"session_id":"DEV-SESSION-XYZ","user_id":"user@example.com"}`
)

// describe prints how everything can be reached.
func (s *stack) describe(w io.Writer) {
	fmt.Fprintf(w, "The pipeline runs.\n\n")
	fmt.Fprintf(w, "  ingest      %s\n", s.ingestURL)
	fmt.Fprintf(w, "  operators   ingest http://%s  prefetcher http://%s  persister http://%s  (/metrics, /readyz)\n", s.opsAddrs[0], s.opsAddrs[1], s.opsAddrs[2])
	fmt.Fprintf(w, "  NATS        %s\n", ops.WithoutPassword(s.natsURL))
	fmt.Fprintf(w, "  Redis       %s\n", ops.WithoutPassword(s.redisURL))
	if s.simURL != "" {
		fmt.Fprintf(w, "  vendor      simulated at %s  (faults: curl -X PUT %s/sim/fault -d '{\"status\":503}'; null ends it)\n", s.simURL, s.simURL)
	}
}

// showJob sends the example and follows it to its record.
func (s *stack) showJob(ctx context.Context, w io.Writer) error {
	fmt.Fprintf(w, "\nA client hands in a Fingerprint request id:\n\n")
	fmt.Fprintf(w, "  curl -i %s/fingerprint/ingest \\\n    -H 'Content-Type: application/json' -H 'X-API-Key: %s' \\\n    -d '%s'\n\n", s.ingestURL, s.apiKey, exampleBody)
	ctx, cancel := context.WithTimeout(ctx, 45*time.Second)
	defer cancel()
	status, body, err := s.post(ctx, exampleBody)
	if err != nil {
		return fmt.Errorf("post the example: %w", err)
	}
	answered := time.Now()
	fmt.Fprintf(w, "  %s\n  %s\n\n", status, body)
	if !strings.HasPrefix(status, "202") {
		return fmt.Errorf("the example was answered %s", status)
	}

	opts, err := redis.ParseURL(s.redisURL)
	if err != nil {
		return fmt.Errorf("REDIS_URL: showing the record needs a single server's URL")
	}
	opts.MaxRetries = -1
	rdb := redis.NewClient(opts)
	defer rdb.Close()
	var rec record.Record
	var size int
	err = poll(ctx, func() error {
		b, err := rdb.Get(ctx, record.Key(exampleID)).Bytes()
		if err != nil {
			return fmt.Errorf("no record at %s yet: %w", record.Key(exampleID), err)
		}
		size = len(b)
		if rec, err = record.Decode(b); err != nil {
			return fatal{err}
		}
		if rec.Status == record.Pending {
			return fmt.Errorf("the record at %s is still pending", record.Key(exampleID))
		}
		return nil
	})
	if err != nil {
		return err
	}
	took := time.Since(answered)
	ttl := rdb.TTL(ctx, record.Key(exampleID)).Val()
	fmt.Fprintf(w, "%d ms later the scorer finds at %s (%d bytes, expires in %v):\n\n", took.Milliseconds(), record.Key(exampleID), size, ttl.Round(time.Second))
	if err := printRecord(w, rec); err != nil {
		return err
	}
	if rec.Status != record.Ready {
		return fmt.Errorf("the example ended as %s, not ready", rec.Status)
	}
	return nil
}

// post sends a body to the edge.
func (s *stack) post(ctx context.Context, body string) (status, answer string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.ingestURL+"/fingerprint/ingest", strings.NewReader(body))
	if err != nil {
		return "", "", err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("X-API-Key", s.apiKey)
	resp, err := s.client.Do(req)
	if err != nil {
		return "", "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	return resp.Status, string(b), err
}

// printRecord prints a record, one member a line, and of the vendor's event
// only the beginning.
func printRecord(w io.Writer, rec record.Record) error {
	event := rec.Event
	rec.Event = nil
	b, err := rec.Encode()
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(b))
	if _, err := dec.Token(); err != nil {
		return fmt.Errorf("print the record: %w", err)
	}
	for n := 0; dec.More(); n++ {
		name, err := dec.Token()
		if err != nil {
			return fmt.Errorf("print the record: %w", err)
		}
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return fmt.Errorf("print the record: %w", err)
		}
		lead := ",\n   "
		if n == 0 {
			lead = "  {"
		}
		fmt.Fprintf(w, "%s%q:%s", lead, name, value)
	}
	if len(event) > 0 {
		fmt.Fprintf(w, ",\n   \"event\":%s…  (%d bytes of the vendor's own)", event[:min(len(event), 60)], len(event))
	}
	fmt.Fprintln(w, "}")
	return nil
}
