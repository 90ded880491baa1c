//go:build unix

package faults

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"
)

// spawner starts processes, all from one thread: where the kernel ends the
// children with their parent, it takes the end of the starting thread for it.
type spawner struct{ todo chan func() }

func newSpawner() *spawner {
	s := &spawner{todo: make(chan func())}
	go func() {
		runtime.LockOSThread()
		for f := range s.todo {
			f()
		}
	}()
	return s
}

func (s *spawner) start(cmd *exec.Cmd) error {
	done := make(chan error)
	s.todo <- func() { done <- cmd.Start() }
	return <-done
}

// Of the two versions in a run with --old-bin.
const newVersion, oldVersion = "new", "old"

// process is a program that can be killed, frozen, stopped and started again.
// Its output is appended to a file. It is safe for concurrent use, but one
// fault at a time should own it.
type process struct {
	name  string
	path  string
	args  []string
	env   []string
	logs  string // directory
	spawn *spawner
	// other is the path of the same program in another version, if there is
	// one, and ran says which versions have been started, as newVersion and
	// oldVersion in order.
	other   string
	old     bool // path is the earlier version
	ran     []string
	crashed func(name string, err error) // it ended and nobody had asked for it

	mu     sync.Mutex
	cmd    *exec.Cmd
	ended  chan struct{}
	result error
	asked  bool // to end
}

func (p *process) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd != nil {
		return nil // is running
	}
	out, err := os.OpenFile(filepath.Join(p.logs, p.name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	defer out.Close()
	cmd := exec.Command(p.path, p.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = p.env, out, out, sysProcAttr()
	if err := p.spawn.start(cmd); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.cmd, p.ended, p.asked, p.result = cmd, make(chan struct{}), false, nil
	version := newVersion
	if p.old {
		version = oldVersion
	}
	if len(p.ran) == 0 || p.ran[len(p.ran)-1] != version {
		p.ran = append(p.ran, version)
	}
	go func(ended chan struct{}) {
		err := cmd.Wait()
		p.mu.Lock()
		p.cmd, p.result = nil, err
		asked := p.asked
		p.mu.Unlock()
		if !asked {
			p.crashed(p.name, err)
		}
		close(ended)
	}(p.ended)
	return nil
}

// swap makes the next start one of the other version, if there is one.
func (p *process) swap() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.other != "" {
		p.path, p.other, p.old = p.other, p.path, !p.old
	}
}

// versions returns which versions have run, in order.
func (p *process) versions() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.ran)
}

// signal sends s; to a process that is not running it does nothing.
func (p *process) signal(s syscall.Signal) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cmd == nil {
		return
	}
	if s == syscall.SIGKILL || s == syscall.SIGTERM {
		p.asked = true
	}
	_ = p.cmd.Process.Signal(s) // it may have ended this moment
}

// kill ends the process as kill -9 does and waits for it.
func (p *process) kill() {
	p.signal(syscall.SIGKILL)
	p.wait(context.Background())
}

// terminate asks the process to stop and waits until it has. The error says
// that it did not, or not with exit code 0.
func (p *process) terminate(ctx context.Context) error {
	p.signal(syscall.SIGTERM)
	if !p.wait(ctx) {
		return fmt.Errorf("%s did not stop: %w", p.name, context.Cause(ctx))
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.result != nil {
		return fmt.Errorf("%s after SIGTERM: %w", p.name, p.result)
	}
	return nil
}

// wait returns true once the process has ended, false when ctx is done first.
func (p *process) wait(ctx context.Context) bool {
	p.mu.Lock()
	ended := p.ended
	p.mu.Unlock()
	if ended == nil {
		return true
	}
	select {
	case <-ended:
		return true
	case <-ctx.Done():
		return false
	}
}

// poll calls f until it returns nil or ctx is done; its error is f's last.
func poll(ctx context.Context, f func() error) error {
	tick := time.NewTicker(25 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// sleep returns false when ctx is done before d is over.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(max(d, 0))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
