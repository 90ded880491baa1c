package ingest

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"math"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"

	strictjson "github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// A key is
//
//	fpk_live_<id>_<secret><checksum>
//
// with an id of 1 to 32 characters of a-z, 0-9 and -, 32 random bytes as 43
// digits in base 62 and the CRC-32 (IEEE) of everything before it as 6 more.
// The id says which entry of the keys file to look at; the fixed form and the
// checksum let a scanner that finds a leaked key know it for one.
const (
	keyPrefix      = "fpk_live_"
	maxKeyID       = 32
	secretBytes    = 32
	secretDigits   = 43 // 62^43 is just above 2^256
	checksumDigits = 6
)

// KeyEntry is one key in the keys file. It holds nothing secret: the key has
// 256 random bits, so its hash tells nothing about it.
type KeyEntry struct {
	// ID names the key in logs and metrics and is a part of it. Two keys of
	// one client have two ids, such as acme-1 and acme-2.
	ID string `json:"id"`
	// SHA256 of the whole key, in hexadecimal.
	SHA256 string `json:"sha256"`
	// Subscribers the key may send events for.
	Subscribers Subscribers `json:"subscribers"`
	// NotBefore and NotAfter limit the time the key is good for; zero means
	// no limit. At NotAfter itself the key is no longer good.
	NotBefore time.Time `json:"not_before,omitzero"`
	NotAfter  time.Time `json:"not_after,omitzero"`
	// RateLimit is the requests per second the key may make on each replica;
	// 0 means unlimited, nil what INGEST_RATE_LIMIT says.
	RateLimit *float64 `json:"rate_limit,omitzero"`
}

// Subscribers is a set of subscriber ids: some, or all there are. In the keys
// file it is a list of numbers, or ["*"]. The zero value holds none.
type Subscribers struct {
	ids []int64
	all bool
}

// AllSubscribers returns the set of every subscriber.
func AllSubscribers() Subscribers { return Subscribers{all: true} }

// SomeSubscribers returns the set of ids.
func SomeSubscribers(ids ...int64) Subscribers { return Subscribers{ids: slices.Clone(ids)} }

// ParseSubscribers reads "12", "12,13" or "*".
func ParseSubscribers(s string) (Subscribers, error) {
	if s == "*" {
		return AllSubscribers(), nil
	}
	var ids []int64
	for part := range strings.SplitSeq(s, ",") {
		id, ok := parseSubscriber(part)
		if !ok {
			return Subscribers{}, fmt.Errorf("%q is neither a subscriber id nor *", part)
		}
		ids = append(ids, id)
	}
	return Subscribers{ids: ids}, nil
}

func parseSubscriber(s string) (int64, bool) {
	id, err := strconv.ParseInt(s, 10, 64)
	return id, err == nil && id >= 1 && id <= maxSubscriberID && strconv.FormatInt(id, 10) == s
}

// Contains reports whether id is in the set.
func (s Subscribers) Contains(id int64) bool { return s.all || slices.Contains(s.ids, id) }

// String returns the form that ParseSubscribers reads.
func (s Subscribers) String() string {
	if s.all {
		return "*"
	}
	parts := make([]string, len(s.ids))
	for i, id := range s.ids {
		parts[i] = strconv.FormatInt(id, 10)
	}
	return strings.Join(parts, ",")
}

// MarshalJSON writes the form of the keys file.
func (s Subscribers) MarshalJSON() ([]byte, error) {
	if s.all {
		return []byte(`["*"]`), nil
	}
	return []byte("[" + s.String() + "]"), nil
}

// UnmarshalJSON reads the form of the keys file.
func (s *Subscribers) UnmarshalJSON(b []byte) error {
	rule := errors.New(`must be a list of subscriber ids such as [12], or ["*"]`)
	var list []json.RawMessage
	if err := json.Unmarshal(b, &list); err != nil || len(list) == 0 {
		return rule
	}
	if len(list) == 1 && string(list[0]) == `"*"` {
		*s = AllSubscribers()
		return nil
	}
	ids := make([]int64, len(list))
	for i, item := range list {
		var ok bool
		if ids[i], ok = parseSubscriber(string(item)); !ok {
			return rule
		}
	}
	*s = Subscribers{ids: ids}
	return nil
}

