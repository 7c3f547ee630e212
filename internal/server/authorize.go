package server

import (
	"context"
	"fmt"
	"net/http"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/request"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// entered are the subresources of targets that let whoever uses them act, and
// not only look.
var entered = sets.New("exec", "attach", "portforward")

// withCreate demands the verb create of whoever uses them, before admission looks
// at the request: who may not isn't told what a target's class allows.
func withCreate(next http.Handler, authz authorizer.UnconditionalAuthorizer) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info, ok := request.RequestInfoFrom(r.Context())
		if ok && info.IsResourceRequest && info.APIGroup == v1.GroupName && info.Resource == "targets" && entered.Has(info.Subresource) {
			if err := authorizeCreate(r.Context(), authz); err != nil {
				responsewriters.ErrorNegotiated(err, Codecs, v1.SchemeGroupVersion, w, r)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}

// authorizeCreate demands the verb create of whoever asks for exec, attach or
// portforward. The verb that the request was authorized for comes from its HTTP
// method: a WebSocket upgrade is a GET, so that without this check the verb
// get, which many read-only roles have, would be enough to run commands
// (https://github.com/kubernetes/kubernetes/issues/133515; kube-apiserver has
// the same check in its pod subresources only).
func authorizeCreate(ctx context.Context, authz authorizer.UnconditionalAuthorizer) error {
	attributes, err := filters.GetAuthorizerAttributes(ctx)
	if err != nil {
		return apierrors.NewInternalError(err)
	}
	if attributes.GetVerb() == "create" {
		return nil // that is what the request was authorized for
	}
	decision, reason, err := authz.Authorize(ctx, createAttributes{attributes})
	if decision == authorizer.DecisionAllow {
		return nil
	}
	if err != nil {
		return apierrors.NewInternalError(fmt.Errorf("authorizing the verb create: %w", err))
	}
	return responsewriters.ForbiddenStatusError(createAttributes{attributes}, reason)
}

// createAttributes are the request's attributes with the verb create.
type createAttributes struct {
	authorizer.Attributes
}

func (createAttributes) GetVerb() string { return "create" }

func (createAttributes) IsReadOnly() bool { return false }
