package fingerprintsim

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"
)

// Fault is one way to answer wrongly. Its parts compose: a delay before a
// status, a status with garbage. The zero Fault is a normal answer.
type Fault struct {
	// Status replaces 200. Unless Garbage or Body is set, the body is the
	// vendor's error object, or a gateway's page for a status the vendor
	// does not document.
	Status int
	// Code is the error code; empty means the usual one of the status.
	Code string
	// RetryAfter is sent as that header, in either of its forms.
	RetryAfter string
	// Delay comes before everything else.
	Delay time.Duration
	// Hang never answers; the call ends when the client gives up.
	Hang bool
	// Reset breaks the connection instead of answering.
	Reset bool
	// Garbage spoils the body.
	Garbage Garbage
	// Body is sent in place of everything the simulator would write.
	Body []byte
}

// Garbage is a way to spoil a body.
type Garbage string

const (
	// Truncated is half an event, correctly framed.
	Truncated Garbage = "truncated"
	// HTML is a gateway's page.
	HTML Garbage = "html"
	// Empty is no body.
	Empty Garbage = "empty"
	// OtherID is the event of another id.
	OtherID Garbage = "other_id"
	// Oversize is an event of more than a MiB.
	Oversize Garbage = "oversize"
	// Drip is the event at ten bytes a second.
	Drip Garbage = "drip"
	// Cut is an event whose connection breaks half way.
	Cut Garbage = "cut"
)

const page = "<html><head><title>%[1]d %[2]s</title></head><body><center><h1>%[1]d %[2]s</h1></center></body></html>\n"

// usual are the documented statuses with their code and message.
var usual = map[int]struct{ code, message string }{
	http.StatusBadRequest:          {"request_cannot_be_parsed", "invalid event_id"},
	http.StatusForbidden:           {"secret_api_key_not_found", "secret key is not found"},
	http.StatusNotFound:            {"event_not_found", "event id not found"},
	http.StatusTooManyRequests:     {"too_many_requests", "too many requests"},
	http.StatusInternalServerError: {"failed", "internal server error"},
	http.StatusServiceUnavailable:  {"service_unavailable", "service unavailable"},
	http.StatusGatewayTimeout:      {"failed", "gateway timeout"},
}

// status returns the status the client will see, 0 when it sees none.
func (f Fault) status() int {
	switch {
	case f.Hang, f.Reset:
		return 0
	case f.Status == 0:
		return http.StatusOK
	}
	return f.Status
}

func (f Fault) serve(w http.ResponseWriter, r *http.Request, id string, at time.Time) {
	switch {
	case f.Hang:
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // returning would answer 200
	case f.Reset:
		reset(w)
		return
	}
	contentType, body := f.render(id, at)
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if f.RetryAfter != "" {
		w.Header().Set("Retry-After", f.RetryAfter)
	}
	w.WriteHeader(f.status())
	switch f.Garbage {
	case Cut:
		_, _ = w.Write(body[:len(body)/2])
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	case Drip:
		drip(w, r, body)
	default:
		_, _ = w.Write(body)
	}
}

// render returns the content type and the body.
func (f Fault) render(id string, at time.Time) (string, []byte) {
	const jsonType, htmlType = "application/json", "text/html; charset=utf-8"
	body := Event(id, at)
	switch {
	case f.Body != nil:
		return jsonType, f.Body
	case f.Garbage == Truncated:
		return jsonType, body[:len(body)/2]
	case f.Garbage == HTML:
		return htmlType, fmt.Appendf(nil, page, f.status(), http.StatusText(f.status()))
	case f.Garbage == Empty:
		return jsonType, nil
	case f.Garbage == OtherID:
		return jsonType, Event(id+"x", at)
	case f.Garbage == Oversize:
		return jsonType, append(append(body[:len(body)-1], `,"padding":"`...), append(bytes.Repeat([]byte("x"), 1<<20), `"}`...)...)
	case f.Garbage != "", f.status() == http.StatusOK:
		return jsonType, body
	}
	u, documented := usual[f.Status]
	if f.Code != "" {
		u.code = f.Code
	} else if !documented {
		return htmlType, fmt.Appendf(nil, page, f.Status, http.StatusText(f.Status))
	}
	return jsonType, fmt.Appendf(nil, `{"error":{"code":%q,"message":%q}}`, u.code, u.message)
}

// reset closes the connection so that the client sees RST, not an end.
func reset(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil { // HTTP/2 and recorders
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

func drip(w http.ResponseWriter, r *http.Request, body []byte) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for i := range body {
		_, _ = w.Write(body[i : i+1])
		_ = http.NewResponseController(w).Flush()
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		}
	}
}

// UnmarshalJSON reads a fault from the form of the package comment's examples.
// Unknown members are refused: a mistyped fault would be a normal answer.
func (f *Fault) UnmarshalJSON(b []byte) error {
	var in struct {
		Status     int      `json:"status"`
		Code       string   `json:"code"`
		RetryAfter string   `json:"retry_after"`
		Delay      duration `json:"delay"`
		Hang       bool     `json:"hang"`
		Reset      bool     `json:"reset"`
		Garbage    Garbage  `json:"garbage"`
		Body       *string  `json:"body"`
	}
	if err := decode(bytes.NewReader(b), &in); err != nil {
		return err
	}
	if in.Status != 0 && (in.Status < 200 || in.Status > 599) {
		return errors.New("status outside 200 to 599")
	}
	switch in.Garbage {
	case "", Truncated, HTML, Empty, OtherID, Oversize, Drip, Cut:
	default:
		return errors.New("unknown garbage")
	}
	*f = Fault{
		Status: in.Status, Code: in.Code, RetryAfter: in.RetryAfter, Delay: time.Duration(in.Delay),
		Hang: in.Hang, Reset: in.Reset, Garbage: in.Garbage,
	}
	if in.Body != nil {
		f.Body = []byte(*in.Body)
	}
	return nil
}

// duration is written as in Go: "1.5s".
type duration time.Duration

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = duration(v)
	return err
}

// decode reads one strict JSON value.
func decode(r io.Reader, v any) error {
	d := json.NewDecoder(r)
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("more than one JSON value")
	}
	return nil
}
