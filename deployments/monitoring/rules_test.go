package main

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestFilesAreWhatTheProgramWrites finds a change that was not written out.
func TestFilesAreWhatTheProgramWrites(t *testing.T) {
	files, err := outputs()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range files {
		if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: run `go run ./deployments/monitoring` (%v)", name, err)
		}
	}
}

// catalogue returns the names that may appear in a query: those of metrics,
// and of a histogram's parts.
func catalogue(t *testing.T) map[string]bool {
	t.Helper()
	b, err := os.ReadFile("catalogue.tsv")
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n")[1:] {
		f := strings.Split(line, "\t")
		names[f[0]] = true
		if f[1] == "histogram" {
			for _, part := range []string{"_bucket", "_sum", "_count"} {
				names[f[0]+part] = true
			}
		}
	}
	return names
}

var metricName = regexp.MustCompile(`\bfp_[a-z0-9_]+`)

// runbook is a page, cut at its headings.
func runbook(t *testing.T, alert string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("runbooks", alert+".md"))
	if err != nil {
		t.Error(err)
		return nil
	}
	sections := map[string]string{}
	for s := range strings.SplitSeq(string(b), "\n## ") {
		title, text, _ := strings.Cut(s, "\n")
		sections[title] = text
	}
	return sections
}

var block = regexp.MustCompile("(?s)```([a-z]+)\n(.*?)```")

// runbookQueries are the queries a page offers.
func runbookQueries(t *testing.T, alert string) (queries []string) {
	for _, m := range block.FindAllStringSubmatch(runbook(t, alert)["Checks"], -1) {
		if m[1] == "promql" {
			queries = append(queries, strings.Split(strings.TrimSpace(m[2]), "\n")...)
		}
	}
	return queries
}

func alerts() (names []string) {
	for _, g := range Groups(1) {
		for _, r := range g.Rules {
			if r.Alert != "" && !slices.Contains(names, r.Alert) {
				names = append(names, r.Alert)
			}
		}
	}
	return names
}

func TestEveryAlertHasARunbook(t *testing.T) {
	known := catalogue(t)
	for _, alert := range alerts() {
		page := runbook(t, alert)
		for _, title := range []string{"# " + alert, "Meaning", "Impact", "Checks", "Fix"} {
			if _, ok := page[title]; !ok {
				t.Errorf("%s.md has no %q", alert, title)
			}
		}
		queries := runbookQueries(t, alert)
		if len(queries) == 0 {
			t.Errorf("%s.md has no query", alert)
		}
		for _, name := range metricName.FindAllString(strings.Join(slices.Collect(maps.Values(page)), " "), -1) {
			if !known[name] {
				t.Errorf("%s.md: no metric is called %s", alert, name)
			}
		}
	}
	pages, err := filepath.Glob("runbooks/*.md")
	if err != nil || len(pages) != len(alerts()) {
		t.Errorf("%d pages for %d alerts (%v)", len(pages), len(alerts()), err)
	}
}

func TestRulesSayWhatANightNeeds(t *testing.T) {
	known := catalogue(t)
	for _, g := range Groups(1) {
		records := map[string]bool{}
		for _, r := range g.Rules {
			for _, name := range metricName.FindAllString(r.Expr, -1) {
				if !known[name] {
					t.Errorf("%s%s: no metric is called %s", r.Record, r.Alert, name)
				}
			}
			if r.Record != "" {
				records[r.Record] = true
				continue
			}
			for _, record := range regexp.MustCompile(`fp:[a-z0-9_:]+`).FindAllString(r.Expr, -1) {
				if !records[record] {
					t.Errorf("%s reads %s from outside its group", r.Alert, record)
				}
			}
			for _, a := range []string{"summary", "description", "runbook_url"} {
				if r.Annotations[a] == "" {
					t.Errorf("%s has no %s", r.Alert, a)
				}
			}
			if s := r.Labels["severity"]; s != "critical" && s != "warning" {
				t.Errorf("%s has severity %q", r.Alert, s)
			}
		}
	}
}
