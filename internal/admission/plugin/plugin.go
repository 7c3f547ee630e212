// Package plugin is what the admission plugins have in common: what they are
// initialised with, which requests concern them, which changes of a target
// matter to them, and how they refuse.
package plugin

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/tools/record"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/policy"
)

// Targets finds targets as they are stored now.
type Targets interface {
	// Target returns a target. Its error is a NotFound API error if there is
	// no such target.
	Target(ctx context.Context, namespace, name string) (*v1.Target, error)
}

// WantsClasses is a plugin that reads classes.
type WantsClasses interface {
	SetClasses(policy.Classes)
	admission.InitializationValidator
}

// WantsTargets is a plugin that reads targets.
type WantsTargets interface {
	SetTargets(Targets)
	admission.InitializationValidator
}

// WantsServices is a plugin that judges addresses, for which it has to know the
// cluster's service ranges. It finds them when it is asked, and fails while they
// aren't known.
type WantsServices interface {
	SetServices(func() ([]netip.Prefix, error))
	admission.InitializationValidator
}

// WantsRecorder is a plugin that tells of what it refused by Events on the
// target.
type WantsRecorder interface {
	SetRecorder(record.EventRecorder)
	admission.InitializationValidator
}

// Concerns says whether a request is for a target as a whole, or connects to
// one. The status and scale subresources change nothing that a plugin judges.
func Concerns(a admission.Attributes) bool {
	return a.GetResource().GroupResource() == api.Resource("targets") &&
		(a.GetSubresource() != "") == (a.GetOperation() == admission.Connect)
}

// Objects returns the target that a request creates or updates, and what it was
// before; nil if it is created.
func Objects(a admission.Attributes) (target, old *api.Target, err error) {
	if target, err = object(a.GetObject()); err != nil {
		return nil, nil, err
	}
	if a.GetOperation() == admission.Create {
		return target, nil, nil
	}
	old, err = object(a.GetOldObject())
	return target, old, err
}

func object(obj runtime.Object) (*api.Target, error) {
	target, ok := obj.(*api.Target)
	if !ok {
		return nil, apierrors.NewInternalError(fmt.Errorf("admission of a target was asked about a %T", obj))
	}
	return target, nil
}

// Matters says whether a request makes a target, or changes what of it a class
// or a Secret's owner have a say in: everything in the spec but how many
// instances there are, and when they are started again and killed. Whatever
// else changes, and an agent takes its finalizer off long after the class is
// gone, must go through.
func Matters(target, old *api.Target) bool {
	if old == nil {
		return true
	}
	a, b := target.Spec, old.Spec
	for _, spec := range []*api.TargetSpec{&a, &b} {
		spec.Replicas, spec.RestartPolicy, spec.TerminationGracePeriodSeconds = nil, "", nil
	}
	return !apiequality.Semantic.DeepEqual(a, b)
}

const (
	// maxMessage bounds what a refusal says, in bytes.
	maxMessage = 4 << 10
	// maxConnectMessage is the same where a connection is refused: clients of
	// WebSockets keep 1 KiB of the Status that answers a failed upgrade.
	maxConnectMessage = 600
	// maxWord bounds what comes from elsewhere (the name of a user, an
	// authorizer's reason) within a message, in bytes.
	maxWord = 256
)

// Forbidden refuses a request, for one reason or several. Of several, it gives
// as many as a message has room for.
func Forbidden(a admission.Attributes, reasons ...string) error {
	limit := maxMessage
	if a.GetOperation() == admission.Connect {
		limit = maxConnectMessage
	}
	var b strings.Builder
	for i, reason := range reasons {
		if i > 0 {
			if b.Len()+len(reason) > limit {
				b.WriteString("; and more")
				break
			}
			b.WriteString("; ")
		}
		b.WriteString(clip(reason, limit))
	}
	return admission.NewForbidden(a, errors.New(b.String()))
}

// Unreadable is the answer where something couldn't be read that a decision
// needs. A status stays what it is, so that clients know what may be tried
// again.
func Unreadable(err error) error {
	if status, ok := errors.AsType[*apierrors.StatusError](err); ok {
		return status
	}
	return apierrors.NewInternalError(errors.New(clip(err.Error(), maxConnectMessage)))
}

// Authorize demands that the user of a request may do something beyond the
// request itself. Of the attributes, verb, resource and name are given. toDo
// says what to do about a refusal.
func Authorize(ctx context.Context, authz authorizer.UnconditionalAuthorizer, a admission.Attributes, want authorizer.AttributesRecord, toDo string) error {
	name := ""
	if want.User = a.GetUserInfo(); want.User != nil {
		name = want.User.GetName()
	}
	want.ResourceRequest = true
	decision, reason, err := authz.Authorize(ctx, want)
	may := fmt.Sprintf("%s %s %q", want.Verb, schema.GroupResource{Group: want.APIGroup, Resource: want.Resource}, want.Name)
	if want.Namespace != "" {
		may += fmt.Sprintf(" in the namespace %q", want.Namespace)
	}
	switch {
	case err != nil:
		return apierrors.NewInternalError(errors.New(clip(fmt.Sprintf("asking whether user %q may %s: %v", clip(name, maxWord), may, err), maxMessage)))
	case decision == authorizer.DecisionAllow:
		return nil
	}
	if reason != "" {
		reason = " (" + clip(reason, maxWord) + ")"
	}
	return Forbidden(a, fmt.Sprintf("user %q may not %s%s: %s", clip(name, maxWord), may, reason, toDo))
}

func clip(text string, length int) string {
	if len(text) <= length {
		return text
	}
	return strings.ToValidUTF8(text[:length], "") + "…"
}
