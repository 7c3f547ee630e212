package v1_test

import (
	"net/url"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// TestQueriesAreOptions decodes queries the way the server's connect handler
// does: converted by the scheme, and defaulted.
func TestQueriesAreOptions(t *testing.T) {
	noon := metav1.NewTime(time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC))
	cases := map[string]struct {
		query string
		want  runtime.Object
	}{
		"every parameter of log": {
			query: "instance=web-0&follow=true&previous=true&sinceSeconds=60&sinceTime=2026-11-20T12:00:00Z&resumeAfter=2026-11-20T12:00:00.000000001Z" +
				"&timestamps=true&tailLines=10&limitBytes=1024&stream=Stderr&allInstances=true&prefix=true",
			want: &v1.TargetLogOptions{
				Instance:     "web-0",
				Follow:       true,
				Previous:     true,
				SinceSeconds: ptr.To[int64](60),
				SinceTime:    &noon,
				ResumeAfter:  "2026-11-20T12:00:00.000000001Z",
				Timestamps:   true,
				TailLines:    ptr.To[int64](10),
				LimitBytes:   ptr.To[int64](1024),
				Stream:       v1.LogStreamStderr,
				AllInstances: true,
				Prefix:       true,
			},
		},
		"a log of both streams, unless one is named": {
			query: "tailLines=0",
			want:  &v1.TargetLogOptions{TailLines: ptr.To[int64](0), Stream: v1.LogStreamAll},
		},
		"a stream that there isn't, for validation to refuse": {
			query: "stream=stdin",
			want:  &v1.TargetLogOptions{Stream: "stdin"},
		},
		"switches that are off, on and bare": {
			query: "follow=false&previous=0&timestamps=1&prefix",
			want:  &v1.TargetLogOptions{Timestamps: true, Prefix: true, Stream: v1.LogStreamAll},
		},
		"every parameter of exec": {
			query: "instance=web-0&stdin=true&stdout=true&stderr=true&tty=true&command=sh&command=-c&command=echo+a%26b",
			want:  &v1.TargetExecOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true, TTY: true, Command: []string{"sh", "-c", "echo a&b"}},
		},
		"an exec's output, unless streams are named": {
			query: "command=ls",
			want:  &v1.TargetExecOptions{Stdout: true, Stderr: true, Command: []string{"ls"}},
		},
		"every parameter of attach": {
			query: "instance=web-0&stdin=true&stdout=true&stderr=true&tty=true&replay=24&closeStdin=true",
			want:  &v1.TargetAttachOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true, TTY: true, Replay: 24, CloseStdin: true},
		},
		"an attach's output, unless streams are named": {
			query: "tty=true",
			want:  &v1.TargetAttachOptions{Stdout: true, TTY: true},
		},
		"every parameter of portforward": {
			query: "instance=web-0&ports=8080,9090&ports=53",
			want:  &v1.TargetPortForwardOptions{Instance: "web-0", Ports: []int32{8080, 9090, 53}},
		},
		"a forward of any port": {
			query: "instance=web-0",
			want:  &v1.TargetPortForwardOptions{Instance: "web-0"},
		},
		"parameters that nobody knows": {
			query: "container=c&instance=web-0",
			want:  &v1.TargetPortForwardOptions{Instance: "web-0"},
		},
	}
	codec := runtime.NewParameterCodec(newScheme(t))
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			query, err := url.ParseQuery(tc.query)
			if err != nil {
				t.Fatal(err)
			}
			got := reflect.New(reflect.TypeOf(tc.want).Elem()).Interface().(runtime.Object)
			if err := codec.DecodeParameters(query, v1.SchemeGroupVersion, got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("options (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBadQueriesAreRefused(t *testing.T) {
	cases := map[string]struct {
		query string
		into  runtime.Object
		want  string
	}{
		"a number of seconds that isn't one":   {"sinceSeconds=a", &v1.TargetLogOptions{}, `parsing "a": invalid syntax`},
		"a number of lines that is too large":  {"tailLines=9223372036854775808", &v1.TargetLogOptions{}, "value out of range"},
		"a number of bytes that is a fraction": {"limitBytes=1.5", &v1.TargetLogOptions{}, `parsing "1.5": invalid syntax`},
		"a time that isn't one":                {"sinceTime=yesterday", &v1.TargetLogOptions{}, `cannot parse "yesterday"`},
		"a port that is a name":                {"ports=http", &v1.TargetPortForwardOptions{}, "cannot convert to []int32"},
		"a port that is too large":             {"ports=65536", &v1.TargetPortForwardOptions{}, "value out of range"},
		"a port that is negative":              {"ports=-1", &v1.TargetPortForwardOptions{}, "cannot convert to []int32"},
	}
	codec := runtime.NewParameterCodec(newScheme(t))
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			query, err := url.ParseQuery(tc.query)
			if err != nil {
				t.Fatal(err)
			}
			err = codec.DecodeParameters(query, v1.SchemeGroupVersion, tc.into)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
}

// TestOptionsAreQueries encodes options the way a client does, and decodes
// them again.
func TestOptionsAreQueries(t *testing.T) {
	noon := metav1.NewTime(time.Date(2026, 11, 20, 12, 0, 0, 0, time.UTC))
	cases := map[string]runtime.Object{
		"log": &v1.TargetLogOptions{
			Instance: "web-0", Follow: true, Previous: true, SinceSeconds: ptr.To[int64](60), SinceTime: &noon, ResumeAfter: "2026-11-20T12:00:00.000000001Z",
			Timestamps: true, TailLines: ptr.To[int64](0), LimitBytes: ptr.To[int64](1), Stream: v1.LogStreamStdout, AllInstances: true, Prefix: true,
		},
		"exec":        &v1.TargetExecOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true, TTY: true, Command: []string{"printf", "", "a b"}},
		"attach":      &v1.TargetAttachOptions{Instance: "web-0", Stdin: true, Stdout: true, Stderr: true, TTY: true, Replay: 24, CloseStdin: true},
		"portforward": &v1.TargetPortForwardOptions{Instance: "web-0", Ports: []int32{1, 65535}},
	}
	codec := runtime.NewParameterCodec(newScheme(t))
	for name, options := range cases {
		t.Run(name, func(t *testing.T) {
			query, err := codec.EncodeParameters(options, v1.SchemeGroupVersion)
			if err != nil {
				t.Fatal(err)
			}
			got := reflect.New(reflect.TypeOf(options).Elem()).Interface().(runtime.Object)
			if err := codec.DecodeParameters(query, v1.SchemeGroupVersion, got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(options, got); diff != "" {
				t.Errorf("options after %q (-want +got):\n%s", query.Encode(), diff)
			}
		})
	}
}

func TestFieldLabels(t *testing.T) {
	scheme := newScheme(t)
	gvk := v1.SchemeGroupVersion.WithKind("Target")
	for _, label := range []string{"metadata.name", "metadata.namespace", "spec.agentName"} {
		t.Run(label+" may be selected", func(t *testing.T) {
			gotLabel, gotValue, err := scheme.ConvertFieldLabel(gvk, label, "a")
			if gotLabel != label || gotValue != "a" || err != nil {
				t.Errorf("%q, %q, %v", gotLabel, gotValue, err)
			}
		})
	}
	t.Run("others may not be, and the error says which may", func(t *testing.T) {
		_, _, err := scheme.ConvertFieldLabel(gvk, "spec.className", "a")
		const want = `"spec.className" is not a known field selector: only metadata.name, metadata.namespace and spec.agentName are`
		if err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
	})
}
