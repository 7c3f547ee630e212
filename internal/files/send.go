package files

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"
)

// How the sending of a file went.
const (
	endWhole   = iota // the contents are those of the announcement
	endChanged        // the file changed while it was read
	endFailed         // it couldn't be read, or isn't wanted any more
)

// Send sends a file or a tree. It closes in when it ends or ctx does, which must
// unblock a Read; a Write to out must fail once the other side has gone.
func Send(ctx context.Context, in io.ReadCloser, out io.Writer, opts Options) (Result, error) {
	c := newConn(in, out)
	s := &sender{
		conn:     c,
		opts:     opts,
		reporter: reporter{conn: c, report: opts.Report},
		queue:    make(chan item, window),
		answers:  make(chan answer, maxAsked),
		root:     make(chan struct{}),
	}
	err := s.run(ctx, in)
	s.result.Failed = max(s.result.Failed, s.failures())
	return s.result, err
}

// maxAsked is how many files may be announced and not begun: those in the queue,
// the one that waits for a place in it, and the one whose turn it is.
const maxAsked = window + 2

type sender struct {
	*conn
	opts Options
	reporter
	source *source

	// queue holds what was announced and waits for its turn.
	queue chan item
	// answers has one for each file that was announced, in that order.
	answers chan answer
	// stop is the number of a file of which no more is wanted.
	stop atomic.Uint64
	// result is written by the goroutine that reads, and is read after it.
	result Result
	// root is closed when the receiver has said where the copy is.
	root chan struct{}
	// number is that of the last file or directory. The goroutine that walks
	// has it.
	number uint64
	parent openDir
	buf    []byte
}

// item is a file or, without a name, the end of a directory.
type item struct {
	number uint64
	dir    *sentDir
	name   string
	size   int64
	mtime  time.Time
}

// sentDir is a directory of the source.
type sentDir struct {
	number uint64
	path   string // in the source, with slashes
	depth  int
}

func (d *sentDir) join(name string) string { return path.Join(d.path, name) }

// answer is what a receiver wants of a file.
type answer struct {
	number uint64
	skip   bool
	have   int64
	hash   [sha256.Size]byte
}

// source is what is sent: a directory, or one file in a directory.
type source struct {
	root *os.Root
	file string // "" if it is the directory
	name string // what the copy is called, "" for the contents alone
}

func openSource(name string) (*source, error) {
	s := &source{name: topName(name)}
	info, err := os.Stat(name)
	if err != nil {
		return nil, fatalf("%s: %s", name, reason(err))
	}
	dir := name
	switch {
	case info.Mode().IsRegular():
		// The file may be called differently where a link leads to.
		real, err := filepath.EvalSymlinks(name)
		if err != nil {
			return nil, fatalf("%s: %s", name, reason(err))
		}
		dir, s.file = filepath.Split(real)
		if dir == "" {
			dir = "."
		}
	case !info.IsDir():
		return nil, fatalf("%s: it is neither a file nor a directory", name)
	}
	if s.root, err = os.OpenRoot(dir); err != nil {
		return nil, fatalf("%s: %s", name, reason(err))
	}
	return s, nil
}

// label is how an entry is called in messages.
func (s *source) label(entry string) string {
	if s.file != "" {
		return s.name
	}
	return path.Join(s.name, entry)
}

