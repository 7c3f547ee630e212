// Package admission is the admission plugins that aaserver adds to the generic
// server's own, and what they are initialised with.
//
//	DefaultTargetClass  fills in the class of new targets that name none
//	TargetClassPolicy   holds targets, and connections to them, to their class
//	TargetSecretAccess  demands that Secrets may be read by whoever uses them
//	ResourceQuota       is the generic server's, which doesn't register it
package admission

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	admissionmetrics "k8s.io/apiserver/pkg/admission/metrics"
	"k8s.io/apiserver/pkg/admission/plugin/namespace/lifecycle"
	"k8s.io/apiserver/pkg/admission/plugin/resourcequota"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	quota "k8s.io/apiserver/pkg/quota/v1"
	"k8s.io/apiserver/pkg/quota/v1/generic"
	"k8s.io/client-go/tools/record"

	"aaserver.io/aaserver/internal/admission/classpolicy"
	"aaserver.io/aaserver/internal/admission/defaultclass"
	"aaserver.io/aaserver/internal/admission/plugin"
	"aaserver.io/aaserver/internal/admission/secretaccess"
	"aaserver.io/aaserver/internal/policy"
)

// Register adds the plugins.
func Register(plugins *admission.Plugins) {
	defaultclass.Register(plugins)
	classpolicy.Register(plugins)
	secretaccess.Register(plugins)
	resourcequota.Register(plugins)
}

// targetPlugins are the plugins of targets, in their order: a default is filled
// in before it is judged.
var targetPlugins = []string{defaultclass.PluginName, classpolicy.PluginName, secretaccess.PluginName}

// Order puts the plugins among those of the generic server.
//
// Those of targets come right after the one that looks at namespaces: webhooks
// and policies then see the class that is filled in, and aren't bothered with
// what is refused anyway. What they change is judged all the same, since
// everything is validated after everything has been changed. Quota is last, so
// that nothing is charged for what another plugin refuses.
func Order(recommended []string) []string {
	first := slices.Index(recommended, lifecycle.PluginName) + 1
	return append(slices.Insert(slices.Clone(recommended), first, targetPlugins...), resourcequota.PluginName)
}

// Options is what the plugins want beyond clients, informers and an authorizer.
type Options struct {
	// Classes and Targets find what is judged, as it is stored now.
	Classes policy.Classes
	Targets plugin.Targets
	// Recorder takes Events.
	Recorder record.EventRecorder
	// Services finds the cluster's service ranges. It fails while they aren't
	// known.
	Services func() ([]netip.Prefix, error)
}

// NewInitializer returns what gives the plugins what they want of Options.
func NewInitializer(opts Options) admission.PluginInitializer {
	return admission.PluginInitializers{targetInitializer{opts}, quotaInitializer{}}
}

// NewChain returns the plugins of targets alone, for a server without a main
// API: all others need one.
func NewChain(authz authorizer.Authorizer, opts Options) (admission.Interface, error) {
	plugins := admission.NewPlugins()
	Register(plugins)
	config, err := admission.ReadAdmissionConfiguration(targetPlugins, "", nil)
	if err != nil {
		return nil, err
	}
	// Of what the generic initializer has to give, the plugins of targets want
	// the authorizer alone.
	initializers := admission.PluginInitializers{
		initializer.New(nil, nil, nil, authz, nil, nil, nil, nil),
		targetInitializer{opts},
	}
	chain, err := plugins.NewFromPlugins(targetPlugins, config, initializers, admission.DecoratorFunc(admissionmetrics.WithControllerMetrics))
	if err != nil {
		return nil, err
	}
	return admissionmetrics.WithStepMetrics(chain), nil
}

// targetInitializer gives the plugins of targets what they read.
type targetInitializer struct {
	opts Options
}

func (i targetInitializer) Initialize(p admission.Interface) {
	if wants, ok := p.(plugin.WantsClasses); ok {
		wants.SetClasses(i.opts.Classes)
	}
	if wants, ok := p.(plugin.WantsTargets); ok {
		wants.SetTargets(i.opts.Targets)
	}
	if wants, ok := p.(plugin.WantsRecorder); ok {
		wants.SetRecorder(i.opts.Recorder)
	}
	if wants, ok := p.(plugin.WantsServices); ok {
		wants.SetServices(i.opts.Services)
	}
}

// quotaInitializer lets ResourceQuota count objects of every resource that is
// served, as count/<resource>.<group>. The plugin makes the counters by itself.
type quotaInitializer struct{}

func (quotaInitializer) Initialize(plugin admission.Interface) {
	if wants, ok := plugin.(initializer.WantsQuotaConfiguration); ok {
		wants.SetQuotaConfiguration(generic.NewConfiguration([]quota.Evaluator{}, map[schema.GroupResource]struct{}{}))
	}
}
