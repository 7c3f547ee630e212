package cli

import (
	"bytes"
	"container/heap"
	"encoding/base64"
	"encoding/json"
	"errors"
	"hash/fnv"
	"io"
	"sync"
	"time"
	"unicode/utf8"

	"k8s.io/utils/clock"
)

const (
	// lineBuffer is how long a line may be to be held until it is complete. A
	// longer one goes on in pieces.
	lineBuffer = 64 << 10
	// mergeWindow is how long a line waits for earlier ones of other sources.
	mergeWindow = 200 * time.Millisecond
	// mergePatience is how long the past of all sources waits for one that says
	// nothing.
	mergePatience = 5 * time.Second
	// mergeBudget is how many bytes of lines are held, besides one of each
	// source.
	mergeBudget = 4 << 20
	// writeSize is how much is written at once, about.
	writeSize = 64 << 10
)

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

// lineReader reads lines. Its buffer is as large as what is in it: most of many
// followed logs are quiet.
type lineReader struct {
	r   io.Reader
	max int
	// buf[from:] has been read, and has no newline before seen.
	buf        []byte
	from, seen int
	err        error
}

const smallBuffer = 4 << 10

// next returns a line without its newline, or a piece of one that is longer
// than max. A piece ends between characters. With the reader's error comes what
// follows the last newline. The bytes are valid until the next call.
func (l *lineReader) next() (piece []byte, ended bool, err error) {
	for {
		if i := bytes.IndexByte(l.buf[l.seen:], '\n'); i >= 0 {
			piece = l.buf[l.from : l.seen+i]
			l.from = l.seen + i + 1
			l.seen = l.from
			return piece, true, nil
		}
		l.seen = len(l.buf)
		if len(l.buf)-l.from >= l.max {
			piece = l.buf[l.from : l.from+l.max]
			piece = piece[:len(piece)-incomplete(piece)]
			l.from += len(piece)
			return piece, false, nil
		}
		if l.err != nil {
			piece = l.buf[l.from:]
			l.from = len(l.buf)
			return piece, false, l.err
		}
		l.fill()
	}
}

// fill reads once.
func (l *lineReader) fill() {
	kept := len(l.buf) - l.from
	switch {
	case kept == 0 && cap(l.buf) != smallBuffer:
		// The next line may be long in coming.
		l.buf = make([]byte, 0, smallBuffer)
	case kept == cap(l.buf):
		l.buf = append(make([]byte, 0, min(2*kept, l.max+smallBuffer)), l.buf[l.from:]...)
	default:
		l.buf = l.buf[:copy(l.buf[:kept], l.buf[l.from:])]
	}
	l.from, l.seen = 0, kept
	n, err := l.r.Read(l.buf[kept:cap(l.buf)])
	l.buf, l.err = l.buf[:kept+n], err
	if n == cap(l.buf)-kept && cap(l.buf) < l.max {
		// There is more: read in larger pieces.
		l.buf = append(make([]byte, 0, min(4*cap(l.buf), l.max)), l.buf...)
	}
}

// incomplete returns how many bytes at the end are the beginning of a character.
func incomplete(text []byte) int {
	for i := 1; i < utf8.UTFMax && i < len(text); i++ {
		if c := text[len(text)-i]; utf8.RuneStart(c) {
			if !utf8.FullRune(text[len(text)-i:]) {
				return i
			}
			break
		}
	}
	return 0
}

// origin is where lines come from, as it is shown.
type origin struct {
	target, instance string
	// limit is nil if all is printed.
	limit *byteLimit
}

func (o *origin) String() string { return ref{o.target, o.instance}.String() }

// byteLimit is how much is printed of a target.
type byteLimit struct {
	left    int64 // belongs to the merger
	reached func()
}

// line is a line, or a piece of one.
type line struct {
	from *origin
	at   time.Time
	// raw is the text, after its time and a space where it has them, which
	// are so many bytes.
	raw   []byte
	stamp int
	// begins and ends say that the line does with this piece.
	begins, ends bool
	// past is set for what was there when the command began.
	past bool
}

// lineStyle is how lines are printed.
type lineStyle struct {
	prefix, timestamps, color bool
	// json prints an object for each line.
	json              bool
	namespace, stream string
}

