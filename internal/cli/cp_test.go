package cli

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/files"
	"aaserver.io/aaserver/streaming"
)

func TestCopyRefs(t *testing.T) {
	tests := map[string]struct {
		arg           string
		wantNamespace string
		want          ref
		wantErr       bool
	}{
		"a target":                         {arg: "web", want: ref{target: "web"}},
		"an instance":                      {arg: "web/web-1", want: ref{target: "web", instance: "web-1"}},
		"a target in a namespace":          {arg: "shop/web", wantNamespace: "shop", want: ref{target: "web"}},
		"an instance in a namespace":       {arg: "shop/web/web-1", wantNamespace: "shop", want: ref{target: "web", instance: "web-1"}},
		"a type and a target":              {arg: "target/web", want: ref{target: "web"}},
		"a type, a target and an instance": {arg: "tgt/web/web-1", want: ref{target: "web", instance: "web-1"}},
		"no namespace":                     {arg: "/web", wantErr: true},
		"no target":                        {arg: "shop/", wantErr: true},
		"an instance of another":           {arg: "shop/web/db-1", wantErr: true},
		"more than there is":               {arg: "a/b/c/d", wantErr: true},
		"nothing":                          {arg: "", wantErr: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			namespace, r, err := parseCopyRef(test.arg, "")
			if (err != nil) != test.wantErr {
				t.Fatalf("error %v, want one: %v", err, test.wantErr)
			}
			if err == nil && (namespace != test.wantNamespace || r != test.want) {
				t.Errorf("namespace %q, %+v, want %q, %+v", namespace, r, test.wantNamespace, test.want)
			}
		})
	}
}

func TestCopyArguments(t *testing.T) {
	tests := map[string]struct {
		args []string
		want string
	}{
		"one argument":        {[]string{"cp", "a"}, "a source and a destination are required"},
		"nothing on a target": {[]string{"cp", "a", "b"}, "neither \"a\" nor \"b\" is on a target"},
		"a path with a colon is local when it begins as a path": {[]string{"cp", "./a:b", "/c:d"}, "neither \"./a:b\" nor"},
		"both on targets":  {[]string{"cp", "a:b", "c:d"}, "are both on targets"},
		"an empty path":    {[]string{"cp", "web:", "x"}, "a path is empty"},
		"negative retries": {[]string{"cp", "web:a", "x", "--retries=-1"}, "--retries can't be negative"},
	}
	server := newTestServer(t, process("web"))
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cmd := server.start(nil, test.args...)
			if code := cmd.wait(); code != 1 || !strings.Contains(cmd.errOut.String(), test.want) {
				t.Errorf("exit code %d, stderr %q, want %q", code, cmd.errOut, test.want)
			}
		})
	}
}

// host is the machine that a target of a test is on: what exec runs there.
type host struct {
	t   *testing.T
	dir string // the working directory
	// bare has it lack what comes with aaserver, and without the programs named.
	bare    bool
	without []string

	mu       sync.Mutex // protects what follows
	commands []string
	// cut breaks the connection of a session when so many bytes have passed,
	// for as many sessions as there are numbers.
	cuts []int64
}

// serve lets the server's exec run on the host.
func (h *host) serve(s *testServer) {
	s.exec = func(w http.ResponseWriter, r *http.Request, target string) {
		options := decode[v1.TargetExecOptions](s.t, r)
		h.mu.Lock()
		h.commands = append(h.commands, options.Command[0])
		left := int64(1 << 62)
		if len(h.cuts) > 0 && (options.Command[0] != "test" && options.Command[0] != "sh") {
			left, h.cuts = h.cuts[0], h.cuts[1:]
		}
		h.mu.Unlock()
		name := options.Command[0]
		builtin := name == files.Command && !h.bare
		if !builtin {
			if _, err := exec.LookPath(name); err != nil || slices.Contains(h.without, name) {
				writeError(w, apierrors.NewBadRequest(fmt.Sprintf("command %q not found in PATH", name)))
				return
			}
		}
		var passed atomic.Int64
		_ = streaming.ServeCommand(w, r, streaming.CommandRequest{
			Stdin: options.Stdin, Stdout: options.Stdout, Stderr: options.Stderr,
		}, streaming.Options{}, func(ctx context.Context, stdio streaming.Stdio) error {
			ctx, cancel := context.WithCancelCause(ctx)
			defer cancel(nil)
			cut := func(n int) error {
				if passed.Add(int64(n)) > left {
					cancel(errCutOff)
					return errCutOff
				}
				return nil
			}
			in, out := cutReader{stdio.Stdin, cut}, cutWriter{stdio.Stdout, cut}
			err := h.run(ctx, options.Command, target+"-0", builtin, in, out, stdio.Stderr)
			if context.Cause(ctx) == errCutOff {
				return errCutOff
			}
			return err
		})
	}
}

