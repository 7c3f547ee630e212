package v1alpha1_test

import (
	"math/rand"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/json"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/randfill"

	"aaserver.io/aaserver/apis/streaming"
	"aaserver.io/aaserver/apis/streaming/install"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
)

func newScheme() *runtime.Scheme {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	return scheme
}

func convert(t testing.TB, scheme *runtime.Scheme, in, out runtime.Object) {
	t.Helper()
	if err := scheme.Convert(in, out, nil); err != nil {
		t.Fatalf("converting a %T to a %T: %v", in, out, err)
	}
}

var types = []v1alpha1.TargetType{v1alpha1.TargetTypeProcess, v1alpha1.TargetTypeContainer, v1alpha1.TargetTypeSSH, v1alpha1.TargetTypeTCP}

// filler fills targets with random values: most of them make no sense.
func filler(seed int64) *randfill.Filler {
	funcs := func(serializer.CodecFactory) []any {
		return []any{
			func(target *v1alpha1.Target, c randfill.Continue) {
				c.FillNoCustom(target)
				target.TypeMeta = metav1.TypeMeta{}
			},
			func(target *streaming.Target, c randfill.Continue) {
				c.FillNoCustom(target)
				target.TypeMeta = metav1.TypeMeta{}
			},
			func(spec *v1alpha1.TargetSpec, c randfill.Continue) {
				c.FillNoCustom(spec)
				switch c.Intn(8) {
				case 0: // stays as it is
				case 1:
					spec.Type = ""
				default:
					spec.Type = types[c.Intn(len(types))]
				}
				// Some have what they may have, and no more.
				value := reflect.ValueOf(spec).Elem()
				for i := range value.NumField() {
					if c.Intn(3) == 0 && value.Type().Field(i).Name != "Type" {
						value.Field(i).SetZero()
					}
				}
			},
			func(spec *streaming.TargetSpec, c randfill.Continue) {
				c.FillNoCustom(spec)
				if spec.SSH != nil && c.Intn(3) == 0 {
					spec.SSH.Log = &streaming.SSHLog{}
				}
				if spec.TCP != nil && c.Intn(3) == 0 {
					spec.TCP.TLS = &streaming.TCPTLS{}
				}
			},
		}
	}
	return fuzzer.FuzzerFor(fuzzer.MergeFuzzerFuncs(metafuzzer.Funcs, funcs), rand.NewSource(seed), serializer.NewCodecFactory(newScheme()))
}

// TestConversionLosesNothing takes targets that hold anything to the other
// shape and back.
func TestConversionLosesNothing(t *testing.T) {
	scheme := newScheme()
	seed := rand.Int63()
	fill := filler(seed)
	const rounds = 3000
	carried := map[string]int{}
	check := func(what string, want, got runtime.Object) {
		t.Helper()
		if !apiequality.Semantic.DeepEqual(want, got) {
			t.Fatalf("seed %d: %s (-before +after):\n%s", seed, what, cmp.Diff(want, got))
		}
	}
	for range rounds {
		flat := &v1alpha1.Target{}
		fill.Fill(flat)
		before := flat.DeepCopy()
		hub, back := &streaming.Target{}, &v1alpha1.Target{}
		convert(t, scheme, flat, hub)
		check("converting to the hub changed its input", before, flat)
		hubBefore := hub.DeepCopy()
		convert(t, scheme, hub, back)
		check("converting from the hub changed its input", hubBefore, hub)
		check("a flat target that went to the hub and back", before, back)
		if _, ok := hub.Annotations[v1alpha1.AnnotationSettings]; ok {
			carried["settings"]++
		}

		// Webhooks see v1 in between.
		stored, again := &v1.Target{}, &streaming.Target{}
		convert(t, scheme, hub.DeepCopy(), stored)
		convert(t, scheme, stored, again)
		back = &v1alpha1.Target{}
		convert(t, scheme, again, back)
		check("a flat target that went to v1 and back", before, back)

		hub, hubBack, flat := &streaming.Target{}, &streaming.Target{}, &v1alpha1.Target{}
		fill.Fill(hub)
		hubBefore = hub.DeepCopy()
		convert(t, scheme, hub, flat)
		check("converting from the hub changed its input", hubBefore, hub)
		convert(t, scheme, flat, hubBack)
		check("a hub target that was flat in between", hubBefore, hubBack)
		if _, ok := flat.Annotations[v1alpha1.AnnotationSources]; ok {
			carried["sources"]++
		} else if flat.Spec.Type != "" {
			carried["nothing"]++
		}
	}
	for _, what := range []string{"settings", "sources", "nothing"} {
		if carried[what] < rounds/20 {
			t.Errorf("seed %d: %d of %d targets carried %s: the test proves little", seed, carried[what], rounds, what)
		}
	}
}

