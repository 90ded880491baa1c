// Command ingest is the HTTP edge of the pipeline: it takes Fingerprint
// request ids from clients and stores them in the stream FP_INGEST.
//
//	ingest                                       serve, in the foreground
//	ingest keygen --id acme-1 --subscriber 12    make an API key
//	ingest --help                                list the settings
package main

import (
	"crypto/rand"
	"os"

	"github.com/idenza/fingerprint-prefetch/services/ingest"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "keygen" {
		os.Exit(ingest.Keygen(os.Args[2:], rand.Reader, os.Stdout, os.Stderr))
	}
	os.Exit(ops.Main(ingest.Program()))
}
