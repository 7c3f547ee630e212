package event

import (
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

// OpenAPIDefinitions returns the schemas of the kinds that are served, and of
// what they consist of. They are written by hand: openapi-gen takes whole
// packages, and that of these few types has hundreds.
func OpenAPIDefinitions(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	meta := metav1.TypeMeta{}.SwaggerDoc()
	microTime := metav1.MicroTime{}.OpenAPIModelName()
	moment := metav1.Time{}.OpenAPIModelName()
	reference := corev1.ObjectReference{}.OpenAPIModelName()
	b := builder{ref}

	event := b.object(corev1.Event{}.SwaggerDoc(), map[string]spec.Schema{
		"kind":               described(meta["kind"], text()),
		"apiVersion":         described(meta["apiVersion"], text()),
		"metadata":           b.embedded(metav1.ObjectMeta{}.OpenAPIModelName()),
		"involvedObject":     b.embedded(reference),
		"reason":             text(),
		"message":            text(),
		"source":             b.embedded(corev1.EventSource{}.OpenAPIModelName()),
		"firstTimestamp":     b.reference(moment),
		"lastTimestamp":      b.reference(moment),
		"count":              integer(),
		"type":               text(),
		"eventTime":          b.reference(microTime),
		"series":             b.reference(corev1.EventSeries{}.OpenAPIModelName()),
		"action":             text(),
		"related":            b.reference(reference),
		"reportingComponent": text(),
		"reportingInstance":  text(),
	}, "metadata", "involvedObject")
	event.Dependencies = []string{
		corev1.EventSeries{}.OpenAPIModelName(), corev1.EventSource{}.OpenAPIModelName(), reference,
		microTime, metav1.ObjectMeta{}.OpenAPIModelName(), moment,
	}

	items := b.reference(corev1.Event{}.OpenAPIModelName())
	list := b.object(corev1.EventList{}.SwaggerDoc(), map[string]spec.Schema{
		"kind":       described(meta["kind"], text()),
		"apiVersion": described(meta["apiVersion"], text()),
		"metadata":   b.embedded(metav1.ListMeta{}.OpenAPIModelName()),
		"items":      *spec.ArrayProperty(&items),
	}, "items")
	list.Dependencies = []string{corev1.Event{}.OpenAPIModelName(), metav1.ListMeta{}.OpenAPIModelName()}

	series := b.object(corev1.EventSeries{}.SwaggerDoc(), map[string]spec.Schema{
		"count":            integer(),
		"lastObservedTime": b.reference(microTime),
	})
	series.Dependencies = []string{microTime}

	source := b.object(corev1.EventSource{}.SwaggerDoc(), map[string]spec.Schema{
		"component": text(),
		"host":      text(),
	})

	object := b.object(corev1.ObjectReference{}.SwaggerDoc(), map[string]spec.Schema{
		"kind":            text(),
		"namespace":       text(),
		"name":            text(),
		"uid":             text(),
		"apiVersion":      text(),
		"resourceVersion": text(),
		"fieldPath":       text(),
	})
	object.Schema.AddExtension("x-kubernetes-map-type", "atomic")

	return map[string]common.OpenAPIDefinition{
		corev1.Event{}.OpenAPIModelName():       event,
		corev1.EventList{}.OpenAPIModelName():   list,
		corev1.EventSeries{}.OpenAPIModelName(): series,
		corev1.EventSource{}.OpenAPIModelName(): source,
		reference:                               object,
	}
}

type builder struct {
	ref common.ReferenceCallback
}

// object describes itself by docs[""] and its properties by their names there.
func (builder) object(docs map[string]string, properties map[string]spec.Schema, required ...string) common.OpenAPIDefinition {
	for name, property := range properties {
		if property.Description == "" {
			properties[name] = described(docs[name], property)
		}
	}
	return common.OpenAPIDefinition{Schema: spec.Schema{SchemaProps: spec.SchemaProps{
		Description: docs[""],
		Type:        []string{"object"},
		Properties:  properties,
		Required:    required,
	}}}
}

func (b builder) reference(model string) spec.Schema {
	return spec.Schema{SchemaProps: spec.SchemaProps{Ref: b.ref(model)}}
}

// embedded is a reference to what is never absent, only empty.
func (b builder) embedded(model string) spec.Schema {
	schema := b.reference(model)
	schema.Default = map[string]any{}
	return schema
}

func text() spec.Schema { return *spec.StringProperty() }

func integer() spec.Schema { return *spec.Int32Property() }

func described(description string, schema spec.Schema) spec.Schema {
	schema.Description = description
	return schema
}
