package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

func TestLogOptions(t *testing.T) {
	tests := map[string]struct {
		args []string
		want v1.TargetLogOptions
	}{
		"nothing but the target": {args: []string{"web"}},
		"an instance after a slash": {
			args: []string{"web/web-1"},
			want: v1.TargetLogOptions{Instance: "web-1"}},
		"an instance by flag, of a target with its type": {
			args: []string{"target/web", "--instance=web-1"},
			want: v1.TargetLogOptions{Instance: "web-1"}},
		"the short flags": {
			args: []string{"-p", "web"},
			want: v1.TargetLogOptions{Previous: true}},
		"a previous run isn't followed": {
			args: []string{"-fp", "web"},
			want: v1.TargetLogOptions{Previous: true}},
		"what to print of each line": {
			args: []string{"web", "--timestamps", "--all-instances", "--prefix"},
			want: v1.TargetLogOptions{Timestamps: true, AllInstances: true, Prefix: true}},
		"no prefix": {
			args: []string{"web", "--all-instances"},
			want: v1.TargetLogOptions{AllInstances: true}},
		"how much": {
			args: []string{"web", "--tail=0", "--limit-bytes=7"},
			want: v1.TargetLogOptions{TailLines: ptr.To[int64](0), LimitBytes: ptr.To[int64](7)}},
		"a tail of -1 is the whole log": {args: []string{"web", "--tail=-1"}},
		"a duration is rounded up to seconds": {
			args: []string{"web", "--since=1500ms"},
			want: v1.TargetLogOptions{SinceSeconds: ptr.To[int64](2)}},
		"a duration in hours": {
			args: []string{"web", "--since=2h"},
			want: v1.TargetLogOptions{SinceSeconds: ptr.To[int64](7200)}},
		"a time": {
			args: []string{"web", "--since-time=2026-01-02T03:04:05+01:00"},
			want: v1.TargetLogOptions{SinceTime: &metav1.Time{Time: time.Date(2026, 1, 2, 2, 4, 5, 0, time.UTC)}}},
		"one of the streams": {
			args: []string{"web", "--stream=stderr"},
			want: v1.TargetLogOptions{Stream: v1.LogStreamStderr}},
		"a stream as the API spells it": {
			args: []string{"web", "--stream=Stdout"},
			want: v1.TargetLogOptions{Stream: v1.LogStreamStdout}},
		"a selector shows ten lines of each": {
			args: []string{"-l", "app=shop"},
			want: v1.TargetLogOptions{TailLines: ptr.To[int64](10), AllInstances: true, Timestamps: true, Prefix: true}},
		"a selector shows more lines when told": {
			args: []string{"-l", "app=shop", "--tail=20"},
			want: v1.TargetLogOptions{TailLines: ptr.To[int64](20), AllInstances: true, Timestamps: true, Prefix: true}},
		"a selector shows all lines when told": {
			args: []string{"-l", "app=shop", "--tail=-1"},
			want: v1.TargetLogOptions{AllInstances: true, Timestamps: true, Prefix: true}},
		"a selector shows one instance of each when told": {
			args: []string{"-l", "app=shop", "--tail=-1", "--all-instances=false"},
			want: v1.TargetLogOptions{Timestamps: true, Prefix: true}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t, process("web"))
			var got v1.TargetLogOptions
			server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
				got = *decode[v1.TargetLogOptions](t, r)
				if got.Stream == v1.LogStreamAll {
					got.Stream = "" // the default
				}
				line := "line\n"
				if got.Timestamps && got.Prefix {
					line = "[web-0] " + at(1, line)
				}
				io.WriteString(w, line)
			}
			cmd := server.start(nil, append([]string{"logs"}, test.args...)...)
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
			}
			if got := cmd.out.String(); !strings.HasSuffix(got, "line\n") {
				t.Errorf("stdout %q", got)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
		})
	}
}

