package target

import (
	"context"
	"fmt"
	"slices"

	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage/names"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
	"aaserver.io/aaserver/apis/streaming/validation"
)

// strategy is how the main resource is created, updated and deleted.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
	defaultAgent string
	sources      sets.Set[string]
	agents       sets.Set[string]
}

var (
	_ rest.RESTCreateStrategy  = strategy{}
	_ rest.RESTUpdateStrategy  = strategy{}
	_ rest.ResetFieldsStrategy = strategy{}

	_ rest.RESTGracefulDeleteStrategy = strategy{}
)

func newStrategy(typer runtime.ObjectTyper, opts StoreOptions) strategy {
	return strategy{typer, names.SimpleNameGenerator, opts.DefaultAgent, opts.Sources, opts.Agents}
}

func (strategy) NamespaceScoped() bool { return true }

// PrepareForCreate drops a status that the client sent. A hosted target's says
// that its agent hasn't seen it yet, until it has.
func (s strategy) PrepareForCreate(_ context.Context, obj runtime.Object) {
	target := obj.(*api.Target)
	target.Status = api.TargetStatus{}
	target.Generation = 1
	if !hosted(target) {
		return
	}
	if target.Spec.AgentName == "" {
		target.Spec.AgentName = s.defaultAgent
	}
	for _, condition := range []string{v1.ConditionReady, v1.ConditionAgentConnected} {
		meta.SetStatusCondition(&target.Status.Conditions, metav1.Condition{
			Type:               condition,
			Status:             metav1.ConditionUnknown,
			Reason:             "AgentNotSeen",
			Message:            fmt.Sprintf("agent %s has not taken the target up yet", target.Spec.AgentName),
			ObservedGeneration: target.Generation,
		})
	}
}

func (s strategy) Validate(_ context.Context, obj runtime.Object) field.ErrorList {
	target := obj.(*api.Target)
	errs := validation.ValidateTarget(target)
	if source := sourceOf(target); source != "" && !s.sources.Has(source) {
		errs = append(errs, field.NotSupported(field.NewPath("spec"), source, sets.List(s.sources)))
	}
	if name := target.Spec.AgentName; name != "" && s.agents != nil && !s.agents.Has(name) {
		errs = append(errs, field.NotSupported(field.NewPath("spec", "agentName"), name, sets.List(s.agents)))
	}
	return errs
}

func (strategy) WarningsOnCreate(context.Context, runtime.Object) []string { return nil }

func (strategy) Canonicalize(runtime.Object) {}

func (strategy) AllowCreateOnUpdate(context.Context) bool { return false }

func (strategy) AllowUnconditionalUpdate(context.Context) bool { return true }

// PrepareForUpdate leaves the status to its subresource, and counts changes of
// the spec.
func (s strategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	target, oldTarget := obj.(*api.Target), old.(*api.Target)
	target.Status = oldTarget.Status
	// What was filled in at creation isn't taken away by a client that applies
	// its own manifest again.
	if target.Spec.ClassName == "" {
		target.Spec.ClassName = oldTarget.Spec.ClassName
	}
	if target.Spec.AgentName == "" {
		target.Spec.AgentName = oldTarget.Spec.AgentName
	}
	if !apiequality.Semantic.DeepEqual(target.Spec, oldTarget.Spec) {
		target.Generation = oldTarget.Generation + 1
	}
}

func (strategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	return validation.ValidateTargetUpdate(obj.(*api.Target), old.(*api.Target))
}

func (strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}

// CheckGracefulDelete implements rest.RESTGracefulDeleteStrategy: the instances
// of a hosted target that its agent has taken up get the grace period of its
// spec, unless the request says otherwise. The agent reads it from the target.
func (strategy) CheckGracefulDelete(_ context.Context, obj runtime.Object, options *metav1.DeleteOptions) bool {
	target := obj.(*api.Target)
	if !hosted(target) || !slices.Contains(target.Finalizers, v1.FinalizerInstances) {
		return false
	}
	if options.GracePeriodSeconds == nil {
		options.GracePeriodSeconds = target.Spec.TerminationGracePeriodSeconds
	}
	return options.GracePeriodSeconds != nil
}

// GetResetFields implements rest.ResetFieldsStrategy: nobody comes to own the
// status by applying the main resource.
func (strategy) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	return inEveryVersion(fieldpath.NewSet(fieldpath.MakePathOrDie("status")))
}

// statusStrategy is how the status subresource is updated.
type statusStrategy struct {
	strategy
}

// PrepareForUpdate lets through the status alone. Of the metadata, managed
// fields are kept up with it.
func (statusStrategy) PrepareForUpdate(_ context.Context, obj, old runtime.Object) {
	target, oldTarget := obj.(*api.Target), old.(*api.Target)
	target.Spec = oldTarget.Spec
	metav1.ResetObjectMetaForStatus(&target.ObjectMeta, &oldTarget.ObjectMeta)
}

func (statusStrategy) ValidateUpdate(_ context.Context, obj, old runtime.Object) field.ErrorList {
	return validation.ValidateTargetStatusUpdate(obj.(*api.Target), old.(*api.Target))
}

// GetResetFields implements rest.ResetFieldsStrategy.
func (statusStrategy) GetResetFields() map[fieldpath.APIVersion]*fieldpath.Set {
	return inEveryVersion(fieldpath.NewSet(
		fieldpath.MakePathOrDie("spec"),
		fieldpath.MakePathOrDie("metadata", "labels"),
		fieldpath.MakePathOrDie("metadata", "annotations"),
		fieldpath.MakePathOrDie("metadata", "finalizers"),
		fieldpath.MakePathOrDie("metadata", "ownerReferences"),
	))
}

// inEveryVersion is a set of fields that the served versions have at the same
// paths.
func inEveryVersion(fields *fieldpath.Set) map[fieldpath.APIVersion]*fieldpath.Set {
	return map[fieldpath.APIVersion]*fieldpath.Set{
		fieldpath.APIVersion(v1.SchemeGroupVersion.String()):       fields,
		fieldpath.APIVersion(v1alpha1.SchemeGroupVersion.String()): fields,
	}
}

// toV1 converts a target to the version that everything beyond the registry
// uses. The two share memory: neither is changed afterwards.
func toV1(target *api.Target) (*v1.Target, error) {
	out := &v1.Target{}
	if err := v1.Convert_streaming_Target_To_v1_Target(target, out, nil); err != nil {
		return nil, err
	}
	return out, nil
}

func hosted(target *api.Target) bool {
	return target.Spec.Process != nil || target.Spec.Container != nil
}

func sourceOf(target *api.Target) string {
	switch spec := &target.Spec; {
	case spec.Process != nil:
		return v1.SourceProcess
	case spec.Container != nil:
		return v1.SourceContainer
	case spec.SSH != nil:
		return v1.SourceSSH
	case spec.TCP != nil:
		return v1.SourceTCP
	}
	return ""
}