// TestConversionSharesNoAnnotations writes to the annotations of what came of a
// conversion: the map may be the watch cache's.
func TestConversionSharesNoAnnotations(t *testing.T) {
	scheme := newScheme()
	flat := &v1alpha1.Target{
		ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{"a": "b"}},
		Spec:       v1alpha1.TargetSpec{Type: v1alpha1.TargetTypeSSH, Image: "nginx"},
	}
	flatBefore := flat.DeepCopy()
	hub, back := &streaming.Target{}, &v1alpha1.Target{}
	convert(t, scheme, flat, hub)
	hubBefore := hub.DeepCopy()
	convert(t, scheme, hub, back)
	back.Annotations["c"] = "d"
	if diff := cmp.Diff(hubBefore, hub); diff != "" {
		t.Errorf("the hub's target (-before +after):\n%s", diff)
	}
	hub.Annotations["c"] = "d"
	if diff := cmp.Diff(flatBefore, flat); diff != "" {
		t.Errorf("the flat target (-before +after):\n%s", diff)
	}
}

func TestShapes(t *testing.T) {
	limits := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("250m")}
	cases := map[string]struct {
		flat v1alpha1.TargetSpec
		want v1.TargetSpec
	}{
		"a process": {
			flat: v1alpha1.TargetSpec{
				Type: "Process", ClassName: "standard", AgentName: "edge-17", Replicas: ptr.To[int32](2), RestartPolicy: "Never", TerminationGracePeriodSeconds: ptr.To[int64](0),
				Command: []string{"/bin/app"}, Args: []string{"-v"}, Env: []v1alpha1.EnvVar{{Name: "A", Value: "b"}}, WorkingDir: "/srv", User: "www-data", Stdin: true, TTY: true,
				Ports: []v1alpha1.TargetPort{{Name: "http", Port: 8080, Protocol: "TCP", HostPort: 80}},
			},
			want: v1.TargetSpec{
				ClassName: "standard", AgentName: "edge-17", Replicas: ptr.To[int32](2), RestartPolicy: "Never", TerminationGracePeriodSeconds: ptr.To[int64](0),
				Process: &v1.ProcessSource{Command: []string{"/bin/app"}, Args: []string{"-v"}, Env: []v1.EnvVar{{Name: "A", Value: "b"}}, WorkingDir: "/srv", User: "www-data", Stdin: true, TTY: true},
				Ports:   []v1.TargetPort{{Name: "http", Port: 8080, Protocol: "TCP", HostPort: 80}},
			},
		},
		"a container": {
			flat: v1alpha1.TargetSpec{
				Type: "Container", AgentName: "edge-17", Image: "nginx", Command: []string{"/bin/app"}, Args: []string{"-v"},
				Env: []v1alpha1.EnvVar{{Name: "A", Value: "b"}}, WorkingDir: "/srv", Limits: limits, Stdin: true, TTY: true,
			},
			want: v1.TargetSpec{
				AgentName: "edge-17",
				Container: &v1.ContainerSource{
					Image: "nginx", Command: []string{"/bin/app"}, Args: []string{"-v"},
					Env: []v1.EnvVar{{Name: "A", Value: "b"}}, WorkingDir: "/srv", Resources: v1.ContainerResources{Limits: limits}, Stdin: true, TTY: true,
				},
			},
		},
		"a host with a command for its log": {
			flat: v1alpha1.TargetSpec{
				Type: "SSH", Endpoints: []v1alpha1.Endpoint{{Name: "a", Host: "db.example.com", Port: 22}}, User: "admin", CredentialsSecret: "login", LogCommand: []string{"dmesg", "-w"},
			},
			want: v1.TargetSpec{SSH: &v1.SSHSource{
				Endpoints: []v1.Endpoint{{Name: "a", Host: "db.example.com", Port: 22}}, User: "admin", CredentialsSecretRef: v1.SecretReference{Name: "login"},
				Log: &v1.SSHLog{Command: []string{"dmesg", "-w"}},
			}},
		},
		"a host with a file for its log": {
			flat: v1alpha1.TargetSpec{Type: "SSH", LogPath: "/var/log/a"},
			want: v1.TargetSpec{SSH: &v1.SSHSource{Log: &v1.SSHLog{Path: "/var/log/a"}}},
		},
		"a host with a journal for its log": {
			flat: v1alpha1.TargetSpec{Type: "SSH", LogJournalUnit: "sshd.service"},
			want: v1.TargetSpec{SSH: &v1.SSHSource{Log: &v1.SSHLog{JournalUnit: "sshd.service"}}},
		},
		"a host without a log": {
			flat: v1alpha1.TargetSpec{Type: "SSH"},
			want: v1.TargetSpec{SSH: &v1.SSHSource{}},
		},
		"TCP endpoints": {
			flat: v1alpha1.TargetSpec{Type: "TCP", Endpoints: []v1alpha1.Endpoint{{Name: "a", Host: "192.0.2.1", Port: 5432}}},
			want: v1.TargetSpec{TCP: &v1.TCPSource{Endpoints: []v1.Endpoint{{Name: "a", Host: "192.0.2.1", Port: 5432}}}},
		},
		"TCP endpoints with TLS": {
			flat: v1alpha1.TargetSpec{Type: "TCP", TLS: true, TLSServerName: "db", TLSCABundle: []byte("pem")},
			want: v1.TargetSpec{TCP: &v1.TCPSource{TLS: &v1.TCPTLS{ServerName: "db", CABundle: []byte("pem")}}},
		},
		"TCP endpoints with TLS and nothing more": {
			flat: v1alpha1.TargetSpec{Type: "TCP", TLS: true},
			want: v1.TargetSpec{TCP: &v1.TCPSource{TLS: &v1.TCPTLS{}}},
		},
		"no type, for validation to refuse": {
			flat: v1alpha1.TargetSpec{AgentName: "edge-17"},
			want: v1.TargetSpec{AgentName: "edge-17"},
		},
	}
	scheme := newScheme()
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			hub, got, back := &streaming.Target{}, &v1.Target{}, &v1alpha1.Target{}
			convert(t, scheme, &v1alpha1.Target{Spec: tc.flat}, hub)
			convert(t, scheme, hub, got)
			if diff := cmp.Diff(&v1.Target{Spec: tc.want}, got); diff != "" {
				t.Errorf("in v1 (-want +got):\n%s", diff)
			}
			convert(t, scheme, hub, back)
			if diff := cmp.Diff(&v1alpha1.Target{Spec: tc.flat}, back); diff != "" {
				t.Errorf("and back (-want +got):\n%s", diff)
			}
		})
	}
}

