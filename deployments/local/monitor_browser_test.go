//go:build checkops

package main

import (
	"os/exec"
	"regexp"
	"testing"

	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
)

// TestMonitorPage opens the page in headless Chromium: every figure is drawn,
// and the load is seen.
func TestMonitorPage(t *testing.T) {
	url := monitored(t)
	figure := regexp.MustCompile(`data-series="([^"]+)">([^<]*)<`)
	var seen map[string]string
	streamstest.Eventually(t, "the load on the page", func() bool {
		dom, err := exec.CommandContext(t.Context(), "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom", url).Output()
		if err != nil {
			t.Fatalf("chromium: %v", err)
		}
		seen = map[string]string{}
		for _, m := range figure.FindAllSubmatch(dom, -1) {
			seen[string(m[1])] = string(m[2])
		}
		perSecond := regexp.MustCompile(`^[1-9]\d(\.\d)?/s$`)
		return perSecond.MatchString(seen["Throughput: accepted"]) && perSecond.MatchString(seen["Throughput: ready records"])
	})
	for name, value := range seen {
		if value == "–" || value == "" || value == "NaN" {
			t.Errorf("%s is %q", name, value)
		}
	}
	if len(seen) < 15 {
		t.Errorf("%d figures", len(seen))
	}
}
