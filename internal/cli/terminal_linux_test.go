package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// terminalPair is a terminal with a user.
type terminalPair struct {
	user, tty *os.File
}

func openTerminal(t *testing.T) *terminalPair {
	t.Helper()
	user, tty, err := pty.Open()
	if err != nil {
		t.Fatalf("opening a pseudo-terminal: %v", err)
	}
	t.Cleanup(func() { user.Close(); tty.Close() })
	if err := pty.Setsize(tty, &pty.Winsize{Cols: 81, Rows: 25}); err != nil {
		t.Fatal(err)
	}
	return &terminalPair{user: user, tty: tty}
}

func (p *terminalPair) state(t *testing.T) unix.Termios {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(p.tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *state
}

// screen collects what the user sees.
func (p *terminalPair) screen(t *testing.T) *output {
	o := &output{}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(o, p.user)
	}()
	t.Cleanup(func() {
		p.tty.Close()
		p.user.Close()
		<-done
	})
	return o
}

func TestExecWithTerminal(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		terminal := openTerminal(t)
		screen := terminal.screen(t)
		before := terminal.state(t)

		var seen v1.TargetExecOptions
		server.serveExec(&seen, func(ctx context.Context, stdio streaming.Stdio) error {
			if stdio.Stderr != nil {
				return errors.New("a terminal has no stderr")
			}
			size := <-stdio.Resize
			fmt.Fprintf(stdio.Stdout, "size %dx%d\r\n", size.Width, size.Height)
			if err := pty.Setsize(terminal.tty, &pty.Winsize{Cols: 100, Rows: 30}); err != nil {
				return err
			}
			if err := syscall.Kill(os.Getpid(), syscall.SIGWINCH); err != nil {
				return err
			}
			for size := range stdio.Resize {
				if size.Width == 100 {
					fmt.Fprintf(stdio.Stdout, "size %dx%d\r\n", size.Width, size.Height)
					break
				}
			}
			buf := make([]byte, 1)
			if _, err := io.ReadFull(stdio.Stdin, buf); err != nil {
				return err
			}
			fmt.Fprintf(stdio.Stdout, "typed %q\r\n", buf)
			return &streaming.ExitError{Code: 3}
		})
		cmd := startWith(t, genericiooptions.IOStreams{In: terminal.tty, Out: terminal.tty},
			"--kubeconfig", server.kubeconfig(), "exec", "-i", "-t", "web", "--", "sh")
		until(t, "the second size", func() bool { return strings.Contains(screen.String(), "size 100x30") })
		if raw := terminal.state(t); raw.Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) != 0 {
			t.Errorf("the terminal isn't raw: local flags %#x", raw.Lflag)
		}
		// ^C is for the command, not for the client.
		if _, err := terminal.user.Write([]byte{3}); err != nil {
			t.Fatal(err)
		}
		if code := cmd.wait(); code != 3 {
			t.Errorf("exit code %d, want 3; stderr %q", code, cmd.errOut)
		}
		until(t, "the output", func() bool { return strings.Contains(screen.String(), `typed "\x03"`) })
		if got := screen.String(); !strings.Contains(got, "size 81x25") {
			t.Errorf("screen %q lacks the first size", got)
		}
		if diff := cmp.Diff(before, terminal.state(t)); diff != "" {
			t.Errorf("terminal afterwards (-want +got):\n%s", diff)
		}
		if !seen.TTY || seen.Stderr || !seen.Stdin {
			t.Errorf("options %+v, want stdin and tty without stderr", seen)
		}
		// A read of the terminal is left behind, which ends with a key.
		_, _ = terminal.user.Write([]byte{'\n'})
	})
}

func TestDetach(t *testing.T) {
	server := newTestServer(t, process("shell", func(target *v1.Target) {
		target.Spec.Process.Stdin, target.Spec.Process.TTY = true, true
	}))
	terminal := openTerminal(t)
	screen := terminal.screen(t)
	before := terminal.state(t)
	left := make(chan error, 1)
	var seen v1.TargetAttachOptions
	server.serveAttach(&seen, func(ctx context.Context, stdio streaming.Stdio) error {
		sizes := fmt.Sprint(<-stdio.Resize)
		fmt.Fprintf(stdio.Stdout, "ready %s\r\n", sizes)
		<-ctx.Done()
		left <- context.Cause(ctx)
		return ctx.Err()
	})
	cmd := startWith(t, genericiooptions.IOStreams{In: terminal.tty, Out: terminal.tty},
		"--kubeconfig", server.kubeconfig(), "attach", "-i", "shell")
	until(t, "the session", func() bool { return strings.Contains(screen.String(), "ready") })
	if _, err := terminal.user.Write([]byte{16, 17}); err != nil {
		t.Fatal(err)
	}
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if err := <-left; !errors.Is(err, streaming.ErrClientGone) {
		t.Errorf("the server's side ended with %v, want %v", err, streaming.ErrClientGone)
	}
	if got, want := cmd.errOut.String(), "Detached from target shell"; !strings.Contains(got, want) {
		t.Errorf("stderr %q lacks %q", got, want)
	}
	if diff := cmp.Diff(before, terminal.state(t)); diff != "" {
		t.Errorf("terminal afterwards (-want +got):\n%s", diff)
	}
	if !seen.TTY {
		t.Error("the target has a terminal, and so has the user, but none was asked for")
	}
}

