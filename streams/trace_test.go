package streams

import (
	"strings"
	"testing"
)

func TestTraceParent(t *testing.T) {
	t.Parallel()
	const good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	for name, test := range map[string]struct{ header, want string }{
		"good":            {good, good},
		"not sampled":     {good[:53] + "00", good[:53] + "00"},
		"flags unknown":   {good[:53] + "ff", good},
		"empty":           {"", ""},
		"upper case":      {strings.ToUpper(good), ""},
		"longer":          {good + "-x", ""},
		"shorter":         {good[:54], ""},
		"other version":   {"01" + good[2:], ""},
		"version ff":      {"ff" + good[2:], ""},
		"no trace":        {"00-00000000000000000000000000000000-00f067aa0ba902b7-01", ""},
		"no span":         {"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01", ""},
		"not hexadecimal": {"00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01", ""},
		"line break":      {"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7\r01", ""},
		"flags not hex":   {good[:53] + "0x", ""},
	} {
		if got := TraceParent(WithTraceParent(t.Context(), test.header)); got != test.want {
			t.Errorf("%s: got %q", name, got)
		}
	}
}