// merger writes the lines of many sources to one writer, in the order of their
// times as far as it knows it:
//
//	         nothing yet          ┌ past ─── waited for ──────────┐
//	source ───────────────▶ state ┤ live ─── waited for a window ─┼──▶ by time ──▶ writer
//	                              └ away ─── not waited for ──────┘
//
// A line is written when no source can have an earlier one any more: each has a
// line here that is later, or has had the window's time to bring one. What was
// there when the command began waits until every source has read it. What is
// held is bounded: when it is too much, those who bring more wait, and the first
// lines go out early.
type merger struct {
	w     io.Writer
	style lineStyle
	clock clock.Clock
	// window and patience are those of the constants; without a patience the
	// past is waited for however long that takes.
	window, patience time.Duration
	// failed is called when the output can't be written any more.
	failed func(error)

	wake chan struct{}
	done chan struct{} // closed when the writer has ended

	// mu protects what follows, and the sources.
	mu sync.Mutex
	// waiting are the sources of which somebody waits in push.
	waiting map[*lineSource]bool
	sources map[*lineSource]bool
	ids     int
	heads   byHead // those with lines
	// waited counts the sources without lines, by their states.
	waited [3]int
	held   int
	// Lines up to passed have had the window's time, or have to make way for one
	// that is held and has had it. Those up to a deadline's will have had it then.
	deadlines []deadline
	passed    time.Time
	// heard is when a source was last heard of.
	heard time.Time
	// open is the source of which a line was begun and not yet ended, since
	// when.
	open      *lineSource
	openSince time.Time
	out       []byte
	closing   bool // all that is held goes out
	err       error
}

type deadline struct{ due, upTo time.Time }

type sourceState int

const (
	sourcePast sourceState = iota
	sourceLive
	sourceAway
)

// lineSource is a stream of lines whose times increase.
type lineSource struct {
	m     *merger
	id    int // orders lines of the same time
	state sourceState
	lines []line
	room  sync.Cond // on mu: less is held, or the merger has ended
	// begun says that the last line that was pushed goes on.
	begun bool
	last  line
}

func newMerger(w io.Writer, style lineStyle) *merger {
	m := &merger{
		w:        outputWriter{w},
		style:    style,
		clock:    clock.RealClock{},
		window:   mergeWindow,
		patience: mergePatience,
		failed:   func(error) {},
		wake:     make(chan struct{}, 1),
		done:     make(chan struct{}),
		sources:  map[*lineSource]bool{},
		waiting:  map[*lineSource]bool{},
	}
	return m
}

// source adds a source.
func (m *merger) source(state sourceState) *lineSource {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.ids++
	s := &lineSource{m: m, id: m.ids, state: state}
	s.room.L = &m.mu
	m.sources[s] = true
	m.waited[state]++
	m.heard = m.clock.Now()
	return s
}

var errMergerEnded = errors.New("nothing is printed any more")

// push adds a line or a piece. It waits while too much is held, unless the
// source has nothing here: others may wait for it.
func (s *lineSource) push(l line) error {
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(s.lines) > 0 && m.held >= mergeBudget && m.err == nil && !m.closing {
		m.waiting[s] = true
		s.room.Wait()
		delete(m.waiting, s)
	}
	if m.err != nil {
		return m.err
	}
	if m.closing {
		return errMergerEnded
	}
	s.add(l)
	return nil
}

func (s *lineSource) add(l line) {
	m := s.m
	now := m.clock.Now()
	m.heard = now
	l.past = s.state == sourcePast
	if n := len(m.deadlines); n > 0 && now.Add(m.window).Sub(m.deadlines[n-1].due) < m.window/16 {
		if d := &m.deadlines[n-1]; l.at.After(d.upTo) {
			d.upTo = l.at
		}
	} else {
		m.deadlines = append(m.deadlines, deadline{now.Add(m.window), l.at})
	}
	s.begun, s.last = !l.ends, l
	s.lines = append(s.lines, l)
	m.held += len(l.raw)
	if len(s.lines) == 1 {
		m.waited[s.state]--
		heap.Push(&m.heads, s)
	}
	m.tell()
}

// set changes the state.
func (s *lineSource) set(state sourceState) {
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.sources[s] {
		return
	}
	m.heard = m.clock.Now()
	s.become(state)
	m.tell()
}

func (s *lineSource) become(state sourceState) {
	if len(s.lines) == 0 {
		s.m.waited[s.state]--
		s.m.waited[state]++
	}
	s.state = state
}

// close removes the source once its lines are written. A line that was begun is
// ended.
func (s *lineSource) close() {
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.sources[s] {
		return
	}
	if s.begun {
		s.add(line{from: s.last.from, at: s.last.at, ends: true})
	}
	s.become(sourceAway)
	delete(m.sources, s)
	if len(s.lines) == 0 {
		m.waited[s.state]--
	}
	m.tell()
}

