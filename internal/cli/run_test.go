package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// status gives a target an instance.
func status(state v1.InstanceState) func(*v1.Target) {
	return func(target *v1.Target) {
		target.Status.Instances = []v1.InstanceStatus{{Name: target.Name + "-0", State: state}}
	}
}

var runs = v1.InstanceState{Running: &v1.InstanceStateRunning{}}

func TestRunCreatesATarget(t *testing.T) {
	tests := map[string]struct {
		args    []string
		want    *v1.TargetSpec
		wantOut string
	}{
		"a command": {
			args:    []string{"run", "web", "--", "sleep", "-x", "1h"},
			want:    &v1.TargetSpec{Process: &v1.ProcessSource{Command: []string{"sleep", "-x", "1h"}}},
			wantOut: "target.streaming.aaserver.io/web created\n",
		},
		"all that can be said": {
			args: []string{"run", "web", "--agent=edge", "--class=small", "--port=http:8080", "--port=53/udp", "--env=A=b=c", "--env=B=",
				"--restart=OnFailure", "--replicas=3", "-o", "name", "--", "sleep"},
			want: &v1.TargetSpec{
				AgentName: "edge", ClassName: "small", RestartPolicy: v1.RestartOnFailure, Replicas: ptr.To[int32](3),
				Ports:   []v1.TargetPort{{Name: "http", Port: 8080}, {Name: "port-53", Port: 53, Protocol: v1.ProtocolUDP}},
				Process: &v1.ProcessSource{Command: []string{"sleep"}, Env: []v1.EnvVar{{Name: "A", Value: "b=c"}, {Name: "B"}}},
			},
			wantOut: "target.streaming.aaserver.io/web\n",
		},
		"a dry run on the server": {
			args:    []string{"run", "web", "--dry-run=server", "--rm", "-i", "--", "sleep"},
			wantOut: "target.streaming.aaserver.io/web created (server dry run)\n",
		},
		"a dry run here": {
			args: []string{"run", "web", "--dry-run=client", "-o", "yaml", "--rm", "-i", "-t", "--", "sh"},
			wantOut: `apiVersion: streaming.aaserver.io/v1
kind: Target
metadata:
  name: web
  namespace: shop
spec:
  process:
    command:
    - sh
    stdin: true
    tty: true
  restartPolicy: Never
status: {}
`,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t)
			cmd := server.start(nil, test.args...)
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
			}
			if diff := cmp.Diff(test.wantOut, cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			var got *v1.TargetSpec
			if target := server.targets["web"]; target != nil {
				got = &target.Spec
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
		})
	}
}

func TestRunRefusesWhatMakesNoSense(t *testing.T) {
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"no name":                        {[]string{"--", "ls"}, "NAME is required"},
		"no dashes":                      {[]string{"web", "ls"}, "two dashes before the command"},
		"no command":                     {[]string{"web"}, "at least one command"},
		"a terminal without input":       {[]string{"web", "-t", "--", "ls"}, "-i/--stdin is required"},
		"a removal without an end":       {[]string{"web", "--rm", "--", "ls"}, "--rm should only be used with"},
		"several instances to attach to": {[]string{"web", "-i", "--replicas=2", "--", "ls"}, "--replicas=2 can't be attached to"},
		"two kinds of output":            {[]string{"web", "-i", "-o", "yaml", "--", "ls"}, "--output can't be used"},
		"a format that there isn't":      {[]string{"web", "-o", "xml", "--", "ls"}, "allowed formats are"},
		"a variable without a value":     {[]string{"web", "--env=A", "--", "ls"}, "expected NAME=VALUE"},
		"a port that is none":            {[]string{"web", "--port=http:0", "--", "ls"}, "expected [NAME:]PORT[/udp]"},
		"a protocol that there isn't":    {[]string{"web", "--port=80/sctp", "--", "ls"}, "expected [NAME:]PORT[/udp]"},
		"no time to start":               {[]string{"web", "--attach", "--timeout=0s", "--", "ls"}, "--timeout must be greater than 0"},
		"a dry run that there isn't":     {[]string{"web", "--dry-run=maybe", "--", "ls"}, "Invalid dry-run value"},
		"a patience that there can't be": {[]string{"web", "--peer-timeout=0s", "--", "ls"}, "--peer-timeout"},
		"a name that exists":             {[]string{"old", "--rm", "--attach", "--", "ls"}, `targets.streaming.aaserver.io "old" already exists`},
	} {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, process("old"))
			server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if r.Method == http.MethodPost {
					writeError(w, apierrors.NewAlreadyExists(v1.Resource("targets"), "old"))
				}
				return r.Method == http.MethodPost
			}
			cmd := server.start(nil, append([]string{"run"}, test.args...)...)
			if code := cmd.wait(); code != 1 || !strings.Contains(cmd.errOut.String(), test.want) {
				t.Errorf("exit code %d, want 1 and %q in %q", code, test.want, cmd.errOut)
			}
			if server.targets["old"] == nil || len(server.targets) != 1 {
				t.Errorf("targets %v, want the old one alone", server.targets)
			}
		})
	}
}

