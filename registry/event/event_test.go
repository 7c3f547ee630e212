package event

import (
	"maps"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/kube-openapi/pkg/validation/spec"

	"aaserver.io/aaserver/internal/storage"
)

// older is an event as written by what counts, newer by what reports a series.
func older() *corev1.Event {
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: "web.1", Namespace: "shop"},
		InvolvedObject: corev1.ObjectReference{APIVersion: "streaming.aaserver.io/v1", Kind: "Target", Namespace: "shop", Name: "web", UID: "u-1", FieldPath: "spec.ports"},
		Type:           corev1.EventTypeWarning,
		Reason:         "Unhealthy",
		Message:        " the probe failed\n",
		Source:         corev1.EventSource{Component: "agent", Host: "edge-17"},
		FirstTimestamp: metav1.NewTime(time.Now().Add(-90 * time.Minute)),
		LastTimestamp:  metav1.NewTime(time.Now().Add(-30 * time.Minute)),
		Count:          4,
	}
}

func newer() *corev1.Event {
	return &corev1.Event{
		ObjectMeta:          metav1.ObjectMeta{Name: "web.2", Namespace: "shop"},
		InvolvedObject:      corev1.ObjectReference{Kind: "Target", Namespace: "shop", Name: "web"},
		Type:                corev1.EventTypeNormal,
		Reason:              "Started",
		Action:              "Start",
		EventTime:           metav1.NewMicroTime(time.Now().Add(-50 * time.Minute)),
		ReportingController: "aaserver.io/agent",
		ReportingInstance:   "edge-17",
	}
}

func TestValidate(t *testing.T) {
	long := func(n int) string { return strings.Repeat("x", n) }
	for name, tt := range map[string]struct {
		event  *corev1.Event
		change func(*corev1.Event)
		want   []string
	}{
		"an older event":                      {older(), func(*corev1.Event) {}, nil},
		"a newer event":                       {newer(), func(*corev1.Event) {}, nil},
		"about what is in another namespace":  {older(), func(e *corev1.Event) { e.InvolvedObject.Namespace = "x" }, []string{"involvedObject.namespace: Invalid value"}},
		"a newer one too":                     {newer(), func(e *corev1.Event) { e.InvolvedObject.Namespace = "x" }, []string{"involvedObject.namespace: Invalid value"}},
		"about what is in no namespace":       {older(), func(e *corev1.Event) { e.InvolvedObject.Namespace, e.Namespace = "", "default" }, nil},
		"about that, in some namespace":       {older(), func(e *corev1.Event) { e.InvolvedObject.Namespace = "" }, []string{"involvedObject.namespace: Required value"}},
		"a message of the most bytes":         {older(), func(e *corev1.Event) { e.Message = long(1024) }, nil},
		"a message of one more":               {older(), func(e *corev1.Event) { e.Message = long(1025) }, []string{"message: Too long"}},
		"a long reason, action and type":      {older(), func(e *corev1.Event) { e.Reason, e.Action, e.Type = long(129), long(129), long(129) }, []string{"reason: Too long", "action: Too long", "type: Too long"}},
		"a long reporter":                     {older(), func(e *corev1.Event) { e.ReportingController, e.ReportingInstance = long(507), long(129) }, []string{"reportingInstance: Too long", "reportingComponent: Too long"}},
		"a long source":                       {older(), func(e *corev1.Event) { e.Source = corev1.EventSource{Component: long(507), Host: long(254)} }, []string{"source.component: Too long", "source.host: Too long"}},
		"a long reference":                    {older(), func(e *corev1.Event) { e.InvolvedObject.FieldPath = long(1025) }, []string{"involvedObject.fieldPath: Too long"}},
		"a long reference to what is related": {older(), func(e *corev1.Event) { e.Related = &corev1.ObjectReference{UID: types.UID(long(129))} }, []string{"related.uid: Too long"}},
		"a newer event of nobody": {newer(), func(e *corev1.Event) { e.Action, e.Reason, e.ReportingController, e.ReportingInstance = "", "", "", "" },
			[]string{"action: Required value", "reason: Required value", "reportingComponent: Required value", "reportingInstance: Required value"}},
		"a newer event of a reporter without a proper name": {newer(), func(e *corev1.Event) { e.ReportingController = "the agent" }, []string{"reportingComponent: Invalid value"}},
	} {
		t.Run(name, func(t *testing.T) {
			tt.change(tt.event)
			var got []string
			for _, err := range (strategy{}).ValidateUpdate(t.Context(), tt.event, tt.event) {
				got = append(got, err.Error())
			}
			if len(got) != len(tt.want) {
				t.Fatalf("got %q, want %q", got, tt.want)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], tt.want[i]) {
					t.Errorf("got %q, want %q", got[i], tt.want[i])
				}
			}
			if created := (strategy{}).Validate(t.Context(), tt.event); len(created) != len(got) {
				t.Errorf("created, it has %d errors, updated %d: %v", len(created), len(got), created)
			}
		})
	}
	nameless := older()
	nameless.Name = "Not_A_Name"
	if errs := (strategy{}).Validate(t.Context(), nameless); len(errs) != 1 || errs[0].Field != "metadata.name" {
		t.Errorf("a name that is none: %v", errs)
	}
}

