// Package record is what the pipeline leaves for the scorer: one JSON object
// per request id, in a Redis string at [Key].
//
// The same object travels on FP_ENRICHED, so what was fetched and what is
// stored have one shape and one schema number. The package depends on the
// standard library alone, so that a scorer can import it at no cost.
package record

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"
)

// Schema is the version written into every record. A reader accepts any
// version up to its own; fields are only ever added within one.
const Schema = 1

// ErrNewer is wrapped when a record was written by a newer version of the
// pipeline: nothing is wrong with it, this process is too old to read it.
var ErrNewer = errors.New("newer than this reader")

// KeyPrefix starts every Redis key of the pipeline.
const KeyPrefix = "fp:prefetch:"

// Key returns the Redis key of a request id.
func Key(requestID string) string { return KeyPrefix + requestID }

// Status says what the scorer may conclude from a record.
type Status string

const (
	// Pending: accepted, and on its way.
	Pending Status = "pending"
	// Ready: the event was fetched; Signals and Event are set.
	Ready Status = "ready"
	// NotFound: the vendor kept answering that it has no such event. The
	// id was wrong or forged, which is itself a signal.
	NotFound Status = "not_found"
	// Rejected: the vendor refused the id as malformed. A signal as well.
	Rejected Status = "rejected"
	// Failed: our trouble or the vendor's; it says nothing about the client.
	Failed Status = "failed"
)

// Terminal reports whether s is an end: every known status but Pending.
func (s Status) Terminal() bool {
	switch s {
	case Ready, NotFound, Rejected, Failed:
		return true
	}
	return false
}

// Reason is why a record is negative. The set is closed, so that scorers can
// switch on it and dashboards can count it.
type Reason string

const (
	// EventNotFound goes with NotFound: 404 until the budget was used up.
	EventNotFound Reason = "event_not_found"
	// EventIDInvalid goes with Rejected: the vendor cannot parse the id.
	EventIDInvalid Reason = "event_id_invalid"
	// UpstreamUnavailable goes with Failed: the vendor was unreachable,
	// refusing or out of quota for as long as the event was worth fetching.
	UpstreamUnavailable Reason = "upstream_unavailable"
	// UpstreamMalformed goes with Failed: the vendor answered 200, but not
	// with this event.
	UpstreamMalformed Reason = "upstream_malformed"
	// Configuration goes with Failed: our key or region was refused for as
	// long as the event was worth fetching.
	Configuration Reason = "configuration"
	// TooOld goes with Failed: the event's time was up before it could be
	// looked at.
	TooOld Reason = "too_old"
	// Poison goes with Failed: handling this event kept killing the process.
	Poison Reason = "poison"
)

// Source is the way an event came to us.
type Source string

// The ways in.
const (
	SourceAPI     Source = "api"
	SourceSealed  Source = "sealed"
	SourceWebhook Source = "webhook"
)

// Record is the object stored at Key(RequestID) and carried by FP_ENRICHED.
//
// The first four members always come first and in this order: the persister
// compares records by them alone and Redis never has to parse JSON.
type Record struct {
	Schema       int    `json:"schema"`
	Status       Status `json:"status"`
	AcceptedAt   Time   `json:"accepted_at"`
	SubscriberID int64  `json:"subscriber_id"`

	Reason    Reason `json:"reason,omitzero"`
	RequestID string `json:"request_id"`
	SessionID string `json:"session_id"`
	UserID    string `json:"user_id"`

	// FetchedAt is when the vendor's last answer arrived; zero when it was
	// never asked.
	FetchedAt Time `json:"fetched_at,omitzero"`
	// Attempts is the number of vendor calls spent on this event.
	Attempts int      `json:"attempts,omitzero"`
	Source   Source   `json:"source,omitzero"`
	Checks   *Checks  `json:"checks,omitzero"`
	Signals  *Signals `json:"signals,omitzero"`
	// Event holds the vendor's own bytes.
	Event json.RawMessage `json:"event,omitzero"`
}

// Checks are facts about the event that only the pipeline could establish.
type Checks struct {
	// AgeMS is accepted_at minus the time the browser was identified, in
	// milliseconds. It is measured at arrival, so neither a queue nor a
	// replay makes an event stale.
	AgeMS *int64 `json:"age_ms"`
	// Fresh is whether that age is within FreshWithin.
	Fresh *bool `json:"fresh"`
	// Replayed is the vendor's own flag: this agent payload was seen before.
	Replayed *bool `json:"replayed"`
	// EventIDMatch is whether the vendor answered with the id asked for.
	EventIDMatch bool `json:"event_id_match"`
	// LinkedIDMatch tells which of our ids the client's linked_id equals.
	LinkedIDMatch LinkedIDMatch `json:"linked_id_match"`
	// SignalsComplete is false when the vendor had computed only a part;
	// the smart signals are then null.
	SignalsComplete bool `json:"signals_complete"`
}

// FreshWithin is the age above which the vendor recommends treating an event
// as malicious ("older than 2 minutes", field documentation of the Server
// API). ClockSkew is how far in the future a browser's identification may lie.
const (
	FreshWithin = 2 * time.Minute
	ClockSkew   = 5 * time.Second
)

// LinkedIDMatch is the outcome of comparing the vendor's linked_id.
type LinkedIDMatch string

// The outcomes: the id equals our session_id, our user_id, neither, or was
// not set.
const (
	LinkedSession LinkedIDMatch = "session"
	LinkedUser    LinkedIDMatch = "user"
	LinkedNone    LinkedIDMatch = "none"
	LinkedAbsent  LinkedIDMatch = "absent"
)