func TestRunAttaches(t *testing.T) {
	const created = "target.streaming.aaserver.io/web created\n"
	const deleted = "target.streaming.aaserver.io/web deleted\n"
	ended := func(code int32) v1.InstanceState {
		return v1.InstanceState{Terminated: &v1.InstanceStateTerminated{ExitCode: code, Reason: "Error"}}
	}
	tests := map[string]struct {
		args       []string
		stdin      string
		created    func(*v1.Target)
		attach     func(ctx context.Context, stdio streaming.Stdio) error
		want       v1.TargetAttachOptions
		wantPolicy v1.RestartPolicy
		wantKept   bool
		wantOut    string
		wantErrOut string
		wantCode   int
	}{
		"all of its output, and its exit code": {
			args: []string{"--attach"}, created: status(runs),
			attach: func(_ context.Context, stdio streaming.Stdio) error {
				fmt.Fprintln(stdio.Stdout, "out")
				fmt.Fprintln(stdio.Stderr, "err")
				return &streaming.ExitError{Code: 5}
			},
			want:     v1.TargetAttachOptions{Instance: "web-0", Stdout: true, Stderr: true, Replay: math.MaxInt64},
			wantKept: true, wantOut: "out\n", wantErrOut: created + "err\ncommand terminated with exit code 5\n", wantCode: 5,
		},
		"input, with its end, and deletion": {
			args: []string{"-i", "--rm"}, stdin: "in", created: status(runs),
			attach: func(_ context.Context, stdio streaming.Stdio) error {
				_, err := io.Copy(stdio.Stdout, stdio.Stdin)
				return err
			},
			want:       v1.TargetAttachOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true, Replay: math.MaxInt64, CloseStdin: true},
			wantPolicy: v1.RestartNever, wantOut: "in", wantErrOut: created + deleted,
		},
		"a policy that was asked for": {
			args: []string{"--attach", "--rm", "--restart=Always", "-q"}, created: status(runs),
			attach:     func(context.Context, streaming.Stdio) error { return nil },
			want:       v1.TargetAttachOptions{Instance: "web-0", Stdout: true, Stderr: true, Replay: math.MaxInt64},
			wantPolicy: v1.RestartAlways,
		},
		"one that has ended already has a log": {
			args: []string{"--attach", "--rm"}, created: status(ended(3)),
			wantPolicy: v1.RestartNever, wantOut: "log of Stdout\n",
			wantErrOut: created + "log of Stderr\n" + deleted + "command terminated with exit code 3\n", wantCode: 3,
		},
		"one that can't be started is told so": {
			args: []string{"--attach", "--rm"}, wantPolicy: v1.RestartNever,
			created:    status(v1.InstanceState{Waiting: &v1.InstanceStateWaiting{Reason: "StartError", Message: "no such command"}}),
			wantErrOut: created + deleted + "error: target web can't be attached to: no such command\n", wantCode: 1,
		},
		"one that couldn't be started is told so": {
			args: []string{"--attach", "--rm"}, wantPolicy: v1.RestartNever,
			created:    status(v1.InstanceState{Terminated: &v1.InstanceStateTerminated{Reason: "StartError", Message: "no such user", ExitCode: 128}}),
			wantErrOut: created + deleted + "error: target web can't be attached to: no such user\n", wantCode: 1,
		},
		"one that crashes is told so": {
			args: []string{"--attach"}, wantKept: true,
			created:    status(v1.InstanceState{Waiting: &v1.InstanceStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 1s: exit code 2"}}),
			wantErrOut: created + "error: target web can't be attached to: it ends as soon as it is started: back-off 1s: exit code 2; see 'kubectl target logs web'\n", wantCode: 1,
		},
		"one that nobody starts is told so": {
			args: []string{"--attach", "--rm", "--agent=edge", "--timeout=300ms"}, wantPolicy: v1.RestartNever,
			wantErrOut: created + deleted + `error: target web can't be attached to: it doesn't run after 300ms (--timeout): agent "edge" hasn't said anything of it: it may be down, or not exist` + "\n", wantCode: 1,
		},
		"one that waits for long is told so": {
			args: []string{"--attach", "--timeout=300ms"}, wantKept: true,
			created:    status(v1.InstanceState{Waiting: &v1.InstanceStateWaiting{Reason: "Pending", Message: "instances of another haven't ended"}}),
			wantErrOut: created + "error: target web can't be attached to: it doesn't run after 300ms (--timeout): Pending: instances of another haven't ended\n", wantCode: 1,
		},
		"a class that denies the connection": {
			args: []string{"--attach", "--rm"}, created: status(runs), wantPolicy: v1.RestartNever,
			wantErrOut: created + deleted + "Error from server (Forbidden): class small allows no such thing\n", wantCode: 1,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t)
			var policy v1.RestartPolicy
			server.created = func(target *v1.Target) {
				policy = target.Spec.RestartPolicy
				if test.created != nil {
					test.created(target)
				}
			}
			server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
				fmt.Fprintf(w, "log of %s\n", r.URL.Query().Get("stream"))
			}
			var got v1.TargetAttachOptions
			server.serveAttach(&got, test.attach)
			if test.attach == nil {
				server.attach = func(w http.ResponseWriter, r *http.Request, _ string) {
					writeError(w, &apierrors.StatusError{ErrStatus: metav1.Status{
						Status: metav1.StatusFailure, Code: http.StatusForbidden, Reason: metav1.StatusReasonForbidden, Message: "class small allows no such thing",
					}})
				}
			}
			cmd := server.start(strings.NewReader(test.stdin), slices.Concat([]string{"run", "web"}, test.args, []string{"--", "cmd"})...)
			if code := cmd.wait(); code != test.wantCode {
				t.Errorf("exit code %d, want %d", code, test.wantCode)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("options of attach (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.wantOut, cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.wantErrOut, cmd.errOut.String()); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
			if kept := server.targets["web"] != nil; kept != test.wantKept {
				t.Errorf("the target is kept: %t, want %t", kept, test.wantKept)
			}
			if policy != test.wantPolicy {
				t.Errorf("restart policy %q, want %q", policy, test.wantPolicy)
			}
		})
	}
}

