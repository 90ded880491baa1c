package prefetcher

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// Projection is what the pipeline itself reads out of an event. The event's
// bytes travel beside it, so nothing is lost by leaving a member out.
type Projection struct {
	// EventID is empty when the event carries none.
	EventID string
	// Timestamp is when the browser was identified, in Unix milliseconds;
	// 0 when the event does not say.
	Timestamp int64
	// LinkedID is the correlation id the client's agent was given.
	LinkedID *string
	// Replayed is the vendor's flag for an agent payload seen before.
	Replayed *bool
	// Complete is false when the vendor had computed only a part of the
	// smart signals; those in Signals are null then.
	Complete bool
	Signals  record.Signals
}

// maxString bounds what is copied into a signal. The client chooses its URL
// and its user agent, and a value longer than this stays in the event alone.
const maxString = 4 << 10

// maxInt is the largest integer that every JSON reader keeps exactly.
const maxInt = 1<<53 - 1

// Project reads an event in the form of the vendor's Server API v4. It fails
// on anything that is not exactly one JSON object; its errors never quote the
// event.
//
// Everything else is tolerated, because the vendor adds members every month,
// leaves out what is not on the plan, and old events keep their old form: a
// member that is missing or of another type only leaves its own field null.
// Duplicate names and broken Unicode are tolerated too (the last fitting value
// counts). Parts of an event, its tags above all, are the client's own text,
// and a client must not be able to make its event unreadable: that would pass
// for an outage.
func Project(b []byte) (Projection, error) {
	d := jsontext.NewDecoder(bytes.NewBuffer(b), jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true))
	if d.PeekKind() != '{' {
		return Projection{}, errors.New("project event: not a JSON object")
	}
	var p pass
	if err := eventFields.read(d, &p); err != nil {
		return Projection{}, fmt.Errorf("project event: not JSON after offset %d", d.InputOffset())
	}
	if _, err := d.ReadToken(); err != io.EOF {
		return Projection{}, fmt.Errorf("project event: more after its end at offset %d", d.InputOffset())
	}
	return p.projection(), nil
}

// Checks compares the event with what the client told us: the three ids of the
// ingest event and the time it was accepted.
func (p Projection) Checks(requestedID, sessionID, userID string, acceptedAt time.Time) record.Checks {
	c := record.Checks{
		Replayed:        p.Replayed,
		EventIDMatch:    p.EventID == requestedID,
		SignalsComplete: p.Complete,
	}
	if p.Timestamp > 0 {
		// In milliseconds, not as a Duration: a timestamp far off would overflow.
		age := acceptedAt.UnixMilli() - p.Timestamp
		fresh := -record.ClockSkew.Milliseconds() <= age && age <= record.FreshWithin.Milliseconds()
		c.AgeMS, c.Fresh = &age, &fresh
	}
	switch {
	case p.LinkedID == nil || *p.LinkedID == "":
		c.LinkedIDMatch = record.LinkedAbsent
	case *p.LinkedID == sessionID:
		c.LinkedIDMatch = record.LinkedSession
	case *p.LinkedID == userID:
		c.LinkedIDMatch = record.LinkedUser
	default:
		c.LinkedIDMatch = record.LinkedNone
	}
	return c
}

// pass is one reading of an event: the signals, and what becomes a signal only
// when the whole event is known.
type pass struct {
	record.Signals
	eventID  *string
	replayed *bool
	status   *string
	// Used where the event has no IPv4 address.
	v6Country, v6ASNType *string
	v6Datacenter         *bool
}

