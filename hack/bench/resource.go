//go:build linux

package main

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"math/rand/v2"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// paddingKey is the annotation that makes objects of different kinds
	// equally large, changedKey the one that updates change.
	paddingKey = "bench.aaserver.io/padding"
	changedKey = "bench.aaserver.io/changed"

	className = "bench"
)

// resource is a kind of object that the benchmark writes and reads.
type resource interface {
	// collection is the path of the objects of a namespace.
	collection(namespace string) string
	// object is a new object with that many bytes of padding.
	object(name string, padding int) metav1.Object
	// encode encodes an object, to be sent.
	encode(obj metav1.Object, mediaType string) ([]byte, error)
	// decodeList decodes a list in JSON.
	decodeList(body []byte) ([]metav1.Object, error)
	// withStatus gives an object a status, if it should have one.
	withStatus(obj metav1.Object) bool
}

// meta is the metadata of an object. What pads it can't be compressed better
// than by a half.
func meta(name string, padding int) metav1.ObjectMeta {
	digits := make([]byte, padding)
	seed := fnv.New64a()
	seed.Write([]byte(name))
	random := rand.New(rand.NewPCG(seed.Sum64(), uint64(padding)))
	for i := range digits {
		digits[i] = "0123456789abcdef"[random.IntN(16)]
	}
	return metav1.ObjectMeta{Name: name, Annotations: map[string]string{
		paddingKey: string(digits),
		changedKey: "00000000",
	}}
}

// targets is ours: small objects, or such as one would find.
type targets struct{ realistic bool }

func (targets) collection(namespace string) string {
	return "/apis/" + v1.GroupName + "/v1/namespaces/" + namespace + "/targets"
}

func (t targets) object(name string, padding int) metav1.Object {
	target := &v1.Target{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.SchemeGroupVersion.String(), Kind: "Target"},
		ObjectMeta: meta(name, padding),
		Spec: v1.TargetSpec{
			ClassName: className,
			AgentName: "edge-1",
			Process:   &v1.ProcessSource{Command: []string{"sleep", "infinity"}},
		},
	}
	if !t.realistic {
		return target
	}
	delete(target.Annotations, paddingKey)
	target.Labels = map[string]string{
		"app.kubernetes.io/name":       "checkout",
		"app.kubernetes.io/instance":   name,
		"app.kubernetes.io/component":  "api",
		"app.kubernetes.io/part-of":    "shop",
		"app.kubernetes.io/managed-by": "fleet",
	}
	target.Spec.Replicas = ptr.To[int32](2)
	target.Spec.Process = &v1.ProcessSource{
		Command:    []string{"/usr/local/bin/checkout"},
		Args:       []string{"--listen=127.0.0.1:$(AASERVER_PORT_HTTP)", "--metrics=127.0.0.1:$(AASERVER_PORT_METRICS)", "--config=/etc/checkout/config.yaml"},
		WorkingDir: "/srv/checkout",
		User:       "www-data",
		Env: []v1.EnvVar{
			{Name: "MODE", Value: "production"}, {Name: "REGION", Value: "eu-central"},
			{Name: "LOG_LEVEL", Value: "info"}, {Name: "LOG_FORMAT", Value: "json"},
			{Name: "DATABASE", Value: "postgres://db.shop.svc:5432/checkout"}, {Name: "CACHE", Value: "cache.shop.svc:6379"},
		},
	}
	target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 8080, Protocol: v1.ProtocolTCP}, {Name: "metrics", Port: 9090, Protocol: v1.ProtocolTCP}}
	return target
}

func (t targets) withStatus(obj metav1.Object) bool {
	if !t.realistic {
		return false
	}
	target := obj.(*v1.Target)
	now := metav1.Now()
	target.Status = v1.TargetStatus{ObservedGeneration: 1, Replicas: 2, ReadyReplicas: 2}
	for i := range 2 {
		instance := v1.InstanceStatus{
			Name:  fmt.Sprintf("%s-%d", target.Name, i),
			Ready: true,
			State: v1.InstanceState{Running: &v1.InstanceStateRunning{StartedAt: now}},
		}
		for j, port := range target.Spec.Ports {
			instance.Ports = append(instance.Ports, v1.InstancePort{Name: port.Name, Port: port.Port, HostPort: int32(20000 + 2*i + j)})
		}
		target.Status.Instances = append(target.Status.Instances, instance)
	}
	for _, condition := range []string{v1.ConditionReady, v1.ConditionProgressing, v1.ConditionAgentConnected} {
		target.Status.Conditions = append(target.Status.Conditions, metav1.Condition{
			Type: condition, Status: metav1.ConditionTrue, Reason: "AllReady",
			Message: "2 of 2 instances are ready", ObservedGeneration: 1, LastTransitionTime: now,
		})
	}
	return true
}

func (targets) encode(obj metav1.Object, mediaType string) ([]byte, error) {
	info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), mediaType)
	if !ok {
		return nil, fmt.Errorf("targets can't be encoded as %s", mediaType)
	}
	return runtime.Encode(scheme.Codecs.EncoderForVersion(info.Serializer, v1.SchemeGroupVersion), obj.(*v1.Target))
}

func (targets) decodeList(body []byte) ([]metav1.Object, error) {
	var list v1.TargetList
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, err
	}
	objects := make([]metav1.Object, len(list.Items))
	for i := range list.Items {
		objects[i] = &list.Items[i]
	}
	return objects, nil
}

// flunders is the peer's.
type flunders struct{}

// flunder is the peer's type as far as it is used.
type flunder struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		Reference     string `json:"reference"`
		ReferenceType string `json:"referenceType"`
	} `json:"spec"`
}

func (flunders) collection(namespace string) string {
	return "/apis/wardle.example.com/v1alpha1/namespaces/" + namespace + "/flunders"
}

func (flunders) object(name string, padding int) metav1.Object {
	f := &flunder{
		TypeMeta:   metav1.TypeMeta{APIVersion: "wardle.example.com/v1alpha1", Kind: "Flunder"},
		ObjectMeta: meta(name, padding),
	}
	f.Spec.Reference, f.Spec.ReferenceType = "another", "Flunder"
	return f
}

func (flunders) withStatus(metav1.Object) bool { return false }

func (flunders) encode(obj metav1.Object, mediaType string) ([]byte, error) {
	if mediaType != runtime.ContentTypeJSON {
		return nil, fmt.Errorf("flunders can't be encoded as %s", mediaType)
	}
	return json.Marshal(obj)
}

func (flunders) decodeList(body []byte) ([]metav1.Object, error) {
	var list struct{ Items []flunder }
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, err
	}
	objects := make([]metav1.Object, len(list.Items))
	for i := range list.Items {
		objects[i] = &list.Items[i]
	}
	return objects, nil
}

// class is what the targets of the benchmark name: the server checks it with
// each of them, which the peer has nothing like.
func class() *v1.TargetClass {
	return &v1.TargetClass{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.SchemeGroupVersion.String(), Kind: "TargetClass"},
		ObjectMeta: metav1.ObjectMeta{Name: className, Annotations: map[string]string{v1.AnnotationDefaultClass: "true"}},
		Spec:       v1.TargetClassSpec{Sources: []string{v1.SourceProcess}, Agents: []string{v1.ClassWildcard}, Users: []string{v1.ClassWildcard}, AgentUser: true},
	}
}
