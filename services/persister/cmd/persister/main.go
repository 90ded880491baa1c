// Command persister writes records to Redis. Its settings are environment
// variables; see persister --help.
package main

import (
	"os"

	"github.com/idenza/fingerprint-prefetch/services/persister"
	"github.com/idenza/fingerprint-prefetch/streams/ops"
)

func main() { os.Exit(ops.Main(persister.Program())) }
