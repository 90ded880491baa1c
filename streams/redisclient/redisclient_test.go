package redisclient

import (
	"fmt"
	"strings"
	"testing"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

func TestURLForms(t *testing.T) {
	t.Parallel()
	for url, want := range map[string]string{
		"redis://:pw@h:6379/2":                             "*redis.Client",
		"rediss://u:pw@h:6379":                             "*redis.Client",
		"redis://h:6379?addr=h2:6379":                      "*redis.ClusterClient",
		"redis://h:26379/0?master_name=main&addr=h2:26379": "*redis.Client",
		"http://h":                        "",
		"redis://:secret@h:6379/not-a-db": "",
		"redis://h:6379?addr=h2:6379&read_timeout=secret-nonsense": "",
	} {
		c, err := New(url)
		got := ""
		if err == nil {
			got = fmt.Sprintf("%T", c)
			c.Close()
		} else if strings.Contains(err.Error(), "secret") {
			t.Errorf("%v shows the password", err)
		}
		if got != want {
			t.Errorf("%s: %s (%v), want %s", url, got, err, want)
		}
	}
}

func TestCAFileNeedsTLS(t *testing.T) {
	t.Parallel()
	url := func() ops.Secret { return "redis://:secret@h:6379/0" }
	if _, err := Open(Config{URL: url, CAFile: "ca.crt"}); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("a CA for a connection without TLS: %v", err)
	}
}
