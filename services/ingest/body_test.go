package ingest

import (
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/idenza/fingerprint-prefetch/streams"
)

// body returns a good body with one member's raw value replaced, or left out
// if raw is empty.
func body(member, raw string) string {
	values := map[string]string{
		"request_id": `"1A2B3C4D5E"`, "subscriber_id": `12`, "session_id": `"s-1"`, "user_id": `"u-1"`,
	}
	values[member] = raw
	var parts []string
	for _, name := range memberNames {
		if values[name] != "" {
			parts = append(parts, `"`+name+`":`+values[name])
		}
	}
	if !slices.Contains(memberNames[:], member) && raw != "" {
		parts = append(parts, `"`+member+`":`+raw)
	}
	return "{" + strings.Join(parts, ",") + "}"
}

var goodEvent = streams.Event{Schema: 1, RequestID: "1A2B3C4D5E", SubscriberID: 12, SessionID: "s-1", UserID: "u-1"}

// goodBodyCase is a body that is accepted.
type goodBodyCase struct {
	body string
	want streams.Event
}

func goodBodies() map[string]goodBodyCase {
	with := func(change func(e *streams.Event)) streams.Event {
		e := goodEvent
		change(&e)
		return e
	}
	request := func(s string) streams.Event { return with(func(e *streams.Event) { e.RequestID = s }) }
	subscriber := func(n int64) streams.Event { return with(func(e *streams.Event) { e.SubscriberID = n }) }
	session := func(s string) streams.Event { return with(func(e *streams.Event) { e.SessionID = s }) }
	user := func(s string) streams.Event { return with(func(e *streams.Event) { e.UserID = s }) }
	long := strings.Repeat("x", maxText)
	return map[string]goodBodyCase{
		"plain":                        {body("", ""), goodEvent},
		"white space around":           {" \r\n\t" + body("", "") + "\n ", goodEvent},
		"white space within":           {"{ \"user_id\" : \"u-1\" ,\n \"session_id\":\"s-1\",\"subscriber_id\": 12 ,\"request_id\":\"1A2B3C4D5E\" }", goodEvent},
		"request_id with a dot":        {body("request_id", `"1708102555327.NLOjmg"`), request("1708102555327.NLOjmg")},
		"request_id of one character":  {body("request_id", `"a"`), request("a")},
		"request_id of 64":             {body("request_id", `"`+strings.Repeat("a", 64)+`"`), request(strings.Repeat("a", 64))},
		"request_id escaped":           {body("request_id", `"\u0031A2B3C4D5E"`), goodEvent},
		"request_id keeps its case":    {body("request_id", `"aB_-9"`), request("aB_-9")},
		"member name escaped":          {`{"request\u005fid":"1A2B3C4D5E","subscriber_id":12,"session_id":"s-1","user_id":"u-1"}`, goodEvent},
		"subscriber_id 1":              {body("subscriber_id", `1`), subscriber(1)},
		"subscriber_id 2^53-1":         {body("subscriber_id", `9007199254740991`), subscriber(9007199254740991)},
		"subscriber_id as string":      {body("subscriber_id", `"12"`), goodEvent},
		"subscriber_id escaped string": {body("subscriber_id", `"\u0031\u0032"`), goodEvent},
		"subscriber_id 2^53-1 string":  {body("subscriber_id", `"9007199254740991"`), subscriber(9007199254740991)},
		"session_id one byte":          {body("session_id", `"x"`), session("x")},
		"session_id 256 bytes":         {body("session_id", `"`+long+`"`), session(long)},
		"session_id 256 bytes escaped": {body("session_id", `"`+strings.Repeat(`\u0078`, maxText)+`"`), session(long)},
		"session_id white space inside": {
			body("session_id", `"a b\u00a0c"`), session("a b\u00a0c"),
		},
		"user_id e-mail":            {body("user_id", `"jane.doe+x@example.com"`), user("jane.doe+x@example.com")},
		"user_id with quotes":       {body("user_id", `"a\"b\\c\/d"`), user(`a"b\c/d`)},
		"user_id of HTML":           {body("user_id", `"<b>&'"`), user("<b>&'")},
		"user_id not normalised":    {body("user_id", `"e\u0301"`), user("e\u0301")},
		"user_id surrogate pair":    {body("user_id", `"\ud83d\ude00"`), user("\U0001F600")},
		"user_id raw emoji":         {body("user_id", "\"\U0001F600\""), user("\U0001F600")},
		"user_id replacement":       {body("user_id", `"a\ufffdb"`), user("a\ufffdb")},
		"user_id zero width joiner": {body("user_id", `"a\u200db"`), user("a\u200db")},
		"user_id right-to-left mark": {
			body("user_id", `"a\u200fb"`), user("a\u200fb"),
		},
		"user_id the word null":      {body("user_id", `"null"`), user("null")},
		"user_id two-byte letters":   {body("user_id", `"`+strings.Repeat("é", 128)+`"`), user(strings.Repeat("é", 128))},
		"unknown string":             {body("sdk", `"x"`), goodEvent},
		"unknown null":               {body("sdk", `null`), goodEvent},
		"unknown number beyond all":  {body("sdk", `1e999999`), goodEvent},
		"unknown empty name":         {body("", `1`), goodEvent},
		"unknown nested":             {body("sdk", `{"a":[1,{"b":[]},null],"c":{}}`), goodEvent},
		"unknown with a known name":  {body("sdk", `{"request_id":1,"REQUEST_ID":2,"user_id":null}`), goodEvent},
		"unknown control characters": {body("sdk", `"\u0000\u202e"`), goodEvent},
		"unknown 32 deep":            {body("sdk", strings.Repeat("[", 31)+strings.Repeat("]", 31)), goodEvent},
		"same name in two objects":   {body("sdk", `[{"a":1},{"a":2}]`), goodEvent},
	}
}