// tell lets the writer look again. mu is held.
func (m *merger) tell() {
	select {
	case m.wake <- struct{}{}:
	default: // it has been told
	}
}

// letIn wakes those who wait in push. mu is held.
func (m *merger) letIn() {
	for s := range m.waiting {
		s.room.Signal()
	}
}

// byHead is a heap of sources by the times of their first lines.
type byHead []*lineSource

func (h byHead) Len() int { return len(h) }
func (h byHead) Less(i, j int) bool {
	if a, b := h[i].lines[0].at, h[j].lines[0].at; !a.Equal(b) {
		return a.Before(b)
	}
	return h[i].id < h[j].id
}
func (h byHead) Swap(i, j int) { h[i], h[j] = h[j], h[i] }
func (h *byHead) Push(x any)   { *h = append(*h, x.(*lineSource)) }
func (h *byHead) Pop() any {
	last := len(*h) - 1
	x := (*h)[last]
	(*h)[last] = nil
	*h = (*h)[:last]
	return x
}

// run writes until finish or abort.
func (m *merger) run() {
	defer close(m.done)
	timer := m.clock.NewTimer(time.Hour)
	defer timer.Stop()
	var spare []byte
	for {
		m.mu.Lock()
		now := m.clock.Now()
		wait := time.Duration(-1)
		for len(m.out) < writeSize {
			if wait = m.next(now); wait != 0 {
				break
			}
		}
		out := m.out
		m.out = spare[:0]
		over := m.err != nil || m.closing && len(out) == 0
		if m.held < mergeBudget {
			m.letIn()
		}
		m.mu.Unlock()
		if over {
			return
		}
		spare = out
		if cap(spare) > 2*writeSize {
			spare = nil
		}
		if len(out) > 0 {
			if _, err := m.w.Write(out); err != nil {
				m.end(err)
				m.failed(err)
			}
			continue
		}
		timer.Stop()
		var due <-chan time.Time
		if wait > 0 {
			timer.Reset(wait)
			due = timer.C()
		}
		select {
		case <-m.wake:
		case <-due:
		}
	}
}

// next moves what may be written now to out, one line at a time, and returns 0.
// If there is nothing it returns how long to wait before looking again, or -1
// if only another line can change that. mu is held.
func (m *merger) next(now time.Time) time.Duration {
	if s := m.open; s != nil {
		switch {
		case len(s.lines) > 0:
			m.heard = now
			m.emit(s, now)
			return 0
		case len(m.heads) == 0 && !m.closing:
			// Nobody minds.
			return -1
		case !m.closing && now.Sub(m.openSince) < m.window:
			return m.window - now.Sub(m.openSince)
		}
		// The others have waited for long enough: the line goes on in one of
		// its own.
		m.out = append(m.out, '\n')
		m.open = nil
		return 0
	}
	if len(m.heads) == 0 {
		m.deadlines, m.passed = m.deadlines[:0], time.Time{}
		return -1
	}
	if m.waited[sourcePast] > 0 && !m.closing {
		if m.patience == 0 {
			return -1
		}
		if silent := now.Sub(m.heard); silent < m.patience {
			return m.patience - silent
		}
		for s := range m.sources {
			if s.state == sourcePast && len(s.lines) == 0 {
				s.become(sourceLive)
			}
		}
	}
	due := 0
	for ; due < len(m.deadlines) && !m.deadlines[due].due.After(now); due++ {
		if upTo := m.deadlines[due].upTo; upTo.After(m.passed) {
			m.passed = upTo
		}
	}
	if due > 0 {
		m.deadlines = append(m.deadlines[:0], m.deadlines[due:]...)
	}
	first := m.heads[0]
	if first.lines[0].at.After(m.passed) {
		// Nothing that is held has had its time. One line of a clock that is
		// ahead doesn't keep those to come from being put into order.
		m.passed = time.Time{}
	}
	if head := &first.lines[0]; len(m.deadlines) == 0 || m.waited[sourceLive] == 0 || head.past || !head.at.After(m.passed) || m.held >= mergeBudget || m.closing {
		m.emit(first, now)
		return 0
	}
	return m.deadlines[0].due.Sub(now)
}

