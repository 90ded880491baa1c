package faults

import "syscall"

// sysProcAttr keeps a terminal's Ctrl-C from the children, which are stopped in
// order, and ends them with their parent.
func sysProcAttr() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
}