// Signals is a flat selection of the event under names of our own: the same
// whatever the vendor's API version or the way the event came in. Null means
// the vendor did not say: a product not on the plan, or one that does not
// apply to the platform.
type Signals struct {
	VisitorID          *string  `json:"visitor_id"`
	VisitorFound       *bool    `json:"visitor_found"`
	Confidence         *float64 `json:"confidence"`
	FirstSeenAt        *int64   `json:"first_seen_at_ms"`
	LastSeenAt         *int64   `json:"last_seen_at_ms"`
	IdentifiedAt       *int64   `json:"identified_at_ms"`
	LinkedID           *string  `json:"linked_id"`
	IPAddress          *string  `json:"ip_address"`
	URL                *string  `json:"url"`
	UserAgent          *string  `json:"user_agent"`
	Bot                *string  `json:"bot"`
	BotType            *string  `json:"bot_type"`
	VPN                *bool    `json:"vpn"`
	VPNConfidence      *string  `json:"vpn_confidence"`
	Proxy              *bool    `json:"proxy"`
	ProxyConfidence    *string  `json:"proxy_confidence"`
	ProxyType          *string  `json:"proxy_type"`
	Tor                *bool    `json:"tor"`
	AttackSource       *bool    `json:"attack_source"`
	EmailSpam          *bool    `json:"email_spam"`
	Datacenter         *bool    `json:"datacenter"`
	CountryCode        *string  `json:"country_code"`
	ASNType            *string  `json:"asn_type"`
	Tampering          *bool    `json:"tampering"`
	AntiDetectBrowser  *bool    `json:"anti_detect_browser"`
	Incognito          *bool    `json:"incognito"`
	VirtualMachine     *bool    `json:"virtual_machine"`
	DeveloperTools     *bool    `json:"developer_tools"`
	HighActivityDevice *bool    `json:"high_activity_device"`
	Events24h          *int64   `json:"events_24h"`
	DistinctIP24h      *int64   `json:"distinct_ip_24h"`
	SuspectScore       *int64   `json:"suspect_score"`
}

// Time is an instant written in UTC with nine fractional digits, so that the
// order of the text is the order of time.
type Time struct{ time.Time }

const timeLayout = "2006-01-02T15:04:05.000000000Z"

// At returns t in UTC, without a monotonic reading.
func At(t time.Time) Time { return Time{t.UTC().Round(0)} }

// String returns the fixed-width form.
func (t Time) String() string { return t.UTC().Format(timeLayout) }

// MarshalJSON writes the fixed-width form. It fails for a year outside 0 to
// 9999, which would not be fixed-width.
func (t Time) MarshalJSON() ([]byte, error) {
	if y := t.UTC().Year(); y < 0 || y > 9999 {
		return nil, fmt.Errorf("time: year %d outside 0 to 9999", y)
	}
	return t.UTC().AppendFormat(make([]byte, 0, len(timeLayout)+2), `"`+timeLayout+`"`), nil
}

// UnmarshalJSON reads any RFC 3339 time that MarshalJSON can write.
func (t *Time) UnmarshalJSON(b []byte) error {
	var v time.Time
	if err := v.UnmarshalJSON(b); err != nil {
		return errors.New("time: not RFC 3339") // err quotes the value
	}
	if y := v.UTC().Year(); y < 0 || y > 9999 {
		return fmt.Errorf("time: year %d outside 0 to 9999", y)
	}
	*t = At(v)
	return nil
}

// Decode reads a record. It fails on anything that is not one JSON object of
// a schema this package knows, with a known status and a request id. Errors
// never contain what was read.
func Decode(b []byte) (Record, error) {
	var r Record
	err := json.Unmarshal(b, &r) // goes on past a member of another type
	if err != nil && r.Schema <= Schema {
		return Record{}, fmt.Errorf("decode record: %w", maskJSON(err))
	}
	return r, r.Validate()
}

// maskJSON keeps the kind and the place of a JSON error and drops the text,
// which may quote what was read.
func maskJSON(err error) error {
	if t, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("wrong type at offset %d", t.Offset)
	}
	if s, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("not JSON at offset %d", s.Offset)
	}
	return err // of this package
}

// Encode writes the record. The vendor's bytes are copied as they are, without
// another look at them: they must be valid JSON.
func (r Record) Encode() ([]byte, error) {
	event := r.Event
	r.Event = nil
	b, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("encode record: %w", err)
	}
	if len(event) == 0 {
		return b, nil
	}
	out := make([]byte, 0, len(b)+len(event)+len(eventMember)+1)
	out = append(out, b[:len(b)-1]...)
	out = append(out, eventMember...)
	out = append(out, event...)
	return append(out, '}'), nil
}

// eventMember starts the last member of a record.
const eventMember = `,"event":`

// Validate reports the first thing that keeps r from being a record.
func (r Record) Validate() error {
	switch {
	case r.Schema > Schema:
		return fmt.Errorf("record: schema %d, known up to %d: %w", r.Schema, Schema, ErrNewer)
	case r.Schema < 1:
		return fmt.Errorf("record: no schema")
	case r.Status != Pending && !r.Status.Terminal():
		return fmt.Errorf("record: unknown status")
	case r.AcceptedAt.IsZero():
		return fmt.Errorf("record: no accepted_at")
	case r.SubscriberID < 1:
		return fmt.Errorf("record: no subscriber_id")
	case r.RequestID == "":
		return fmt.Errorf("record: no request_id")
	case r.Status == Ready && r.Signals == nil:
		return fmt.Errorf("record: ready without signals")
	}
	return nil
}
