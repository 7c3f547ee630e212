//go:build linux

package files

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	syscall.Umask(0o022)
	goleak.VerifyTestMain(m)
}

// tempDir returns a directory that is removed whatever modes there are in it.
func tempDir(t testing.TB) string {
	dir := t.TempDir()
	t.Cleanup(func() {
		_ = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				_ = os.Chmod(path, 0o700)
			}
			return nil
		})
	})
	return dir
}

// wire joins two ends by a pair of pipes that break together, after a number of
// bytes if that isn't negative.
type wire struct {
	left atomic.Int64
	ends []*io.PipeWriter
	outs []*io.PipeReader
}

var errCut = errors.New("cut")

func (w *wire) cut() {
	for i := range w.ends {
		w.ends[i].CloseWithError(errCut)
		w.outs[i].CloseWithError(errCut)
	}
}

type wireEnd struct {
	*io.PipeWriter
	w *wire
}

func (e wireEnd) Write(p []byte) (int, error) {
	if left := e.w.left.Add(-int64(len(p))); left < 0 {
		p = p[:max(0, int64(len(p))+left)]
		n, _ := e.PipeWriter.Write(p)
		e.w.cut()
		return n, errCut
	}
	return e.PipeWriter.Write(p)
}

// outcome is how both ends of a copy ended.
type outcome struct {
	sent, received      Result
	sendErr, receiveErr error
	problems            []string
}

// transfer copies with a connection that breaks after so many bytes.
func transfer(t testing.TB, send, receive Options, breakAfter int64) outcome {
	t.Helper()
	toReceiver, fromSender := io.Pipe()
	toSender, fromReceiver := io.Pipe()
	w := &wire{ends: []*io.PipeWriter{fromSender, fromReceiver}, outs: []*io.PipeReader{toReceiver, toSender}}
	if w.left.Store(breakAfter); breakAfter < 0 {
		w.left.Store(1 << 62)
	}
	var o outcome
	var mu sync.Mutex
	if send.Report == nil && receive.Report == nil {
		send.Report = func(p Problem) {
			mu.Lock()
			defer mu.Unlock()
			text := p.Path + ": " + p.Text
			if p.Warning {
				text = "warning: " + text
			}
			o.problems = append(o.problems, text)
		}
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.received, o.receiveErr = Receive(t.Context(), toReceiver, wireEnd{fromReceiver, w}, receive)
		fromReceiver.Close()
	}()
	o.sent, o.sendErr = Send(t.Context(), toSender, wireEnd{fromSender, w}, send)
	fromSender.Close()
	<-done
	slices.Sort(o.problems)
	return o
}

// copyAll is a transfer that must succeed.
func copyAll(t testing.TB, send, receive Options) outcome {
	t.Helper()
	o := transfer(t, send, receive, -1)
	if o.sendErr != nil || o.receiveErr != nil {
		t.Fatalf("sender: %v; receiver: %v", o.sendErr, o.receiveErr)
	}
	return o
}

