package process

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"k8s.io/utils/clock"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// A record is one line of a log file, in the format of container runtimes, so
// that collectors know it:
//
//	2026-11-23T11:56:53.123456789Z stdout F the line, as it was written
//
// The time has always nine decimals, so that a record's text begins at a fixed
// offset and times compare as text. The tag is P if the line goes on in the
// next record of its stream, or if it is the last of its run and didn't end
// with a newline, else F.
const (
	recordTime   = driver.LogTime
	recordHeader = len(recordTime) + len(" stdout F ")
	maxRecord    = recordHeader + driver.MaxLogLine + 1
)

const (
	// retryFirst and retryMost bound the pauses between attempts to write when
	// the disk is full.
	retryFirst = 100 * time.Millisecond
	retryMost  = 5 * time.Second

	// maxLag is how many times the number of files a reader may fall behind
	// before it loses its hold on what was deleted.
	maxLag = 2

	// flushSize is how much is written at once, about.
	flushSize = 256 << 10

	// A line wakes all followers at once if the log was quiet. Lines that
	// follow each other closely wake them less often the more there are, so
	// that what one costs stays small beside what the lines cost: each has
	// wakePause, and no line is late by more than wakeMost. One follower
	// notices nothing of that.
	wakePause = 100 * time.Microsecond
	wakeMost  = 250 * time.Millisecond
)

// logFile is what a log needs of a file. Tests put in ones that fail.
type logFile interface {
	io.Writer
	io.ReaderAt
	io.Closer
}

// logSettings are what the logs of a driver have in common.
type logSettings struct {
	fileSize int64
	files    int
	clock    clock.Clock
	create   func(name string) (logFile, error)
}

// instanceLog is the log of one instance: files named <run>.<part>.log, one or
// more for each run, of which the last are kept.
//
// In memory it is a list of segments, one a file, oldest first. A reader holds
// the segment that it reads, and thereby all later ones, so that nothing is
// lost to it: a held segment's file is open, and can be read after it was
// deleted. A reader that falls too far behind loses its hold.
//
//	deleted, held     on disk
//	     ▼               ▼
//	 ┌───────┐       ┌───────┐      ┌───────┐
//	 │  4.0  │─next─▶│  4.1  │─────▶│  5.0  │◀─ last, held by the writer
//	 └───────┘       └───────┘      └───────┘
//	     ▲                              ▲
//	  reader                         follower
type instanceLog struct {
	settings *logSettings
	dir      string
	// onProblem is called, without locks, when problem changes.
	onProblem func()

	// writing is held by the one who writes, for as long as the disk is full,
	// too. It is taken before mu. The fields up to mu belong to its holder.
	writing chan struct{}
	current *segment // the one to write to, held; nil before the first
	size    int64    // current's, with what readers don't see yet
	out     []byte   // records not yet written
	whole   []mark   // the records in out
	last    int64    // time of the last record in nanoseconds
	stamp   driver.LogStamp

	// reading is held by the follower that reads a block for others too. It is
	// taken before mu.
	reading sync.Mutex

	mu       sync.Mutex // protects what follows, and all segments
	run      int        // the present or last run's number, 0 if there was none
	segments []*segment // those on disk
	tail     *segment   // the newest, or the list's empty beginning
	newest   int64      // time of the last record that readers see, 0 if there is none
	readers  map[*logReader]struct{}
	// followers are those of the readers that follow, waiting those that have
	// seen all there is. blocks are what they have read last, oldest first,
	// while there are several followers and not all of them wait.
	followers, waiting int
	blocks             []*logBlock
	more               chan struct{} // closed at the next change, nil if nobody waits
	woken              time.Time     // when more was last closed
	waker              *time.Timer   // closes more later, nil if it is to be closed at once
	final              bool          // no more will come, as far as is known
	removed            bool
	closed             error         // why nothing can be read or written any more
	stop               chan struct{} // closed with closed or removed set
	problem            error         // why the log can't be written
	changed            chan struct{} // closed and replaced when problem changes
}

// mark is where a record ends, and its time in nanoseconds.
type mark struct {
	end  int
	time int64
}

// segment is a file of a log.
type segment struct {
	run, part int
	index     int // counts all segments of the list
	path      string
	size      int64 // of whole records
	first     int64 // time of the first record in nanoseconds, 0 if there is none
	next      *segment

	holds int
	file  logFile // open while it is held
}

