package install

import (
	"math/rand"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	"k8s.io/apimachinery/pkg/api/apitesting/roundtrip"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/cbor"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/randfill"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
)

// fuzzerFuncs make what decoding would have filled in: objects that lack it
// don't come back as they went.
func fuzzerFuncs(serializer.CodecFactory) []any {
	return []any{
		func(spec *api.TargetSpec, c randfill.Continue) {
			c.FillNoCustom(spec)
			if spec.Process == nil && spec.Container == nil {
				return
			}
			if spec.Replicas == nil {
				spec.Replicas = ptr.To[int32](3)
			}
			if spec.RestartPolicy == "" {
				spec.RestartPolicy = api.RestartNever
			}
			if spec.TerminationGracePeriodSeconds == nil {
				spec.TerminationGracePeriodSeconds = ptr.To[int64](5)
			}
		},
		func(port *api.TargetPort, c randfill.Continue) {
			c.FillNoCustom(port)
			port.Protocol = api.ProtocolUDP
		},
		func(ports *api.PortRange, c randfill.Continue) {
			c.FillNoCustom(ports)
			ports.Protocol = api.ProtocolUDP
		},
	}
}

// TestRoundTrip takes each kind of the hub through JSON and protobuf of every
// version and back.
func TestRoundTrip(t *testing.T) {
	roundtrip.RoundTripProtobufTestForAPIGroup(t, Install, fuzzerFuncs)
}

// optionKinds have no hub type: admission webhooks see them as they are.
var optionKinds = []string{"TargetLogOptions", "TargetExecOptions", "TargetAttachOptions", "TargetPortForwardOptions"}

// newCodecs returns codecs for all that the generic server may offer: JSON,
// YAML, protobuf and, behind a feature gate, CBOR.
func newCodecs() (*runtime.Scheme, serializer.CodecFactory) {
	scheme := runtime.NewScheme()
	Install(scheme)
	return scheme, serializer.NewCodecFactory(scheme, serializer.WithSerializer(cbor.NewSerializerInfo))
}

// TestEveryKindInEveryEncoding takes each kind of each served version through
// each encoding and back, as it is, and from the hub.
func TestEveryKindInEveryEncoding(t *testing.T) {
	scheme, codecs := newCodecs()
	seed := rand.Int63()
	funcs := fuzzer.MergeFuzzerFuncs(metafuzzer.Funcs, fuzzerFuncs)
	fill := fuzzer.FuzzerFor(funcs, rand.NewSource(seed), codecs)
	const rounds = 100

	wantMedia := []string{runtime.ContentTypeJSON, runtime.ContentTypeYAML, runtime.ContentTypeProtobuf, runtime.ContentTypeCBOR}
	var media []string
	for _, info := range codecs.SupportedMediaTypes() {
		media = append(media, info.MediaType)
	}
	if diff := cmp.Diff(wantMedia, media); diff != "" {
		t.Fatalf("encodings (-want +got):\n%s", diff)
	}

	kinds := map[schema.GroupVersion][]string{
		v1.SchemeGroupVersion:       append([]string{"Target", "TargetList", "TargetClass", "TargetClassList"}, optionKinds...),
		v1alpha1.SchemeGroupVersion: append([]string{"Target", "TargetList"}, optionKinds...),
	}
	for gv, want := range kinds {
		var got []string
		for kind := range scheme.KnownTypes(gv) {
			if strings.HasPrefix(kind, "Target") {
				got = append(got, kind)
			}
		}
		slices.Sort(got)
		slices.Sort(want)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("kinds of %s (-want +got):\n%s", gv, diff)
		}
		for _, kind := range got {
			for _, info := range codecs.SupportedMediaTypes() {
				t.Run(gv.Version+" "+kind+" as "+info.MediaType, func(t *testing.T) {
					gvk := gv.WithKind(kind)
					for range rounds {
						external, err := scheme.New(gvk)
						if err != nil {
							t.Fatal(err)
						}
						fill.Fill(external)
						external.GetObjectKind().SetGroupVersionKind(gvk)
						wantBack(t, seed, info.Serializer, info.Serializer, external)
					}
					hubGVK := api.SchemeGroupVersion.WithKind(kind)
					if !scheme.Recognizes(hubGVK) {
						return
					}
					encoder, decoder := codecs.EncoderForVersion(info.Serializer, gv), codecs.DecoderToVersion(info.Serializer, api.SchemeGroupVersion)
					for range rounds {
						hub, err := scheme.New(hubGVK)
						if err != nil {
							t.Fatal(err)
						}
						fill.Fill(hub)
						hub.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{})
						wantBack(t, seed, encoder, decoder, hub)
					}
				})
			}
		}
	}
}

// wantBack encodes and decodes an object, which neither changes it.
func wantBack(t *testing.T, seed int64, encoder runtime.Encoder, decoder runtime.Decoder, object runtime.Object) {
	t.Helper()
	before := object.DeepCopyObject()
	data, err := runtime.Encode(encoder, object)
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	if !apiequality.Semantic.DeepEqual(before, object) {
		t.Fatalf("seed %d: encoding changed it (-before +after):\n%s", seed, cmp.Diff(before, object))
	}
	back, err := runtime.Decode(decoder, data)
	if err != nil {
		t.Fatalf("seed %d: %v in %q", seed, err, data)
	}
	if !apiequality.Semantic.DeepEqual(before, back) {
		t.Fatalf("seed %d: it came back otherwise (-before +after):\n%s", seed, cmp.Diff(before, back))
	}
}

func TestInstallRegistersEveryKind(t *testing.T) {
	scheme := runtime.NewScheme()
	Install(scheme)
	for _, gvk := range []struct {
		name string
		ok   bool
	}{
		{"the hub's Target", scheme.Recognizes(api.SchemeGroupVersion.WithKind("Target"))},
		{"the hub's TargetList", scheme.Recognizes(api.SchemeGroupVersion.WithKind("TargetList"))},
		{"v1 Target", scheme.Recognizes(v1.SchemeGroupVersion.WithKind("Target"))},
		{"v1 TargetList", scheme.Recognizes(v1.SchemeGroupVersion.WithKind("TargetList"))},
		{"v1alpha1 Target", scheme.Recognizes(v1alpha1.SchemeGroupVersion.WithKind("Target"))},
		{"v1alpha1 TargetList", scheme.Recognizes(v1alpha1.SchemeGroupVersion.WithKind("TargetList"))},
		{"v1alpha1 ListOptions", scheme.Recognizes(v1alpha1.SchemeGroupVersion.WithKind("ListOptions"))},
		{"v1 ListOptions", scheme.Recognizes(v1.SchemeGroupVersion.WithKind("ListOptions"))},
		{"the scale subresource's Scale", scheme.Recognizes(autoscalingv1.SchemeGroupVersion.WithKind("Scale"))},
	} {
		if !gvk.ok {
			t.Errorf("%s isn't registered", gvk.name)
		}
	}
	want := []schema.GroupVersion{v1.SchemeGroupVersion, v1alpha1.SchemeGroupVersion}
	if diff := cmp.Diff(want, scheme.PrioritizedVersionsForGroup(api.GroupName)); diff != "" {
		t.Errorf("versions in the order of their priority (-want +got):\n%s", diff)
	}
}