// snapshot describes everything below a directory, or a file.
func snapshot(t testing.TB, name string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(name, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(name, path)
		text := fmt.Sprint(info.Mode(), " ", info.ModTime().UnixNano())
		switch {
		case info.Mode().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			text += fmt.Sprintf(" %d %x", len(b), sha256.Sum256(b))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			text += " -> " + target
		}
		all[rel] = text
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func write(t testing.TB, name, contents string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(contents), 0o644); err != nil {
		t.Fatal(err)
	}
}

// plant makes a tree of every kind of entry.
func plant(t testing.TB, root string, seed uint64) {
	t.Helper()
	random := rand.New(rand.NewPCG(seed, 7))
	names := []string{"a", "b c", "new\nline", "not\xffutf8", "-rf", strings.Repeat("n", 255), "ü", "*", ".hidden", "\\back", "'quote\""}
	stamp := func() time.Time { return time.Unix(random.Int64N(2e9), random.Int64N(1e9)) }
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	type made struct {
		path string
		mode fs.FileMode
		time time.Time
	}
	var dirs []made
	var fill func(dir string, depth int)
	fill = func(dir string, depth int) {
		check(os.Mkdir(dir, 0o755))
		for i := range 3 + random.IntN(8) {
			name := filepath.Join(dir, names[(i+int(seed))%len(names)])
			switch kind := random.IntN(10); {
			case kind < 2 && depth < 3:
				fill(name, depth+1)
			case kind < 4:
				check(os.Symlink([]string{"a", "../../../..", "/etc/passwd", "nowhere", "."}[random.IntN(5)], name))
				check(setLinkTimeAt(dir, filepath.Base(name), stamp()))
			default:
				size := []int{0, 1, 100, 5000, chunk, chunk + 1, random.IntN(3 * partialMin), 10, 50, 90, 700, 20_000}[random.IntN(12)]
				b := make([]byte, size)
				rand.NewChaCha8([32]byte{byte(i), byte(size), byte(seed)}).Read(b)
				check(os.WriteFile(name, b, 0o600))
				check(os.Chmod(name, fs.FileMode(random.IntN(0o1000))|0o400))
				check(os.Chtimes(name, time.Time{}, stamp()))
			}
		}
		dirs = append(dirs, made{dir, fs.FileMode(random.IntN(0o1000)) | 0o500, stamp()})
	}
	fill(root, 0)
	for _, d := range dirs {
		check(os.Chtimes(d.path, time.Time{}, d.time))
		check(os.Chmod(d.path, d.mode))
	}
}

func setLinkTimeAt(dir, name string, stamp time.Time) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return setLinkTime(root, name, stamp)
}

func TestTreesArriveAsTheyAre(t *testing.T) {
	for seed := range uint64(10) {
		dir := tempDir(t)
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		plant(t, src, seed)
		o := copyAll(t, Options{Path: src}, Options{Path: dst})
		want := snapshot(t, src)
		if diff := cmp.Diff(want, snapshot(t, dst)); diff != "" {
			t.Fatalf("seed %d: the copy differs (-want +got):\n%s", seed, diff)
		}
		files := int64(0)
		for _, text := range want {
			if strings.HasPrefix(text, "-") {
				files++
			}
		}
		if o.problems != nil || o.sent.Files != files || o.received.Failed != 0 {
			t.Errorf("seed %d: %d of %d files, problems %q", seed, o.sent.Files, files, o.problems)
		}
		// Again, nothing has to be sent.
		var progress Progress
		again := copyAll(t, Options{Path: src, Progress: &progress, Count: true}, Options{Path: dst, Exact: true})
		if progress.Present.Load() != o.sent.Bytes || progress.Bytes.Load() != o.sent.Bytes || again.sent.Bytes != o.sent.Bytes {
			t.Errorf("seed %d: the second time %d of %d bytes were there already", seed, progress.Present.Load(), o.sent.Bytes)
		}
		if diff := cmp.Diff(want, snapshot(t, dst)); diff != "" {
			t.Fatalf("seed %d: the second copy differs (-want +got):\n%s", seed, diff)
		}
	}
}

func TestCopiesGoOnAfterEachBreakUntilTheyAreDone(t *testing.T) {
	for seed := range uint64(10) {
		random := rand.New(rand.NewPCG(seed, 1))
		dir := tempDir(t)
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		plant(t, src, seed)
		want := snapshot(t, src)
		receive := Options{Path: dst}
		for attempt := 0; ; attempt++ {
			if attempt == 1000 {
				t.Fatalf("seed %d: it doesn't come to an end", seed)
			}
			// What is sent of a large file has to exceed what is thrown away.
			after := random.Int64N(4 * partialMin)
			if attempt%3 == 0 {
				after = random.Int64N(3000)
			}
			o := transfer(t, Options{Path: src}, receive, after)
			for _, err := range []error{o.sendErr, o.receiveErr} {
				if fatal := (*FatalError)(nil); errors.As(err, &fatal) {
					t.Fatalf("seed %d, break after %d bytes: %v", seed, after, err)
				}
			}
			if o.sent.Root != "" {
				receive.Path, receive.Exact = o.sent.Root, true
			}
			if o.problems != nil {
				t.Fatalf("seed %d: %q", seed, o.problems)
			}
			if o.sendErr == nil {
				break
			}
		}
		if diff := cmp.Diff(want, snapshot(t, dst)); diff != "" {
			t.Fatalf("seed %d: the copy differs (-want +got):\n%s", seed, diff)
		}
	}
}

