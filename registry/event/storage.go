// Package event keeps Events, core/v1 of Kubernetes, where there is no cluster
// to keep them: `kubectl describe` and `kubectl get events` ask for them.
//
// That the core group is served at all has another use: kubectl knows the kind
// List, in which it prints several objects, by the group being in discovery.
package event

import (
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/registry/generic"
	genericregistry "k8s.io/apiserver/pkg/registry/generic/registry"
	"k8s.io/apiserver/pkg/registry/rest"
	apistorage "k8s.io/apiserver/pkg/storage"
)

// DefaultTTL is how long an event is kept after it was last written, as by
// kube-apiserver.
const DefaultTTL = time.Hour

// Install registers the kinds that are served. There are no conversions: the
// types are their own hub.
func Install(scheme *runtime.Scheme) error {
	hub := schema.GroupVersion{Group: corev1.GroupName, Version: runtime.APIVersionInternal}
	for _, gv := range []schema.GroupVersion{hub, corev1.SchemeGroupVersion} {
		scheme.AddKnownTypes(gv, &corev1.Event{}, &corev1.EventList{})
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	if err := scheme.AddFieldLabelConversionFunc(corev1.SchemeGroupVersion.WithKind("Event"), checkFieldLabel); err != nil {
		return err
	}
	return scheme.SetVersionPriority(corev1.SchemeGroupVersion)
}

// Storage returns the REST surface of the group. Events expire when ttl, of
// whole seconds, has passed since they were last written.
func Storage(scheme *runtime.Scheme, optsGetter generic.RESTOptionsGetter, ttl time.Duration) (map[string]rest.Storage, error) {
	strategy := newStrategy(scheme)
	store := &genericregistry.Store{
		NewFunc:                   func() runtime.Object { return &corev1.Event{} },
		NewListFunc:               func() runtime.Object { return &corev1.EventList{} },
		PredicateFunc:             matchEvent,
		TTLFunc:                   func(runtime.Object, uint64, bool) (uint64, error) { return uint64(ttl.Seconds()), nil },
		DefaultQualifiedResource:  corev1.Resource("events"),
		SingularQualifiedResource: corev1.Resource("event"),
		CreateStrategy:            strategy,
		UpdateStrategy:            strategy,
		DeleteStrategy:            strategy,
		TableConvertor:            tableConvertor{},
	}
	err := store.CompleteWithOptions(&generic.StoreOptions{
		RESTOptions: optionsGetter{optsGetter, serializer.NewCodecFactory(scheme).LegacyCodec(corev1.SchemeGroupVersion)},
		AttrFunc:    getAttrs,
	})
	if err != nil {
		return nil, err
	}
	return map[string]rest.Storage{"events": &REST{store}}, nil
}

// optionsGetter says that events are stored as core/v1, in the storage that is
// for objects of another group.
type optionsGetter struct {
	generic.RESTOptionsGetter
	codec runtime.Codec
}

func (g optionsGetter) GetRESTOptions(resource schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	opts, err := g.RESTOptionsGetter.GetRESTOptions(resource, example)
	if err != nil {
		return generic.RESTOptions{}, err
	}
	config := *opts.StorageConfig
	config.Codec = g.codec
	config.EncodeVersioner = corev1.SchemeGroupVersion
	opts.StorageConfig = &config
	// The group's own name is empty.
	opts.ResourcePrefix = "core/" + resource.Resource
	// Events are written often and read seldom: they aren't worth the memory of
	// a watch cache.
	opts.Decorator = generic.UndecoratedStorage
	return opts, nil
}

// REST is the resource.
type REST struct {
	*genericregistry.Store
}

var (
	_ rest.StandardStorage    = (*REST)(nil)
	_ rest.ShortNamesProvider = (*REST)(nil)
)

// ShortNames implements rest.ShortNamesProvider.
func (*REST) ShortNames() []string { return []string{"ev"} }

func getAttrs(obj runtime.Object) (labels.Set, fields.Set, error) {
	event, ok := obj.(*corev1.Event)
	if !ok {
		return nil, nil, fmt.Errorf("expected an Event, got a %T", obj)
	}
	return event.Labels, selectableFields(event), nil
}

// selectableFields are the fields that events can be selected by.
func selectableFields(event *corev1.Event) fields.Set {
	set := fields.Set{
		"involvedObject.kind":            event.InvolvedObject.Kind,
		"involvedObject.namespace":       event.InvolvedObject.Namespace,
		"involvedObject.name":            event.InvolvedObject.Name,
		"involvedObject.uid":             string(event.InvolvedObject.UID),
		"involvedObject.apiVersion":      event.InvolvedObject.APIVersion,
		"involvedObject.resourceVersion": event.InvolvedObject.ResourceVersion,
		"involvedObject.fieldPath":       event.InvolvedObject.FieldPath,
		"reason":                         event.Reason,
		"reportingComponent":             event.ReportingController,
		"source":                         firstOf(event.Source.Component, event.ReportingController),
		"type":                           event.Type,
	}
	return generic.AddObjectMetaFieldsSet(set, &event.ObjectMeta, true)
}

// checkFieldLabel refuses selectors by other fields, which would match nothing.
func checkFieldLabel(label, value string) (string, string, error) {
	if !selectableFields(&corev1.Event{}).Has(label) {
		return "", "", fmt.Errorf("events can't be selected by the field %q", label)
	}
	return label, value, nil
}

func matchEvent(label labels.Selector, field fields.Selector) apistorage.SelectionPredicate {
	return apistorage.SelectionPredicate{Label: label, Field: field, GetAttrs: getAttrs}
}

func firstOf(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
