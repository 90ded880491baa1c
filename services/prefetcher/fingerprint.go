package prefetcher

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

// Sizes in bytes. A v4 event has about 6 KiB and may carry 16 KiB of tags.
const (
	maxEvent = 256 << 10
	maxError = 16 << 10
)

// maxRetryAfter bounds what an answer may ask us to wait.
const maxRetryAfter = time.Hour

// Outcome says what an answer of the vendor means for the pipeline.
type Outcome int

const (
	// Found: 200 with the event asked for. The zero Outcome is none of
	// these, so that nothing is found by omission.
	Found Outcome = iota + 1
	// NotFound: the vendor has no such event, or not yet; it says the same
	// for both.
	NotFound
	// Rejected: the vendor cannot parse the id, and never will.
	Rejected
	// Transient: no answer, or one that says nothing about the event, the
	// key or the quota.
	Transient
	// Throttled: over the quota, or the vendor under extreme load.
	Throttled
	// Misconfigured: our key, region or workspace was refused in the
	// vendor's own words.
	Misconfigured
	// Malformed: 200, but not with this event.
	Malformed
)

// String returns the outcome as a metric label.
func (o Outcome) String() string {
	switch o {
	case Found:
		return "found"
	case NotFound:
		return "not_found"
	case Rejected:
		return "rejected"
	case Transient:
		return "transient"
	case Throttled:
		return "throttled"
	case Misconfigured:
		return "misconfigured"
	case Malformed:
		return "malformed"
	}
	return "outcome(" + strconv.Itoa(int(o)) + ")"
}

// Answer is the result of one call.
type Answer struct {
	Outcome Outcome
	// Body holds the vendor's bytes when Found. The one liberty taken: what
	// is not UTF-8 becomes U+FFFD, so that strict readers can parse it.
	Body []byte
	// Projection is set when Found.
	Projection
	// RetryAfter is how long the answer asks us to wait, at most an hour;
	// 0 when it does not say. The vendor's v4 has dropped the header, but a
	// gateway may add it.
	RetryAfter time.Duration
	// Status is the HTTP status, 0 when there was no answer.
	Status int
	// Code is the vendor's error code if it is a documented one, else empty.
	Code string
	// Err is what went wrong, nil when Found. It never contains the key,
	// the answer's body or personal data.
	Err error
}

// Fingerprint calls the Fingerprint Server API v4. It is safe for concurrent
// use.
type Fingerprint struct {
	baseURL   string
	key       func() string
	timeout   time.Duration
	userAgent string
	transport http.RoundTripper
}

// NewFingerprint returns a client of the API at baseURL, the root of a host
// such as [RegionURL] returns. The secret key is asked for at every call, so
// that it can be rotated. A call takes timeout at most, body included.
// Concurrency is the number of connections kept open between calls.
func NewFingerprint(baseURL string, key func() string, timeout time.Duration, concurrency int) *Fingerprint {
	version, _ := ops.Version()
	return &Fingerprint{
		baseURL:   strings.TrimRight(baseURL, "/"),
		key:       key,
		timeout:   timeout,
		userAgent: "fingerprint-prefetch/" + version,
		// The transport is used without an http.Client: that is what would
		// follow redirects, and carry the key along.
		//
		// With a DialContext it speaks HTTP/1.1 only: a stuck connection
		// holds up one call and not all of them.
		transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            (&net.Dialer{Timeout: time.Second}).DialContext,
			TLSHandshakeTimeout:    2 * time.Second,
			MaxIdleConnsPerHost:    max(concurrency, 1),
			IdleConnTimeout:        90 * time.Second,
			MaxResponseHeaderBytes: 64 << 10,
			// At this rate compression saves nothing worth having, and
			// without it the size limit counts what is really read.
			DisableCompression: true,
		},
	}
}

// RegionURL returns the vendor's host of a region: us (also called global), eu
// or ap. It returns "" for any other word.
func RegionURL(region string) string {
	switch region {
	case "us":
		return "https://api.fpjs.io"
	case "eu":
		return "https://eu.api.fpjs.io"
	case "ap":
		return "https://ap.api.fpjs.io"
	}
	return ""
}

// Event asks for one event, once. The id must be a valid request id: escaping
// alone would let ".." through. When ctx ends first, the outcome is Transient
// and Err wraps the context's error.
func (f *Fingerprint) Event(ctx context.Context, id string) Answer {
	ctx, cancel := context.WithTimeout(ctx, f.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.baseURL+"/v4/events/"+url.PathEscape(id), nil)
	if err != nil {
		return Answer{Outcome: Misconfigured, Err: errors.New("base URL does not parse")}
	}
	key := f.key()
	if strings.ContainsFunc(key, unicode.IsControl) {
		return Answer{Outcome: Misconfigured, Err: errors.New("secret key contains a control character")}
	}
	req.Header.Set("Authorization", "Bearer "+key)
	req.Header.Set("Accept", "application/json")
	req.Header.Set("User-Agent", f.userAgent)

	resp, err := f.transport.RoundTrip(req)
	if err != nil {
		return Answer{Outcome: Transient, Err: fmt.Errorf("call: %w", cause(ctx, err))}
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refusal(resp)
	}
	a := Answer{Status: resp.StatusCode}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxEvent+1))
	if err != nil {
		a.Outcome, a.Err = Transient, fmt.Errorf("read body: %w", cause(ctx, err))
		return a
	}
	if a.Projection, err = event(resp.Header, b, id); err != nil {
		a.Outcome, a.Err = Malformed, err
		return a
	}
	a.Outcome, a.Body = Found, b
	if !utf8.Valid(b) {
		a.Body = bytes.ToValidUTF8(b, []byte("\uFFFD"))
	}
	return a
}