func TestWhatIsThereOfALargeFileIsNotSentAgain(t *testing.T) {
	dir := tempDir(t)
	src, dst := filepath.Join(dir, "big"), filepath.Join(dir, "copy")
	b := make([]byte, 20<<20)
	rand.NewChaCha8([32]byte{1}).Read(b)
	write(t, src, string(b))
	if o := transfer(t, Options{Path: src}, Options{Path: dst}, 12<<20); o.sendErr == nil || o.receiveErr == nil {
		t.Fatal("a copy over a broken connection succeeded")
	}
	if _, err := os.Stat(dst); err == nil {
		t.Error("a partial copy has the file's name")
	}
	var progress Progress
	copyAll(t, Options{Path: src, Progress: &progress}, Options{Path: dst})
	if there := progress.Present.Load(); there < 11<<20 {
		t.Errorf("%d bytes were there, want about 12 MiB", there)
	}
	if diff := cmp.Diff(snapshot(t, src), snapshot(t, dst)); diff != "" {
		t.Errorf("the copy differs (-want +got):\n%s", diff)
	}
	left, err := filepath.Glob(filepath.Join(dir, partialPrefix+"*"))
	if err != nil || left != nil {
		t.Errorf("left over: %q", left)
	}

	// A part of something else is of no use.
	b[0]++
	write(t, filepath.Join(dir, partialOf("copy")), string(b[:5<<20]))
	os.Remove(dst)
	progress = Progress{}
	copyAll(t, Options{Path: src, Progress: &progress}, Options{Path: dst})
	if there := progress.Present.Load(); there != 0 {
		t.Errorf("%d bytes of another file were kept", there)
	}
	if diff := cmp.Diff(snapshot(t, src), snapshot(t, dst)); diff != "" {
		t.Errorf("the copy differs (-want +got):\n%s", diff)
	}
}

