//go:build !unix

// Package faults needs what a Unix offers: signals that freeze a process.
package faults

import (
	"context"
	"fmt"
	"io"
)

// Main says that there is nothing for it here.
func Main(_ context.Context, _ []string, _, stderr io.Writer) int {
	fmt.Fprintln(stderr, "local faults: freezing and killing processes takes Linux, macOS or another Unix")
	return 2
}
