package validation_test

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/util/validation/field"

	api "aaserver.io/aaserver/apis/streaming"
	"aaserver.io/aaserver/apis/streaming/install"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
	"aaserver.io/aaserver/apis/streaming/validation"
)

// FuzzValidateTarget takes an object the way the server does: JSON of any version
// is decoded, defaulted, converted to the hub and validated. It doesn't panic, the
// errors are not much more than the object, and what passes keeps the package's
// promises.
func FuzzValidateTarget(f *testing.F) {
	const head = `{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"web","namespace":"shop","resourceVersion":"1"},"spec":`
	for _, spec := range []string{
		`{"agentName":"edge-17","process":{"command":["/bin/sh","-c","exit"],"args":["$(A)"],"env":[{"name":"A","value":"b"}],"workingDir":"/srv","user":"1000","stdin":true,"tty":true},"ports":[{"name":"http","port":8080,"hostPort":80}]}`,
		`{"agentName":"edge-17","replicas":0,"restartPolicy":"Never","terminationGracePeriodSeconds":0,"container":{"image":"nginx:1","resources":{"limits":{"cpu":"250m","memory":"64Mi"}}}}`,
		`{"className":"standard","ssh":{"endpoints":[{"name":"a","host":"192.0.2.1","port":22}],"user":"admin","credentialsSecretRef":{"name":"login"},"log":{"journalUnit":"sshd.service"}}}`,
		`{"tcp":{"endpoints":[{"name":"a","host":"2001:db8::1","port":5432},{"name":"b","host":"db.example.com","port":5432}],"tls":{"serverName":"db","caBundle":"LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCi0tLS0tRU5EIENFUlRJRklDQVRFLS0tLS0K"}},"ports":[{"name":"db","port":5432,"protocol":"UDP"}]}`,
		`{"process":null,"tcp":{"endpoints":[null]}}`,
	} {
		f.Add([]byte(head + spec + `,"status":{"replicas":1,"instances":[{"name":"web-0","state":{"waiting":{}}}],"conditions":[{"type":"Ready"}]}}`))
	}

	for _, spec := range []string{
		`{"type":"Process","agentName":"edge-17","command":["/bin/sh"],"user":"www-data","ports":[{"name":"http","port":8080}]}`,
		`{"type":"SSH","endpoints":[{"name":"a","host":"192.0.2.1","port":22}],"user":"admin","credentialsSecret":"login","logPath":"/var/log/a","image":"nginx","tls":true}`,
		`{"type":"TCP","endpoints":[{"name":"a","host":"192.0.2.1","port":22}],"tlsServerName":"a"}`,
		`{"type":"VM","stdin":true}`,
		`{"command":["a"]}`,
	} {
		f.Add([]byte(`{"apiVersion":"streaming.aaserver.io/v1alpha1","kind":"Target","metadata":{"name":"web","namespace":"shop","annotations":{"v1.streaming.aaserver.io/sources":"{}"}},"spec":` + spec + `}`))
	}

	scheme := runtime.NewScheme()
	install.Install(scheme)
	decoder := serializer.NewCodecFactory(scheme).UniversalDecoder(api.SchemeGroupVersion)

	f.Fuzz(func(t *testing.T, data []byte) {
		obj, err := runtime.Decode(decoder, data)
		if err != nil {
			return
		}
		target, ok := obj.(*api.Target)
		if !ok {
			return
		}
		errs := validation.ValidateTarget(target)
		size := 0
		for _, err := range append(errs, validation.ValidateTargetStatusUpdate(target, &api.Target{})...) {
			size += len(err.Error())
		}
		if most := 512*len(data) + 4096; size > most {
			t.Errorf("%d bytes of errors about an object of %d", size, len(data))
		}
		changed := target.DeepCopy()
		changed.Spec.ClassName += "x"
		before := map[string]int{}
		for _, err := range validation.ValidateTarget(changed) {
			before[err.Error()]++
		}
		for _, err := range validation.ValidateTargetUpdate(changed, target) {
			if before[err.Error()]--; before[err.Error()] < 0 && strings.HasPrefix(err.Field, "spec") {
				t.Errorf("an update is refused for what a creation isn't: %v", err)
			}
		}
		relabelled := target.DeepCopy()
		relabelled.Labels = map[string]string{"tier": "front"}
		for _, update := range []field.ErrorList{
			validation.ValidateTargetUpdate(relabelled, target),
			validation.ValidateTargetStatusUpdate(relabelled, target),
		} {
			for _, err := range update {
				if !strings.HasPrefix(err.Field, "metadata") {
					t.Errorf("an update is refused for what stays as it is: %v", err)
				}
			}
		}
		if len(errs) > 0 {
			return
		}
		for _, key := range []string{v1alpha1.AnnotationSettings, v1alpha1.AnnotationSources} {
			if text, ok := target.Annotations[key]; ok {
				t.Errorf("a valid target has the annotation %s: %q", key, text)
			}
		}

		external := &v1.Target{}
		if err := scheme.Convert(target, external, nil); err != nil {
			t.Fatal(err)
		}
		if external.Spec.Source() == "" {
			t.Error("a valid target has no source")
		}
		if external.Spec.Hosted() {
			if external.Spec.AgentName == "" || external.Spec.Replicas == nil || external.Spec.RestartPolicy == "" || external.Spec.TerminationGracePeriodSeconds == nil {
				t.Errorf("a valid hosted target lacks what hosting needs: %+v", external.Spec)
			}
		}
		names := external.InstanceNames()
		if len(names) > v1.MaxInstances {
			t.Errorf("a valid target has %d instances", len(names))
		}
		seen := map[string]bool{}
		for _, name := range names {
			if msgs := content.IsDNS1123Label(name); len(msgs) > 0 || seen[name] {
				t.Errorf("a valid target has an instance named %q (%v)", name, msgs)
			}
			seen[name] = true
		}
		for _, port := range external.Spec.Ports {
			if port.Port < 1 || port.Port > 65535 || port.Protocol != v1.ProtocolTCP && port.Protocol != v1.ProtocolUDP {
				t.Errorf("a valid target has a port %+v", port)
			}
		}
	})
}
