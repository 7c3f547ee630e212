package e2e

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/utils/ptr"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	typeJSON       = "application/json"
	typeYAML       = "application/yaml"
	typeProtobuf   = "application/vnd.kubernetes.protobuf"
	typeJSONPatch  = "application/json-patch+json"
	typeMergePatch = "application/merge-patch+json"
	typeApply      = "application/apply-patch+yaml"

	targetsPath = "/apis/streaming.aaserver.io/v1/namespaces/default/targets"
)

// rawClient sends what no well-behaved client would.
type rawClient struct {
	t      testing.TB
	host   string
	client *http.Client
}

// answer is what came back.
type answer struct {
	code     int
	body     string
	warnings []string
}

func newRawClient(t testing.TB, s *server) (*rawClient, *rest.Config) {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", s.kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	client.Timeout = time.Minute
	t.Cleanup(client.CloseIdleConnections)
	return &rawClient{t, config.Host, client}, config
}

func (c *rawClient) do(method, path, contentType string, body []byte, headers ...string) answer {
	c.t.Helper()
	request, err := http.NewRequestWithContext(c.t.Context(), method, c.host+path, bytes.NewReader(body))
	if err != nil {
		c.t.Fatal(err)
	}
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	for i := 0; i < len(headers); i += 2 {
		request.Header.Set(headers[i], headers[i+1])
	}
	response, err := c.client.Do(request)
	if err != nil {
		c.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		c.t.Fatalf("%s %s: %v", method, path, err)
	}
	return answer{response.StatusCode, string(text), response.Header.Values("Warning")}
}

// want fails unless the answer has one of the codes and every part.
func (a answer) want(t testing.TB, codes []int, parts ...string) {
	t.Helper()
	if !slices.Contains(codes, a.code) {
		t.Errorf("code %d, want one of %v: %s", a.code, codes, tail(a.body, 500))
		return
	}
	for _, part := range parts {
		if !strings.Contains(a.body, part) {
			t.Errorf("want %q in: %s", part, tail(a.body, 2000))
		}
	}
}

func (a answer) target(t testing.TB) *v1.Target {
	t.Helper()
	target := &v1.Target{}
	if a.code/100 != 2 {
		t.Fatalf("code %d: %s", a.code, tail(a.body, 500))
	}
	if err := json.Unmarshal([]byte(a.body), target); err != nil {
		t.Fatal(err)
	}
	return target
}

// idle is the manifest of a target that runs nothing; more goes into its spec.
func idle(name, more string) []byte {
	return fmt.Appendf(nil, `{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":%q},"spec":{"replicas":0,"process":{"command":["sleep","1000"]}%s}}`, name, more)
}

func idleTarget(name string) *v1.Target {
	return &v1.Target{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.SchemeGroupVersion.String(), Kind: "Target"},
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       v1.TargetSpec{Replicas: ptr.To[int32](0), Process: &v1.ProcessSource{Command: []string{"sleep", "1000"}}},
	}
}

// enveloped is an object's protobuf in the envelope of Kubernetes.
func enveloped(raw []byte) []byte {
	field := func(number byte, value []byte) []byte {
		return append(binary.AppendUvarint([]byte{number<<3 | 2}, uint64(len(value))), value...)
	}
	meta := append(field(1, []byte(v1.SchemeGroupVersion.String())), field(2, []byte("Target"))...)
	out := append([]byte("k8s\x00"), field(1, meta)...)
	return append(out, field(2, raw)...)
}

func protobufOf(t testing.TB, target *v1.Target) []byte {
	t.Helper()
	raw, err := target.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// peakMemory is the most that the server's process has held, in bytes.
func (s *server) peakMemory() int64 {
	s.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		s.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "VmHWM:")
	line, _, _ := strings.Cut(rest, "kB")
	kib, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	if err != nil {
		s.t.Fatal(err)
	}
	return kib << 10
}

// wantBounded fails if the server's peak of memory grows by more than a limit
// while f runs.
func (s *server) wantBounded(t *testing.T, limit int64, f func()) {
	t.Helper()
	if runtime.GOOS != "linux" {
		f() // there is no /proc to ask
		return
	}
	before := s.peakMemory()
	f()
	grown := s.peakMemory() - before
	t.Logf("the server's peak of memory grew by %d MiB", grown>>20)
	if grown > limit {
		t.Errorf("the server's memory grew by %d MiB, want at most %d", grown>>20, limit>>20)
	}
}

