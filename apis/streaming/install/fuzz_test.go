package install

import (
	"bytes"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
)

// FuzzDecode decodes bytes in each encoding, as the server does: defaulted and
// converted to the hub. What comes of it can be encoded in each version, takes
// no more than the bytes explain, and is the same when it is decoded again.
func FuzzDecode(f *testing.F) {
	scheme, codecs := newCodecs()
	infos := codecs.SupportedMediaTypes()
	versions := []schema.GroupVersion{v1.SchemeGroupVersion, v1alpha1.SchemeGroupVersion}

	for _, text := range []string{
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"web","labels":{"a":"b"}},"spec":{"agentName":"edge-17","process":{"command":["/bin/sh"],"env":[{"name":"A","value":"b"}]},"ports":[{"name":"http","port":8080}]},"status":{"instances":[{"name":"web-0","state":{"running":{"startedAt":"2026-11-20T12:00:00Z"}}}],"conditions":[{"type":"Ready","status":"True"}]}}`,
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","spec":{"process":{"command":null},"ssh":{"log":{}},"tcp":{"tls":{}},"container":{"resources":{"limits":{"cpu":"250m"}}}}}`,
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"TargetClass","spec":{"ports":{"allowed":[{"port":80}]}}}`,
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"TargetList","items":[{"spec":{"ssh":{"endpoints":[null]}}},null]}`,
		`{"apiVersion":"streaming.aaserver.io/v1alpha1","kind":"Target","spec":{"type":"SSH","endpoints":[{"name":"a","host":"b","port":22}],"logPath":"/a","image":"c"}}`,
		`{"apiVersion":"streaming.aaserver.io/v1alpha1","kind":"Target","spec":{"type":"TCP","tls":false,"tlsCABundle":"AAAA","limits":{"memory":"1e3"}}}`,
		`{"apiVersion":"streaming.aaserver.io/v1alpha1","kind":"Target","metadata":{"annotations":{"v1.streaming.aaserver.io/sources":"{\"emptyLog\":true}"}},"spec":{"type":"SSH"}}`,
		`{"apiVersion":"streaming.aaserver.io/v1alpha1","kind":"TargetList","items":[{"spec":{"type":"Process","command":["a"]}},{"spec":{"type":"VM"}}]}`,
		`{"apiVersion":"streaming.aaserver.io/v1alpha1","kind":"TargetExecOptions","command":["a"]}`,
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"managedFields":[{"fieldsV1":{}}]},"spec":{"terminationGracePeriodSeconds":9223372036854775807}}`,
		`{"apiVersion":"streaming.aaserver.io/v2","kind":"Target"}`,
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"Pod"}`,
		`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","spec":5}`,
		`[]`,
	} {
		f.Add(uint8(0), []byte(text))
		f.Add(uint8(1), []byte(text))
		object, gvk, err := codecs.UniversalDeserializer().Decode([]byte(text), nil, nil)
		if err != nil {
			continue
		}
		object.GetObjectKind().SetGroupVersionKind(*gvk)
		for i, info := range infos {
			data, err := runtime.Encode(info.Serializer, object)
			if err != nil {
				f.Fatalf("%s as %s: %v", text, info.MediaType, err)
			}
			f.Add(uint8(i), data)
		}
	}
	f.Add(uint8(1), []byte("apiVersion: streaming.aaserver.io/v1\nkind: Target\nspec: &a\n  process: {command: [*a]}\n"))

	f.Fuzz(func(t *testing.T, encoding uint8, data []byte) {
		info := infos[int(encoding)%len(infos)]
		// The server takes 3 MiB; what grows shows in less.
		if len(data) > 64<<10 {
			return
		}
		decode := func(data []byte) (runtime.Object, error) {
			return runtime.Decode(codecs.DecoderToVersion(info.Serializer, api.SchemeGroupVersion), data)
		}
		object, err := decode(data)
		if err != nil {
			return
		}
		kinds, _, err := scheme.ObjectKinds(object)
		if err != nil {
			t.Fatalf("%T was decoded, and isn't known: %v", object, err)
		}
		for _, version := range versions {
			if !slices.ContainsFunc(kinds, func(gvk schema.GroupVersionKind) bool {
				return gvk.Group == api.GroupName && scheme.Recognizes(version.WithKind(gvk.Kind))
			}) {
				continue
			}
			encoder := codecs.EncoderForVersion(info.Serializer, version)
			first, err := runtime.Encode(encoder, object)
			if err != nil {
				continue // managed fields may hold what JSON can't
			}
			// The aliases of YAML are bounded by its decoder.
			if most := 128*len(data) + 4096; len(first) > most && !bytes.ContainsRune(data, '*') {
				t.Errorf("%d bytes became %d of %s", len(data), len(first), version)
			}
			again, err := decode(first)
			if err != nil {
				t.Fatalf("what was encoded can't be decoded: %v\n%q", err, first)
			}
			second, err := runtime.Encode(encoder, again)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(first, second) {
				t.Errorf("%s isn't stable:\n%q\n%q", version, first, second)
			}
		}
	})
}