func TestDestination(t *testing.T) {
	// The source is a directory "d" with a file "f", or the file "d/f" alone.
	tests := map[string]struct {
		there     func(t *testing.T, dir string)
		src, dst  string
		want      string // where f is
		wantFatal string
	}{
		"a directory becomes what doesn't exist":                {src: "d", dst: "new", want: "new/f"},
		"a slash at its end makes no difference":                {src: "d/", dst: "new/", want: "new/f"},
		"a directory goes into one that exists":                 {src: "d", dst: "old", want: "old/d/f"},
		"its contents go there alone":                           {src: "d/.", dst: "old", want: "old/f"},
		"its contents become what doesn't exist":                {src: "d/.", dst: "new", want: "new/f"},
		"a file becomes what doesn't exist":                     {src: "d/f", dst: "new", want: "new"},
		"a file goes into a directory that exists":              {src: "d/f", dst: "old", want: "old/f"},
		"a file replaces a file":                                {src: "d/f", dst: "file", want: "file"},
		"a link to a directory is that directory":               {src: "d/f", dst: "link", want: "old/f"},
		"a file replaces what a link leads to":                  {src: "d/f", dst: "filelink", want: "file"},
		"a link that is named itself is followed":               {src: "dlink", dst: "new", want: "new/f"},
		"and so is one to a file":                               {src: "flink", dst: "old", want: "old/flink"},
		"a file needs the directory before the slash":           {src: "d/f", dst: "new/", wantFatal: "there is no such directory"},
		"the directory above must exist":                        {src: "d", dst: "x/y", wantFatal: "there is no directory"},
		"a directory doesn't replace a file":                    {src: "d", dst: "file", wantFatal: "a directory can't replace"},
		"nor the file of its name":                              {src: "d", dst: "occupied", wantFatal: "a directory can't replace"},
		"a link to nowhere isn't written through":               {src: "d/f", dst: "dangling", wantFatal: "symbolic link to what doesn't exist"},
		"nor is one of the copy's name, if it is a directory's": {src: "d", dst: "trap", wantFatal: "nothing is copied through one"},
		"a source must exist":                                   {src: "none", dst: "new", wantFatal: "no such file"},
		"a source must be a file or directory":                  {src: "pipe", dst: "new", wantFatal: "neither a file nor a directory"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			write(t, filepath.Join(dir, "d/f"), "contents")
			write(t, filepath.Join(dir, "file"), "before")
			write(t, filepath.Join(dir, "occupied/d"), "before")
			os.Mkdir(filepath.Join(dir, "old"), 0o755)
			os.Mkdir(filepath.Join(dir, "trap"), 0o755)
			os.Symlink("..", filepath.Join(dir, "trap/d"))
			for link, target := range map[string]string{"link": "old", "filelink": "file", "dangling": "nowhere", "dlink": "d", "flink": "d/f"} {
				if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
					t.Fatal(err)
				}
			}
			if err := syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600); err != nil {
				t.Fatal(err)
			}
			o := transfer(t, Options{Path: dir + "/" + test.src}, Options{Path: dir + "/" + test.dst}, -1)
			if test.wantFatal != "" {
				var fatal *FatalError
				if !errors.As(o.sendErr, &fatal) || !strings.Contains(fatal.Text, test.wantFatal) {
					t.Errorf("error %v, want %q", o.sendErr, test.wantFatal)
				}
				return
			}
			if o.sendErr != nil || o.receiveErr != nil || o.problems != nil {
				t.Fatalf("sender: %v; receiver: %v; problems: %q", o.sendErr, o.receiveErr, o.problems)
			}
			if b, err := os.ReadFile(filepath.Join(dir, test.want)); err != nil || string(b) != "contents" {
				t.Errorf("%s is %q, %v", test.want, b, err)
			}
		})
	}
}

func TestWhatGoesWrongIsToldAndTheRestArrives(t *testing.T) {
	dir := tempDir(t)
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	for _, name := range []string{"ok", "taken", "sub/ok", "linked/in", "occupied/in"} {
		write(t, filepath.Join(src, name), name)
	}
	if err := syscall.Mkfifo(filepath.Join(src, "pipe"), 0o600); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(src, partialOf("ok")), "part")
	os.Symlink("x", filepath.Join(src, "link"))
	os.MkdirAll(filepath.Join(dst, "src/taken"), 0o755)
	os.MkdirAll(filepath.Join(dst, "src/link"), 0o755)
	os.Symlink(dir, filepath.Join(dst, "src/linked"))
	write(t, filepath.Join(dst, "src/occupied"), "")
	want := []string{
		"src/link: there is a directory, which a symbolic link can't replace",
		"src/linked: there is a symbolic link, and nothing is copied through one",
		"src/occupied: there is a file, which a directory can't replace",
		"src/taken: there is a directory, which a file can't replace",
		"warning: src/" + partialOf("ok") + ": left out: an unfinished copy",
		"warning: src/pipe: left out: a named pipe",
	}
	for side, report := range map[string]bool{"the sender's user": true, "the receiver's user": false} {
		var o outcome
		if report {
			o = copyAll(t, Options{Path: src}, Options{Path: dst})
		} else {
			var got []string
			o = copyAll(t, Options{Path: src}, Options{Path: dst, Report: func(p Problem) {
				text := p.Path + ": " + p.Text
				if p.Warning {
					text = "warning: " + text
				}
				got = append(got, text)
			}})
			slices.Sort(got)
			o.problems = got
		}
		if diff := cmp.Diff(want, o.problems); diff != "" {
			t.Errorf("problems that %s sees (-want +got):\n%s", side, diff)
		}
		if report && o.sent.Failed != 4 || !report && o.received.Failed != 4 {
			t.Errorf("%s: failed %d and %d, want 4", side, o.sent.Failed, o.received.Failed)
		}
		for _, name := range []string{"ok", "sub/ok"} {
			if b, err := os.ReadFile(filepath.Join(dst, "src", name)); err != nil || string(b) != name {
				t.Errorf("%s is %q, %v", name, b, err)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, "in")); err == nil {
			t.Error("something was written through a link")
		}
	}
}