// TestListsAreConverted: a list converts each of its items by hand, too.
func TestListsAreConverted(t *testing.T) {
	scheme := newScheme()
	list := &v1alpha1.TargetList{
		ListMeta: metav1.ListMeta{ResourceVersion: "7", Continue: "more"},
		Items:    []v1alpha1.Target{{Spec: v1alpha1.TargetSpec{Type: "SSH", Image: "nginx"}}, {Spec: v1alpha1.TargetSpec{Type: "Process", Command: []string{"a"}}}},
	}
	hub, back := &streaming.TargetList{}, &v1alpha1.TargetList{}
	convert(t, scheme, list, hub)
	if len(hub.Items) != 2 || hub.Items[0].Annotations[v1alpha1.AnnotationSettings] != `{"type":"","image":"nginx"}` || hub.Items[1].Spec.Process == nil {
		t.Errorf("in the hub: %+v", hub)
	}
	convert(t, scheme, hub, back)
	if diff := cmp.Diff(list, back); diff != "" {
		t.Errorf("and back (-want +got):\n%s", diff)
	}
}

// TestEditedAnnotationsStay: what isn't exactly as conversion has left it isn't
// taken off, so that it is refused rather than lost.
func TestEditedAnnotationsStay(t *testing.T) {
	scheme := newScheme()
	process := func(key, text string) metav1.ObjectMeta {
		return metav1.ObjectMeta{Annotations: map[string]string{key: text}}
	}
	for name, text := range map[string]string{
		"nothing":                              ``,
		"no JSON":                              `{`,
		"null":                                 `null`,
		"no settings":                          `{"type":""}`,
		"a setting that the type has":          `{"type":"","user":"root"}`,
		"a setting that is there":              `{"type":"","command":["b"]}`,
		"a setting that every type has":        `{"type":"","image":"nginx","className":"a"}`,
		"another type":                         `{"type":"SSH"}`,
		"a type that there isn't, beside one":  `{"type":"VM"}`,
		"spaces":                               `{"type":"", "image":"nginx"}`,
		"a field that nobody knows":            `{"type":"","image":"nginx","x":1}`,
		"more than one value":                  `{"type":"","image":"nginx"}{}`,
		"TLS of an endpoint":                   `{"type":"","tls":true,"tlsServerName":1}`,
		"something very deep":                  strings.Repeat(`[`, 100_000),
		"bytes that are no text":               "{\"type\":\"\",\"image\":\"\xff\"}",
		"a list that is empty":                 `{"type":"","logCommand":[]}`,
		"another spelling of the same setting": `{"type":"","Image":"nginx"}`,
	} {
		t.Run("settings: "+name, func(t *testing.T) {
			hub := &streaming.Target{ObjectMeta: process(v1alpha1.AnnotationSettings, text), Spec: streaming.TargetSpec{Process: &streaming.ProcessSource{Command: []string{"a"}}}}
			flat, back := &v1alpha1.Target{}, &streaming.Target{}
			convert(t, scheme, hub, flat)
			want := &v1alpha1.Target{ObjectMeta: process(v1alpha1.AnnotationSettings, text), Spec: v1alpha1.TargetSpec{Type: "Process", Command: []string{"a"}}}
			if diff := cmp.Diff(want, flat); diff != "" {
				t.Errorf("in v1alpha1 (-want +got):\n%s", diff)
			}
			convert(t, scheme, flat, back)
			if diff := cmp.Diff(hub, back); diff != "" {
				t.Errorf("and back (-want +got):\n%s", diff)
			}
			if errs := v1alpha1.ValidateSettings(text, field.NewPath("spec")); len(errs) == 0 {
				t.Error("it isn't refused")
			}
		})
	}
	for name, text := range map[string]string{
		"nothing":                       ``,
		"no JSON":                       `{`,
		"null":                          `null`,
		"no sources":                    `{}`,
		"a source that is there":        `{"container":{"image":"a"}}`,
		"a source before the first":     `{"ssh":{"endpoints":null,"user":"","credentialsSecretRef":{"name":""}},"emptyLog":true}`,
		"an empty log of no SSH":        `{"emptyLog":true}`,
		"spaces":                        `{"tcp":{"endpoints": null}}`,
		"a field that nobody knows":     `{"tcp":{"endpoints":null},"x":1}`,
		"something very deep":           strings.Repeat(`{"tcp":`, 100_000),
		"a process, which comes first":  `{"process":{"command":["a"]}}`,
		"more than one value":           `{"tcp":{"endpoints":null}}{}`,
		"another order of the same":     `{"tcp":{"endpoints":null},"ssh":{"endpoints":null,"user":"","credentialsSecretRef":{"name":""}}}`,
		"what conversion would default": `{"ssh":{}}`,
	} {
		t.Run("sources: "+name, func(t *testing.T) {
			flat := &v1alpha1.Target{ObjectMeta: process(v1alpha1.AnnotationSources, text), Spec: v1alpha1.TargetSpec{Type: "Container", Image: "a"}}
			hub, back := &streaming.Target{}, &v1alpha1.Target{}
			convert(t, scheme, flat, hub)
			want := &streaming.Target{ObjectMeta: process(v1alpha1.AnnotationSources, text), Spec: streaming.TargetSpec{Container: &streaming.ContainerSource{Image: "a"}}}
			if diff := cmp.Diff(want, hub); diff != "" {
				t.Errorf("in the hub (-want +got):\n%s", diff)
			}
			convert(t, scheme, hub, back)
			if diff := cmp.Diff(flat, back); diff != "" {
				t.Errorf("and back (-want +got):\n%s", diff)
			}
		})
	}
}

