package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// transports are the ways to the server: both have to do.
var transports = map[string]map[string]string{
	"by WebSocket": {},
	"by SPDY":      {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false"},
}

func forEachTransport(t *testing.T, test func(t *testing.T)) {
	for name, env := range transports {
		t.Run(name, func(t *testing.T) {
			for key, value := range env {
				t.Setenv(key, value)
			}
			test(t)
		})
	}
}

// serveExec runs a callback as the command.
func (s *testServer) serveExec(seen *v1.TargetExecOptions, run func(ctx context.Context, stdio streaming.Stdio) error) {
	s.exec = func(w http.ResponseWriter, r *http.Request, _ string) {
		options := decode[v1.TargetExecOptions](s.t, r)
		options.TypeMeta.Reset()
		*seen = *options
		_ = streaming.ServeCommand(w, r, streaming.CommandRequest{
			Stdin: options.Stdin, Stdout: options.Stdout, Stderr: options.Stderr, TTY: options.TTY,
		}, streaming.Options{}, run)
	}
}

func (s *testServer) serveAttach(seen *v1.TargetAttachOptions, run func(ctx context.Context, stdio streaming.Stdio) error) {
	s.attach = func(w http.ResponseWriter, r *http.Request, _ string) {
		options := decode[v1.TargetAttachOptions](s.t, r)
		*seen = *options
		_ = streaming.ServeCommand(w, r, streaming.CommandRequest{
			Stdin: options.Stdin, Stdout: options.Stdout, Stderr: options.Stderr, TTY: options.TTY,
		}, streaming.Options{}, run)
	}
}

func TestExec(t *testing.T) {
	tests := map[string]struct {
		args       []string
		stdin      string
		run        func(ctx context.Context, stdio streaming.Stdio) error
		want       v1.TargetExecOptions
		wantOut    string
		wantErrOut string
		wantCode   int
	}{
		"output and error output arrive apart": {
			args: []string{"exec", "web", "--", "ls", "-t", "/usr"},
			run: func(_ context.Context, stdio streaming.Stdio) error {
				fmt.Fprintln(stdio.Stdout, "out")
				fmt.Fprintln(stdio.Stderr, "err")
				return nil
			},
			want:       v1.TargetExecOptions{Stdout: true, Stderr: true, Command: []string{"ls", "-t", "/usr"}},
			wantOut:    "out\n",
			wantErrOut: "err\n",
		},
		"the exit code is handed on": {
			args:       []string{"exec", "target/web", "--instance", "web-1", "--", "false"},
			run:        func(context.Context, streaming.Stdio) error { return &streaming.ExitError{Code: 42} },
			want:       v1.TargetExecOptions{Instance: "web-1", Stdout: true, Stderr: true, Command: []string{"false"}},
			wantErrOut: "command terminated with exit code 42\n",
			wantCode:   42,
		},
		"stdin is passed on, and ends": {
			args:  []string{"exec", "-i", "web/web-0", "--", "cat"},
			stdin: "some input",
			run: func(_ context.Context, stdio streaming.Stdio) error {
				_, err := io.Copy(stdio.Stdout, stdio.Stdin)
				return err
			},
			want:    v1.TargetExecOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true, Command: []string{"cat"}},
			wantOut: "some input",
		},
		"without -i there is no stdin": {
			args:  []string{"exec", "web", "--", "cat"},
			stdin: "some input",
			run: func(_ context.Context, stdio streaming.Stdio) error {
				if stdio.Stdin != nil {
					return errors.New("there is a stdin")
				}
				return nil
			},
			want: v1.TargetExecOptions{Stdout: true, Stderr: true, Command: []string{"cat"}},
		},
		"a terminal that isn't there is warned about": {
			args:       []string{"exec", "-it", "web", "--", "sh"},
			run:        func(context.Context, streaming.Stdio) error { return nil },
			want:       v1.TargetExecOptions{Stdin: true, Stdout: true, Stderr: true, Command: []string{"sh"}},
			wantErrOut: "Unable to use a TTY - input is not a terminal or the right kind of file\n",
		},
		"the warning is left out when it should be quiet": {
			args: []string{"exec", "-qit", "web", "--", "sh"},
			run:  func(context.Context, streaming.Stdio) error { return nil },
			want: v1.TargetExecOptions{Stdin: true, Stdout: true, Stderr: true, Command: []string{"sh"}},
		},
	}
	forEachTransport(t, func(t *testing.T) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				server := newTestServer(t, process("web"))
				var got v1.TargetExecOptions
				server.serveExec(&got, test.run)
				cmd := server.start(strings.NewReader(test.stdin), test.args...)
				if code := cmd.wait(); code != test.wantCode {
					t.Errorf("exit code %d, want %d", code, test.wantCode)
				}
				if diff := cmp.Diff(test.want, got); diff != "" {
					t.Errorf("options (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(test.wantOut, cmd.out.String()); diff != "" {
					t.Errorf("stdout (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff(test.wantErrOut, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
			})
		}
	})
}

