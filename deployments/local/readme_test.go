package main

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/services/persister"
	"github.com/idenza/fingerprint-prefetch/services/prefetcher"
	"github.com/idenza/fingerprint-prefetch/streams/streamstest"
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
	for _, pattern := range []string{"*_test.go", "faults/*_test.go", "../../streams/*_test.go", "../../streams/cmd/*/*_test.go", "../../services/*/*_test.go"} {
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
	for file, atLeast := range map[string]int{"../../README.md": 10, "../k8s/README.md": 5, "../../docs/reliability.md": 5} {
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

// Every streamctl line in the documents is one that streamctl takes: each is run
// with examples for its placeholders, and the tool's word for bad usage is exit
// code 2. A verb alone within a sentence is a name, and must be one.
func TestDocumentedStreamctlLines(t *testing.T) {
	t.Parallel()
	dir, err := build()
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, pattern := range []string{"../../README.md", "../../docs/*.md", "../*/README.md", "../monitoring/runbooks/*.md", "../../streams/*/README.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil || len(found) == 0 {
			t.Fatalf("%s: %d files, %v", pattern, len(found), err)
		}
		files = append(files, found...)
	}
	lines := map[string]string{}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range regexp.MustCompile("(?m)^(?:bin/)?streamctl (.*)$").FindAllStringSubmatch(string(b), -1) {
			command, _, _ := strings.Cut(l[1], "#")
			lines[strings.TrimSpace(command)] = file
		}
		for _, l := range regexp.MustCompile("`(?:bin/)?streamctl ([^`]*)`").FindAllStringSubmatch(string(b), -1) {
			if command := l[1]; strings.Contains(command, " ") {
				lines[command] = file
			} else {
				lines[command+" --help"] = file
			}
		}
	}
	if len(lines) < 20 {
		t.Fatalf("only %d lines", len(lines))
	}
	examples := strings.NewReplacer("STREAM=SIZE", "FP_DEAD=2GiB", "REQUEST_ID", "1A2B3C4D5E", "SEQUENCE", "1", "DURABLE", "prefetcher", "REASON", "exhausted", "TIME", "24h")
	n, rs := streamstest.NewNATS(t), streamstest.NewRedis(t)
	for line, file := range lines {
		args := strings.Fields(examples.Replace(line))
		// What goes on for ever has been taken by the time it is stopped.
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		cmd := exec.CommandContext(ctx, filepath.Join(dir, "streamctl"), args...)
		cmd.Env = []string{"NATS_URL=" + n.URL, "REDIS_URL=" + rs.URL()}
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		out, err := cmd.CombinedOutput()
		cancel()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() == 2 {
			t.Errorf("%s: streamctl %s: %v\n%s", file, line, err, out)
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