// TestEverySettingIsOfATypeOrOfAll: a field that is added to the spec must be
// said to belong to some types, or to all.
func TestEverySettingIsOfATypeOrOfAll(t *testing.T) {
	ofAll := []string{"Type", "ClassName", "AgentName", "Replicas", "RestartPolicy", "TerminationGracePeriodSeconds", "Ports"}
	scheme := newScheme()
	fill := filler(1)
	structure := reflect.TypeFor[v1alpha1.TargetSpec]()
	for i := range structure.NumField() {
		name := structure.Field(i).Name
		if slices.Contains(ofAll, name) {
			continue
		}
		t.Run(name, func(t *testing.T) {
			// Without a type, every setting is one too many.
			flat := &v1alpha1.Target{}
			value := reflect.ValueOf(&flat.Spec).Elem().Field(i)
			for value.IsZero() || value.Kind() == reflect.Slice && value.Len() == 0 {
				fill.Fill(value.Addr().Interface())
			}
			hub := &streaming.Target{}
			convert(t, scheme, flat, hub)
			jsonName, _, _ := strings.Cut(structure.Field(i).Tag.Get("json"), ",")
			errs := v1alpha1.ValidateSettings(hub.Annotations[v1alpha1.AnnotationSettings], field.NewPath("spec"))
			if len(errs) != 1 || errs[0].Field != "spec."+jsonName {
				t.Errorf("errors %v, want one of spec.%s", errs, jsonName)
			}
		})
	}
}