func (p *pass) projection() Projection {
	s := p.Signals
	s.CountryCode = firstSet(s.CountryCode, p.v6Country)
	s.ASNType = firstSet(s.ASNType, p.v6ASNType)
	s.Datacenter = firstSet(s.Datacenter, p.v6Datacenter)

	complete := p.status == nil || *p.status != "partially_completed"
	if !complete {
		// The vendor on such events: "Smart Signals, even if included in
		// your plan, are not computed; hence, their values must be ignored."
		s = record.Signals{
			VisitorID: s.VisitorID, VisitorFound: s.VisitorFound, Confidence: s.Confidence,
			FirstSeenAt: s.FirstSeenAt, LastSeenAt: s.LastSeenAt, IdentifiedAt: s.IdentifiedAt,
			LinkedID: s.LinkedID, IPAddress: s.IPAddress, URL: s.URL, UserAgent: s.UserAgent,
		}
	}
	out := Projection{LinkedID: s.LinkedID, Replayed: p.replayed, Complete: complete, Signals: s}
	if p.eventID != nil {
		out.EventID = *p.eventID
	}
	if s.IdentifiedAt != nil {
		out.Timestamp = *s.IdentifiedAt
	}
	return out
}

func firstSet[T any](a, b *T) *T {
	if a != nil {
		return a
	}
	return b
}

// eventFields is the whole mapping from the vendor's names to ours.
var eventFields = tree(map[string]setter{
	"event_id":                              text(func(p *pass) **string { return &p.eventID }),
	"timestamp":                             integer(func(p *pass) **int64 { return &p.IdentifiedAt }),
	"replayed":                              boolean(func(p *pass) **bool { return &p.replayed }),
	"incremental_identification_status":     text(func(p *pass) **string { return &p.status }),
	"identification.visitor_id":             text(func(p *pass) **string { return &p.VisitorID }),
	"identification.visitor_found":          boolean(func(p *pass) **bool { return &p.VisitorFound }),
	"identification.confidence.score":       number(func(p *pass) **float64 { return &p.Confidence }),
	"identification.first_seen_at":          integer(func(p *pass) **int64 { return &p.FirstSeenAt }),
	"identification.last_seen_at":           integer(func(p *pass) **int64 { return &p.LastSeenAt }),
	"linked_id":                             text(func(p *pass) **string { return &p.LinkedID }),
	"ip_address":                            text(func(p *pass) **string { return &p.IPAddress }),
	"url":                                   text(func(p *pass) **string { return &p.URL }),
	"user_agent":                            text(func(p *pass) **string { return &p.UserAgent }),
	"bot":                                   text(func(p *pass) **string { return &p.Bot }),
	"bot_type":                              text(func(p *pass) **string { return &p.BotType }),
	"vpn":                                   boolean(func(p *pass) **bool { return &p.VPN }),
	"vpn_confidence":                        text(func(p *pass) **string { return &p.VPNConfidence }),
	"proxy":                                 boolean(func(p *pass) **bool { return &p.Proxy }),
	"proxy_confidence":                      text(func(p *pass) **string { return &p.ProxyConfidence }),
	"proxy_details.proxy_type":              text(func(p *pass) **string { return &p.ProxyType }),
	"ip_blocklist.tor_node":                 boolean(func(p *pass) **bool { return &p.Tor }),
	"ip_blocklist.attack_source":            boolean(func(p *pass) **bool { return &p.AttackSource }),
	"ip_blocklist.email_spam":               boolean(func(p *pass) **bool { return &p.EmailSpam }),
	"ip_info.v4.geolocation.country_code":   text(func(p *pass) **string { return &p.CountryCode }),
	"ip_info.v4.asn_type":                   text(func(p *pass) **string { return &p.ASNType }),
	"ip_info.v4.datacenter_result":          boolean(func(p *pass) **bool { return &p.Datacenter }),
	"ip_info.v6.geolocation.country_code":   text(func(p *pass) **string { return &p.v6Country }),
	"ip_info.v6.asn_type":                   text(func(p *pass) **string { return &p.v6ASNType }),
	"ip_info.v6.datacenter_result":          boolean(func(p *pass) **bool { return &p.v6Datacenter }),
	"tampering":                             boolean(func(p *pass) **bool { return &p.Tampering }),
	"tampering_details.anti_detect_browser": boolean(func(p *pass) **bool { return &p.AntiDetectBrowser }),
	"incognito":                             boolean(func(p *pass) **bool { return &p.Incognito }),
	"virtual_machine":                       boolean(func(p *pass) **bool { return &p.VirtualMachine }),
	"developer_tools":                       boolean(func(p *pass) **bool { return &p.DeveloperTools }),
	"high_activity_device":                  boolean(func(p *pass) **bool { return &p.HighActivityDevice }),
	"velocity.events.24_hours":              integer(func(p *pass) **int64 { return &p.Events24h }),
	"velocity.distinct_ip.24_hours":         integer(func(p *pass) **int64 { return &p.DistinctIP24h }),
	"suspect_score":                         integer(func(p *pass) **int64 { return &p.SuspectScore }),
})

