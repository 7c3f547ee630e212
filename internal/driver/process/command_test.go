package process

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func TestExpand(t *testing.T) {
	values := map[string]string{"A": "1", "EMPTY": "", "NEST": "$(A)"}
	for text, want := range map[string]string{
		"":               "",
		"plain":          "plain",
		"$(A)":           "1",
		"x$(A)y$(A)z":    "x1y1z",
		"$(EMPTY)":       "",
		"$(UNKNOWN)":     "$(UNKNOWN)",
		"$$(A)":          "$(A)",
		"$$$(A)":         "$1",
		"$$$$(A)":        "$$(A)",
		"$$":             "$",
		"$":              "$",
		"$A ${A} $(":     "$A ${A} $(",
		"$(A":            "$(A",
		"$(NEST)":        "$(A)",
		"$(UNKNOWN$(A))": "$(UNKNOWN$(A))",
		"$()":            "$()",
	} {
		got := expand(text, func(name string) (string, bool) {
			v, ok := values[name]
			return v, ok
		})
		if got != want {
			t.Errorf("%q becomes %q, want %q", text, got, want)
		}
	}
}

// output runs a command beside an instance, and returns what it writes.
func output(t testing.TB, c *conn, opts driver.ExecOptions) string {
	t.Helper()
	run, err := c.Exec(t.Context(), opts)
	if err != nil {
		t.Fatalf("Exec: %v", err)
	}
	var out bytes.Buffer
	if err := run(t.Context(), driver.Stdio{Stdout: &out, Stderr: &out}); err != nil {
		t.Fatalf("%q: %v, output %q", opts.Command, err, out.String())
	}
	return out.String()
}

