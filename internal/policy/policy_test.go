package policy

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func assertDenied(t *testing.T, err error, class string) {
	t.Helper()
	denied, ok := errors.AsType[*DeniedError](err)
	if !ok {
		t.Fatalf("error %v (%T), want a *DeniedError", err, err)
	}
	if denied.Class != class {
		t.Errorf("class %q, want %q", denied.Class, class)
	}
}

func TestDefaultClass(t *testing.T) {
	class := func(name, isDefault string, age time.Duration) *v1.TargetClass {
		return &v1.TargetClass{ObjectMeta: metav1.ObjectMeta{
			Name:              name,
			Annotations:       map[string]string{v1.AnnotationDefaultClass: isDefault},
			CreationTimestamp: metav1.NewTime(time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC).Add(-age)),
		}}
	}
	tests := map[string]struct {
		classes []*v1.TargetClass
		want    string
	}{
		"there is none without classes":             {},
		"there is none if none is annotated":        {classes: []*v1.TargetClass{class("a", "", 0), class("b", "false", 0), class("c", "yes", 0), {}, nil}},
		"the annotated one is":                      {classes: []*v1.TargetClass{class("a", "", 0), class("b", "true", time.Hour)}, want: "b"},
		"the newest of several is":                  {classes: []*v1.TargetClass{class("a", "true", 2*time.Hour), class("c", "true", time.Hour), class("b", "true", 3*time.Hour)}, want: "c"},
		"of those of one time the first by name is": {classes: []*v1.TargetClass{class("c", "true", 0), class("b", "true", 0), class("d", "true", 0), class("a", "true", time.Hour)}, want: "b"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := ""
			if class := DefaultClass(tt.classes); class != nil {
				got = class.Name
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestLimitsOf(t *testing.T) {
	defaults := Limits{SessionsPerUser: 10, SessionsPerTarget: 0, IdleTimeout: time.Hour, MaxDuration: 24 * time.Hour}
	tests := map[string]struct {
		limits v1.SessionLimits
		want   Limits
	}{
		"what isn't given is the default": {want: defaults},
		"what is given replaces the default, upwards too": {
			limits: v1.SessionLimits{SessionsPerUser: ptr.To[int32](20), SessionsPerTarget: ptr.To[int32](5), IdleTimeoutSeconds: ptr.To[int64](60), MaxDurationSeconds: ptr.To[int64](90000)},
			want:   Limits{SessionsPerUser: 20, SessionsPerTarget: 5, IdleTimeout: time.Minute, MaxDuration: 25 * time.Hour},
		},
		"one that is given leaves the others": {
			limits: v1.SessionLimits{IdleTimeoutSeconds: ptr.To[int64](1)},
			want:   Limits{SessionsPerUser: 10, IdleTimeout: time.Second, MaxDuration: 24 * time.Hour},
		},
		"zero doesn't become none": {
			limits: v1.SessionLimits{SessionsPerUser: ptr.To[int32](0), SessionsPerTarget: ptr.To[int32](-1), IdleTimeoutSeconds: ptr.To[int64](0), MaxDurationSeconds: ptr.To[int64](math.MinInt64)},
			want:   Limits{SessionsPerUser: 1, SessionsPerTarget: 1, IdleTimeout: time.Second, MaxDuration: time.Second},
		},
		"a time that is too long doesn't become short": {
			limits: v1.SessionLimits{SessionsPerUser: ptr.To[int32](math.MaxInt32), IdleTimeoutSeconds: ptr.To[int64](math.MaxInt64), MaxDurationSeconds: ptr.To[int64](math.MaxInt64/int64(time.Second) + 1)},
			want:   Limits{SessionsPerUser: math.MaxInt32, IdleTimeout: math.MaxInt64 / time.Second * time.Second, MaxDuration: math.MaxInt64 / time.Second * time.Second},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got := LimitsOf(classOf(v1.TargetClassSpec{Limits: tt.limits}), defaults)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("limits (-want +got):\n%s", diff)
			}
		})
	}
	if diff := cmp.Diff(defaults, LimitsOf(nil, defaults)); diff != "" {
		t.Errorf("limits without a class (-want +got):\n%s", diff)
	}
}
