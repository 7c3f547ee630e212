package policy

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// storedClasses has one class, which may be the default, or fails.
type storedClasses struct {
	class     *v1.TargetClass
	isDefault bool
	err       error
}

func (s storedClasses) Class(_ context.Context, name string) (*v1.TargetClass, error) {
	if s.err != nil {
		return nil, s.err
	}
	if s.class == nil || s.class.Name != name {
		return nil, apierrors.NewNotFound(v1.SchemeGroupVersion.WithResource("targetclasses").GroupResource(), name)
	}
	return s.class, nil
}

func (s storedClasses) DefaultClass(context.Context) (string, error) {
	if s.err != nil || !s.isDefault {
		return "", s.err
	}
	return s.class.Name, nil
}

func TestGoverning(t *testing.T) {
	class, failure := classOf(v1.TargetClassSpec{}), errors.New("the storage is away")
	tests := map[string]struct {
		classes    storedClasses
		name       string
		want       *v1.TargetClass
		wantError  string
		wantDenied bool
	}{
		"the class that is named governs":           {classes: storedClasses{class: class}, name: "standard", want: class},
		"without a name the default class governs":  {classes: storedClasses{class: class, isDefault: true}, want: class},
		"a class that doesn't exist denies":         {classes: storedClasses{class: class, isDefault: true}, name: "other", wantDenied: true, wantError: `class "other" does not exist, and without its TargetClass a target is allowed nothing: create the class, or name another in spec.className`},
		"that there is no default denies":           {classes: storedClasses{class: class}, wantDenied: true, wantError: `without a TargetClass nothing is allowed: name one in spec.className, or make one the default by the annotation streaming.aaserver.io/is-default-class: "true"`},
		"a class that can't be read is a failure":   {classes: storedClasses{err: failure}, name: "standard", wantError: `reading class "standard": the storage is away`},
		"a default that can't be read is a failure": {classes: storedClasses{err: failure}, wantError: "finding the default class: the storage is away"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := Governing(t.Context(), tt.classes, tt.name)
			if got != tt.want {
				t.Errorf("got class %v, want %v", got, tt.want)
			}
			message := ""
			if err != nil {
				message = err.Error()
			}
			if diff := cmp.Diff(tt.wantError, message); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if _, denied := errors.AsType[*DeniedError](err); denied != tt.wantDenied {
				t.Errorf("a *DeniedError: %t, want %t", denied, tt.wantDenied)
			}
			if tt.classes.err != nil && !errors.Is(err, tt.classes.err) {
				t.Errorf("error %v doesn't wrap %v", err, tt.classes.err)
			}
		})
	}
}