// NewKey makes a key named id for the given subscribers, with random bytes
// from random, and its entry for the keys file. The key is not kept anywhere.
func NewKey(id string, subscribers Subscribers, random io.Reader) (key string, entry KeyEntry, err error) {
	if !validKeyID(id) {
		return "", KeyEntry{}, fmt.Errorf("id %q is not 1 to %d characters of a-z, 0-9 and -", id, maxKeyID)
	}
	if !subscribers.all && len(subscribers.ids) == 0 {
		return "", KeyEntry{}, errors.New("a key needs a subscriber")
	}
	secret := make([]byte, secretBytes)
	if _, err := io.ReadFull(random, secret); err != nil {
		return "", KeyEntry{}, fmt.Errorf("read random bytes: %w", err)
	}
	// SetBytes and Text rather than a character at a time: no bias.
	digits := new(big.Int).SetBytes(secret).Text(62)
	key = keyPrefix + id + "_" + strings.Repeat("0", secretDigits-len(digits)) + digits
	sum := checksum([]byte(key))
	key += string(sum[:])
	hash := sha256.Sum256([]byte(key))
	return key, KeyEntry{ID: id, SHA256: hex.EncodeToString(hash[:]), Subscribers: subscribers}, nil
}

// checksum returns the last digits of the key that begins with b.
func checksum(b []byte) (sum [checksumDigits]byte) {
	const digits = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
	n := crc32.ChecksumIEEE(b)
	for i := range sum {
		sum[len(sum)-1-i] = digits[n%62]
		n /= 62
	}
	return sum
}

func validKeyID[T ~string | ~[]byte](id T) bool {
	for i := range len(id) {
		if c := id[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return false
		}
	}
	return len(id) >= 1 && len(id) <= maxKeyID
}

// keyID returns the id in a key, if it has the form of one and its checksum
// is right.
func keyID(key []byte) (id []byte, ok bool) {
	rest, ok := bytes.CutPrefix(key, []byte(keyPrefix))
	if !ok {
		return nil, false
	}
	id, digits, _ := bytes.Cut(rest, []byte("_"))
	if !validKeyID(id) || len(digits) != secretDigits+checksumDigits {
		return nil, false
	}
	for _, c := range digits {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return nil, false
		}
	}
	end := len(key) - checksumDigits
	sum := checksum(key[:end])
	return id, bytes.Equal(sum[:], key[end:])
}

// authReason is why a request has no good key: a closed set, used as a metric
// label. The client is told only whether it sent one.
type authReason string

const (
	keyMissing   authReason = "missing"
	keyMalformed authReason = "malformed" // not of the form, a typo, or sent twice
	keyUnknown   authReason = "unknown"   // no such id: never made, or revoked
	keyMismatch  authReason = "mismatch"  // the id of a key, and another secret
	keyTooEarly  authReason = "not_yet_valid"
	keyExpired   authReason = "expired"
)

func authReasons() []authReason {
	return []authReason{keyMissing, keyMalformed, keyUnknown, keyMismatch, keyTooEarly, keyExpired}
}

// apiKey is an entry ready for use.
type apiKey struct {
	KeyEntry
	hash  [sha256.Size]byte
	limit *limiter // nil for no limit
}

type keySet map[string]*apiKey // by id

// check returns the key presented in the values of its header field, or why
// it is none. A secret is compared in a time that depends on neither the
// secret nor whether there is such an id.
func (s keySet) check(values []string, now time.Time) (*apiKey, authReason) {
	switch {
	case len(values) == 0, len(values) == 1 && values[0] == "":
		return nil, keyMissing
	case len(values) > 1:
		return nil, keyMalformed
	}
	presented := []byte(values[0])
	id, ok := keyID(presented)
	if !ok {
		return nil, keyMalformed
	}
	var want [sha256.Size]byte // for an unknown id, nothing's hash
	key, known := s[string(id)]
	if known {
		want = key.hash
	}
	got := sha256.Sum256(presented)
	same := subtle.ConstantTimeCompare(got[:], want[:]) == 1
	switch {
	case !known:
		return nil, keyUnknown
	case !same:
		return nil, keyMismatch
	case now.Before(key.NotBefore):
		return nil, keyTooEarly
	case !key.NotAfter.IsZero() && !now.Before(key.NotAfter):
		return nil, keyExpired
	}
	return key, ""
}

