package files

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"
)

// Tree is a destination for files that come by another way than this package's
// protocol, an archive for example. What comes is trusted as little.
type Tree struct {
	dest *destination
	dirs map[string]*dir
	made []*dir
}

// NewTree settles where a file or directory of a name goes, or the contents of a
// directory if the name is "". Its errors are FatalErrors.
func NewTree(opts Options, name string, isDir bool) (*Tree, error) {
	if name != "" {
		if err := validName(name); err != nil {
			return nil, fatalf("%v", err)
		}
	}
	dest, err := openDestination(opts, name, isDir)
	if err != nil {
		return nil, err
	}
	return &Tree{dest: dest, dirs: make(map[string]*dir)}, nil
}

// Root is where the copy is, as in Result.
func (t *Tree) Root() string { return t.dest.path() }

// Label is how an entry is called in messages.
func (t *Tree) Label(name string) string {
	return t.dest.label(path.Join(t.dest.name, name))
}

// parent returns the directory of an entry: of its path in the copy, with
// slashes.
func (t *Tree) parent(name string) (*dir, string, error) {
	above, base := path.Split(name)
	above = strings.TrimSuffix(above, "/")
	if above == "" {
		above = "."
	}
	if err := validName(base); err != nil {
		return nil, "", err
	}
	in := t.dirs[above]
	if in == nil {
		return nil, "", errors.New("its directory isn't there")
	}
	if strings.Count(name, "/") >= MaxDepth {
		return nil, "", fmt.Errorf("more than %d directories inside each other", MaxDepth)
	}
	return in, base, nil
}

// Dir makes a directory; that of the copy itself is ".".
func (t *Tree) Dir(name string, mode fs.FileMode, mtime time.Time) error {
	var made *dir
	if t.dirs[name] != nil {
		return errors.New("it comes twice")
	}
	if name == "." {
		var err error
		if made, err = t.dest.makeTop(mode, mtime); err != nil {
			return err
		}
	} else {
		in, base, err := t.parent(name)
		if err != nil {
			return err
		}
		if made, err = t.dest.makeDir(in, base, mode, mtime); err != nil {
			return err
		}
	}
	t.dirs[name] = made
	t.made = append(t.made, made)
	return nil
}

// Link makes a symbolic link.
func (t *Tree) Link(name, target string, mtime time.Time) error {
	in, base, err := t.parent(name)
	if err != nil {
		return err
	}
	if len(target) > MaxLink {
		return fmt.Errorf("a symbolic link's text of %d bytes is too long: %d is the limit", len(target), MaxLink)
	}
	_, err = t.dest.makeLink(in, base, target, mtime)
	return err
}

// Open opens a file of the copy to read it.
func (t *Tree) Open(name string) (*os.File, error) {
	in, base, err := t.parent(name)
	if err != nil {
		return nil, err
	}
	root, err := t.dest.open(in)
	if err != nil {
		return nil, err
	}
	if info, err := root.Lstat(base); err != nil || !info.Mode().IsRegular() {
		return nil, errors.New("it isn't a file")
	}
	return root.OpenFile(base, os.O_RDONLY|openFlags, 0)
}

// Incoming is a file that is being received.
type Incoming struct {
	tree *Tree
	file *file
	size int64
}

// File begins a file; "." is the one that is the copy itself. Close it.
func (t *Tree) File(ctx context.Context, name string, mode fs.FileMode, mtime time.Time, size int64) (*Incoming, error) {
	in, base := t.dest.at, t.dest.name
	if name != "." {
		var err error
		if in, base, err = t.parent(name); err != nil {
			return nil, err
		}
	}
	f, err := t.dest.look(ctx, in, base, mode, mtime, size, true)
	if err != nil {
		return nil, err
	}
	return &Incoming{tree: t, file: f, size: size}, nil
}

// Have returns how much of the file is there already, and the SHA-256 of that.
func (i *Incoming) Have() (int64, []byte) { return i.file.have, i.file.sum.Sum(nil) }

// Fill writes the rest of the file, after as much of it as is kept: nothing, or
// what Have returned. It fails if it isn't as long as was announced.
func (i *Incoming) Fill(ctx context.Context, keep int64, r io.Reader) error {
	if err := i.tree.dest.begin(ctx, i.file, keep); err != nil {
		return err
	}
	n, err := io.CopyBuffer(writeFunc(i.file.write), io.LimitReader(r, i.size-keep), make([]byte, chunk))
	if err == nil && keep+n < i.size {
		err = io.ErrUnexpectedEOF
	}
	return err
}

type writeFunc func([]byte) error

func (w writeFunc) Write(b []byte) (int, error) { return len(b), w(b) }

// Finish gives the file its name, and returns its SHA-256.
func (i *Incoming) Finish() (sum [sha256.Size]byte, err error) {
	sum = [sha256.Size]byte(i.file.sum.Sum(nil))
	_, err = i.tree.dest.finish(i.file)
	return sum, err
}

// Close ends a file that wasn't finished. What is worth it is kept for another
// attempt.
func (i *Incoming) Close() { i.tree.dest.abandon(i.file) }

// Drop removes what there is of a file that wasn't finished.
func (i *Incoming) Drop() { i.tree.dest.drop(i.file) }

// Close gives directories their modes and times.
func (t *Tree) Close() error {
	var errs []error
	for _, made := range slices.Backward(t.made) {
		if err := t.dest.finishDir(made); err != nil {
			errs = append(errs, fmt.Errorf("%s: mode or times can't be kept: %s", t.dest.label(made.path), reason(err)))
		}
	}
	t.dest.close()
	return errors.Join(errs...)
}

// Name returns the name that a source gives its copy: "" if it is the contents
// of a directory.
func Name(source string) string { return topName(source) }

// Reason is an error's text for a message that names the file.
func Reason(err error) string { return reason(err) }
