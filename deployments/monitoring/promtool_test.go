//go:build checkops

// The checks that need Prometheus' own tools: make check-ops builds them and
// says where they are in PROMTOOL and PROMETHEUS.

package main

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
)

// tool returns the path of a program of Prometheus'.
func tool(t *testing.T, name string) string {
	t.Helper()
	path := os.Getenv(strings.ToUpper(name))
	if path == "" {
		t.Fatalf("%s is not set; make check-ops sets it", strings.ToUpper(name))
	}
	return path
}

func promtool(t *testing.T, args ...string) error {
	t.Helper()
	out, err := exec.Command(tool(t, "promtool"), args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("promtool %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

func TestPromtoolAcceptsTheRules(t *testing.T) {
	if err := promtool(t, "check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"); err != nil {
		t.Error(err)
	}
}

// unit is one test in promtool's file.
type unit struct {
	Name     string         `yaml:"name"`
	Interval string         `yaml:"interval"`
	Series   []seriesValues `yaml:"input_series"`
	Expr     []exprTest     `yaml:"promql_expr_test"`
}

type seriesValues struct {
	Series string `yaml:"series"`
	Values string `yaml:"values"`
}

type exprTest struct {
	Expr    string       `yaml:"expr"`
	At      string       `yaml:"eval_time"`
	Samples []exprSample `yaml:"exp_samples"`
}

type exprSample struct {
	Labels string  `yaml:"labels"`
	Value  float64 `yaml:"value"`
}

func series(lines []string) (out []seriesValues) {
	for _, l := range lines {
		name, values, _ := strings.Cut(l, " ")
		if i := strings.LastIndex(l, "} "); i >= 0 { // labels may hold blanks
			name, values = l[:i+1], l[i+2:]
		}
		out = append(out, seriesValues{name, strings.TrimSpace(values)})
	}
	return out
}

// firing asks whether an alert fires at a time.
func firing(c ruleCase, at time.Duration, want bool) exprTest {
	selector := fmt.Sprintf(`alertname=%q,alertstate="firing"`, c.alert)
	if c.window != "" {
		selector += fmt.Sprintf(`,window=%q`, c.window)
	}
	if c.labels != "" {
		selector += "," + c.labels
	}
	// Without the severity in the selector, one that is wrong shows.
	e := exprTest{Expr: "group by (severity) (ALERTS{" + selector + "})", At: at.String()}
	if c.alert == "FPLagHigh" { // has two
		e.Expr = "group by (severity) (ALERTS{" + selector + `,severity="` + c.severity + `"})`
	}
	if want {
		e.Samples = []exprSample{{fmt.Sprintf("{severity=%q}", c.severity), 1}}
	}
	return e
}

// units returns the tests of one alert's case; wait is its for.
func units(c ruleCase, wait time.Duration) (out []unit) {
	step := c.step
	if step == 0 {
		step = time.Minute
	}
	at := c.at
	if at == 0 {
		at = wait + 2*step
	}
	add := func(name string, lines []string, tests ...exprTest) {
		out = append(out, unit{Name: c.alert + " " + c.severity + c.window + " " + name, Interval: step.String(), Series: series(lines), Expr: tests})
	}
	if c.fires != nil {
		tests := []exprTest{firing(c, at, true)}
		if wait > 0 {
			early := wait - step
			if c.early > 0 {
				early = c.early
			}
			if c.window != "" { // a ratio of rates takes a step to be there
				early = wait
			}
			tests = append([]exprTest{firing(c, early, false)}, tests...)
		}
		add("fires", c.fires, tests...)
	}
	for i, lines := range c.not {
		name := "does not fire " + strconv.Itoa(i+1)
		if c.notAt > 0 {
			add(name, lines, firing(c, c.notAt, false))
			continue
		}
		var tests []exprTest
		for n := range 10 { // also in between: a short trouble is none
			tests = append(tests, firing(c, at+time.Duration(n*n)*step, false))
		}
		add(name, lines, tests...)
	}
	return out
}

// check runs tests against rules and returns what promtool says.
func check(t *testing.T, dir, name string, rules []Group, tests []unit) error {
	t.Helper()
	ruleFile, testFile := filepath.Join(dir, name+".rules.yaml"), filepath.Join(dir, name+".test.yaml")
	b, err := rulesYAML(rules)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(ruleFile, b, 0o600); err != nil {
		t.Fatal(err)
	}
	// One file for each step, since rules are evaluated as often.
	bySteps := map[string][]unit{}
	for _, u := range tests {
		bySteps[u.Interval] = append(bySteps[u.Interval], u)
	}
	for step, units := range bySteps {
		b, err = yaml.Marshal(map[string]any{"rule_files": []string{ruleFile}, "evaluation_interval": step, "tests": units})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(testFile, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := promtool(t, "test", "rules", testFile); err != nil {
			return err
		}
	}
	return nil
}

func calmUnits() (out []unit) {
	for name, lines := range calm() {
		u := unit{Name: name, Interval: "1m", Series: series(lines)}
		for at := 1; at < 290; at += 4 {
			u.Expr = append(u.Expr, exprTest{Expr: `ALERTS{alertstate="firing"}`, At: (time.Duration(at) * time.Minute).String()})
		}
		out = append(out, u)
	}
	return out
}

// unitsOf returns the tests of one rule.
func unitsOf(t *testing.T, r Rule) (out []unit) {
	t.Helper()
	wait, err := time.ParseDuration("0" + r.For)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range cases() {
		if c.alert == r.Alert && (c.window == r.Labels["window"]) && (c.alert != "FPLagHigh" || c.severity == r.Labels["severity"]) {
			out = append(out, units(c, wait)...)
		}
	}
	if len(out) == 0 {
		t.Errorf("%s %s has no test", r.Alert, r.Labels["severity"])
	}
	return out
}

// TestAlerts holds every alert to what makes it fire, and when, and to what
// nearly does.
func TestAlerts(t *testing.T) {
	dir := t.TempDir()
	for _, g := range Groups(1) {
		var tests []unit
		for _, r := range g.Rules {
			if r.Alert != "" {
				tests = append(tests, unitsOf(t, r)...)
			}
		}
		if err := check(t, dir, g.Name, []Group{g}, tests); err != nil {
			t.Error(err)
		}
	}
	if err := check(t, dir, "calm", Groups(1), calmUnits()); err != nil {
		t.Error(err)
	}
}

// mutant is a rule with one thing wrong.
type mutant struct {
	what string
	rule Rule
}

var (
	comparison = regexp.MustCompile(` (>|<|==) (bool )?([0-9.]+)`)
	extreme    = regexp.MustCompile(`\b(min|max) by`)
	set        = regexp.MustCompile(`\b(unless|and)\b`)
)

// mutants returns every rule with one thing wrong.
func mutants(r Rule) (out []mutant) {
	add := func(what string, change func(*Rule)) {
		m := r
		m.Labels = map[string]string{}
		maps.Copy(m.Labels, r.Labels)
		change(&m)
		out = append(out, mutant{r.Alert + r.Labels["window"] + " " + r.Labels["severity"] + ": " + what, m})
	}
	replace := func(re *regexp.Regexp, with func(found []string) []string) {
		for _, at := range re.FindAllStringSubmatchIndex(r.Expr, -1) {
			var groups []string
			for i := 0; i < len(at); i += 2 {
				if at[i] < 0 {
					groups = append(groups, "")
					continue
				}
				groups = append(groups, r.Expr[at[i]:at[i+1]])
			}
			for _, w := range with(groups) {
				add(fmt.Sprintf("%q at %d becomes %q", groups[0], at[0], w), func(m *Rule) { m.Expr = r.Expr[:at[0]] + w + r.Expr[at[1]:] })
			}
		}
	}
	replace(comparison, func(g []string) []string {
		n, err := strconv.ParseFloat(g[3], 64)
		if err != nil {
			panic(err)
		}
		flipped := map[string]string{">": "<", "<": ">", "==": "!="}[g[1]]
		out := []string{fmt.Sprintf(" %s %s%s", flipped, g[2], g[3])}
		if n != 0 {
			out = append(out, fmt.Sprintf(" %s %s%g", g[1], g[2], 10*n), fmt.Sprintf(" %s %s%g", g[1], g[2], n/10))
		} else {
			out = append(out, fmt.Sprintf(" %s %s10", g[1], g[2]))
		}
		return out
	})
	replace(extreme, func(g []string) []string {
		return []string{map[string]string{"min": "max by", "max": "min by"}[g[1]]}
	})
	replace(set, func(g []string) []string {
		return []string{map[string]string{"unless": "and", "and": "unless"}[g[1]]}
	})
	for _, wait := range []string{"0s", "45m"} {
		if r.For != "" || wait != "0s" {
			add("for "+wait, func(m *Rule) { m.For = wait })
		}
	}
	add("severity", func(m *Rule) {
		m.Labels["severity"] = map[string]string{"critical": "warning", "warning": "critical"}[r.Labels["severity"]]
	})
	return out
}

// TestNoMutantSurvives breaks every alert in every small way there is; its
// tests must notice each.
func TestNoMutantSurvives(t *testing.T) {
	type job struct {
		mutant
		group Group
		tests []unit
	}
	jobs := make(chan job)
	var wg sync.WaitGroup
	var mu sync.Mutex
	killed := 0
	for range runtime.GOMAXPROCS(0) {
		dir := t.TempDir()
		wg.Go(func() {
			for j := range jobs {
				err := check(t, dir, "mutant", []Group{j.group}, j.tests)
				mu.Lock()
				if err == nil {
					t.Errorf("survives: %s", j.what)
				} else {
					killed++
				}
				mu.Unlock()
			}
		})
	}
	for _, g := range Groups(1) {
		for _, r := range g.Rules {
			if r.Alert == "" {
				continue
			}
			tests := unitsOf(t, r)
			for _, m := range mutants(r) {
				// The mutant alone, with the records it reads.
				group := Group{Name: g.Name}
				for _, other := range g.Rules {
					if other.Record != "" && strings.Contains(r.Expr, other.Record) {
						group.Rules = append(group.Rules, other)
					}
				}
				group.Rules = append(group.Rules, m.rule)
				jobs <- job{m, group, tests}
			}
		}
	}
	close(jobs)
	wg.Wait()
	t.Logf("%d mutants killed", killed)
	if killed < 200 {
		t.Errorf("only %d mutants", killed)
	}
}