func TestFieldLabels(t *testing.T) {
	scheme := newScheme()
	gvk := v1alpha1.SchemeGroupVersion.WithKind("Target")
	for _, label := range []string{"metadata.name", "metadata.namespace", "spec.agentName"} {
		t.Run(label+" may be selected", func(t *testing.T) {
			gotLabel, gotValue, err := scheme.ConvertFieldLabel(gvk, label, "a")
			if gotLabel != label || gotValue != "a" || err != nil {
				t.Errorf("%q, %q, %v", gotLabel, gotValue, err)
			}
		})
	}
	t.Run("others may not be, and the error says which may", func(t *testing.T) {
		_, _, err := scheme.ConvertFieldLabel(gvk, "spec.type", "a")
		const want = `"spec.type" is not a known field selector: only metadata.name, metadata.namespace and spec.agentName are`
		if err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
	})
}

// FuzzConversion converts whatever can be decoded, to the hub and back, and from
// the hub and back.
func FuzzConversion(f *testing.F) {
	for _, spec := range []string{
		`{"type":"Process","command":["a"],"image":"b","tls":true}`,
		`{"type":"SSH","endpoints":[{"name":"a","host":"b","port":22}],"logPath":"/a","limits":{"cpu":"0.1m","x":"1e3"}}`,
		`{"type":"TCP","tlsServerName":"a","tlsCABundle":"AAAA","env":[null]}`,
		`{"type":"VM","command":[],"stdin":true}`,
		`{"image":"\ud800<&>\u2028"}`,
		`{"process":{},"container":{"resources":{"limits":{"cpu":"1Ki"}}},"ssh":{"log":{}},"tcp":{"tls":{}}}`,
		`{"ssh":{"log":{}}}`,
		`{"tcp":{"endpoints":[null]},"ssh":{"log":{"command":[""]}}}`,
	} {
		f.Add([]byte(`{"metadata":{"name":"web","annotations":{"a":"b"}},"spec":` + spec + `,"status":{"instances":[{"name":"web-0","state":{"waiting":{}}}]}}`))
	}
	f.Add([]byte(`{"metadata":{"annotations":{"` + v1alpha1.AnnotationSettings + `":"{\"type\":\"\",\"image\":\"a\"}"}},"spec":{"tcp":{}}}`))
	f.Add([]byte(`{"metadata":{"annotations":{"` + v1alpha1.AnnotationSources + `":"{\"emptyLog\":true}"}},"spec":{"type":"SSH"}}`))

	scheme := newScheme()
	f.Fuzz(func(t *testing.T, data []byte) {
		reserved := func(annotations map[string]string) bool {
			_, settings := annotations[v1alpha1.AnnotationSettings]
			_, sources := annotations[v1alpha1.AnnotationSources]
			return settings || sources
		}
		flat := &v1alpha1.Target{}
		if json.Unmarshal(data, flat) == nil {
			hub, back := &streaming.Target{}, &v1alpha1.Target{}
			convert(t, scheme, flat, hub)
			convert(t, scheme, hub, back)
			// Whoever sets one of the annotations gets it, or what it means.
			if !reserved(flat.Annotations) && !apiequality.Semantic.DeepEqual(flat, back) {
				t.Errorf("a flat target (-before +after):\n%s", cmp.Diff(flat, back))
			}
			again := &streaming.Target{}
			convert(t, scheme, back, again)
			if len(again.Annotations) < len(hub.Annotations) {
				t.Errorf("an annotation was lost: %v, then %v", hub.Annotations, again.Annotations)
			}
		}
		stored := &v1.Target{}
		if json.Unmarshal(data, stored) == nil {
			hub, flat, back := &streaming.Target{}, &v1alpha1.Target{}, &streaming.Target{}
			convert(t, scheme, stored, hub)
			convert(t, scheme, hub, flat)
			convert(t, scheme, flat, back)
			if !reserved(hub.Annotations) && !apiequality.Semantic.DeepEqual(hub, back) {
				t.Errorf("a target of the hub (-before +after):\n%s", cmp.Diff(hub, back))
			}
		}
	})
}
