package target

import (
	"errors"
	"fmt"
	"net/http"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

func TestPick(t *testing.T) {
	running := func(name string, ready bool) v1.InstanceStatus {
		return v1.InstanceStatus{Name: name, Ready: ready, State: v1.InstanceState{Running: &v1.InstanceStateRunning{}}}
	}
	crashing := v1.InstanceStatus{Name: "web-0", State: v1.InstanceState{
		Waiting: &v1.InstanceStateWaiting{Reason: "CrashLoopBackOff", Message: "exited with code 3"},
	}}
	process := v1.TargetSpec{AgentName: "local", Process: &v1.ProcessSource{}, Replicas: ptr.To[int32](2)}
	scaledDown := process
	scaledDown.Replicas = ptr.To[int32](0)
	tcp := v1.TargetSpec{TCP: &v1.TCPSource{Endpoints: []v1.Endpoint{{Name: "a"}, {Name: "b"}}}}

	for name, tt := range map[string]struct {
		spec      v1.TargetSpec
		instances []v1.InstanceStatus
		instance  string
		notReady  bool
		want      string
		wantErr   string
		wantCode  int32
	}{
		"the first ready one is picked": {
			spec:      process,
			instances: []v1.InstanceStatus{crashing, running("web-1", true)},
			want:      "web-1",
		},
		"the one that is named is picked, ready or not": {
			spec:      process,
			instances: []v1.InstanceStatus{crashing, running("web-1", true)},
			instance:  "web-0",
			want:      "web-0",
		},
		"one that doesn't exist is not found, and the others are named": {
			spec:      process,
			instances: []v1.InstanceStatus{running("web-0", true), running("web-1", true)},
			instance:  "web-7",
			wantErr:   `target "web" has no instance "web-7": it has web-0, web-1`,
			wantCode:  http.StatusNotFound,
		},
		"with none ready, it says why": {
			spec:      process,
			instances: []v1.InstanceStatus{crashing},
			wantErr:   `no instance of target "web" is running: web-0 is waiting (CrashLoopBackOff: exited with code 3)`,
			wantCode:  http.StatusConflict,
		},
		"a log can be had of one that isn't ready": {
			spec:      process,
			instances: []v1.InstanceStatus{crashing},
			notReady:  true,
			want:      "web-0",
		},
		"a target scaled to nothing says so": {
			spec:     scaledDown,
			wantErr:  `target "web" is scaled to 0 instances: scale it up first`,
			wantCode: http.StatusConflict,
		},
		"a target that its agent hasn't seen says so": {
			spec:     process,
			wantErr:  `no instance of target "web" was started yet: its agent "local" may be down, or busy`,
			wantCode: http.StatusConflict,
		},
		"endpoints are there without a status": {
			spec: tcp,
			want: "web-a",
		},
		"an endpoint can be named": {
			spec:     tcp,
			instance: "web-b",
			want:     "web-b",
		},
	} {
		t.Run(name, func(t *testing.T) {
			target := &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: tt.spec}
			target.Status.Instances = tt.instances
			got, err := pick(target, tt.instance, tt.notReady)
			var message string
			var code int32
			if status := apierrors.APIStatus(nil); errors.As(err, &status) {
				message, code = status.Status().Message, status.Status().Code
			}
			if got != tt.want || message != tt.wantErr || code != tt.wantCode {
				t.Errorf("got %q, %q (%d), want %q, %q (%d)", got, message, code, tt.want, tt.wantErr, tt.wantCode)
			}
		})
	}
}

func TestStatusError(t *testing.T) {
	for kind, want := range map[driver.Kind]int32{
		driver.Invalid:     http.StatusBadRequest,
		driver.Unsupported: http.StatusBadRequest,
		driver.NotFound:    http.StatusNotFound,
		driver.NotRunning:  http.StatusConflict,
		driver.Unavailable: http.StatusServiceUnavailable,
	} {
		err := statusError(fmt.Errorf("wrapped: %w", driver.Errorf(kind, "this is why")))
		var status apierrors.APIStatus
		if !errors.As(err, &status) {
			t.Errorf("kind %d: %v is no APIStatus", kind, err)
			continue
		}
		if got := status.Status(); got.Code != want || got.Message != "wrapped: this is why" {
			t.Errorf("kind %d: %d %q, want %d with the text of the error", kind, got.Code, got.Message, want)
		}
	}
	other := errors.New("something else")
	if got := statusError(other); got != other {
		t.Errorf("an error without a kind became %v", got)
	}
}

type plainConn struct{}

func (plainConn) Close() error { return nil }

func TestAbilityNamesTheSourceThatLacksIt(t *testing.T) {
	target := &v1.Target{Spec: v1.TargetSpec{TCP: &v1.TCPSource{}}}
	_, err := ability[driver.Execer](plainConn{}, target, "exec")
	if driver.KindOf(err) != driver.Unsupported || err.Error() != "a target of source tcp has no exec" {
		t.Errorf("got %v", err)
	}
}

func TestSessionCode(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		want int
	}{
		"an exit code is no failure":      {&streaming.ExitError{Code: 7}, http.StatusOK},
		"a client that leaves":            {fmt.Errorf("reading: %w", streaming.ErrClientGone), session.StatusClientGone},
		"a client that answers no more":   {streaming.ErrPeerTimeout, session.StatusClientGone},
		"a client that breaks the rules":  {streaming.ErrProtocol, http.StatusBadRequest},
		"a driver's error has its status": {driver.Errorf(driver.NotRunning, "x"), http.StatusConflict},
		"a status is its own":             {session.ErrDraining, http.StatusServiceUnavailable},
		"others are left to the Manager":  {errors.New("x"), 0},
	} {
		t.Run(name, func(t *testing.T) {
			if got := SessionCode(tt.err); got != tt.want {
				t.Errorf("got %d, want %d", got, tt.want)
			}
		})
	}
}