func TestUsageErrors(t *testing.T) {
	const logsHelp = "\nSee 'kubectl target logs -h' for help and examples\n"
	const execHelp = "\nSee 'kubectl target exec -h' for help and examples\n"
	tests := map[string]struct {
		args []string
		want string
	}{
		"no target": {
			args: []string{"logs"},
			want: "error: expected 'logs [-f] [-p] (TARGET[/INSTANCE] | -l SELECTOR)'.\nTARGET or target/NAME is a required argument for the logs command" + logsHelp},
		"a target and a selector": {
			args: []string{"logs", "web", "-l", "a=b"},
			want: "error: only a selector (-l) or a TARGET name is allowed" + logsHelp},
		"a selector and an instance": {
			args: []string{"logs", "-l", "a=b", "--instance", "web-0"},
			want: "error: a selector (-l) and --instance exclude each other" + logsHelp},
		"a selector that isn't one": {
			args: []string{"logs", "-l", "a in ("},
			want: ""},
		"two ways to say since": {
			args: []string{"logs", "web", "--since=1s", "--since-time=2026-01-02T03:04:05Z"},
			want: "error: at most one of --since and --since-time may be used\n"},
		"a time that isn't one": {
			args: []string{"logs", "web", "--since-time=yesterday"},
			want: "error: --since-time=yesterday is not a time in RFC 3339, such as 2026-01-02T15:04:05Z\n"},
		"a negative duration": {
			args: []string{"logs", "web", "--since=-1s"},
			want: "error: --since must be greater than 0\n"},
		"a negative tail": {
			args: []string{"logs", "web", "--tail=-2"},
			want: "error: --tail must be greater than or equal to -1\n"},
		"no bytes": {
			args: []string{"logs", "web", "--limit-bytes=0"},
			want: "error: --limit-bytes must be greater than 0\n"},
		"a stream that doesn't exist": {
			args: []string{"logs", "web", "--stream=both"},
			want: "error: --stream=both: expected all, stdout or stderr\n"},
		"one instance and all": {
			args: []string{"logs", "web/web-0", "--all-instances"},
			want: "error: --all-instances excludes the name of an instance\n"},
		"another resource": {
			args: []string{"logs", "pod/web"},
			want: `error: "pod/web" is neither target/NAME nor TARGET/INSTANCE: the names of the instances of target "pod" begin with "pod-"` + logsHelp},
		"two instances": {
			args: []string{"exec", "web/web-0", "--instance=web-1", "--", "ls"},
			want: `error: "web/web-0" and --instance=web-1 name two instances` + execHelp},
		"no command": {
			args: []string{"exec", "web", "--"},
			want: "error: you must specify at least one command for the target" + execHelp},
		"no dashes before the command": {
			args: []string{"exec", "web", "ls"},
			want: "error: exec [TARGET] [COMMAND] is not supported. Use exec [TARGET] -- [COMMAND] instead" + execHelp},
		"a command and no target": {
			args: []string{"exec", "--", "ls"},
			want: "error: TARGET or target/NAME must be specified" + execHelp},
		"no ports": {
			args: []string{"port-forward", "web"},
			want: "error: TARGET and list of PORTS are required for port-forward\nSee 'kubectl target port-forward -h' for help and examples\n"},
		"an unknown flag": {
			args: []string{"logs", "--lines=3"},
			want: "error: unknown flag: --lines\nSee 'kubectl target logs --help' for usage.\n"},
		"an unknown command": {
			args: []string{"get"},
			want: "error: unknown command \"get\" for \"kubectl target\"\nThat is for kubectl itself, as in 'kubectl get target NAME'\n"},
		"a mistyped command": {
			args: []string{"log", "web"},
			want: "error: unknown command \"log\" for \"kubectl target\"\nDid you mean this?\n\tlogs\n"},
		"no command at all": {
			args: []string{"frobnicate"},
			want: "error: unknown command \"frobnicate\" for \"kubectl target\"\nSee 'kubectl target -h' for help and examples\n"},
		"a shell that isn't known": {
			args: []string{"completion", "tcsh"},
			want: "error: unsupported shell type \"tcsh\": expected one of bash, zsh, fish, powershell\n"},
		"a name that can't be one": {
			args: []string{"exec", "..", "--", "ls"},
			want: "error: invalid resource name \"..\": [may not be '..']\n"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			server := newTestServer(t)
			cmd := server.start(nil, test.args...)
			if code := cmd.wait(); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if test.want != "" {
				if diff := cmp.Diff(test.want, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
			} else if !strings.HasPrefix(cmd.errOut.String(), "error: ") {
				t.Errorf("stderr %q", cmd.errOut)
			}
			if got := server.seen(); len(got) > 0 {
				t.Errorf("requests were made: %v", got)
			}
		})
	}
}

