package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// natsContext is the part of a context of the nats command that is understood
// here. Its files are in nats/context/NAME.json of the user's configuration.
type natsContext struct {
	URL      string `json:"url"`
	User     string `json:"user"`
	Password string `json:"password"`
	Token    string `json:"token"`
	Creds    string `json:"creds"`
	CA       string `json:"ca"`
	Cert     string `json:"cert"`
	Key      string `json:"key"`
	// These are not understood.
	NKey      string `json:"nkey"`
	NSC       string `json:"nsc"`
	SocksURL  string `json:"socks_proxy"`
	JSDomain  string `json:"jetstream_domain"`
	JSPrefix  string `json:"jetstream_api_prefix"`
	TLSFirst  bool   `json:"tls_first"`
	WindowsCS string `json:"windows_cert_store"`
}

// settings returns what the NATS_* settings are read from: the environment,
// or else the context that --context or NATS_CONTEXT names. Errors hold
// nothing secret.
func (e env) settings() (func(string) string, error) {
	if e.context == nil || *e.context == "" {
		return e.getenv, nil
	}
	fail := func(err error) (func(string) string, error) {
		return nil, fmt.Errorf("%w:\nNATS context %q: %w", ops.ErrSettings, *e.context, err)
	}
	home := e.getenv("HOME")
	dir := e.getenv("XDG_CONFIG_HOME")
	if dir == "" {
		dir = filepath.Join(home, ".config")
	}
	if filepath.Base(*e.context) != *e.context {
		return fail(errors.New("is no name"))
	}
	b, err := os.ReadFile(filepath.Join(dir, "nats", "context", *e.context+".json"))
	if err != nil {
		return fail(err)
	}
	var c natsContext
	if err := json.Unmarshal(b, &c); err != nil {
		return fail(errors.New("not JSON")) // the error may quote a secret
	}
	if c.NKey != "" || c.NSC != "" || c.SocksURL != "" || c.JSDomain != "" || c.JSPrefix != "" || c.TLSFirst || c.WindowsCS != "" {
		return fail(errors.New("only url, user, password, token, creds, ca, cert and key are understood"))
	}
	own := map[string]string{"NATS_URL": c.servers()}
	for name, path := range map[string]string{"NATS_CREDS_FILE": c.Creds, "NATS_CA_FILE": c.CA, "NATS_CERT_FILE": c.Cert, "NATS_KEY_FILE": c.Key} {
		if rest, ok := strings.CutPrefix(path, "~/"); ok {
			path = filepath.Join(home, rest)
		}
		own[name] = path
	}
	return func(name string) string {
		if v := e.getenv(name); v != "" {
			return v
		}
		if name == "NATS_URL" && e.getenv("NATS_URL_FILE") != "" {
			return ""
		}
		return own[name]
	}, nil
}

// servers returns the URLs with the user or token in each that names none.
func (c natsContext) servers() string {
	who := url.User(c.Token)
	if c.User != "" {
		who = url.UserPassword(c.User, c.Password)
	} else if c.Token == "" {
		return c.URL
	}
	all := strings.Split(c.URL, ",")
	for i, s := range all {
		if u, err := url.Parse(strings.TrimSpace(s)); err == nil && u.User == nil {
			u.User = who
			all[i] = u.String()
		}
	}
	return strings.Join(all, ",")
}