func TestAttributes(t *testing.T) {
	old := time.Unix(1e9, 5)
	tests := map[string]struct {
		attributes       Attributes
		wantFile, wantIn fs.FileMode
		wantOld          bool
	}{
		"modes and times are kept, but not what makes others act as the owner": {
			wantFile: 0o775, wantIn: fs.ModeDir | 0o577, wantOld: true},
		"that is kept when asked for": {
			attributes: Attributes{SetID: true}, wantFile: 0o775 | fs.ModeSetuid, wantIn: fs.ModeDir | 0o577 | fs.ModeSticky, wantOld: true},
		"the umask and the time of the copy decide when nothing is kept": {
			attributes: Attributes{Plain: true}, wantFile: 0o755, wantIn: fs.ModeDir | 0o555},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
			write(t, filepath.Join(src, "in/f"), "x")
			os.Chmod(filepath.Join(src, "in/f"), 0o775|fs.ModeSetuid)
			os.Chtimes(filepath.Join(src, "in/f"), old, old)
			os.Chtimes(filepath.Join(src, "in"), old, old)
			os.Chmod(filepath.Join(src, "in"), 0o577|fs.ModeSticky)
			copyAll(t, Options{Path: src}, Options{Path: dst, Attributes: test.attributes})
			f, err := os.Stat(filepath.Join(dst, "in/f"))
			if err != nil {
				t.Fatal(err)
			}
			in, err := os.Stat(filepath.Join(dst, "in"))
			if err != nil {
				t.Fatal(err)
			}
			if f.Mode() != test.wantFile || in.Mode() != test.wantIn {
				t.Errorf("modes %v and %v, want %v and %v", f.Mode(), in.Mode(), test.wantFile, test.wantIn)
			}
			if f.ModTime().Equal(old) != test.wantOld || in.ModTime().Equal(old) != test.wantOld {
				t.Errorf("times %v and %v, want the source's: %v", f.ModTime(), in.ModTime(), test.wantOld)
			}
		})
	}
}

func TestFilesThatChangeAreReported(t *testing.T) {
	tests := map[string]struct {
		change      func(name string) error
		want        string
		wantContent int
	}{
		"it grows": {
			change: func(name string) error {
				f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
				if err != nil {
					return err
				}
				defer f.Close()
				_, err = f.WriteString("more")
				return err
			},
			want:        "warning: f: it grew while it was copied: the copy has the first 4194304 bytes",
			wantContent: 4 << 20,
		},
		"it shrinks": {
			change:      func(name string) error { return os.Truncate(name, 1000) },
			want:        "f: it shrank from 4194304 to",
			wantContent: -1,
		},
		"it is written again": {
			change:      func(name string) error { return os.Chtimes(name, time.Time{}, time.Unix(1, 0)) },
			want:        "f: it changed while it was copied",
			wantContent: 4 << 20,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := tempDir(t)
			src, dst := filepath.Join(dir, "f"), filepath.Join(dir, "copy")
			write(t, src, strings.Repeat("x", 4<<20))
			toReceiver, fromSender := io.Pipe()
			toSender, fromReceiver := io.Pipe()
			var problems []string
			var sent Result
			var sendErr error
			done := make(chan struct{})
			go func() {
				defer close(done)
				sent, sendErr = Send(t.Context(), toSender, fromSender, Options{Path: src, Report: func(p Problem) {
					text := p.Path + ": " + p.Text
					if p.Warning {
						text = "warning: " + text
					}
					problems = append(problems, text)
				}})
				fromSender.Close()
			}()
			// The pipes hold nothing back, so that the sender is in the middle of
			// the file when that much has come through.
			in := &atByte{Reader: toReceiver, at: 1 << 20, do: func() {
				if err := test.change(src); err != nil {
					t.Error(err)
				}
			}}
			_, err := Receive(t.Context(), in, fromReceiver, Options{Path: dst})
			fromReceiver.Close()
			toReceiver.Close()
			<-done
			if err != nil || sendErr != nil {
				t.Fatalf("receiver: %v; sender: %v", err, sendErr)
			}
			if len(problems) != 1 || !strings.HasPrefix(problems[0], test.want) {
				t.Errorf("problems %q, want %q", problems, test.want)
			}
			if wantFailed := int64(1); strings.HasPrefix(test.want, "warning") == (sent.Failed == wantFailed) {
				t.Errorf("failed: %d", sent.Failed)
			}
			size := -1
			if info, err := os.Stat(dst); err == nil {
				size = int(info.Size())
			}
			if size != test.wantContent {
				t.Errorf("%d bytes arrived, want %d", size, test.wantContent)
			}
		})
	}
}

