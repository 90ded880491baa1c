package main

import (
	"slices"
	"strings"
	"testing"
)

func TestPanelsSayWhatBadLooksLike(t *testing.T) {
	known, names := catalogue(t), alerts()
	for _, d := range Dashboards() {
		for _, p := range d.Panels {
			if p.Unit == "" || p.Bad == "" || len(p.Queries) == 0 {
				t.Errorf("%s, %s: no unit, description or query", d.Title, p.Title)
			}
			for _, query := range p.Queries {
				for _, name := range metricName.FindAllString(query.Expr, -1) {
					if !known[name] {
						t.Errorf("%s, %s: no metric is called %s", d.Title, p.Title, name)
					}
				}
				if strings.Contains(query.expr(), "$}") || strings.Contains(query.Expr, "fp_") && !strings.Contains(query.expr(), "$instance") {
					t.Errorf("%s, %s: %s is not selected by the variables", d.Title, p.Title, query.expr())
				}
			}
			for _, a := range p.Alerts {
				if !slices.Contains(names, a) {
					t.Errorf("%s, %s: no alert is called %s", d.Title, p.Title, a)
				}
			}
		}
	}
}

// TestEveryMetricIsLookedAt keeps the catalogue small: what is in no panel and
// no rule is nobody's.
func TestEveryMetricIsLookedAt(t *testing.T) {
	text := &strings.Builder{}
	for _, d := range Dashboards() {
		for _, p := range d.Panels {
			for _, query := range p.Queries {
				text.WriteString(query.Expr + " ")
			}
		}
	}
	for _, g := range Groups(1) {
		for _, r := range g.Rules {
			text.WriteString(r.Expr + " ")
		}
	}
	looked := map[string]bool{}
	for _, name := range metricName.FindAllString(text.String(), -1) {
		for _, part := range []string{"_bucket", "_sum", "_count"} {
			looked[strings.TrimSuffix(name, part)] = true
		}
	}
	for name := range catalogue(t) {
		for _, part := range []string{"_bucket", "_sum", "_count"} {
			name = strings.TrimSuffix(name, part)
		}
		if !looked[name] {
			t.Errorf("nobody looks at %s", name)
		}
	}
}