func TestInterruptedCommandEndsWithTheSignalsCode(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		server := newTestServer(t, process("web"))
		started, ended := make(chan struct{}), make(chan struct{})
		var seen v1.TargetExecOptions
		server.serveExec(&seen, func(ctx context.Context, _ streaming.Stdio) error {
			close(started)
			defer close(ended)
			<-ctx.Done()
			return context.Cause(ctx)
		})
		cmd := server.start(nil, "exec", "web", "--", "sleep", "1h")
		<-started
		cmd.cancel(terminated{syscall.SIGINT})
		if code := cmd.wait(); code != 130 {
			t.Errorf("exit code %d, want 130", code)
		}
		if got := cmd.errOut.String(); got != "" {
			t.Errorf("stderr %q, want none", got)
		}
		<-ended
	})
}

func TestRefusals(t *testing.T) {
	forbidden := apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New(`User "me" cannot create resource "targets/exec"`))
	refuse := func(err *apierrors.StatusError) func(http.ResponseWriter, *http.Request, string) {
		return func(w http.ResponseWriter, _ *http.Request, _ string) { writeError(w, err) }
	}
	notFound := `Error from server (NotFound): targets.streaming.aaserver.io "x" not found` + "\n"
	tests := map[string]struct {
		args   []string
		refuse func(http.ResponseWriter, *http.Request, string)
		want   string
	}{
		"logs of a target that doesn't exist":         {args: []string{"logs", "x"}, want: notFound},
		"exec in a target that doesn't exist":         {args: []string{"exec", "x", "--", "ls"}, want: notFound},
		"attach to a target that doesn't exist":       {args: []string{"attach", "x"}, want: notFound},
		"port-forward to a target that doesn't exist": {args: []string{"port-forward", "x", ":80"}, want: notFound},
		"port-forward to a named port of a target that doesn't exist": {
			args: []string{"port-forward", "x", ":http"}, want: notFound},
		"exec where the instance doesn't run": {
			args:   []string{"exec", "web", "--", "ls"},
			refuse: refuse(apierrors.NewConflict(v1.Resource("targets"), "web", errors.New("instance web-0 isn't running: it exited with 1"))),
			want:   `Error from server (Conflict): Operation cannot be fulfilled on targets.streaming.aaserver.io "web": instance web-0 isn't running: it exited with 1` + "\n",
		},
		"attach without permission": {
			args:   []string{"attach", "web"},
			refuse: refuse(forbidden),
			want:   "Error from server (Forbidden): " + forbidden.ErrStatus.Message + "\n",
		},
		"port-forward without permission": {
			args:   []string{"port-forward", "web", ":80"},
			refuse: refuse(forbidden),
			want:   "Error from server (Forbidden): " + forbidden.ErrStatus.Message + "\n",
		},
		"logs where the source has none": {
			args:   []string{"logs", "web"},
			refuse: refuse(apierrors.NewBadRequest("a tcp target has no log")),
			want:   "Error from server (BadRequest): a tcp target has no log\n",
		},
		"exec where a proxy on the way answers in text": {
			args: []string{"exec", "web", "--", "ls"},
			refuse: func(w http.ResponseWriter, _ *http.Request, _ string) {
				http.Error(w, "service unavailable", http.StatusServiceUnavailable)
			},
			want: "Error from server (ServiceUnavailable): the server is currently unable to handle the request (connect targets.streaming.aaserver.io web): service unavailable\n",
		},
		"port-forward where a proxy on the way answers in text": {
			args: []string{"port-forward", "web", ":80"},
			refuse: func(w http.ResponseWriter, _ *http.Request, _ string) {
				http.Error(w, "service unavailable", http.StatusServiceUnavailable)
			},
			want: "Error from server (ServiceUnavailable): the server is currently unable to handle the request (connect targets.streaming.aaserver.io web): service unavailable\n",
		},
	}
	forEachTransport(t, func(t *testing.T) {
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				server := newTestServer(t, process("web"))
				server.log, server.exec, server.attach, server.portforward = test.refuse, test.refuse, test.refuse, test.refuse
				cmd := server.start(nil, test.args...)
				if code := cmd.wait(); code != 1 {
					t.Errorf("exit code %d, want 1", code)
				}
				if diff := cmp.Diff(test.want, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
			})
		}
	})
}

