// Command prefetcher fetches Fingerprint events ahead of time. Its settings
// are environment variables; see prefetcher --help.
package main

import (
	"os"

	"github.com/idenza/fingerprint-prefetch/services/prefetcher"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

func main() { os.Exit(ops.Main(prefetcher.Program())) }
