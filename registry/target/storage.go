// Package target is the Kubernetes semantics of the resource targets: how they
// are stored, defaulted, validated and printed, and what its subresources do.
//
// It is where the API meets the drivers: a connect subresource decodes and
// checks its options, finds the target, its class and the instance, opens it
// through its driver, and only then hands the connection to the wire protocols
// of package streaming.
package target

import (
	"context"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/generic"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	apistorage "k8s.io/apiserver/pkg/storage"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/policy"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

// StoreOptions says which targets are kept.
type StoreOptions struct {
	// DefaultAgent is filled in as spec.agentName of hosted targets that name
	// none; "" leaves it to the user.
	DefaultAgent string
	// Sources are the sources that targets of this server may have.
	Sources sets.Set[string]
	// Agents are the only agents that targets may name; nil allows any.
	Agents sets.Set[string]
}

// Store keeps targets.
type Store struct {
	*genericregistry.Store
	strategy strategy
}

// Target returns a target as it is stored, in the version that everything
// beyond the registry uses.
func (s *Store) Target(ctx context.Context, namespace, name string) (*v1.Target, error) {
	obj, err := s.Get(request.WithNamespace(ctx, namespace), name, &metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return toV1(obj.(*api.Target))
}

// Options is what the REST surface of targets needs beside their store.
type Options struct {
	// Drivers finds the driver of a target. Its errors are a driver's.
	Drivers func(*v1.Target) (driver.Driver, error)
	// Classes finds the classes of targets.
	Classes policy.Classes
	// Unjudged says that connections aren't judged by the source, the agent, the
	// user and the endpoints of their target, as they aren't where the admission
	// plugin TargetClassPolicy is off: then the streams of a session aren't, too.
	Unjudged bool
	// Limits bound sessions where a target's class doesn't say.
	Limits policy.Limits
	// Dial is what drivers of hosted sources reach their instances with. The
	// endpoints of others are dialled as the class allows.
	Dial driver.DialFunc
	// ServiceRanges are the cluster's, where targets have no endpoints unless
	// their class opens them. It fails while they aren't known.
	ServiceRanges func() ([]netip.Prefix, error)
	// Secrets reads a Secret as it is now, for a connection that needs it.
	Secrets func(ctx context.Context, namespace, name string) (*corev1.Secret, error)
	// Recorder takes Events about targets.
	Recorder record.EventRecorder
	// Sessions knows who is connected.
	Sessions *session.Manager
	// Streaming bounds upgraded connections.
	Streaming streaming.Options
}

// Storage is the REST surface of targets.
type Storage struct {
	Target      *REST
	Status      *StatusREST
	Scale       *ScaleREST
	Log         *LogREST
	Exec        *ExecREST
	Attach      *AttachREST
	PortForward *PortForwardREST
}

// NewStore opens the store of targets.
func NewStore(scheme *runtime.Scheme, optsGetter generic.RESTOptionsGetter, opts StoreOptions) (*Store, error) {
	strategy := newStrategy(scheme, opts)
	store := &genericregistry.Store{
		NewFunc:                   func() runtime.Object { return &api.Target{} },
		NewListFunc:               func() runtime.Object { return &api.TargetList{} },
		PredicateFunc:             matchTarget,
		DefaultQualifiedResource:  api.Resource("targets"),
		SingularQualifiedResource: api.Resource("target"),
		CreateStrategy:            strategy,
		UpdateStrategy:            strategy,
		DeleteStrategy:            strategy,
		ResetFieldsStrategy:       strategy,
		TableConvertor:            tableConvertor{},
	}
	// An agent watches its own targets only: with thousands of agents, the
	// watch cache must find the watchers of an event without asking each.
	err := store.CompleteWithOptions(&generic.StoreOptions{
		RESTOptions: optsGetter,
		AttrFunc:    getAttrs,
		TriggerFunc: apistorage.IndexerFuncs{"spec.agentName": agentNameOf},
		Indexers: &cache.Indexers{apistorage.FieldIndex("spec.agentName"): func(obj any) ([]string, error) {
			return []string{agentNameOf(obj.(runtime.Object))}, nil
		}},
	})
	if err != nil {
		return nil, err
	}
	return &Store{store, strategy}, nil
}

// NewStorage builds the REST surface of targets on their store.
func NewStorage(store *Store, opts Options) *Storage {
	statusStore := *store.Store
	statusStrategy := statusStrategy{store.strategy}
	statusStore.UpdateStrategy = statusStrategy
	statusStore.ResetFieldsStrategy = statusStrategy

	connector := &connector{targets: store, opts: opts}
	return &Storage{
		Target:      &REST{Store: store.Store},
		Status:      &StatusREST{store: &statusStore},
		Scale:       &ScaleREST{store: store.Store},
		Log:         &LogREST{connector: connector, watch: store.Watch},
		Exec:        &ExecREST{connector},
		Attach:      &AttachREST{connector},
		PortForward: &PortForwardREST{connector},
	}
}

// Map returns the storage by the names under which it is installed. logs and
// port-forward are second names, there for discovery: requests for them are
// rewritten before they get here.
func (s *Storage) Map() map[string]rest.Storage {
	return map[string]rest.Storage{
		"targets":              s.Target,
		"targets/status":       s.Status,
		"targets/scale":        s.Scale,
		"targets/log":          s.Log,
		"targets/logs":         s.Log,
		"targets/exec":         s.Exec,
		"targets/attach":       s.Attach,
		"targets/portforward":  s.PortForward,
		"targets/port-forward": s.PortForward,
	}
}

// REST is the main resource.
type REST struct {
	*genericregistry.Store
}

var (
	_ rest.StandardStorage    = (*REST)(nil)
	_ rest.ShortNamesProvider = (*REST)(nil)
	_ rest.CategoriesProvider = (*REST)(nil)
)

// ShortNames implements rest.ShortNamesProvider.
func (*REST) ShortNames() []string { return []string{"tgt"} }

// Categories implements rest.CategoriesProvider. The category all is left
// alone: an aggregated server that is down would break everybody's `kubectl
// get all`.
func (*REST) Categories() []string { return []string{"aaserver"} }

// StatusREST is the status subresource.
type StatusREST struct {
	store *genericregistry.Store
}

var (
	_ rest.Patcher             = (*StatusREST)(nil)
	_ rest.ResetFieldsStrategy = (*StatusREST)(nil)
	_ rest.TableConvertor      = (*StatusREST)(nil)
)

// New implements rest.Storage.
func (*StatusREST) New() runtime.Object { return &api.Target{} }

// Destroy implements rest.Storage. The store is the main resource's.
func (*StatusREST) Destroy() {}

// Get implements rest.Getter.
func (r *StatusREST) Get(ctx context.Context, name string, options *metav1.GetOptions) (runtime.Object, error) {
	return r.store.Get(ctx, name, options)
}

// Update implements rest.Updater.
func (r *StatusREST) Update(ctx context.Context, name string, objInfo rest.UpdatedObjectInfo, createValidation rest.ValidateObjectFunc, updateValidation rest.ValidateObjectUpdateFunc, _ bool, options *metav1.UpdateOptions) (runtime.Object, bool, error) {
	// The status of what doesn't exist can't be written.
	return r.store.Update(ctx, name, objInfo, createValidation, updateValidation, false, options)
}

// GetResetFields implements rest.ResetFieldsStrategy.
func (r *StatusREST) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	return r.store.GetResetFields()
}

// ConvertToTable implements rest.TableConvertor.
func (r *StatusREST) ConvertToTable(ctx context.Context, object runtime.Object, options runtime.Object) (*metav1.Table, error) {
	return r.store.ConvertToTable(ctx, object, options)
}

func getAttrs(obj runtime.Object) (labels.Set, fields.Set, error) {
	target := obj.(*api.Target)
	set := generic.AddObjectMetaFieldsSet(make(fields.Set, 3), &target.ObjectMeta, true)
	set["spec.agentName"] = target.Spec.AgentName
	return target.Labels, set, nil
}

func matchTarget(label labels.Selector, field fields.Selector) apistorage.SelectionPredicate {
	return apistorage.SelectionPredicate{
		Label:       label,
		Field:       field,
		GetAttrs:    getAttrs,
		IndexFields: []string{"spec.agentName"},
	}
}

func agentNameOf(obj runtime.Object) string {
	return obj.(*api.Target).Spec.AgentName
}