func TestTable(t *testing.T) {
	series := newer()
	series.InvolvedObject.Name = ""
	series.Series = &corev1.EventSeries{Count: 7, LastObservedTime: metav1.NewMicroTime(time.Now().Add(-20 * time.Minute))}
	list := &corev1.EventList{
		ListMeta: metav1.ListMeta{ResourceVersion: "7", Continue: "more"},
		Items:    []corev1.Event{*older(), *newer(), *series, {}},
	}
	table, err := tableConvertor{}.ConvertToTable(t.Context(), list, nil)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, column := range table.ColumnDefinitions {
		name := column.Name
		if column.Priority > 0 {
			name += " (wide)"
		}
		names = append(names, name)
		if column.Description == "" {
			t.Errorf("column %s has no description", name)
		}
	}
	wantNames := []string{"Last Seen", "Type", "Reason", "Object", "Subobject (wide)", "Source (wide)", "Message", "First Seen (wide)", "Count (wide)", "Name (wide)"}
	if diff := cmp.Diff(wantNames, names); diff != "" {
		t.Errorf("columns (-want +got):\n%s", diff)
	}
	var cells [][]any
	for _, row := range table.Rows {
		cells = append(cells, row.Cells)
	}
	want := [][]any{
		{"30m", "Warning", "Unhealthy", "target/web", "spec.ports", "agent, edge-17", "the probe failed", "90m", int64(4), "web.1"},
		{"50m", "Normal", "Started", "target/web", "", "aaserver.io/agent, edge-17", "", "50m", int64(1), "web.2"},
		{"20m", "Normal", "Started", "target", "", "aaserver.io/agent, edge-17", "", "50m", int64(7), "web.2"},
		{"<unknown>", "", "", "", "", "", "", "<unknown>", int64(1), ""},
	}
	if diff := cmp.Diff(want, cells); diff != "" {
		t.Errorf("cells (-want +got):\n%s", diff)
	}
	if table.ResourceVersion != "7" || table.Continue != "more" {
		t.Errorf("the list's metadata is lost: %+v", table.ListMeta)
	}
	table, err = tableConvertor{}.ConvertToTable(t.Context(), older(), &metav1.TableOptions{NoHeaders: true})
	if err != nil {
		t.Fatal(err)
	}
	if len(table.ColumnDefinitions) != 0 || len(table.Rows) != 1 {
		t.Errorf("without headers: %d columns and %d rows, want 0 and 1", len(table.ColumnDefinitions), len(table.Rows))
	}
}

// TestOpenAPI compares the schemas with the Go types, which may gain fields.
func TestOpenAPI(t *testing.T) {
	definitions := OpenAPIDefinitions(func(model string) spec.Ref { return spec.MustCreateRef(model) })
	types := map[string]any{}
	for _, kind := range []interface{ OpenAPIModelName() string }{corev1.Event{}, corev1.EventList{}, corev1.EventSeries{}, corev1.EventSource{}, corev1.ObjectReference{}} {
		types[kind.OpenAPIModelName()] = kind
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(types)), slices.Sorted(maps.Keys(definitions))); diff != "" {
		t.Fatalf("models (-want +got):\n%s", diff)
	}
	for model, value := range types {
		definition := definitions[model]
		var names, refs []string
		for _, f := range reflect.VisibleFields(reflect.TypeOf(value)) {
			if name, _, _ := strings.Cut(f.Tag.Get("json"), ","); name != "" && len(f.Index) == 1 || f.Name == "Kind" || f.Name == "APIVersion" {
				names = append(names, name)
			}
		}
		slices.Sort(names)
		if diff := cmp.Diff(names, slices.Sorted(maps.Keys(definition.Schema.Properties))); diff != "" {
			t.Errorf("properties of %s (-want +got):\n%s", model, diff)
		}
		for name, property := range definition.Schema.Properties {
			if property.Description == "" && name != "metadata" {
				t.Errorf("%s of %s has no description", name, model)
			}
			ref := property.Ref.String()
			if property.Items != nil {
				ref = property.Items.Schema.Ref.String()
			}
			if ref != "" && !slices.Contains(refs, ref) {
				refs = append(refs, ref)
			}
		}
		slices.Sort(refs)
		if diff := cmp.Diff(refs, slices.Sorted(slices.Values(definition.Dependencies))); diff != "" {
			t.Errorf("dependencies of %s (-want +got):\n%s", model, diff)
		}
	}
}

