package files

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// lockPatience is how long a partial copy may belong to another process: the one
// of a connection that broke, whose other side hasn't noticed yet.
const lockPatience = 75 * time.Second

// destination is where files are put: below one directory, which nothing leads
// out of. Its methods fail with errors about one entry.
type destination struct {
	attributes Attributes
	// container is the directory that the copy is in, or whose contents it is.
	container *os.Root
	base      string // its path
	at        *dir
	// name is what the copy is called in the container; "" if it is its contents.
	name string
	// announced is what the sender calls it.
	announced string
	isDir     bool

	last     *os.Root // the directory that was used last
	lastPath string
}

// dir is a directory that was there or was made.
type dir struct {
	path string // in the container, with slashes
	info fs.FileInfo
	// mode and mtime are what it gets in the end; mode is 0 to leave it.
	mode  fs.FileMode
	mtime time.Time
}

// file is a file to write.
type file struct {
	dir   *dir
	name  string
	mode  fs.FileMode
	mtime time.Time
	// have is how much is there, and sum the hash of that and of what is
	// written.
	have int64
	sum  hash.Hash
	// whole says that have is a file with its final name, not a partial one.
	whole bool
	// f is the partial copy, once it is open. resumed says that it was there.
	f       *os.File
	resumed bool
}

func (f *file) entry() string { return path.Join(f.dir.path, f.name) }

func (f *file) write(b []byte) error {
	f.sum.Write(b)
	_, err := f.f.Write(b)
	return err
}

// openDestination settles where a copy goes, as cp does. Its errors are final.
func openDestination(opts Options, announced string, isDir bool) (*destination, error) {
	d := &destination{attributes: opts.Attributes, announced: announced, isDir: isDir}
	info, err := os.Stat(opts.Path)
	switch {
	case err == nil && info.IsDir() && (!opts.Exact || announced == ""):
		d.base, d.name = opts.Path, announced
	case err == nil && info.IsDir() != isDir && isDir:
		return nil, fatalf("%s: there is a file, which a directory can't replace", opts.Path)
	case err == nil && info.IsDir() != isDir:
		return nil, fatalf("%s: there is a directory, which a file can't replace", opts.Path)
	case err == nil:
		// Where a link leads to is the user's own choice here.
		real, err := filepath.EvalSymlinks(opts.Path)
		if err != nil {
			return nil, fatalf("%s: %s", opts.Path, reason(err))
		}
		d.base, d.name = filepath.Dir(real), filepath.Base(real)
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fatalf("%s: %s", opts.Path, reason(err))
	default:
		if _, err := os.Lstat(opts.Path); err == nil {
			return nil, fatalf("%s: it is a symbolic link to what doesn't exist", opts.Path)
		}
		if last := opts.Path[len(opts.Path)-1:]; !isDir && strings.ContainsAny(last, "/"+string(filepath.Separator)) {
			return nil, fatalf("%s: there is no such directory", opts.Path)
		}
		clean := filepath.Clean(opts.Path)
		d.base, d.name = filepath.Dir(clean), filepath.Base(clean)
		if err := validName(d.name); err != nil {
			return nil, fatalf("%s: %v", opts.Path, err)
		}
	}
	if d.container, err = os.OpenRoot(d.base); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fatalf("%s: there is no directory %s to put it into", opts.Path, d.base)
		}
		return nil, fatalf("%s: %s", d.base, reason(err))
	}
	info, err = d.container.Stat(".")
	if err != nil {
		d.container.Close()
		return nil, fatalf("%s: %s", d.base, reason(err))
	}
	d.at = &dir{path: ".", info: info}
	return d, nil
}

func (d *destination) close() {
	if d.last != nil {
		d.last.Close()
	}
	d.container.Close()
}

// path is where the copy is, or "" if it is the contents of a directory that the
// user named.
func (d *destination) path() string {
	if d.name == "" {
		return ""
	}
	return filepath.Join(d.base, d.name)
}

