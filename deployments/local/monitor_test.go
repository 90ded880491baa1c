package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// monitored runs the stack with a monitor and some load until the test ends,
// and returns the page's address.
func monitored(t *testing.T) string {
	t.Helper()
	env := addrs(t)
	ctx, cancel := context.WithCancel(t.Context())
	serving := &watched{for_: "Serving until Ctrl-C", seen: make(chan struct{})}
	exit := make(chan int, 1)
	go func() {
		exit <- run(ctx, []string{"--monitor", "--load", "50"}, func(name string) string { return env[name] }, serving, t.Output())
	}()
	t.Cleanup(func() {
		cancel()
		if code := <-exit; code != 0 {
			t.Errorf("exit %d", code)
		}
		if all := serving.all.String(); !regexp.MustCompile(`Sent \d+ events: \d+ accepted, \d+ not\.`).MatchString(all) {
			t.Errorf("no summary of the load in %q", all)
		}
	})
	select {
	case <-serving.seen:
	case code := <-exit:
		t.Fatalf("exit %d", code)
	}
	return regexp.MustCompile(`Watch it: (\S+)`).FindStringSubmatch(serving.all.String())[1]
}

func get(t *testing.T, url string) []byte {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", url, resp.Status, err)
	}
	return b
}

// The page has everything it draws from the services' own metrics, and needs
// nothing from anywhere else.
func TestMonitorFollowsTheLoad(t *testing.T) {
	url := monitored(t)
	const ready = `fp_persist_records_total{outcome="written",status="ready"}`
	var last float64
	streamstest.Eventually(t, "records in the snapshots", func() bool {
		var snapshots []snapshot
		if err := json.Unmarshal(get(t, url+"/metrics.json"), &snapshots); err != nil {
			t.Fatal(err)
		}
		if len(snapshots) < 2 {
			return false
		}
		first, s := snapshots[0], snapshots[len(snapshots)-1]
		last = s.Time
		if len(s.Silent) > 0 {
			t.Fatalf("no answer from %v", s.Silent)
		}
		return s.Series[ready] > first.Series[ready]
	})
	streamstest.Eventually(t, "news", func() bool {
		var news []snapshot
		if err := json.Unmarshal(get(t, url+"/metrics.json?after="+jsonNumber(last)), &news); err != nil {
			t.Fatal(err)
		}
		return len(news) > 0 && news[0].Time > last
	})
	page := string(get(t, url))
	if n := strings.Count(page, "://"); n != 2 { // the names of two XML languages
		t.Errorf("the page names %d addresses", n)
	}
	for _, name := range regexp.MustCompile(`"(fp_\w+)"`).FindAllStringSubmatch(page, -1) {
		if !strings.Contains(catalogue(t), "\n"+strings.TrimSuffix(name[1], "_bucket")+"\t") {
			t.Errorf("the page draws %s, which no service has", name[1])
		}
	}
}

// catalogue lists the metrics there are.
func catalogue(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../monitoring/catalogue.tsv")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func jsonNumber(f float64) string {
	b, _ := json.Marshal(f)
	return string(b)
}