// TestBadInput sends a server what it mustn't take, and looks whether it is as
// well afterwards as before.
func TestBadInput(t *testing.T) {
	s := startServer(t, t.TempDir())
	raw, config := newRawClient(t, s)
	clients, err := versioned.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	targets := clients.StreamingV1().Targets("default")

	badRequest := []int{http.StatusBadRequest}
	created := []int{http.StatusCreated}
	ok := []int{http.StatusOK}
	conflict := []int{http.StatusConflict}
	invalid := []int{http.StatusUnprocessableEntity}
	tooLarge := []int{http.StatusRequestEntityTooLarge}
	unsupported := []int{http.StatusUnsupportedMediaType}

	get := func(t *testing.T, name string) *v1.Target {
		t.Helper()
		return raw.do("GET", targetsPath+"/"+name, "", nil).target(t)
	}
	// mustCreate makes a target that its agent has seen: it writes no more.
	mustCreate := func(t *testing.T, name string) *v1.Target {
		t.Helper()
		raw.do("POST", targetsPath, typeJSON, idle(name, "")).want(t, created)
		target := &v1.Target{}
		s.eventually("the agent has nothing to write about "+name, 30*time.Second, func() error {
			target = get(t, name)
			if ready := meta.FindStatusCondition(target.Status.Conditions, v1.ConditionReady); ready == nil || ready.Status != metav1.ConditionTrue || target.Status.ObservedGeneration != target.Generation {
				return fmt.Errorf("its status is %+v", target.Status)
			}
			return nil
		})
		return target
	}

	t.Run("bodies over the limit", func(t *testing.T) {
		mustCreate(t, "large")
		huge := strings.Repeat("a", 3<<20+1)
		s.wantBounded(t, 256<<20, func() {
			for _, tc := range []struct{ method, path, contentType, body string }{
				{"POST", targetsPath, typeJSON, string(idle("huge", `,"className":"`+huge+`"`))},
				{"POST", targetsPath, typeYAML, string(idle("huge", `,"className":"`+huge+`"`))},
				{"POST", targetsPath, typeProtobuf, string(enveloped([]byte(huge)))},
				{"PUT", targetsPath + "/large", typeJSON, string(idle("large", `,"className":"`+huge+`"`))},
				{"PATCH", targetsPath + "/large", typeMergePatch, `{"metadata":{"annotations":{"a":"` + huge + `"}}}`},
				{"PATCH", targetsPath + "/large", typeJSONPatch, `[{"op":"add","path":"/metadata/annotations","value":{"a":"` + huge + `"}}]`},
				{"PATCH", targetsPath + "/large?fieldManager=a", typeApply, string(idle("large", `,"className":"`+huge+`"`))},
				{"PUT", targetsPath + "/large/status", typeJSON, string(idle("large", `,"className":"`+huge+`"`))},
				{"PUT", targetsPath + "/large/scale", typeJSON, `{"apiVersion":"autoscaling/v1","kind":"Scale","metadata":{"name":"` + huge + `"}}`},
				{"DELETE", targetsPath + "/large", typeJSON, `{"kind":"DeleteOptions","apiVersion":"v1","preconditions":{"uid":"` + huge + `"}}`},
			} {
				answer := raw.do(tc.method, tc.path, tc.contentType, []byte(tc.body))
				if answer.code != http.StatusRequestEntityTooLarge {
					t.Errorf("%s %s as %s: code %d, want 413: %s", tc.method, tc.path, tc.contentType, answer.code, tail(answer.body, 300))
				}
			}
		})
		below := strings.Repeat("a", 2<<20)
		raw.do("POST", targetsPath, typeJSON, bytes.Replace(idle("below", ""), []byte(`"process":{`), []byte(`"process":{"workingDir":"/`+below+`",`), 1)).
			want(t, invalid, "spec.process.workingDir: Too long")
		answer := raw.do("POST", targetsPath, typeJSON, idle("below", `,"className":"`+below+`"`))
		answer.want(t, []int{http.StatusForbidden, http.StatusUnprocessableEntity}, "className")
		if len(answer.body) > 64<<10 {
			t.Errorf("the error has %d bytes", len(answer.body))
		}
		raw.do("PATCH", targetsPath+"/large", typeMergePatch, []byte(`{"metadata":{"annotations":{"a":"`+below+`"}}}`)).want(t, invalid, "metadata.annotations: Too long")
	})

	t.Run("a patch that multiplies an object", func(t *testing.T) {
		mustCreate(t, "copied")
		var patch strings.Builder
		patch.WriteString(`[{"op":"add","path":"/metadata/annotations","value":{"a":"` + strings.Repeat("a", 1<<20) + `"}}`)
		for i := range 1000 {
			fmt.Fprintf(&patch, `,{"op":"copy","from":"/metadata/annotations/a","path":"/metadata/annotations/a%d"}`, i)
		}
		patch.WriteString("]")
		s.wantBounded(t, 256<<20, func() {
			raw.do("PATCH", targetsPath+"/copied", typeJSONPatch, []byte(patch.String())).want(t, []int{http.StatusRequestEntityTooLarge, http.StatusUnprocessableEntity})
		})
		many := "[" + strings.Repeat(`{"op":"test","path":"/metadata/name","value":"copied"},`, 20000) + `{"op":"test","path":"/metadata/name","value":"copied"}]`
		raw.do("PATCH", targetsPath+"/copied", typeJSONPatch, []byte(many)).want(t, tooLarge, "maximum operations")
	})

	t.Run("deep nesting", func(t *testing.T) {
		mustCreate(t, "nested")
		const depth = 100_000
		objects := strings.Repeat(`{"x":`, depth) + "1" + strings.Repeat("}", depth)
		lists := strings.Repeat("[", depth) + strings.Repeat("]", depth)
		flow := strings.Repeat("{x: ", depth) + "1" + strings.Repeat("}", depth)
		s.wantBounded(t, 512<<20, func() {
			for name, tc := range map[string]struct{ method, path, contentType, body string }{
				"JSON objects":                  {"POST", targetsPath, typeJSON, string(idle("deep", `,"x":`+objects))},
				"JSON objects in a known field": {"POST", targetsPath, typeJSON, string(idle("deep", `,"ports":`+objects))},
				"JSON lists":                    {"POST", targetsPath, typeJSON, string(idle("deep", `,"x":`+lists))},
				"unclosed JSON":                 {"POST", targetsPath, typeJSON, strings.Repeat("[", 1<<20)},
				"YAML in flow style":            {"POST", targetsPath, typeYAML, "apiVersion: streaming.aaserver.io/v1\nkind: Target\nmetadata: {name: deep}\nspec: " + flow},
				"YAML lists":                    {"POST", targetsPath, typeYAML, lists},
				"YAML in block style":           {"POST", targetsPath, typeYAML, strings.Repeat("- ", depth) + "1"},
				"a merge patch":                 {"PATCH", targetsPath + "/nested", typeMergePatch, `{"spec":` + objects + `}`},
				"a JSON patch":                  {"PATCH", targetsPath + "/nested", typeJSONPatch, `[{"op":"add","path":"/spec/x","value":` + objects + `}]`},
				"server-side apply":             {"PATCH", targetsPath + "/nested?fieldManager=a", typeApply, string(idle("nested", `,"x":`+objects))},
				"delete options":                {"DELETE", targetsPath + "/nested", typeJSON, `{"kind":"DeleteOptions","apiVersion":"v1","x":` + objects + `}`},
			} {
				answer := raw.do(tc.method, tc.path, tc.contentType, []byte(tc.body))
				if answer.code != http.StatusBadRequest && answer.code != http.StatusUnprocessableEntity {
					t.Errorf("%s: code %d, want 400 or 422: %s", name, answer.code, tail(answer.body, 300))
				}
				if len(answer.body) > 64<<10 {
					t.Errorf("%s: the error has %d bytes", name, len(answer.body))
				}
			}
		})
		get(t, "nested")
	})

	t.Run("YAML aliases that multiply", func(t *testing.T) {
		var laughs strings.Builder
		laughs.WriteString("a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]\n")
		for i := 1; i < 12; i++ {
			fmt.Fprintf(&laughs, "a%d: &a%d [%s]\n", i, i, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*a%d, ", i-1), 9), ", "))
		}
		mustCreate(t, "laughing")
		s.wantBounded(t, 256<<20, func() {
			raw.do("POST", targetsPath, typeYAML, []byte(laughs.String())).want(t, badRequest)
			raw.do("PATCH", targetsPath+"/laughing?fieldManager=a", typeApply, []byte(laughs.String())).want(t, badRequest)
		})
	})

	t.Run("text that isn't UTF-8", func(t *testing.T) {
		withBad := func(name string) *v1.Target {
			target := idleTarget(name)
			target.Spec.Process.Args = []string{"a\xffb"}
			return target
		}
		// JSON: replaced, as decoders of JSON do.
		target := raw.do("POST", targetsPath, typeJSON, idle("bad-json", `,"className":"","ports":[]`+`,"process":{"command":["sleep","a`+"\xff"+`b"]}`)).target(t)
		if got := target.Spec.Process.Command[1]; got != "a\ufffdb" {
			t.Errorf("JSON: stored %q", got)
		}
		raw.do("POST", targetsPath, typeYAML, []byte("apiVersion: streaming.aaserver.io/v1\nkind: Target\nmetadata: {name: bad-yaml}\nspec: {replicas: 0, process: {command: [\"a\xffb\"]}}\n")).want(t, badRequest, "invalid")

		// Protobuf: Go would store it as it is.
		raw.do("POST", targetsPath, typeProtobuf, enveloped(protobufOf(t, withBad("bad-proto")))).
			want(t, invalid, "spec.process.args[0]: Invalid value: must be valid UTF-8")
		annotated := idleTarget("bad-annotation")
		annotated.Annotations = map[string]string{"note": "\xff"}
		raw.do("POST", targetsPath, typeProtobuf, enveloped(protobufOf(t, annotated))).
			want(t, invalid, "metadata.annotations: Invalid value: the value of \\\"note\\\" must be valid UTF-8")
		mustCreate(t, "fine")
		fine := get(t, "fine")
		fine.Spec.Process.Args = []string{"a\xffb"}
		raw.do("PUT", targetsPath+"/fine", typeProtobuf, enveloped(protobufOf(t, fine))).want(t, invalid, "must be valid UTF-8")
		fine = get(t, "fine")
		fine.Status.Instances = []v1.InstanceStatus{{Name: "fine-0", State: v1.InstanceState{Waiting: &v1.InstanceStateWaiting{Message: "\xff"}}}}
		raw.do("PUT", targetsPath+"/fine/status", typeProtobuf, enveloped(protobufOf(t, fine))).
			want(t, invalid, "status.instances[0].state.waiting.message: Invalid value: must be valid UTF-8")
		named := idleTarget("a\xffb")
		raw.do("POST", targetsPath, typeProtobuf, enveloped(protobufOf(t, named))).want(t, invalid, "metadata.name")
	})

	t.Run("unknown and repeated fields", func(t *testing.T) {
		unknown := func(name string) []byte { return idle(name, `,"relpicas":3`) }
		repeated := func(name string) []byte { return idle(name, `,"replicas":0`) }
		raw.do("POST", targetsPath+"?fieldValidation=Strict", typeJSON, unknown("strict")).want(t, badRequest, `unknown field \"spec.relpicas\"`)
		raw.do("POST", targetsPath+"?fieldValidation=Strict", typeJSON, repeated("strict")).want(t, badRequest, `duplicate field \"spec.replicas\"`)
		for name, body := range map[string][]byte{"warn-unknown": unknown("warn-unknown"), "warn-repeated": repeated("warn-repeated")} {
			answer := raw.do("POST", targetsPath, typeJSON, body)
			answer.want(t, created)
			if len(answer.warnings) != 1 || !strings.Contains(answer.warnings[0], "field") {
				t.Errorf("%s: warnings %q", name, answer.warnings)
			}
		}
		answer := raw.do("POST", targetsPath+"?fieldValidation=Ignore", typeJSON, unknown("ignore"))
		answer.want(t, created)
		if len(answer.warnings) > 0 {
			t.Errorf("warnings %q", answer.warnings)
		}
		raw.do("POST", targetsPath+"?fieldValidation=Maybe", typeJSON, unknown("maybe")).want(t, []int{http.StatusUnprocessableEntity, http.StatusBadRequest}, "fieldValidation")
		raw.do("PATCH", targetsPath+"/ignore?fieldValidation=Strict", typeMergePatch, []byte(`{"spec":{"relpicas":3}}`)).want(t, []int{http.StatusUnprocessableEntity, http.StatusBadRequest}, `unknown field \"spec.relpicas\"`)
		raw.do("PATCH", targetsPath+"/ignore?fieldManager=a", typeApply, unknown("ignore")).want(t, []int{http.StatusInternalServerError, http.StatusBadRequest, http.StatusUnprocessableEntity}, "relpicas")

		manifest := string(unknown("by-kubectl"))
		r := s.run(binaries.kubectl, manifest, "create", "--validate=strict", "-f", "-")
		if r.code == 0 {
			t.Error("kubectl --validate=strict created it")
		}
		wantContains(t, "strict", r.stderr, `unknown field "spec.relpicas"`)
		r = s.run(binaries.kubectl, manifest, "create", "--validate=warn", "-f", "-")
		if r.code != 0 {
			t.Errorf("kubectl --validate=warn: %s", r.stderr)
		}
		wantContains(t, "warn", r.stderr, `Warning: unknown field "spec.relpicas"`)
		r = s.run(binaries.kubectl, string(unknown("by-kubectl-too")), "create", "--validate=ignore", "-f", "-")
		if r.code != 0 || r.stderr != "" {
			t.Errorf("kubectl --validate=ignore: exit code %d, %s", r.code, r.stderr)
		}
	})

	t.Run("wrong versions, kinds and names", func(t *testing.T) {
		mustCreate(t, "right")
		body := func(apiVersion, kind, metadata string) []byte {
			return fmt.Appendf(nil, `{"apiVersion":%q,"kind":%q,"metadata":%s,"spec":{"replicas":0,"process":{"command":["sleep"]}}}`, apiVersion, kind, metadata)
		}
		const v1Name = "streaming.aaserver.io/v1"
		for name, tc := range map[string]struct {
			method, path string
			body         []byte
			codes        []int
			part         string
		}{
			"a version that isn't":      {"POST", targetsPath, body("streaming.aaserver.io/v2", "Target", `{"name":"wrong"}`), badRequest, "streaming.aaserver.io/v2"},
			"another group":             {"POST", targetsPath, body("apps/v1", "Target", `{"name":"wrong"}`), badRequest, "apps/v1"},
			"another kind of the group": {"POST", targetsPath, body(v1Name, "TargetClass", `{"name":"wrong"}`), badRequest, "TargetClass"},
			"a kind that isn't":         {"POST", targetsPath, body(v1Name, "Targte", `{"name":"wrong"}`), badRequest, "Targte"},
			"a list":                    {"POST", targetsPath, []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"TargetList","items":[]}`), badRequest, "TargetList"},
			"the internal version":      {"POST", targetsPath, body("streaming.aaserver.io/__internal", "Target", `{"name":"wrong"}`), badRequest, "__internal"},
			"another name":              {"PUT", targetsPath + "/right", body(v1Name, "Target", `{"name":"left"}`), badRequest, "does not match"},
			"another namespace":         {"POST", targetsPath, body(v1Name, "Target", `{"name":"wrong","namespace":"other"}`), badRequest, "does not match"},
			"another namespace, update": {"PUT", targetsPath + "/right", body(v1Name, "Target", `{"name":"right","namespace":"other"}`), badRequest, "does not match"},
			"no name":                   {"POST", targetsPath, body(v1Name, "Target", `{}`), invalid, "name or generateName is required"},
			"a name that is a path":     {"POST", targetsPath, body(v1Name, "Target", `{"name":"../a"}`), invalid, "metadata.name"},
			"a patch of the name":       {"PATCH", targetsPath + "/right", []byte(`{"metadata":{"name":"left"}}`), badRequest, "does not match"},
			"a patch of the kind":       {"PATCH", targetsPath + "/right", []byte(`{"kind":"TargetClass"}`), []int{http.StatusBadRequest, http.StatusUnprocessableEntity}, "TargetClass"},
			"a scale of another name":   {"PUT", targetsPath + "/right/scale", []byte(`{"apiVersion":"autoscaling/v1","kind":"Scale","metadata":{"name":"left"},"spec":{"replicas":0}}`), badRequest, "does not match"},
			"a scale of another group":  {"PUT", targetsPath + "/right/scale", []byte(`{"apiVersion":"extensions/v1beta1","kind":"Scale","metadata":{"name":"right"},"spec":{"replicas":0}}`), badRequest, "extensions/v1beta1"},
			"a target for a scale":      {"PUT", targetsPath + "/right/scale", idle("right", ""), badRequest, "Target"},
			"a scale below zero":        {"PUT", targetsPath + "/right/scale", []byte(`{"apiVersion":"autoscaling/v1","kind":"Scale","metadata":{"name":"right"},"spec":{"replicas":-1}}`), invalid, "spec.replicas"},
			"no body":                   {"POST", targetsPath, nil, badRequest, ""},
			"null":                      {"POST", targetsPath, []byte("null"), []int{http.StatusBadRequest, http.StatusUnprocessableEntity}, ""},
			"a list of nothing":         {"POST", targetsPath, []byte("[]"), badRequest, ""},
			"half an object":            {"POST", targetsPath, idle("half", "")[:40], badRequest, ""},
			"two objects":               {"POST", targetsPath, append(idle("one", ""), idle("two", "")...), badRequest, ""},
			"text for a number":         {"POST", targetsPath, []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"text"},"spec":{"replicas":"two"}}`), badRequest, "replicas"},
			"a number beyond all":       {"POST", targetsPath, []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"text"},"spec":{"replicas":1e400}}`), badRequest, ""},
			"a number that overflows":   {"POST", targetsPath, []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"text"},"spec":{"replicas":4294967297}}`), badRequest, "replicas"},
			"a quantity of 10^9 digits": {"POST", targetsPath, []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"text"},"spec":{"container":{"image":"a","resources":{"limits":{"cpu":"1e1000000000"}}}}}`), []int{http.StatusBadRequest, http.StatusUnprocessableEntity}, ""},
		} {
			contentType := typeJSON
			if tc.method == "PATCH" {
				contentType = typeMergePatch
			}
			answer := raw.do(tc.method, tc.path, contentType, tc.body)
			if !slices.Contains(tc.codes, answer.code) || !strings.Contains(answer.body, tc.part) {
				t.Errorf("%s: code %d, want one of %v and %q: %s", name, answer.code, tc.codes, tc.part, tail(answer.body, 500))
			}
		}
	})

	t.Run("two updates at once", func(t *testing.T) {
		mustCreate(t, "raced")
		first, second := get(t, "raced"), get(t, "raced")
		put := func(target *v1.Target, class string) answer {
			target.Spec.ClassName = ""
			target.Annotations = map[string]string{"by": class}
			body, err := json.Marshal(target)
			if err != nil {
				t.Fatal(err)
			}
			return raw.do("PUT", targetsPath+"/raced", typeJSON, body)
		}
		put(first, "first").want(t, ok)
		put(second, "second").want(t, conflict, "the object has been modified")
		second.ResourceVersion = ""
		put(second, "second").want(t, ok)
		if got := get(t, "raced").Annotations["by"]; got != "second" {
			t.Errorf("the last write is by %q", got)
		}
		raw.do("PATCH", targetsPath+"/raced", typeMergePatch, fmt.Appendf(nil, `{"metadata":{"resourceVersion":%q,"annotations":{"by":"third"}}}`, first.ResourceVersion)).want(t, conflict)

		stale, err := json.Marshal(first)
		if err != nil {
			t.Fatal(err)
		}
		r := s.run(binaries.kubectl, string(stale), "replace", "-f", "-")
		if r.code == 0 {
			t.Error("kubectl replaced a newer object by an older")
		}
		wantContains(t, "replace", r.stderr, "the object has been modified")

		const writers = 50
		created := make([]int, writers)
		var creators sync.WaitGroup
		for i := range writers {
			creators.Go(func() { created[i] = raw.do("POST", targetsPath, typeJSON, idle("once", "")).code })
		}
		creators.Wait()
		slices.Sort(created)
		if created[0] != http.StatusCreated || created[1] != http.StatusConflict || created[writers-1] != http.StatusConflict {
			t.Errorf("creations of one name: %v", created)
		}

		codes := make([]int, writers)
		var group sync.WaitGroup
		for i := range writers {
			group.Go(func() {
				codes[i] = raw.do("PATCH", targetsPath+"/raced", typeMergePatch, fmt.Appendf(nil, `{"metadata":{"annotations":{"writer-%d":"yes"}}}`, i)).code
			})
		}
		group.Wait()
		raced := get(t, "raced")
		for i, code := range codes {
			if code != http.StatusOK || raced.Annotations[fmt.Sprint("writer-", i)] != "yes" {
				t.Errorf("writer %d: code %d, annotation %q", i, code, raced.Annotations[fmt.Sprint("writer-", i)])
			}
		}
	})

	t.Run("status by the main resource", func(t *testing.T) {
		const smuggled = `"status":{"readyReplicas":9,"conditions":[{"type":"Smuggled","status":"True","reason":"A","message":"","lastTransitionTime":"2026-01-01T00:00:00Z"}]}`
		withStatus := func(name string) []byte {
			body := idle(name, "")
			return append(body[:len(body)-1], ","+smuggled+"}"...)
		}
		raw.do("POST", targetsPath, typeJSON, withStatus("smuggler")).want(t, created)
		raw.do("PUT", targetsPath+"/smuggler", typeJSON, withStatus("smuggler")).want(t, ok)
		raw.do("PATCH", targetsPath+"/smuggler", typeMergePatch, []byte("{"+smuggled+"}")).want(t, ok)
		raw.do("PATCH", targetsPath+"/smuggler", typeJSONPatch, []byte(`[{"op":"add","path":"/status/readyReplicas","value":9}]`)).want(t, ok)
		raw.do("PATCH", targetsPath+"/smuggler?fieldManager=smuggler&force=true", typeApply, withStatus("smuggler")).want(t, ok)
		target := get(t, "smuggler")
		if target.Status.ReadyReplicas == 9 || strings.Contains(fmt.Sprint(target.Status.Conditions), "Smuggled") {
			t.Errorf("status %+v", target.Status)
		}
		for _, fields := range target.ManagedFields {
			if fields.Manager == "smuggler" && strings.Contains(fields.FieldsV1.GetRawString(), "f:status") {
				t.Errorf("who applied the main resource owns its status: %s", fields.FieldsV1.GetRawString())
			}
		}
	})

	t.Run("all else by the status", func(t *testing.T) {
		before := mustCreate(t, "guarded")
		body := []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"guarded","labels":{"a":"b"},"annotations":{"a":"b"},"finalizers":["example.com/a"],"ownerReferences":[{"apiVersion":"v1","kind":"Pod","name":"a","uid":"a"}],"generation":99},"spec":{"replicas":7,"process":{"command":["rm"]}},"status":{"observedGeneration":1}}`)
		patch := []byte(`[{"op":"add","path":"/metadata/finalizers","value":["example.com/a"]},{"op":"replace","path":"/spec/replicas","value":7},{"op":"add","path":"/status/observedGeneration","value":1}]`)
		raw.do("PUT", targetsPath+"/guarded/status", typeJSON, body).want(t, ok)
		raw.do("PATCH", targetsPath+"/guarded/status", typeMergePatch, body).want(t, ok)
		raw.do("PATCH", targetsPath+"/guarded/status", typeJSONPatch, patch).want(t, ok)
		applied := bytes.Replace(body, []byte(`,"generation":99`), nil, 1)
		raw.do("PATCH", targetsPath+"/guarded/status?fieldManager=a&force=true", typeApply, applied).want(t, ok)
		after := get(t, "guarded")
		if after.Status.ObservedGeneration != 1 {
			t.Errorf("the status wasn't written: %+v", after.Status)
		}
		if *after.Spec.Replicas != 0 || after.Spec.Process.Command[0] != "sleep" || after.Generation != before.Generation {
			t.Errorf("the spec was written: generation %d, %+v", after.Generation, after.Spec)
		}
		if len(after.Labels)+len(after.Annotations)+len(after.OwnerReferences) > 0 || strings.Contains(fmt.Sprint(after.Finalizers), "example.com") {
			t.Errorf("the metadata was written: %+v", after.ObjectMeta)
		}
	})

	t.Run("forged metadata", func(t *testing.T) {
		forged := []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"forged","uid":"forged","generation":99,"creationTimestamp":"2001-01-01T00:00:00Z","deletionTimestamp":"2001-01-01T00:00:00Z"},"spec":{"replicas":0,"process":{"command":["sleep"]}}}`)
		target := raw.do("POST", targetsPath, typeJSON, forged).target(t)
		if target.UID == "forged" || target.Generation != 1 || target.CreationTimestamp.Year() == 2001 || target.DeletionTimestamp != nil {
			t.Errorf("created as %+v", target.ObjectMeta)
		}
		change := func(change func(*v1.Target)) answer {
			changed := get(t, "forged")
			change(changed)
			body, err := json.Marshal(changed)
			if err != nil {
				t.Fatal(err)
			}
			return raw.do("PUT", targetsPath+"/forged", typeJSON, body)
		}
		change(func(t *v1.Target) { t.UID = "forged" }).want(t, conflict, "UID")
		raw.do("PATCH", targetsPath+"/forged", typeMergePatch, []byte(`{"metadata":{"uid":"forged"}}`)).want(t, []int{http.StatusConflict, http.StatusUnprocessableEntity})
		change(func(t *v1.Target) {
			t.Generation = 99
			t.CreationTimestamp = metav1.Date(2001, 1, 1, 0, 0, 0, 0, time.UTC)
		})
		raw.do("PATCH", targetsPath+"/forged", typeMergePatch, []byte(`{"metadata":{"generation":99}}`)).want(t, ok)
		if after := get(t, "forged"); after.UID != target.UID || after.Generation != 1 || !after.CreationTimestamp.Equal(&target.CreationTimestamp) {
			t.Errorf("updated to %+v, want %+v", after.ObjectMeta, target.ObjectMeta)
		}
		raw.do("POST", targetsPath, typeJSON, []byte(`{"apiVersion":"streaming.aaserver.io/v1","kind":"Target","metadata":{"name":"versioned","resourceVersion":"5"},"spec":{"replicas":0,"process":{"command":["sleep"]}}}`)).
			want(t, []int{http.StatusBadRequest, http.StatusUnprocessableEntity, http.StatusInternalServerError}, "resourceVersion")
	})

	t.Run("deletion of what it isn't", func(t *testing.T) {
		target := mustCreate(t, "kept")
		for name, options := range map[string]metav1.DeleteOptions{
			"another UID":      {Preconditions: metav1.NewUIDPreconditions("other")},
			"another version":  {Preconditions: metav1.NewRVDeletionPrecondition("1").Preconditions},
			"one of both only": {Preconditions: &metav1.Preconditions{UID: &target.UID, ResourceVersion: ptr.To("1")}},
		} {
			options.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "DeleteOptions"}
			body, err := json.Marshal(options)
			if err != nil {
				t.Fatal(err)
			}
			if answer := raw.do("DELETE", targetsPath+"/kept", typeJSON, body); answer.code != http.StatusConflict {
				t.Errorf("%s: code %d: %s", name, answer.code, answer.body)
			}
		}
		raw.do("DELETE", targetsPath+"/kept", typeJSON, []byte(`{"kind":"Target"}`)).want(t, badRequest)
		raw.do("DELETE", targetsPath+"/kept", typeJSON, []byte(`{"kind":"DeleteOptions","apiVersion":"v1","propagationPolicy":"Sometimes"}`)).want(t, invalid, "propagationPolicy")
		raw.do("DELETE", targetsPath+"/kept", typeJSON, []byte(`{"kind":"DeleteOptions","apiVersion":"v1","gracePeriodSeconds":"soon"}`)).want(t, badRequest)
		if got := get(t, "kept"); got.UID != target.UID || got.DeletionTimestamp != nil {
			t.Errorf("it is %+v", got.ObjectMeta)
		}
	})

	t.Run("protobuf that isn't", func(t *testing.T) {
		mustCreate(t, "proto")
		whole := enveloped(protobufOf(t, idleTarget("truncated")))
		bodies := map[string][]byte{
			"nothing":                  {},
			"the magic number alone":   []byte("k8s\x00"),
			"another magic number":     []byte("k9s\x00" + string(whole[4:])),
			"JSON":                     idle("json", ""),
			"bytes without meaning":    append([]byte("k8s\x00"), bytes.Repeat([]byte{0xff}, 1024)...),
			"an object of such bytes":  enveloped(bytes.Repeat([]byte{0xff}, 1024)),
			"a group that never ends":  enveloped(bytes.Repeat([]byte{0x0b}, 1<<20)),
			"a length beyond the body": enveloped(binary.AppendUvarint([]byte{1<<3 | 2}, 1<<40)),
			"a length of 2 GiB":        enveloped(binary.AppendUvarint([]byte{2<<3 | 2}, 1<<31-1)),
			"a negative length":        enveloped(binary.AppendUvarint([]byte{2<<3 | 2}, 1<<63)),
			"an envelope's length":     append([]byte("k8s\x00"), binary.AppendUvarint([]byte{2<<3 | 2}, 1<<62)...),
		}
		for n := 5; n < len(whole); n += 3 {
			bodies[fmt.Sprintf("%d of %d bytes", n, len(whole))] = whole[:n]
		}
		s.wantBounded(t, 128<<20, func() {
			for name, body := range bodies {
				for method, path := range map[string]string{"POST": targetsPath, "PUT": targetsPath + "/proto"} {
					answer := raw.do(method, path, typeProtobuf, body)
					if answer.code != http.StatusBadRequest && answer.code != http.StatusUnprocessableEntity {
						t.Errorf("%s of %s: code %d, want 400 or 422: %s", method, name, answer.code, tail(answer.body, 300))
					}
				}
			}
		})
		raw.do("PATCH", targetsPath+"/proto", typeProtobuf, whole).want(t, unsupported)
		// What another version may know and we don't is skipped.
		later := append(protobufOf(t, idleTarget("later")), binary.AppendUvarint([]byte{0xfa, 0x01}, 3)...)
		raw.do("POST", targetsPath, typeProtobuf, enveloped(append(later, "abc"...))).want(t, created)
	})

	t.Run("classes", func(t *testing.T) {
		const classesPath = "/apis/streaming.aaserver.io/v1/targetclasses"
		class := func(name, spec string) []byte {
			return fmt.Appendf(nil, `{"apiVersion":"streaming.aaserver.io/v1","kind":"TargetClass","metadata":{"name":%q},"spec":%s}`, name, spec)
		}
		const wrong = `{"sources":["pod"],"users":["a","a"],"addresses":{"allow":["10.0.0.1/8"]},"ports":{"allowed":[{"port":0},{"port":65536},{"port":2,"endPort":1,"protocol":"SCTP"}]},"limits":{"sessionsPerUser":0}}`
		want := []string{
			"spec.sources[0]", "spec.users[1]", "spec.addresses.allow[0]", "spec.ports.allowed[0].port", "spec.ports.allowed[1].port",
			"spec.ports.allowed[2].endPort", "spec.ports.allowed[2].protocol", "spec.limits.sessionsPerUser",
		}
		wantCauses := func(t *testing.T, answer answer) {
			t.Helper()
			var status metav1.Status
			if err := json.Unmarshal([]byte(answer.body), &status); err != nil || answer.code != http.StatusUnprocessableEntity {
				t.Fatalf("code %d: %s", answer.code, answer.body)
			}
			var got []string
			for _, cause := range status.Details.Causes {
				got = append(got, cause.Field)
			}
			sorted := cmpopts.SortSlices(func(a, b string) bool { return a < b })
			if diff := cmp.Diff(want, got, sorted); diff != "" {
				t.Errorf("fields that are wrong (-want +got):\n%s", diff)
			}
		}
		wantCauses(t, raw.do("POST", classesPath, typeJSON, class("wrong", wrong)))
		raw.do("POST", classesPath, typeJSON, class("strict", `{}`)).want(t, created)
		wantCauses(t, raw.do("PUT", classesPath+"/strict", typeJSON, class("strict", wrong)))
		wantCauses(t, raw.do("PATCH", classesPath+"/strict", typeMergePatch, class("strict", wrong)))
		raw.do("PATCH", classesPath+"/strict?fieldManager=a", typeApply, class("strict", `{"sources":["pod"]}`)).want(t, invalid, "spec.sources[0]")
		raw.do("POST", classesPath, typeJSON, class("many", `{"agents":["`+strings.Repeat(`a","`, 10_000)+`a"]}`)).want(t, invalid, "spec.agents: Too many: 10001")
		r := s.run(binaries.kubectl, string(class("wrong", `{"limits":{"sessionsPerUser":0}}`)), "create", "-f", "-")
		wantContains(t, "kubectl", r.stderr, "spec.limits.sessionsPerUser: Invalid value: 0: must be greater than or equal to 1")
	})

	t.Run("encodings that aren't offered", func(t *testing.T) {
		raw.do("POST", targetsPath, "application/cbor", []byte("\xd9\xd9\xf7\xa0")).want(t, unsupported)
		raw.do("POST", targetsPath, "text/plain", idle("plain", "")).want(t, unsupported)
		raw.do("PATCH", targetsPath+"/fine", "application/strategic-merge-patch+json", []byte(`{}`)).want(t, ok)

		var bomb bytes.Buffer
		writer, err := gzip.NewWriterLevel(&bomb, gzip.BestCompression)
		if err != nil {
			t.Fatal(err)
		}
		zeros := make([]byte, 1<<20)
		for range 1 << 10 {
			writer.Write(zeros)
		}
		if err := writer.Close(); err != nil {
			t.Fatal(err)
		}
		s.wantBounded(t, 128<<20, func() {
			raw.do("POST", targetsPath, typeJSON, bomb.Bytes(), "Content-Encoding", "gzip").want(t, badRequest)
			raw.do("POST", targetsPath, typeProtobuf, bomb.Bytes(), "Content-Encoding", "gzip").want(t, badRequest)
		})
	})

	// Whatever was stored can be read, in every form, by list and by watch.
	list, err := targets.List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Items) == 0 {
		t.Fatal("nothing was stored")
	}
	s.kubectl("get", "targets", "-o", "yaml")
	s.kubectl("get", "targets", "-o", "wide")
	var jsonList v1.TargetList
	if err := json.Unmarshal([]byte(raw.do("GET", targetsPath, "", nil, "Accept", typeJSON).body), &jsonList); err != nil {
		t.Error(err)
	}
	if len(jsonList.Items) != len(list.Items) {
		t.Errorf("%d targets in JSON, %d in protobuf", len(jsonList.Items), len(list.Items))
	}
	watcher, err := targets.Watch(t.Context(), metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Stop()
	seen := map[types.UID]bool{}
	for len(seen) < len(list.Items) {
		select {
		case event, open := <-watcher.ResultChan():
			target, isTarget := event.Object.(*v1.Target)
			if !open || !isTarget {
				t.Fatalf("after %d targets, the watch said %+v", len(seen), event)
			}
			seen[target.UID] = true
		case <-time.After(30 * time.Second):
			t.Fatalf("%d of %d targets were watched", len(seen), len(list.Items))
		}
	}
	s.stop(syscall.SIGTERM, 30*time.Second)
	if output := s.output(); strings.Contains(output, "panic") {
		t.Errorf("the server panicked:\n%s", tail(output, 8<<10))
	}
}
