package cli

import (
	"bufio"
	"bytes"
	"errors"
	"hash/fnv"
	"io"
	"sync"
)

// lineBuffer is how long a line may be to be held until it is complete. While a
// longer one is written, other streams wait.
const lineBuffer = 64 << 10

// merger writes the lines of many streams to one writer, each line in one
// piece.
type merger struct {
	w     io.Writer
	color bool

	// mu is held while a line is written.
	mu sync.Mutex
}

// outputError is an error of the writer: no stream can go on.
type outputError struct{ err error }

func (e *outputError) Error() string { return e.err.Error() }
func (e *outputError) Unwrap() error { return e.err }

// outputWriter marks the errors of the writer, to tell them from the reader's.
type outputWriter struct{ w io.Writer }

func (o outputWriter) Write(p []byte) (int, error) {
	n, err := o.w.Write(p)
	if err != nil {
		err = &outputError{err}
	}
	return n, err
}

// edit decides what becomes of a line: what to write before it, and what to
// leave out of its beginning. It sees the whole line or, of one longer than
// lineBuffer, the beginning.
type edit func(line []byte) (prefix, rest []byte, keep bool)

// copy writes the lines of r until its end. A last line without a newline gets
// one, or is dropped if r didn't end in good order: its rest will be missed.
func (m *merger) copy(r io.Reader, edit edit) error {
	lines := bufio.NewReaderSize(r, lineBuffer)
	for {
		line, err := lines.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			if err := m.copyLong(lines, line, edit); err != nil {
				return end(err)
			}
			continue
		case err == nil || errors.Is(err, io.EOF) && len(line) > 0:
			if writeErr := m.write(line, edit); writeErr != nil {
				return writeErr
			}
		}
		if err != nil {
			return end(err)
		}
	}
}

func end(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func (m *merger) write(line []byte, edit edit) error {
	prefix, rest, keep := m.apply(edit, line)
	if !keep {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// One Write for each line, for the sake of readers of a pipe.
	whole := make([]byte, 0, len(prefix)+len(rest)+1)
	whole = append(append(whole, prefix...), rest...)
	if !bytes.HasSuffix(whole, []byte{'\n'}) {
		whole = append(whole, '\n')
	}
	_, err := m.w.Write(whole)
	return err
}

// copyLong writes a line of which the buffer holds the beginning.
func (m *merger) copyLong(lines *bufio.Reader, beginning []byte, edit edit) error {
	prefix, rest, keep := m.apply(edit, beginning)
	w := m.w
	if keep {
		m.mu.Lock()
		defer m.mu.Unlock()
	} else {
		w = io.Discard
	}
	if _, err := w.Write(append(prefix[:len(prefix):len(prefix)], rest...)); err != nil {
		return err
	}
	for {
		chunk, err := lines.ReadSlice('\n')
		if _, writeErr := w.Write(chunk); writeErr != nil {
			return writeErr
		}
		switch {
		case err == nil:
			return nil
		case errors.Is(err, bufio.ErrBufferFull):
		default:
			// What has been written can't be taken back: end the line.
			if _, writeErr := w.Write([]byte{'\n'}); writeErr != nil {
				return writeErr
			}
			return err
		}
	}
}

func (m *merger) apply(edit edit, line []byte) (prefix, rest []byte, keep bool) {
	if edit == nil {
		return nil, line, true
	}
	return edit(line)
}

// colors are those that can be read on dark and on light backgrounds.
var colors = []string{"36", "32", "33", "35", "34", "31", "96", "92", "93", "95", "94", "91"}

// paint returns the prefix of an instance's lines. An instance keeps its colour.
func (m *merger) paint(instance string) []byte {
	if !m.color {
		return []byte("[" + instance + "] ")
	}
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(instance))
	color := colors[hash.Sum32()%uint32(len(colors))]
	return []byte("\x1b[" + color + "m[" + instance + "]\x1b[0m ")
}

// repaint colours the prefixes that the server wrote.
func (m *merger) repaint(line []byte) (prefix, rest []byte, keep bool) {
	if !m.color || len(line) == 0 || line[0] != '[' {
		return nil, line, true
	}
	name, rest, ok := bytes.Cut(line[1:], []byte("] "))
	if !ok || bytes.IndexByte(name, '\n') >= 0 {
		return nil, line, true
	}
	return m.paint(string(name)), rest, true
}