func TestDecodeBodyAccepts(t *testing.T) {
	t.Parallel()
	for name, test := range goodBodies() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := decodeBody([]byte(test.body))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// badBodyCase is a body that is refused for one reason.
type badBodyCase struct {
	body  string
	field bodyField
	rule  rule
}

func badBodies() map[string]badBodyCase {
	const (
		request, subscriber, session, user = "request_id", "subscriber_id", "session_id", "user_id"

		whole = "body"
	)
	long := strings.Repeat("x", maxText+1)
	return map[string]badBodyCase{
		"all missing":                  {`{}`, request, ruleMissing},
		"all missing but unknown ones": {`{"a":1}`, request, ruleMissing},
		"request_id missing":           {body(request, ""), request, ruleMissing},
		"request_id null":              {body(request, `null`), request, ruleMissing},
		"request_id empty":             {body(request, `""`), request, ruleMissing},
		"subscriber_id missing":        {body(subscriber, ""), subscriber, ruleMissing},
		"subscriber_id null":           {body(subscriber, `null`), subscriber, ruleMissing},
		"subscriber_id empty":          {body(subscriber, `""`), subscriber, ruleMissing},
		"session_id missing":           {body(session, ""), session, ruleMissing},
		"session_id null":              {body(session, `null`), session, ruleMissing},
		"session_id empty":             {body(session, `""`), session, ruleMissing},
		"user_id missing":              {body(user, ""), user, ruleMissing},
		"user_id null":                 {body(user, `null`), user, ruleMissing},
		"user_id empty":                {body(user, `""`), user, ruleMissing},
		"missing before malformed":     {`{"request_id":"..","subscriber_id":-1,"session_id":" "}`, user, ruleMissing},
		"first of two malformed":       {`{"request_id":1,"subscriber_id":-1,"session_id":" ","user_id":" "}`, request, ruleType},
		"second of the malformed":      {`{"request_id":"a","subscriber_id":-1,"session_id":" ","user_id":" "}`, subscriber, ruleFormat},
		"third of the malformed":       {`{"request_id":"a","subscriber_id":1,"session_id":" ","user_id":" "}`, session, ruleCharacters},

		"request_id number":           {body(request, `17`), request, ruleType},
		"request_id true":             {body(request, `true`), request, ruleType},
		"request_id list":             {body(request, `["a"]`), request, ruleType},
		"request_id object":           {body(request, `{}`), request, ruleType},
		"request_id of 65":            {body(request, `"`+strings.Repeat("a", 65)+`"`), request, ruleFormat},
		"request_id slash":            {body(request, `"a/b"`), request, ruleFormat},
		"request_id dots":             {body(request, `".."`), request, ruleFormat},
		"request_id double dot":       {body(request, `"a..b"`), request, ruleFormat},
		"request_id dot at the end":   {body(request, `"a."`), request, ruleFormat},
		"request_id dash first":       {body(request, `"-a"`), request, ruleFormat},
		"request_id space":            {body(request, `" a"`), request, ruleFormat},
		"request_id only space":       {body(request, `" "`), request, ruleFormat},
		"request_id newline":          {body(request, `"a\n"`), request, ruleFormat},
		"request_id wildcard":         {body(request, `"a*"`), request, ruleFormat},
		"request_id colon":            {body(request, `"fp:x"`), request, ruleFormat},
		"request_id percent":          {body(request, `"a%2e"`), request, ruleFormat},
		"request_id letter elsewhere": {body(request, `"é"`), request, ruleFormat},
		"request_id NUL":              {body(request, `"a\u0000"`), request, ruleFormat},

		"subscriber_id true":          {body(subscriber, `true`), subscriber, ruleType},
		"subscriber_id list":          {body(subscriber, `[12]`), subscriber, ruleType},
		"subscriber_id object":        {body(subscriber, `{"id":12}`), subscriber, ruleType},
		"subscriber_id 0":             {body(subscriber, `0`), subscriber, ruleRange},
		"subscriber_id 0 string":      {body(subscriber, `"0"`), subscriber, ruleRange},
		"subscriber_id 2^53":          {body(subscriber, `9007199254740992`), subscriber, ruleRange},
		"subscriber_id 2^53 string":   {body(subscriber, `"9007199254740992"`), subscriber, ruleRange},
		"subscriber_id 2^64+12":       {body(subscriber, `18446744073709551628`), subscriber, ruleRange},
		"subscriber_id 300 digits":    {body(subscriber, strings.Repeat("9", 300)), subscriber, ruleRange},
		"subscriber_id negative":      {body(subscriber, `-12`), subscriber, ruleFormat},
		"subscriber_id minus zero":    {body(subscriber, `-0`), subscriber, ruleFormat},
		"subscriber_id 12.0":          {body(subscriber, `12.0`), subscriber, ruleFormat},
		"subscriber_id 12.5":          {body(subscriber, `12.5`), subscriber, ruleFormat},
		"subscriber_id 1e2":           {body(subscriber, `1e2`), subscriber, ruleFormat},
		"subscriber_id 1E2":           {body(subscriber, `1E2`), subscriber, ruleFormat},
		"subscriber_id string sign":   {body(subscriber, `"+12"`), subscriber, ruleFormat},
		"subscriber_id string minus":  {body(subscriber, `"-12"`), subscriber, ruleFormat},
		"subscriber_id string zeros":  {body(subscriber, `"012"`), subscriber, ruleFormat},
		"subscriber_id string 00":     {body(subscriber, `"00"`), subscriber, ruleFormat},
		"subscriber_id string space":  {body(subscriber, `" 12"`), subscriber, ruleFormat},
		"subscriber_id string 1e2":    {body(subscriber, `"1e2"`), subscriber, ruleFormat},
		"subscriber_id string hex":    {body(subscriber, `"0x12"`), subscriber, ruleFormat},
		"subscriber_id string 1_000":  {body(subscriber, `"1_000"`), subscriber, ruleFormat},
		"subscriber_id arabic digits": {body(subscriber, `"١٢"`), subscriber, ruleFormat},
		"subscriber_id word":          {body(subscriber, `"acme"`), subscriber, ruleFormat},
		"subscriber_id subject":       {body(subscriber, `"*"`), subscriber, ruleFormat},

		"session_id number":           {body(session, `1`), session, ruleType},
		"session_id false":            {body(session, `false`), session, ruleType},
		"session_id list":             {body(session, `[]`), session, ruleType},
		"session_id 257 bytes":        {body(session, `"`+long+`"`), session, ruleLength},
		"session_id 129 letters":      {body(session, `"`+strings.Repeat("é", 129)+`"`), session, ruleLength},
		"session_id NUL":              {body(session, `"a\u0000b"`), session, ruleCharacters},
		"session_id newline":          {body(session, `"a\nb"`), session, ruleCharacters},
		"session_id tab":              {body(session, `"a\tb"`), session, ruleCharacters},
		"session_id escape":           {body(session, `"a\u001b[31m"`), session, ruleCharacters},
		"session_id delete":           {body(session, `"a\u007fb"`), session, ruleCharacters},
		"session_id C1 control":       {body(session, `"a\u0085b"`), session, ruleCharacters},
		"session_id last C1":          {body(session, `"a\u009fb"`), session, ruleCharacters},
		"session_id line separator":   {body(session, `"a\u2028b"`), session, ruleCharacters},
		"session_id paragraph":        {body(session, `"a\u2029b"`), session, ruleCharacters},
		"user_id number":              {body(user, `1.5`), user, ruleType},
		"user_id object":              {body(user, `{"id":"u"}`), user, ruleType},
		"user_id 257 bytes":           {body(user, `"`+long+`"`), user, ruleLength},
		"user_id bidi embedding":      {body(user, `"a\u202ab"`), user, ruleCharacters},
		"user_id bidi override":       {body(user, `"a\u202eb"`), user, ruleCharacters},
		"user_id bidi isolate":        {body(user, `"a\u2066b"`), user, ruleCharacters},
		"user_id pop isolate":         {body(user, `"a\u2069b"`), user, ruleCharacters},
		"user_id noncharacter FDD0":   {body(user, `"a\ufdd0b"`), user, ruleCharacters},
		"user_id noncharacter FFFE":   {body(user, `"a\ufffeb"`), user, ruleCharacters},
		"user_id noncharacter FFFF":   {body(user, `"a\uffff"`), user, ruleCharacters},
		"user_id noncharacter 1FFFE":  {body(user, `"a\ud83f\udffeb"`), user, ruleCharacters},
		"user_id noncharacter 10FFFF": {body(user, `"a\udbff\udfffb"`), user, ruleCharacters},
		"user_id only space":          {body(user, `" "`), user, ruleCharacters},
		"user_id leading space":       {body(user, `" u"`), user, ruleCharacters},
		"user_id trailing space":      {body(user, `"u "`), user, ruleCharacters},
		"user_id no-break space":      {body(user, `"\u00a0u"`), user, ruleCharacters},
		"user_id ideographic space":   {body(user, `"u\u3000"`), user, ruleCharacters},
		"user_id ogham space":         {body(user, `"u\u1680"`), user, ruleCharacters},

		"empty":                      {``, whole, ruleSyntax},
		"only white space":           {" \n", whole, ruleSyntax},
		"null":                       {`null`, whole, ruleObject},
		"list":                       {`[]`, whole, ruleObject},
		"list of one":                {`[` + body("", "") + `]`, whole, ruleObject},
		"string":                     {`"x"`, whole, ruleObject},
		"number":                     {`1`, whole, ruleObject},
		"true":                       {`true`, whole, ruleObject},
		"word":                       {`hello`, whole, ruleSyntax},
		"form":                       {`request_id=1A2B3C4D5E`, whole, ruleSyntax},
		"byte order mark":            {"\ufeff" + body("", ""), whole, ruleSyntax},
		"open brace":                 {`{`, whole, ruleSyntax},
		"half a name":                {`{"request`, whole, ruleSyntax},
		"no value":                   {`{"request_id"}`, whole, ruleSyntax},
		"half a value":               {`{"request_id":"1A`, whole, ruleSyntax},
		"no closing brace":           {strings.TrimSuffix(body("", ""), "}"), whole, ruleSyntax},
		"two objects":                {body("", "") + body("", ""), whole, ruleSyntax},
		"object and brace":           {body("", "") + "}", whole, ruleSyntax},
		"object and comma":           {body("", "") + ",", whole, ruleSyntax},
		"object and NUL":             {body("", "") + "\x00", whole, ruleSyntax},
		"object and broken UTF-8":    {body("", "") + "\xff", whole, ruleSyntax},
		"comma at the end":           {strings.TrimSuffix(body("", ""), "}") + ",}", whole, ruleSyntax},
		"comma first":                {`{,` + body("", "")[1:], whole, ruleSyntax},
		"no comma":                   {`{"a":1 "b":2}`, whole, ruleSyntax},
		"single quotes":              {`{'request_id':'a'}`, whole, ruleSyntax},
		"unquoted name":              {`{request_id:"a"}`, whole, ruleSyntax},
		"number as name":             {`{1:"a"}`, whole, ruleSyntax},
		"comment":                    {`{/* */` + body("", "")[1:], whole, ruleSyntax},
		"NaN":                        {body("sdk", `NaN`), whole, ruleSyntax},
		"plus sign":                  {body(subscriber, `+12`), whole, ruleSyntax},
		"leading zero":               {body(subscriber, `012`), whole, ruleSyntax},
		"hex number":                 {body(subscriber, `0x12`), whole, ruleSyntax},
		"raw newline in string":      {body(user, "\"a\nb\""), whole, ruleSyntax},
		"raw NUL in string":          {body(user, "\"a\x00b\""), whole, ruleSyntax},
		"bad escape":                 {body(user, `"\x41"`), whole, ruleSyntax},
		"lone high surrogate":        {body(user, `"\ud800"`), whole, ruleSyntax},
		"lone low surrogate":         {body(user, `"\udc00x"`), whole, ruleSyntax},
		"lone surrogate in a name":   {body(`\ud800`, `1`), whole, ruleSyntax},
		"lone surrogate elsewhere":   {body("sdk", `["\ud800"]`), whole, ruleSyntax},
		"broken UTF-8":               {body(user, "\"a\xffb\""), whole, ruleEncoding},
		"UTF-8 of a surrogate":       {body(user, "\"\xed\xa0\x80\""), whole, ruleEncoding},
		"overlong UTF-8":             {body(user, "\"\xc0\xaf\""), whole, ruleEncoding},
		"broken UTF-8 elsewhere":     {body("sdk", "{\"\xff\":1}"), whole, ruleEncoding},
		"UTF-16":                     {"{\x00\"\x00}\x00\xff\xfe", whole, ruleEncoding},
		"known name twice":           {body("", "")[:len(body("", ""))-1] + `,"user_id":"u-2"}`, whole, ruleDuplicate},
		"known name twice, same":     {body("", "")[:len(body("", ""))-1] + `,"user_id":"u-1"}`, whole, ruleDuplicate},
		"known name twice, null":     {body("", "")[:len(body("", ""))-1] + `,"user_id":null}`, whole, ruleDuplicate},
		"known name twice, escaped":  {body("", "")[:len(body("", ""))-1] + `,"user\u005fid":"u-2"}`, whole, ruleDuplicate},
		"unknown name twice":         {body("sdk", `1,"sdk":2`), whole, ruleDuplicate},
		"nested name twice":          {body("sdk", `{"a":1,"a":2}`), whole, ruleDuplicate},
		"deeply nested name twice":   {body("sdk", `[[{"a":{"b":1,"b":2}}]]`), whole, ruleDuplicate},
		"upper case name":            {body("REQUEST_ID", `"x"`), whole, ruleCase},
		"upper case name alone":      {`{"Request_Id":"x"}`, whole, ruleCase},
		"long s for s":               {body("ſession_id", `"x"`), whole, ruleCase},
		"upper case name escaped":    {body(`\u0055ser_id`, `"x"`), whole, ruleCase},
		"33 deep":                    {body("sdk", strings.Repeat("[", 32)+strings.Repeat("]", 32)), whole, ruleDepth},
		"33 deep objects":            {body("sdk", strings.Repeat(`{"a":`, 32)+"1"+strings.Repeat("}", 32)), whole, ruleDepth},
		"deep in a known member":     {body(user, strings.Repeat("[", 60000)), whole, ruleDepth},
		"brackets that do not match": {body("sdk", `[}`), whole, ruleSyntax},
		"60000 open brackets":        {strings.Repeat("[", 60000), whole, ruleSyntax},
		"20000 deep list, well formed": {
			strings.Repeat("[", 20000) + strings.Repeat("]", 20000), whole, ruleSyntax,
		},
	}
}

func TestDecodeBodyRefuses(t *testing.T) {
	t.Parallel()
	rules := bodyRules()
	for name, test := range badBodies() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, err := decodeBody([]byte(test.body))
			if e != (streams.Event{}) {
				t.Error("an event besides an error")
			}
			got, ok := err.(bodyError)
			if !ok || got.field != test.field || got.rule != test.rule {
				t.Fatalf("got %#v, want %s of %s", err, test.rule, test.field)
			}
			if !slices.Contains(rules[got.field], got.rule) {
				t.Errorf("rule %s of %s is not among the listed ones", got.rule, got.field)
			}
		})
	}
}

