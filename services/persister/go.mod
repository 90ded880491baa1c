module github.com/idenza/fingerprint-prefetch/services/persister

go 1.26.0

require github.com/idenza/fingerprint-prefetch/streams v0.0.0

require (
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/go-json-experiment/json v1.27.2 // indirect
	github.com/prometheus/client_golang v1.25.0 // indirect
	github.com/redis/go-redis/v9 v9.23.0 // indirect
	go.uber.org/atomic v1.12.0 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

replace github.com/idenza/fingerprint-prefetch/streams => ../../streams
