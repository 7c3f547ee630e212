package validation

import (
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestValidateTargetLogOptions(t *testing.T) {
	const cursor = "2026-11-20T10:00:00.123456789Z"
	const sinceText = "at most one of `sinceSeconds`, `sinceTime` and `resumeAfter` may be set"
	now := metav1.Now()
	cases := map[string]struct {
		options v1.TargetLogOptions
		want    []string
	}{
		"nothing is required": {},
		"one instance is followed from its last lines": {
			options: v1.TargetLogOptions{Instance: "web-0", Follow: true, SinceSeconds: ptr.To[int64](1), Timestamps: true, TailLines: ptr.To[int64](0), LimitBytes: ptr.To[int64](1), Stream: v1.LogStreamStderr, Prefix: true},
		},
		"all instances are read since a time": {
			options: v1.TargetLogOptions{AllInstances: true, SinceTime: &now, Stream: v1.LogStreamAll},
		},
		"the log of a last run is followed to its end": {
			options: v1.TargetLogOptions{Previous: true, Follow: true, Stream: v1.LogStreamStdout},
		},
		"a log is resumed": {
			options: v1.TargetLogOptions{Instance: "web-0", ResumeAfter: cursor},
		},
		"a log is resumed after a time of another zone": {
			options: v1.TargetLogOptions{Instance: "web-0", ResumeAfter: "2026-11-20T11:00:00+01:00"},
		},
		"an instance is a label": {
			options: v1.TargetLogOptions{Instance: "../web"},
			want:    []string{`instance: Invalid value: "../web": ` + labelText},
		},
		"an instance is bounded": {
			options: v1.TargetLogOptions{Instance: strings.Repeat("a", 64)},
			want:    []string{`instance: Too long: may not be more than 63 bytes`},
		},
		"all instances aren't one": {
			options: v1.TargetLogOptions{Instance: "web-0", AllInstances: true},
			want:    []string{"allInstances: Forbidden: may not be set with `instance`"},
		},
		"a number of seconds is at least 1": {
			options: v1.TargetLogOptions{SinceSeconds: ptr.To[int64](0)},
			want:    []string{`sinceSeconds: Invalid value: 0: must be between 1 and 9223372036, inclusive`},
		},
		"a number of seconds is a duration": {
			options: v1.TargetLogOptions{SinceSeconds: ptr.To[int64](math.MaxInt64)},
			want:    []string{`sinceSeconds: Invalid value: 9223372036854775807: must be between 1 and 9223372036, inclusive`},
		},
		"since when is said once, by seconds or time": {
			options: v1.TargetLogOptions{SinceSeconds: ptr.To[int64](1), SinceTime: &now},
			want:    []string{"sinceTime: Forbidden: " + sinceText},
		},
		"since when is said once, by seconds or cursor": {
			options: v1.TargetLogOptions{Instance: "web-0", SinceSeconds: ptr.To[int64](1), ResumeAfter: cursor},
			want:    []string{"resumeAfter: Forbidden: " + sinceText},
		},
		"since when is said once, by time or cursor": {
			options: v1.TargetLogOptions{Instance: "web-0", SinceTime: &now, ResumeAfter: cursor},
			want:    []string{"resumeAfter: Forbidden: " + sinceText},
		},
		"a number of lines isn't negative": {
			options: v1.TargetLogOptions{TailLines: ptr.To[int64](-1)},
			want:    []string{`tailLines: Invalid value: -1: must be greater than or equal to 0`},
		},
		"a number of bytes is at least 1": {
			options: v1.TargetLogOptions{LimitBytes: ptr.To[int64](0)},
			want:    []string{`limitBytes: Invalid value: 0: must be greater than or equal to 1`},
		},
		"a stream is one of three": {
			options: v1.TargetLogOptions{Stream: "stdout"},
			want:    []string{`stream: Unsupported value: "stdout": supported values: "All", "Stdout", "Stderr"`},
		},
		"a long stream isn't repeated": {
			options: v1.TargetLogOptions{Stream: v1.LogStream(strings.Repeat("a", 65))},
			want:    []string{`stream: Unsupported value: supported values: "All", "Stdout", "Stderr"`},
		},
		"a cursor is a time": {
			options: v1.TargetLogOptions{Instance: "web-0", ResumeAfter: "1700000000"},
			want:    []string{`resumeAfter: Invalid value: "1700000000": must be an RFC 3339 time, such as 2006-01-02T15:04:05.999999999Z`},
		},
		"a cursor is bounded": {
			options: v1.TargetLogOptions{Instance: "web-0", ResumeAfter: strings.Repeat("1", 65)},
			want:    []string{`resumeAfter: Too long: may not be more than 64 bytes`},
		},
		"a cursor is of an instance": {
			options: v1.TargetLogOptions{ResumeAfter: cursor},
			want:    []string{"instance: Required value: must be set with `resumeAfter`"},
		},
		"a cursor isn't of all instances": {
			options: v1.TargetLogOptions{AllInstances: true, ResumeAfter: cursor},
			want:    []string{"resumeAfter: Forbidden: may not be set with `allInstances`: each instance has times of its own"},
		},
		"a cursor isn't of the last run alone": {
			options: v1.TargetLogOptions{Instance: "web-0", Previous: true, ResumeAfter: cursor},
			want:    []string{"resumeAfter: Forbidden: may not be set with `previous`: it reads on through all runs"},
		},
		"a cursor doesn't skip lines": {
			options: v1.TargetLogOptions{Instance: "web-0", TailLines: ptr.To[int64](10), ResumeAfter: cursor},
			want:    []string{"resumeAfter: Forbidden: may not be set with `tailLines`"},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(ValidateTargetLogOptions(&tc.options))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

// The streams of exec and attach have the same rules.
func TestValidateTargetStreams(t *testing.T) {
	cases := map[string]struct {
		options v1.TargetAttachOptions
		want    []string
	}{
		"all three streams are asked for": {
			options: v1.TargetAttachOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true},
		},
		"a terminal has stdin and stdout": {
			options: v1.TargetAttachOptions{Stdin: true, Stdout: true, TTY: true},
		},
		"stdin alone is a stream": {
			options: v1.TargetAttachOptions{Stdin: true},
		},
		"a stream is required": {
			options: v1.TargetAttachOptions{TTY: true},
			want:    []string{"stdout: Required value: must specify at least one of: `stdin`, `stdout`, `stderr`"},
		},
		"a terminal has no stderr": {
			options: v1.TargetAttachOptions{Stderr: true, TTY: true},
			want:    []string{"stderr: Forbidden: may not be set with `tty`: a terminal has no standard error of its own"},
		},
		"an instance is a label": {
			options: v1.TargetAttachOptions{Instance: "web.0", Stdout: true},
			want:    []string{`instance: Invalid value: "web.0": must not contain dots`},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(ValidateTargetAttachOptions(&tc.options))); diff != "" {
				t.Errorf("errors of attach (-want +got):\n%s", diff)
			}
			exec := v1.TargetExecOptions{Instance: tc.options.Instance, Stdin: tc.options.Stdin, Stdout: tc.options.Stdout, Stderr: tc.options.Stderr, TTY: tc.options.TTY, Command: []string{"ls"}}
			if diff := cmp.Diff(tc.want, messages(ValidateTargetExecOptions(&exec))); diff != "" {
				t.Errorf("errors of exec (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateTargetAttachOptions(t *testing.T) {
	cases := map[string]struct {
		options v1.TargetAttachOptions
		want    []string
	}{
		"a replay and the end of stdin": {
			options: v1.TargetAttachOptions{Stdin: true, Stdout: true, Replay: math.MaxInt64, CloseStdin: true},
		},
		"no less than no lines are replayed": {
			options: v1.TargetAttachOptions{Stdout: true, Replay: -1},
			want:    []string{"replay: Invalid value: -1: must be greater than or equal to 0"},
		},
		"the end of a stdin that isn't there": {
			options: v1.TargetAttachOptions{Stdout: true, CloseStdin: true},
			want:    []string{"stdin: Required value: must be set with `closeStdin`"},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(ValidateTargetAttachOptions(&tc.options))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateTargetExecCommand(t *testing.T) {
	cases := map[string]struct {
		command []string
		want    []string
	}{
		"arguments may be empty": {
			command: []string{"printf", ""},
		},
		"a command is required": {
			want: []string{`command: Required value: must name the program to run`},
		},
		"a command begins with a program": {
			command: []string{"", "ls"},
			want:    []string{`command[0]: Required value: must name the program to run`},
		},
		"a command has no NUL bytes": {
			command: []string{"ls", "\x00"},
			want:    []string{`command[1]: Invalid value: must not contain NUL bytes`},
		},
		"a command is bounded": {
			command: []string{"echo", strings.Repeat("a", 128<<10)},
			want:    []string{`command: Too long: may not be more than 131072 bytes`},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			options := &v1.TargetExecOptions{Stdout: true, Command: tc.command}
			if diff := cmp.Diff(tc.want, messages(ValidateTargetExecOptions(options))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

func TestValidateTargetPortForwardOptions(t *testing.T) {
	number := func(i int) int32 { return int32(i + 1) }
	cases := map[string]struct {
		options v1.TargetPortForwardOptions
		want    []string
	}{
		"nothing is required": {},
		"128 ports are the most": {
			options: v1.TargetPortForwardOptions{Instance: "web-0", Ports: many(128, number)},
		},
		"129 ports are too many": {
			options: v1.TargetPortForwardOptions{Ports: many(129, number)},
			want:    []string{`ports: Too many: 129: must have at most 128 items`},
		},
		"an instance is a label": {
			options: v1.TargetPortForwardOptions{Instance: "-"},
			want:    []string{`instance: Invalid value: "-": ` + labelText},
		},
		"a port is one, and the first bad one is named": {
			options: v1.TargetPortForwardOptions{Ports: []int32{65535, 65536, -1}},
			want:    []string{`ports[1]: Invalid value: 65536: must be between 1 and 65535, inclusive`},
		},
		"a port is given once": {
			options: v1.TargetPortForwardOptions{Ports: []int32{80, 81, 80, 81}},
			want:    []string{`ports[2]: Duplicate value: 80`},
		},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(ValidateTargetPortForwardOptions(&tc.options))); diff != "" {
				t.Errorf("errors (-want +got):\n%s", diff)
			}
		})
	}
}

// A client of an upgrade loses the body of an answer that is longer than 1
// KiB; a Status needs about 100 bytes beside its message.
func TestOptionsErrorsFitAnUpgradesAnswer(t *testing.T) {
	long := strings.Repeat("!", 63)
	now := metav1.Now()
	cases := map[string]error{
		"log": ValidateTargetLogOptions(&v1.TargetLogOptions{
			Instance: long, SinceSeconds: ptr.To[int64](math.MinInt64), SinceTime: &now,
			TailLines: ptr.To[int64](math.MinInt64), LimitBytes: ptr.To[int64](math.MinInt64), Stream: v1.LogStream(long),
		}).ToAggregate(),
		"exec":        ValidateTargetExecOptions(&v1.TargetExecOptions{Instance: long, Stderr: true, TTY: true, Command: []string{"a", strings.Repeat("\x00", 256<<10)}}).ToAggregate(),
		"attach":      ValidateTargetAttachOptions(&v1.TargetAttachOptions{Instance: long, Stderr: true, TTY: true, Replay: math.MinInt64, CloseStdin: true}).ToAggregate(),
		"portforward": ValidateTargetPortForwardOptions(&v1.TargetPortForwardOptions{Instance: long, Ports: make([]int32, 128)}).ToAggregate(),
	}
	for name, err := range cases {
		t.Run(name, func(t *testing.T) {
			if n := len(err.Error()); n > 900 {
				t.Errorf("the message has %d bytes: %v", n, err)
			}
		})
	}
}
