package main

import (
	"os"
	"strings"
	"testing"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/services/persister"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher"
)

// The README names every setting the services read.
func TestREADMENamesEverySetting(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	settings := append(ingest.Program().Settings(), prefetcher.Program().Settings()...)
	settings = append(settings, persister.Program().Settings()...)
	if len(settings) < 20 {
		t.Fatalf("only %d settings", len(settings))
	}
	for _, s := range settings {
		if !strings.Contains(string(readme), "`"+s.Name+"`") {
			t.Errorf("the README does not name %s", s.Name)
		}
		if s.Default != "" && !strings.Contains(string(readme), "`"+shortDuration(s.Default)+"`") {
			t.Errorf("the README does not give the default of %s, %s", s.Name, s.Default)
		}
	}
}

// shortDuration writes 24h0m0s as people do.
func shortDuration(d string) string {
	if s, ok := strings.CutSuffix(d, "m0s"); ok {
		d = s + "m"
		if s, ok := strings.CutSuffix(d, "h0m"); ok {
			d = s + "h"
		}
	}
	return d
}
