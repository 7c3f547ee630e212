package admission

import (
	"context"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	genericapiserver "k8s.io/apiserver/pkg/server"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clientscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/record"
	basecompatibility "k8s.io/component-base/compatibility"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission/classpolicy"
	"aaserver.io/aaserver/internal/admission/defaultclass"
	"aaserver.io/aaserver/internal/admission/secretaccess"
)

func TestOrder(t *testing.T) {
	recommended := genericoptions.NewAdmissionOptions().RecommendedPluginOrder
	kept := append([]string(nil), recommended...)
	for name, tt := range map[string]struct {
		recommended, want []string
	}{
		"among the generic server's": {
			recommended: recommended,
			want: []string{
				"NamespaceLifecycle",
				"DefaultTargetClass", "TargetClassPolicy", "TargetSecretAccess",
				"MutatingAdmissionPolicy", "MutatingAdmissionWebhook", "ValidatingAdmissionPolicy", "ValidatingAdmissionWebhook",
				"ResourceQuota",
			},
		},
		"by themselves": {
			want: []string{"DefaultTargetClass", "TargetClassPolicy", "TargetSecretAccess", "ResourceQuota"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Order(tt.recommended)); diff != "" {
				t.Errorf("order (-want +got):\n%s", diff)
			}
		})
	}
	if diff := cmp.Diff(kept, recommended); diff != "" {
		t.Errorf("the generic server's own order was changed (-before +after):\n%s", diff)
	}
}

// options are a server's admission options, with our plugins.
func options() *genericoptions.AdmissionOptions {
	o := genericoptions.NewAdmissionOptions()
	Register(o.Plugins)
	o.RecommendedPluginOrder = Order(o.RecommendedPluginOrder)
	return o
}

// TestEveryPluginHasAPlace lets the generic server compare what is registered
// with what is ordered.
func TestEveryPluginHasAPlace(t *testing.T) {
	for _, err := range options().Validate() {
		t.Error(err)
	}
}

// allowing is an authorizer that allows these verbs alone.
func allowing(verbs ...string) authorizer.Authorizer {
	return authorizer.AuthorizerFunc(func(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
		for _, verb := range verbs {
			if a.GetVerb() == verb {
				return authorizer.DecisionAllow, "", nil
			}
		}
		return authorizer.DecisionNoOpinion, "", nil
	})
}

// apply builds the chain as a server does from its flags. The generic server's
// own plugins are off: they wait for a main API.
func apply(t *testing.T, authz authorizer.Authorizer, opts Options, flags ...string) (admission.Interface, error) {
	t.Helper()
	o := options()
	o.DefaultOffPlugins.Insert(genericoptions.NewAdmissionOptions().RecommendedPluginOrder...)
	o.DefaultOffPlugins.Insert("ResourceQuota")
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	o.AddFlags(set)
	if err := set.Parse(flags); err != nil {
		t.Fatal(err)
	}
	for _, err := range o.Validate() {
		t.Fatal(err)
	}
	config := genericapiserver.NewConfig(serializer.NewCodecFactory(clientscheme.Scheme))
	config.Authorization.Authorizer = authz
	client := fake.NewClientset()
	err := o.ApplyTo(config, informers.NewSharedInformerFactory(client, 0), client, dynamicfake.NewSimpleDynamicClient(clientscheme.Scheme),
		utilfeature.DefaultFeatureGate, basecompatibility.NewEffectiveVersionFromString("1.37", "", ""), NewInitializer(opts))
	return config.AdmissionControl, err
}

