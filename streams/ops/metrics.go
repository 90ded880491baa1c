package ops

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Histogram returns the options of every latency histogram: classic buckets at
// the given bounds, in seconds, for servers that know no others, and beside
// them native ones of at most a tenth of relative error and 160 in number,
// so that no value a stranger can cause makes a series grow without end.
func Histogram(name, help string, bounds ...float64) prometheus.HistogramOpts {
	return prometheus.HistogramOpts{
		Name: name, Help: help, Buckets: bounds,
		NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 160, NativeHistogramMinResetDuration: time.Hour,
	}
}
