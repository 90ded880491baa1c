package ingest

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
)

const keygenUsage = `Usage: ingest keygen --id ID --subscriber 12[,13] [--json]

Makes an API key and prints it, this once, with its entry for the keys file.

  --id ID            name of the key in logs and metrics: 1 to 32 of a-z, 0-9, -
  --subscriber LIST  subscriber ids the key may send for, or '*' for all
  --json             print {"key":…,"entry":{…}}
`

// Keygen is the command `ingest keygen`: args are what follows, random is
// where secrets come from, crypto/rand.Reader outside of tests. It returns the
// exit code: 2 for wrong usage.
func Keygen(args []string, random io.Reader, stdout, stderr io.Writer) int {
	var (
		id, list string
		asJSON   bool
	)
	flags := flag.NewFlagSet("keygen", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // said below, with our usage
	flags.StringVar(&id, "id", "", "")
	flags.StringVar(&list, "subscriber", "", "")
	flags.BoolVar(&asJSON, "json", false, "")

	usageFault := func(format string, args ...any) int {
		fmt.Fprintf(stderr, "ingest keygen: "+format+"\n\n%s", append(args, keygenUsage)...)
		return 2
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, keygenUsage)
		return 0
	case err != nil:
		return usageFault("%v", err)
	case flags.NArg() > 0:
		return usageFault("unexpected argument %q", flags.Arg(0))
	case !validKeyID(id):
		return usageFault("--id must be 1 to %d characters of a-z, 0-9 and -", maxKeyID)
	case list == "":
		return usageFault("--subscriber is missing")
	}
	subscribers, err := ParseSubscribers(list)
	if err != nil {
		return usageFault("--subscriber: %v", err)
	}

	key, entry, err := NewKey(id, subscribers, random)
	if err != nil {
		fmt.Fprintln(stderr, "ingest keygen:", err)
		return 1
	}
	out, err := renderKey(key, entry, asJSON)
	if err == nil {
		_, err = stdout.Write(out)
	}
	if err != nil {
		fmt.Fprintln(stderr, "ingest keygen:", err)
		return 1
	}
	return 0
}

func renderKey(key string, entry KeyEntry, asJSON bool) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	if asJSON {
		err := enc.Encode(struct {
			Key   string   `json:"key"`
			Entry KeyEntry `json:"entry"`
		}{key, entry})
		return b.Bytes(), err
	}
	fmt.Fprintf(&b, "Key (hand it to the client; it is not shown again):\n\n  %s\n\n", key)
	fmt.Fprint(&b, "Entry for the list in INGEST_API_KEYS_FILE (nothing secret):\n\n  ")
	err := enc.Encode(entry)
	return b.Bytes(), err
}
