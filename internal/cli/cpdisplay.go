package cli

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"

	"aaserver.io/aaserver/internal/files"
)

const (
	// redrawEvery is how often the progress is drawn on a terminal, printEvery
	// how often it is printed elsewhere.
	redrawEvery = 200 * time.Millisecond
	printEvery  = 10 * time.Second
	// rateWindow is the time over which the rate is that of the present.
	rateWindow = 5 * time.Second
	// maxProblems bounds how many problems are printed: a tree may have as many
	// as files.
	maxProblems = 100
)

// copyDisplay is what the user of cp sees: problems, and how far it is.
type copyDisplay struct {
	out      io.Writer
	terminal bool
	quiet    bool
	// failed is how many entries failed in the attempt that came to an end.
	failed int64

	stop    chan struct{}
	drawing sync.WaitGroup

	mu       sync.Mutex // protects what follows, and writes to out
	progress *files.Progress
	drawn    bool
	told     map[[sha256.Size]byte]bool // by hash: the texts are the target's
	printed  int
	samples  []sample
}

// sample is how much had been transferred at a time.
type sample struct {
	at    time.Time
	bytes int64
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

func newCopyDisplay(out io.Writer, o *cpOptions) *copyDisplay {
	d := &copyDisplay{out: out, terminal: isTerminal(out), quiet: o.quiet, told: make(map[[sha256.Size]byte]bool), stop: make(chan struct{})}
	if !o.progress {
		return d
	}
	every := printEvery
	if d.terminal {
		every = redrawEvery
	}
	d.drawing.Go(func() {
		ticker := time.NewTicker(every)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				d.draw(time.Now())
			case <-d.stop:
				return
			}
		}
	})
	return d
}

// begin is called for each attempt, whose progress it returns.
func (d *copyDisplay) begin() *files.Progress {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.progress = &files.Progress{}
	d.samples = nil
	return d.progress
}

// close ends the display, of a copy that came to its end if it is done.
func (d *copyDisplay) close(done bool) {
	close(d.stop)
	d.drawing.Wait()
	if d.drawn && done {
		d.draw(time.Now())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.drawn && d.terminal {
		fmt.Fprintln(d.out)
	}
	if more := len(d.told) - d.printed; more > 0 {
		fmt.Fprintf(d.out, "and %d more\n", more)
	}
}

func (d *copyDisplay) failures() int64 { return d.failed }

// problem prints a problem, once for all attempts.
func (d *copyDisplay) problem(p files.Problem) {
	text := fmt.Sprintf("%s: %s", printable(p.Path), printable(p.Text))
	if p.Warning {
		text = "warning: " + text
		if d.quiet {
			return
		}
	} else {
		text = "error: " + text
	}
	sum := sha256.Sum256([]byte(text))
	d.mu.Lock()
	defer d.mu.Unlock()
	// What isn't remembered would be printed again by another attempt; so it
	// isn't printed at all.
	if d.told[sum] || len(d.told) >= 100*maxProblems {
		return
	}
	d.told[sum] = true
	if d.printed++; d.printed > maxProblems {
		d.printed = maxProblems
		return
	}
	d.println(text)
}

// note tells the user something that isn't a problem yet.
func (d *copyDisplay) note(format string, args ...any) {
	if d.quiet {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.println(fmt.Sprintf(format, args...))
}

// println prints a line in the place of the progress. mu is held.
func (d *copyDisplay) println(text string) {
	if d.drawn && d.terminal {
		fmt.Fprint(d.out, "\r\x1b[K")
	}
	fmt.Fprintln(d.out, text)
}

func (d *copyDisplay) draw(now time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.progress
	if p == nil {
		return
	}
	bytes := p.Bytes.Load()
	d.samples = append(d.samples, sample{now, bytes - p.Present.Load()})
	for len(d.samples) > 2 && now.Sub(d.samples[1].at) >= rateWindow {
		d.samples = d.samples[1:]
	}
	line := progressLine(p, d.samples)
	d.drawn = true
	if !d.terminal {
		fmt.Fprintln(d.out, line)
		return
	}
	width := 80
	if f, ok := d.out.(*os.File); ok {
		if w, _, err := term.GetSize(int(f.Fd())); err == nil && w > 0 {
			width = w
		}
	}
	if runes := []rune(line); len(runes) >= width {
		line = string(runes[:width-1])
	}
	fmt.Fprint(d.out, "\r", line, "\x1b[K")
}

// progressLine describes how far a copy is, the most important first.
func progressLine(p *files.Progress, samples []sample) string {
	var b strings.Builder
	bytes, total := p.Bytes.Load(), p.TotalBytes.Load()
	if total > 0 {
		fmt.Fprintf(&b, "%3d%%  %s/%s", min(100, 100*bytes/total), byteSize(bytes), byteSize(total))
	} else {
		b.WriteString(byteSize(bytes))
	}
	rate := 0.0
	if first, last := samples[0], samples[len(samples)-1]; last.at.After(first.at) {
		rate = float64(last.bytes-first.bytes) / last.at.Sub(first.at).Seconds()
	}
	fmt.Fprintf(&b, "  %s/s", byteSize(int64(rate)))
	if rest := total - bytes; total > 0 && rest > 0 && rate > 0 {
		if eta := time.Duration(float64(rest) / rate * float64(time.Second)).Round(time.Second); eta < 1000*time.Hour {
			fmt.Fprintf(&b, "  ETA %v", eta)
		}
	}
	if files, all := p.Files.Load(), p.TotalFiles.Load(); all > 1 {
		fmt.Fprintf(&b, "  %d/%d files", files, all)
	}
	if current, _ := p.Current.Load().(string); current != "" {
		b.WriteString("  " + printable(current))
	}
	return b.String()
}

// byteSize writes a number of bytes for people.
func byteSize(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	value, unit := float64(n), 0
	for value >= 1024 && unit < 5 {
		value /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, " KMGTP"[unit])
}

// printable shows a text that somebody else has made: nothing in it reaches the
// terminal as a command.
func printable(text string) string {
	var b strings.Builder
	for i, r := range text {
		switch {
		case r == utf8.RuneError && !strings.HasPrefix(text[i:], string(utf8.RuneError)):
			fmt.Fprintf(&b, `\x%02x`, text[i])
		case r == '\n':
			b.WriteString(`\n`)
		case unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}