// optionsOf are those of a storage for objects of another group.
type optionsOf struct{ config *storagebackend.Config }

func (o optionsOf) GetRESTOptions(resource schema.GroupResource, _ runtime.Object) (generic.RESTOptions, error) {
	return generic.RESTOptions{StorageConfig: o.config.ForResource(resource), Decorator: generic.UndecoratedStorage, ResourcePrefix: "/" + resource.Resource}, nil
}

func TestStorage(t *testing.T) {
	path, err := storage.SQLiteEndpoint(filepath.Join(t.TempDir(), "state.db"))
	if err != nil {
		t.Fatal(err)
	}
	backend, err := storage.Start(t.Context(), storage.Options{Endpoint: path, SocketDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := backend.Close(); err != nil {
			t.Error(err)
		}
	}()
	scheme := runtime.NewScheme()
	if err := Install(scheme); err != nil {
		t.Fatal(err)
	}
	other := schema.GroupVersion{Group: "other", Version: "v1"}
	config := storagebackend.NewDefaultConfig("/registry", serializer.NewCodecFactory(scheme).LegacyCodec(other))
	config.EncodeVersioner = other
	config.Transport.ServerList = []string{backend.Endpoint()}
	open := func(ttl time.Duration) *REST {
		t.Helper()
		resources, err := Storage(scheme, optionsOf{config}, ttl)
		if err != nil {
			t.Fatal(err)
		}
		events := resources["events"].(*REST)
		t.Cleanup(events.Destroy)
		return events
	}
	ctx := request.WithNamespace(t.Context(), "shop")
	create := func(events *REST, event *corev1.Event) {
		t.Helper()
		if _, err := events.Create(ctx, event, rest.ValidateAllObjectFunc, &metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}

	lasting := open(time.Hour)
	create(lasting, older())
	create(lasting, newer())
	for selector, want := range map[string][]string{
		"involvedObject.name=web,involvedObject.uid=u-1": {"web.1"},
		"involvedObject.name=db":                         nil,
		"reason=Started,type=Normal":                     {"web.2"},
		"source=agent":                                   {"web.1"},
		"source=aaserver.io/agent":                       {"web.2"},
		"metadata.namespace=shop,type!=Normal":           {"web.1"},
		"involvedObject.kind=Target":                     {"web.1", "web.2"},
	} {
		parsed, err := fields.ParseSelector(selector)
		if err != nil {
			t.Fatal(err)
		}
		list, err := lasting.List(ctx, &internalversion.ListOptions{FieldSelector: parsed})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, event := range list.(*corev1.EventList).Items {
			got = append(got, event.Name)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", selector, diff)
		}
	}
	for label := range selectableFields(&corev1.Event{}) {
		if _, _, err := scheme.ConvertFieldLabel(corev1.SchemeGroupVersion.WithKind("Event"), label, "x"); err != nil {
			t.Error(err)
		}
	}
	if _, _, err := scheme.ConvertFieldLabel(corev1.SchemeGroupVersion.WithKind("Event"), "message", "x"); err == nil {
		t.Error("a selector by the message is accepted, and would match nothing")
	}

	passing := older()
	passing.Name = "passing"
	brief := open(time.Second)
	create(brief, passing)
	watcher, err := brief.Watch(ctx, &internalversion.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", "passing")})
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Stop()
	deadline := time.After(30 * time.Second)
	for expired := false; !expired; {
		select {
		case event := <-watcher.ResultChan():
			expired = event.Type == "DELETED"
		case <-deadline:
			t.Fatal("the event didn't expire")
		}
	}
	if _, err := brief.Get(ctx, "passing", &metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("the expired event: %v", err)
	}
	if _, err := brief.Get(ctx, "web.1", &metav1.GetOptions{}); err != nil {
		t.Errorf("the event that lasts: %v", err)
	}
}
