package main

import (
	"bytes"
	"encoding/json"
	"testing"
)

// The pipeline's benchmark runs, everything it sends is accepted and reaches
// its record, and what it sampled ends with nothing waiting.
func TestPipelineBenchmark(t *testing.T) {
	var out, errs bytes.Buffer
	args := []string{"bench", "pipeline", "--duration", "500ms", "--backlog", "500", "--held", "1000", "--json"}
	if code := run(t.Context(), args, func(string) string { return "" }, &out, &errs); code != 0 {
		t.Fatalf("exit %d: %s", code, errs.String())
	}
	var r pipelineResult
	if err := json.Unmarshal(out.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	if r.Sustained <= 0 || r.Backlog.Rate <= 0 || len(r.Latency) != 4 || len(r.Held) != 3 {
		t.Errorf("got %+v", r)
	}
	for _, l := range r.Latency {
		if l.Failed > 0 || l.Samples == 0 || l.Readable99 < l.Readable50 {
			t.Errorf("at %.0f/s: %+v", l.Rate, l)
		}
	}
	if s := r.Backlog.Samples; len(s) < 2 || s[0].Waiting == 0 || s[len(s)-1].Waiting != 0 {
		t.Errorf("samples %+v", s)
	}
}
