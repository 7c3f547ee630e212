package targetclass

import (
	"context"
	"fmt"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage/names"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
)

// strategy is how classes are created, updated and deleted. They are validated
// by the tags of the version that the request is in, and by hand.
type strategy struct {
	rest.DeclarativeValidation
	names.NameGenerator
}

var (
	_ rest.RESTCreateStrategy = strategy{}
	_ rest.RESTUpdateStrategy = strategy{}
	_ rest.RESTDeleteStrategy = strategy{}

	_ rest.DeclarativeValidationStrategy = strategy{}
)

func newStrategy(scheme *runtime.Scheme) strategy {
	return strategy{rest.DeclarativeValidation{Scheme: scheme}, names.SimpleNameGenerator}
}

func (strategy) NamespaceScoped() bool { return false }

func (strategy) PrepareForCreate(_ context.Context, obj runtime.Object) {
	obj.(*api.TargetClass).Generation = 1
}

func (strategy) Validate(_ context.Context, obj runtime.Object) field.ErrorList {
	return validation.ValidateTargetClass(obj.(*api.TargetClass))
}

func (strategy) WarningsOnCreate(_ context.Context, obj runtime.Object) []string {
	return warnings(obj.(*api.TargetClass))
}

// warnings tells of an annotation that looks as if it made a class the default.
func warnings(class *api.TargetClass) []string {
	switch value := class.Annotations[v1.AnnotationDefaultClass]; value {
	case "", "true", "false":
		return nil
	default:
		return []string{fmt.Sprintf("metadata.annotations[%s]: only \"true\" makes the class the default", v1.AnnotationDefaultClass)}
	}
}

func (strategy) Canonicalize(runtime.Object) {}

func (strategy) AllowCreateOnUpdate(context.Context) bool { return false }

func (strategy) AllowUnconditionalUpdate(context.Context) bool { return true }

func (strategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	class, oldClass := obj.(*api.TargetClass), old.(*api.TargetClass)
	if !apiequality.Semantic.DeepEqual(class.Spec, oldClass.Spec) {
		class.Generation = oldClass.Generation + 1
	}
}

func (strategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	return validation.ValidateTargetClassUpdate(obj.(*api.TargetClass), old.(*api.TargetClass))
}

func (strategy) WarningsOnUpdate(_ context.Context, obj, _ runtime.Object) []string {
	return warnings(obj.(*api.TargetClass))
}