// atByte does something once so much has been read.
type atByte struct {
	io.Reader
	at int
	do func()
}

func (a *atByte) Read(p []byte) (int, error) {
	n, err := a.Reader.Read(p)
	if a.at -= n; a.at <= 0 && a.do != nil {
		a.do()
		a.do = nil
	}
	return n, err
}

func (a *atByte) Close() error { return nil }

func TestFilesOfProcHaveContents(t *testing.T) {
	if _, err := os.Stat("/proc/self/status"); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dst := filepath.Join(t.TempDir(), "version")
	if o := copyAll(t, Options{Path: "/proc/version"}, Options{Path: dst}); o.problems != nil {
		t.Errorf("problems %q", o.problems)
	}
	want, _ := os.ReadFile("/proc/version")
	if got, err := os.ReadFile(dst); err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %q, %v, want %q", got, err, want)
	}
}

func TestDeepTreesStopAtTheLimit(t *testing.T) {
	dir := tempDir(t)
	at := filepath.Join(dir, "src")
	deepest := ""
	for i := range MaxDepth + 10 {
		if err := os.Mkdir(at, 0o755); err != nil {
			t.Fatal(err)
		}
		if i == MaxDepth-1 {
			write(t, filepath.Join(at, "f"), "deep")
			deepest, _ = filepath.Rel(filepath.Join(dir, "src"), filepath.Join(at, "f"))
		}
		at = filepath.Join(at, "d")
	}
	dst := filepath.Join(dir, "dst")
	o := copyAll(t, Options{Path: filepath.Join(dir, "src")}, Options{Path: dst})
	if len(o.problems) != 1 || !strings.Contains(o.problems[0], "more than 256 directories") || o.sent.Failed != 1 {
		t.Errorf("problems %q", o.problems)
	}
	if b, err := os.ReadFile(filepath.Join(dst, deepest)); err != nil || string(b) != "deep" {
		t.Errorf("the deepest file is %q, %v", b, err)
	}
}

// A part that somebody else left under the name of a partial copy isn't used.
func TestPartsOfOthersAreNotUsed(t *testing.T) {
	dir := tempDir(t)
	src, dst, victim := filepath.Join(dir, "src"), filepath.Join(dir, "dst"), filepath.Join(dir, "victim")
	contents := strings.Repeat("x", 2*partialMin)
	write(t, src, contents)
	for name, plant := range map[string]func(partial string) error{
		"a symbolic link": func(partial string) error { return os.Symlink("victim", partial) },
		"a hard link":     func(partial string) error { return os.Link(victim, partial) },
	} {
		t.Run(name, func(t *testing.T) {
			write(t, victim, strings.Repeat("x", partialMin))
			os.Remove(dst)
			if err := plant(filepath.Join(dir, partialOf("dst"))); err != nil {
				t.Fatal(err)
			}
			o := copyAll(t, Options{Path: src}, Options{Path: dst})
			if b, _ := os.ReadFile(dst); string(b) != contents || o.problems != nil {
				t.Errorf("the copy has %d bytes, problems %q", len(b), o.problems)
			}
			if b, _ := os.ReadFile(victim); string(b) != contents[:partialMin] {
				t.Errorf("a file was written that isn't the copy: it has %d bytes", len(b))
			}
		})
	}
}

