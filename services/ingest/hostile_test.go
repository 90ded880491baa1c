package ingest

import (
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// hostile is one request as bytes on a connection, and its whole answer.
type hostile struct {
	// line is the request line, the good one if empty.
	line string
	// headers, by name, go in the place of the good ones; "" leaves one out.
	// Names are sent as they are.
	headers map[string]string
	body    string // the good one if empty; "-" for none
	status  int
	answer  string // error text; "" for a 202
}

// hostileRequests are the odd and hostile requests beside those whose body is
// what is odd. $KEY is a good key.
func hostileRequests() map[string]hostile {
	const (
		noKey, badKey = "Missing API key", "Invalid API key"
		path, method  = "Not found", "Method not allowed"
		media, coding = "Content-Type must be application/json in UTF-8", "Content-Encoding is not supported"
		large, cut    = "Request body is larger than 64 KiB", "Invalid JSON in request body: ends too early or comes too slowly"
		empty         = "Invalid JSON in request body: empty"
		requestIDText = "Invalid 'request_id' in request body: must be 1 to 64 characters, dot-separated tokens of A-Z, a-z, 0-9, _ and -, beginning with a letter or digit"
		userText      = "Invalid 'user_id' in request body: must not contain control, bidirectional override, line separator or noncharacter code points"
		digits        = "Invalid 'subscriber_id' in request body: must be an integer in plain digits"
		whole         = "#" // net/http's own text
	)
	all := map[string]hostile{}
	add := func(name string, h hostile) {
		if _, ok := all[name]; ok {
			panic(name)
		}
		all[name] = h
	}
	header := func(pairs ...string) map[string]string {
		m := map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			m[pairs[i]] = pairs[i+1]
		}
		return m
	}
	key := func(v string) map[string]string { return header("X-API-Key", v) }

	// Keys.
	add("no key", hostile{headers: key(""), status: 401, answer: noKey})
	for name, headers := range map[string]map[string]string{
		"key as bearer":          header("X-API-Key", "", "Authorization", "Bearer $KEY"),
		"key as basic":           header("X-API-Key", "", "Authorization", "Basic JEtFWTo="),
		"key in a cookie":        header("X-API-Key", "", "Cookie", "X-API-Key=$KEY; api_key=$KEY"),
		"key with underscores":   header("X-API-Key", "", "X_API_Key", "$KEY"),
		"key of another name":    header("X-API-Key", "", "Api-Key", "$KEY"),
		"key behind a forwarder": header("X-API-Key", "", "X-Forwarded-X-API-Key", "$KEY"),
	} {
		add(name, hostile{headers: headers, status: 401, answer: noKey})
	}
	for name, line := range map[string]string{
		"key in the query":        "POST /fingerprint/ingest?X-API-Key=$KEY HTTP/1.1",
		"key in the query, other": "POST /fingerprint/ingest?api_key=$KEY&apiKey=$KEY&key=$KEY HTTP/1.1",
	} {
		add(name, hostile{line: line, headers: key(""), status: 401, answer: noKey})
	}
	for name, v := range map[string]string{
		"key: a word":             "secret",
		"key: one character":      "x",
		"key: twice, joined":      "$KEY,$KEY",
		"key: twice, spaced":      "$KEY $KEY",
		"key: quoted":             `"$KEY"`,
		"key: bearer":             "Bearer $KEY",
		"key: one more":           "$KEYx",
		"key: percent":            "$KEY%00",
		"key: tab in it":          "$KEY\tx",
		"key: SQL":                "' OR '1'='1' --",
		"key: wildcard":           "*",
		"key: path":               "../../keys.json",
		"key: not ASCII":          "clé",
		"key: broken UTF-8":       "\xff\xfe",
		"key: template":           "${jndi:ldap://edge/x}",
		"key: prefix alone":       "fpk_",
		"key: no secret":          "fpk_acme-1_",
		"key: another's id":       strings.Repeat("fpk_admin_", 2),
		"key: 8 KiB":              strings.Repeat("k", 8<<10),
		"key: underscores":        strings.Repeat("_", 100),
		"key: its own hash":       "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
		"key: null":               "null",
		"key: undefined":          "undefined",
		"key: true":               "true",
		"key: a placeholder":      "YOUR_API_KEY",
		"key: a line that ends":   `x\r\nX-API-Key: $KEY`,
		"key: JSON":               `{"key":"$KEY"}`,
		"key: list":               `["$KEY"]`,
		"key: another alphabet":   "fpk_аcme-1_",
		"key: in upper case":      "$UPPER",
		"key: without its end":    "$SHORT",
		"key: revoked":            "$REVOKED",
		"key: expired":            "$EXPIRED",
		"key: last digit changed": "$CHANGED",
	} {
		add(name, hostile{headers: key(v), status: 401, answer: badKey})
	}
	add("key: header twice", hostile{headers: header("X-API-Key", "$KEY", "x-api-key", "$KEY"), status: 401, answer: badKey})
	add("key: header twice, one bad", hostile{headers: header("X-API-Key", "$KEY", "x-api-key", "secret"), status: 401, answer: badKey})
	add("key: NUL", hostile{headers: key("$KEY\x00"), status: 400, answer: whole})
	add("key: carriage return", hostile{headers: key("$KEY\rx"), status: 400, answer: whole})
	add("key: space before the colon", hostile{headers: header("X-API-Key", "", "X-API-Key ", "$KEY"), status: 400, answer: whole})
	add("key: white space around", hostile{headers: key(" \t$KEY \t"), status: 202})
	add("key: name in lower case", hostile{headers: header("X-API-Key", "", "x-api-key", "$KEY"), status: 202})
	add("no key before a bad body", hostile{headers: key(""), body: "{", status: 401, answer: noKey})
	add("no key before a bad type", hostile{headers: header("X-API-Key", "", "Content-Type", "x"), status: 401, answer: noKey})
	add("no key before a large body", hostile{headers: header("X-API-Key", "", "Content-Length", "99999999"), status: 401, answer: noKey})
	add("no key before a length of terabytes", hostile{headers: header("X-API-Key", "x", "Content-Length", "9223372036854775807"), status: 401, answer: badKey})

	// Ids that mean something elsewhere: URLs, subjects, Redis, logs, shells.
	for name, id := range map[string]string{
		"parent": "..", "parent path": "../visitors/x", "parent escaped": "%2e%2e", "path": "v4/events", "backslash": `..\\x`, "query": "a?b=1", "fragment": "a#b",
		"semicolon": "a;b", "at": "a@edge", "URL": "http://edge/", "port": "a:1", "empty token": "a..b", "dot first": ".a", "dot last": "a.",
		"wildcard": "*", "wildcard token": "a.*", "rest": ">", "rest token": "a.>", "API subject": "$JS.API.STREAM.DELETE.FP_INGEST", "subject space": "a b",
		"PUB": `x\r\nPUB fp.dead 1\r\nx`, "header": `x\r\nNats-Rollup: all`, "FLUSHALL": `x\r\nFLUSHALL\r\n`, "hash tag": "{a}", "glob": "a[bc]?", "other key": "x:fp:prefetch:y",
		"log line": `a\n{\"level\":\"error\"}`, "terminal": `\u001b[2J`, "NUL": `a\u0000b`, "right to left": `a\u202eb`, "zero width": `a\u200bb`,
		"SQL": "' OR 1=1 --", "shell": "$(id)", "backtick": "`id`", "pipe": "a|b", "option": "-rf", "formula": "=cmd()", "markup": "<img src=x>", "template": "{{.}}", "lookup": "${jndi:ldap://x}",
		"format": "%s%n", "homoglyph": "аbc", "full width": "ａ", "emoji": "\U0001F600", "comma": "a,b", "plus": "a+b", "equals": "a=b", "tilde": "~root", "65": strings.Repeat("a", 65), "5000": strings.Repeat("a", 5000),
	} {
		add("request_id: "+name, hostile{body: body("request_id", `"`+id+`"`), status: 400, answer: requestIDText})
	}
	for name, id := range map[string]string{"wildcard": ">", "two tokens": "12.13", "negative": "-12", "SQL": "12 OR 1=1", "hex": "0xC", "comma": "12,13", "space": "12 ", "plus": "+12", "exponent": "12e0", "key": "12:x"} {
		add("subscriber_id: "+name, hostile{body: body("subscriber_id", `"`+id+`"`), status: 400, answer: digits})
	}
	for name, id := range map[string]string{"line break": `a\r\nb`, "NUL": `\u0000`, "terminal": `a\u001b]0;x\u0007`, "right to left": `a\u202egpj`, "delete": `a\u007f`, "line separator": `a\u2028b`} {
		add("user_id: "+name, hostile{body: body("user_id", `"`+id+`"`), status: 400, answer: userText})
	}
	for name, id := range map[string]string{"SQL": "' OR 1=1 --", "markup": "<script>alert(1)</script>", "path": "../../etc/passwd", "subject": "a.*.>", "shell": "$(id)", "percent": "%0d%0a", "template": "${jndi:ldap://x}", "JSON": `{\"a\":1}`} {
		// Opaque, and only ever data.
		add("user_id: "+name, hostile{body: body("user_id", `"`+id+`"`), status: 202})
	}
	add("subscriber_id: another's", hostile{body: body("subscriber_id", "13"), status: 403, answer: "API key is not allowed to send for this subscriber_id"})
	add("subscriber_id: another's string", hostile{body: body("subscriber_id", `"13"`), status: 403, answer: "API key is not allowed to send for this subscriber_id"})

	// Media types and codings.
	for name, v := range map[string]string{
		"none": "", "form": "application/x-www-form-urlencoded", "multipart": "multipart/form-data; boundary=x", "XML": "application/xml", "text": "text/plain", "text JSON": "text/json",
		"suffix": "application/ld+json", "problem": "application/problem+json", "lines": "application/x-ndjson", "any": "*/*", "two": "application/json, application/json", "latin1": "application/json; charset=iso-8859-1",
		"UTF-16": "application/json; charset=utf-16", "version": "application/json; v=1", "half": "application/", "no slash": "json", "space": "application / json", "charset twice": "application/json; charset=utf-8; charset=utf-7",
		"prefix": "application/jsonp", "long": "application/json; x=" + strings.Repeat("y", 4000),
	} {
		add("type: "+name, hostile{headers: header("Content-Type", v), status: 415, answer: media})
	}
	for name, v := range map[string]string{"plain": "application/json", "charset": "application/json;charset=utf-8", "upper case": "APPLICATION/JSON; CHARSET=UTF-8", "quoted": `application/json; charset="utf-8"`} {
		add("type, good: "+name, hostile{headers: header("Content-Type", v), status: 202})
	}
	for _, v := range []string{"gzip", "deflate", "br", "identity", "gzip, gzip", "x"} {
		add("coding: "+v, hostile{headers: header("Content-Encoding", v), status: 415, answer: coding})
	}

	// Surface.
	for name, target := range map[string]string{
		"root": "/", "slash at the end": "/fingerprint/ingest/", "slash twice": "//fingerprint/ingest", "slash twice inside": "/fingerprint//ingest", "dot": "/./fingerprint/ingest", "dots": "/x/../fingerprint/ingest",
		"upper case": "/FINGERPRINT/INGEST", "escaped slash": "/fingerprint%2fingest", "NUL": "/fingerprint/ingest%00", "escaped query": "/fingerprint/ingest%3fx", "parameter": "/fingerprint/ingest;x=1", "suffix": "/fingerprint/ingest.json",
		"space": "/fingerprint/ingest%20", "metrics": "/metrics", "live": "/livez", "ready": "/readyz", "profiles": "/debug/pprof/", "variables": "/debug/vars", "dot env": "/.env", "git": "/.git/config", "keys": "/keys.json",
		"passwd": "/../../etc/passwd", "admin": "/admin", "swagger": "/swagger.json", "long": "/" + strings.Repeat("x", 8000),
	} {
		add("path: "+name, hostile{line: "POST " + target + " HTTP/1.1", status: 404, answer: path})
		add("path, no key: "+name, hostile{line: "GET " + target + " HTTP/1.1", headers: header("X-API-Key", "", "Content-Type", "", "Content-Length", ""), body: "-", status: 404, answer: path})
	}
	for _, m := range []string{"GET", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "post", "Post", "BREW", "PURGE"} {
		add("method: "+m, hostile{line: m + " /fingerprint/ingest HTTP/1.1", status: 405, answer: method})
	}
	add("method: POST of the description", hostile{line: "POST /openapi.json HTTP/1.1", status: 405, answer: method})
	add("method: override", hostile{line: "GET /fingerprint/ingest HTTP/1.1", headers: header("X-HTTP-Method-Override", "POST"), status: 405, answer: method})
	add("path: override", hostile{line: "POST / HTTP/1.1", headers: header("X-Original-URL", ingestPath, "X-Rewrite-URL", ingestPath), status: 404, answer: path})
	add("target: absolute", hostile{line: "POST http://other/fingerprint/ingest HTTP/1.1", status: 202})
	add("target: asterisk", hostile{line: "OPTIONS * HTTP/1.1", status: 404, answer: path})
	add("target: tunnel", hostile{line: "CONNECT edge:443 HTTP/1.1", status: 404, answer: path})
	add("target: none", hostile{line: "POST HTTP/1.1", status: 400, answer: whole})
	add("target: bad escape", hostile{line: "POST /%zz HTTP/1.1", status: 400, answer: whole})
	add("target: no slash", hostile{line: "POST fingerprint/ingest HTTP/1.1", status: 400, answer: whole})

	// Framing. What net/http refuses is its own text.
	for name, v := range map[string]string{"negative": "-1", "plus": "+5", "hex": "0x10", "two": "5, 5", "words": "many", "float": "1.5", "beyond 64 bits": "99999999999999999999", "space": "1 1"} {
		add("length: "+name, hostile{headers: header("Content-Length", v), status: 400, answer: whole})
	}
	add("length: two that differ", hostile{headers: header("Content-Length", "5", "content-length", "6"), status: 400, answer: whole})
	add("length: none", hostile{headers: header("Content-Length", ""), body: "-", status: 400, answer: empty})
	add("length: short of the body", hostile{headers: header("Content-Length", "3"), body: `{"a":1}`, status: 400, answer: "Invalid JSON in request body: ends too early"})
	add("length: beyond the body", hostile{headers: header("Content-Length", "500"), status: 400, answer: cut})
	for name, v := range map[string]string{"gzip": "gzip", "gzip, chunked": "gzip, chunked", "chunked twice": "chunked, chunked", "identity": "identity", "unknown": "xchunked", "quoted": `"chunked"`} {
		add("transfer: "+name, hostile{headers: header("Content-Length", "", "Transfer-Encoding", v), status: 501, answer: whole})
	}
	chunked := header("Content-Length", "", "Transfer-Encoding", "chunked")
	for name, b := range map[string]string{"no size": "x\r\n", "negative": "-1\r\n", "too long a size": strings.Repeat("f", 20) + "\r\n", "no end": "2\r\n{}\r\n", "no line after": "2\r\n{}xx", "size of 0x": "0x2\r\n{}\r\n0\r\n\r\n", "LF in the extension": "2;\n{}\r\n0\r\n\r\n"} {
		add("chunks: "+name, hostile{headers: chunked, body: b, status: 400, answer: cut})
	}
	add("chunks: none", hostile{headers: chunked, body: "0\r\n\r\n", status: 400, answer: empty})
	add("chunks: length too", hostile{headers: header("Content-Length", "3", "Transfer-Encoding", "chunked"), body: "0\r\n\r\n", status: 400, answer: empty})
	add("chunks: in HTTP/1.0", hostile{line: "POST /fingerprint/ingest HTTP/1.0", headers: header("Content-Length", "3", "Transfer-Encoding", "chunked"), body: `{"a`, status: 400, answer: "Invalid JSON in request body: ends too early"})
	add("host: none", hostile{headers: header("Host", ""), status: 400, answer: whole})
	add("host: two", hostile{headers: header("Host", "a", "host", "b"), status: 400, answer: whole})
	add("host: bad", hostile{headers: header("Host", "a b"), status: 400, answer: whole})
	add("host: another", hostile{headers: header("Host", "evil.example"), status: 202})
	add("version: 2.0", hostile{line: "POST /fingerprint/ingest HTTP/2.0", status: 505, answer: whole})
	add("version: 1.2", hostile{line: "POST /fingerprint/ingest HTTP/1.2", status: 202})
	add("version: 0.9", hostile{line: "POST /fingerprint/ingest HTTP/0.9", status: 505, answer: whole})
	add("version: none", hostile{line: "POST /fingerprint/ingest", status: 400, answer: whole})
	add("version: words", hostile{line: "POST /fingerprint/ingest HTTP/one", status: 400, answer: whole})
	add("header: no colon", hostile{headers: header("X", "1\r\nnonsense"), status: 400, answer: whole})
	add("header: folded", hostile{headers: header("X", "1\r\n 2"), status: 202})
	add("header: space in its name", hostile{headers: header("X Y", "1"), status: 400, answer: whole})
	add("header: no name", hostile{headers: header(":", "1"), status: 400, answer: whole})
	add("header: NUL", hostile{headers: header("X", "\x00"), status: 400, answer: whole})
	add("expect: other", hostile{headers: header("Expect", "200-ok"), status: 417, answer: whole})
	add("upgrade", hostile{headers: header("Connection", "Upgrade", "Upgrade", "h2c"), status: 202})
	add("not HTTP: TLS", hostile{line: "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", status: 400, answer: whole})
	add("not HTTP: Redis", hostile{line: "*1\r\n$4\r\nPING", status: 400, answer: whole})
	add("not HTTP: an empty line", hostile{line: "\r\n", status: 400, answer: whole})

	// Size.
	add("size: 64 KiB and one", hostile{body: strings.Repeat(" ", maxBody+1), status: 413, answer: large})
	add("size: declared 50 MB", hostile{headers: header("Content-Length", "50000000"), status: 413, answer: large})
	add("size: declared exabytes", hostile{headers: header("Content-Length", "9223372036854775807"), status: 413, answer: large})
	add("size: chunks", hostile{headers: chunked, body: "100000\r\n" + strings.Repeat(" ", maxBody+1), status: 413, answer: large})
	add("size: 64 KiB of spaces", hostile{body: strings.Repeat(" ", maxBody), status: 400, answer: empty})
	add("size: headers", hostile{headers: header("X", strings.Repeat("x", 24<<10)), status: 431, answer: whole})
	add("size: many headers", hostile{headers: header("X", strings.Repeat("1\r\nX: ", 5000)), status: 431, answer: whole})
	add("size: target", hostile{line: "POST /" + strings.Repeat("x", 24<<10) + " HTTP/1.1", status: 431, answer: whole})
	add("size: name of 60 KiB", hostile{body: body(strings.Repeat("x", 60<<10), "1"), status: 202})
	return all
}