// TestRunThatEndsBeforeItIsAttachedTo: it runs when it is looked at, and is over
// when it is attached to.
func TestRunThatEndsBeforeItIsAttachedTo(t *testing.T) {
	server := newTestServer(t)
	server.created = status(runs)
	server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
		fmt.Fprint(w, r.URL.Query().Get("stream"))
	}
	server.attach = func(w http.ResponseWriter, _ *http.Request, _ string) {
		target := server.targets["web"].DeepCopy()
		status(v1.InstanceState{Terminated: &v1.InstanceStateTerminated{ExitCode: 0}})(target)
		server.apply(target)
		writeError(w, apierrors.NewConflict(v1.Resource("targets"), "web", errors.New("it has ended")))
	}
	cmd := server.start(nil, "run", "web", "--attach", "--rm", "-q", "--", "true")
	if code := cmd.wait(); code != 0 || cmd.out.String() != "Stdout" || cmd.errOut.String() != "Stderr" {
		t.Errorf("exit code %d, stdout %q, stderr %q", code, cmd.out, cmd.errOut)
	}
}

// TestRunRemoves what it has made, however the session ends.
func TestRunRemoves(t *testing.T) {
	for name, test := range map[string]struct {
		args     []string
		running  bool // the session has begun
		end      func(cmd *running, network *badNetwork)
		wantCode int
	}{
		"after ^C": {
			running:  true,
			end:      func(cmd *running, _ *badNetwork) { cmd.cancel(terminated{syscall.SIGINT}) },
			wantCode: 130,
		},
		"after ^C while it waits": {
			end:      func(cmd *running, _ *badNetwork) { cmd.cancel(terminated{syscall.SIGINT}) },
			wantCode: 130,
		},
		"after a lost connection": {
			running:  true,
			end:      func(_ *running, network *badNetwork) { network.cut(0) },
			wantCode: exitBroken,
		},
		"after a silence": {
			args:    []string{"--peer-timeout=600ms"},
			running: true,
			end: func(cmd *running, network *badNetwork) {
				network.stall()
				before := network.opened()
				// What deletes the target is a connection anew.
				until(cmd.t, "the end of the session", func() bool { return network.opened() > before })
				network.unstall()
			},
			wantCode: exitBroken,
		},
	} {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t)
			network := server.badNetwork()
			if test.running {
				server.created = status(runs)
			}
			started := make(chan struct{})
			server.serveAttach(new(v1.TargetAttachOptions), func(ctx context.Context, _ streaming.Stdio) error {
				close(started)
				<-ctx.Done()
				return ctx.Err()
			})
			cmd := server.start(nil, slices.Concat(test.args, []string{"run", "web", "--attach", "--rm", "--", "cmd"})...)
			if test.running {
				<-started
			} else {
				until(t, "a look at the target", func() bool {
					return slices.Contains(server.seen(), "GET /apis/streaming.aaserver.io/v1/namespaces/shop/targets/web")
				})
			}
			test.end(cmd, network)
			if code := cmd.wait(); code != test.wantCode {
				t.Errorf("exit code %d, want %d; stderr %q", code, test.wantCode, cmd.errOut)
			}
			if server.targets["web"] != nil {
				t.Errorf("the target is left; stderr %q", cmd.errOut)
			}
			told := strings.Contains(cmd.errOut.String(), "Deleting target web; its processes have 30s to end.")
			if interrupted := test.wantCode == 130; told != interrupted {
				t.Errorf("it told that ending may take long: %v, want %v; stderr %q", told, interrupted, cmd.errOut)
			}
		})
	}
}