// Two that copy to one place take turns, and the file is one of both.
func TestTwoCopiesOfOneFile(t *testing.T) {
	dir := tempDir(t)
	dst := filepath.Join(dir, "dst")
	var both sync.WaitGroup
	for i := range 2 {
		src := filepath.Join(dir, fmt.Sprint("src", i))
		write(t, src, strings.Repeat(fmt.Sprint(i), 3*partialMin))
		both.Go(func() {
			if o := transfer(t, Options{Path: src}, Options{Path: dst}, -1); o.sendErr != nil || o.problems != nil {
				t.Errorf("%v, problems %q", o.sendErr, o.problems)
			}
		})
	}
	both.Wait()
	b, err := os.ReadFile(dst)
	if err != nil || strings.Trim(string(b), "0") != "" && strings.Trim(string(b), "1") != "" || len(b) != 3*partialMin {
		t.Errorf("the file is a mix of both, or none: %d bytes, %v", len(b), err)
	}
}

func TestACancelledCopyEnds(t *testing.T) {
	dir := tempDir(t)
	write(t, filepath.Join(dir, "f"), "x")
	cause := errors.New("enough")
	for name, do := range map[string]func(context.Context, io.ReadCloser, io.Writer, Options) (Result, error){"send": Send, "receive": Receive} {
		ctx, cancel := context.WithCancelCause(context.Background())
		in, other := io.Pipe() // never says anything
		started := make(chan struct{})
		done := make(chan error)
		go func() {
			close(started)
			_, err := do(ctx, in, io.Discard, Options{Path: filepath.Join(dir, "f")})
			done <- err
		}()
		<-started
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("%s: %v, want the cause", name, err)
		}
		other.Close()
	}
}

func TestDiskFull(t *testing.T) {
	dir := tempDir(t)
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=2m"); err != nil {
		if os.Getenv("CI") != "" && os.Getuid() == 0 {
			t.Fatal(err)
		}
		t.Skip("a small file system can't be mounted: ", err)
	}
	defer syscall.Unmount(dir, syscall.MNT_DETACH)
	src := filepath.Join(t.TempDir(), "src")
	write(t, src, strings.Repeat("x", 8<<20))
	o := transfer(t, Options{Path: src}, Options{Path: filepath.Join(dir, "dst")}, -1)
	var fatal *FatalError
	if !errors.As(o.sendErr, &fatal) || !fatal.Remote || !strings.Contains(fatal.Text, "no space left") {
		t.Errorf("the sender's error is %v", o.sendErr)
	}
}

func TestArguments(t *testing.T) {
	want := Options{Path: "--", Exact: true, Count: true, Attributes: Attributes{Plain: true, SetID: true}}
	receive, got, err := parseArguments(Arguments(true, want))
	if err != nil || !receive || got.Path != want.Path || !got.Exact || !got.Count || got.Attributes != want.Attributes {
		t.Errorf("receive %v, %+v, %v", receive, got, err)
	}
	for _, args := range [][]string{
		{Command}, {Command, "send"}, {Command, "send", "--"}, {Command, "send", "--", ""}, {Command, "send", "x"},
		{Command, "send", "--exact", "x"}, {Command, "send", "--new", "--", "x"}, {Command, "steal", "--", "x"}, {Command, "send", "--", "x", "y"},
	} {
		if _, _, err := parseArguments(args); err == nil {
			t.Errorf("%q are taken", args)
		}
	}
}

