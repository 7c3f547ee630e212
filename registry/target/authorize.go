package target

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
)

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