var errCutOff = errors.New("the agent is shutting down")

type cutReader struct {
	io.ReadCloser
	cut func(int) error
}

func (c cutReader) Read(p []byte) (int, error) {
	n, err := c.ReadCloser.Read(p)
	if cut := c.cut(n); cut != nil {
		return 0, cut
	}
	return n, err
}

type cutWriter struct {
	io.Writer
	cut func(int) error
}

func (c cutWriter) Write(p []byte) (int, error) {
	if err := c.cut(len(p)); err != nil {
		return 0, err
	}
	return c.Writer.Write(p)
}

func (h *host) run(ctx context.Context, command []string, instance string, builtin bool, in io.ReadCloser, out, errOut io.Writer) error {
	if builtin {
		// It has a working directory of its own as a process, which a test can't
		// have: so the path is made absolute.
		command = slices.Clone(command)
		if last := &command[len(command)-1]; !filepath.IsAbs(*last) {
			*last = h.dir + "/" + *last
		}
		stop := context.AfterFunc(ctx, func() { in.Close() })
		defer stop()
		if code := files.Serve(command, in, out, errOut, instance); code != 0 {
			return &streaming.ExitError{Code: code}
		}
		return nil
	}
	cmd := exec.CommandContext(ctx, command[0], command[1:]...)
	cmd.Dir = h.dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	cmd.Stdout, cmd.Stderr = out, errOut
	// A command that has ended doesn't wait for more of its input.
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	var feeding sync.WaitGroup
	feeding.Go(func() {
		_, _ = io.Copy(stdin, in)
		stdin.Close()
	})
	err = cmd.Run()
	in.Close()
	feeding.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return &streaming.ExitError{Code: exit.ExitCode()}
	}
	return err
}

// tree writes files of a few sizes, with modes, times and links.
func tree(t *testing.T, dir string) {
	t.Helper()
	random := rand.NewChaCha8([32]byte{7})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(os.MkdirAll(filepath.Join(dir, "sub/empty"), 0o755))
	for name, size := range map[string]int{"empty": 0, "small": 10, "-dash": 5, "sub/with space": 70_000, "sub/big": 5 << 20} {
		b := make([]byte, size)
		random.Read(b)
		file := filepath.Join(dir, name)
		check(os.WriteFile(file, b, 0o600))
		check(os.Chmod(file, 0o640))
		check(os.Chtimes(file, time.Time{}, time.Unix(1_600_000_000+int64(size), 0)))
	}
	check(os.Symlink("../small", filepath.Join(dir, "sub/link")))
	check(os.Symlink("/etc/passwd", filepath.Join(dir, "absolute")))
	check(os.Chmod(filepath.Join(dir, "sub/empty"), 0o700))
	for _, name := range []string{"sub/empty", "sub", "."} {
		check(os.Chtimes(filepath.Join(dir, name), time.Time{}, time.Unix(1_500_000_000, 0)))
	}
}