func (s *sender) run(ctx context.Context, in io.ReadCloser) error {
	ctx, cancel := context.WithCancelCause(ctx)
	var others sync.WaitGroup
	defer func() {
		others.Wait()
		// Whoever walks isn't to find its directory closed, and report that.
		s.parent.close()
		if s.source != nil {
			s.source.root.Close()
		}
	}()
	defer in.Close()
	defer cancel(nil)
	stop := context.AfterFunc(ctx, func() { in.Close() })
	defer stop()
	// It reads from the start, so that the other side never waits for it.
	others.Go(func() { cancel(s.receive(ctx)) })
	err := s.begin()
	if err != nil {
		return s.ended(ctx, err)
	}
	others.Go(func() {
		defer close(s.queue)
		if err := s.walk(ctx); err != nil && !errors.Is(err, errComplete) {
			cancel(err)
		}
	})
	if s.opts.Count {
		others.Go(func() { s.count(ctx) })
	}
	err = s.send(ctx)
	if err == nil && ctx.Err() == nil {
		if err = s.write(frameDone, nil); err == nil {
			err = s.flush()
		}
	}
	if err == nil {
		// The receiver has the last word.
		<-ctx.Done()
	} else if _, ok := errors.AsType[*FatalError](err); !ok {
		// It may have said why it went.
		select {
		case <-ctx.Done():
		case <-time.After(lastWords):
		}
	}
	return s.ended(ctx, err)
}

// lastWords is how long a receiver that takes no more may have a reason for it
// on the way.
const lastWords = 2 * time.Second

// errComplete ends a context when the receiver has everything.
var errComplete = errors.New("complete")

// ended turns the first thing that went wrong into the result.
func (s *sender) ended(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if errors.Is(err, errComplete) {
		return nil
	}
	if fatal, ok := errors.AsType[*FatalError](err); ok && !fatal.Remote {
		s.fatal(fatal)
	}
	return lost(err)
}

func (s *sender) begin() error {
	if err := s.hello(s.opts.Instance); err != nil {
		return err
	}
	var err error
	if s.source, err = openSource(s.opts.Path); err != nil {
		return err
	}
	if s.source.name != "" {
		if err := validName(s.source.name); err != nil {
			return fatalf("%v", err)
		}
	}
	return s.write(frameTop, new(encoder).text(s.source.name, MaxName).flag(s.source.file == "").b)
}

// receive reads what the receiver says, until the end. It never waits for
// anything else, so that the receiver never waits for it.
func (s *sender) receive(ctx context.Context) error {
	instance, err := s.await()
	if err != nil {
		return err
	}
	s.result.Met, s.result.Instance = true, instance
	for {
		kind, p, err := s.read()
		if err != nil {
			return err
		}
		switch kind {
		case frameRoot:
			select {
			case <-s.root:
				return errBroken("two places for the copy")
			default:
			}
			s.result.Root = p.text(maxFrame)
			if err = p.end(); err == nil {
				close(s.root)
			}
		case frameWant, frameSkip:
			a := answer{number: p.number(), skip: kind == frameSkip}
			if !a.skip {
				a.have = p.size()
				if a.have > 0 && copy(a.hash[:], p.text(sha256.Size)) != sha256.Size {
					p.fail()
				}
			}
			if err = p.end(); err != nil {
				break
			}
			select {
			case s.answers <- a:
			case <-ctx.Done():
				return nil
			default:
				err = errBroken("more answers than questions")
			}
		case frameStop:
			s.stop.Store(p.number())
			err = p.end()
		case frameProblem:
			var problem Problem
			if problem, err = decodeProblem(p); err == nil {
				s.relay(problem)
			}
		case frameFatal:
			return remoteFatal(p)
		case frameDone:
			s.result.Files, s.result.Bytes, s.result.Failed = p.size(), p.size(), p.size()
			if err = p.end(); err == nil {
				return errComplete
			}
		default:
			err = errBroken(fmt.Sprintf("an unknown frame %q", kind))
		}
		if err != nil {
			return err
		}
	}
}

