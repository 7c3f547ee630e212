package admission

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission/secretaccess"
)

func getSecret(name string) []authorizer.AttributesRecord {
	return []authorizer.AttributesRecord{{
		User: jane, Verb: "get", APIVersion: "v1", Resource: "secrets", Namespace: "shop", Name: name, ResourceRequest: true,
	}}
}

func TestTargetSecretAccess(t *testing.T) {
	update := func(change func(*api.Target)) request {
		return request{operation: admission.Update, object: ssh(change), old: ssh(nil)}
	}
	for name, tt := range map[string]struct {
		request request
		want    []authorizer.AttributesRecord
	}{
		"who creates a target with a Secret must be allowed to get it": {
			request: request{operation: admission.Create, object: ssh(nil)},
			want:    getSecret("keys"),
		},
		"in a dry run too": {
			request: request{operation: admission.Create, object: ssh(nil), dryRun: true},
			want:    getSecret("keys"),
		},
		"a target without a Secret needs nothing": {
			request: request{operation: admission.Create, object: process(nil)},
		},
		"another Secret has to be readable": {
			request: update(func(target *api.Target) { target.Spec.SSH.CredentialsSecretRef.Name = "others" }),
			want:    getSecret("others"),
		},
		"an endpoint that is added is where the Secret would go": {
			request: update(func(target *api.Target) {
				target.Spec.SSH.Endpoints = append(target.Spec.SSH.Endpoints, api.Endpoint{Name: "b", Host: "192.0.2.66", Port: 22})
			}),
			want: getSecret("keys"),
		},
		"a host that changes too": {
			request: update(func(target *api.Target) { target.Spec.SSH.Endpoints[0].Host = "192.0.2.66" }),
			want:    getSecret("keys"),
		},
		"a command for the log is run with the Secret": {
			request: update(func(target *api.Target) { target.Spec.SSH.Log = &api.SSHLog{Command: []string{"cat", "/etc/shadow"}} }),
			want:    getSecret("keys"),
		},
		"another class may allow other addresses": {
			request: update(func(target *api.Target) { target.Spec.ClassName = "wide" }),
			want:    getSecret("keys"),
		},
		"an agent would be in between": {
			request: update(func(target *api.Target) { target.Spec.AgentName = "edge" }),
			want:    getSecret("keys"),
		},
		"ports are ways to the host": {
			request: update(func(target *api.Target) { target.Spec.Ports = nil }),
			want:    getSecret("keys"),
		},
		"a Secret that isn't used any more needs nothing": {
			request: request{operation: admission.Update, object: process(nil), old: ssh(nil)},
		},
		"metadata needs nothing": {
			request: update(func(target *api.Target) {
				target.Labels = map[string]string{"tier": "web"}
				target.Finalizers = []string{"example.com/f"}
			}),
		},
		"the number of instances and their restarts need nothing": {
			request: update(func(target *api.Target) {
				replicas, grace := int32(3), int64(1)
				target.Spec.Replicas, target.Spec.TerminationGracePeriodSeconds = &replicas, &grace
				target.Spec.RestartPolicy = api.RestartNever
			}),
		},
		"the status needs nothing": {
			request: request{operation: admission.Update, subresource: "status", object: ssh(func(target *api.Target) { target.Status.Replicas = 1 }), old: ssh(nil)},
		},
		"a connection needs nothing": {
			request: request{operation: admission.Connect, subresource: "exec", object: &v1.TargetExecOptions{}},
		},
		"a deletion needs nothing": {
			request: request{operation: admission.Delete, old: ssh(nil)},
		},
		"another resource needs nothing": {
			request: request{operation: admission.Create, resource: "sessions", object: ssh(nil)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			for _, decision := range []authorizer.Decision{authorizer.DecisionAllow, authorizer.DecisionNoOpinion, authorizer.DecisionDeny} {
				authz := &answers{decision: decision}
				err := validate(newPlugin(t, secretaccess.PluginName, authz, newObjects().options()), tt.request)
				refused := len(tt.want) > 0 && decision != authorizer.DecisionAllow
				if refused != apierrors.IsForbidden(err) || !refused && err != nil {
					t.Errorf("decision %s: unexpected error %v", decision, err)
				}
				if diff := cmp.Diff(tt.want, authz.asked); diff != "" {
					t.Errorf("asked (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestTargetSecretAccessSaysWhatToDo(t *testing.T) {
	create := request{operation: admission.Create, object: ssh(nil)}
	for name, tt := range map[string]struct {
		authz    answers
		wantCode func(error) bool
		want     []string
	}{
		"a refusal names the user, the Secret and the verb": {
			authz:    answers{decision: authorizer.DecisionNoOpinion, reason: "RBAC: no rule"},
			wantCode: apierrors.IsForbidden,
			want:     []string{`targets.streaming.aaserver.io "web" is forbidden`, `user "jane" may not get secrets "keys" in the namespace "shop"`, "RBAC: no rule", "grant the verb get on it"},
		},
		"an authorizer that fails refuses": {
			authz:    answers{decision: authorizer.DecisionNoOpinion, err: errors.New("no route to host")},
			wantCode: apierrors.IsInternalError,
			want:     []string{`asking whether user "jane" may get secrets "keys" in the namespace "shop": no route to host`},
		},
		"an authorizer that fails refuses, whatever else it says": {
			authz:    answers{decision: authorizer.DecisionAllow, err: errors.New("no route to host")},
			wantCode: apierrors.IsInternalError,
			want:     []string{"no route to host"},
		},
		"a reason is cut": {
			authz:    answers{decision: authorizer.DecisionDeny, reason: strings.Repeat("no ", 10_000)},
			wantCode: apierrors.IsForbidden,
			want:     []string{"…"},
		},
		"an error is cut": {
			authz:    answers{err: errors.New(strings.Repeat("no ", 10_000))},
			wantCode: apierrors.IsInternalError,
			want:     []string{"…"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := validate(newPlugin(t, secretaccess.PluginName, &tt.authz, newObjects().options()), create)
			if !tt.wantCode(err) {
				t.Fatalf("unexpected error %v", err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q doesn't say %q", err, want)
				}
			}
			if len(err.Error()) > 5<<10 {
				t.Errorf("a message of %d bytes", len(err.Error()))
			}
		})
	}
}