// label is how an entry is called in messages.
func (d *destination) label(entry string) string {
	if entry == "." && d.name != "" {
		return d.name
	}
	return entry
}

// open returns a directory. It is closed by the next call, for another one.
func (d *destination) open(at *dir) (*os.Root, error) {
	if d.last != nil && d.lastPath == at.path {
		return d.last, nil
	}
	root, err := d.container.OpenRoot(at.path)
	if err != nil {
		return nil, err
	}
	// What isn't the sender's doing is no reason to follow a link either.
	if info, err := root.Stat("."); err != nil || !os.SameFile(info, at.info) {
		root.Close()
		return nil, errors.New("its directory was replaced by another while it was copied")
	}
	if d.last != nil {
		d.last.Close()
	}
	d.last, d.lastPath = root, at.path
	return root, nil
}

// makeTop makes the directory that is the copy.
func (d *destination) makeTop(mode fs.FileMode, mtime time.Time) (*dir, error) {
	if d.name == "" {
		return d.at, nil
	}
	return d.makeDir(d.at, d.name, mode, mtime)
}

// makeDir makes a directory, or takes one that is there.
func (d *destination) makeDir(in *dir, name string, mode fs.FileMode, mtime time.Time) (*dir, error) {
	root, err := d.open(in)
	if err != nil {
		return nil, err
	}
	made := &dir{path: path.Join(in.path, name), mtime: mtime}
	made.info, err = root.Lstat(name)
	const usable = 0o700 // until everything is in it
	fresh := errors.Is(err, fs.ErrNotExist)
	switch {
	case fresh:
		perm := fs.FileMode(usable)
		if d.attributes.Plain {
			perm |= mode.Perm()
		}
		if err := root.Mkdir(name, perm); err != nil {
			return nil, err
		}
		if made.info, err = root.Lstat(name); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case made.info.Mode()&fs.ModeSymlink != 0:
		return nil, errors.New("there is a symbolic link, and nothing is copied through one")
	case !made.info.IsDir():
		return nil, errors.New("there is a file, which a directory can't replace")
	case made.info.Mode()&usable != usable:
		if err := root.Chmod(name, made.info.Mode()|usable); err != nil && !errors.Is(err, fs.ErrPermission) {
			return nil, err
		}
		made.mode = made.info.Mode()
	}
	// A directory may have its group from the one that it is in.
	inherited := made.info.Mode() & fs.ModeSetgid
	switch {
	case !d.attributes.Plain:
		made.mode = fs.ModeDir | d.attributes.mode(mode) | inherited
	case fresh && mode&usable != usable:
		made.mode = fs.ModeDir | made.info.Mode().Perm()&mode | inherited
	}
	return made, nil
}

// finishDir gives a directory its mode and time.
func (d *destination) finishDir(made *dir) error {
	if made == d.at || made.mode == 0 {
		return nil
	}
	root, err := d.open(made)
	if err != nil {
		return err
	}
	if !d.attributes.Plain {
		err = root.Chtimes(".", time.Time{}, made.mtime)
	}
	return errors.Join(err, root.Chmod(".", made.mode))
}

// makeLink makes a symbolic link in the place of whatever is there but a
// directory. What it says is its own affair. The first error is that of what
// may not matter.
func (d *destination) makeLink(in *dir, name, target string, mtime time.Time) (lesser, err error) {
	if target == "" || strings.IndexByte(target, 0) >= 0 {
		return nil, errors.New("a symbolic link that leads nowhere")
	}
	root, err := d.open(in)
	if err != nil {
		return nil, err
	}
	info, err := root.Lstat(name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = root.Symlink(target, name)
	case err != nil:
	case info.IsDir():
		err = errors.New("there is a directory, which a symbolic link can't replace")
	case !replaceable(info):
		err = fmt.Errorf("there is %s, which isn't replaced", kindOf(info.Mode()))
	default:
		if old, err := root.Readlink(name); err == nil && old == target {
			break
		}
		partial := partialOf(name)
		_ = root.Remove(partial)
		if err = root.Symlink(target, partial); err == nil {
			if err = root.Rename(partial, name); err != nil {
				_ = root.Remove(partial)
			}
		}
	}
	if err != nil || d.attributes.Plain {
		return nil, err
	}
	return setLinkTime(root, name, mtime), nil
}