func TestBodyErrorWords(t *testing.T) {
	t.Parallel()
	tests := map[string]string{
		`{}`:                          "Missing 'request_id' in request body",
		body("user_id", `null`):       "Missing 'user_id' in request body",
		body("request_id", `"a/b"`):   "Invalid 'request_id' in request body: must be 1 to 64 characters, dot-separated tokens of A-Z, a-z, 0-9, _ and -, beginning with a letter or digit",
		body("request_id", `5`):       "Invalid 'request_id' in request body: must be a string",
		body("subscriber_id", `1.0`):  "Invalid 'subscriber_id' in request body: must be an integer in plain digits",
		body("subscriber_id", `true`): "Invalid 'subscriber_id' in request body: must be an integer",
		body("subscriber_id", `0`):    "Invalid 'subscriber_id' in request body: must be from 1 to 9007199254740991",
		body("session_id", `"a\n"`):   "Invalid 'session_id' in request body: must not contain control, bidirectional override, line separator or noncharacter code points",
		body("user_id", `" a"`):       "Invalid 'user_id' in request body: must not begin or end with white space",
		``:                            "Invalid JSON in request body: empty",
		`[]`:                          "Invalid JSON in request body: must be an object",
		`{"a":1}}`:                    "Invalid JSON in request body: must end after the object",
		`{"a":1`:                      "Invalid JSON in request body: ends too early",
		`{"a":x}`:                     "Invalid JSON in request body: syntax error at byte 5",
		`{"a":1,"a":1}`:               "Invalid JSON in request body: a name occurs twice in one object",
		`{"USER_ID":1}`:               "Invalid JSON in request body: a name differs from 'user_id' in upper and lower case only",
		"{\"\xff\":1}":                "Invalid JSON in request body: not UTF-8",
	}
	for body, want := range tests {
		if _, err := decodeBody([]byte(body)); err == nil || err.Error() != want {
			t.Errorf("%q: got %v, want %s", body, err, want)
		}
	}
}

