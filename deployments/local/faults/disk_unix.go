//go:build unix && !linux

package faults

import "errors"

// fullNode is the NATS node whose streams lie on a disk that can be filled.
const fullNode = nodes - 1

// fullDisk needs a small file system in memory, which takes Linux.
type fullDisk struct{ err error }

func (d *fullDisk) mount(string) { d.err = errors.New("mounting a small disk takes Linux") }
func (d *fullDisk) fill() error  { return d.err }
func (d *fullDisk) empty() error { return d.err }
func (d *fullDisk) unmount()     {}
