package drivertest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"aaserver.io/aaserver/internal/driver"
)

// random returns bytes of all values.
func random(n int) []byte {
	data := make([]byte, n)
	source := rand.NewChaCha8([32]byte{1})
	source.Read(data)
	return data
}

func testExec(t *testing.T, h Harness) {
	d, req := h.Instance(t, Instance{Script: idle})
	execer := func(t *testing.T) driver.Execer { return open[driver.Execer](t, d, req) }

	type result struct {
		Stdout, Stderr string
		Code           int
	}
	for name, test := range map[string]struct {
		stdin   io.Reader
		command []string
		want    result
	}{
		"a command that succeeds has exit code 0":    {command: []string{"true"}},
		"a command's exit code is handed on":         {command: sh("exit 7"), want: result{Code: 7}},
		"a signal is 128 and its number":             {command: sh("kill -TERM $$"), want: result{Code: 143}},
		"stdout and stderr are apart":                {command: sh("echo out; echo err >&2"), want: result{Stdout: "out\n", Stderr: "err\n"}},
		"arguments are handed on as they are":        {command: []string{"printf", "%s|", "a b", "", "$(X)", "*", "ü\n"}, want: result{Stdout: "a b||$(X)|*|ü\n|"}},
		"without stdin, a command reads end of file": {command: sh("cat; echo end"), want: result{Stdout: "end\n"}},
		"the end of the client's stdin is the command's": {
			stdin: strings.NewReader("in"), command: sh("cat; echo :end"), want: result{Stdout: "in:end\n"},
		},
		"a command needn't read its stdin": {
			stdin: bytes.NewReader(random(4 << 20)), command: sh("exit 3"), want: result{Code: 3},
		},
		"what stays behind with an open stdout is ended": {
			command: sh("sleep 1000 & echo main"), want: result{Stdout: "main\n"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var got result
			got.Stdout, got.Stderr, got.Code = exec(t, execer(t), test.stdin, test.command...)
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("result (-want +got):\n%s", diff)
			}
		})
	}

	t.Run("bytes of all values pass in both directions", func(t *testing.T) {
		data := random(8 << 20)
		out, _, code := exec(t, execer(t), bytes.NewReader(data), "cat")
		if code != 0 || out != string(data) {
			t.Errorf("exit code %d, %d bytes of %d came back, equal: %t", code, len(out), len(data), out == string(data))
		}
	})

	t.Run("many commands run at once", func(t *testing.T) {
		e := execer(t)
		var all sync.WaitGroup
		for i := range 24 {
			all.Go(func() {
				want := fmt.Sprint(i, "\n")
				run, err := e.Exec(bounded(t), driver.ExecOptions{Command: sh("cat; exit " + fmt.Sprint(i))})
				if err != nil {
					t.Errorf("Exec: %v", err)
					return
				}
				var out bytes.Buffer
				err = run(bounded(t), driver.Stdio{Stdin: closingReader{strings.NewReader(want)}, Stdout: &out})
				code := 0
				if exit, ok := errors.AsType[*driver.ExitError](err); ok {
					code = exit.Code
				}
				if code != i || out.String() != want {
					t.Errorf("command %d: error %v, output %q", i, err, out.String())
				}
			})
		}
		all.Wait()
	})

	for name, command := range map[string]string{
		"the end of the context ends a command and its children":              "sleep 1000 & echo $! ready; wait",
		"the end of the context ends orphans":                                 "(sh -c 'sleep 1000 & echo $! ready'); sleep 1000",
		"the end of the context ends what ignores signals":                    "trap '' TERM INT HUP; sleep 1000 & echo $! ready; while :; do wait; done",
		"the end of the context ends what has left session and process group": "setsid sh -c 'echo $$ ready; exec sleep 1000' & sleep 1000",
	} {
		t.Run(name, func(t *testing.T) {
			e := execer(t)
			run, err := e.Exec(bounded(t), driver.ExecOptions{Command: sh(command)})
			if err != nil {
				t.Fatalf("Exec: %v", err)
			}
			cause := errors.New("the client has gone")
			ctx, cancel := context.WithCancelCause(bounded(t))
			defer cancel(nil)
			stdinReader, stdinWriter := io.Pipe()
			defer stdinWriter.Close()
			out := newOutput()
			done := make(chan error, 1)
			go func() { done <- run(ctx, driver.Stdio{Stdin: stdinReader, Stdout: out}) }()
			out.wait(t, "ready")
			cancel(cause)
			if err := <-done; !errors.Is(err, cause) {
				t.Errorf("Run returned %v, want the context's cause", err)
			}
			pid := strings.Fields(out.String())[0]
			if _, _, code := exec(t, e, nil, "sh", "-c", "kill -0 "+pid+" 2>/dev/null"); code == 0 {
				t.Errorf("process %s is left", pid)
			}
		})
	}

	t.Run("a command has a terminal of the client's size", func(t *testing.T) {
		run, err := execer(t).Exec(bounded(t), driver.ExecOptions{TTY: true, Command: sh(
			`test -t 0 && test -t 1 && test -t 2 || exit 9
			until [ "$(stty size)" = "40 100" ]; do sleep 0.02; done; echo first
			until [ "$(stty size)" = "50 120" ]; do sleep 0.02; done; echo second
			read answer; echo "<$answer>"; exit 4`)})
		if err != nil {
			t.Fatalf("Exec: %v", err)
		}
		stdinReader, stdinWriter := io.Pipe()
		sizes := make(chan driver.TerminalSize)
		defer close(sizes)
		out := newOutput()
		done := make(chan error, 1)
		go func() {
			done <- run(bounded(t), driver.Stdio{Stdin: stdinReader, Stdout: out, Resize: sizes})
		}()
		sizes <- driver.TerminalSize{Width: 100, Height: 40}
		out.wait(t, "first")
		sizes <- driver.TerminalSize{Width: 120, Height: 50}
		out.wait(t, "second")
		io.WriteString(stdinWriter, "yes\r")
		if code := exitCode(t, <-done); code != 4 {
			t.Errorf("exit code %d, want 4; output %q", code, out.String())
		}
		if !strings.Contains(out.String(), "<yes>\r\n") {
			t.Errorf("output %q", out.String())
		}
	})

	t.Run("^C interrupts what runs in the terminal", func(t *testing.T) {
		run, err := execer(t).Exec(bounded(t), driver.ExecOptions{TTY: true, Command: sh("trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done")})
		if err != nil {
			t.Fatalf("Exec: %v", err)
		}
		stdinReader, stdinWriter := io.Pipe()
		out := newOutput()
		done := make(chan error, 1)
		go func() { done <- run(bounded(t), driver.Stdio{Stdin: stdinReader, Stdout: out}) }()
		out.wait(t, "ready")
		stdinWriter.Write([]byte{3})
		if code := exitCode(t, <-done); code != 5 {
			t.Errorf("exit code %d, want 5", code)
		}
		if !strings.Contains(out.String(), "interrupted") {
			t.Errorf("output %q", out.String())
		}
	})

	t.Run("a command that doesn't exist is refused beforehand", func(t *testing.T) {
		_, err := execer(t).Exec(bounded(t), driver.ExecOptions{Command: []string{"no-such-command-anywhere"}})
		wantKind(t, err, driver.Invalid)
	})

	t.Run("a client whose streams fail ends its command", func(t *testing.T) {
		run, err := execer(t).Exec(bounded(t), driver.ExecOptions{Command: sh("while :; do echo more; done")})
		if err != nil {
			t.Fatalf("Exec: %v", err)
		}
		if err := run(bounded(t), driver.Stdio{Stdout: brokenWriter{}}); !errors.Is(err, errBroken) {
			t.Errorf("error %v, want the client's", err)
		}
	})
}