// bytes returns the request as it goes over the wire.
func (h hostile) bytes() string {
	line, payload := h.line, h.body
	if line == "" {
		line = "POST /fingerprint/ingest HTTP/1.1"
	}
	switch payload {
	case "":
		payload = body("", "")
	case "-":
		payload = ""
	}
	headers := map[string]string{"Host": "edge", "Content-Type": "application/json", "X-API-Key": "$KEY", "Content-Length": strconv.Itoa(len(payload))}
	maps.Copy(headers, h.headers)
	var b strings.Builder
	b.WriteString(line + "\r\n")
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		if headers[name] != "" {
			b.WriteString(name + ": " + headers[name] + "\r\n")
		}
	}
	return b.String() + "\r\n" + payload
}

// TestHostileRequests sends every odd and hostile request there is, those of
// the body's decoder too, to a listening edge, each on a connection of its
// own, and compares status and body.
func TestHostileRequests(t *testing.T) {
	t.Parallel()
	all := hostileRequests()
	for name, b := range badBodies() {
		_, err := decodeBody([]byte(b.body)) // which TestDecodeBodyRefuses and TestBodyErrorTexts pin
		h := hostile{body: b.body, status: 400, answer: err.Error()}
		if b.body == "" {
			h.body = "-"
		}
		all["bad body: "+name] = h
	}
	for name, b := range goodBodies() {
		all["good body: "+name] = hostile{body: b.body, headers: map[string]string{"X-API-Key": "$ADMIN"}, status: 202}
	}
	if len(all) < 400 {
		t.Errorf("%d rows", len(all))
	}
	e := newEdge(t, stored)
	addr := e.listen(t)
	last := e.acme[len(e.acme)-1]
	changed := e.acme[:len(e.acme)-1] + string(rune(last^1))
	fill := strings.NewReplacer("$KEY", e.acme, "$ADMIN", e.admin, "$REVOKED", e.revoked, "$EXPIRED", e.expired,
		"$UPPER", strings.ToUpper(e.acme), "$SHORT", e.acme[:len(e.acme)-1], "$CHANGED", changed)
	for name, h := range all {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := dial(t, addr)
			// An answer may come, and the connection close, before all is sent.
			_, _ = c.Write([]byte(fill.Replace(h.bytes())))
			if err := c.Conn.(*net.TCPConn).CloseWrite(); err != nil && h.status < 400 {
				t.Error(err)
			}
			got := c.answer()
			if got.StatusCode != h.status {
				t.Errorf("%s %s, want %d", got.Status, got.body, h.status)
			}
			switch {
			case h.answer == "#":
				if got.Header.Get(headerSupport) != "" || strings.Contains(got.body, "fpk_") {
					t.Errorf("not net/http's own answer: %v %s", got.Header, got.body)
				}
				return
			case h.answer != "":
				quoted, _ := jsontext.AppendQuote(nil, h.answer)
				if want := `{"error":` + string(quoted) + `}`; got.body != want {
					t.Errorf("%s, want %s", got.body, want)
				}
			case !strings.HasPrefix(got.body, `{"status":"accepted",`):
				t.Error(got.body)
			}
			if got.Header.Get("Content-Type") != contentTypeJSON || got.Header.Get("Cache-Control") != "no-store" {
				t.Error(got.Header)
			}
		})
	}
	t.Cleanup(func() {
		if n := testutil.ToFloat64(e.metrics.requests.WithLabelValues(string(internalError))); n != 0 {
			t.Errorf("%v internal errors", n)
		}
	})
}
