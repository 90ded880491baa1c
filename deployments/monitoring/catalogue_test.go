package main

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

var update = flag.Bool("update", false, "write the golden files")

// TestCatalogue compares every metric of every service, as it really runs, with
// catalogue.tsv: names, types and labels are a contract with dashboards and
// alerts.
func TestCatalogue(t *testing.T) {
	p := newPipeline(t)
	if code := p.post("1A2B3C4D5E", 12); code != 202 {
		t.Fatalf("answer %d", code)
	}
	streamstest.Eventually(t, "a record", func() bool { return p.sum("fp_pipeline_end_to_end_seconds") == 1 })
	streamstest.Eventually(t, "a heartbeat at its end", func() bool {
		return p.sum("fp_stage_heartbeat_timestamp_seconds", "stage", "persister") > 0
	})
	streamstest.Eventually(t, "every stream read", func() bool { return p.sum("fp_stream_limit_bytes", "stream", "FP_DEAD") > 0 })

	type entry struct{ kind, labels string }
	entries, of := map[string]entry{}, map[string][]string{}
	for _, service := range services {
		if problems, err := testutil.GatherAndLint(p.processes[service].Registry); err != nil || len(problems) > 0 {
			t.Errorf("%s: %v, %v", service, problems, err)
		}
		for name, f := range p.gather(service) {
			if !strings.HasPrefix(name, "fp_") {
				continue
			}
			labels := map[string]bool{}
			for _, m := range f.GetMetric() {
				for _, l := range m.GetLabel() {
					labels[l.GetName()] = true
				}
				if h := m.GetHistogram(); h != nil && strings.HasSuffix(name, "_seconds") && (h.Schema == nil || len(h.GetBucket()) == 0) {
					t.Errorf("%s has not both native and classic buckets", name)
				}
			}
			e := entry{strings.ToLower(f.GetType().String()), strings.Join(slices.Sorted(maps.Keys(labels)), ",")}
			if before, ok := entries[name]; ok && before != e {
				t.Errorf("%s is %v in one service and %v in another", name, before, e)
			}
			entries[name] = e
			of[name] = append(of[name], service)
		}
	}
	got := &strings.Builder{}
	fmt.Fprintln(got, "name\ttype\tlabels\tservices")
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		fmt.Fprintf(got, "%s\t%s\t%s\t%s\n", name, entries[name].kind, entries[name].labels, strings.Join(of[name], ","))
	}
	golden(t, "catalogue.tsv", []byte(got.String()))
}

// golden compares with a committed file, or writes it with -update.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != string(got) {
		t.Errorf("%s is not what the code says; go test ./deployments/monitoring -update, and look at the difference", file)
	}
}

// TestSubscribersAddNoSeries sends from 10,000 subscribers and counts series.
func TestSubscribersAddNoSeries(t *testing.T) {
	p := newPipeline(t)
	series := func() (n int) {
		for _, service := range services {
			for name, f := range p.gather(service) {
				if strings.HasPrefix(name, "fp_") {
					n += len(f.GetMetric())
				}
			}
		}
		return n
	}
	// One of each kind of event, so that every series there can be is there.
	streamstest.Eventually(t, "a heartbeat at its end", func() bool {
		return p.sum("fp_stage_heartbeat_timestamp_seconds", "stage", "persister") > 0
	})
	streamstest.Eventually(t, "every stream read", func() bool { return p.sum("fp_stream_limit_bytes", "stream", "FP_DEAD") > 0 })
	if code := p.post("first", 1); code != 202 {
		t.Fatalf("answer %d", code)
	}
	streamstest.Eventually(t, "its record", func() bool { return p.sum("fp_pipeline_end_to_end_seconds") == 1 })
	before := series()

	const subscribers = 10_000
	var next, refused atomic.Int64
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for i := next.Add(1); i <= subscribers; i = next.Add(1) {
				if p.post(fmt.Sprintf("id-%d", i), i) != 202 {
					refused.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if n := refused.Load(); n > 0 {
		t.Fatalf("%d refused", n)
	}
	streamstest.Eventually(t, "all records", func() bool { return p.sum("fp_pipeline_end_to_end_seconds") == subscribers+1 })
	if after := series(); after != before {
		t.Errorf("%d series before, %d after %d subscribers", before, after, subscribers)
	}
}