// setter takes one scalar, or leaves its field alone when that is of another
// type.
type setter struct {
	set func(*pass, jsontext.Token)
	// wrapped: {"result": …} is accepted for the bare value.
	wrapped bool
}

func text(at func(*pass) **string) setter {
	return setter{set: func(p *pass, t jsontext.Token) {
		if t.Kind() != '"' {
			return
		}
		if s := t.String(); len(s) <= maxString {
			*at(p) = &s
		}
	}}
}

// boolean also takes the object form of a signal, {"result":true,…}, which the
// previous version of the API had and integrators still meet.
func boolean(at func(*pass) **bool) setter {
	return setter{wrapped: true, set: func(p *pass, t jsontext.Token) {
		if k := t.Kind(); k == 't' || k == 'f' {
			b := t.Bool()
			*at(p) = &b
		}
	}}
}

func number(at func(*pass) **float64) setter {
	return setter{set: func(p *pass, t jsontext.Token) {
		if t.Kind() != '0' {
			return
		}
		if f, err := t.Float(); err == nil {
			*at(p) = &f
		}
	}}
}

// integer also takes 7.0 and 1.7e12: JSON has one type of number.
func integer(at func(*pass) **int64) setter {
	return setter{set: func(p *pass, t jsontext.Token) {
		if t.Kind() != '0' {
			return
		}
		n, err := t.Int()
		if err != nil {
			f, err := t.Float()
			if err != nil || f != math.Trunc(f) || math.Abs(f) > maxInt {
				return
			}
			n = int64(f)
		}
		if -maxInt <= n && n <= maxInt {
			*at(p) = &n
		}
	}}
}

// node is a place in the event: an object on the way to a field, a field, or
// both. A nil node is a place nobody asked for.
type node struct {
	members map[string]*node
	set     func(*pass, jsontext.Token)
}

// tree turns dotted paths into nodes.
func tree(fields map[string]setter) *node {
	root := new(node)
	for path, f := range fields {
		n := root
		for name := range strings.SplitSeq(path, ".") {
			n = n.member(name)
		}
		n.set = f.set
		if f.wrapped {
			n.member("result").set = f.set
		}
	}
	return root
}

func (n *node) member(name string) *node {
	if n.members == nil {
		n.members = map[string]*node{}
	}
	if n.members[name] == nil {
		n.members[name] = new(node)
	}
	return n.members[name]
}

// read consumes the next value of d, which is at n. What n has no use for is
// skipped, but must be JSON all the same.
func (n *node) read(d *jsontext.Decoder, p *pass) error {
	if n == nil {
		return d.SkipValue()
	}
	switch kind := d.PeekKind(); {
	case kind == '{' && n.members != nil:
		return n.readObject(d, p)
	case kind == '{', kind == '[', n.set == nil:
		return d.SkipValue()
	}
	t, err := d.ReadToken()
	if err != nil {
		return err
	}
	n.set(p, t)
	return nil
}

func (n *node) readObject(d *jsontext.Decoder, p *pass) error {
	if _, err := d.ReadToken(); err != nil { // {
		return err
	}
	for d.PeekKind() != '}' {
		name, err := d.ReadToken()
		if err != nil {
			return err
		}
		if err := n.members[name.String()].read(d, p); err != nil {
			return err
		}
	}
	_, err := d.ReadToken() // }
	return err
}
