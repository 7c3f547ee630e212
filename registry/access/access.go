// Package access answers SelfSubjectAccessReview where there is no cluster to
// ask: `kubectl auth can-i` and consoles use it.
package access

import (
	"context"
	"fmt"

	authorizationv1 "k8s.io/api/authorization/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
)

// Install registers the one kind that is served. There are no conversions: the
// type is its own hub.
func Install(scheme *runtime.Scheme) error {
	hub := schema.GroupVersion{Group: authorizationv1.GroupName, Version: runtime.APIVersionInternal}
	for _, gv := range []schema.GroupVersion{hub, authorizationv1.SchemeGroupVersion} {
		scheme.AddKnownTypes(gv, &authorizationv1.SelfSubjectAccessReview{})
	}
	metav1.AddToGroupVersion(scheme, authorizationv1.SchemeGroupVersion)
	return scheme.SetVersionPriority(authorizationv1.SchemeGroupVersion)
}

// Storage returns the REST surface of the group.
func Storage(authz authorizer.UnconditionalAuthorizer) map[string]rest.Storage {
	return map[string]rest.Storage{"selfsubjectaccessreviews": &REST{authorizer: authz}}
}

// REST answers reviews; it stores nothing.
type REST struct {
	authorizer authorizer.UnconditionalAuthorizer
}

var (
	_ rest.Creater              = (*REST)(nil)
	_ rest.Scoper               = (*REST)(nil)
	_ rest.SingularNameProvider = (*REST)(nil)
)

// New implements rest.Storage.
func (*REST) New() runtime.Object { return &authorizationv1.SelfSubjectAccessReview{} }

// Destroy implements rest.Storage.
func (*REST) Destroy() {}

// NamespaceScoped implements rest.Scoper.
func (*REST) NamespaceScoped() bool { return false }

// GetSingularName implements rest.SingularNameProvider.
func (*REST) GetSingularName() string { return "selfsubjectaccessreview" }

// Create implements rest.Creater: it answers whether the user who asks may do
// what the spec says.
func (r *REST) Create(ctx context.Context, obj runtime.Object, validate rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	review, ok := obj.(*authorizationv1.SelfSubjectAccessReview)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("expected a SelfSubjectAccessReview, got a %T", obj))
	}
	if (review.Spec.ResourceAttributes == nil) == (review.Spec.NonResourceAttributes == nil) {
		return nil, apierrors.NewBadRequest("exactly one of spec.resourceAttributes and spec.nonResourceAttributes must be set")
	}
	user, ok := request.UserFrom(ctx)
	if !ok {
		return nil, apierrors.NewBadRequest("there is no user in the request")
	}
	if validate != nil {
		if err := validate(ctx, obj.DeepCopyObject()); err != nil {
			return nil, err
		}
	}

	attributes := authorizer.AttributesRecord{User: user}
	if resource := review.Spec.ResourceAttributes; resource != nil {
		attributes.ResourceRequest = true
		attributes.Verb = resource.Verb
		attributes.Namespace = resource.Namespace
		attributes.APIGroup = resource.Group
		attributes.APIVersion = resource.Version
		attributes.Resource = resource.Resource
		attributes.Subresource = resource.Subresource
		attributes.Name = resource.Name
	} else {
		attributes.Verb = review.Spec.NonResourceAttributes.Verb
		attributes.Path = review.Spec.NonResourceAttributes.Path
	}
	decision, reason, err := r.authorizer.Authorize(ctx, attributes)
	review.Status = authorizationv1.SubjectAccessReviewStatus{
		Allowed: decision == authorizer.DecisionAllow,
		Denied:  decision == authorizer.DecisionDeny,
		Reason:  reason,
	}
	if err != nil {
		review.Status.EvaluationError = err.Error()
	}
	return review, nil
}
