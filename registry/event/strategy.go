package event

import (
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apivalidation "k8s.io/apimachinery/pkg/api/validation"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage/names"
)

// The most bytes that texts may have. kube-apiserver has the limits of message
// and of what is a word for events with an eventTime; here they are for all.
const (
	maxMessage = 1024
	maxWord    = 128
	maxPath    = 1024
)

// strategy is how events are created, updated and deleted.
type strategy struct {
	runtime.ObjectTyper
	names.NameGenerator
}

var (
	_ rest.RESTCreateStrategy              = strategy{}
	_ rest.RESTUpdateStrategy              = strategy{}
	_ rest.RESTDeleteStrategy              = strategy{}
	_ rest.GarbageCollectionDeleteStrategy = strategy{}
)

func newStrategy(typer runtime.ObjectTyper) strategy {
	return strategy{typer, names.SimpleNameGenerator}
}

func (strategy) NamespaceScoped() bool { return true }

func (strategy) PrepareForCreate(context.Context, runtime.Object) {}

func (strategy) Validate(_ context.Context, obj runtime.Object) field.ErrorList {
	event := obj.(*corev1.Event)
	errs := validateEvent(event)
	for _, message := range apivalidation.NameIsDNSSubdomain(event.Name, false) {
		errs = append(errs, field.Invalid(field.NewPath("metadata", "name"), event.Name, message))
	}
	return errs
}

func (strategy) WarningsOnCreate(context.Context, runtime.Object) []string { return nil }

func (strategy) Canonicalize(runtime.Object) {}

// AllowCreateOnUpdate lets who reports an event again write it without knowing
// whether it has expired.
func (strategy) AllowCreateOnUpdate(context.Context) bool { return true }

func (strategy) AllowUnconditionalUpdate(context.Context) bool { return true }

func (strategy) PrepareForUpdate(context.Context, runtime.Object, runtime.Object) {}

func (strategy) ValidateUpdate(_ context.Context, obj, _ runtime.Object) field.ErrorList {
	return validateEvent(obj.(*corev1.Event))
}

func (strategy) WarningsOnUpdate(context.Context, runtime.Object, runtime.Object) []string {
	return nil
}

// DefaultGarbageCollectionPolicy implements rest.GarbageCollectionDeleteStrategy:
// events expire.
func (strategy) DefaultGarbageCollectionPolicy(context.Context) rest.GarbageCollectionPolicy {
	return rest.Unsupported
}

func validateEvent(event *corev1.Event) field.ErrorList {
	errs := validateNamespaces(event)
	// Only reporters of the newer kind, which set eventTime, can be expected to
	// say who they are.
	if !event.EventTime.IsZero() {
		for _, needed := range []struct{ name, value string }{
			{"action", event.Action},
			{"reason", event.Reason},
			{"reportingComponent", event.ReportingController},
			{"reportingInstance", event.ReportingInstance},
		} {
			if needed.value == "" {
				errs = append(errs, field.Required(field.NewPath(needed.name), "an event with an eventTime needs it"))
			}
		}
		if event.ReportingController != "" {
			for _, message := range validation.IsQualifiedName(event.ReportingController) {
				errs = append(errs, field.Invalid(field.NewPath("reportingComponent"), event.ReportingController, message))
			}
		}
	}

	short := func(path *field.Path, value string, most int) {
		if len(value) > most {
			errs = append(errs, field.TooLong(path, value, most))
		}
	}
	short(field.NewPath("message"), event.Message, maxMessage)
	short(field.NewPath("reason"), event.Reason, maxWord)
	short(field.NewPath("action"), event.Action, maxWord)
	short(field.NewPath("type"), event.Type, maxWord)
	short(field.NewPath("reportingInstance"), event.ReportingInstance, maxWord)
	// A prefix and a name.
	short(field.NewPath("reportingComponent"), event.ReportingController, 2*validation.DNS1123SubdomainMaxLength)
	short(field.NewPath("source", "component"), event.Source.Component, 2*validation.DNS1123SubdomainMaxLength)
	short(field.NewPath("source", "host"), event.Source.Host, validation.DNS1123SubdomainMaxLength)
	validateReference := func(path *field.Path, object *corev1.ObjectReference) {
		short(path.Child("kind"), object.Kind, maxWord)
		short(path.Child("namespace"), object.Namespace, validation.DNS1123LabelMaxLength)
		short(path.Child("name"), object.Name, validation.DNS1123SubdomainMaxLength)
		short(path.Child("uid"), string(object.UID), maxWord)
		short(path.Child("apiVersion"), object.APIVersion, 2*validation.DNS1123SubdomainMaxLength)
		short(path.Child("resourceVersion"), object.ResourceVersion, maxWord)
		short(path.Child("fieldPath"), object.FieldPath, maxPath)
	}
	validateReference(field.NewPath("involvedObject"), &event.InvolvedObject)
	if event.Related != nil {
		validateReference(field.NewPath("related"), event.Related)
	}
	return errs
}

// validateNamespaces checks that an event is in the namespace of what it is
// about. Events about what is in no namespace are in one that everybody has.
func validateNamespaces(event *corev1.Event) field.ErrorList {
	path := field.NewPath("involvedObject", "namespace")
	switch namespace := event.InvolvedObject.Namespace; {
	case namespace == event.Namespace:
		return nil
	case namespace != "":
		return field.ErrorList{field.Invalid(path, namespace, "must be the event's namespace, "+event.Namespace)}
	}
	if homes := []string{metav1.NamespaceDefault, metav1.NamespaceSystem}; !slices.Contains(homes, event.Namespace) {
		return field.ErrorList{field.Required(path, "an event about what is in no namespace must be in default or kube-system")}
	}
	return nil
}
