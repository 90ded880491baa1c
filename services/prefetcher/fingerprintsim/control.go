package fingerprintsim

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"time"
)

// handleControl adds the routes under /sim/.
func (s *Sim) handleControl() {
	s.mux.HandleFunc("GET /sim/stats", s.serveStats)
	s.mux.HandleFunc("PUT /sim/fault", func(w http.ResponseWriter, r *http.Request) {
		var f *Fault
		if read(w, r, &f) {
			s.SetFault(f)
		}
	})
	s.mux.HandleFunc("PUT /sim/fault/{id}", s.putFault)
	s.mux.HandleFunc("PUT /sim/rate", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Rate  float64 `json:"rate"`
			Burst int     `json:"burst"`
		}
		if read(w, r, &in) {
			s.SetRate(in.Rate, in.Burst)
		}
	})
	s.mux.HandleFunc("PUT /sim/key", func(w http.ResponseWriter, r *http.Request) {
		var key string
		if read(w, r, &key) {
			s.SetKey(key)
		}
	})
	s.mux.HandleFunc("PUT /sim/latency", func(w http.ResponseWriter, r *http.Request) {
		var in struct {
			Latency duration `json:"latency"`
			Jitter  duration `json:"jitter"`
		}
		if read(w, r, &in) {
			s.SetLatency(time.Duration(in.Latency), time.Duration(in.Jitter))
		}
	})
}

// serveStats writes {"calls":3,"ids":2,"by_status":{"200":2,"404":1}}.
func (s *Sim) serveStats(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	b, err := json.Marshal(map[string]any{"calls": s.calls, "ids": len(s.events), "by_status": s.statuses})
	s.mu.Unlock()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	fmt.Fprintf(w, "%s\n", b)
}

// putFault takes an array for Script, an object for Always, null for Clear.
func (s *Sim) putFault(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	var in json.RawMessage
	if !read(w, r, &in) {
		return
	}
	var script []Fault
	var always *Fault
	var err error
	if bytes.HasPrefix(in, []byte("[")) {
		err = json.Unmarshal(in, &script)
	} else {
		err = json.Unmarshal(in, &always)
	}
	switch {
	case err != nil:
		http.Error(w, err.Error(), http.StatusBadRequest)
	case script != nil:
		s.Script(id, script...)
	case always != nil:
		s.Always(id, *always)
	default:
		s.Clear(id)
	}
}

// read decodes the request's body into v, or answers 400 and returns false.
func read(w http.ResponseWriter, r *http.Request, v any) bool {
	if err := decode(http.MaxBytesReader(w, r.Body, 1<<20), v); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}
