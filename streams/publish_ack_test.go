package streams

import (
	"errors"
	"testing"
)

func TestParseAck(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		in   string
		want Ack
		err  error
	}{
		"plain":            {in: `{"stream":"FP_INGEST","seq":5}`, want: Ack{Sequence: 5}},
		"largest":          {in: `{"stream":"FP_INGEST","seq":18446744073709551615}`, want: Ack{Sequence: 1<<64 - 1}},
		"domain":           {in: `{"stream":"FP_INGEST","domain":"hub","seq":5}`, want: Ack{Sequence: 5}},
		"spaced":           {in: `{"stream": "FP_INGEST", "seq": 5}`, want: Ack{Sequence: 5}},
		"duplicate":        {in: `{"stream":"FP_INGEST","seq":5,"duplicate": true}`, want: Ack{Sequence: 5, Duplicate: true}},
		"unknown member":   {in: `{"stream":"FP_INGEST","seq":5,"val":"7"}`, want: Ack{Sequence: 5}},
		"stream full":      {in: `{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"FP_INGEST","seq":0}`, err: ErrStreamFull},
		"wrong stream":     {in: `{"error":{"code":400,"err_code":10060,"description":"expected stream does not match"},"stream":"FP_INGEST","seq":0}`, err: ErrRefused},
		"no sequence":      {in: `{"stream":"FP_INGEST"}`, err: ErrUnsure},
		"sequence 0":       {in: `{"stream":"FP_INGEST","seq":0}`, err: ErrUnsure},
		"no stream":        {in: `{"seq":5}`, err: ErrUnsure},
		"overflow":         {in: `{"stream":"FP_INGEST","seq":18446744073709551616}`, err: ErrUnsure},
		"negative":         {in: `{"stream":"FP_INGEST","seq":-5}`, err: ErrUnsure},
		"cut off":          {in: `{"stream":"FP_INGEST","seq":5`, err: ErrUnsure},
		"two values":       {in: `{"stream":"FP_INGEST","seq":5}}`, err: ErrUnsure},
		"+OK of old times": {in: `+OK {"stream":"FP_INGEST","seq":5}`, err: ErrUnsure},
		"empty":            {in: ``, err: ErrUnsure},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got, err := parseAck([]byte(c.in))
			if err != nil {
				err = classifyPublish(err)
			}
			if got != c.want || !errors.Is(err, c.err) {
				t.Errorf("got %+v, %v; want %+v, %v", got, err, c.want, c.err)
			}
		})
	}
}