// listing describes what is in a directory.
func listing(t *testing.T, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			all[name] = "-> " + target
		case info.IsDir():
			all[name] = fmt.Sprint(info.Mode(), " ", info.ModTime().Unix())
		default:
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			all[name] = fmt.Sprintf("%v %d %x", info.Mode(), info.ModTime().Unix(), sha256.Sum256(b)) // tar has whole seconds
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func needTar(t *testing.T) {
	t.Helper()
	for _, program := range []string{"tar", "sha256sum", "test", "tail", "head", "sh"} {
		if _, err := exec.LookPath(program); err != nil {
			if os.Getenv("CI") != "" {
				t.Fatal(err)
			}
			t.Skip(err)
		}
	}
}

func TestCopiesByEachWay(t *testing.T) {
	for way, bare := range map[string]bool{"by aaserver:files": false, "by tar": true} {
		t.Run(way, func(t *testing.T) {
			if bare {
				needTar(t)
			}
			forEachTransport(t, func(t *testing.T) {
				dir := t.TempDir()
				local, remote := filepath.Join(dir, "local"), filepath.Join(dir, "remote")
				tree(t, filepath.Join(local, "tree"))
				if err := os.MkdirAll(remote, 0o755); err != nil {
					t.Fatal(err)
				}
				server := newTestServer(t, process("web"))
				h := &host{t: t, dir: remote, bare: bare}
				h.serve(server)
				copyOK := func(args ...string) {
					t.Helper()
					cmd := server.start(nil, append([]string{"cp"}, args...)...)
					if code := cmd.wait(); code != 0 || cmd.errOut.String() != "" || cmd.out.String() != "" {
						t.Fatalf("%q: exit code %d, stdout %q, stderr %q", args, code, cmd.out, cmd.errOut)
					}
				}
				same := func(a, b string) {
					t.Helper()
					if diff := cmp.Diff(listing(t, a), listing(t, b)); diff != "" {
						t.Fatalf("%s and %s differ:\n%s", a, b, diff)
					}
				}
				copyOK(local+"/tree", "web:new")
				same(local+"/tree", remote+"/new")
				copyOK(local+"/tree", "web/web-0:.")
				same(local+"/tree", remote+"/tree")
				copyOK("web:"+remote+"/new", local+"/back")
				same(local+"/tree", local+"/back")
				copyOK("web:new", local+"/back")
				same(local+"/tree", local+"/back/new")
				copyOK("shop/web:new/sub/big", local)
				same(local+"/tree/sub/big", local+"/big")
				copyOK(local+"/big", "web:tree/small")
				same(local+"/big", remote+"/tree/small")
				copyOK("web:new/sub/link", local+"/through")
				same(local+"/tree/small", local+"/through")
				copyOK(local+"/tree/-dash", "web:-dash")
				copyOK("web:-dash", local+"/dash")
				same(local+"/tree/-dash", local+"/dash")

				if err := os.MkdirAll(remote+"/old", 0o755); err != nil {
					t.Fatal(err)
				}
				copyOK(local+"/tree/.", "web:old")
				want := listing(t, local+"/tree")
				got := listing(t, remote+"/old")
				delete(want, ".")
				delete(got, ".")
				if diff := cmp.Diff(want, got); diff != "" {
					t.Fatalf("contents (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestCopyGoesOnWhenTheConnectionIsLost(t *testing.T) {
	random := func(dir string) string {
		b := make([]byte, 24<<20)
		rand.NewChaCha8([32]byte{3}).Read(b)
		file := filepath.Join(dir, "big")
		if err := os.WriteFile(file, b, 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	tests := map[string]struct {
		bare, upload bool
		cuts         []int64
		wantCommands []string
	}{
		"up":           {upload: true, cuts: []int64{5 << 20, 6 << 20}, wantCommands: []string{files.Command, files.Command, files.Command}},
		"down":         {cuts: []int64{100, 9 << 20}, wantCommands: []string{files.Command, files.Command, files.Command}},
		"up, by tar":   {bare: true, upload: true, cuts: []int64{5 << 20}, wantCommands: []string{files.Command, "test", "test", "tar", "test", "test", "test", "tar", "sha256sum"}},
		"down, by tar": {bare: true, cuts: []int64{15 << 20}, wantCommands: []string{files.Command, "test", "tar", "test", "tar", "sh", "tail", "sha256sum"}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.bare {
				needTar(t)
			}
			dir := t.TempDir()
			server := newTestServer(t, process("web"))
			h := &host{t: t, dir: dir, bare: test.bare, cuts: test.cuts}
			if test.bare {
				h.cuts = append([]int64{1 << 60}, h.cuts...) // for the command that isn't there
			}
			h.serve(server)
			source, copied := random(dir), filepath.Join(dir, "copy")
			args := []string{"cp", "web:" + source, copied}
			if test.upload {
				args = []string{"cp", source, "web:" + copied}
			}
			cmd := server.start(nil, args...)
			if code := cmd.wait(); code != 0 {
				t.Fatalf("exit code %d, stderr %q", code, cmd.errOut)
			}
			if again := strings.Count(cmd.errOut.String(), "the agent is shutting down"); again != len(test.cuts) {
				t.Errorf("stderr tells of %d cuts, want %d: %q", again, len(test.cuts), cmd.errOut)
			}
			if diff := cmp.Diff(test.wantCommands, h.commands); diff != "" {
				t.Errorf("commands (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(listing(t, source), listing(t, copied)); diff != "" {
				t.Errorf("the copy differs:\n%s", diff)
			}
		})
	}
}

func TestCopiesThatFail(t *testing.T) {
	dir := t.TempDir()
	tree(t, filepath.Join(dir, "tree"))
	for name, contents := range map[string]string{"occupied/tree/small/x": "", "plain": ""} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(contents), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("mkfifo", filepath.Join(dir, "pipe")).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	tests := map[string]struct {
		bare    bool
		without []string
		args    []string
		want    string
	}{
		"by tar, a named pipe for a file here":    {bare: true, args: []string{"cp", "web:plain", dir + "/pipe"}, want: "error: pipe: there is a named pipe, which isn't replaced\n"},
		"by tar, a named pipe for a file":         {bare: true, args: []string{"cp", dir + "/plain", "web:pipe"}, want: "error: on target web: pipe: there is a device, a named pipe or a socket, which isn't replaced\n"},
		"a source that isn't there":               {args: []string{"cp", "web:none", "x"}, want: "error: on target web: " + dir + "/none: no such file or directory\n"},
		"a local source that isn't there":         {args: []string{"cp", dir + "/none", "web:x"}, want: "error: " + dir + "/none: no such file or directory\n"},
		"a target that isn't there":               {args: []string{"cp", "db:none", "x"}, want: `Error from server (NotFound): targets.streaming.aaserver.io "db" not found` + "\n"},
		"a directory for a file":                  {args: []string{"cp", dir + "/tree", "web:plain"}, want: "error: on target web: " + dir + "/plain: there is a file, which a directory can't replace\n"},
		"one file of many":                        {args: []string{"cp", dir + "/tree", "web:occupied"}, want: "error: tree/small: there is a directory, which a file can't replace\nerror: not everything was copied: 1 failed\n"},
		"by tar, a source that isn't there":       {bare: true, args: []string{"cp", "web:none", dir + "/x"}, want: "error: tar on the target: exit code 2: "},
		"by tar, nothing to copy with":            {bare: true, without: []string{"test", "tar"}, args: []string{"cp", "web:none", dir + "/x"}, want: "error: target web has neither a part of aaserver beside it nor the programs test and tar, which cp needs\n"},
		"by tar, a local source that isn't there": {bare: true, args: []string{"cp", dir + "/none", "web:x"}, want: "error: " + dir + "/none: no such file or directory\n"},
		"by tar, a directory that isn't there":    {bare: true, args: []string{"cp", dir + "/plain", "web:no/such"}, want: "error: tar on the target: exit code 2: "},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if test.bare && test.without == nil {
				needTar(t)
			}
			server := newTestServer(t, process("web"))
			(&host{t: t, dir: dir, bare: test.bare, without: test.without}).serve(server)
			cmd := server.start(nil, test.args...)
			if code := cmd.wait(); code != 1 || !strings.HasPrefix(cmd.errOut.String(), test.want) {
				t.Errorf("exit code %d, stderr %q, want %q", code, cmd.errOut, test.want)
			}
		})
	}
}

func TestAnInterruptedCopyEndsWithTheSignalsCode(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	server := newTestServer(t, process("web"))
	started, ended := make(chan struct{}), make(chan struct{})
	var seen v1.TargetExecOptions
	server.serveExec(&seen, func(ctx context.Context, _ streaming.Stdio) error {
		close(started)
		defer close(ended)
		<-ctx.Done()
		return context.Cause(ctx)
	})
	cmd := server.start(nil, "cp", dir+"/f", "web:/f")
	<-started
	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 130 || cmd.errOut.String() != "" {
		t.Errorf("exit code %d, want 130; stderr %q", code, cmd.errOut)
	}
	<-ended
}

// A target that sends what would be written outside of the copy is refused.
func TestArchivesDoNotLeaveTheDestination(t *testing.T) {
	needTar(t)
	dir := t.TempDir()
	archive := filepath.Join(dir, "evil.tar")
	build := exec.Command("sh", "-c", `mkdir -p in/d && echo x >in/d/f && echo x >in/ok && ln -s "$0" in/out &&
		tar -cf "$1" -C in . && tar -rf "$1" -C in --transform 's,^,../../,' ok && tar -rPf "$1" -C in --transform "s,^,$0/," ok && tar -rf "$1" -C in --transform 's,^,out/,' ok`, dir, archive)
	build.Dir = t.TempDir()
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	server := archiveServer(t, archive)
	into := filepath.Join(dir, "a/b/into")
	if err := os.MkdirAll(into, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := server.start(nil, "cp", "web:d", into)
	if code := cmd.wait(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if n := strings.Count(cmd.errOut.String(), "error: "); n != 4 {
		t.Errorf("%d errors, want 3 and their sum: %s", n, cmd.errOut)
	}
	for _, outside := range []string{dir + "/ok", dir + "/a/ok", dir + "/a/b/ok"} {
		if _, err := os.Lstat(outside); err == nil {
			t.Errorf("%s was written", outside)
		}
	}
	if _, err := os.Stat(into + "/d/d/f"); err != nil {
		t.Errorf("what is inside didn't arrive: %v", err)
	}
}

// archiveServer has a target whose tar packs an archive of a directory, whatever
// it is asked for.
func archiveServer(t *testing.T, archive string) *testServer {
	server := newTestServer(t, process("web"))
	server.exec = func(w http.ResponseWriter, r *http.Request, _ string) {
		options := decode[v1.TargetExecOptions](t, r)
		if options.Command[0] == files.Command {
			writeError(w, apierrors.NewBadRequest("no such command"))
			return
		}
		_ = streaming.ServeCommand(w, r, streaming.CommandRequest{Stdin: true, Stdout: true, Stderr: true}, streaming.Options{},
			func(_ context.Context, stdio streaming.Stdio) error {
				if options.Command[0] != "tar" {
					return nil
				}
				b, err := os.ReadFile(archive)
				if err != nil {
					return err
				}
				_, err = stdio.Stdout.Write(b)
				return err
			})
	}
	return server
}

// What an archive says is in a file need not have been sent.
func TestArchivesHaveOnlyWhatTheTargetSends(t *testing.T) {
	needTar(t)
	for name, test := range map[string]struct{ build, want string }{
		"a sparse file could fill the disk": {
			`truncate -s 64M x && tar -S --format=posix -cf "$0" . `, "x: left out: it comes as a sparse file"},
		"and so could an old one": {
			`truncate -s 64M x && tar -S --format=gnu -cf "$0" . `, "x: left out: it comes as a sparse file"},
		"a link to a file that was there before": {
			`echo >mine && ln mine x && tar -cf "$0" --no-recursion . ./mine ./x && tar --delete -f "$0" ./mine`, "x: what it is a link to didn't arrive"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			archive := filepath.Join(dir, "archive")
			build := exec.Command("sh", "-c", test.build, archive)
			build.Dir = t.TempDir()
			if out, err := build.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			into := filepath.Join(dir, "into")
			if err := os.MkdirAll(into+"/d", 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(into+"/d/mine", []byte("secret"), 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := archiveServer(t, archive).start(nil, "cp", "web:d", into)
			if code := cmd.wait(); code != 1 || !strings.Contains(cmd.errOut.String(), test.want) {
				t.Errorf("exit code %d, stderr %q, want %q", code, cmd.errOut, test.want)
			}
			if _, err := os.Lstat(into + "/d/x"); err == nil {
				t.Error("it was written")
			}
		})
	}
}

// A target may tell of a problem with each of many files, at length.
func TestProblemsOfATargetTakeLittleMemory(t *testing.T) {
	var out bytes.Buffer
	d := newCopyDisplay(&out, &cpOptions{})
	defer d.close(true)
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	long := strings.Repeat("p", 60_000)
	for i := range 300 {
		d.problem(files.Problem{Path: long, Text: fmt.Sprint(i)})
		d.problem(files.Problem{Path: long, Text: fmt.Sprint(i)})
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n := int64(after.HeapAlloc) - int64(before.HeapAlloc) - int64(out.Cap()); n > 4<<20 {
		t.Errorf("it keeps %d bytes", n)
	}
	if n := strings.Count(out.String(), "\n"); n != maxProblems {
		t.Errorf("%d lines, want each once, and %d in all", n, maxProblems)
	}
}

func TestProgressLine(t *testing.T) {
	start := time.Unix(0, 0)
	p := &files.Progress{}
	p.Bytes.Store(3 << 20)
	p.Current.Store("a\x1b[31m\nb")
	samples := []sample{{start, 0}, {start.Add(2 * time.Second), 2 << 20}}
	if got, want := progressLine(p, samples), `3.0 MiB  1.0 MiB/s  a\u001b[31m\nb`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	p.TotalBytes.Store(12 << 20)
	p.TotalFiles.Store(10)
	p.Files.Store(4)
	if got, want := progressLine(p, samples), ` 25%  3.0 MiB/12.0 MiB  1.0 MiB/s  ETA 9s  4/10 files  a\u001b[31m\nb`; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
