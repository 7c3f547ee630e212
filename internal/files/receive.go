package files

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"path"
)

// Receive receives what a sender sends. It closes in when it ends or ctx does,
// which must unblock a Read; a Write to out must fail once the other side has
// gone.
func Receive(ctx context.Context, in io.ReadCloser, out io.Writer, opts Options) (Result, error) {
	defer in.Close()
	stop := context.AfterFunc(ctx, func() { in.Close() })
	defer stop()
	c := newConn(in, out)
	r := &receiver{
		conn:     c,
		opts:     opts,
		reporter: reporter{conn: c, report: opts.Report},
		dirs:     make(map[uint64]*receivedDir),
	}
	err := r.run(ctx)
	r.abandon()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if fatal, ok := err.(*FatalError); ok && !fatal.Remote {
		c.fatal(fatal)
	}
	r.result.Failed = r.failures()
	return r.result, lost(err)
}

type receiver struct {
	*conn
	opts Options
	reporter
	dest   *destination
	result Result

	// dirs are the directories that more may come for.
	dirs map[uint64]*receivedDir
	// files are those that are wanted and haven't come yet, in order.
	files []*receivedFile
	// resuming is how many of them are open.
	resuming int
	// number is that of the last file or directory.
	number uint64
}

// maxResuming bounds how many partial copies are held open.
const maxResuming = 32

// receivedDir is a directory of the destination.
type receivedDir struct {
	*dir
	parent *receivedDir
	depth  int
	// open counts what is inside that isn't done: files and directories.
	open int
	// failed says that it couldn't be made: nothing below it is wanted.
	failed bool
}

// receivedFile is a file that is wanted.
type receivedFile struct {
	*file
	number uint64
	dir    *receivedDir
	size   int64
	// begun says that its contents are coming; discard that they are of no use
	// any more.
	begun, discard bool
	received       int64
}

func (r *receiver) run(ctx context.Context) error {
	if err := r.hello(r.opts.Instance); err != nil {
		return err
	}
	if err := r.flush(); err != nil {
		return err
	}
	var err error
	if r.result.Instance, err = r.await(); err != nil {
		return err
	}
	r.result.Met = true
	for {
		// The sender waits for what is buffered, if it has nothing else to do.
		if r.idle() {
			if err := r.flush(); err != nil {
				return err
			}
		}
		kind, p, err := r.read()
		if err != nil {
			return err
		}
		if r.dest == nil && kind != frameTop && kind != frameProblem && kind != frameFatal && kind != frameTotal {
			return errBroken("it doesn't begin with what is to come")
		}
		switch kind {
		case frameData:
			err = r.data(p.b)
		case frameFile:
			err = r.announced(ctx, p)
		case frameBegin:
			err = r.begin(ctx, p)
		case frameEnd:
			err = r.end(p)
		case frameDir:
			err = r.enter(p)
		case frameLeave:
			err = r.leave(p)
		case frameLink:
			err = r.link(p)
		case frameTop:
			err = r.top(p)
		case frameProblem:
			var problem Problem
			if problem, err = decodeProblem(p); err == nil {
				r.relay(problem)
			}
		case frameTotal:
			files, bytes := p.size(), p.size()
			if err = p.end(); err == nil {
				r.opts.Progress.total(files, bytes)
			}
		case frameFatal:
			return remoteFatal(p)
		case frameDone:
			if err = p.end(); err == nil {
				return r.done()
			}
		default:
			err = errBroken(fmt.Sprintf("an unknown frame %q", kind))
		}
		if err != nil {
			return err
		}
	}
}

// top learns what is to come, and settles where it goes.
func (r *receiver) top(p decoder) error {
	name, isDir := p.text(MaxName), p.flag()
	if err := p.end(); err != nil {
		return err
	}
	if r.dest != nil {
		return errBroken("it begins twice")
	}
	if name != "" {
		if err := validName(name); err != nil {
			return fatalf("%v", err)
		}
	} else if !isDir {
		return errBroken("a file without a name")
	}
	var err error
	if r.dest, err = openDestination(r.opts, name, isDir); err != nil {
		return err
	}
	r.result.Root = r.dest.path()
	return r.write(frameRoot, new(encoder).text(r.result.Root, maxFrame/2).b)
}

// next checks the number of something announced.
func (r *receiver) next(number uint64) error {
	if number != r.number+1 {
		return errBroken("a number out of order")
	}
	r.number = number
	return nil
}

