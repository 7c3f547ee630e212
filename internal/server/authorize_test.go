package server

import (
	"context"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/request"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestAuthorizeCreate(t *testing.T) {
	alice := &user.DefaultInfo{Name: "alice"}
	for name, tt := range map[string]struct {
		verb     string
		decision authorizer.Decision
		err      error
		wantAsks int
		wantErr  string
	}{
		"a request that was authorized for create isn't asked again": {
			verb: "create",
		},
		"get is not enough": {
			verb:     "get",
			decision: authorizer.DecisionNoOpinion,
			wantAsks: 1,
			wantErr:  `targets.streaming.aaserver.io "web" is forbidden: User "alice" cannot create resource "targets/exec" in API group "streaming.aaserver.io" in the namespace "shop"`,
		},
		"get with create passes": {
			verb:     "get",
			decision: authorizer.DecisionAllow,
			wantAsks: 1,
		},
		"an authorizer that fails refuses": {
			verb:     "get",
			decision: authorizer.DecisionNoOpinion,
			err:      errors.New("no answer"),
			wantAsks: 1,
			wantErr:  "Internal error occurred: authorizing the verb create: no answer",
		},
	} {
		t.Run(name, func(t *testing.T) {
			ctx := request.WithUser(t.Context(), alice)
			ctx = request.WithRequestInfo(ctx, &request.RequestInfo{
				IsResourceRequest: true, Verb: tt.verb, APIGroup: v1.GroupName, APIVersion: "v1",
				Namespace: "shop", Resource: "targets", Subresource: "exec", Name: "web",
			})
			asks := 0
			authz := authorizer.AuthorizerFunc(func(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
				asks++
				want := []string{"alice", "create", v1.GroupName, "shop", "targets", "exec", "web"}
				got := []string{a.GetUser().GetName(), a.GetVerb(), a.GetAPIGroup(), a.GetNamespace(), a.GetResource(), a.GetSubresource(), a.GetName()}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("attributes (-want +got):\n%s", diff)
				}
				return tt.decision, "", tt.err
			})
			err := authorizeCreate(ctx, authz)
			if asks != tt.wantAsks {
				t.Errorf("the authorizer was asked %d times, want %d", asks, tt.wantAsks)
			}
			var got string
			if err != nil {
				got = err.Error()
			}
			if got != tt.wantErr {
				t.Errorf("got error %q, want %q", got, tt.wantErr)
			}
		})
	}
}
