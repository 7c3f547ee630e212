package process

import (
	"bytes"
	"context"
	"io"
	"iter"
	"math"
	"os"
	"slices"
	"sync"
	"time"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// header is the part of a record before its text.
type header struct {
	time    int64 // nanoseconds since 1970
	stderr  bool
	partial bool
}

// parseHeader reads a record's header. Collectors' and other hands' lines in
// our files, and what a power failure has left, are no records.
func parseHeader(b []byte) (h header, ok bool) {
	if len(b) < recordHeader || b[4] != '-' || b[7] != '-' || b[10] != 'T' || b[13] != ':' || b[16] != ':' || b[19] != '.' || b[29] != 'Z' {
		return h, false
	}
	valid := true
	number := func(from, to int) (n int64) {
		for _, c := range b[from:to] {
			valid = valid && c >= '0' && c <= '9'
			n = 10*n + int64(c-'0')
		}
		return n
	}
	h.time = (days(number(0, 4), number(5, 7), number(8, 10))*86400+number(11, 13)*3600+number(14, 16)*60+number(17, 19))*1e9 + number(20, 29)
	switch string(b[30:38]) {
	case " stdout ":
	case " stderr ":
		h.stderr = true
	default:
		return h, false
	}
	h.partial = b[38] == 'P'
	return h, valid && (b[38] == 'P' || b[38] == 'F') && b[39] == ' '
}

// days counts the days from 1970 to a date of the Gregorian calendar. Years
// begin in March here, so that a leap day comes last.
func days(year, month, day int64) int64 {
	if month <= 2 {
		year--
		month += 12
	}
	return 365*year + year/4 - year/100 + year/400 + (153*(month-3)+2)/5 + day - 1 - 719468
}

// parser reads the headers of successive records, most of which have the same
// second. The zero value is ready.
type parser struct {
	second [len("2006-01-02T15:04:05.")]byte
	base   int64 // that second in nanoseconds since 1970
}

// header does what parseHeader does.
func (p *parser) header(b []byte) (h header, ok bool) {
	if len(b) < recordHeader || [len(p.second)]byte(b) != p.second {
		h, ok = parseHeader(b)
		if ok {
			p.second, p.base = [len(p.second)]byte(b), h.time-h.time%1e9
		}
		return h, ok
	}
	var n int64
	for _, c := range b[20:29] {
		c -= '0'
		if c > 9 {
			return h, false
		}
		n = 10*n + int64(c)
	}
	h.time = p.base + n
	switch string(b[29:38]) {
	case "Z stdout ":
	case "Z stderr ":
		h.stderr = true
	default:
		return h, false
	}
	h.partial = b[38] == 'P'
	return h, (h.partial || b[38] == 'F') && b[39] == ' '
}

const (
	// readSize is how much of a file is read at once.
	readSize = 128 << 10
	// tailSize is how much the search for the last lines begins with: enough
	// for the beginning of a record to be in it.
	tailSize = 2 * maxRecord
	// maxBlocks and maxBlocksSize bound what the followers of a log share.
	maxBlocks     = 64
	maxBlocksSize = 512 << 10
)

// logBlock is a part of a log that several followers are about to read, or have
// read: whole records of one segment.
type logBlock struct {
	segment  *segment
	from, to int64
	data     []byte
	first    int64 // time of the first record, 0 if there is none
	share    driver.LogShare
}

// readBuffers are for those who have something to read: a follower that waits
// has none.
var readBuffers = sync.Pool{New: func() any { b := make([]byte, readSize); return &b }}

// logReader implements driver.LogReader.
type logReader struct {
	log    *instanceLog
	stream v1.LogStream
	follow bool
	// notBefore leaves out earlier lines.
	notBefore int64
	// end and endSize are where a reader that doesn't follow stops.
	end     *segment
	endSize int64
	newest  int64 // time of the last record when it was opened

	// before is the time that Before returns, in nanoseconds.
	before int64

	buf    *[]byte
	unread []byte // of buf
	run    int    // that unread is of
	parser parser

	segment *segment // held, unless lost or closed
	offset  int64    // of what follows unread in segment
	lost    bool     // protected by log.mu
	closed  bool
}

// read opens the log. It fails with NotFound if there is no such run.
func (l *instanceLog) read(opts driver.LogOptions) (*logReader, error) {
	l.mu.Lock()
	r := &logReader{log: l, stream: opts.Stream, follow: opts.Follow && !opts.Previous, end: l.tail, endSize: l.tail.size}
	if !opts.Since.IsZero() {
		r.notBefore = nanoseconds(opts.Since)
	}
	first, last := l.run, l.run
	switch {
	case !opts.After.IsZero():
		r.notBefore = max(r.notBefore, nanoseconds(opts.After)+1)
		first = 0
	case opts.Previous:
		first, last = l.run-1, l.run-1
	}
	// Without anything of these runs, it is what comes after the rest.
	start := l.tail
	found := false
	r.newest = l.newest
	r.before = l.newest
	for _, s := range l.segments {
		if s.run < first || s.run > last {
			continue
		}
		if !found {
			start, found = s, true
		}
		if s.first != 0 && r.before == l.newest {
			r.before = s.first - 1
		}
		r.end, r.endSize = s, s.size
	}
	r.before = max(r.before, r.notBefore-1)
	if opts.Previous && !found {
		l.mu.Unlock()
		return nil, errNoPrevious
	}
	if !found {
		r.offset = l.tail.size
	}
	if err := l.hold(start); err != nil {
		l.mu.Unlock()
		return nil, err
	}
	r.segment, r.run = start, start.run
	l.readers[r] = struct{}{}
	if r.follow {
		l.followers++
	}
	// Segments in between don't change any more.
	var span []*segment
	if found {
		for s := start; ; s = s.next {
			span = append(span, s)
			if s == r.end {
				break
			}
		}
	}
	l.mu.Unlock()

	if err := r.seek(span, opts.Tail); err != nil {
		r.Close()
		return nil, err
	}
	return r, nil
}

// place is a position in a log.
type place struct {
	segment *segment
	offset  int64
}

// seek goes to the first line that is wanted, or somewhere before it.
func (r *logReader) seek(span []*segment, tail *int64) error {
	if len(span) == 0 {
		return nil
	}
	start := place{span[0], 0}
	if r.notBefore > 0 {
		i := 0
		for j, s := range span {
			if r.firstTime(s) != 0 && r.firstTime(s) <= r.notBefore {
				i = j
			}
		}
		span = span[i:]
		offset, err := r.bisect(span[0])
		if err != nil {
			return err
		}
		start = place{span[0], offset}
	}
	if tail != nil {
		var err error
		if start, err = r.back(span, start, *tail); err != nil {
			return err
		}
	}
	l := r.log
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.lost {
		return errLost
	}
	l.move(r, start.segment)
	r.offset = start.offset
	return nil
}

// Before implements driver.LogCursor.
func (r *logReader) Before() time.Time { return time.Unix(0, r.before) }

// nanoseconds returns a time that can be compared with those of records.
func nanoseconds(t time.Time) int64 {
	switch {
	case t.Before(time.Unix(0, 0)):
		return 0
	case t.After(time.Unix(0, math.MaxInt64-1)):
		return math.MaxInt64 - 1
	}
	return t.UnixNano()
}

func (r *logReader) firstTime(s *segment) int64 {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	return s.first
}

// open returns a segment's file, and how much of it the reader may read.
func (r *logReader) open(s *segment) (io.ReaderAt, int64, error) {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.lost {
		return nil, 0, errLost
	}
	if s == r.end {
		// What comes later isn't searched, also if it will be followed.
		return s.file, r.endSize, nil
	}
	return s.file, s.size, nil
}

// move holds another, later segment instead of the reader's. mu is held.
func (l *instanceLog) move(r *logReader, to *segment) {
	if to == r.segment {
		return
	}
	// It can't fail: a later segment is held already.
	if err := l.hold(to); err == nil {
		l.release(r.segment)
		r.segment, r.run = to, to.run
	}
}

// drop takes away the reader's hold. mu is held.
func (l *instanceLog) drop(r *logReader) {
	if _, ok := l.readers[r]; !ok {
		return
	}
	delete(l.readers, r)
	l.release(r.segment)
	if r.follow {
		l.followers--
		l.forget()
	}
}

// bisect returns an offset at or before the first line that isn't too early,
// and near it.
func (r *logReader) bisect(s *segment) (int64, error) {
	file, size, err := r.open(s)
	if err != nil {
		return 0, err
	}
	buffer := readBuffers.Get().(*[]byte)
	defer readBuffers.Put(buffer)
	low, high := int64(0), size
	for high-low > readSize {
		middle := low + (high-low)/2
		block := (*buffer)[:4*maxRecord]
		n, err := file.ReadAt(block, middle)
		if err != nil && err != io.EOF {
			return 0, r.readError(err)
		}
		block = block[:n]
		// The next record after the middle. Lines that are none are passed.
		at, found := -1, header{}
		for i := bytes.IndexByte(block, '\n'); i >= 0; {
			if h, ok := parseHeader(block[i+1:]); ok {
				at, found = i+1, h
				break
			}
			next := bytes.IndexByte(block[i+1:], '\n')
			if next < 0 {
				break
			}
			i += 1 + next
		}
		if at >= 0 && found.time < r.notBefore {
			low = middle + int64(at)
		} else {
			high = middle
		}
	}
	return low, nil
}

// back goes back from the end by so many lines, but not beyond start.
func (r *logReader) back(span []*segment, start place, lines int64) (place, error) {
	buffer := readBuffers.Get().(*[]byte)
	defer readBuffers.Put(buffer)
	var seen int64
	// at is the earliest record so far that is wanted.
	step := int64(tailSize)
	before := r.newest
	defer func() { r.before = max(before, r.notBefore-1) }()
	_, size, err := r.open(span[len(span)-1])
	if err != nil {
		return place{}, err
	}
	at := place{span[len(span)-1], size}
	for i := len(span) - 1; i >= 0; i-- {
		s := span[i]
		file, end, err := r.open(s)
		if err != nil {
			return place{}, err
		}
		from := int64(0)
		if s == start.segment {
			from = start.offset
		}
		for end > from {
			begin := max(from, end-step)
			step = readSize
			block := (*buffer)[:end-begin]
			n, err := file.ReadAt(block, begin)
			if err != nil && (err != io.EOF || n < len(block)) {
				return place{}, r.readError(err)
			}
			// What comes before the block's first newline may be the rest of
			// a record that the next block has whole.
			limit := 0
			if begin > from {
				limit = bytes.IndexByte(block, '\n') + 1
				if limit == 0 || limit == len(block) {
					end = begin
					continue
				}
			}
			for len(block) > limit {
				record := bytes.LastIndexByte(block[:len(block)-1], '\n') + 1
				record = max(record, limit)
				h, ok := parseHeader(block[record:])
				if ok && r.wants(h) {
					if !h.partial || seen == 0 {
						// The end of one more line.
						if seen == lines {
							return at, nil
						}
						seen++
					}
					at = place{s, begin + int64(record)}
					before = h.time - 1
				}
				block = block[:record]
			}
			end = begin + int64(limit)
		}
	}
	return at, nil
}

// wants says whether a record is one of those asked for.
func (r *logReader) wants(h header) bool {
	if h.time < r.notBefore {
		return false
	}
	switch r.stream {
	case v1.LogStreamStdout:
		return !h.stderr
	case v1.LogStreamStderr:
		return h.stderr
	}
	return true
}

// Next implements driver.LogReader.
func (r *logReader) Next(ctx context.Context) (driver.LogLine, error) {
	for {
		i := bytes.IndexByte(r.unread, '\n')
		if i < 0 {
			if _, err := r.fill(ctx, false); err != nil {
				return driver.LogLine{}, err
			}
			continue
		}
		record := r.unread[:i]
		r.unread = r.unread[i+1:]
		if h, ok := r.parser.header(record); ok && r.wants(h) {
			return lineOf(h, record, r.run), nil
		}
	}
}

func lineOf(h header, record []byte, run int) driver.LogLine {
	line := driver.LogLine{Time: time.Unix(0, h.time), Stream: v1.LogStreamStdout, Data: record[recordHeader:], Partial: h.partial, Run: run}
	if h.stderr {
		line.Stream = v1.LogStreamStderr
	}
	return line
}

// NextBatch implements driver.LogBatcher.
func (r *logReader) NextBatch(ctx context.Context) (driver.LogBatch, error) {
	for {
		end := bytes.LastIndexByte(r.unread, '\n') + 1
		if end == 0 {
			block, err := r.fill(ctx, len(r.unread) == 0)
			if err != nil {
				return driver.LogBatch{}, err
			}
			if block == nil {
				continue
			}
			if block.first != 0 && block.first >= r.notBefore {
				if lines := r.lines(block.data); some(lines) {
					return driver.LogBatch{Lines: lines, Shared: &block.share}, nil
				}
			} else if lines := r.lines(block.data); some(lines) {
				return driver.LogBatch{Lines: lines}, nil
			}
			continue
		}
		lines := r.lines(r.unread[:end])
		r.unread = r.unread[end:]
		if some(lines) {
			return driver.LogBatch{Lines: lines}, nil
		}
	}
}

func some(lines iter.Seq[driver.LogLine]) bool {
	for range lines {
		return true
	}
	return false
}

// lines yields those lines of whole records that the reader wants.
func (r *logReader) lines(records []byte) iter.Seq[driver.LogLine] {
	run := r.run
	return func(yield func(driver.LogLine) bool) {
		for rest := records; ; {
			i := bytes.IndexByte(rest, '\n')
			if i < 0 {
				return
			}
			record := rest[:i]
			rest = rest[i+1:]
			if h, ok := r.parser.header(record); ok && r.wants(h) && !yield(lineOf(h, record, run)) {
				return
			}
		}
	}
}

// fill reads on, after waiting for more if need be. If the reader may share, it
// may get a block that others get too, instead of its own in unread.
func (r *logReader) fill(ctx context.Context, share bool) (*logBlock, error) {
	l := r.log
	share = share && r.follow
	for {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		l.mu.Lock()
		if r.lost {
			l.mu.Unlock()
			return nil, errLost
		}
		if r.closed {
			l.mu.Unlock()
			return nil, os.ErrClosed
		}
		s, size := r.segment, r.segment.size
		if !r.follow && s == r.end {
			size = r.endSize
		}
		if r.offset < size {
			file := s.file
			if !share || l.followers < 2 {
				l.mu.Unlock()
				return nil, r.load(file, size)
			}
			block, until := l.shared(s, r.offset)
			l.mu.Unlock()
			if block == nil && until == 0 {
				var err error
				if block, until, err = l.readShared(s, r.offset); err != nil {
					return nil, r.readError(err)
				}
			}
			if block == nil {
				return nil, r.load(file, min(size, until))
			}
			r.offset = block.to
			return block, nil
		}
		atEnd := s == r.end && !r.follow
		if s.next != nil && !atEnd {
			// A segment's last line is whole, unless it was torn.
			r.unread = r.unread[:0]
			l.move(r, s.next)
			r.offset = 0
			l.mu.Unlock()
			continue
		}
		switch {
		case atEnd || l.removed:
			l.mu.Unlock()
			return nil, io.EOF
		case l.closed != nil:
			defer l.mu.Unlock()
			return nil, l.closed
		case l.final && l.problem == nil:
			l.mu.Unlock()
			return nil, io.EOF
		}
		if l.more == nil {
			l.more = make(chan struct{})
		}
		more := l.more
		l.waiting++
		l.forget()
		l.mu.Unlock()
		if r.buf != nil && len(r.unread) == 0 {
			readBuffers.Put(r.buf)
			r.buf, r.unread = nil, nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			l.mu.Lock()
			if l.more == more {
				l.waiting-- // whoever is woken was uncounted by that
			}
			l.mu.Unlock()
		}
	}
}

// forget lets go of the blocks that nobody will read any more. mu is held.
func (l *instanceLog) forget() {
	if l.followers < 2 || l.waiting >= l.followers {
		l.blocks = nil
	}
}

// shared returns the block that begins at an offset. If there is none, until is
// where to read to for getting to a block's beginning or end, or 0 behind all
// blocks. mu is held.
func (l *instanceLog) shared(s *segment, offset int64) (block *logBlock, until int64) {
	for _, b := range slices.Backward(l.blocks) {
		switch {
		case b.segment.index > s.index:
			until = s.size // the reader is behind
		case b.segment.index < s.index || b.to <= offset:
			return nil, until
		case b.from == offset:
			return b, 0
		case b.from < offset:
			return nil, b.to
		default:
			until = b.from
		}
	}
	return nil, until
}

// readShared reads a block at the end of all others, unless somebody else just
// has.
func (l *instanceLog) readShared(s *segment, offset int64) (*logBlock, int64, error) {
	l.reading.Lock()
	defer l.reading.Unlock()
	l.mu.Lock()
	block, until := l.shared(s, offset)
	file, size := s.file, s.size
	l.mu.Unlock()
	switch {
	case file == nil: // the reader was too slow meanwhile
		return nil, 0, os.ErrClosed
	case block != nil || until != 0:
		return block, until, nil
	}
	data := make([]byte, min(size-offset, readSize))
	n, err := file.ReadAt(data, offset)
	if n == 0 && err != nil {
		return nil, 0, err
	}
	end := bytes.LastIndexByte(data[:n], '\n') + 1
	if end == 0 {
		return nil, size, nil // not a line of ours: it is passed over
	}
	block = &logBlock{segment: s, from: offset, to: offset + int64(end), data: data[:end]}
	for record := range bytes.Lines(block.data) {
		if h, ok := parseHeader(record); ok {
			block.first = h.time
			break
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.followers < 2 {
		return block, 0, nil
	}
	l.blocks = append(l.blocks, block)
	kept := 0
	for i, b := range slices.Backward(l.blocks) {
		if kept += len(b.data); kept > maxBlocksSize || len(l.blocks)-i > maxBlocks {
			l.blocks = slices.Delete(l.blocks, 0, i+1)
			break
		}
	}
	return block, 0, nil
}

// load reads the next part of the segment, up to limit at most.
func (r *logReader) load(file io.ReaderAt, limit int64) error {
	if r.buf == nil {
		r.buf = readBuffers.Get().(*[]byte)
	}
	buf := *r.buf
	kept := copy(buf, r.unread)
	if kept > maxRecord {
		kept = 0 // a line that isn't ours
	}
	want := min(int64(len(buf)-kept), limit-r.offset)
	n, err := file.ReadAt(buf[kept:kept+int(want)], r.offset)
	if n == 0 && err != nil {
		return r.readError(err)
	}
	r.offset += int64(n)
	r.unread = buf[:kept+n]
	return nil
}

// readError is what a failed read of a file means.
func (r *logReader) readError(err error) error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	if r.lost {
		return errLost
	}
	return driver.Errorf(driver.Internal, "reading the log: %w", err)
}

// Close implements driver.LogReader.
func (r *logReader) Close() error {
	r.log.mu.Lock()
	defer r.log.mu.Unlock()
	r.closed = true
	r.log.drop(r)
	if r.buf != nil {
		readBuffers.Put(r.buf)
		r.buf, r.unread = nil, nil
	}
	return nil
}

var (
	errNoPrevious = driver.Errorf(driver.NotFound, "there is no log of a previous run")
	errLost       = driver.Errorf(driver.Unavailable, "the client reads more slowly than the log is written: what it hasn't read has been deleted; ask again for what there is")
)