func TestPrefixesAreColoredOnATerminalOnly(t *testing.T) {
	server := newTestServer(t, process("web"))
	server.log = func(w http.ResponseWriter, _ *http.Request, _ string) {
		io.WriteString(w, "[web-0] "+at(1, "text")+"\n")
	}
	args := []string{"--kubeconfig", server.kubeconfig(), "logs", "web", "--prefix"}
	t.Setenv("TERM", "xterm")
	for name, test := range map[string]struct {
		noColor bool
		want    string
	}{
		"colours":               {want: string((&lineStyle{color: true}).appendPrefix(nil, &origin{target: "web", instance: "web-0"})) + "text\r\n"},
		"NO_COLOR is respected": {noColor: true, want: "[web/web-0] text\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NO_COLOR", "1")
			if !test.noColor {
				os.Unsetenv("NO_COLOR")
			}
			terminal := openTerminal(t)
			screen := terminal.screen(t)
			if code := startWith(t, genericiooptions.IOStreams{Out: terminal.tty}, args...).wait(); code != 0 {
				t.Errorf("exit code %d", code)
			}
			until(t, "the line", func() bool { return strings.HasSuffix(screen.String(), "\n") })
			if diff := cmp.Diff(test.want, screen.String()); diff != "" {
				t.Errorf("screen (-want +got):\n%s", diff)
			}
		})
	}
	cmd := startWith(t, genericiooptions.IOStreams{}, args...)
	if cmd.wait(); cmd.out.String() != "[web/web-0] text\n" {
		t.Errorf("a file gets %q", cmd.out)
	}
}

// TestSilentServer has a user who doesn't want to wait.
func TestSilentServer(t *testing.T) {
	for name, keys := range map[string]string{"by WebSocket": "\x03", "by SPDY": "\r~."} {
		t.Run(name, func(t *testing.T) {
			for key, value := range transports[name] {
				t.Setenv(key, value)
			}
			server := newTestServer(t, process("web"))
			network := server.badNetwork()
			terminal := openTerminal(t)
			screen := terminal.screen(t)
			before := terminal.state(t)
			typed := make(chan string, 1)
			server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
				buf := make([]byte, len(keys))
				_, err := io.ReadFull(stdio.Stdin, buf)
				typed <- string(buf)
				<-ctx.Done()
				return errors.Join(err, ctx.Err())
			})
			cmd := startWith(t, genericiooptions.IOStreams{In: terminal.tty, Out: terminal.tty},
				"--kubeconfig", server.kubeconfig(), "--peer-timeout=4s", "exec", "-i", "-t", "web", "--", "sh")
			until(t, "the raw mode", func() bool { return terminal.raw(t) })
			// While the server answers, these keys are the command's.
			terminal.write(t, keys)
			if got := <-typed; got != keys {
				t.Fatalf("the command was sent %q, want %q", got, keys)
			}
			network.stall()
			until(t, "the message", func() bool { return strings.Contains(cmd.errOut.String(), "press ctrl-c or ~. to end the session") })
			network.unstall()
			until(t, "the server's answer", func() bool { return strings.Contains(cmd.errOut.String(), "the server answers again") })
			network.stall()
			until(t, "the message again", func() bool { return strings.Count(cmd.errOut.String(), "press ctrl-c or ~. to end the session") == 2 })
			terminal.write(t, keys)
			if code := cmd.wait(); code != exitBroken {
				t.Errorf("exit code %d, want %d", code, exitBroken)
			}
			if want := "the connection to the server was lost: the server had been silent, and you ended the session; the server ends the command"; !strings.Contains(cmd.errOut.String(), want) {
				t.Errorf("stderr %q lacks %q", cmd.errOut, want)
			}
			if diff := cmp.Diff(before, terminal.state(t)); diff != "" {
				t.Errorf("terminal afterwards (-want +got):\n%s", diff)
			}
			until(t, "plain text", func() bool { return strings.Contains(screen.String(), plainText+showCursor) })
		})
	}
}

// write types.
func (p *terminalPair) write(t *testing.T, keys string) {
	t.Helper()
	if _, err := p.user.Write([]byte(keys)); err != nil {
		t.Fatal(err)
	}
}

func (p *terminalPair) raw(t *testing.T) bool {
	return p.state(t).Lflag&(unix.ECHO|unix.ICANON|unix.ISIG) == 0
}

type panicking struct{}

func (panicking) Write([]byte) (int, error) { panic("a fault of ours") }