// place checks where something announced belongs. It returns no directory if it
// is the copy itself, whose name is decided here.
func (r *receiver) place(parent uint64, name string, isDir bool) (*receivedDir, error) {
	if parent == 0 {
		if r.number > 1 || isDir != r.dest.isDir || name != r.dest.announced {
			return nil, errBroken("it isn't what was to come")
		}
		return nil, nil
	}
	dir := r.dirs[parent]
	if dir == nil {
		return nil, errBroken("a directory that isn't known")
	}
	return dir, validName(name)
}

// label is how an entry is called in messages.
func (r *receiver) label(dir *receivedDir, name string) string {
	if dir == nil {
		return r.dest.label(".")
	}
	if dir.path == "." {
		return name
	}
	return dir.path + "/" + name // a name may be one that isn't valid
}

func (r *receiver) failure(dir *receivedDir, name string, err error) error {
	if exhausted(err) {
		return fatalf("%s: %s", r.label(dir, name), reason(err))
	}
	return r.problem(Problem{Path: r.label(dir, name), Text: reason(err)})
}

func (r *receiver) enter(p decoder) error {
	number, parent, name := p.number(), p.number(), p.text(maxFrame)
	mode, mtime := p.mode(), p.time()
	if err := p.end(); err != nil {
		return err
	}
	if err := r.next(number); err != nil {
		return err
	}
	above, err := r.place(parent, name, true)
	if err != nil && above == nil {
		return err
	}
	if len(r.dirs) > 2*(MaxDepth+window) {
		return errBroken("too many directories at once")
	}
	d := &receivedDir{parent: above}
	r.dirs[number] = d
	if above != nil {
		above.open++
		d.depth = above.depth + 1
		d.failed = above.failed
	}
	switch {
	case d.depth >= MaxDepth:
		return errBroken(fmt.Sprintf("more than %d directories inside each other", MaxDepth))
	case d.failed:
		return nil
	case err == nil && above == nil:
		d.dir, err = r.dest.makeTop(mode, mtime)
		if err != nil {
			// Nothing can be copied without it.
			return fatalf("%s: %s", r.dest.label("."), reason(err))
		}
	case err == nil:
		d.dir, err = r.dest.makeDir(above.dir, name, mode, mtime)
	}
	if err != nil {
		d.failed = true
		return r.failure(above, name, err)
	}
	return nil
}

func (r *receiver) leave(p decoder) error {
	number := p.number()
	if err := p.end(); err != nil {
		return err
	}
	d := r.dirs[number]
	if d == nil || d.open > 0 {
		return errBroken("the end of a directory that isn't known, or isn't done")
	}
	delete(r.dirs, number)
	if d.parent != nil {
		d.parent.open--
	}
	if d.failed {
		return nil
	}
	return r.kept(d.path, r.dest.finishDir(d.dir))
}

// kept reports that modes or times can't be kept, which doesn't lose the file.
// Some file systems keep neither, so this is said once.
func (r *receiver) kept(entry string, err error) error {
	if err == nil {
		return nil
	}
	return r.once(Problem{Path: r.dest.label(entry), Text: "mode or times can't be kept: " + reason(err), Warning: true})
}

func (r *receiver) link(p decoder) error {
	parent, name, mtime, target := p.number(), p.text(maxFrame), p.time(), p.text(MaxLink)
	if err := p.end(); err != nil {
		return err
	}
	dir, err := r.place(parent, name, false)
	if dir == nil {
		if err == nil {
			err = errBroken("a symbolic link without a directory")
		}
		return err
	}
	if dir.failed {
		return nil
	}
	var lesser error
	if err == nil {
		lesser, err = r.dest.makeLink(dir.dir, name, target, mtime)
	}
	if err != nil {
		return r.failure(dir, name, err)
	}
	return r.kept(path.Join(dir.path, name), lesser)
}