func TestBodyErrorRepeatsNothing(t *testing.T) {
	t.Parallel()
	const secret = "Zq7"
	for _, b := range []string{
		body("request_id", `"/`+secret+`"`), body("user_id", `"`+secret+`\n"`), body("subscriber_id", `"`+secret+`"`),
		body(secret, `1,"`+secret+`":1`), `{"` + secret, `{` + secret + `}`, secret, `{"a":"\` + secret + `"}`,
		body("user_id", `"\ud800`+secret+`"`),
	} {
		_, err := decodeBody([]byte(b))
		if err == nil || strings.Contains(err.Error(), secret) {
			t.Errorf("%s: %v", b, err)
		}
	}
}

func TestDecoderKeepsNothing(t *testing.T) {
	t.Parallel()
	var d bodyDecoder
	b := []byte(body("user_id", `"first"`))
	first, err := d.decode(b)
	if err != nil {
		t.Fatal(err)
	}
	copy(b, strings.Repeat("x", len(b)))
	if _, err := d.decode([]byte(`{"request_id":"a","request_id":"b"}`)); err == nil {
		t.Fatal("no error")
	}
	second, err := d.decode([]byte(body("user_id", `"other"`)))
	if err != nil {
		t.Fatal(err)
	}
	if first.UserID != "first" || first.RequestID != goodEvent.RequestID || second.UserID != "other" {
		t.Errorf("got %+v and %+v", first, second)
	}
}