// parseKeys reads a keys file. Its error names every fault, one a line, and
// repeats no value: somebody may have pasted a key where its hash belongs.
func parseKeys(b []byte) (keySet, error) {
	var entries []map[string]jsontext.Value
	if err := strictjson.Unmarshal(b, &entries); err != nil {
		return nil, fmt.Errorf("not a JSON list of objects: %s", maskKeysError(b, err))
	}
	if entries == nil {
		return nil, errors.New("not a JSON list of objects: null")
	}
	set := make(keySet, len(entries))
	hashes := make(map[[sha256.Size]byte]string, len(entries))
	var faults []error
	for i, members := range entries {
		key, entryFaults := parseEntry(members)
		name := "entry " + strconv.Itoa(i+1)
		if key.ID != "" {
			name += " (" + key.ID + ")"
		}
		if _, twice := set[key.ID]; twice {
			entryFaults = append(entryFaults, errors.New("id: another entry has it already"))
		}
		if other, twice := hashes[key.hash]; twice {
			entryFaults = append(entryFaults, fmt.Errorf("sha256: the same as that of %s", other))
		}
		for _, fault := range entryFaults {
			faults = append(faults, fmt.Errorf("%s: %w", name, fault))
		}
		if key.ID != "" {
			set[key.ID] = key
		}
		if key.SHA256 != "" {
			hashes[key.hash] = name
		}
	}
	return set, errors.Join(faults...)
}

// maskKeysError says where a file is wrong without quoting it.
func maskKeysError(b []byte, err error) string {
	offset, what := int64(0), "wrong type"
	if syntactic, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		offset, what = syntactic.ByteOffset, "syntax error"
		switch {
		case errors.Is(err, jsontext.ErrDuplicateName):
			what = "a name occurs twice in one object"
		case errors.Is(err, io.ErrUnexpectedEOF):
			what = "ends too early"
		}
	} else if semantic, ok := errors.AsType[*strictjson.SemanticError](err); ok {
		offset = semantic.ByteOffset
	}
	line := 1 + bytes.Count(b[:min(offset, int64(len(b)))], []byte("\n"))
	return fmt.Sprintf("line %d: %s", line, what)
}

// parseEntry reads one entry and finds all its faults; what is faulty is left
// zero.
func parseEntry(members map[string]jsontext.Value) (*apiKey, []error) {
	var (
		key    apiKey
		faults []error
	)
	fault := func(name, words string) { faults = append(faults, fmt.Errorf("%s: %s", name, words)) }
	for _, required := range []string{"id", "sha256", "subscribers"} {
		if _, ok := members[required]; !ok {
			fault(required, "missing")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(members)) {
		value := members[name]
		switch name {
		case "id":
			var id string
			if err := strictjson.Unmarshal(value, &id); err != nil || !validKeyID(id) {
				fault(name, "must be 1 to 32 characters of a-z, 0-9 and -")
				continue
			}
			key.ID = id
		case "sha256":
			var text string
			err := strictjson.Unmarshal(value, &text)
			hash, hexErr := hex.DecodeString(text)
			if err != nil || hexErr != nil || len(hash) != sha256.Size {
				fault(name, "must be 64 hexadecimal digits")
				continue
			}
			key.SHA256, key.hash = text, [sha256.Size]byte(hash)
		case "subscribers":
			if err := key.Subscribers.UnmarshalJSON(value); err != nil {
				fault(name, err.Error())
			}
		case "not_before", "not_after":
			var t time.Time
			if err := strictjson.Unmarshal(value, &t); err != nil || t.IsZero() {
				fault(name, "must be a time such as 2027-01-31T00:00:00Z")
				continue
			}
			if name == "not_before" {
				key.NotBefore = t
			} else {
				key.NotAfter = t
			}
		case "rate_limit":
			var limit float64
			if err := strictjson.Unmarshal(value, &limit); err != nil || value.Kind() != '0' || limit < 0 || math.IsInf(limit, 0) {
				fault(name, "must be a number of requests per second, 0 for no limit")
				continue
			}
			key.RateLimit = &limit
		default:
			fault(strconv.Quote(name[:min(len(name), 32)]), "unknown member")
		}
	}
	if !key.NotAfter.IsZero() && !key.NotBefore.Before(key.NotAfter) {
		fault("not_after", "must be later than not_before")
	}
	return &key, faults
}