// logOf returns an instance's log when it has ended.
func logOf(t testing.TB, d *Driver, target *v1.Target) string {
	t.Helper()
	awaitEnd(t, d, driver.InstanceID{Target: target.UID, Name: "web-0"})
	r, err := open(t, d, target).Logs(t.Context(), driver.LogOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	var b strings.Builder
	for {
		line, err := r.Next(t.Context())
		if err == io.EOF {
			return b.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		b.Write(line.Data)
		b.WriteByte('\n')
	}
}

func TestEnvironmentIsMinimal(t *testing.T) {
	t.Setenv("SECRET_OF_THE_SERVER", "x")
	me, err := user.LookupId(fmt.Sprint(os.Getuid()))
	if err != nil {
		skip(t, err)
	}
	home := me.HomeDir
	wantDir := home
	if _, err := os.Stat(home); err != nil {
		wantDir = "/"
	}
	d := newDriver(t, Options{})
	source := v1.ProcessSource{
		Command: []string{"/bin/sh", "-c", "echo $$0 $$1 $$#; env; pwd", "$(MODE)"},
		Args:    []string{"--listen=127.0.0.1:$(AASERVER_PORT_HTTP_ALT)"},
		Env:     []v1.EnvVar{{Name: "MODE", Value: "prod"}, {Name: "TWICE", Value: "$(MODE)$(MODE)$$(MODE)$(LATER)"}, {Name: "LATER", Value: "1"}, {Name: "LANG", Value: "C"}},
	}
	target := newTarget(source)
	start(t, d, target, v1.InstancePort{Name: "http-alt", Port: 8080, HostPort: 31021}, v1.InstancePort{Name: "none", Port: 1})
	got := strings.Split(strings.TrimSpace(logOf(t, d, target)), "\n")
	if want := "prod --listen=127.0.0.1:31021 1"; got[0] != want {
		t.Errorf("arguments %q, want %q", got[0], want)
	}
	if dir := got[len(got)-1]; dir != wantDir {
		t.Errorf("working directory %q, want %q", dir, wantDir)
	}
	env := slices.DeleteFunc(got[1:len(got)-1], func(s string) bool {
		return strings.HasPrefix(s, "PWD=") || strings.HasPrefix(s, "SHELL=") || strings.HasPrefix(s, "_=")
	})
	slices.Sort(env)
	want := []string{
		"AASERVER_INSTANCE=web-0",
		"AASERVER_PORT_HTTP_ALT=31021",
		"HOME=" + home,
		"LANG=C",
		"LATER=1",
		"LOGNAME=" + me.Username,
		"MODE=prod",
		"PATH=" + defaultPath,
		"TWICE=prodprod$(MODE)$(LATER)",
		"USER=" + me.Username,
	}
	if diff := cmp.Diff(want, env); diff != "" {
		t.Errorf("environment (-want +got):\n%s", diff)
	}
}

func TestCommandsShareTheirInstancesSetting(t *testing.T) {
	dir := t.TempDir()
	source := script("exec sleep 1000")
	source.WorkingDir = dir
	source.Env = []v1.EnvVar{{Name: "MODE", Value: "prod"}}
	d := newDriver(t, Options{})
	target := newTarget(source)
	start(t, d, target)
	c := open(t, d, target)
	for _, tty := range []bool{false, true} {
		term := map[bool]string{false: "none", true: defaultTerm}[tty]
		got := strings.Fields(output(t, c, driver.ExecOptions{TTY: tty, Command: []string{"sh", "-c", "echo $PWD $MODE $AASERVER_INSTANCE ${TERM:-none}"}}))
		if diff := cmp.Diff([]string{dir, "prod", "web-0", term}, got); diff != "" {
			t.Errorf("terminal %t (-want +got):\n%s", tty, diff)
		}
	}
}

func TestProcessesStartClean(t *testing.T) {
	// The server may have been started with odd signals and files. These
	// reach the shim through the test's own process.
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	leaked, err := syscall.Dup(int(null.Fd())) // not close-on-exec
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(leaked)
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)

	d := newDriver(t, Options{})
	target := newTarget(script("exec sleep 1000"))
	start(t, d, target)
	c := open(t, d, target)
	for _, tty := range []bool{false, true} {
		// It is the shell that is looked at: its children might differ.
		out := output(t, c, driver.ExecOptions{TTY: tty, Command: []string{"sh", "-c", `
			umask; cd /proc/$$; ls fd
			grep -E 'SigBlk|SigIgn|Seccomp:' status | grep -v 0000000000000000 | grep Sig; cut -d' ' -f5,6 stat; echo $$`}})
		lines := strings.Fields(strings.ReplaceAll(out, "\r", ""))
		// The shell's own.
		lines = slices.DeleteFunc(lines, func(s string) bool { return s == "10" })
		pid := lines[len(lines)-1]
		if diff := cmp.Diff([]string{"0022", "0", "1", "2", pid, pid, pid}, lines); diff != "" {
			t.Errorf("terminal %t: umask, files, process group, session (-want +got):\n%s", tty, diff)
		}
	}
}

func TestIgnoredSignalsAreDefaultAgain(t *testing.T) {
	// An agent that was started by nohup ignores SIGHUP.
	agent := exec.Command("sh", "-c", "trap '' HUP INT TERM PIPE USR1; exec /proc/self/exe 2>&1", "sh")
	agent.Args[2] = "trap '' HUP INT TERM PIPE USR1; exec " + testBinary(t) + " -test.run '^TestPrintIgnored$' -test.v"
	agent.Env = append(os.Environ(), envPrintIgnored+"=1")
	out, err := agent.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if !bytes.Contains(out, []byte("SigIgn:\t0000000000000000")) {
		t.Errorf("output %s", out)
	}
}

const envPrintIgnored = "AASERVER_TEST_PRINT_IGNORED"

func testBinary(t *testing.T) string {
	t.Helper()
	name, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestPrintIgnored is a part of TestIgnoredSignalsAreDefaultAgain.
func TestPrintIgnored(t *testing.T) {
	if os.Getenv(envPrintIgnored) == "" {
		t.Skip("not by itself")
	}
	d := newDriver(t, Options{})
	target := newTarget(v1.ProcessSource{Command: []string{"grep", "SigIgn", "/proc/self/status"}})
	start(t, d, target)
	fmt.Print(logOf(t, d, target))
}

func TestWhatCannotBeRunIsExplained(t *testing.T) {
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return name
	}
	file("here", "#!/bin/sh\necho $0\n", 0o755)
	plain := file("plain", "text", 0o644)
	bad := file("bad", "#!/no/such/shell -x\n", 0o755)
	garbage := file("garbage", "\x01\x02", 0o755)
	for name, test := range map[string]struct {
		source v1.ProcessSource
		want   string // a regular expression; "" if it starts
	}{
		"unknown":              {v1.ProcessSource{Command: []string{"no-such-program"}}, `^command "no-such-program" not found in PATH \(/usr/local/sbin:.*\)$`},
		"the spec's PATH":      {v1.ProcessSource{Command: []string{"sh"}, Env: []v1.EnvVar{{Name: "PATH", Value: "/nowhere"}}}, `^command "sh" not found in PATH \(/nowhere\)$`},
		"found in spec's PATH": {v1.ProcessSource{Command: []string{"here"}, Env: []v1.EnvVar{{Name: "PATH", Value: "/nowhere:" + dir}}}, ``},
		"relative path":        {v1.ProcessSource{Command: []string{"./here"}, WorkingDir: dir}, ``},
		"unknown path":         {v1.ProcessSource{Command: []string{"/no/such"}}, `^command "/no/such" doesn't exist$`},
		"not executable":       {v1.ProcessSource{Command: []string{plain}}, `^command ".*/plain": permission denied for user ".+"$`},
		"not executable in PATH": {v1.ProcessSource{Command: []string{"plain"}, Env: []v1.EnvVar{{Name: "PATH", Value: dir}}},
			`^command ".*/plain": permission denied for user ".+"$`},
		"a directory":          {v1.ProcessSource{Command: []string{dir}}, `is a directory$`},
		"bad interpreter":      {v1.ProcessSource{Command: []string{bad}}, `^command ".*/bad": bad interpreter: "/no/such/shell" doesn't exist$`},
		"no program":           {v1.ProcessSource{Command: []string{garbage}}, `exec format error.*#!/bin/sh`},
		"no working directory": {v1.ProcessSource{Command: []string{"true"}, WorkingDir: "/no/such"}, `^working directory "/no/such" doesn't exist$`},
		"a file as directory":  {v1.ProcessSource{Command: []string{"true"}, WorkingDir: plain}, `^working directory ".*/plain": not a directory$`},
		"unknown user":         {v1.ProcessSource{Command: []string{"true"}, User: "no-such-user"}, `^user "no-such-user" doesn't exist on the agent's host$`},
		"empty":                {v1.ProcessSource{}, `^the command is empty$`},
		"a zero byte":          {v1.ProcessSource{Command: []string{"echo", "a\x00b"}}, `zero byte`},
		"too long":             {v1.ProcessSource{Command: []string{"echo", strings.Repeat("x", 1<<20)}}, `too long`},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDriver(t, Options{})
			err := d.Start(t.Context(), driver.Instance{Target: newTarget(test.source), Name: "web-0"})
			if test.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				t.Fatal("it started")
			}
			if !regexp.MustCompile(test.want).MatchString(err.Error()) {
				t.Errorf("error %q, want %q", err, test.want)
			}
			if driver.KindOf(err) != driver.Invalid {
				t.Errorf("kind %d, want Invalid", driver.KindOf(err))
			}
		})
	}
}