// emit moves the first line of a source to out.
func (m *merger) emit(s *lineSource, now time.Time) {
	l := s.lines[0]
	s.lines[0] = line{}
	s.lines = s.lines[1:]
	m.held -= len(l.raw)
	index := 0
	for index = range m.heads {
		if m.heads[index] == s {
			break
		}
	}
	if len(s.lines) > 0 {
		heap.Fix(&m.heads, index)
	} else {
		s.lines = nil
		s.room.Signal() // others may wait for it
		heap.Remove(&m.heads, index)
		if m.sources[s] {
			m.waited[s.state]++
		}
	}

	text := l.raw[l.stamp:]
	if m.style.timestamps && !m.style.json {
		text = l.raw
	}
	start := len(m.out)
	defer func() { m.limit(l.from.limit, start) }()
	if m.style.json {
		m.out = m.style.appendJSON(m.out, l, text)
		return
	}
	if m.open != s {
		if !l.begins && len(l.raw) == 0 {
			return // it has been ended
		}
		if m.style.prefix {
			m.out = m.style.appendPrefix(m.out, l.from)
		}
	}
	m.out = append(m.out, text...)
	if l.ends {
		m.out = append(m.out, '\n')
		m.open = nil
	} else {
		m.open, m.openSince = s, now
	}
}

// limit cuts off what goes beyond the limit of what was put into out.
func (m *merger) limit(limit *byteLimit, start int) {
	if limit == nil {
		return
	}
	n := int64(len(m.out) - start)
	if n >= limit.left {
		limit.reached()
	}
	if n > limit.left {
		m.open = nil
		m.out = m.out[:start+int(limit.left)]
		if limit.left > 0 {
			m.out[len(m.out)-1] = '\n'
		}
		if m.style.json {
			m.out = m.out[:start] // half an object is of no use
		}
		n = limit.left
	}
	limit.left -= n
}

// end makes everything fail from now on.
func (m *merger) end(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = err
	}
	m.letIn()
	m.tell()
}

// finish writes what is held, and waits until it is written.
func (m *merger) finish() error {
	m.mu.Lock()
	m.closing = true
	m.letIn()
	m.tell()
	m.mu.Unlock()
	<-m.done
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// abortGrace is how long a write may take that is under way when the command is
// interrupted.
const abortGrace = 250 * time.Millisecond

// abort drops what is held. A write to a reader that takes nothing can't be
// ended: the end of the process does that, soon.
func (m *merger) abort() {
	m.end(errMergerEnded)
	timer := time.NewTimer(abortGrace)
	defer timer.Stop()
	select {
	case <-m.done:
	case <-timer.C:
	}
}

// colors are those that can be read on dark and on light backgrounds.
var colors = []string{"36", "32", "33", "35", "34", "31", "96", "92", "93", "95", "94", "91"}

// appendPrefix says whose line it is. An instance keeps its colour.
func (s *lineStyle) appendPrefix(b []byte, from *origin) []byte {
	if s.color {
		hash := fnv.New32a()
		_, _ = io.WriteString(hash, from.target+"/"+from.instance)
		b = append(b, "\x1b["...)
		b = append(b, colors[hash.Sum32()%uint32(len(colors))]...)
		b = append(b, 'm')
	}
	b = append(b, '[')
	b = append(b, from.target...)
	if from.instance != "" {
		b = append(b, '/')
		b = append(b, from.instance...)
	}
	b = append(b, ']')
	if s.color {
		b = append(b, "\x1b[0m"...)
	}
	return append(b, ' ')
}

// logObject is a line of -o json.
type logObject struct {
	Time      *time.Time `json:"time,omitempty"`
	Namespace string     `json:"namespace"`
	Target    string     `json:"target"`
	Instance  string     `json:"instance,omitempty"`
	Stream    string     `json:"stream,omitempty"`
	Line      string     `json:"line"`
	// Base64 is the line's bytes where they aren't UTF-8.
	Base64 string `json:"base64,omitempty"`
	// Partial says that the line goes on in the next object of its instance.
	Partial bool `json:"partial,omitempty"`
}

func (s *lineStyle) appendJSON(b []byte, l line, text []byte) []byte {
	object := logObject{
		Namespace: s.namespace,
		Target:    l.from.target,
		Instance:  l.from.instance,
		Stream:    s.stream,
		Line:      string(text),
		Partial:   !l.ends,
	}
	if !l.at.IsZero() {
		object.Time = &l.at
	}
	if !utf8.Valid(text) {
		object.Base64 = base64.StdEncoding.EncodeToString(text)
	}
	encoded, err := json.Marshal(object)
	if err != nil {
		// A year that RFC 3339 has no room for: the text is worth more.
		object.Time = nil
		encoded, _ = json.Marshal(object)
	}
	return append(append(b, encoded...), '\n')
}