// openLog finds what is on disk. It makes nothing.
func openLog(settings *logSettings, dir string, onProblem func()) (*instanceLog, error) {
	l := &instanceLog{
		settings:  settings,
		dir:       dir,
		onProblem: onProblem,
		writing:   make(chan struct{}, 1),
		tail:      &segment{},
		readers:   make(map[*logReader]struct{}),
		stop:      make(chan struct{}),
		changed:   make(chan struct{}),
	}
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	var found []*segment
	for _, e := range entries {
		s := &segment{path: filepath.Join(dir, e.Name())}
		if n, err := fmt.Sscanf(e.Name(), "%d.%d.log", &s.run, &s.part); n == 2 && err == nil && e.Name() == segmentName(s.run, s.part) {
			found = append(found, s)
		}
	}
	slices.SortFunc(found, func(a, b *segment) int {
		if a.run != b.run {
			return a.run - b.run
		}
		return a.part - b.part
	})
	for _, s := range found {
		last, err := s.load()
		if err == errForeign {
			// No later run's file gets its name.
			l.run = max(l.run, s.run)
			continue
		}
		if err != nil {
			return nil, err
		}
		l.last = max(l.last, last)
		l.newest = l.last
		l.segments = append(l.segments, s)
		l.push(s)
	}
	return l, nil
}

func segmentName(run, part int) string { return fmt.Sprintf("%d.%d.log", run, part) }

// errForeign is about a file that is called like a log's but isn't one.
var errForeign = errors.New("not a log file")

// openSegment opens a log's file, and no other that its name leads to.
func openSegment(name string, flag int) (*os.File, os.FileInfo, error) {
	// A named pipe would have us wait for its other end.
	f, err := os.OpenFile(name, flag|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		if info, statErr := os.Lstat(name); statErr == nil && !info.Mode().IsRegular() {
			err = errForeign
		}
		return nil, nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errForeign
	}
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	return f, info, nil
}

