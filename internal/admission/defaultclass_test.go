package admission

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission/defaultclass"
)

func TestDefaultTargetClass(t *testing.T) {
	unnamed := func(target *api.Target) { target.Spec.ClassName = "" }
	newer := standard(func(class *v1.TargetClass) {
		defaultOne(class)
		class.Name = "newer"
		class.CreationTimestamp = metav1.NewTime(time.Unix(1000, 0))
	})
	for name, tt := range map[string]struct {
		classes   []any
		err       error
		request   request
		wantClass string
		wantRead  []string
		wantErr   func(error) bool
	}{
		"a new target that names none gets the default class": {
			classes:   []any{standard(defaultOne)},
			request:   request{operation: admission.Create, object: process(unnamed)},
			wantClass: "standard",
			wantRead:  []string{"default class"},
		},
		"of several default classes it gets the newest": {
			classes:   []any{standard(defaultOne), newer},
			request:   request{operation: admission.Create, object: process(unnamed)},
			wantClass: "newer",
			wantRead:  []string{"default class"},
		},
		"a dry run is filled in too": {
			classes:   []any{standard(defaultOne)},
			request:   request{operation: admission.Create, object: process(unnamed), dryRun: true},
			wantClass: "standard",
			wantRead:  []string{"default class"},
		},
		"without a default class it stays without": {
			classes:  []any{standard(nil)},
			request:  request{operation: admission.Create, object: process(unnamed)},
			wantRead: []string{"default class"},
		},
		"a class that is named stays, and nothing is read": {
			classes:   []any{newer},
			request:   request{operation: admission.Create, object: process(nil)},
			wantClass: "standard",
		},
		"an update that takes the name away is the registry's business": {
			classes: []any{standard(defaultOne)},
			request: request{operation: admission.Update, object: process(unnamed), old: process(nil)},
		},
		"the status subresource isn't touched": {
			classes: []any{standard(defaultOne)},
			request: request{operation: admission.Create, subresource: "status", object: process(unnamed)},
		},
		"another resource isn't touched": {
			classes: []any{standard(defaultOne)},
			request: request{operation: admission.Create, resource: "sessions", object: process(unnamed)},
		},
		"classes that can't be read fail the request": {
			err:      errors.New("the storage is down"),
			request:  request{operation: admission.Create, object: process(unnamed)},
			wantRead: []string{"default class"},
			wantErr:  apierrors.IsInternalError,
		},
		"a status of the storage is passed on": {
			err:      apierrors.NewTooManyRequests("busy", 1),
			request:  request{operation: admission.Create, object: process(unnamed)},
			wantRead: []string{"default class"},
			wantErr:  apierrors.IsTooManyRequests,
		},
	} {
		t.Run(name, func(t *testing.T) {
			objs := newObjects(tt.classes...)
			objs.err = tt.err
			err := admit(newPlugin(t, defaultclass.PluginName, &answers{}, objs.options()), tt.request)
			if tt.wantErr == nil && err != nil || tt.wantErr != nil && !tt.wantErr(err) {
				t.Fatalf("unexpected error %v", err)
			}
			if got := tt.request.object.(*api.Target).Spec.ClassName; got != tt.wantClass {
				t.Errorf("class %q, want %q", got, tt.wantClass)
			}
			if diff := cmp.Diff(tt.wantRead, objs.read); diff != "" {
				t.Errorf("read (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDefaultTargetClassOfAnotherType(t *testing.T) {
	p := newPlugin(t, defaultclass.PluginName, &answers{}, newObjects().options())
	if err := admit(p, request{operation: admission.Create, object: &v1.Target{}}); !apierrors.IsInternalError(err) {
		t.Errorf("got %v, want an internal error", err)
	}
}