// event reads the body of a 200 and insists that it is the event id.
func event(h http.Header, b []byte, id string) (Projection, error) {
	if len(b) > maxEvent {
		return Projection{}, fmt.Errorf("body longer than %d bytes", maxEvent)
	}
	if e := h.Get("Content-Encoding"); e != "" && e != "identity" {
		return Projection{}, errors.New("body is encoded, which was not asked for")
	}
	if t := mediaType(h); t != "" && t != "application/json" {
		return Projection{}, errors.New("content type is not application/json")
	}
	p, err := Project(b)
	switch {
	case err != nil:
		return Projection{}, err
	case p.EventID == "":
		return Projection{}, errors.New("event without event_id")
	case p.EventID != id:
		return Projection{}, errors.New("event with another event_id")
	}
	return p, nil
}

// documented maps the error codes of the vendor's v4 documentation to the
// status they come with.
var documented = map[string]int{
	"request_cannot_be_parsed": http.StatusBadRequest,
	"request_read_timeout":     http.StatusBadRequest,
	"ruleset_not_found":        http.StatusBadRequest,
	"secret_api_key_required":  http.StatusForbidden,
	"secret_api_key_not_found": http.StatusForbidden,
	"subscription_not_active":  http.StatusForbidden,
	"wrong_region":             http.StatusForbidden,
	"feature_not_enabled":      http.StatusForbidden,
	"event_not_found":          http.StatusNotFound,
	"request_not_found":        http.StatusNotFound,
	"too_many_requests":        http.StatusTooManyRequests,
	"failed":                   http.StatusInternalServerError,
	"service_unavailable":      http.StatusServiceUnavailable,
}

// refusal classifies an answer other than 200. Where a status has grave
// consequences (stop everything, or hold it against the client) it must be
// recognisably the vendor's: any gateway on the way can answer 403 or 404.
func refusal(resp *http.Response) Answer {
	// A body that breaks off costs the code, not the status.
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxError))
	// Reading on, a little, keeps the connection usable.
	_, _ = io.CopyN(io.Discard, resp.Body, maxError)

	a := Answer{
		Outcome:    Transient,
		RetryAfter: retryAfter(resp.Header.Get("Retry-After"), time.Now()),
		Status:     resp.StatusCode,
		Code:       errorCode(b),
	}
	switch a.Status {
	case http.StatusBadRequest:
		switch a.Code {
		case "request_cannot_be_parsed":
			a.Outcome = Rejected
		case "ruleset_not_found":
			a.Outcome = Misconfigured
		}
	case http.StatusUnauthorized, http.StatusForbidden:
		if documented[a.Code] == http.StatusForbidden {
			a.Outcome = Misconfigured
		}
	case http.StatusNotFound:
		if mediaType(resp.Header) != "text/html" {
			a.Outcome = NotFound
		}
	case http.StatusTooManyRequests:
		a.Outcome = Throttled
	}
	a.Err = fmt.Errorf("status %d", a.Status)
	if a.Code != "" {
		a.Err = fmt.Errorf("status %d: %s", a.Status, a.Code)
	}
	return a
}

// errorCode returns the documented code in an error body, which is
// {"error":{"code":"…","message":"…"}} or, from older parts of the API,
// {"error":"…"}. It returns "" for everything else.
func errorCode(b []byte) string {
	var reply struct {
		Error json.RawMessage `json:"error"`
	}
	if json.Unmarshal(b, &reply) != nil {
		return ""
	}
	var e struct {
		Code string `json:"code"`
	}
	if json.Unmarshal(reply.Error, &e) != nil {
		_ = json.Unmarshal(reply.Error, &e.Code)
	}
	if documented[e.Code] == 0 {
		return ""
	}
	return e.Code
}

// retryAfter reads the header's two forms, whole seconds and an HTTP date.
func retryAfter(v string, now time.Time) time.Duration {
	var d time.Duration
	if n, err := strconv.ParseUint(v, 10, 32); err == nil {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(v); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// mediaType returns the content type without its parameters, "" when there is
// none and "?" when it cannot be parsed.
func mediaType(h http.Header) string {
	v := h.Get("Content-Type")
	if v == "" {
		return ""
	}
	t, _, err := mime.ParseMediaType(v)
	if err != nil {
		return "?"
	}
	return t
}

// cause reduces an error of the transport to kinds that are known to quote
// nothing of what was sent or received: a malformed answer is quoted by
// net/http, and a peer may send back what it was sent.
func cause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if e, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return e
	}
	if e, ok := errors.AsType[net.Error](err); ok {
		return e
	}
	for _, known := range []error{io.ErrUnexpectedEOF, io.EOF} {
		if errors.Is(err, known) {
			return known
		}
	}
	return errors.New("malformed HTTP")
}