func TestParseRef(t *testing.T) {
	tests := map[string]struct {
		arg, instance string
		want          ref
		wantErr       bool
	}{
		"a target":                             {arg: "web", want: ref{target: "web"}},
		"with its type":                        {arg: "targets.streaming.aaserver.io/web", want: ref{target: "web"}},
		"with its short type and an instance":  {arg: "tgt/web/web-0", want: ref{target: "web", instance: "web-0"}},
		"an instance":                          {arg: "web/web-0", want: ref{target: "web", instance: "web-0"}},
		"the same instance twice":              {arg: "web/web-0", instance: "web-0", want: ref{target: "web", instance: "web-0"}},
		"a target called target":               {arg: "target", want: ref{target: "target"}},
		"a target called target with its type": {arg: "target/target", want: ref{target: "target"}},
		"nothing":                              {wantErr: true},
		"nothing after the slash":              {arg: "web/", wantErr: true},
		"nothing before the slash":             {arg: "/web", wantErr: true},
		"another target's instance":            {arg: "web/db-0", wantErr: true},
		"too many parts":                       {arg: "target/web/web-0/x", wantErr: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseRef(test.arg, test.instance)
			if (err != nil) != test.wantErr {
				t.Fatalf("error %v, want one: %v", err, test.wantErr)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(ref{})); diff != "" {
				t.Errorf("ref (-want +got):\n%s", diff)
			}
		})
	}
}

const (
	lostWarning = "warning: the connection to the server was lost and is being retried\n"
	regained    = "The connection to the server stands again: the log goes on where it was.\n"
)

