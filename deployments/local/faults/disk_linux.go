package faults

import (
	"errors"
	"fmt"
	"os"
	"syscall"
)

// fullNode is the NATS node whose streams lie on a disk that can be filled.
const fullNode = nodes - 1

// fullDisk is a small file system in memory.
type fullDisk struct {
	dir string
	err error // why there is none
}

const diskSize = "size=8g"

// mount puts it at dir.
func (d *fullDisk) mount(dir string) {
	switch err := syscall.Mount("tmpfs", dir, "tmpfs", 0, diskSize); {
	case err == nil:
		d.dir = dir
	case errors.Is(err, syscall.EPERM) || os.Geteuid() != 0:
		d.err = errors.New("mounting a small disk takes root")
	default:
		d.err = fmt.Errorf("mount a small disk: %w", err)
	}
}

// fill leaves no room: the size becomes what is in use.
func (d *fullDisk) fill() error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		return fmt.Errorf("look at %s: %w", d.dir, err)
	}
	used := (st.Blocks - st.Bfree) * uint64(st.Bsize)
	return d.remount(fmt.Sprintf("size=%d", used+64<<10))
}

// empty makes room again.
func (d *fullDisk) empty() error { return d.remount(diskSize) }

func (d *fullDisk) remount(options string) error {
	if err := syscall.Mount("tmpfs", d.dir, "tmpfs", syscall.MS_REMOUNT, options); err != nil {
		return fmt.Errorf("remount %s with %s: %w", d.dir, options, err)
	}
	return nil
}

// unmount forgets what it holds.
func (d *fullDisk) unmount() {
	if d.dir != "" {
		_ = syscall.Unmount(d.dir, syscall.MNT_DETACH) // else it stays until a restart
		d.dir = ""
	}
}
