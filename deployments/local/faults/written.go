//go:build unix

package faults

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/idenza/fingerprint-prefetch/streams/record"
)

// written judges every write of a record in its order, from Redis' append-only
// file. The watch looks now and then; this misses nothing.
type written struct {
	// First is whose record was written first since Redis last lost its data,
	// by request id.
	First map[string]int64
	Found []finding
	Count int

	epoch int
	seen  map[string]*seen
}

// readWritten reads the append-only files in dir, which are complete as long
// as Redis never rewrites them.
func readWritten(dir string) (*written, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.incr.aof"))
	if err != nil {
		return nil, err //nolint:wrapcheck // names the pattern
	}
	if len(files) != 1 {
		return nil, fmt.Errorf("%d append-only files in %s, want 1: Redis has rewritten it, and the order of the writes is lost", len(files), dir)
	}
	f, err := os.Open(files[0])
	if err != nil {
		return nil, err //nolint:wrapcheck // names the file
	}
	defer f.Close()
	w := &written{First: map[string]int64{}, seen: map[string]*seen{}}
	if err := commands(f, w.command); err != nil {
		return nil, fmt.Errorf("read %s: %w", files[0], err)
	}
	return w, nil
}

func (w *written) command(args [][]byte) {
	switch name := bytes.ToLower(args[0]); {
	case bytes.HasPrefix(name, []byte("flush")): // FLUSHALL, FLUSHDB
		w.epoch++
		clear(w.First)
	case len(args) < 2 || !bytes.HasPrefix(args[1], []byte(record.KeyPrefix)):
	case string(name) == "set" && len(args) > 2:
		w.set(string(args[1][len(record.KeyPrefix):]), args[2])
	default: // a record is written whole, and nobody removes one
		id := string(args[1][len(record.KeyPrefix):])
		w.Found = append(w.Found, finding{unexpected, id, fmt.Sprintf("its record met with the command %q", name)})
	}
}

func (w *written) set(id string, value []byte) {
	w.Count++
	s := w.seen[id]
	if s == nil {
		s = &seen{id: id}
		w.seen[id] = s
	}
	if c, text := s.next(w.epoch, string(value[:min(len(value), headBytes)])); c != "" {
		w.Found = append(w.Found, finding{c, id, "written: " + text})
	}
	if w.First[id] == 0 {
		w.First[id] = s.head.Subscriber
	}
}

// commands calls f with each command of an append-only file; args are valid
// until it returns. A last command cut short, by a kill, is left out.
func commands(r io.Reader, f func(args [][]byte)) error {
	in := bufio.NewReaderSize(r, 1<<20)
	number := func(mark byte) (int, error) {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return 0, err //nolint:wrapcheck // EOF is meant
		}
		if len(line) < 4 || line[0] != mark {
			return 0, fmt.Errorf("a line that does not start with %q", mark)
		}
		return strconv.Atoi(string(line[1 : len(line)-2]))
	}
	var args [][]byte
	one := func() error {
		n, err := number('*')
		if err != nil {
			return err
		}
		args = slices.Grow(args[:0], n)[:n]
		for i := range args {
			size, err := number('$')
			if err != nil {
				return err
			}
			args[i] = slices.Grow(args[i][:0], size+2)[:size+2]
			if _, err := io.ReadFull(in, args[i]); err != nil {
				return err //nolint:wrapcheck // EOF is meant
			}
			args[i] = args[i][:size]
		}
		return nil
	}
	for {
		switch err := one(); {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return err
		case len(args) > 0:
			f(args)
		}
	}
}
