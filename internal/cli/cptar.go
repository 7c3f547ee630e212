package cli

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	utilexec "k8s.io/utils/exec"

	"aaserver.io/aaserver/internal/files"
)

// copyByTar copies to or from a target that has nothing of ours, by the programs
// that it does have. A large file that broke off on its way here goes on where
// it was; everything else begins anew.
func (o *cpOptions) copyByTar(ctx context.Context, show *copyDisplay) error {
	t := &tarCopy{cpOptions: o, show: show}
	// All programs have to see the same files.
	if o.instance == "" {
		o.instance = o.pick(ctx)
	}
	failed := 0
	for best := int64(-1); ; {
		t.progress, t.failed, t.sums, t.came = show.begin(), 0, nil, make(map[string]bool)
		err := t.attempt(ctx)
		if err == nil {
			err = t.verify(ctx)
		}
		if err == nil {
			show.failed = t.failed
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if fatal := (*files.FatalError)(nil); errors.As(err, &fatal) || errors.Is(err, errFinal) || !t.met || !transient(err) {
			return err
		}
		failed++
		if done := t.progress.Bytes.Load(); done > best {
			best, failed = done, min(failed, 1)
		}
		if failed > o.retries {
			return fmt.Errorf("gave up: %w", err)
		}
		pause := min(retryBase<<min(failed-1, 10), retryMax)
		show.note("%v; trying again in %v", err, pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// errFinal marks what another attempt wouldn't change.
var errFinal = errors.New("the copy can't be made")

func finalf(format string, args ...any) error {
	return finalError{fmt.Sprintf(format, args...)}
}

type finalError struct{ text string }

func (e finalError) Error() string        { return e.text }
func (e finalError) Is(target error) bool { return target == errFinal }

type tarCopy struct {
	*cpOptions
	show     *copyDisplay
	progress *files.Progress
	failed   int64
	// met says that the target has run a program.
	met bool
	// sums are of the regular files that were copied, by their paths on the
	// target.
	sums []tarSum
	// came are the regular files that an attempt has unpacked: others may be links
	// to them.
	came map[string]bool
	// exact says that the destination is the copy itself: it was made by an
	// attempt before.
	exact bool
}

type tarSum struct {
	path string
	sum  [sha256.Size]byte
}

func (t *tarCopy) problem(name, format string, args ...any) {
	t.failed++
	t.show.problem(files.Problem{Path: name, Text: fmt.Sprintf(format, args...)})
}

func (t *tarCopy) warn(name, format string, args ...any) {
	t.show.problem(files.Problem{Path: name, Text: fmt.Sprintf(format, args...), Warning: true})
}

// program runs a program on the target to its end, and returns its exit code and
// the beginning of what it printed.
func (t *tarCopy) program(ctx context.Context, stdin io.Reader, command ...string) (code int, out string, err error) {
	var stdout bytes.Buffer
	err = t.duplex(ctx, command, func(ctx context.Context, in io.ReadCloser, w io.Writer) error {
		fed := make(chan error, 1)
		go func() {
			var err error
			if stdin != nil {
				_, err = io.Copy(w, stdin)
			}
			w.(io.Closer).Close()
			fed <- err
		}()
		_, err := io.Copy(&stdout, io.LimitReader(in, 1<<20))
		if err == nil {
			_, err = io.Copy(io.Discard, in)
		}
		in.Close()
		if fedErr := <-fed; err == nil && fedErr != nil && !errors.Is(fedErr, io.ErrClosedPipe) {
			err = fedErr
		}
		return errors.Join(err, errNeedsExit)
	})
	if exit := utilexec.ExitError(nil); errors.As(err, &exit) {
		t.met = true
		return exit.ExitStatus(), stdout.String(), nil
	}
	if errors.Is(err, errNeedsExit) {
		t.met = true
		return 0, stdout.String(), nil
	}
	return -1, "", err
}

// errNeedsExit has duplex prefer how the command has ended to how the talk has.
var errNeedsExit = errors.New("the command has ended")

// isDir says whether a path on the target is a directory.
func (t *tarCopy) isDir(ctx context.Context, name string) (bool, error) {
	code, _, err := t.program(ctx, nil, "test", "-d", name)
	if err != nil && !unknownCommand(err) || code == 0 {
		return code == 0, err
	}
	if err != nil || code == 126 || code == 127 {
		return false, finalf("target %s has neither a part of aaserver beside it nor the programs test and tar, which cp needs", t.ref)
	}
	return false, nil
}

// replaceable fails if a file on the target would take the place of a device, a
// named pipe or a socket, which tar removes without asking.
func (t *tarCopy) replaceable(ctx context.Context) error {
	for _, test := range []string{"-e", "-f"} {
		code, _, err := t.program(ctx, nil, "test", test, t.remote)
		if err != nil {
			return err
		}
		if code != 0 && test == "-e" || code == 0 && test == "-f" {
			return nil
		}
	}
	return finalf("on target %s: %s: there is a device, a named pipe or a socket, which isn't replaced", t.ref, t.remote)
}

func (t *tarCopy) attempt(ctx context.Context) error {
	remoteIsDir, err := t.isDir(ctx, t.remote)
	if err != nil {
		return err
	}
	if t.upload {
		return t.sendTar(ctx, remoteIsDir)
	}
	return t.receiveTar(ctx, remoteIsDir)
}

// tarPath keeps a path from being taken for an option.
func tarPath(name string) string {
	if strings.HasPrefix(name, "-") {
		return "./" + name
	}
	return name
}

// sendTar has tar on the target unpack what is sent.
func (t *tarCopy) sendTar(ctx context.Context, remoteIsDir bool) error {
	info, err := os.Stat(t.local)
	if err != nil {
		return finalf("%s: %s", t.local, files.Reason(err))
	}
	name, dir, base := files.Name(t.local), t.remote, ""
	switch {
	case !info.IsDir() && !info.Mode().IsRegular():
		return finalf("%s: it is neither a file nor a directory", t.local)
	case remoteIsDir && name != "" && !t.exact:
		base = name
	case remoteIsDir && name == "":
		base = "."
	case !info.IsDir() && strings.HasSuffix(t.remote, "/"):
		return finalf("%s: there is no such directory", t.remote)
	default:
		dir, base = path.Split(path.Clean(t.remote))
		if dir == "" {
			dir = "."
		}
		t.exact = info.IsDir() && name != ""
		if !info.IsDir() {
			if err := t.replaceable(ctx); err != nil {
				return err
			}
		}
	}
	// Files have the user's own modes and nobody's owner.
	err = t.duplex(ctx, []string{"tar", "-xpof", "-", "-C", tarPath(dir)}, func(ctx context.Context, in io.ReadCloser, out io.Writer) error {
		said := make(chan struct{})
		go func() {
			defer close(said)
			_, _ = io.Copy(io.Discard, in)
		}()
		w := tar.NewWriter(out)
		err := t.pack(ctx, w, info, dir, base)
		if err == nil {
			err = w.Close()
		}
		out.(io.Closer).Close()
		if err != nil {
			// What it has was cut off: it isn't taken for the whole.
			in.Close()
			<-said
			return err
		}
		<-said
		return errNeedsExit
	})
	return t.tarEnded(err)
}

// tarEnded tells of how tar has ended.
func (t *tarCopy) tarEnded(err error) error {
	if errors.Is(err, errNeedsExit) {
		return nil
	}
	if exit := utilexec.ExitError(nil); errors.As(err, &exit) {
		switch code := exit.ExitStatus(); {
		case code == 126 || code == 127:
			return finalf("target %s has neither a part of aaserver beside it nor the program tar, which cp needs", t.ref)
		case code < 128:
			// It goes on after most errors.
			t.problem("tar on the target", "%s", strings.TrimPrefix(err.Error(), "command terminated with "))
			return nil
		}
	}
	if unknownCommand(err) {
		return finalf("target %s has neither a part of aaserver beside it nor the program tar, which cp needs", t.ref)
	}
	return err
}

// pack writes an archive of the local file or directory, whose entries are below
// base.
func (t *tarCopy) pack(ctx context.Context, w *tar.Writer, info fs.FileInfo, dir, base string) error {
	if !info.IsDir() {
		f, err := os.Open(t.local)
		if err != nil {
			return finalf("%s: %s", t.local, files.Reason(err))
		}
		return t.packFile(ctx, w, f, path.Join(dir, base), base)
	}
	root, err := os.OpenRoot(t.local)
	if err != nil {
		return finalf("%s: %s", t.local, files.Reason(err))
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(name string, e fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		label := path.Join(t.local, name)
		var info fs.FileInfo
		if err == nil {
			info, err = root.Lstat(filepath.FromSlash(name))
		}
		if err != nil {
			t.problem(label, "%s", files.Reason(err))
			return nil
		}
		entry := path.Join(base, name)
		switch {
		case name == "." && base == ".":
			return nil // the directory is the target's own
		case info.IsDir():
			return t.header(w, info, entry+"/", "")
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := root.Readlink(filepath.FromSlash(name))
			if err != nil {
				t.problem(label, "%s", files.Reason(err))
				return nil
			}
			return t.header(w, info, entry, target)
		case !info.Mode().IsRegular():
			t.warn(label, "left out: not a file")
			return nil
		}
		f, err := root.Open(filepath.FromSlash(name))
		if err != nil {
			t.problem(label, "%s", files.Reason(err))
			return nil
		}
		return t.packFile(ctx, w, f, path.Join(dir, base, name), entry)
	})
}

func (t *tarCopy) header(w *tar.Writer, info fs.FileInfo, name, link string) error {
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return err
	}
	header.Name = name
	header.Uid, header.Gid, header.Uname, header.Gname = 0, 0, "", ""
	header.AccessTime, header.ChangeTime = time.Time{}, time.Time{}
	header.Format = tar.FormatPAX // others have whole seconds only
	if !t.attributes.SetID {
		header.Mode &= 0o777
	}
	if t.attributes.Plain {
		header.ModTime = time.Now()
		header.Mode &= 0o755
	}
	return w.WriteHeader(header)
}

// packFile writes a file into an archive. It closes it.
func (t *tarCopy) packFile(ctx context.Context, w *tar.Writer, f *os.File, onTarget, entry string) error {
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		t.problem(f.Name(), "it has become something else")
		return nil
	}
	if err := t.header(w, info, entry, ""); err != nil {
		return err
	}
	t.progress.Current.Store(f.Name())
	sum := sha256.New()
	n, err := io.CopyBuffer(w, &counted{io.TeeReader(io.LimitReader(f, info.Size()), sum), t.progress, ctx}, make([]byte, 128<<10))
	if err != nil {
		return err
	}
	if n < info.Size() {
		t.problem(f.Name(), "it shrank from %d to %d bytes while it was copied", info.Size(), n)
		_, err := io.CopyN(w, zeros{}, info.Size()-n)
		return err
	}
	if now, err := f.Stat(); err == nil && now.Size() > info.Size() {
		t.warn(f.Name(), "it grew while it was copied: the copy has the first %d bytes", n)
	} else if err != nil || !now.ModTime().Equal(info.ModTime()) {
		t.problem(f.Name(), "it changed while it was copied: the copy may be neither the old nor the new")
	}
	t.progress.Files.Add(1)
	t.sums = append(t.sums, tarSum{onTarget, [sha256.Size]byte(sum.Sum(nil))})
	return nil
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// counted counts what is read, until its context ends.
type counted struct {
	io.Reader
	progress *files.Progress
	ctx      context.Context
}

func (c *counted) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	n, err := c.Reader.Read(p)
	c.progress.Bytes.Add(int64(n))
	return n, err
}

// receiveTar unpacks what tar on the target packs.
func (t *tarCopy) receiveTar(ctx context.Context, remoteIsDir bool) error {
	name := files.Name(t.remote)
	opts := files.Options{Path: t.local, Exact: t.exact, Attributes: t.attributes}
	tree, err := files.NewTree(opts, name, remoteIsDir)
	if err != nil {
		return err
	}
	defer func() {
		if err := tree.Close(); err != nil {
			t.warn("times", "%v", err)
		}
	}()
	if root := tree.Root(); root != "" {
		t.local, t.exact = root, true
	}
	command := []string{"tar", "-cf", "-", "-C", tarPath(t.remote), "."}
	if !remoteIsDir {
		dir, base := path.Split(path.Clean(t.remote))
		if dir == "" {
			dir = "."
		}
		// A link that is named itself is followed.
		command = []string{"tar", "-chf", "-", "-C", tarPath(dir), "./" + base}
	}
	resume := (*files.Incoming)(nil)
	defer func() {
		if resume != nil {
			resume.Close()
		}
	}()
	err = t.duplex(ctx, command, func(ctx context.Context, in io.ReadCloser, _ io.Writer) error {
		var err error
		resume, err = t.unpack(ctx, tree, tar.NewReader(in), remoteIsDir)
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, in)
		return errNeedsExit
	})
	if errors.Is(err, errResume) {
		return t.resume(ctx, resume)
	}
	return t.tarEnded(err)
}

// errResume ends tar when there is a better way to get the rest of the file.
var errResume = errors.New("part of the file is there")

// unpack writes what is in an archive. With errResume it returns the file of
// which a part is there.
func (t *tarCopy) unpack(ctx context.Context, tree *files.Tree, r *tar.Reader, isDir bool) (*files.Incoming, error) {
	for n := 0; ; n++ {
		h, err := r.Next()
		if err == io.EOF {
			return nil, nil // if it is empty, tar says why
		}
		if err != nil {
			return nil, err
		}
		t.met = true
		name := path.Clean(h.Name)
		if !isDir {
			if n > 0 {
				return nil, finalf("tar on the target sent more than one file")
			}
			name = "."
		} else if !filepath.IsLocal(name) && name != "." || strings.HasPrefix(h.Name, "/") {
			t.problem(h.Name, "left out: it would be outside of the copy")
			continue
		}
		label := tree.Label(name)
		if h.Typeflag == tar.TypeGNUSparse || sparse(h) {
			// A few bytes of it could fill the disk. tar makes them only if asked to.
			t.problem(label, "left out: it comes as a sparse file")
			continue
		}
		t.progress.Current.Store(label)
		mode := fs.FileMode(h.Mode).Perm() | h.FileInfo().Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeSticky)
		switch h.Typeflag {
		case tar.TypeDir:
			err = tree.Dir(name, mode, h.ModTime)
		case tar.TypeSymlink:
			err = tree.Link(name, h.Linkname, h.ModTime)
		case tar.TypeReg:
			var f *files.Incoming
			if f, err = tree.File(ctx, name, mode, h.ModTime, h.Size); err != nil {
				break
			}
			if have, sum := f.Have(); !isDir && have > 0 {
				if t.same(ctx, have, sum) {
					return f, errResume
				}
			}
			if err := f.Fill(ctx, 0, &counted{r, t.progress, ctx}); err != nil {
				f.Close()
				if local := (*fs.PathError)(nil); errors.As(err, &local) {
					err = finalf("%s: %s", label, files.Reason(err))
				}
				return nil, err
			}
			err = t.finish(f, name)
		case tar.TypeLink:
			err = t.again(ctx, tree, name, h)
		default:
			t.warn(label, "left out: not a file")
			continue
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err != nil {
			t.problem(label, "%s", files.Reason(err))
			continue
		}
		if h.Typeflag == tar.TypeReg {
			t.came[name] = true
		}
	}
}

func sparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// again copies a file that the archive has under another name already, to which
// it was linked.
func (t *tarCopy) again(ctx context.Context, tree *files.Tree, name string, h *tar.Header) error {
	linked := path.Clean(h.Linkname)
	if !t.came[linked] {
		// What is here by that name is none of the target's.
		return errors.New("what it is a link to didn't arrive")
	}
	first, err := tree.Open(linked)
	if err != nil {
		return err
	}
	defer first.Close()
	info, err := first.Stat()
	if err != nil {
		return err
	}
	f, err := tree.File(ctx, name, info.Mode(), info.ModTime(), info.Size())
	if err != nil {
		return err
	}
	if err := f.Fill(ctx, 0, first); err != nil {
		f.Drop()
		return err
	}
	return t.finish(f, name)
}

func (t *tarCopy) finish(f *files.Incoming, name string) error {
	sum, err := f.Finish()
	if err != nil {
		f.Drop()
		return err
	}
	t.progress.Files.Add(1)
	t.sums = append(t.sums, tarSum{path.Join(t.remote, name), sum})
	return nil
}

// same says whether the remote file begins with what is here.
func (t *tarCopy) same(ctx context.Context, have int64, sum []byte) bool {
	code, out, err := t.program(ctx, nil, "sh", "-c", `head -c "$1" -- "$2" | sha256sum`, "sh", strconv.FormatInt(have, 10), t.remote)
	return err == nil && code == 0 && strings.HasPrefix(out, hex.EncodeToString(sum))
}

// resume gets the rest of a file.
func (t *tarCopy) resume(ctx context.Context, f *files.Incoming) error {
	have, _ := f.Have()
	t.progress.Present.Add(have)
	t.progress.Bytes.Add(have)
	err := t.duplex(ctx, []string{"tail", "-c", "+" + strconv.FormatInt(have+1, 10), "--", t.remote}, func(ctx context.Context, in io.ReadCloser, _ io.Writer) error {
		return f.Fill(ctx, have, &counted{in, t.progress, ctx})
	})
	if err != nil {
		return err
	}
	return t.finish(f, ".")
}

// verify compares the copies with the originals, where the target can.
func (t *tarCopy) verify(ctx context.Context) error {
	if len(t.sums) == 0 {
		return nil
	}
	var list bytes.Buffer
	for _, s := range t.sums {
		if strings.ContainsAny(s.path, "\n\r\\") {
			t.warn(s.path, "sha256sum on the target can't be told this name: it isn't verified")
			continue
		}
		fmt.Fprintf(&list, "%x  %s\n", s.sum, tarPath(s.path))
	}
	code, out, err := t.program(ctx, &list, "sha256sum", "-c", "-")
	switch {
	case err != nil && unknownCommand(err), code == 126 || code == 127:
		t.warn("cp", "target %s has no program sha256sum: the copy isn't verified", t.ref)
		return nil
	case err != nil:
		return err
	case code == 0:
		return nil
	}
	told := false
	for line := range strings.Lines(out) {
		if name, ok := strings.CutSuffix(strings.TrimSpace(line), ": FAILED"); ok {
			t.problem(name, "its SHA-256 isn't that of the other side: it changed, or was damaged on the way")
			told = true
		}
	}
	if !told {
		t.problem("sha256sum on the target", "it failed with exit code %d: the copy isn't verified", code)
	}
	return nil
}