func TestUsers(t *testing.T) {
	if os.Getuid() != 0 {
		d := newDriver(t, Options{})
		source := script("id")
		source.User = "root"
		err := d.Start(t.Context(), driver.Instance{Target: newTarget(source), Name: "web-0"})
		if driver.KindOf(err) != driver.Invalid || !strings.Contains(err.Error(), "start aaserver as root") {
			t.Errorf("error %v", err)
		}
		skip(t, "only root can switch to other users")
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		skip(t, err)
	}
	groups, err := nobody.GroupIds()
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"nobody":   fmt.Sprintf("%s %s %s nobody", nobody.Uid, nobody.Gid, strings.Join(groups, " ")),
		nobody.Uid: fmt.Sprintf("%s %s %s nobody", nobody.Uid, nobody.Gid, strings.Join(groups, " ")),
		"54321":    "54321 54321 54321 54321",
		"root":     "0 0",
	} {
		t.Run(name, func(t *testing.T) {
			d := newDriver(t, Options{})
			source := script("exec sleep 1000")
			source.User = name
			target := newTarget(source)
			start(t, d, target)
			for _, tty := range []bool{false, true} {
				got := strings.Join(strings.Fields(output(t, open(t, d, target), driver.ExecOptions{TTY: tty, Command: []string{"sh", "-c", "id -u; id -g; id -G; echo $USER"}})), " ")
				if !strings.HasPrefix(got, want) {
					t.Errorf("terminal %t: %q, want %q", tty, got, want)
				}
			}
			if got := strings.TrimSpace(output(t, open(t, d, target), driver.ExecOptions{TTY: true, Command: []string{"sh", "-c", "test -O $(tty) && test -w $(tty) && echo owned"}})); !strings.HasSuffix(got, "owned") {
				t.Errorf("its terminal isn't its own: %q", got)
			}
		})
	}

	t.Run("programs are looked up with the user's eyes", func(t *testing.T) {
		dir, err := os.MkdirTemp("", "users") // t.TempDir's parents are root's own
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		locked := filepath.Join(dir, "locked")
		if err := os.Mkdir(locked, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{filepath.Join(locked, "tool"), filepath.Join(dir, "tool")} {
			if err := os.WriteFile(name, []byte("#!/bin/sh\necho $0\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		d := newDriver(t, Options{})
		source := v1.ProcessSource{User: "nobody", Command: []string{filepath.Join(locked, "tool")}}
		err = d.Start(t.Context(), driver.Instance{Target: newTarget(source), Name: "web-0"})
		if driver.KindOf(err) != driver.Invalid || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("error %v", err)
		}
		source.Command = []string{"true"}
		source.WorkingDir = locked
		err = d.Start(t.Context(), driver.Instance{Target: newTarget(source), Name: "web-0"})
		if driver.KindOf(err) != driver.Invalid || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("error %v", err)
		}
		// What root would find first isn't there for nobody.
		source = v1.ProcessSource{User: "nobody", Command: []string{"tool"}, Env: []v1.EnvVar{{Name: "PATH", Value: locked + ":" + dir + ":/bin:/usr/bin"}}}
		target := newTarget(source)
		start(t, d, target)
		if got, want := logOf(t, d, target), filepath.Join(dir, "tool")+"\n"; got != want {
			t.Errorf("ran %q, want %q", got, want)
		}
		if _, err := os.ReadDir(locked); err != nil {
			t.Errorf("the agent itself: %v", err)
		}
	})
}

// stuckWriter is a client that reads nothing until it is told to.
type stuckWriter struct {
	once    chan struct{} // closed at the first write
	release chan struct{}
	first   bool
}

func (w *stuckWriter) Write(p []byte) (int, error) {
	if !w.first {
		w.first = true
		close(w.once)
	}
	<-w.release
	return len(p), nil
}

func TestSlowAttachedClientIsDetached(t *testing.T) {
	d := newDriver(t, Options{LogFileSize: 1 << 20})
	source := script("read go; head -c 4000000 /dev/zero | tr '\\0' x; exec sleep 1000")
	source.Stdin = true
	target := newTarget(source)
	start(t, d, target)
	c := open(t, d, target)
	run, err := c.Attach(t.Context(), driver.AttachOptions{Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	slow := &stuckWriter{once: make(chan struct{}), release: make(chan struct{})}
	stdin, w := io.Pipe()
	done := make(chan error, 1)
	go func() { done <- run(t.Context(), driver.Stdio{Stdin: stdin, Stdout: slow}) }()
	io.WriteString(w, "go\n")
	<-slow.once
	// The process gets rid of all its output nevertheless.
	r, err := c.Logs(t.Context(), driver.LogOptions{Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for n := 0; n < 4000000-driver.MaxLogLine; {
		line, err := r.Next(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		n += len(line.Data)
	}
	close(slow.release)
	select {
	case err := <-done:
		if driver.KindOf(err) != driver.Unavailable || !strings.Contains(err.Error(), "1 MiB behind") {
			t.Errorf("error %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("the client is still attached")
	}
}

func TestSlowClientHoldsOutputUpForABoundedTime(t *testing.T) {
	for name, test := range map[string]struct {
		pause    time.Duration // between what the client reads
		catchUp  bool          // whether it now and then reads all that there is
		attached bool
	}{
		"a client that never catches up":     {pause: memberPatience / 4},
		"a client that catches up each time": {pause: memberPatience / 4, catchUp: true, attached: true},
		"a client that reads nothing":        {pause: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAudience()
				m := a.join(0)
				ctx, cancel := context.WithCancel(t.Context())
				done := make(chan error, 1)
				go func() {
					for ctx.Err() == nil {
						time.Sleep(test.pause)
						if _, err := m.next(ctx); err != nil {
							done <- err
							return
						}
						for test.catchUp && ctx.Err() == nil {
							m.mu.Lock()
							none := len(m.chunks) == 0
							m.mu.Unlock()
							if _, err := m.next(ctx); err != nil {
								done <- err
								return
							}
							if none {
								break
							}
						}
					}
					done <- context.Cause(ctx)
				}()
				data := make([]byte, chunkSize)
				held := time.Duration(0)
				for range 40 {
					// What the client may be behind, and one more.
					for range memberBuffer/chunkSize + 1 {
						since := time.Now()
						a.write(v1.LogStreamStdout, data)
						held += time.Since(since)
					}
					if test.attached {
						synctest.Wait()
					}
				}
				m.mu.Lock()
				err := m.err
				m.mu.Unlock()
				if attached := err == nil; attached != test.attached {
					t.Errorf("attached: %t, want %t; held up for %v", attached, test.attached, held)
				}
				if !test.attached && held != memberPatience {
					t.Errorf("the output was held up for %v, want %v", held, memberPatience)
				}
				cancel()
				a.leave(m)
				<-done
			})
		})
	}
}