// replaceable says whether a copy takes the place of what is there. What isn't a
// file was made for others to meet there: /dev/null, a service's socket.
func replaceable(info fs.FileInfo) bool {
	return info.Mode().IsRegular() || info.Mode()&fs.ModeSymlink != 0
}

// look finds out how much of a file is there.
func (d *destination) look(ctx context.Context, in *dir, name string, mode fs.FileMode, mtime time.Time, size int64, resume bool) (*file, error) {
	f := &file{dir: in, name: name, mode: mode, mtime: mtime, sum: sha256.New()}
	root, err := d.open(in)
	if err != nil {
		return nil, err
	}
	info, err := root.Lstat(name)
	switch {
	case err == nil && info.IsDir():
		return nil, errors.New("there is a directory, which a file can't replace")
	case err == nil && !replaceable(info):
		return nil, fmt.Errorf("there is %s, which isn't replaced", kindOf(info.Mode()))
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return nil, err
	case err == nil && size > 0 && info.Mode().IsRegular() && info.Size() == size && info.ModTime().Equal(mtime) && !d.attributes.Plain:
		// It is probably the same. If it can't be read it is replaced.
		if f.whole = f.read(ctx, root, size); f.whole {
			return f, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	if size < partialMin || !resume {
		return f, nil
	}
	f.f, err = d.openPartial(ctx, root, name)
	if err != nil || f.f == nil {
		return f, err
	}
	f.resumed = true
	info, err = f.f.Stat()
	if err == nil && info.Size() <= size {
		f.have, err = io.Copy(f.sum, until(ctx, f.f))
	}
	if err != nil {
		d.abandon(f)
		return nil, err
	}
	return f, nil
}

// read hashes a file under its final name.
func (f *file) read(ctx context.Context, root *os.Root, size int64) bool {
	existing, err := root.OpenFile(f.name, os.O_RDONLY|openFlags, 0)
	if err != nil {
		return false
	}
	defer existing.Close()
	f.have, err = io.Copy(f.sum, until(ctx, io.LimitReader(existing, size)))
	if err != nil || f.have != size {
		f.have = 0
		f.sum.Reset()
		return false
	}
	return true
}

// begin makes a file ready to be written, after what is kept of it.
func (d *destination) begin(ctx context.Context, f *file, keep int64) error {
	if keep > 0 {
		return nil
	}
	f.have, f.whole = 0, false
	f.sum.Reset()
	if f.f == nil {
		root, err := d.open(f.dir)
		if err != nil {
			return err
		}
		return d.create(ctx, root, f)
	}
	if err := f.f.Truncate(0); err != nil {
		return err
	}
	_, err := f.f.Seek(0, io.SeekStart)
	return err
}

// create makes the partial copy of a file, or takes one that is there.
func (d *destination) create(ctx context.Context, root *os.Root, f *file) error {
	perm := fs.FileMode(0o600)
	if d.attributes.Plain {
		perm = f.mode.Perm()
	}
	partial := partialOf(f.name)
	for {
		created, err := root.OpenFile(partial, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm)
		if errors.Is(err, fs.ErrExist) {
			created, err = d.openPartial(ctx, root, f.name)
		} else if err == nil {
			// Another may have found it first.
			var mine bool
			if mine, err = d.claim(ctx, root, created, partial); err != nil || !mine {
				created.Close()
				created = nil
			}
		}
		if err != nil {
			return err
		}
		if created == nil {
			continue
		}
		if err := created.Truncate(0); err != nil {
			created.Close()
			return err
		}
		f.f = created
		return nil
	}
}

// openPartial opens a partial copy of an earlier attempt, and takes it for this
// one. There is none if it returns no file: one that somebody else may have put
// there is removed.
func (d *destination) openPartial(ctx context.Context, root *os.Root, name string) (*os.File, error) {
	partial := partialOf(name)
	info, err := root.Lstat(partial)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || !private(info) {
		return nil, root.Remove(partial)
	}
	f, err := root.OpenFile(partial, os.O_RDWR|openFlags, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if errors.Is(err, fs.ErrPermission) {
		return nil, root.Remove(partial)
	}
	if err != nil {
		return nil, err
	}
	if mine, err := d.claim(ctx, root, f, partial); err != nil || !mine {
		f.Close()
		return nil, err
	}
	// Another may have been put there between the look and the open.
	if info, err := f.Stat(); err != nil || !private(info) {
		f.Close()
		return nil, errors.Join(err, root.Remove(partial))
	}
	return f, nil
}

// claim takes a partial copy for this process. It is of no use if whoever had it
// before has finished it meanwhile: then it is a file by another name.
func (d *destination) claim(ctx context.Context, root *os.Root, f *os.File, partial string) (mine bool, err error) {
	if err := d.take(ctx, f); err != nil {
		return false, err
	}
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	named, err := root.Lstat(partial)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(info, named), err
}

// take waits until no other process has a partial copy.
func (d *destination) take(ctx context.Context, f *os.File) error {
	timeout := time.NewTimer(lockPatience)
	defer timeout.Stop()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		if taken, err := lock(f); taken || err != nil {
			return err
		}
		select {
		case <-again.C:
		case <-timeout.C:
			return errors.New("another copy is writing it")
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// finish gives a file its name. The first error is that of what may not matter.
func (d *destination) finish(f *file) (lesser, err error) {
	root, err := d.open(f.dir)
	if err != nil {
		return nil, err
	}
	mode := d.attributes.mode(f.mode)
	if f.whole {
		if info, err := root.Lstat(f.name); err != nil || info.Mode() == mode {
			return nil, err
		}
		return root.Chmod(f.name, mode), nil
	}
	if !d.attributes.Plain {
		lesser = f.f.Chmod(mode)
	}
	partial := partialOf(f.name)
	written := f.f
	f.f = nil
	if !renamesOpen {
		if err := written.Close(); err != nil {
			return nil, err
		}
	}
	if !d.attributes.Plain {
		lesser = errors.Join(lesser, root.Chtimes(partial, time.Time{}, f.mtime))
	}
	// It is this process's until it has its name.
	if err := root.Rename(partial, f.name); err != nil {
		_ = root.Remove(partial)
		if renamesOpen {
			written.Close()
		}
		return nil, err
	}
	if renamesOpen {
		// Network file systems may tell only now that they couldn't write.
		if err := written.Close(); err != nil {
			_ = root.Remove(f.name)
			return nil, err
		}
	}
	return lesser, nil
}

// drop removes what there is of a file that isn't wanted any more.
func (d *destination) drop(f *file) {
	if f.f == nil {
		return
	}
	if !renamesOpen {
		f.f.Close()
	}
	if root, err := d.open(f.dir); err == nil {
		_ = root.Remove(partialOf(f.name))
	}
	f.f.Close()
	f.f = nil
}

// abandon closes a file that isn't complete, and keeps it if it is worth it.
func (d *destination) abandon(f *file) {
	if f.f == nil {
		return
	}
	if info, err := f.f.Stat(); err != nil || info.Size() < partialMin {
		d.drop(f)
		return
	}
	f.f.Close()
	f.f = nil
}

// partialOf is what a file is called until it is complete: always the same, and
// short enough for every file system.
func partialOf(name string) string {
	sum := sha256.Sum256([]byte(name))
	return fmt.Sprint(partialPrefix, hex.EncodeToString(sum[:16]), partialSuffix)
}