var errBroken = errors.New("the client's stream is broken")

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errBroken }

func testAttach(t *testing.T, h Harness) {
	t.Run("all clients get the output, and the exit code", func(t *testing.T) {
		d, req := h.Instance(t, Instance{Stdin: true, Script: `while read line; do
			case $line in end) exit 6;; err*) echo "$line" >&2;; *) echo "$line";; esac
		done`})
		a := open[driver.Attacher](t, d, req)
		type client struct {
			stdin       *io.PipeWriter
			out, errOut *output
			done        chan error
		}
		attach := func() client {
			run, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true})
			if err != nil {
				t.Fatalf("Attach: %v", err)
			}
			r, w := io.Pipe()
			c := client{w, newOutput(), newOutput(), make(chan error, 1)}
			go func() { c.done <- run(bounded(t), driver.Stdio{Stdin: r, Stdout: c.out, Stderr: c.errOut}) }()
			// It has joined when it sees what it has written.
			io.WriteString(w, "joined\n")
			c.out.wait(t, "joined")
			return c
		}
		one, two := attach(), attach()
		io.WriteString(one.stdin, "from one\n")
		one.out.wait(t, "from one\n")
		two.out.wait(t, "from one\n")
		io.WriteString(two.stdin, "error from two\n")
		one.errOut.wait(t, "error from two\n")
		two.errOut.wait(t, "error from two\n")

		// The end of one client's input isn't the instance's.
		one.stdin.Close()
		io.WriteString(two.stdin, "still\n")
		one.out.wait(t, "still\n")

		three := attach()
		io.WriteString(three.stdin, "end\n")
		for i, c := range []client{one, two, three} {
			if code := exitCode(t, <-c.done); code != 6 {
				t.Errorf("client %d: exit code %d, want 6", i, code)
			}
		}
	})

	t.Run("a client may end the instance's stdin for all", func(t *testing.T) {
		d, req := h.Instance(t, Instance{Stdin: true, Script: "cat; echo end; exit 3"})
		a := open[driver.Attacher](t, d, req)
		run, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true, CloseStdin: true})
		if err != nil {
			t.Fatalf("Attach: %v", err)
		}
		out := newOutput()
		err = run(bounded(t), driver.Stdio{Stdin: closingReader{strings.NewReader("all\n")}, Stdout: out})
		if code := exitCode(t, err); code != 3 {
			t.Errorf("exit code %d, want 3", code)
		}
		if diff := cmp.Diff("all\nend\n", out.String()); diff != "" {
			t.Errorf("output (-want +got):\n%s", diff)
		}
	})

	t.Run("a client that comes later gets the last lines, if any are kept", func(t *testing.T) {
		for _, tty := range []bool{false, true} {
			newline := "\n"
			if tty {
				newline = "\r\n"
			}
			d, req := h.Instance(t, Instance{Stdin: true, TTY: tty, Script: "stty -echo 2>/dev/null; echo one; echo two; echo three; while read line; do echo \"<$line>\"; done"})
			a := open[driver.Attacher](t, d, req)
			attach := func(replay int64, write string) *output {
				run, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true, TTY: tty, Replay: replay})
				if err != nil {
					t.Fatalf("Attach: %v", err)
				}
				r, w := io.Pipe()
				out, done := newOutput(), make(chan error, 1)
				ctx, cancel := context.WithCancel(bounded(t))
				go func() { done <- run(ctx, driver.Stdio{Stdin: r, Stdout: out}) }()
				io.WriteString(w, write+"\n")
				out.wait(t, "<"+write+">"+newline)
				cancel()
				<-done
				return out
			}
			attach(0, "first") // the lines before have been written when it is back
			if kept := attach(2, "second").String(); kept != "<second>"+newline {
				want := "three" + newline + "<first>" + newline + "<second>" + newline
				if diff := cmp.Diff(want, kept); diff != "" {
					t.Errorf("tty %t: output (-want +got):\n%s", tty, diff)
				}
			}
		}
	})

	t.Run("a client that leaves doesn't end the instance", func(t *testing.T) {
		d, req := h.Instance(t, Instance{Stdin: true, Script: "cat"})
		a := open[driver.Attacher](t, d, req)
		for range 3 {
			run, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true})
			if err != nil {
				t.Fatalf("Attach: %v", err)
			}
			cause := errors.New("the client has gone")
			ctx, cancel := context.WithCancelCause(bounded(t))
			r, w := io.Pipe()
			out := newOutput()
			done := make(chan error, 1)
			go func() { done <- run(ctx, driver.Stdio{Stdin: r, Stdout: out}) }()
			io.WriteString(w, "hello\n")
			out.wait(t, "hello\n")
			cancel(cause)
			if err := <-done; !errors.Is(err, cause) {
				t.Errorf("Run returned %v, want the context's cause", err)
			}
		}
	})

	t.Run("an instance that doesn't read its stdin doesn't hold a client", func(t *testing.T) {
		d, req := h.Instance(t, Instance{Stdin: true, Script: idle})
		a := open[driver.Attacher](t, d, req)
		run, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true})
		if err != nil {
			t.Fatalf("Attach: %v", err)
		}
		cause := errors.New("the client has gone")
		ctx, cancel := context.WithCancelCause(bounded(t))
		defer cancel(nil)
		r, w := io.Pipe()
		done := make(chan error, 1)
		go func() { done <- run(ctx, driver.Stdio{Stdin: r, Stdout: newOutput()}) }()
		// The first half is taken by the driver, if not by the instance.
		w.Write(random(32 << 10))
		written := make(chan struct{})
		go func() {
			defer close(written)
			w.Write(random(4 << 20))
		}()
		cancel(cause)
		if err := <-done; !errors.Is(err, cause) {
			t.Errorf("Run returned %v, want the context's cause", err)
		}
		<-written
	})

	t.Run("a terminal is shared, and the last size counts", func(t *testing.T) {
		d, req := h.Instance(t, Instance{Stdin: true, TTY: true, Script: `
			until [ "$(stty size)" = "40 100" ]; do sleep 0.02; done; echo first
			until [ "$(stty size)" = "50 120" ]; do sleep 0.02; done; echo second
			read answer; echo "<$answer>"`})
		a := open[driver.Attacher](t, d, req)
		attach := func() (stdin io.Writer, out *output, sizes chan driver.TerminalSize, done chan error) {
			run, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true, TTY: true})
			if err != nil {
				t.Fatalf("Attach: %v", err)
			}
			r, w := io.Pipe()
			out, sizes, done = newOutput(), make(chan driver.TerminalSize), make(chan error, 1)
			go func() {
				done <- run(bounded(t), driver.Stdio{Stdin: r, Stdout: out, Resize: sizes})
			}()
			return w, out, sizes, done
		}
		_, outA, sizesA, doneA := attach()
		inB, outB, sizesB, doneB := attach()
		sizesA <- driver.TerminalSize{Width: 100, Height: 40}
		outA.wait(t, "first")
		sizesB <- driver.TerminalSize{Width: 120, Height: 50}
		outA.wait(t, "second")
		outB.wait(t, "second")
		io.WriteString(inB, "yes\r")
		if code := exitCode(t, <-doneA); code != 0 {
			t.Errorf("exit code %d", code)
		}
		if code := exitCode(t, <-doneB); code != 0 {
			t.Errorf("exit code %d", code)
		}
		for _, out := range []*output{outA, outB} {
			if !strings.Contains(out.String(), "<yes>\r\n") {
				t.Errorf("output %q", out.String())
			}
		}
	})

	t.Run("a stdin or terminal that the instance lacks is refused", func(t *testing.T) {
		d, req := h.Instance(t, Instance{Script: idle})
		a := open[driver.Attacher](t, d, req)
		_, err := a.Attach(bounded(t), driver.AttachOptions{Stdin: true})
		wantKind(t, err, driver.Invalid)
		_, err = a.Attach(bounded(t), driver.AttachOptions{TTY: true})
		wantKind(t, err, driver.Invalid)
	})
}
