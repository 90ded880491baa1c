package ingest

import (
	"bytes"
	"errors"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// What a body may hold.
const (
	maxText         = 256       // bytes of session_id and of user_id
	maxSubscriberID = 1<<53 - 1 // beyond it a JavaScript client has already rounded, to another subscriber
	maxDepth        = 32        // objects and arrays within each other, the body itself included
)

// The members read, in the order in which missing ones are reported.
const (
	requestID = iota
	subscriberID
	sessionID
	userID
	members
)

var memberNames = [members]string{"request_id", "subscriber_id", "session_id", "user_id"}

// bodyField is what a fault is about: a member's name, or the body.
type bodyField string

const wholeBody bodyField = "body"

// rule is what a body broke. Fields and rules are closed sets: they are metric
// labels.
type rule string

const (
	ruleMissing    rule = "missing"    // absent, null or ""
	ruleType       rule = "type"       // another JSON type
	ruleFormat     rule = "format"     // request_id: its grammar; subscriber_id: plain digits
	ruleRange      rule = "range"      // subscriber_id
	ruleLength     rule = "length"     // session_id, user_id
	ruleCharacters rule = "characters" // session_id, user_id

	ruleSyntax    rule = "syntax"    // not JSON, or something after it
	ruleEncoding  rule = "encoding"  // not UTF-8
	ruleObject    rule = "object"    // JSON, but not an object
	ruleDuplicate rule = "duplicate" // a name twice in one object
	ruleCase      rule = "case"      // a name that differs from a member's in case alone
	ruleDepth     rule = "depth"
	ruleUnread    rule = "unread" // the client stopped sending
)

// bodyRules lists every combination that a bodyError can have.
func bodyRules() map[bodyField][]rule {
	return map[bodyField][]rule{
		wholeBody:                            {ruleSyntax, ruleEncoding, ruleObject, ruleDuplicate, ruleCase, ruleDepth, ruleUnread},
		bodyField(memberNames[requestID]):    {ruleMissing, ruleType, ruleFormat},
		bodyField(memberNames[subscriberID]): {ruleMissing, ruleType, ruleFormat, ruleRange},
		bodyField(memberNames[sessionID]):    {ruleMissing, ruleType, ruleLength, ruleCharacters},
		bodyField(memberNames[userID]):       {ruleMissing, ruleType, ruleLength, ruleCharacters},
	}
}

// bodyError says what is wrong with a body. Its text is for the client and
// never repeats what the client sent.
type bodyError struct {
	field bodyField
	rule  rule
	words string // the rule in words; empty for ruleMissing
}

func (e bodyError) Error() string {
	switch {
	case e.rule == ruleMissing:
		return "Missing '" + string(e.field) + "' in request body"
	case e.field == wholeBody:
		return "Invalid JSON in request body: " + e.words
	}
	return "Invalid '" + string(e.field) + "' in request body: " + e.words
}

func broken(member int, r rule, words string) bodyError {
	return bodyError{bodyField(memberNames[member]), r, words}
}

// bodyDecoder reads request bodies. It keeps its buffers from one to the
// next; the zero value is ready. It is not safe for concurrent use.
type bodyDecoder struct {
	json jsontext.Decoder
	src  bytes.Buffer
	text []byte
}

// decodeBody is decode with a decoder of its own.
func decodeBody(b []byte) (streams.Event, error) {
	var d bodyDecoder
	return d.decode(b)
}

// decode reads an event from a request body. The error is a bodyError; the
// event shares no memory with b.
//
// encoding/json would be too kind: it lets the last of two equal names win,
// matches names in any case and turns broken UTF-8 into U+FFFD, which makes
// one user of two. Whatever reads the body after us, or before us, may decide
// otherwise.
func (d *bodyDecoder) decode(b []byte) (streams.Event, error) {
	raw, err := d.members(b)
	if err != nil {
		return streams.Event{}, err
	}
	for m, v := range raw {
		if s := string(v); s == "" || s == "null" || s == `""` {
			return streams.Event{}, broken(m, ruleMissing, "")
		}
	}

	// One string backs all three, to save allocations.
	text, end := d.text[:0], [members]int{}
	for m, v := range raw {
		if m != subscriberID && v[0] == '"' {
			text = appendUnquoted(text, v)
		}
		end[m] = len(text)
	}
	if cap(text) <= 4096 { // one large body must not make the buffer large for ever
		d.text = text
	}
	all := string(text)

	e := streams.Event{Schema: streams.EventSchema}
	if e.RequestID = all[:end[requestID]]; raw[requestID][0] != '"' {
		return streams.Event{}, broken(requestID, ruleType, mustBeString)
	}
	if !streams.ValidRequestID(e.RequestID) {
		return streams.Event{}, broken(requestID, ruleFormat,
			"must be 1 to "+strconv.Itoa(streams.MaxRequestID)+" characters, dot-separated tokens of A-Z, a-z, 0-9, _ and -, beginning with a letter or digit")
	}
	if e.SubscriberID, err = subscriber(raw[subscriberID]); err != nil {
		return streams.Event{}, err
	}
	e.SessionID = all[end[subscriberID]:end[sessionID]]
	if err := checkText(sessionID, raw[sessionID], e.SessionID); err != nil {
		return streams.Event{}, err
	}
	e.UserID = all[end[sessionID]:end[userID]]
	if err := checkText(userID, raw[userID], e.UserID); err != nil {
		return streams.Event{}, err
	}
	return e, nil
}

// members checks that b is strict JSON and one object, and returns the raw
// values of the members we know, nil where absent. Of an object or array it
// returns the first byte only: no member is one.
func (d *bodyDecoder) members(b []byte) (raw [members]jsontext.Value, err error) {
	d.src = *bytes.NewBuffer(b)
	d.json.Reset(&d.src)
	json := &d.json

	// last returns the value just read as a part of b: what the decoder
	// returns is only good until the next read.
	last := func(n int) jsontext.Value {
		end := int(json.InputOffset())
		return b[end-n : end]
	}
	switch kind := json.PeekKind(); kind {
	case '{':
		_, err = json.ReadToken()
	default:
		// Read it all the same: what is not JSON is said to be so.
		if err = json.SkipValue(); err == nil {
			err = bodyError{wholeBody, ruleObject, "must be an object"}
		} else if err == io.EOF {
			err = bodyError{wholeBody, ruleSyntax, "empty"}
		}
	}
	if err != nil {
		return raw, syntaxFault(b, err)
	}
	for json.PeekKind() == '"' {
		name, err := json.ReadValue()
		if err != nil {
			return raw, syntaxFault(b, err)
		}
		m, err := member(name)
		if err != nil {
			return raw, err
		}
		var v jsontext.Value
		if kind := json.PeekKind(); kind == '{' || kind == '[' {
			if err := skipNested(json); err != nil {
				return raw, syntaxFault(b, err)
			}
			v = jsontext.Value{byte(kind)}
		} else {
			if v, err = json.ReadValue(); err != nil {
				return raw, syntaxFault(b, err)
			}
			v = last(len(v))
		}
		if m < members {
			raw[m] = v
		}
	}
	if _, err := json.ReadToken(); err != nil { // the closing brace
		return raw, syntaxFault(b, err)
	}
	if _, err := json.ReadToken(); err != io.EOF {
		return raw, bodyError{wholeBody, ruleSyntax, "must end after the object"}
	}
	return raw, nil
}

// member returns which member a quoted name is, or members for one that we
// do not know.
func member(quoted jsontext.Value) (int, error) {
	name := []byte(quoted[1 : len(quoted)-1])
	if bytes.IndexByte(name, '\\') >= 0 {
		name = appendUnquoted(nil, quoted)
	}
	for m, known := range memberNames {
		if string(name) == known {
			return m, nil
		}
	}
	for _, known := range memberNames {
		if strings.EqualFold(string(name), known) {
			return members, bodyError{wholeBody, ruleCase, "a name differs from '" + known + "' in upper and lower case only"}
		}
	}
	return members, nil
}

// skipNested reads an object or array to its end.
func skipNested(json *jsontext.Decoder) error {
	outer := json.StackDepth()
	for {
		if _, err := json.ReadToken(); err != nil {
			return err
		}
		switch depth := json.StackDepth(); {
		case depth == outer:
			return nil
		case depth > maxDepth:
			return bodyError{wholeBody, ruleDepth, "nested deeper than " + strconv.Itoa(maxDepth)}
		}
	}
}

// syntaxFault says in our words what the tokenizer found: its own may quote
// the body.
func syntaxFault(b []byte, err error) error {
	if _, ours := err.(bodyError); ours {
		return err
	}
	syntactic, isSyntactic := errors.AsType[*jsontext.SyntacticError](err)
	switch {
	case !utf8.Valid(b):
		return bodyError{wholeBody, ruleEncoding, "not UTF-8"}
	case errors.Is(err, jsontext.ErrDuplicateName):
		return bodyError{wholeBody, ruleDuplicate, "a name occurs twice in one object"}
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		return bodyError{wholeBody, ruleSyntax, "ends too early"}
	case isSyntactic:
		return bodyError{wholeBody, ruleSyntax, "syntax error at byte " + strconv.FormatInt(syntactic.ByteOffset, 10)}
	}
	return bodyError{wholeBody, ruleSyntax, "syntax error"}
}

// appendUnquoted appends the text of a JSON string that was found valid.
func appendUnquoted(dst []byte, quoted jsontext.Value) []byte {
	if inner := quoted[1 : len(quoted)-1]; bytes.IndexByte(inner, '\\') < 0 {
		return append(dst, inner...)
	}
	dst, _ = jsontext.AppendUnquote(dst, quoted)
	return dst
}

// subscriber reads plain digits, as a number or as a string: clients were
// told both. Anything else that means a whole number, such as 12.0 or 1e2, is
// refused, since not every reader agrees on it.
func subscriber(raw jsontext.Value) (int64, error) {
	digits := []byte(raw)
	switch c := raw[0]; {
	case c == '"':
		digits = appendUnquoted(nil, raw)
	case c != '-' && (c < '0' || c > '9'):
		return 0, broken(subscriberID, ruleType, "must be an integer")
	}
	var n int64
	for i, c := range digits {
		if c < '0' || c > '9' || i > 0 && digits[0] == '0' {
			return 0, broken(subscriberID, ruleFormat, "must be an integer in plain digits")
		}
		if n <= maxSubscriberID { // so that n cannot overflow
			n = n*10 + int64(c-'0')
		}
	}
	if n < 1 || n > maxSubscriberID {
		return 0, broken(subscriberID, ruleRange, "must be from 1 to "+strconv.Itoa(maxSubscriberID))
	}
	return n, nil
}

const mustBeString = "must be a string"

// checkText checks session_id or user_id. They are opaque and kept byte for
// byte; refused is only what makes two values look alike to a person or
// breaks a line or a terminal.
func checkText(member int, raw jsontext.Value, s string) error {
	if raw[0] != '"' {
		return broken(member, ruleType, mustBeString)
	}
	if len(s) > maxText {
		return broken(member, ruleLength, "must be 1 to "+strconv.Itoa(maxText)+" bytes of UTF-8")
	}
	for _, r := range s {
		if !plain(r) {
			return broken(member, ruleCharacters, "must not contain control, bidirectional override, line separator or noncharacter code points")
		}
	}
	first, _ := utf8.DecodeRuneInString(s)
	last, _ := utf8.DecodeLastRuneInString(s)
	if unicode.IsSpace(first) || unicode.IsSpace(last) {
		return broken(member, ruleCharacters, "must not begin or end with white space")
	}
	return nil
}

// plain reports whether r may stand in a text.
func plain(r rune) bool {
	switch {
	case r < ' ', r >= 0x7F && r <= 0x9F: // control
		return false
	case r < 0x2028:
		return true
	case r <= 0x2029, // line and paragraph separator
		r >= 0x202A && r <= 0x202E, // bidirectional embeddings and overrides
		r >= 0x2066 && r <= 0x2069, // bidirectional isolates
		r >= 0xFDD0 && r <= 0xFDEF, // noncharacters, and the last two of each plane
		r&0xFFFE == 0xFFFE:
		return false
	}
	return true
}

// appendEvent appends an event as it is stored: the JSON that
// streams.DecodeEvent reads.
func appendEvent(dst []byte, e streams.Event) []byte {
	dst = append(dst, `{"schema":`...)
	dst = strconv.AppendInt(dst, int64(e.Schema), 10)
	dst = appendQuoted(append(dst, `,"request_id":`...), e.RequestID)
	dst = append(dst, `,"subscriber_id":`...)
	dst = strconv.AppendInt(dst, e.SubscriberID, 10)
	dst = appendQuoted(append(dst, `,"session_id":`...), e.SessionID)
	dst = appendQuoted(append(dst, `,"user_id":`...), e.UserID)
	return append(dst, '}')
}

// appendQuoted appends s as a JSON string. Every text here is valid UTF-8, so
// nothing is replaced.
func appendQuoted(dst []byte, s string) []byte {
	dst, _ = jsontext.AppendQuote(dst, s)
	return dst
}