// TestRunLeavesWhatIsAnothers: the target was replaced by one of the same name.
func TestRunLeavesWhatIsAnothers(t *testing.T) {
	server := newTestServer(t)
	server.created = status(runs)
	server.serveAttach(new(v1.TargetAttachOptions), func(context.Context, streaming.Stdio) error {
		another := server.targets["web"].DeepCopy()
		another.UID = "another"
		server.apply(another)
		return nil
	})
	cmd := server.start(nil, "run", "web", "--attach", "--rm", "--", "cmd")
	if code := cmd.wait(); code != 0 || server.targets["web"] == nil {
		t.Errorf("exit code %d, target %v, stderr %q", code, server.targets["web"], cmd.errOut)
	}
}

func TestRunTellsOfATargetThatIsLeft(t *testing.T) {
	server := newTestServer(t)
	server.created = status(runs)
	server.serveAttach(new(v1.TargetAttachOptions), func(context.Context, streaming.Stdio) error { return nil })
	server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodDelete {
			writeError(w, apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New("you may not")))
		}
		return r.Method == http.MethodDelete
	}
	cmd := server.start(nil, "run", "web", "--attach", "--rm", "--", "cmd")
	if code := cmd.wait(); code != 1 || !strings.Contains(cmd.errOut.String(), "delete it with 'kubectl delete target web'") {
		t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
	}
}

// TestRunTellsThatATargetMayBeLeft where the answer to its creation was lost.
func TestRunTellsThatATargetMayBeLeft(t *testing.T) {
	server := newTestServer(t)
	server.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPost {
			server.apply(process("web"))
			panic(http.ErrAbortHandler)
		}
		return false
	}
	cmd := server.start(nil, "run", "web", "--attach", "--rm", "--", "cmd")
	if code := cmd.wait(); code != 1 || !strings.Contains(cmd.errOut.String(), errUnanswered.Error()) {
		t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
	}
}
