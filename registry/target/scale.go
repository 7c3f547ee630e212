package target

import (
	"context"
	"fmt"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/endpoints/request"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
)

// replicasPaths says where each served version has the replicas, so that their
// owner is known when they are changed through scale.
var replicasPaths = managedfields.ResourcePathMappings{
	v1.SchemeGroupVersion.String():       fieldpath.MakePathOrDie("spec", "replicas"),
	v1alpha1.SchemeGroupVersion.String(): fieldpath.MakePathOrDie("spec", "replicas"),
}

// ScaleREST is the scale subresource. It is a Patcher and no more: a lister
// beside it would add a list action on the same path.
type ScaleREST struct {
	store *genericregistry.Store
}

var (
	_ rest.Patcher                  = (*ScaleREST)(nil)
	_ rest.GroupVersionKindProvider = (*ScaleREST)(nil)
	_ rest.TableConvertor           = (*ScaleREST)(nil)
)

// GroupVersionKind implements rest.GroupVersionKindProvider.
func (*ScaleREST) GroupVersionKind(schema.GroupVersion) schema.GroupVersionKind {
	return autoscalingv1.SchemeGroupVersion.WithKind("Scale")
}

// New implements rest.Storage.
func (*ScaleREST) New() runtime.Object { return &autoscalingv1.Scale{} }

// Destroy implements rest.Storage. The store is the main resource's.
func (*ScaleREST) Destroy() {}

// Get implements rest.Getter.
func (r *ScaleREST) Get(ctx context.Context, name string, options *metav1.GetOptions) (runtime.Object, error) {
	obj, err := r.store.Get(ctx, name, options)
	if err != nil {
		return nil, err
	}
	return scaleOf(obj.(*api.Target)), nil
}

// Update implements rest.Updater.
func (r *ScaleREST) Update(ctx context.Context, name string, objInfo rest.UpdatedObjectInfo, createValidation rest.ValidateObjectFunc, updateValidation rest.ValidateObjectUpdateFunc, _ bool, options *metav1.UpdateOptions) (runtime.Object, bool, error) {
	obj, _, err := r.store.Update(ctx, name,
		&scaledTarget{name: name, scale: objInfo},
		scaleCreateValidation(createValidation),
		scaleUpdateValidation(updateValidation),
		false, options)
	if err != nil {
		return nil, false, err
	}
	return scaleOf(obj.(*api.Target)), false, nil
}

// ConvertToTable implements rest.TableConvertor.
func (r *ScaleREST) ConvertToTable(ctx context.Context, object, tableOptions runtime.Object) (*metav1.Table, error) {
	return rest.NewDefaultTableConvertor(autoscalingv1.Resource("scales")).ConvertToTable(ctx, object, tableOptions)
}

// scaledTarget applies an update of the scale to its target.
type scaledTarget struct {
	name  string
	scale rest.UpdatedObjectInfo
}

// Preconditions implements rest.UpdatedObjectInfo.
func (s *scaledTarget) Preconditions() *metav1.Preconditions { return s.scale.Preconditions() }

// UpdatedObject implements rest.UpdatedObjectInfo.
func (s *scaledTarget) UpdatedObject(ctx context.Context, old runtime.Object) (runtime.Object, error) {
	target := old.(*api.Target).DeepCopy()
	handler := managedfields.NewScaleHandler(target.ManagedFields, versionOf(ctx), replicasPaths)

	oldScale := scaleOf(target)
	var err error
	if oldScale.ManagedFields, err = handler.ToSubresource(); err != nil {
		return nil, err
	}
	obj, err := s.scale.UpdatedObject(ctx, oldScale)
	if err != nil {
		return nil, err
	}
	scale, ok := obj.(*autoscalingv1.Scale)
	if !ok {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("expected a Scale, got a %T", obj))
	}
	if errs := validateScale(scale, oldScale, target); len(errs) > 0 {
		return nil, apierrors.NewInvalid(autoscalingv1.SchemeGroupVersion.WithKind("Scale").GroupKind(), s.name, errs)
	}

	if scale.ResourceVersion != "" {
		target.ResourceVersion = scale.ResourceVersion
	}
	if hosted(target) {
		target.Spec.Replicas = ptr.To(scale.Spec.Replicas)
	}
	if target.ManagedFields, err = handler.ToParent(scale.ManagedFields); err != nil {
		return nil, err
	}
	return target, nil
}

// versionOf returns the version that a request is in: the owner of the replicas
// is recorded with it.
func versionOf(ctx context.Context) schema.GroupVersion {
	if info, ok := request.RequestInfoFrom(ctx); ok {
		version := schema.GroupVersion{Group: info.APIGroup, Version: info.APIVersion}
		if _, served := replicasPaths[version.String()]; served {
			return version
		}
	}
	return v1.SchemeGroupVersion
}

func validateScale(scale, old *autoscalingv1.Scale, target *api.Target) field.ErrorList {
	var errs field.ErrorList
	path := field.NewPath("spec", "replicas")
	if scale.Name != old.Name {
		errs = append(errs, field.Invalid(field.NewPath("metadata", "name"), scale.Name, "must be the target's name"))
	}
	if scale.UID != "" && scale.UID != old.UID {
		errs = append(errs, field.Invalid(field.NewPath("metadata", "uid"), scale.UID, "must be the target's uid, "+string(old.UID)))
	}
	switch {
	case !hosted(target) && scale.Spec.Replicas != old.Spec.Replicas:
		errs = append(errs, field.Invalid(path, scale.Spec.Replicas,
			fmt.Sprintf("a target of source %s has an instance for each endpoint: add or remove endpoints in its spec instead", sourceOf(target))))
	case scale.Spec.Replicas < 0 || scale.Spec.Replicas > v1.MaxInstances:
		errs = append(errs, field.Invalid(path, scale.Spec.Replicas, fmt.Sprintf("must be between 0 and %d", v1.MaxInstances)))
	}
	return errs
}

func scaleOf(target *api.Target) *autoscalingv1.Scale {
	return &autoscalingv1.Scale{
		ObjectMeta: metav1.ObjectMeta{
			Name:              target.Name,
			Namespace:         target.Namespace,
			UID:               target.UID,
			ResourceVersion:   target.ResourceVersion,
			CreationTimestamp: target.CreationTimestamp,
		},
		Spec: autoscalingv1.ScaleSpec{Replicas: int32(wanted(target))},
		Status: autoscalingv1.ScaleStatus{
			Replicas: target.Status.Replicas,
			Selector: labels.Set{v1.LabelTarget: target.Name}.String(),
		},
	}
}

// scaleCreateValidation and scaleUpdateValidation show admission the Scale that
// the client sent, rather than the target that it changes.

func scaleCreateValidation(validate rest.ValidateObjectFunc) rest.ValidateObjectFunc {
	return func(ctx context.Context, obj runtime.Object) error {
		return validate(ctx, scaleOf(obj.(*api.Target)))
	}
}

func scaleUpdateValidation(validate rest.ValidateObjectUpdateFunc) rest.ValidateObjectUpdateFunc {
	return func(ctx context.Context, obj, old runtime.Object) error {
		return validate(ctx, scaleOf(obj.(*api.Target)), scaleOf(old.(*api.Target)))
	}
}