func TestFollowEndsWithARefusal(t *testing.T) {
	web := v1.Resource("targets")
	tests := map[string]struct {
		refusal *apierrors.StatusError
		want    string
	}{
		"the target is gone": {
			refusal: apierrors.NewNotFound(web, "web"),
			want:    "Error from server (NotFound): targets.streaming.aaserver.io \"web\" not found\n"},
		"it isn't allowed any more": {
			refusal: apierrors.NewForbidden(web, "web", errors.New("no")),
			want:    "Error from server (Forbidden): targets.streaming.aaserver.io \"web\" is forbidden: no\n"},
		"it can't be done any more": {
			refusal: apierrors.NewBadRequest("a tcp target has no log"),
			want:    "Error from server (BadRequest): a tcp target has no log\n"},
	}
	for name, test := range tests {
		for _, flag := range []string{"--all-instances=false", "--all-instances"} {
			t.Run(name+" "+flag, func(t *testing.T) {
				noLeaks(t)
				server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
				logs := &logs{t: t, logs: map[string]*logOf{}}
				server.log = logs.serve
				logs.of("web-0").write(at(1, "first"))
				var refuse atomic.Bool
				server.intercept = func(w http.ResponseWriter, _ *http.Request) bool {
					if refuse.Load() {
						writeError(w, test.refusal)
					}
					return refuse.Load()
				}
				cmd := server.start(nil, "logs", "-f", "web", flag)
				until(t, "the line", func() bool { return cmd.out.String() == "first\n" })
				if flag == "--all-instances" {
					until(t, "the watch", server.watched)
					until(t, "the stream", func() bool { return len(logs.of("web-0").openings()) == 2 })
				}
				refuse.Store(true)
				logs.of("web-0").change(func(l *logOf) { l.cut++ })
				if code := cmd.wait(); code != 1 {
					t.Errorf("exit code %d, want 1", code)
				}
				if diff := cmp.Diff(lostWarning+test.want, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
				if diff := cmp.Diff("first\n", cmd.out.String()); diff != "" {
					t.Errorf("stdout (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestFollowResumesOneTarget(t *testing.T) {
	tests := map[string]struct {
		args []string
		// before are the lines that were printed when the connection is lost.
		before, after string
	}{
		"the instance that the server picks": {
			args: []string{"web"}, before: "one\n", after: "three\n"},
		"an instance by name, with its prefix": {
			args: []string{"web/web-0", "--prefix"}, before: "[web/web-0] one\n", after: "[web/web-0] three\n"},
		"with times": {
			args: []string{"web", "--timestamps"}, before: at(1, "one") + "\n", after: at(3, "three") + "\n"},
		"the last line": {
			args: []string{"web", "--tail=1"}, before: "one\n", after: "three\n"},
		"all instances": {
			args: []string{"web", "--all-instances", "--prefix"}, before: "[web/web-0] one\n[web/web-1] two\n", after: "[web/web-0] three\n[web/web-1] four\n[web/web-2] five\n"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			web := process("web", func(target *v1.Target) { target.Spec.RestartPolicy = v1.RestartNever })
			server := newTestServer(t, instances(web, map[string]int{"web-0": 0, "web-1": 0}))
			logs := &logs{t: t, logs: map[string]*logOf{}}
			server.log = logs.serve
			logs.of("web-0").write(at(1, "one"))
			logs.of("web-1").write(at(2, "two"))
			var down atomic.Bool
			turnedAway := make(chan struct{}, 1000)
			server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
				if !down.Load() {
					return false
				}
				if strings.HasSuffix(r.URL.Path, "/log") {
					turnedAway <- struct{}{}
				}
				writeError(w, apierrors.NewServiceUnavailable("starting"))
				return true
			}
			cmd := server.start(nil, append([]string{"logs", "-f"}, test.args...)...)
			until(t, "the first lines", func() bool { return cmd.out.String() == test.before })
			follows := func(o v1.TargetLogOptions) bool { return o.Follow }
			until(t, "all streams", func() bool {
				return slices.ContainsFunc(logs.of("web-0").openings(), follows) &&
					(!slices.Contains(test.args, "--all-instances") || slices.ContainsFunc(logs.of("web-1").openings(), follows))
			})

			// The server goes, and what is written meanwhile isn't lost.
			down.Store(true)
			logs.of("web-0").change(func(l *logOf) { l.cut++ })
			<-turnedAway
			logs.of("web-0").write(at(3, "three"))
			logs.of("web-1").write(at(4, "four"))
			logs.of("web-2").write(at(5, "five"))
			server.apply(instances(web, map[string]int{"web-0": 0, "web-1": 0, "web-2": 0}))
			down.Store(false)
			until(t, fmt.Sprintf("the rest after %q", cmd.out), func() bool {
				return len(cmd.out.String()) >= len(test.before+test.after)
			})

			// All instances end for good.
			for _, name := range []string{"web-0", "web-1", "web-2"} {
				logs.of(name).change(func(l *logOf) { l.ended = true })
			}
			server.apply(instances(web, map[string]int{"web-0": -1, "web-1": -1, "web-2": -1}))
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
			if diff := cmp.Diff(lostWarning+regained, cmd.errOut.String()); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
			sorted := slices.Sorted(strings.Lines(strings.TrimPrefix(cmd.out.String(), test.before)))
			if diff := cmp.Diff(test.after, strings.Join(sorted, "")); diff != "" {
				t.Errorf("stdout after the loss (-want +got):\n%s", diff)
			}
		})
	}
}

func TestOneWarningForAllStreams(t *testing.T) {
	noLeaks(t)
	const targets = 60
	server := newTestServer(t)
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	each := func(f func(name string)) {
		for i := range targets {
			f(fmt.Sprint("t", i))
		}
	}
	each(func(name string) {
		logs.of(name + "-0").write(at(1, name))
		server.apply(instances(process(name), map[string]int{name + "-0": 0}))
	})
	var down atomic.Bool
	turnedAway := make(chan string, 1000)
	server.intercept = func(w http.ResponseWriter, r *http.Request) bool {
		if !down.Load() {
			return false
		}
		if strings.HasSuffix(r.URL.Path, "/log") {
			turnedAway <- r.URL.Path
		}
		writeError(w, apierrors.NewServiceUnavailable("starting"))
		return true
	}
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop")
	until(t, "all lines", func() bool { return strings.Count(cmd.out.String(), "\n") == targets })
	// Each has read the past, and follows.
	each(func(name string) {
		until(t, name, func() bool { return len(logs.of(name+"-0").openings()) == 2 })
	})
	down.Store(true)
	each(func(name string) { logs.of(name + "-0").change(func(l *logOf) { l.cut++ }) })
	// Each has noticed: some may be turned away twice before others once.
	for noticed := map[string]bool{}; len(noticed) < targets; {
		noticed[<-turnedAway] = true
	}
	each(func(name string) { logs.of(name + "-0").write(at(2, name)) })
	down.Store(false)
	until(t, "all streams", func() bool { return strings.Count(cmd.out.String(), "\n") == 2*targets })
	if diff := cmp.Diff(lostWarning+regained, cmd.errOut.String()); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
}

func TestTargetThatIsSelectedAgainRepeatsNothing(t *testing.T) {
	noLeaks(t)
	web := instances(process("web"), map[string]int{"web-0": 0})
	other := web.DeepCopy()
	other.Labels = map[string]string{"app": "other"}
	server := newTestServer(t, web)
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	// Its own end shows that an event was seen.
	marker := 0
	seen := func(cmd *running) {
		t.Helper()
		marker++
		name := fmt.Sprint("marker", marker)
		logs.of(name + "-0").write(at(1, name))
		server.apply(instances(process(name), map[string]int{name + "-0": 0}))
		until(t, name, func() bool { return strings.Contains(cmd.out.String(), name+"\n") })
	}
	logs.of("web-0").write(at(1, "one"), at(2, "two"))
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop")
	until(t, "the lines", func() bool { return cmd.out.String() == "one\ntwo\n" })
	for range 3 {
		server.apply(other)
		seen(cmd)
		server.apply(web)
		seen(cmd)
	}
	logs.of("web-0").write(at(3, "three"))
	until(t, "the next line", func() bool { return strings.Contains(cmd.out.String(), "three\n") })
	cmd.cancel(terminated{syscall.SIGINT})
	cmd.wait()
	for _, line := range []string{"one\n", "two\n", "three\n"} {
		if n := strings.Count(cmd.out.String(), line); n != 1 {
			t.Errorf("%q comes %d times", line, n)
		}
	}
}

func TestTargetsThatHaveGoneAreRemembered(t *testing.T) {
	noLeaks(t)
	web := instances(process("web"), map[string]int{"web-0": 0})
	server := newTestServer(t, web)
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "one"))
	got := &output{}
	c := newClient(genericiooptions.IOStreams{Out: got, ErrOut: got})
	*c.flags.KubeConfig = server.kubeconfig()
	conn, err := c.connectLogs(true)
	if err != nil {
		t.Fatal(err)
	}
	out := newMerger(got, lineStyle{})
	f := newFollower(t.Context(), conn, out, got, &v1.TargetLogOptions{Follow: true})
	f.drainTime = time.Millisecond
	go out.run()
	defer out.abort()
	defer f.streams.Wait()
	defer f.cancel(nil)
	f.update(web)
	until(t, "the line", func() bool { return got.String() == "one\n" })
	f.remove(web.UID)
	until(t, "the stream's end", func() bool {
		f.mu.Lock()
		defer f.mu.Unlock()
		return !f.targets[web.UID].streaming()
	})
	f.update(web)
	logs.of("web-0").write(at(2, "two"))
	until(t, "the next line", func() bool { return strings.Contains(got.String(), "two\n") })
	if diff := cmp.Diff("one\ntwo\n", got.String()); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}

	for i := range 2 * maxRemembered {
		gone := process(fmt.Sprint("gone", i))
		f.update(gone)
		f.remove(gone.UID)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if n := len(f.targets); n != maxRemembered+1 {
		t.Errorf("%d targets are remembered, want %d and the one that is selected", n, maxRemembered)
	}
}

func TestInterruptedFollow(t *testing.T) {
	server := newTestServer(t, process("web"))
	server.log = func(w http.ResponseWriter, r *http.Request, _ string) {
		_ = streaming.ServeLog(w, r, true, streaming.Options{}, func(ctx context.Context, out io.Writer) error {
			io.WriteString(out, "first\n")
			<-ctx.Done()
			return ctx.Err()
		})
	}
	cmd := server.start(nil, "logs", "-f", "web")
	until(t, "the line", func() bool { return cmd.out.String() == "first\n" })
	cmd.cancel(terminated{syscall.SIGTERM})
	if code := cmd.wait(); code != 143 {
		t.Errorf("exit code %d, want 143", code)
	}
	if got := cmd.errOut.String(); got != "" {
		t.Errorf("stderr %q, want none", got)
	}
}

func TestSelectedLogs(t *testing.T) {
	label := func(value string) func(*v1.Target) {
		return func(target *v1.Target) { target.Labels = map[string]string{"app": value} }
	}
	server := newTestServer(t, process("b"), process("a"), process("c"), process("other", label("other")))
	server.log = func(w http.ResponseWriter, r *http.Request, target string) {
		if target == "b" {
			writeError(w, apierrors.NewServiceUnavailable("agent gone"))
			return
		}
		fmt.Fprintf(w, "[%s-0] %s", target, at(1, "no newline at the end"))
	}
	cmd := server.start(nil, "logs", "-l", "app=shop", "--prefix")
	if code := cmd.wait(); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if diff := cmp.Diff("[a/a-0] no newline at the end\n[c/c-0] no newline at the end\n", cmd.out.String()); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff("Error from server (ServiceUnavailable): agent gone\n", cmd.errOut.String()); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}

	cmd = server.start(nil, "logs", "-l", "app=nothing")
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
	if diff := cmp.Diff("No resources found in shop namespace.\n", cmd.errOut.String()); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
}

func TestPreviousLogsThatThereAreNot(t *testing.T) {
	server := newTestServer(t, process("a"), process("b"))
	for name, test := range map[string]struct {
		// had are the targets with a previous run.
		had      string
		args     []string
		wantCode int
		wantOut  string
		wantErr  string
	}{
		"of some of the selected": {had: "b", args: []string{"-l", "app=shop"}, wantOut: "was\n",
			wantErr: "Error from server (NotFound): instance a-0 has no log of a previous run\n"},
		"of all of the selected": {args: []string{"-l", "app=shop"}, wantCode: 1,
			wantErr: "Error from server (NotFound): instance a-0 has no log of a previous run\nError from server (NotFound): instance b-0 has no log of a previous run\n"},
		"of some instances": {had: "b", args: []string{"b", "--all-instances"}, wantOut: "2026-01-01T00:00:01Z was\n",
			wantErr: "Warning: without a log of a previous run: b-1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			server.log = func(w http.ResponseWriter, r *http.Request, target string) {
				if target != test.had {
					writeError(w, &apierrors.StatusError{ErrStatus: metav1.Status{Status: metav1.StatusFailure, Code: http.StatusNotFound, Reason: metav1.StatusReasonNotFound,
						Message: "instance " + target + "-0 has no log of a previous run"}})
					return
				}
				if strings.Contains(strings.Join(test.args, " "), "--all-instances") {
					w.Header().Set("Warning", `299 - "without a log of a previous run: b-1"`)
				}
				if r.URL.Query().Get("prefix") != "" {
					fmt.Fprintf(w, "[%s-0] ", target)
				}
				fmt.Fprintln(w, at(1, "was"))
			}
			cmd := server.start(nil, append([]string{"logs", "-p"}, test.args...)...)
			if code := cmd.wait(); code != test.wantCode {
				t.Errorf("exit code %d, want %d", code, test.wantCode)
			}
			if diff := cmp.Diff(test.wantOut, cmd.out.String()); diff != "" {
				t.Errorf("stdout (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.wantErr, cmd.errOut.String()); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
		})
	}
}

// logOf is the log of an instance that a test writes.
type logOf struct {
	mu      sync.Mutex
	changed chan struct{}
	lines   []string // each with its time
	ended   bool
	cut     int // streams are cut off when it changes
	opened  []v1.TargetLogOptions
	// noCursor leaves out the header, as older servers do.
	noCursor bool
}

func (l *logOf) change(f func(*logOf)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	f(l)
	close(l.changed)
	l.changed = make(chan struct{})
}

func (l *logOf) write(lines ...string) {
	l.change(func(l *logOf) { l.lines = append(l.lines, lines...) })
}

// logs serves the logs of instances, with resumeAfter and tail.
type logs struct {
	t    *testing.T
	mu   sync.Mutex
	logs map[string]*logOf
}

func (l *logs) of(instance string) *logOf {
	l.mu.Lock()
	defer l.mu.Unlock()
	log, ok := l.logs[instance]
	if !ok {
		log = &logOf{changed: make(chan struct{})}
		l.logs[instance] = log
	}
	return log
}

// names returns the instances that a request is about.
func (l *logs) names(options *v1.TargetLogOptions) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch _, ok := l.logs["web-0"]; {
	case options.AllInstances:
		return slices.Sorted(maps.Keys(l.logs))
	case options.Instance == "" && ok:
		return []string{"web-0"}
	}
	return []string{options.Instance}
}

func (l *logs) serve(w http.ResponseWriter, r *http.Request, _ string) {
	options := decode[v1.TargetLogOptions](l.t, r)
	names := l.names(options)
	next, cut, logs := map[string]int{}, map[string]int{}, map[string]*logOf{}
	for _, name := range names {
		log := l.of(name)
		logs[name] = log
		log.mu.Lock()
		log.opened = append(log.opened, *options)
		cut[name] = log.cut
		if n := ptr.Deref(options.TailLines, -1); n >= 0 {
			next[name] = max(0, len(log.lines)-int(n))
		}
		if options.ResumeAfter != "" {
			after := timeOf(l.t, options.ResumeAfter)
			for next[name] < len(log.lines) && !timeOf(l.t, log.lines[next[name]]).After(after) {
				next[name]++
			}
		}
		if !options.AllInstances && !log.noCursor {
			cursor := time.Time{}
			if n := next[name]; n > 0 {
				cursor = timeOf(l.t, log.lines[n-1])
			}
			w.Header().Set(cursorHeader, cursor.Format(time.RFC3339Nano))
			w.Header().Set(v1.LogInstanceHeader, name)
		}
		log.mu.Unlock()
	}
	// Where it breaks it is a connection that does, which tells nothing.
	r.Header.Del(endTrailer)
	_ = streaming.ServeLog(w, r, true, streaming.Options{}, func(ctx context.Context, out io.Writer) error {
		out.(http.Flusher).Flush()
		for {
			running, broken := 0, false
			wake := []reflect.SelectCase{{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(ctx.Done())}}
			for _, name := range names {
				log := logs[name]
				log.mu.Lock()
				lines := log.lines[next[name]:]
				next[name] = len(log.lines)
				broken = broken || log.cut != cut[name]
				if !log.ended {
					running++
				}
				wake = append(wake, reflect.SelectCase{Dir: reflect.SelectRecv, Chan: reflect.ValueOf(log.changed)})
				log.mu.Unlock()
				for _, line := range lines {
					if options.Prefix {
						line = "[" + name + "] " + line
					}
					if _, err := io.WriteString(out, line+"\n"); err != nil {
						return err
					}
				}
			}
			switch {
			case broken:
				// Half a line is on its way when it breaks.
				io.WriteString(out, "2026-01-01T00:00:59Z hal")
				return errors.New("broken")
			case running == 0, !options.Follow:
				return nil
			}
			if i, _, _ := reflect.Select(wake); i == 0 {
				return ctx.Err()
			}
		}
	})
}

// timeOf returns the time of a line, or that of a cursor.
func timeOf(t *testing.T, line string) time.Time {
	stamp, _, _ := strings.Cut(line, " ")
	parsed, err := time.Parse(time.RFC3339Nano, stamp)
	if err != nil {
		t.Error(err)
	}
	return parsed
}

func at(second int, text string) string {
	return fmt.Sprintf("2026-01-01T00:00:%02dZ %s", second, text)
}

// instances sets a target's status: names with the number of restarts, -1 for
// one that has ended.
func instances(target *v1.Target, restarts map[string]int) *v1.Target {
	target = target.DeepCopy()
	target.Status.Instances = nil
	for i := range 9 {
		name := fmt.Sprint(target.Name, "-", i)
		n, ok := restarts[name]
		if !ok {
			continue
		}
		status := v1.InstanceStatus{Name: name}
		if n >= 0 {
			status.Ready, status.RestartCount = true, int32(n)
			status.State.Running = &v1.InstanceStateRunning{StartedAt: metav1.Unix(int64(1000+n), 0)}
		} else {
			status.State.Terminated = &v1.InstanceStateTerminated{}
		}
		target.Status.Instances = append(target.Status.Instances, status)
	}
	return target
}

func TestFollowSelected(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("other", func(target *v1.Target) { target.Labels = nil }))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop", "--all-instances", "--prefix")
	until(t, "the hint", func() bool {
		return cmd.errOut.String() == "No resources found in shop namespace. Waiting for them.\n"
	})
	var want []string
	expect := func(lines ...string) {
		t.Helper()
		want = append(want, lines...)
		until(t, fmt.Sprintf("%q after %q", lines, cmd.out), func() bool {
			return len(strings.Split(cmd.out.String(), "\n"))-1 >= len(want)
		})
		if diff := cmp.Diff(strings.Join(want, "\n")+"\n", cmd.out.String()); diff != "" {
			t.Fatalf("stdout (-want +got):\n%s", diff)
		}
	}

	// A target appears.
	logs.of("web-0").write(at(1, "one"))
	web := process("web")
	server.apply(instances(web, map[string]int{"web-0": 0}))
	expect("[web/web-0] one")
	logs.of("web-0").write(at(2, "two"))
	expect("[web/web-0] two")

	// It gets an instance.
	server.apply(instances(web, map[string]int{"web-0": 0, "web-1": 0}))
	logs.of("web-1").write(at(3, "three"))
	expect("[web/web-1] three")

	// Another target appears; one that isn't selected doesn't count.
	server.apply(instances(process("db"), map[string]int{"db-0": 0}))
	logs.of("db-0").write(at(4, "four"))
	expect("[db/db-0] four")

	// An instance ends for good, and later runs anew: its old lines don't come
	// again.
	logs.of("web-0").change(func(l *logOf) { l.ended = true })
	server.apply(instances(web, map[string]int{"web-0": -1, "web-1": 0}))
	until(t, "the stream's end", func() bool { return len(logs.of("web-0").openings()) == 1 })
	logs.of("web-0").change(func(l *logOf) { l.ended = false })
	logs.of("web-0").write(at(5, "five"))
	server.apply(instances(web, map[string]int{"web-0": 1, "web-1": 0}))
	expect("[web/web-0] five")

	// A stream breaks off in the middle of a line.
	logs.of("web-1").change(func(l *logOf) { l.cut++ })
	until(t, "the warning", func() bool { return strings.Contains(cmd.errOut.String(), lostWarning) })
	logs.of("web-1").write(at(6, "six"))
	expect("[web/web-1] six")

	// The target is deleted and created anew under its name.
	logs.of("web-0").write(at(7, "seven"))
	expect("[web/web-0] seven")
	for _, name := range []string{"web-0", "web-1"} {
		logs.of(name).change(func(l *logOf) { l.ended = true })
	}
	server.delete("web")
	logs.mu.Lock()
	delete(logs.logs, "web-0")
	logs.mu.Unlock()
	logs.of("web-0").write(at(1, "eight"))
	again := process("web")
	again.UID = types.UID("another")
	server.apply(instances(again, map[string]int{"web-0": 0}))
	expect("[web/web-0] eight")

	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
	if strings.Contains(cmd.errOut.String(), "watching targets failed") {
		t.Errorf("stderr %q", cmd.errOut)
	}
}