// load reads a segment's first and last times. What is torn at its end, for
// the power failed while it was written, is cut off. A file without any record
// isn't ours to cut, nor to delete when it is too old: it is left alone.
func (s *segment) load() (last int64, err error) {
	f, info, err := openSegment(s.path, os.O_RDWR)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	s.size = info.Size()
	buf := make([]byte, min(s.size, int64(4*maxRecord)))
	n, err := f.ReadAt(buf[:min(len(buf), recordHeader)], 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	if h, ok := parseHeader(buf[:n]); ok {
		s.first, last = h.time, h.time
	}
	n, err = f.ReadAt(buf, s.size-int64(len(buf)))
	if err != nil && err != io.EOF {
		return 0, err
	}
	end := buf[:n]
	for len(end) > 0 {
		start := bytes.LastIndexByte(end[:len(end)-1], '\n') + 1
		if h, ok := parseHeader(end[start:]); ok && end[len(end)-1] == '\n' {
			last = h.time
			break
		}
		end = end[:start]
	}
	if len(end) == 0 {
		if s.first == 0 && s.size > 0 {
			return 0, errForeign
		}
		return last, nil
	}
	if cut := int64(n - len(end)); cut > 0 {
		s.size -= cut
		if err := f.Truncate(s.size); err != nil {
			return 0, err
		}
	}
	return last, nil
}

// push makes a segment the newest.
func (l *instanceLog) push(s *segment) {
	s.index = l.tail.index + 1
	l.tail.next = s
	if l.tail.holds > 0 {
		s.holds++
	}
	l.tail = s
	l.run = max(l.run, s.run)
}

// hold keeps a segment and those after it readable: a held segment holds the
// next one in turn.
func (l *instanceLog) hold(s *segment) error {
	if s.holds == 0 {
		if s.path != "" {
			file, _, err := openSegment(s.path, os.O_RDONLY)
			if err != nil {
				return err
			}
			s.file = file
		}
		if s.next != nil {
			if err := l.hold(s.next); err != nil {
				s.shut()
				return err
			}
		}
	}
	s.holds++
	return nil
}

// release undoes a hold.
func (l *instanceLog) release(s *segment) {
	for s != nil {
		s.holds--
		if s.holds > 0 {
			return
		}
		s.shut()
		s = s.next
	}
}

func (s *segment) shut() {
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// begin starts a run.
func (l *instanceLog) begin() (run int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.run++
	l.final = false
	return l.run
}

// end says whether the run that has ended was the last.
func (l *instanceLog) end(final bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.final = final
	l.wake()
}

// wake tells the waiting readers to look again. mu is held.
func (l *instanceLog) wake() {
	if l.waker != nil {
		l.waker.Stop()
		l.waker = nil
	}
	if l.more != nil {
		close(l.more)
		l.more, l.waiting = nil, 0
		l.woken = time.Now()
	}
}

// wakeSoon does so now, or a little later if it was done just now. mu is held.
func (l *instanceLog) wakeSoon() {
	if l.more == nil || l.waker != nil {
		return
	}
	pause := min(time.Duration(l.followers)*wakePause, wakeMost) - time.Since(l.woken)
	if pause <= 0 {
		l.wake()
		return
	}
	var waker *time.Timer
	waker = time.AfterFunc(pause, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.waker == waker {
			l.wake()
		}
	})
	l.waker = waker
}

var errLogClosed = errors.New("the log was closed")

// create begins the first file of a run, so that the run leaves a trace even
// if it writes nothing. If it can't, the first write will try again.
func (l *instanceLog) create(run int) {
	select {
	case l.writing <- struct{}{}:
	case <-l.stop:
		return
	}
	defer func() { <-l.writing }()
	l.setProblem(l.rotate(run))
}

// write appends the whole lines of data, and all of it if no more will follow.
// It returns how much it has taken. It blocks while the log can't be written,
// until the log is closed.
func (l *instanceLog) write(run int, stream v1.LogStream, data []byte, eof bool) (int, error) {
	select {
	case l.writing <- struct{}{}:
	case <-l.stop:
		return 0, errLogClosed
	}
	defer func() { <-l.writing }()
	now := l.settings.clock.Now().UnixNano()
	taken := 0
	for taken < len(data) {
		line, newline := data[taken:], 0
		partial := true
		if i := bytes.IndexByte(line[:min(len(line), driver.MaxLogLine+1)], '\n'); i >= 0 {
			line, newline, partial = line[:i], 1, false
		} else if len(line) > driver.MaxLogLine {
			line = line[:driver.MaxLogLine]
		} else if !eof {
			break
		}
		l.last = max(l.last+1, now)
		if err := l.add(run, stream, line, partial); err != nil {
			return taken, err
		}
		taken += len(line) + newline
	}
	return taken, l.flush()
}

// add puts a record into out.
func (l *instanceLog) add(run int, stream v1.LogStream, line []byte, partial bool) error {
	size := l.size + int64(len(l.out))
	fits := l.current != nil && l.current.run == run &&
		(size == 0 || size+int64(recordHeader+len(line)+1) <= l.settings.fileSize)
	if !fits {
		if err := l.flush(); err != nil {
			return err
		}
		if err := l.retry(func() error { return l.rotate(run) }); err != nil {
			return err
		}
	} else if len(l.out) > flushSize {
		if err := l.flush(); err != nil {
			return err
		}
	}
	l.out = l.stamp.Append(l.out, time.Unix(0, l.last))
	if stream == v1.LogStreamStderr {
		l.out = append(l.out, " stderr "...)
	} else {
		l.out = append(l.out, " stdout "...)
	}
	if partial {
		l.out = append(l.out, "P "...)
	} else {
		l.out = append(l.out, "F "...)
	}
	l.out = append(l.out, line...)
	l.out = append(l.out, '\n')
	l.whole = append(l.whole, mark{len(l.out), l.last})
	return nil
}

// flush writes out. Readers see a record when all of it is written.
func (l *instanceLog) flush() error {
	written, seen := 0, 0
	for len(l.whole) > 0 {
		err := l.retry(func() error {
			n, err := l.current.file.Write(l.out[written:])
			written += n
			l.size += int64(n)
			if err == nil && written < len(l.out) {
				err = io.ErrShortWrite
			}
			if n > 0 {
				l.publish(written, &seen)
			}
			return err
		})
		if err != nil {
			l.out, l.whole = l.out[:0], l.whole[:0]
			return err
		}
	}
	l.out = l.out[:0]
	return nil
}

// publish lets readers see the records that end within the written bytes of
// out; seen is where the last one ended that they have seen.
func (l *instanceLog) publish(written int, seen *int) {
	n := 0
	for n < len(l.whole) && l.whole[n].end <= written {
		n++
	}
	if n == 0 {
		return
	}
	end := l.whole[n-1].end
	l.mu.Lock()
	if l.current.first == 0 {
		l.current.first = l.whole[0].time
	}
	l.current.size += int64(end - *seen)
	l.newest = l.whole[n-1].time
	l.wakeSoon()
	l.mu.Unlock()
	*seen = end
	l.whole = l.whole[:copy(l.whole, l.whole[n:])]
}

// rotate begins a new file, and deletes the oldest that is one too many.
func (l *instanceLog) rotate(run int) error {
	s := &segment{run: run}
	if l.current != nil && l.current.run == run {
		s.part = l.current.part + 1
	}
	s.path = filepath.Join(l.dir, segmentName(s.run, s.part))
	file, err := l.settings.create(s.path)
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(l.dir, 0o750); err != nil {
			return err
		}
		file, err = l.settings.create(s.path)
	}
	if err != nil {
		return err
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	s.file = file
	s.holds = 1 // the writer's
	l.push(s)
	l.release(l.current)
	l.current, l.size = s, 0
	l.segments = append(l.segments, s)
	for len(l.segments) > l.settings.files {
		// What can't be deleted is left to the next driver on this directory.
		os.Remove(l.segments[0].path)
		l.segments[0] = nil
		l.segments = l.segments[1:]
	}
	for r := range l.readers {
		if s.index-r.segment.index > maxLag*l.settings.files {
			r.lost = true
			l.drop(r)
		}
	}
	l.wake()
	return nil
}

// retry repeats an attempt to write until it succeeds or the log is closed.
func (l *instanceLog) retry(attempt func() error) error {
	var timer clock.Timer
	for pause := retryFirst; ; pause = min(2*pause, retryMost) {
		select {
		case <-l.stop:
			return errLogClosed
		default:
		}
		err := attempt()
		l.setProblem(err)
		if err == nil {
			return nil
		}
		if timer == nil {
			timer = l.settings.clock.NewTimer(pause)
			defer timer.Stop()
		} else {
			timer.Reset(pause)
		}
		select {
		case <-timer.C():
		case <-l.stop:
			return errLogClosed
		}
	}
}

func (l *instanceLog) setProblem(err error) {
	l.mu.Lock()
	same := l.problem == nil && err == nil || l.problem != nil && err != nil && l.problem.Error() == err.Error()
	l.problem = err
	if !same {
		close(l.changed)
		l.changed = make(chan struct{})
		l.wake()
	}
	l.mu.Unlock()
	if !same {
		l.onProblem()
	}
}

// message tells a person why the log can't be written, "" if it can.
func (l *instanceLog) message() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.problem == nil {
		return ""
	}
	why := l.problem.Error()
	if errors.Is(l.problem, syscall.ENOSPC) {
		why = syscall.ENOSPC.Error() // which file doesn't matter
	}
	return fmt.Sprintf("its log can't be written: %s; output is held back until it can", why)
}

// blocked says whether the log can't be written. The channel is closed when
// that changes.
func (l *instanceLog) blocked() (bool, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.problem != nil, l.changed
}

// close lets go of all files. Readers get to the end of what there is, and
// then err, or io.EOF if it is nil, which says that the log was removed.
func (l *instanceLog) close(err error) {
	l.mu.Lock()
	select {
	case <-l.stop:
		l.mu.Unlock()
		return
	default:
	}
	l.closed = err
	l.removed = err == nil
	close(l.stop)
	l.wake()
	l.mu.Unlock()

	l.writing <- struct{}{} // for good
	l.mu.Lock()
	defer l.mu.Unlock()
	l.problem = nil
	l.release(l.current)
}

func createLogFile(name string) (logFile, error) {
	return os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o640)
}

// checkPathElement keeps what comes from the API inside of the log directory.
func checkPathElement(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
		return driver.Errorf(driver.Invalid, "%q can't be the name of a directory", name)
	}
	return nil
}
