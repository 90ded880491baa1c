// Command k8s writes what the manifests derive from the code.
//
//	go run ./deployments/k8s users > deployments/k8s/components/nats/users.conf
//	go run ./deployments/k8s acl < passwords > users.acl    # lines of "user password"
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/idenza/fingerprint-prefetch/streams"
)

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
}

func run(args []string, stdin io.Reader, stdout io.Writer) error {
	switch strings.Join(args, " ") {
	case "users":
		fmt.Fprintln(stdout, "# Written by `go run ./deployments/k8s users`; do not edit.")
		return streams.WriteNATSUsers(stdout) //nolint:wrapcheck // says what it did
	case "acl":
		hashes := map[string][]string{}
		for in := bufio.NewScanner(stdin); in.Scan(); {
			user, password, ok := strings.Cut(in.Text(), " ")
			if !ok || password == "" {
				return errors.New("want lines of a user and a password")
			}
			sum := sha256.Sum256([]byte(password))
			hashes[user] = append(hashes[user], hex.EncodeToString(sum[:]))
		}
		return streams.WriteRedisACL(stdout, hashes) //nolint:wrapcheck // says what it did
	}
	return errors.New("usage: k8s users > users.conf, or k8s acl < passwords > users.acl, with lines \"user password\"")
}
