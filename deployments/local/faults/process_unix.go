//go:build unix && !linux

package faults

import "syscall"

// sysProcAttr keeps a terminal's Ctrl-C from the children, which are stopped in
// order.
func sysProcAttr() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