// What waits for its turn is bounded, and has been asked for: no answer is one
// too many.
func TestEveryFileThatWaitsMayBeAnswered(t *testing.T) {
	dir := tempDir(t)
	for i := range window + 10 {
		name := filepath.Join(dir, fmt.Sprint(i))
		write(t, name, "")
		// While the first is sent, there is time to announce the others.
		if err := os.Truncate(name, 1<<40); err != nil {
			t.Fatal(err)
		}
	}
	toReceiver, fromSender := io.Pipe()
	toSender, fromReceiver := io.Pipe()
	sent := make(chan error, 1)
	go func() {
		_, err := Send(t.Context(), toSender, fromSender, Options{Path: dir})
		fromSender.Close()
		sent <- err
	}()
	c := newConn(toReceiver, fromReceiver)
	answer := func(kind byte, payload *encoder) {
		_ = c.write(kind, payload.b)
		_ = c.flush()
	}
	_ = c.hello("")
	answer(frameRoot, new(encoder).text("there", maxFrame))
	asked, begun := 0, 0
	for begun == 0 || asked-begun < maxAsked-1 {
		kind, p, err := c.read()
		if err != nil {
			t.Fatalf("after %d files, of which %d were begun: %v", asked, begun, err)
		}
		switch kind {
		case frameFile:
			asked++
			answer(frameWant, new(encoder).number(p.number()).number(0))
		case frameBegin:
			begun++
		case frameFatal:
			t.Fatalf("after %d files, of which %d were begun: %v", asked, begun, remoteFatal(p))
		}
	}
	c.fatal(fatalf("enough"))
	if _, err := io.Copy(io.Discard, toReceiver); err != nil {
		t.Error(err)
	}
	if err := <-sent; err == nil || err.Error() != "enough" {
		t.Errorf("the sender ended with %v", err)
	}
}

// A copy to /dev/null by root isn't to leave a file there.
func TestWhatIsNoFileIsNotReplaced(t *testing.T) {
	from := tempDir(t)
	write(t, filepath.Join(from, "one"), "contents")
	write(t, filepath.Join(from, "tree/pipe"), "contents")
	if err := os.Symlink("nowhere", filepath.Join(from, "tree/socket")); err != nil {
		t.Fatal(err)
	}
	to := tempDir(t)
	if err := os.Mkdir(filepath.Join(to, "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pipe", "tree/pipe"} {
		if err := syscall.Mkfifo(filepath.Join(to, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	listener, err := net.Listen("unix", filepath.Join(to, "tree/socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	want := snapshot(t, to)
	for _, test := range []struct{ from, to, want string }{
		{"one", "pipe", "[pipe: there is a named pipe, which isn't replaced]"},
		{"tree", ".", "[tree/pipe: there is a named pipe, which isn't replaced tree/socket: there is a socket, which isn't replaced]"},
	} {
		o := copyAll(t, Options{Path: filepath.Join(from, test.from), Attributes: Attributes{Plain: true}}, Options{Path: filepath.Join(to, test.to), Attributes: Attributes{Plain: true}})
		if got := fmt.Sprint(o.problems); got != test.want || o.sent.Failed == 0 {
			t.Errorf("%s: problems %s, want %s; %d failed", test.from, got, test.want, o.sent.Failed)
		}
	}
	got := snapshot(t, to)
	for name := range want {
		if mode, _, _ := strings.Cut(want[name], " "); !strings.HasPrefix(got[name], mode) {
			t.Errorf("%s was %s, and is %s", name, want[name], got[name])
		}
	}
}

// What is there already may take hours to read.
func TestACancelledCopyDoesNotReadOnWhatIsThere(t *testing.T) {
	to := tempDir(t)
	const size = 1 << 40
	for _, name := range []string{"whole", partialOf("part")} {
		write(t, filepath.Join(to, name), "")
		if err := os.Chmod(filepath.Join(to, name), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(filepath.Join(to, name), size); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(filepath.Join(to, "whole"))
	if err != nil {
		t.Fatal(err)
	}
	stop := errors.New("stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stop)
	for _, name := range []string{"whole", "part"} {
		d, err := openDestination(Options{Path: to}, name, false)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := d.look(ctx, d.at, name, 0o600, info.ModTime(), size, true); !errors.Is(err, stop) {
			t.Errorf("%s: %v", name, err)
		}
		d.close()
	}
	f, err := os.Open(filepath.Join(to, "whole"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if s := (&sender{buf: make([]byte, chunk)}); s.agrees(ctx, f, answer{have: size}, sha256.New()) {
		t.Error("a sender agreed with what it hasn't read")
	}
}
