package main

import (
	"os"
	"path/filepath"
	"regexp"
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

// The READMEs name no test that does not exist.
func TestREADMENamesRealTests(t *testing.T) {
	var tests strings.Builder
	for _, pattern := range []string{"*_test.go", "../../streams/*_test.go", "../../services/*/*_test.go"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, %v", pattern, len(files), err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			tests.Write(b)
		}
	}
	for file, atLeast := range map[string]int{"../../README.md": 10, "../k8s/README.md": 5} {
		readme, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile("`(Test[A-Za-z0-9]+)`").FindAllStringSubmatch(string(readme), -1)
		if len(names) < atLeast {
			t.Fatalf("%s names only %d tests", file, len(names))
		}
		for _, n := range names {
			if !strings.Contains(tests.String(), "func "+n[1]+"(") {
				t.Errorf("%s: there is no %s", file, n[1])
			}
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
