package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// progress shows how far a run is: a bar that is redrawn on a terminal, a line
// every few seconds elsewhere. It is used by one goroutine.
type progress struct {
	w        io.Writer
	terminal bool

	from, to     uint64
	start, shown time.Time
	drawn        bool
}

func newProgress(w io.Writer) *progress { return &progress{w: w, terminal: isTerminal(w)} }

// isTerminal takes every character device for one but the null device, which
// is what a program without a terminal is given.
func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	null, nullErr := os.Stat(os.DevNull)
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && (nullErr != nil || !os.SameFile(info, null))
}

// begin starts a bar over the sequences from, up to but not including to.
func (p *progress) begin(from, to uint64) {
	p.from, p.to, p.start, p.shown = from, to, time.Now(), time.Now()
}

// show says that everything before next is done.
func (p *progress) show(next uint64, what string) {
	period := 5 * time.Second
	if p.terminal {
		period = 200 * time.Millisecond
	}
	if now := time.Now(); now.Sub(p.shown) >= period && p.to > p.from {
		p.shown = now
		p.line(bar(next-p.from, p.to-p.from, now.Sub(p.start), what))
	}
}

// say shows a line that is replaced by the next one.
func (p *progress) say(what string) {
	if now := time.Now(); now.Sub(p.shown) >= time.Second {
		if !p.terminal && now.Sub(p.shown) < 5*time.Second {
			return
		}
		p.shown = now
		p.line(what)
	}
}

func (p *progress) line(text string) {
	if p.terminal {
		fmt.Fprintf(p.w, "\r\x1b[K%s", text)
		p.drawn = true
		return
	}
	fmt.Fprintln(p.w, text)
}

// end leaves an empty line to write on.
func (p *progress) end() {
	if p.drawn {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.drawn = false
	}
}

// bar draws what is done of total, and when the rest will be if it goes on
// like this.
func bar(done, total uint64, took time.Duration, what string) string {
	const width = 24
	share := float64(done) / float64(total)
	full := int(share * width)
	eta := "?"
	if done > 0 {
		eta = (time.Duration(float64(took) * (1 - share) / share)).Round(time.Second).String()
	}
	return fmt.Sprintf("[%s%s] %3.0f%%  %s, ETA %s", strings.Repeat("#", full), strings.Repeat(".", width-full), 100*share, what, eta)
}