// enqueue gives an item its place in the order. What has been announced is sent
// before it waits.
func (s *sender) enqueue(ctx context.Context, i item) error {
	select {
	case s.queue <- i:
		return nil
	default:
	}
	if err := s.flush(); err != nil {
		return err
	}
	select {
	case s.queue <- i:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// walk announces everything.
func (s *sender) walk(ctx context.Context) error {
	// Another attempt has to know where the copy is as soon as there may be
	// something of it.
	if err := s.flush(); err != nil {
		return err
	}
	select {
	case <-s.root:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if s.source.file == "" {
		info, err := s.source.root.Stat(".")
		if err != nil {
			return fatalf("%s: %s", s.opts.Path, reason(err))
		}
		return s.walkDir(ctx, s.source.root, info, &sentDir{path: "."}, nil, s.source.name)
	}
	info, err := s.source.root.Lstat(s.source.file)
	if err != nil {
		return fatalf("%s: %s", s.opts.Path, reason(err))
	}
	return s.announce(ctx, &sentDir{path: "."}, s.source.file, s.source.name, info)
}

// announce tells of a file.
func (s *sender) announce(ctx context.Context, dir *sentDir, file, name string, info fs.FileInfo) error {
	s.number++
	i := item{number: s.number, dir: dir, name: file, size: info.Size(), mtime: info.ModTime()}
	err := s.write(frameFile, new(encoder).number(i.number).number(dir.number).text(name, MaxName).
		mode(info.Mode()).time(i.mtime).number(uint64(max(i.size, 0))).b)
	if err != nil {
		return err
	}
	return s.enqueue(ctx, i)
}

// walkDir announces a directory: what isn't one first, then those inside.
func (s *sender) walkDir(ctx context.Context, root *os.Root, info fs.FileInfo, dir, parent *sentDir, name string) error {
	s.number++
	dir.number = s.number
	above := uint64(0)
	if parent != nil {
		above = parent.number
	}
	err := s.write(frameDir, new(encoder).number(dir.number).number(above).text(name, MaxName).
		mode(info.Mode()).time(info.ModTime()).b)
	if err != nil {
		return err
	}
	inside, err := s.walkEntries(ctx, root, dir)
	if err != nil {
		return err
	}
	for _, name := range inside {
		if err := s.walkInside(ctx, root, dir, name); err != nil {
			return err
		}
	}
	return s.enqueue(ctx, item{number: dir.number})
}

// walkInside announces a directory that is in another.
func (s *sender) walkInside(ctx context.Context, root *os.Root, dir *sentDir, name string) error {
	child := &sentDir{path: dir.join(name), depth: dir.depth + 1}
	label := s.source.label(child.path)
	if child.depth >= MaxDepth {
		return s.problem(Problem{Path: label, Text: fmt.Sprintf("left out: more than %d directories inside each other", MaxDepth)})
	}
	info, err := root.Lstat(name)
	if err == nil && !info.IsDir() {
		return s.problem(Problem{Path: label, Text: "it is no longer a directory"})
	}
	if err != nil {
		return s.problem(Problem{Path: label, Text: reason(err)})
	}
	inner, err := root.OpenRoot(name)
	if err != nil {
		return s.problem(Problem{Path: label, Text: reason(err)})
	}
	defer inner.Close()
	return s.walkDir(ctx, inner, info, child, dir, name)
}

// walkEntries announces what is in a directory, and returns the directories.
func (s *sender) walkEntries(ctx context.Context, root *os.Root, dir *sentDir) (inside []string, err error) {
	err = eachEntry(root, func(e fs.DirEntry) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		name := e.Name()
		label := s.source.label(dir.join(name))
		if partialName(name) {
			return s.problem(Problem{Path: label, Text: "left out: an unfinished copy", Warning: true})
		}
		if err := validName(name); err != nil {
			return s.problem(Problem{Path: label, Text: "left out: " + err.Error()})
		}
		switch e.Type() {
		case fs.ModeDir:
			inside = append(inside, name)
			return nil
		case 0, fs.ModeSymlink:
		default:
			return s.problem(Problem{Path: label, Text: "left out: " + kindOf(e.Type()), Warning: true})
		}
		info, err := root.Lstat(name)
		switch {
		case err != nil:
			return s.problem(Problem{Path: label, Text: reason(err)})
		case info.Mode().IsRegular():
			return s.announce(ctx, dir, name, name, info)
		case info.Mode().Type() != fs.ModeSymlink:
			return s.problem(Problem{Path: label, Text: "it has become something else"})
		}
		target, err := root.Readlink(name)
		if err == nil && len(target) > MaxLink {
			err = fmt.Errorf("a symbolic link's text of %d bytes is too long: %d is the limit", len(target), MaxLink)
		}
		if err != nil {
			return s.problem(Problem{Path: label, Text: reason(err)})
		}
		return s.write(frameLink, new(encoder).number(dir.number).text(name, MaxName).time(info.ModTime()).text(target, MaxLink).b)
	})
	if entryErr := (*readDirError)(nil); errors.As(err, &entryErr) {
		err = s.problem(Problem{Path: s.source.label(dir.path), Text: "reading the directory: " + reason(entryErr.error)})
	}
	return inside, err
}

func kindOf(mode fs.FileMode) string {
	switch {
	case mode&fs.ModeSocket != 0:
		return "a socket"
	case mode&fs.ModeNamedPipe != 0:
		return "a named pipe"
	case mode&fs.ModeDevice != 0:
		return "a device"
	}
	return "not a file"
}

// readDirError is an error of reading a directory rather than of what is done
// with its entries.
type readDirError struct{ error }

// eachEntry calls a function for each entry of a directory, of which it never
// holds more than a few.
func eachEntry(root *os.Root, do func(fs.DirEntry) error) error {
	d, err := root.Open(".")
	if err != nil {
		return &readDirError{err}
	}
	defer d.Close()
	for {
		entries, err := d.ReadDir(256)
		for _, e := range entries {
			if err := do(e); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return &readDirError{err}
		}
	}
}

// count adds up what there is to send, ahead of the walk, for whoever shows how
// far the copy is. What it doesn't see is left to the walk to report.
func (s *sender) count(ctx context.Context) {
	var files, bytes int64
	var add func(root *os.Root, depth int)
	add = func(root *os.Root, depth int) {
		var inside []string
		_ = eachEntry(root, func(e fs.DirEntry) error {
			if e.IsDir() {
				inside = append(inside, e.Name())
			} else if info, err := root.Lstat(e.Name()); err == nil && info.Mode().IsRegular() {
				files++
				bytes += info.Size()
			}
			return ctx.Err()
		})
		for _, name := range inside {
			if ctx.Err() != nil || depth >= MaxDepth {
				return
			}
			if inner, err := root.OpenRoot(name); err == nil {
				add(inner, depth+1)
				inner.Close()
			}
		}
	}
	if s.source.file == "" {
		add(s.source.root, 1)
	} else if info, err := s.source.root.Lstat(s.source.file); err == nil {
		files, bytes = 1, info.Size()
	}
	if ctx.Err() == nil {
		s.opts.Progress.total(files, bytes)
		_ = s.write(frameTotal, new(encoder).number(uint64(files)).number(uint64(bytes)).b)
	}
}

// send sends the items in their order.
func (s *sender) send(ctx context.Context) error {
	s.buf = make([]byte, header+chunk)
	for {
		i, err := next(ctx, s, s.queue)
		if err != nil || i.number == 0 {
			return err
		}
		if i.name == "" {
			if err := s.write(frameLeave, new(encoder).number(i.number).b); err != nil {
				return err
			}
			continue
		}
		a, err := next(ctx, s, s.answers)
		if err != nil {
			return err
		}
		if a.number != i.number {
			return errBroken("an answer to another question")
		}
		if a.skip {
			continue
		}
		if err := s.sendFile(ctx, i, a); err != nil {
			return err
		}
	}
}

// next receives from a channel. Before it waits it sends what is buffered: that
// may be what it waits for an answer to.
func next[T any](ctx context.Context, s *sender, from <-chan T) (v T, err error) {
	select {
	case v = <-from:
		return v, nil
	default:
	}
	if err := s.flush(); err != nil {
		return v, err
	}
	select {
	case v = <-from:
		return v, nil
	case <-ctx.Done():
		return v, context.Cause(ctx)
	}
}

// sendFile sends what is wanted of a file.
func (s *sender) sendFile(ctx context.Context, i item, a answer) error {
	label := s.source.label(i.dir.join(i.name))
	s.opts.Progress.current(label)
	sum := sha256.New()
	state, err := s.sendContents(ctx, i, a, label, sum)
	if err != nil {
		return err
	}
	s.opts.Progress.add(1, 0)
	return s.write(frameEnd, new(encoder).number(i.number).number(uint64(state)).text(string(sum.Sum(nil)), sha256.Size).b)
}

func (s *sender) sendContents(ctx context.Context, i item, a answer, label string, sum hash.Hash) (state int, err error) {
	failed := func(err error) (int, error) {
		return endFailed, s.problem(Problem{Path: label, Text: reason(err)})
	}
	dir, err := s.parent.open(s.source.root, i.dir.path)
	if err != nil {
		return failed(err)
	}
	f, err := dir.OpenFile(i.name, os.O_RDONLY|openFlags, 0)
	if err != nil {
		return failed(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return failed(err)
	} else if !info.Mode().IsRegular() {
		return failed(errors.New("it has become something else"))
	}
	if a.have > 0 && !s.agrees(ctx, f, a, sum) {
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		a.have = 0
		sum.Reset()
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return failed(err)
		}
	}
	if err := s.write(frameBegin, new(encoder).number(i.number).number(uint64(a.have)).b); err != nil {
		return 0, err
	}
	s.opts.Progress.present(a.have)

	limit := i.size
	if limit == 0 {
		limit = MaxUnsized
	}
	sent := a.have
	for sent < limit {
		if s.stop.Load() == i.number {
			return endFailed, nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		n, err := f.Read(s.buf[header : header+int(min(chunk, limit-sent))])
		if n > 0 {
			sum.Write(s.buf[header : header+n])
			if err := s.writeData(s.buf[:header+n]); err != nil {
				return 0, err
			}
			sent += int64(n)
			s.opts.Progress.add(0, int64(n))
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return failed(err)
		}
	}
	info, err := f.Stat()
	switch {
	case err != nil:
		return failed(err)
	case sent < i.size:
		return endFailed, s.problem(Problem{Path: label, Text: fmt.Sprintf("it shrank from %d to %d bytes while it was copied", i.size, sent)})
	case i.size == 0 && sent == MaxUnsized:
		return endFailed, s.problem(Problem{Path: label, Text: fmt.Sprintf("it was empty, and then had %d bytes or more", sent)})
	case info.Size() > i.size:
		return endWhole, s.problem(Problem{Path: label, Warning: true,
			Text: fmt.Sprintf("it grew while it was copied: the copy has the first %d bytes", sent)})
	case !info.ModTime().Equal(i.mtime):
		return endChanged, s.problem(Problem{Path: label, Text: "it changed while it was copied: the copy may be neither the old nor the new"})
	}
	return endWhole, nil
}

// agrees reads as much of a file as the receiver has, and says whether that is
// the same.
func (s *sender) agrees(ctx context.Context, f *os.File, a answer, sum hash.Hash) bool {
	n, err := io.CopyBuffer(sum, until(ctx, io.LimitReader(f, a.have)), s.buf)
	return err == nil && n == a.have && [sha256.Size]byte(sum.Sum(nil)) == a.hash
}

// openDir keeps the last directory that was used open: what follows is in the
// same one, as a rule.
type openDir struct {
	path string
	root *os.Root
}

// open returns a directory below a root. It is closed by the next call.
func (o *openDir) open(below *os.Root, path string) (*os.Root, error) {
	if o.root != nil && o.path == path {
		return o.root, nil
	}
	root, err := below.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	o.close()
	o.path, o.root = path, root
	return root, nil
}

func (o *openDir) close() {
	if o.root != nil {
		o.root.Close()
		o.root = nil
	}
}