func TestFollowSelectedFollowsOneInstance(t *testing.T) {
	noLeaks(t)
	web := process("web")
	server := newTestServer(t, instances(web, map[string]int{"web-0": -1, "web-1": 0, "web-2": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-1").write(at(1, "a"), at(2, "b"), at(3, "c"))
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop", "--all-instances=false", "--tail=2", "--timestamps", "--limit-bytes=70")
	until(t, "the tail", func() bool { return strings.Count(cmd.out.String(), "\n") == 2 })
	// It ends; another instance takes its place.
	logs.of("web-1").change(func(l *logOf) { l.ended = true })
	logs.of("web-2").write(at(4, "d"), at(5, "beyond the limit"))
	until(t, "the limit", func() bool { return strings.Count(cmd.out.String(), "\n") == 4 })
	want := at(2, "b") + "\n" + at(3, "c") + "\n" + at(4, "d") + "\n" + at(5, "beyond")[:1] + "\n"
	if got := cmd.out.String(); len(got) < 70 || len(got) > 71 || got[:69] != want[:69] {
		t.Errorf("stdout %q", got)
	}
	cmd.cancel(terminated{syscall.SIGINT})
	cmd.wait()
	if got := logs.of("web-0").openings(); len(got) != 0 {
		t.Errorf("the instance that has ended was followed: %+v", got)
	}
}

func (l *logOf) openings() []v1.TargetLogOptions {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]v1.TargetLogOptions(nil), l.opened...)
}

type fullDisk struct{}

func (fullDisk) Write([]byte) (int, error) { return 0, syscall.ENOSPC }

func TestOutputThatCannotBeWrittenEndsTheCommand(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0, "web-1": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	logs.of("web-0").write(at(1, "a"))
	logs.of("").write(at(1, "a"))
	for name, args := range map[string][]string{
		"of one target":   {"web", "-f"},
		"of all targets":  {"-f", "-l", "app=shop", "--all-instances"},
		"with a selector": {"-l", "app=shop", "--limit-bytes=1"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "with a selector" {
				logs.of("").change(func(l *logOf) { l.ended = true })
				defer logs.of("").change(func(l *logOf) { l.ended = false })
			}
			cmd := startWith(t, genericiooptions.IOStreams{Out: fullDisk{}}, append([]string{"--kubeconfig", server.kubeconfig(), "logs"}, args...)...)
			if code := cmd.wait(); code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			if diff := cmp.Diff("error: no space left on device\n", cmd.errOut.String()); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFollowWaitsForALogThatTheStatusIsAheadOf(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, instances(process("web"), map[string]int{"web-0": 0}))
	logs := &logs{t: t, logs: map[string]*logOf{}}
	logs.of("web-0").write(at(1, "a"))
	asked := make(chan struct{}, 100)
	server.log = func(w http.ResponseWriter, r *http.Request, target string) {
		asked <- struct{}{}
		if len(asked) == 1 {
			writeError(w, apierrors.NewNotFound(v1.Resource("targets"), "web-0"))
			return
		}
		logs.serve(w, r, target)
	}
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop")
	until(t, "the line", func() bool { return cmd.out.String() == "a\n" })
	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 130 {
		t.Errorf("exit code %d, want 130", code)
	}
}

func TestFollowSelectedHasNoLimitOfTargets(t *testing.T) {
	noLeaks(t)
	// More than the streams of one HTTP/2 connection.
	const targets = 300
	server := newTestServer(t)
	logs := &logs{t: t, logs: map[string]*logOf{}}
	server.log = logs.serve
	for i := range targets {
		name := fmt.Sprint("t", i)
		logs.of(name + "-0").write(at(1, "line"))
		server.apply(instances(process(name), map[string]int{name + "-0": 0}))
	}
	cmd := server.start(nil, "logs", "-f", "-l", "app=shop", "--prefix")
	until(t, "all lines", func() bool { return strings.Count(cmd.out.String(), "\n") == targets })
	for i := range targets {
		if want := fmt.Sprintf("[t%d/t%[1]d-0] line\n", i); strings.Count(cmd.out.String(), want) != 1 {
			t.Fatalf("want %q once in the output", want)
		}
	}
	cmd.cancel(terminated{syscall.SIGINT})
	cmd.wait()
}