// announced looks what is there of a file, and asks for the rest.
func (r *receiver) announced(ctx context.Context, p decoder) error {
	number, parent, name := p.number(), p.number(), p.text(maxFrame)
	mode, mtime, size := p.mode(), p.time(), p.size()
	if err := p.end(); err != nil {
		return err
	}
	if err := r.next(number); err != nil {
		return err
	}
	if len(r.files) > 2*window {
		return errBroken("too many files at once")
	}
	dir, err := r.place(parent, name, false)
	if err != nil && dir == nil {
		return err
	}
	var f *file
	switch {
	case dir != nil && dir.failed:
		return r.write(frameSkip, new(encoder).number(number).b)
	case err != nil:
	case dir == nil:
		f, err = r.dest.look(ctx, r.dest.at, r.dest.name, mode, mtime, size, true)
	default:
		f, err = r.dest.look(ctx, dir.dir, name, mode, mtime, size, r.resuming < maxResuming)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		if err := r.failure(dir, name, err); err != nil {
			return err
		}
		return r.write(frameSkip, new(encoder).number(number).b)
	}
	r.files = append(r.files, &receivedFile{file: f, number: number, dir: dir, size: size})
	if dir != nil {
		dir.open++
	}
	if f.resumed {
		r.resuming++
	}
	want := new(encoder).number(number).number(uint64(f.have))
	if f.have > 0 {
		want.text(string(f.sum.Sum(nil)), sha256.Size)
	}
	return r.write(frameWant, want.b)
}

// current returns the file whose turn it is.
func (r *receiver) current(number uint64) (*receivedFile, error) {
	if len(r.files) == 0 || r.files[0].number != number {
		return nil, errBroken("a file out of order")
	}
	return r.files[0], nil
}

func (r *receiver) begin(ctx context.Context, p decoder) error {
	number, keep := p.number(), p.size()
	if err := p.end(); err != nil {
		return err
	}
	f, err := r.current(number)
	if err != nil {
		return err
	}
	if f.begun || keep != 0 && keep != f.have {
		return errBroken("contents that weren't asked for")
	}
	f.begun = true
	r.opts.Progress.current(r.label(f.dir, f.name))
	r.opts.Progress.present(keep)
	f.received = keep
	if err := r.dest.begin(ctx, f.file, keep); err != nil {
		return r.unwanted(f, err)
	}
	return nil
}

// unwanted has the sender stop a file that can't be written.
func (r *receiver) unwanted(f *receivedFile, err error) error {
	f.discard = true
	if err := r.failure(f.dir, f.name, err); err != nil {
		return err
	}
	if err := r.write(frameStop, new(encoder).number(f.number).b); err != nil {
		return err
	}
	return r.flush()
}

func (r *receiver) data(b []byte) error {
	if len(r.files) == 0 || !r.files[0].begun {
		return errBroken("contents without a file")
	}
	f := r.files[0]
	f.received += int64(len(b))
	if limit := f.size; f.received > limit && (limit > 0 || f.received > MaxUnsized) {
		return errBroken("more contents than were announced")
	}
	if f.discard {
		return nil
	}
	r.opts.Progress.add(0, int64(len(b)))
	if err := f.write(b); err != nil {
		return r.unwanted(f, err)
	}
	return nil
}

func (r *receiver) end(p decoder) error {
	number, state, sum := p.number(), p.number(), p.text(sha256.Size)
	if err := p.end(); err != nil {
		return err
	}
	f, err := r.current(number)
	if err != nil {
		return err
	}
	r.files = r.files[1:]
	if f.dir != nil {
		f.dir.open--
	}
	if f.resumed {
		r.resuming--
	}
	if f.discard || !f.begun || state == endFailed {
		r.dest.drop(f.file)
		return nil
	}
	if f.size > 0 && f.received != f.size {
		r.dest.drop(f.file)
		return errBroken("less contents than were announced")
	}
	if string(f.sum.Sum(nil)) != sum {
		r.dest.drop(f.file)
		return r.problem(Problem{Path: r.label(f.dir, f.name), Text: "its SHA-256 isn't the source's: it was damaged on the way, and isn't kept"})
	}
	lesser, err := r.dest.finish(f.file)
	if err != nil {
		r.dest.drop(f.file)
		return r.failure(f.dir, f.name, err)
	}
	if state == endWhole {
		r.result.Files++
		r.result.Bytes += f.received
	}
	r.opts.Progress.add(1, 0)
	return r.kept(f.entry(), lesser)
}

func (r *receiver) done() error {
	if len(r.files) > 0 || len(r.dirs) > 0 || r.number == 0 {
		return errBroken("it ends too early")
	}
	err := r.write(frameDone, new(encoder).number(uint64(r.result.Files)).number(uint64(r.result.Bytes)).number(uint64(r.failures())).b)
	if err != nil {
		return err
	}
	return r.flush()
}

// abandon closes what is open. What is worth it is kept for another attempt.
func (r *receiver) abandon() {
	for _, f := range r.files {
		r.dest.abandon(f.file)
	}
	if r.dest != nil {
		r.dest.close()
	}
}
