package streams

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"time"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// EventSchema is the version written into every Event. A stage reads any
// version up to its own and keeps a newer one waiting for its successor.
const EventSchema = 1

// MaxRequestID is the longest request id in bytes. Real ones have 20; the
// bound keeps URLs, keys and headers small.
const MaxRequestID = 64

// Event is an accepted ingest event: the body on FP_INGEST and, as a copy, on
// FP_BACKFILL. When it was accepted is not in the body: it is the time
// FP_INGEST stored it (see Delivery.AcceptedAt).
type Event struct {
	Schema       int    `json:"schema"`
	RequestID    string `json:"request_id"`
	SubscriberID int64  `json:"subscriber_id"`
	// SessionID and UserID are personal data: they belong in payloads and
	// nowhere else.
	SessionID string `json:"session_id"`
	UserID    string `json:"user_id"`
}

// ErrNewerSchema is wrapped by DecodeEvent when the message comes from a newer
// version: it waits for the one that takes this replica's place.
var ErrNewerSchema = errors.New("newer than this stage")

// DecodeEvent reads the body of an ingest message. Unknown members are
// ignored, so that the next version may add some. Errors never contain the
// body.
func DecodeEvent(b []byte) (Event, error) {
	var e Event
	err := json.Unmarshal(b, &e) // goes on past a member of another type
	switch {
	case e.Schema > EventSchema:
		return Event{}, fmt.Errorf("decode event: schema %d: %w", e.Schema, ErrNewerSchema)
	case err != nil:
		return Event{}, fmt.Errorf("decode event: %w", maskJSON(err))
	case e.Schema < 1:
		return Event{}, errors.New("decode event: no schema")
	case !ValidRequestID(e.RequestID):
		return Event{}, errors.New("decode event: request_id outside its grammar")
	case e.SubscriberID < 1:
		return Event{}, errors.New("decode event: no subscriber_id")
	}
	return e, nil
}

// maskJSON keeps the kind and the place of a JSON error and drops the text,
// which may quote the body.
func maskJSON(err error) error {
	if t, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("wrong type at offset %d", t.Offset)
	}
	if s, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("not JSON at offset %d", s.Offset)
	}
	return errors.New("not an event")
}

// ValidRequestID reports whether id is 1 to MaxRequestID bytes of dot-separated
// tokens of [A-Za-z0-9_-], the first byte alphanumeric. The grammar admits
// everything the vendor issues and nothing that means something in a URL
// path, a Redis key, a header or a log line.
func ValidRequestID(id string) bool {
	if len(id) == 0 || len(id) > MaxRequestID {
		return false
	}
	dot := false
	for i := range len(id) {
		switch c := id[i]; {
		case c >= '0' && c <= '9', c >= 'A' && c <= 'Z', c >= 'a' && c <= 'z':
			dot = false
		case c == '_' || c == '-':
			if i == 0 {
				return false
			}
			dot = false
		case c == '.':
			if i == 0 || dot {
				return false
			}
			dot = true
		default:
			return false
		}
	}
	return !dot
}

// MessageID returns the message id of an ingest event: a hash over everything
// it carries, so that a client's retry is absorbed by the stream and a changed
// event is not.
func (e Event) MessageID() string {
	h := sha256.New()
	e.hashTo(h)
	return sum(h)
}

func (e Event) hashTo(h hash.Hash) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(e.SubscriberID))
	h.Write(n[:])
	for _, s := range [...]string{e.RequestID, e.SessionID, e.UserID} {
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
}

// DerivedMessageID returns the message id of what a stage made of an event.
// It adds when the event was accepted, the outcome and the replay that asked
// for it (empty for live ones), so that neither a replay nor a later, better
// outcome is taken for a duplicate.
func DerivedMessageID(r record.Record, replay string) string {
	h := sha256.New()
	Event{RequestID: r.RequestID, SubscriberID: r.SubscriberID, SessionID: r.SessionID, UserID: r.UserID}.hashTo(h)
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(r.AcceptedAt.UnixNano()))
	h.Write(n[:])
	for _, s := range [...]string{string(r.Status), string(r.Reason), replay} {
		h.Write([]byte{0})
		h.Write([]byte(s))
	}
	return sum(h)
}

// sum keeps 128 bits: collisions are out of reach, and the server holds every
// id of the dedupe window in memory.
func sum(h hash.Hash) string { return hex.EncodeToString(h.Sum(nil)[:16]) }

// NewRecord starts the record of an event.
func NewRecord(e Event, acceptedAt time.Time, status record.Status, reason record.Reason) record.Record {
	return record.Record{
		Schema: record.Schema, Status: status, AcceptedAt: record.At(acceptedAt), SubscriberID: e.SubscriberID,
		Reason: reason, RequestID: e.RequestID, SessionID: e.SessionID, UserID: e.UserID,
	}
}
