// Package admission is the admission plugins that aaserver adds to the generic
// server's own, and what they are initialised with.
package admission

import (
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/admission/plugin/resourcequota"
	quota "k8s.io/apiserver/pkg/quota/v1"
	"k8s.io/apiserver/pkg/quota/v1/generic"
)

// Register adds the plugins.
func Register(plugins *admission.Plugins) {
	resourcequota.Register(plugins)
}

// Order is the order of the plugins behind those of the generic server: quota
// is last, so that nothing is charged for what another plugin refuses.
func Order() []string {
	return []string{resourcequota.PluginName}
}

// NewInitializer returns what gives the plugins what they want beyond clients
// and informers.
func NewInitializer() admission.PluginInitializer {
	return quotaInitializer{}
}

// quotaInitializer lets ResourceQuota count objects of every resource that is
// served, as count/<resource>.<group>. The plugin makes the counters by itself.
type quotaInitializer struct{}

func (quotaInitializer) Initialize(plugin admission.Interface) {
	if wants, ok := plugin.(initializer.WantsQuotaConfiguration); ok {
		wants.SetQuotaConfiguration(generic.NewConfiguration([]quota.Evaluator{}, map[schema.GroupResource]struct{}{}))
	}
}
