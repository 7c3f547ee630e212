package install

import (
	"math/rand"
	"testing"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	"k8s.io/apimachinery/pkg/api/apitesting/roundtrip"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/randfill"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
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

// TestRoundTrip takes each kind of the hub through JSON of every version and
// back.
func TestRoundTrip(t *testing.T) {
	roundtrip.RoundTripTestForAPIGroup(t, Install, fuzzerFuncs)
}

// TestRoundTripOptions takes the kinds that have no hub type through JSON:
// admission webhooks see them so.
func TestRoundTripOptions(t *testing.T) {
	scheme := runtime.NewScheme()
	Install(scheme)
	codecs := serializer.NewCodecFactory(scheme)
	fill := fuzzer.FuzzerFor(metafuzzer.Funcs, rand.NewSource(rand.Int63()), codecs)
	for _, kind := range []string{"TargetLogOptions", "TargetExecOptions", "TargetAttachOptions", "TargetPortForwardOptions"} {
		t.Run(kind, func(t *testing.T) {
			gvk := v1.SchemeGroupVersion.WithKind(kind)
			roundtrip.RoundTripSpecificKindWithoutProtobuf(t, gvk, scheme, codecs, fill, nil)
		})
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
		{"v1 ListOptions", scheme.Recognizes(v1.SchemeGroupVersion.WithKind("ListOptions"))},
		{"the scale subresource's Scale", scheme.Recognizes(autoscalingv1.SchemeGroupVersion.WithKind("Scale"))},
	} {
		if !gvk.ok {
			t.Errorf("%s isn't registered", gvk.name)
		}
	}
	if got := scheme.PrioritizedVersionsForGroup(api.GroupName); len(got) == 0 || got[0] != v1.SchemeGroupVersion {
		t.Errorf("versions in the order of their priority: %v, want v1 first", got)
	}
}
