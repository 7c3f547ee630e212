// Package targetclass is the Kubernetes semantics of the resource
// targetclasses: how classes are stored, validated, printed and found.
package targetclass

import (
	"context"

	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/registry/generic"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/policy"
)

// REST is the resource.
type REST struct {
	*genericregistry.Store
	fresh *freshReads
}

var (
	_ rest.StandardStorage    = (*REST)(nil)
	_ rest.ShortNamesProvider = (*REST)(nil)
	_ rest.CategoriesProvider = (*REST)(nil)
)

// NewStorage builds the storage of classes on a generic store.
func NewStorage(scheme *runtime.Scheme, optsGetter generic.RESTOptionsGetter) (*REST, error) {
	strategy := newStrategy(scheme)
	store := &genericregistry.Store{
		NewFunc:                   func() runtime.Object { return &api.TargetClass{} },
		NewListFunc:               func() runtime.Object { return &api.TargetClassList{} },
		DefaultQualifiedResource:  api.Resource("targetclasses"),
		SingularQualifiedResource: api.Resource("targetclass"),
		CreateStrategy:            strategy,
		UpdateStrategy:            strategy,
		DeleteStrategy:            strategy,
		TableConvertor:            tableConvertor{},
	}
	if err := store.CompleteWithOptions(&generic.StoreOptions{RESTOptions: optsGetter}); err != nil {
		return nil, err
	}
	r := &REST{Store: store}
	r.fresh = newFreshReads(r.readClass)
	return r, nil
}

// ShortNames implements rest.ShortNamesProvider.
func (*REST) ShortNames() []string { return []string{"tgtclass"} }

// Categories implements rest.CategoriesProvider.
func (*REST) Categories() []string { return []string{"aaserver"} }

// Class returns the class of a name as it is stored, not as a cache knows it: a
// class that was edited governs what comes next. It is shared: nobody may change
// it.
func (r *REST) Class(ctx context.Context, name string) (*v1.TargetClass, error) {
	return r.fresh.get(ctx, name)
}

func (r *REST) readClass(ctx context.Context, name string) (*v1.TargetClass, error) {
	obj, err := r.Get(ctx, name, &metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return toV1(obj.(*api.TargetClass))
}

// DefaultClass returns the name of the class of targets that name none, "" if
// there is none. A cache tells which it is, a moment late perhaps: a list that has
// to be up to date waits for the cache, with etcd for a tenth of a second.
func (r *REST) DefaultClass(ctx context.Context) (string, error) {
	for _, version := range []string{"0", ""} { // "" is up to date
		list, err := r.List(ctx, &metainternalversion.ListOptions{ResourceVersion: version})
		if err != nil {
			return "", err
		}
		var classes []*v1.TargetClass
		for i := range list.(*api.TargetClassList).Items {
			class, err := toV1(&list.(*api.TargetClassList).Items[i])
			if err != nil {
				return "", err
			}
			classes = append(classes, class)
		}
		if class := policy.DefaultClass(classes); class != nil {
			return class.Name, nil
		}
	}
	return "", nil
}

// toV1 converts a class to the version that everything beyond the registry
// uses. The two share memory: neither is changed afterwards.
func toV1(class *api.TargetClass) (*v1.TargetClass, error) {
	out := &v1.TargetClass{}
	if err := v1.Convert_streaming_TargetClass_To_v1_TargetClass(class, out, nil); err != nil {
		return nil, err
	}
	return out, nil
}
