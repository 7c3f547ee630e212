package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

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