func TestTerminalIsRestoredAfterAPanic(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
			fmt.Fprintln(stdio.Stdout, "output")
			<-ctx.Done()
			return ctx.Err()
		})
		terminal := openTerminal(t)
		terminal.screen(t)
		before := terminal.state(t)
		func() {
			defer func() {
				if text := fmt.Sprint(recover()); !strings.Contains(text, "a fault of ours") || !strings.Contains(text, "panicking.Write") {
					t.Errorf("panic %q, want the first one and its stack", text)
				}
			}()
			code := Execute(t.Context(), genericiooptions.IOStreams{In: terminal.tty, Out: panicking{}, ErrOut: io.Discard},
				[]string{"--kubeconfig", server.kubeconfig(), "exec", "-i", "-t", "web", "--", "sh"})
			t.Errorf("exit code %d, want a panic", code)
		}()
		if diff := cmp.Diff(before, terminal.state(t)); diff != "" {
			t.Errorf("terminal afterwards (-want +got):\n%s", diff)
		}
		terminal.write(t, "\n")
	})
}

func TestTerminalIsRestoredAfterASignal(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT} {
		t.Run(signal.String(), func(t *testing.T) {
			server := newTestServer(t, process("web"))
			ended := make(chan struct{})
			server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
				defer close(ended)
				<-ctx.Done()
				return ctx.Err()
			})
			terminal := openTerminal(t)
			terminal.screen(t)
			before := terminal.state(t)
			cmd := plugin(t, server.kubeconfig(), "exec", "-i", "-t", "web", "--", "sh")
			cmd.Stdin, cmd.Stdout = terminal.tty, terminal.tty
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			until(t, "the raw mode", func() bool { return terminal.raw(t) })
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			_ = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); code != 128+int(signal) {
				t.Errorf("exit code %d, want %d", code, 128+int(signal))
			}
			if diff := cmp.Diff(before, terminal.state(t)); diff != "" {
				t.Errorf("terminal afterwards (-want +got):\n%s", diff)
			}
			<-ended
		})
	}
}

// TestSuspend stops the plugin with ctrl-z for longer than the server is
// believed in.
func TestSuspend(t *testing.T) {
	server := newTestServer(t, process("web"))
	server.serveExec(new(v1.TargetExecOptions), func(ctx context.Context, stdio streaming.Stdio) error {
		fmt.Fprintln(stdio.Stdout, "go on")
		line, err := bufio.NewReader(stdio.Stdin).ReadString('\n')
		fmt.Fprintf(stdio.Stdout, "read %q\n", line)
		return err
	})
	terminal := openTerminal(t)
	screen := terminal.screen(t)
	cmd := plugin(t, server.kubeconfig(), "--peer-timeout=1s", "exec", "-i", "web", "--", "sh")
	cmd.Stdin, cmd.Stdout = terminal.tty, terminal.tty
	// The terminal is its own, so that its keys make signals.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	until(t, "the session", func() bool { return strings.Contains(screen.String(), "go on") })
	// A process without a shell as its parent ignores the key; the signal is
	// the same.
	if err := cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1500 * time.Millisecond) // the state that is tested is a time that passes
	if err := cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	terminal.write(t, "a line\n")
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, stderr.String())
	}
	until(t, "the line", func() bool { return strings.Contains(screen.String(), `read "a line\n"`) })
}

func TestReplay(t *testing.T) {
	shell := process("shell", func(target *v1.Target) {
		target.Spec.Process.Stdin, target.Spec.Process.TTY = true, true
	})
	for name, test := range map[string]struct {
		args      []string
		want      int64
		wantFirst string
	}{
		"a screenful by default":  {args: []string{"attach", "-i", "shell"}, want: 25, wantFirst: plainText + "[82x26 81x25]"},
		"none if that is wanted":  {args: []string{"attach", "-i", "shell", "--replay=false"}, wantFirst: plainText + "[82x26 81x25]"},
		"also without a keyboard": {args: []string{"attach", "shell"}, want: 25, wantFirst: "[]"},
	} {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, shell)
			terminal := openTerminal(t)
			screen := terminal.screen(t)
			var seen v1.TargetAttachOptions
			server.serveAttach(&seen, func(_ context.Context, stdio streaming.Stdio) error {
				var sizes []string
				for stdio.Resize != nil && len(sizes) < 2 {
					size := <-stdio.Resize
					sizes = append(sizes, fmt.Sprintf("%dx%d", size.Width, size.Height))
				}
				_, err := fmt.Fprint(stdio.Stdout, sizes)
				return err
			})
			cmd := startWith(t, genericiooptions.IOStreams{In: terminal.tty, Out: terminal.tty}, append([]string{"--kubeconfig", server.kubeconfig()}, test.args...)...)
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
			}
			if seen.Replay != test.want || seen.CloseStdin {
				t.Errorf("options %+v, want a replay of %d lines", seen, test.want)
			}
			until(t, "the output", func() bool { return screen.String() == test.wantFirst })
			terminal.write(t, "\n")
		})
	}
}