func TestFallsBackToSPDYOnlyWhereThatMayHelp(t *testing.T) {
	tests := map[string]struct {
		refuse   func(w http.ResponseWriter)
		wantCode int
	}{
		"a proxy that doesn't know WebSockets": {
			refuse: func(w http.ResponseWriter) { http.Error(w, "what?", http.StatusBadRequest) },
		},
		"get isn't allowed, create may be": {
			refuse: func(w http.ResponseWriter) {
				writeError(w, apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New("cannot get")))
			},
		},
		"the server's own answer is the answer": {
			refuse:   func(w http.ResponseWriter) { writeError(w, apierrors.NewServiceUnavailable("draining")) },
			wantCode: 1,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, process("web"))
			var seen v1.TargetExecOptions
			server.serveExec(&seen, func(context.Context, streaming.Stdio) error { return nil })
			server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method != http.MethodGet {
					return false
				}
				test.refuse(w)
				return true
			}
			cmd := server.start(nil, "exec", "web", "--", "true")
			if code := cmd.wait(); code != test.wantCode {
				t.Errorf("exit code %d, want %d; stderr %q", code, test.wantCode, cmd.errOut)
			}
			const path = "/apis/streaming.aaserver.io/v1/namespaces/shop/targets/web/exec"
			want := []string{"GET " + path}
			if test.wantCode == 0 {
				want = append(want, "POST "+path)
			}
			if diff := cmp.Diff(want, server.seen()); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
		})
	}
}

func TestServerThatIsNotThere(t *testing.T) {
	server := newTestServer(t)
	host := strings.TrimPrefix(server.srv.URL, "https://")
	config := server.kubeconfig()
	server.srv.Close()
	want := "The connection to the server " + host + " was refused - did you specify the right host or port?\n"
	forEachTransport(t, func(t *testing.T) {
		for _, args := range [][]string{
			{"logs", "web"}, {"logs", "-f", "-l", "a=b"}, {"exec", "web", "--", "ls"}, {"attach", "web"},
			{"port-forward", "web", ":80"}, {"port-forward", "web", ":http"},
		} {
			cmd := startWith(t, genericiooptions.IOStreams{}, append([]string{"--kubeconfig", config}, args...)...)
			if code := cmd.wait(); code != 1 {
				t.Errorf("%v: exit code %d, want 1", args, code)
			}
			if diff := cmp.Diff(want, cmd.errOut.String()); diff != "" {
				t.Errorf("%v: stderr (-want +got):\n%s", args, diff)
			}
		}
	})
}

func TestAttach(t *testing.T) {
	tty := func(target *v1.Target) { target.Spec.Process.Stdin, target.Spec.Process.TTY = true, true }
	tests := map[string]struct {
		target     *v1.Target
		args       []string
		want       v1.TargetAttachOptions
		wantErrOut string
	}{
		"output alone": {
			target: process("web"),
			args:   []string{"attach", "web"},
			want:   v1.TargetAttachOptions{Stdout: true, Stderr: true},
		},
		"stdin of a target without a terminal": {
			target:     process("web"),
			args:       []string{"attach", "-i", "web/web-1"},
			want:       v1.TargetAttachOptions{Instance: "web-1", Stdin: true, Stdout: true, Stderr: true},
			wantErrOut: "If you don't see a command prompt, try pressing enter.\n",
		},
		"a terminal for a target without one": {
			target: process("web"),
			args:   []string{"attach", "-it", "web"},
			want:   v1.TargetAttachOptions{Stdin: true, Stdout: true, Stderr: true},
			wantErrOut: "error: Unable to use a TTY - target web did not allocate one\n" +
				"If you don't see a command prompt, try pressing enter.\n",
		},
		"no terminal for a target with one": {
			target: process("web", tty),
			args:   []string{"attach", "-i", "web"},
			want:   v1.TargetAttachOptions{Stdin: true, Stdout: true, Stderr: true},
			wantErrOut: "Unable to use a TTY - input is not a terminal or the right kind of file\n" +
				"If you don't see a command prompt, try pressing enter.\n",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, test.target)
			var got v1.TargetAttachOptions
			server.serveAttach(&got, func(_ context.Context, stdio streaming.Stdio) error {
				fmt.Fprintln(stdio.Stdout, "output")
				return &streaming.ExitError{Code: 9}
			})
			cmd := server.start(nil, test.args...)
			if code := cmd.wait(); code != 9 {
				t.Errorf("exit code %d, want 9", code)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff("output\n", cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.wantErrOut+"command terminated with exit code 9\n", cmd.errOut.String()); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
		})
	}
}