// TestFlagsSwitchPlugins proves which plugins run by what they do to one
// target: it names no class, the default one doesn't allow its user, and its
// Secret may not be read.
func TestFlagsSwitchPlugins(t *testing.T) {
	for name, tt := range map[string]struct {
		flags     []string
		wantClass string
		wantErr   []string
	}{
		"all run without flags": {
			wantClass: "standard",
			wantErr:   []string{"spec.ssh.user"},
		},
		"the default isn't filled in, and is judged by all the same": {
			flags:   []string{"--disable-admission-plugins=" + defaultclass.PluginName},
			wantErr: []string{"spec.ssh.user"},
		},
		"the class isn't asked, the Secret is": {
			flags:     []string{"--disable-admission-plugins=" + classpolicy.PluginName},
			wantClass: "standard",
			wantErr:   []string{`secrets "keys"`},
		},
		"the class alone is asked": {
			flags:     []string{"--disable-admission-plugins=" + secretaccess.PluginName},
			wantClass: "standard",
			wantErr:   []string{"spec.ssh.user"},
		},
		"nothing is asked": {
			flags:     []string{"--disable-admission-plugins=" + classpolicy.PluginName + "," + secretaccess.PluginName},
			wantClass: "standard",
		},
		"a plugin is named although it is on": {
			flags:     []string{"--enable-admission-plugins=" + secretaccess.PluginName, "--disable-admission-plugins=" + classpolicy.PluginName},
			wantClass: "standard",
			wantErr:   []string{`secrets "keys"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			objs := newObjects(standard(func(class *v1.TargetClass) {
				defaultOne(class)
				class.Spec.Users = []string{"nobody"}
			}))
			chain, err := apply(t, allowing("use"), objs.options(), tt.flags...)
			if err != nil {
				t.Fatal(err)
			}
			checkCreate(t, chain, tt.wantClass, tt.wantErr)
		})
	}
}

// checkCreate creates a target that names no class.
func checkCreate(t *testing.T, chain admission.Interface, wantClass string, wantErr []string) {
	t.Helper()
	target := ssh(func(target *api.Target) { target.Spec.ClassName = "" })
	create := request{operation: admission.Create, object: target}
	if err := admit(chain, create); err != nil {
		t.Fatal(err)
	}
	if target.Spec.ClassName != wantClass {
		t.Errorf("class %q, want %q", target.Spec.ClassName, wantClass)
	}
	checkRefusal(t, validate(chain, create), wantErr)
}

// TestChainWithoutMainAPI is the same where no main API is.
func TestChainWithoutMainAPI(t *testing.T) {
	for name, tt := range map[string]struct {
		authz   authorizer.Authorizer
		change  func(*v1.TargetClass)
		wantErr []string
	}{
		"who may do everything does": {
			authz: allowing("use", "get"),
		},
		"the class is asked": {
			authz:   allowing("use", "get"),
			change:  func(class *v1.TargetClass) { class.Spec.Users = nil },
			wantErr: []string{"spec.ssh.user"},
		},
		"use of the class is asked": {
			authz:   allowing("get"),
			wantErr: []string{"may not use"},
		},
		"the Secret is asked": {
			authz:   allowing("use"),
			wantErr: []string{`secrets "keys"`},
		},
	} {
		t.Run(name, func(t *testing.T) {
			objs := newObjects(standard(func(class *v1.TargetClass) {
				defaultOne(class)
				if tt.change != nil {
					tt.change(class)
				}
			}))
			chain, err := NewChain(tt.authz, objs.options())
			if err != nil {
				t.Fatal(err)
			}
			checkCreate(t, chain, "standard", tt.wantErr)
		})
	}
}

// TestChainsThatLackSomethingDoNotStart names each plugin that lacks something.
func TestChainsThatLackSomethingDoNotStart(t *testing.T) {
	objs := newObjects()
	lacking := func(take func(*Options)) Options {
		opts := objs.options()
		take(&opts)
		return opts
	}
	for name, tt := range map[string]struct {
		authz authorizer.Authorizer
		opts  Options
		flags []string
		want  []string
	}{
		"nothing is given": {
			want: []string{defaultclass.PluginName, "TargetClasses"},
		},
		"classes": {
			authz: allowing(),
			opts:  lacking(func(opts *Options) { opts.Classes = nil }),
			flags: []string{"--disable-admission-plugins=" + defaultclass.PluginName},
			want:  []string{classpolicy.PluginName, "TargetClasses"},
		},
		"targets": {
			authz: allowing(),
			opts:  lacking(func(opts *Options) { opts.Targets = nil }),
			want:  []string{classpolicy.PluginName, "targets"},
		},
		"service ranges": {
			authz: allowing(),
			opts:  lacking(func(opts *Options) { opts.Services = nil }),
			want:  []string{classpolicy.PluginName, "service ranges"},
		},
		"somewhere to tell of refusals": {
			authz: allowing(),
			opts:  lacking(func(opts *Options) { opts.Recorder = nil }),
			want:  []string{classpolicy.PluginName, "refuses"},
		},
		"an authorizer for the class": {
			opts: objs.options(),
			want: []string{classpolicy.PluginName, "authorizer"},
		},
		"an authorizer for Secrets": {
			opts:  objs.options(),
			flags: []string{"--disable-admission-plugins=" + classpolicy.PluginName},
			want:  []string{secretaccess.PluginName, "authorizer"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := apply(t, tt.authz, tt.opts, tt.flags...)
			if err == nil {
				t.Fatal("it started")
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q doesn't name %s", err, want)
				}
			}
			if len(tt.flags) > 0 {
				return // a chain without a main API has no flags
			}
			if _, err := NewChain(tt.authz, tt.opts); err == nil || !strings.Contains(err.Error(), tt.want[0]) {
				t.Errorf("without a main API: got %v, want an error that names %s", err, tt.want[0])
			}
		})
	}
}

// TestOthersAreLeftAlone gives the plugins nothing that they could read: who
// asks about something else must get through by that.
func TestOthersAreLeftAlone(t *testing.T) {
	chain, err := NewChain(allowing(), Options{Recorder: record.NewFakeRecorder(1), Classes: untouchable{t}, Targets: untouchable{t}, Services: func() ([]netip.Prefix, error) {
		t.Error("the service ranges were read")
		return nil, nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []request{
		{operation: admission.Create, resource: "targetclasses", object: &api.TargetClass{}},
		{operation: admission.Update, resource: "targetclasses", object: &api.TargetClass{}, old: &api.TargetClass{}},
		{operation: admission.Update, subresource: "status", object: process(nil), old: ssh(nil)},
		{operation: admission.Update, subresource: "scale", object: process(nil), old: ssh(nil)},
		{operation: admission.Connect, resource: "agents", subresource: "proxy", object: &v1.TargetExecOptions{}},
		{operation: admission.Delete, old: process(nil)},
	} {
		for what, ask := range map[string]func(admission.Interface, request) error{"admit": admit, "validate": validate} {
			if err := ask(chain, r); err != nil {
				t.Errorf("%s of %s %s/%s: %v", what, r.operation, r.resource, r.subresource, err)
			}
		}
	}
}

type untouchable struct{ t *testing.T }

func (u untouchable) Class(context.Context, string) (*v1.TargetClass, error) {
	u.t.Error("a class was read")
	return nil, nil
}

func (u untouchable) DefaultClass(context.Context) (string, error) {
	u.t.Error("the default class was read")
	return "", nil
}

func (u untouchable) Target(context.Context, string, string) (*v1.Target, error) {
	u.t.Error("a target was read")
	return nil, nil
}