// TestEventGolden pins the bytes stored in the stream: old ones must be read
// for as long as streams keep them.
func TestEventGolden(t *testing.T) {
	t.Parallel()
	e := streams.Event{
		Schema: streams.EventSchema, RequestID: "1708102555327.NLOjmg", SubscriberID: 9007199254740991,
		SessionID: `"quoted" \back/slash <tag>`, UserID: "jané\U0001F600@example.com",
	}
	want, err := os.ReadFile("testdata/event.json")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.TrimSuffix(string(want), "\n"), string(appendEvent(nil, e))); diff != "" {
		t.Error(diff)
	}
	back, err := streams.DecodeEvent(want)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(e, back); diff != "" {
		t.Error(diff)
	}
}

// FuzzDecodeBody checks that what is accepted keeps every byte on its way
// through the stream, and that the standard library read the same.
func FuzzDecodeBody(f *testing.F) {
	f.Add([]byte(typicalBody))
	f.Add([]byte(body("user_id", `"\ud83d\ude00\u0041\/é"`)))
	f.Add([]byte(body("subscriber_id", `"12"`)))
	f.Add([]byte(body("sdk", `{"a":[1,{"b":null}]}`)))
	f.Add([]byte(body("user_id", `"\ud800"`)))
	f.Add([]byte(`{"request_id":"a","request_id":"b"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		kept := slices.Clone(b)
		e, err := decodeBody(b)
		if !slices.Equal(b, kept) {
			t.Fatal("the body was changed")
		}
		if err != nil {
			refused, ok := errors.AsType[bodyError](err)
			if !ok || !slices.Contains(bodyRules()[refused.field], refused.rule) {
				t.Fatalf("%#v is not a listed error", err)
			}
			return
		}
		back, err := streams.DecodeEvent(appendEvent(nil, e))
		if err != nil || back != e {
			t.Fatalf("stored as %+v, read as %+v, %v", e, back, err)
		}
		var std struct {
			RequestID string `json:"request_id"`
			SessionID string `json:"session_id"`
			UserID    string `json:"user_id"`
		}
		if err := json.Unmarshal(b, &std); err != nil {
			t.Fatalf("accepted, and refused by encoding/json: %v", err)
		}
		if std.RequestID != e.RequestID || std.SessionID != e.SessionID || std.UserID != e.UserID {
			t.Fatalf("read as %+v, by encoding/json as %+v", e, std)
		}
	})
}
