// Package charts tests the Helm chart, and keeps what is made from it up to
// date: with -update, the tests write their golden files, the table of values
// in the chart's README and hack/deploy/aaserver.yaml instead of comparing.
//
// Helm is pinned in hack/tools/go.mod, and built by the first test that runs it.
package charts

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	serializer "k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/sets"
	auditpolicy "k8s.io/apiserver/pkg/audit/policy"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	logsapi "k8s.io/component-base/logs/api/v1"
	"k8s.io/component-base/metrics"
	"sigs.k8s.io/yaml"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	"aaserver.io/aaserver/internal/agent"
	"aaserver.io/aaserver/internal/server"
	"aaserver.io/aaserver/internal/session"
)

var update = flag.Bool("update", false, "write what is generated instead of comparing it")

const (
	root      = ".."
	chart     = "aaserver"
	release   = "aaserver"
	namespace = "aaserver-system"
)

// helm returns the path of the pinned Helm.
var helm = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("go", "tool", "-n", "-modfile=hack/tools/go.mod", "helm")
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off")
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return "", fmt.Errorf("building Helm: %w: %s", err, exit.Stderr)
	}
	return strings.TrimSpace(string(out)), err
})

// runHelm runs Helm without a cluster and without the user's settings.
// Further arguments may name a cluster. The error is what Helm printed.
func runHelm(t *testing.T, values string, args ...string) (string, error) {
	t.Helper()
	binary, err := helm()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cmd := exec.Command(binary, append(args, "--namespace", namespace, "--values", "-")...)
	cmd.Stdin = strings.NewReader(values)
	cmd.Env = []string{
		"HOME=" + dir,
		"PATH=" + os.Getenv("PATH"),
		"HELM_CACHE_HOME=" + dir, "HELM_CONFIG_HOME=" + dir, "HELM_DATA_HOME=" + dir,
		"KUBECONFIG=" + filepath.Join(dir, "none"),
	}
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("%w: %s", err, errOut.String())
	}
	return out.String(), nil
}

func render(t *testing.T, values string) []object {
	t.Helper()
	out, err := runHelm(t, values, "template", release, chart)
	if err != nil {
		t.Fatal(err)
	}
	return decode(t, out)
}

// object is one rendered document.
type object struct {
	text string
	meta metav1.PartialObjectMetadata
	// typed is what the text is decoded to.
	typed any
}

// Kinds that client-go's scheme doesn't have, as far as the chart uses them.
type (
	apiService struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			Group                string `json:"group"`
			Version              string `json:"version"`
			GroupPriorityMinimum int32  `json:"groupPriorityMinimum"`
			VersionPriority      int32  `json:"versionPriority"`
			Service              struct {
				Name      string `json:"name"`
				Namespace string `json:"namespace"`
				Port      int32  `json:"port"`
			} `json:"service"`
			CABundle []byte `json:"caBundle"`
		} `json:"spec"`
	}
	issuerRef struct {
		Name  string `json:"name"`
		Kind  string `json:"kind"`
		Group string `json:"group"`
	}
	issuer struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			SelfSigned *struct{} `json:"selfSigned"`
			CA         *struct {
				SecretName string `json:"secretName"`
			} `json:"ca"`
		} `json:"spec"`
	}
	certificate struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			IsCA        bool            `json:"isCA"`
			CommonName  string          `json:"commonName"`
			DNSNames    []string        `json:"dnsNames"`
			SecretName  string          `json:"secretName"`
			Duration    metav1.Duration `json:"duration"`
			RenewBefore metav1.Duration `json:"renewBefore"`
			Usages      []string        `json:"usages"`
			PrivateKey  struct {
				Algorithm      string `json:"algorithm"`
				Size           int    `json:"size"`
				RotationPolicy string `json:"rotationPolicy"`
			} `json:"privateKey"`
			IssuerRef issuerRef `json:"issuerRef"`
		} `json:"spec"`
	}
	serviceMonitor struct {
		metav1.TypeMeta   `json:",inline"`
		metav1.ObjectMeta `json:"metadata"`
		Spec              struct {
			Selector  metav1.LabelSelector `json:"selector"`
			Endpoints []struct {
				Port            string `json:"port"`
				Scheme          string `json:"scheme"`
				Interval        string `json:"interval"`
				BearerTokenFile string `json:"bearerTokenFile"`
				TLSConfig       struct {
					ServerName string `json:"serverName"`
					CA         struct {
						Secret corev1.SecretKeySelector `json:"secret"`
					} `json:"ca"`
				} `json:"tlsConfig"`
			} `json:"endpoints"`
		} `json:"spec"`
	}
)

var foreignKinds = map[string]func() any{
	"apiregistration.k8s.io/v1/APIService":    func() any { return new(apiService) },
	"cert-manager.io/v1/Issuer":               func() any { return new(issuer) },
	"cert-manager.io/v1/Certificate":          func() any { return new(certificate) },
	"monitoring.coreos.com/v1/ServiceMonitor": func() any { return new(serviceMonitor) },
}

// decode splits documents and decodes each. Fields that its kind doesn't have,
// or that are there twice, are errors.
func decode(t *testing.T, text string) []object {
	t.Helper()
	strict := serializer.NewSerializerWithOptions(serializer.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, serializer.SerializerOptions{Yaml: true, Strict: true})
	var objects []object
	for document := range strings.SplitSeq("\n"+text, "\n---\n") {
		document = strings.Trim(document, "\n") + "\n"
		o := object{text: document}
		if err := yaml.Unmarshal([]byte(document), &o.meta); err != nil {
			t.Fatalf("%v in:\n%s", err, document)
		}
		if o.meta.Kind == "" {
			continue
		}
		var err error
		if newKind, ok := foreignKinds[o.meta.APIVersion+"/"+o.meta.Kind]; ok {
			o.typed = newKind()
			err = yaml.UnmarshalStrict([]byte(document), o.typed)
		} else {
			o.typed, _, err = strict.Decode([]byte(document), nil, nil)
		}
		if err != nil {
			t.Fatalf("%v in:\n%s", err, document)
		}
		objects = append(objects, o)
	}
	if len(objects) == 0 {
		t.Fatal("nothing was rendered")
	}
	return objects
}

// all returns the objects of one type.
func all[T any](objects []object) []T {
	var found []T
	for _, o := range objects {
		if typed, ok := o.typed.(T); ok {
			found = append(found, typed)
		}
	}
	return found
}

// only returns the one object of a type.
func only[T any](t *testing.T, objects []object) T {
	t.Helper()
	found := all[T](objects)
	if len(found) != 1 {
		t.Fatalf("there are %d objects of type %T, want 1", len(found), *new(T))
	}
	return found[0]
}

// apiServices returns those of the served versions: alike, and the later the
// version, the higher its priority.
func apiServices(t *testing.T, objects []object) []*apiService {
	t.Helper()
	apis := all[*apiService](objects)
	slices.SortFunc(apis, func(a, b *apiService) int { return int(b.Spec.VersionPriority - a.Spec.VersionPriority) })
	var got []string
	for _, api := range apis {
		got = append(got, api.Name)
		if api.Name != api.Spec.Version+"."+api.Spec.Group {
			t.Errorf("the APIService %s is of version %s of %s", api.Name, api.Spec.Version, api.Spec.Group)
		}
		alike := *api
		alike.Name, alike.Spec.Version, alike.Spec.VersionPriority = apis[0].Name, apis[0].Spec.Version, apis[0].Spec.VersionPriority
		if diff := cmp.Diff(apis[0], &alike); diff != "" {
			t.Errorf("the APIServices differ (-%s +%s):\n%s", apis[0].Name, api.Name, diff)
		}
	}
	if diff := cmp.Diff([]string{"v1.streaming.aaserver.io", "v1alpha1.streaming.aaserver.io"}, got); diff != "" {
		t.Fatalf("APIServices by their priority (-want +got):\n%s", diff)
	}
	return apis
}

// Values by storage and by the way to certificates. Every one of the first is
// rendered with every one of the second.
var (
	storages = map[string]string{
		"sqlite":   "storage: {type: sqlite}\n",
		"etcd":     "storage: {type: etcd, etcd: {servers: ['https://etcd-0:2379', 'https://etcd-1:2379'], tlsSecretName: etcd-client}}\n",
		"postgres": "storage: {type: postgres, postgres: {secretName: database}}\n",
	}
	certificateSources = map[string]string{
		"generated":   "certificates: {source: generated}\n",
		"certmanager": "certificates: {source: certManager}\n",
		"secret":      "certificates: {source: secret, secret: {name: serving, caBundle: \"-----BEGIN CERTIFICATE-----\\nMA==\\n-----END CERTIFICATE-----\\n\"}}\n",
	}
)

// everything sets each value that the other cases leave at its default.
const everything = `
image: {repository: registry.example.com/aaserver, digest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef", pullPolicy: Always}
imagePullSecrets: [{name: pull}]
replicas: 1
storage: {type: etcd, etcd: {servers: ["http://etcd:2379"]}}
embeddedAgent: edge
persistence: {storageClassName: fast, accessMode: ReadWriteOncePod, size: 10Gi}
certificates: {source: certManager, certManager: {issuerRef: {name: corporate, kind: ClusterIssuer}}}
shutdown: {delaySeconds: 10, drainSeconds: 300}
logLevel: 4
audit: {enabled: true}
extraArgs: ["--max-sessions=100"]
extraEnv: [{name: TZ, value: UTC}]
extraVolumes: [{name: config, configMap: {name: config}}]
extraVolumeMounts: [{name: config, mountPath: /config}]
service: {port: 8443, annotations: {example.com/service: "true"}}
rbac:
  extraRules: [{apiGroups: [example.com], resources: [limits], verbs: [list, watch]}]
  streamsFrom: admin
serviceAccount: {name: server, annotations: {example.com/account: "true"}}
networkPolicy: {from: [{ipBlock: {cidr: 10.0.0.0/8}}]}
metrics:
  serviceMonitor: {enabled: true, interval: 1m, labels: {release: prometheus}}
  dashboard: {enabled: true, labels: {grafana_dashboard: "1"}}
nodeSelector: {kubernetes.io/os: linux}
tolerations: [{key: node-role.kubernetes.io/control-plane, operator: Exists}]
topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app.kubernetes.io/name: apis}}}]
affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: disk, operator: Exists}]}]}}}
priorityClassName: system-cluster-critical
podAnnotations: {example.com/pod: "true"}
podLabels: {team: infra}
nameOverride: apis
fullnameOverride: targets-api
`

func cases() map[string]string {
	cases := map[string]string{"everything": everything}
	for storage, storageValues := range storages {
		for source, sourceValues := range certificateSources {
			cases[storage+"-"+source] = storageValues + sourceValues
		}
	}
	return cases
}

func TestLint(t *testing.T) {
	for name, values := range cases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if out, err := runHelm(t, values, "lint", "--strict", chart); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	t.Run("default values", func(t *testing.T) {
		t.Parallel()
		if out, err := runHelm(t, "", "lint", "--strict", chart); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
}

func TestGolden(t *testing.T) {
	for name, values := range cases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			objects := render(t, values)
			checkTogether(t, objects)
			checkPod(t, objects)
			checkArgs(t, objects)
			var text strings.Builder
			for _, o := range objects {
				text.WriteString("---\n" + withoutSecrets(t, objects, o.text))
			}
			compare(t, filepath.Join("testdata", name+".yaml"), text.String())
		})
	}
}

// withoutSecrets replaces what is another at each rendering, once it is
// verified, and the dashboard, which is a file of its own.
func withoutSecrets(t *testing.T, objects []object, text string) string {
	t.Helper()
	for _, secret := range all[*corev1.Secret](objects) {
		for key, value := range secret.Data {
			text = strings.ReplaceAll(text, base64.StdEncoding.EncodeToString(value), "<"+key+">")
		}
		for key, value := range secret.Annotations {
			text = strings.ReplaceAll(text, value, "<"+key+">")
		}
	}
	if before, _, ok := strings.Cut(text, ".json: |\n"); ok {
		text = before + ".json: <dashboards/aaserver.json>\n"
	}
	return text
}

// compare compares a file with what it should be, or writes it.
func compare(t *testing.T, path, want string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatalf("%v: run go test ./charts -update", err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("%s is out of date: run go test ./charts -update (-want +got):\n%s", path, diff)
	}
}

// TestGoldenFiles finds those that no case has any more.
func TestGoldenFiles(t *testing.T) {
	entries, err := os.ReadDir("testdata")
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for _, entry := range entries {
		got = append(got, entry.Name())
	}
	for name := range cases() {
		want = append(want, name+".yaml")
	}
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" && !*update {
		t.Errorf("golden files (-want +got):\n%s", diff)
	}
}

// checkTogether checks that objects refer to each other rightly.
func checkTogether(t *testing.T, objects []object) {
	t.Helper()
	deployment := only[*appsv1.Deployment](t, objects)
	service := only[*corev1.Service](t, objects)
	apis := apiServices(t, objects)
	pod := deployment.Spec.Template

	podLabels := labels.Set(pod.Labels)
	selectors := map[string]labels.Selector{
		"Deployment": selector(t, deployment.Spec.Selector),
		"Service":    labels.SelectorFromSet(service.Spec.Selector),
	}
	for _, o := range all[*networkingv1.NetworkPolicy](objects) {
		selectors["NetworkPolicy"] = selector(t, &o.Spec.PodSelector)
	}
	for _, o := range all[*policyv1.PodDisruptionBudget](objects) {
		selectors["PodDisruptionBudget"] = selector(t, o.Spec.Selector)
	}
	for kind, s := range selectors {
		if s.Empty() || !s.Matches(podLabels) {
			t.Errorf("the %s selects %q, pods have %q", kind, s, podLabels)
		}
	}
	for _, o := range all[*serviceMonitor](objects) {
		if s := selector(t, &o.Spec.Selector); !s.Matches(labels.Set(service.Labels)) {
			t.Errorf("the ServiceMonitor selects %q, the Service has %q", s, service.Labels)
		}
		if o.Spec.Endpoints[0].Port != service.Spec.Ports[0].Name {
			t.Errorf("the ServiceMonitor's port is %q, the Service's %q", o.Spec.Endpoints[0].Port, service.Spec.Ports[0].Name)
		}
	}

	// All are alike.
	api := apis[0]
	at := api.Spec.Service
	if at.Name != service.Name || at.Namespace != service.Namespace || at.Port != service.Spec.Ports[0].Port {
		t.Errorf("the APIService is at %+v, the Service is %s/%s:%d", at, service.Namespace, service.Name, service.Spec.Ports[0].Port)
	}
	serverName := at.Name + "." + at.Namespace + ".svc"
	for _, o := range all[*corev1.Secret](objects) {
		if !bytes.Equal(o.Data["ca.crt"], api.Spec.CABundle) {
			t.Error("the APIService trusts another CA than the Secret's")
		}
		verify(t, o.Data, serverName)
	}
	for _, o := range all[*certificate](objects) {
		if !o.Spec.IsCA && !slices.Contains(o.Spec.DNSNames, serverName) {
			t.Errorf("the Certificate is for %q, kube-apiserver asks for %q", o.Spec.DNSNames, serverName)
		}
		if want := o.Namespace + "/" + o.Name; !o.Spec.IsCA && api.Annotations["cert-manager.io/inject-ca-from"] != want {
			t.Errorf("the APIService's annotations are %q, want the CA of %s", api.Annotations, want)
		}
	}
	if all[*certificate](objects) == nil && len(api.Spec.CABundle) == 0 {
		t.Error("the APIService has no caBundle")
	}

	// What the pod mounts is of the chart, or named in the values.
	there := sets.New[string]()
	for _, o := range objects {
		there.Insert(o.meta.Kind + "/" + o.meta.Name)
	}
	for _, o := range all[*certificate](objects) {
		there.Insert("Secret/" + o.Spec.SecretName)
	}
	there.Insert("Secret/etcd-client", "Secret/serving", "Secret/aaserver-tls", "ConfigMap/config")
	volumes := sets.New[string]()
	for _, v := range pod.Spec.Volumes {
		volumes.Insert(v.Name)
		var from string
		switch {
		case v.Secret != nil:
			from = "Secret/" + v.Secret.SecretName
		case v.ConfigMap != nil:
			from = "ConfigMap/" + v.ConfigMap.Name
		case v.PersistentVolumeClaim != nil:
			from = "PersistentVolumeClaim/" + v.PersistentVolumeClaim.ClaimName
		default:
			continue
		}
		if !there.Has(from) {
			t.Errorf("the volume %s is of %s, which nobody makes", v.Name, from)
		}
	}
	mounted := sets.New[string]()
	for _, m := range pod.Spec.Containers[0].VolumeMounts {
		mounted.Insert(m.Name)
	}
	if diff := cmp.Diff(sets.List(volumes), sets.List(mounted)); diff != "" {
		t.Errorf("volumes and what is mounted differ (-volumes +mounted):\n%s", diff)
	}

	account := rbacv1.Subject{Kind: "ServiceAccount", Name: pod.Spec.ServiceAccountName, Namespace: deployment.Namespace}
	there.Insert("ClusterRole/system:auth-delegator", "Role/extension-apiserver-authentication-reader")
	binding := func(name string, ref rbacv1.RoleRef, subjects []rbacv1.Subject) {
		if !there.Has(ref.Kind + "/" + ref.Name) {
			t.Errorf("%s binds %s %s, which nobody makes", name, ref.Kind, ref.Name)
		}
		if diff := cmp.Diff([]rbacv1.Subject{account}, subjects); diff != "" {
			t.Errorf("%s binds to others than the server (-want +got):\n%s", name, diff)
		}
	}
	for _, o := range all[*rbacv1.ClusterRoleBinding](objects) {
		binding(o.Name, o.RoleRef, o.Subjects)
	}
	for _, o := range all[*rbacv1.RoleBinding](objects) {
		binding(o.Name, o.RoleRef, o.Subjects)
	}

	for _, o := range all[*corev1.ConfigMap](objects) {
		if policy, ok := o.Data["policy.yaml"]; ok {
			if _, err := auditpolicy.LoadPolicyFromBytes([]byte(policy)); err != nil {
				t.Errorf("the audit policy: %v", err)
			}
		}
	}
}

func selector(t *testing.T, s *metav1.LabelSelector) labels.Selector {
	t.Helper()
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		t.Fatal(err)
	}
	return selector
}

// verify checks a serving certificate as kube-aggregator does.
func verify(t *testing.T, data map[string][]byte, serverName string) {
	t.Helper()
	pair, err := tls.X509KeyPair(data["tls.crt"], data["tls.key"])
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(data["ca.crt"]) {
		t.Fatal("ca.crt has no certificate")
	}
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{DNSName: serverName, Roots: roots}); err != nil {
		t.Error(err)
	}
}

// checkPod checks what holds for every pod: it is fit for a namespace with the
// Pod Security Standard restricted, and for the storage that it has.
func checkPod(t *testing.T, objects []object) {
	t.Helper()
	deployment := only[*appsv1.Deployment](t, objects)
	pod := deployment.Spec.Template.Spec
	container := pod.Containers[0]
	no, yes := false, true

	wantContext := &corev1.SecurityContext{
		AllowPrivilegeEscalation: &no,
		ReadOnlyRootFilesystem:   &yes,
		Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
	}
	if diff := cmp.Diff(wantContext, container.SecurityContext); diff != "" {
		t.Errorf("the container's security context (-want +got):\n%s", diff)
	}
	if c := pod.SecurityContext; c.RunAsNonRoot == nil || !*c.RunAsNonRoot || c.SeccompProfile == nil || c.SeccompProfile.Type != corev1.SeccompProfileTypeRuntimeDefault {
		t.Errorf("the pod's security context is %v, want non-root and the runtime's seccomp profile", c)
	}
	for name, probe := range map[string]*corev1.Probe{"/livez": container.LivenessProbe, "/readyz": container.ReadinessProbe} {
		if probe == nil || probe.HTTPGet == nil || probe.HTTPGet.Path != name || probe.HTTPGet.Scheme != corev1.URISchemeHTTPS {
			t.Errorf("there is no probe of %s", name)
		}
	}

	var stateful bool
	for _, arg := range container.Args {
		stateful = stateful || strings.HasPrefix(arg, "--storage-endpoint=sqlite") || strings.HasPrefix(arg, "--embedded-agent")
		if strings.Contains(arg, "postgres://") {
			t.Errorf("the argument %q shows the database's password to whoever may see pods", arg)
		}
	}
	budgets := len(all[*policyv1.PodDisruptionBudget](objects))
	if stateful {
		if *deployment.Spec.Replicas != 1 || deployment.Spec.Strategy.Type != appsv1.RecreateDeploymentStrategyType || budgets != 0 {
			t.Errorf("replicas %d, strategy %s, disruption budgets %d, want one server at a time and no budget, which would keep its node from being drained",
				*deployment.Spec.Replicas, deployment.Spec.Strategy.Type, budgets)
		}
		if len(all[*corev1.PersistentVolumeClaim](objects)) != 1 {
			t.Error("there is no claim of a volume")
		}
		return
	}
	if *deployment.Spec.Replicas != 2 || deployment.Spec.Strategy.Type != appsv1.RollingUpdateDeploymentStrategyType || budgets != 1 {
		t.Errorf("replicas %d, strategy %s, disruption budgets %d, want two servers, rolled, with a budget",
			*deployment.Spec.Replicas, deployment.Spec.Strategy.Type, budgets)
	}
	if pod.Affinity == nil || pod.Affinity.PodAntiAffinity == nil {
		t.Error("there is no anti-affinity")
	}
}

// parsing is held while the server's options are made and used: some of them
// are the process's.
var parsing sync.Mutex

// checkArgs checks that the server takes the arguments it is given.
func checkArgs(t *testing.T, objects []object) {
	t.Helper()
	args := only[*appsv1.Deployment](t, objects).Spec.Template.Spec.Containers[0].Args
	if args[0] != "serve" {
		t.Fatalf("the command is %q, want serve", args[0])
	}
	args = slices.Clone(args[1:])
	for i := range args {
		args[i] = strings.ReplaceAll(args[i], "$(AASERVER_STORAGE_ENDPOINT)", "postgres://user:password@host/database")
	}
	parsing.Lock()
	defer parsing.Unlock()
	opts := server.NewServeOptions()
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	opts.AddFlags(flags)
	logsapi.AddFlags(logsapi.NewLoggingConfiguration(), flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	if err := opts.Validate(); err != nil {
		t.Error(err)
	}
}

func TestSchema(t *testing.T) {
	for name, tt := range map[string]struct {
		values string
		want   string // part of the error, "" if there is none
	}{
		"SQLite has one replica":                     {"replicas: 2", "at '/replicas': maximum: got 2, want 1"},
		"SQLite may be scaled to nothing":            {"replicas: 0", ""},
		"an embedded agent has one replica":          {storages["etcd"] + "embeddedAgent: edge\nreplicas: 2", "at '/replicas': maximum: got 2, want 1"},
		"etcd may have three replicas":               {storages["etcd"] + "replicas: 3", ""},
		"PostgreSQL may have three replicas":         {storages["postgres"] + "replicas: 3", ""},
		"replicas are not negative":                  {storages["etcd"] + "replicas: -1", "at '/replicas': minimum"},
		"etcd needs servers":                         {"storage: {type: etcd}", "at '/storage/etcd/servers': minItems"},
		"etcd's servers are URLs":                    {"storage: {type: etcd, etcd: {servers: ['etcd:2379']}}", "at '/storage/etcd/servers/0'"},
		"a server is one server":                     {"storage: {type: etcd, etcd: {servers: ['http://a:1,http://b:2']}}", "at '/storage/etcd/servers/0'"},
		"PostgreSQL needs a Secret":                  {"storage: {type: postgres}", "at '/storage/postgres/secretName': minLength"},
		"a database's URL is no value":               {"storage: {type: postgres, postgres: {endpoint: 'postgres://u:p@h/d'}}", "additional properties 'endpoint' not allowed"},
		"other storage is unknown":                   {"storage: {type: mysql}", "at '/storage/type': value must be one of 'etcd', 'postgres', 'sqlite'"},
		"other certificates are unknown":             {"certificates: {source: none}", "at '/certificates/source'"},
		"a certificate of one's own needs a Secret":  {"certificates: {source: secret}", "at '/certificates/secret/name': minLength"},
		"a CA is PEM":                                {"certificates: {source: secret, secret: {name: a, caBundle: TUE9PQ==}}", "at '/certificates/secret/caBundle'"},
		"an issuer has a name":                       {"certificates: {source: certManager, certManager: {issuerRef: {kind: Issuer}}}", "missing property 'name'"},
		"an agent's name is a DNS name":              {storages["etcd"] + "embeddedAgent: Edge_17", "at '/embeddedAgent'"},
		"streams are of edit, admin or none":         {"rbac: {streamsFrom: view}", "at '/rbac/streamsFrom'"},
		"an audit policy has rules":                  {"audit: {enabled: true, policy: {rules: []}}", "at '/audit/policy/rules': minItems"},
		"a misspelt value is refused":                {"replicaCount: 2", "additional properties 'replicaCount' not allowed"},
		"a misspelt value within another is refused": {"storage: {type: sqlite, etcd: {endpoints: []}}", "additional properties 'endpoints' not allowed"},
		"a parent chart's global values are let be":  {"global: {anything: true}", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := runHelm(t, tt.values, "template", release, chart)
			switch {
			case err == nil && tt.want != "":
				t.Errorf("it is accepted, want an error with %q", tt.want)
			case err != nil && (tt.want == "" || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestSchemaIsComplete finds values that the schema doesn't have, and what only
// the schema has.
func TestSchemaIsComplete(t *testing.T) {
	type node struct {
		Properties map[string]json.RawMessage `json:"properties"`
		Additional *bool                      `json:"additionalProperties"`
	}
	text, err := os.ReadFile(filepath.Join(chart, "values.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	var walk func(path string, schema json.RawMessage, values map[string]any)
	walk = func(path string, schema json.RawMessage, values map[string]any) {
		var n node
		// additionalProperties may be a schema: then the keys are free.
		if err := json.Unmarshal(schema, &n); err != nil || n.Additional == nil {
			return
		}
		if diff := cmp.Diff(slices.Sorted(maps.Keys(values)), slices.Sorted(maps.Keys(n.Properties))); diff != "" {
			t.Errorf("values below %q (-values.yaml +values.schema.json):\n%s", path, diff)
		}
		for key, value := range values {
			if child, ok := value.(map[string]any); ok {
				walk(path+"."+key, n.Properties[key], child)
			}
		}
	}
	values := defaults(t)
	values["global"] = nil // Helm's own
	// An issuer has no default: its keys are the schema's alone.
	dig(t, values, "certificates.certManager")["issuerRef"] = map[string]any{"name": nil, "kind": nil, "group": nil}
	walk("", text, values)
}

func defaults(t *testing.T) map[string]any {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := yaml.UnmarshalStrict(text, &values); err != nil {
		t.Fatal(err)
	}
	return values
}

func dig(t *testing.T, values map[string]any, path string) map[string]any {
	t.Helper()
	for key := range strings.SplitSeq(path, ".") {
		child, ok := values[key].(map[string]any)
		if !ok {
			t.Fatalf("values.yaml has no map %s", path)
		}
		values = child
	}
	return values
}

// TestUserRoles goes by the labels, as kube-controller-manager does when it
// aggregates.
func TestUserRoles(t *testing.T) {
	const aggregateTo = "rbac.authorization.k8s.io/aggregate-to-"
	streams := []string{"exec", "attach", "portforward", "port-forward"}
	may := func(rules []rbacv1.PolicyRule, verb, resource string) bool {
		return slices.ContainsFunc(rules, func(r rbacv1.PolicyRule) bool {
			return slices.Equal(r.APIGroups, []string{"streaming.aaserver.io"}) && slices.Contains(r.Verbs, verb) && slices.Contains(r.Resources, resource)
		})
	}
	for name, tt := range map[string]struct {
		values               string
		reads, writes, enter []string // the built-in roles that may
	}{
		"by default": {
			reads:  []string{"view", "edit", "admin"},
			writes: []string{"edit", "admin"},
			enter:  []string{"edit", "admin"},
		},
		"streams from admin on": {
			values: "rbac: {streamsFrom: admin}",
			reads:  []string{"view", "edit", "admin"},
			writes: []string{"edit", "admin"},
			enter:  []string{"admin"},
		},
		"no streams": {
			values: "rbac: {streamsFrom: none}",
			reads:  []string{"view", "edit", "admin"},
			writes: []string{"edit", "admin"},
		},
		"no aggregation": {
			values: "rbac: {aggregate: false}",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			objects := render(t, tt.values)
			for _, role := range []string{"view", "edit", "admin"} {
				var rules []rbacv1.PolicyRule
				for _, o := range all[*rbacv1.ClusterRole](objects) {
					if o.Labels[aggregateTo+role] == "true" {
						rules = append(rules, o.Rules...)
					}
				}
				check := func(verb, resource string, roles []string) {
					t.Helper()
					if got, want := may(rules, verb, resource), slices.Contains(roles, role); got != want {
						t.Errorf("%s may %s %s: %t, want %t", role, verb, resource, got, want)
					}
				}
				for _, verb := range []string{"get", "list", "watch"} {
					check(verb, "targets", tt.reads)
				}
				for _, subresource := range []string{"status", "scale", "log", "logs"} {
					check("get", "targets/"+subresource, tt.reads)
				}
				for _, verb := range []string{"create", "update", "patch", "delete", "deletecollection"} {
					check(verb, "targets", tt.writes)
				}
				for _, verb := range []string{"update", "patch"} {
					check(verb, "targets/scale", tt.writes)
					// It tells where to find a port: nobody but agents may say.
					check(verb, "targets/status", nil)
				}
				for _, subresource := range streams {
					check("get", "targets/"+subresource, tt.enter)
					check("create", "targets/"+subresource, tt.enter)
				}
			}
		})
	}
}

// TestServerRules keeps the server's own permissions to what they are for: one
// more has to be written down here, and in the chart with its reason.
func TestServerRules(t *testing.T) {
	objects := render(t, "")
	var text string
	var role *rbacv1.ClusterRole
	for _, o := range objects {
		if typed, ok := o.typed.(*rbacv1.ClusterRole); ok && typed.Name == release {
			role, text = typed, o.text
		}
	}
	if role == nil {
		t.Fatal("the server has no ClusterRole")
	}
	got := map[string]string{}
	for _, rule := range role.Rules {
		for _, resource := range rule.Resources {
			got[rule.APIGroups[0]+"/"+resource] += strings.Join(rule.Verbs, " ")
		}
	}
	want := map[string]string{
		"/namespaces":            "get list watch",
		"/events":                "create patch",
		"/resourcequotas":        "list watch",
		"/resourcequotas/status": "update",
		"admissionregistration.k8s.io/mutatingadmissionpolicies":         "list watch",
		"admissionregistration.k8s.io/mutatingadmissionpolicybindings":   "list watch",
		"admissionregistration.k8s.io/mutatingwebhookconfigurations":     "list watch",
		"admissionregistration.k8s.io/validatingadmissionpolicies":       "list watch",
		"admissionregistration.k8s.io/validatingadmissionpolicybindings": "list watch",
		"admissionregistration.k8s.io/validatingwebhookconfigurations":   "list watch",
		"flowcontrol.apiserver.k8s.io/flowschemas":                       "list watch",
		"flowcontrol.apiserver.k8s.io/prioritylevelconfigurations":       "list watch",
		"networking.k8s.io/servicecidrs":                                 "list watch",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what the server may do (-want +got):\n%s", diff)
	}
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		if strings.HasPrefix(line, "- apiGroups:") && !strings.HasPrefix(lines[i-1], "# ") {
			t.Errorf("line %d is a rule without a reason:\n%s", i+1, text)
		}
	}
}

func TestNotes(t *testing.T) {
	for name, tt := range map[string]struct {
		values   string
		want     []string
		wantNone []string
	}{
		"SQLite": {
			want:     []string{"kubectl wait apiservice/v1.streaming.aaserver.io", "the claim aaserver", "3650 days", "exec, attach and port-forward"},
			wantNone: []string{"The agent"},
		},
		"PostgreSQL and a Secret": {
			values:   storages["postgres"] + certificateSources["secret"],
			want:     []string{"kubectl get targets"},
			wantNone: []string{"claim", "generated"},
		},
		"an embedded agent": {
			values: storages["etcd"] + "embeddedAgent: edge",
			want:   []string{"The agent edge runs inside the server", "leaves the claim"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			out, err := runHelm(t, tt.values, "install", release, chart, "--dry-run=client")
			if err != nil {
				t.Fatal(err)
			}
			_, notes, ok := strings.Cut(out, "\nNOTES:\n")
			if !ok {
				t.Fatalf("there are no notes in:\n%s", out)
			}
			for _, want := range tt.want {
				if !strings.Contains(notes, want) {
					t.Errorf("the notes lack %q:\n%s", want, notes)
				}
			}
			for _, wantNone := range tt.wantNone {
				if strings.Contains(notes, wantNone) {
					t.Errorf("the notes have %q:\n%s", wantNone, notes)
				}
			}
		})
	}
}

// TestDashboard finds metrics that the server doesn't have.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile(filepath.Join(chart, "dashboards", "aaserver.json"))
	if err != nil {
		t.Fatal(err)
	}
	have := sets.New[string]()
	register := func(m metrics.Registerable) error {
		have.Insert(m.FQName(), m.FQName()+"_bucket")
		return nil
	}
	if err := session.NewManager(session.Options{}).Register(register); err != nil {
		t.Fatal(err)
	}
	client, err := versioned.NewForConfig(&rest.Config{Host: "localhost"})
	if err != nil {
		t.Fatal(err)
	}
	embedded, err := agent.New(agent.Options{Name: "edge", Client: client})
	if err != nil {
		t.Fatal(err)
	}
	if err := embedded.Register(register); err != nil {
		t.Fatal(err)
	}

	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &dashboard); err != nil {
		t.Fatal(err)
	}
	used := sets.New[string]()
	name := regexp.MustCompile(`\baaserver_[a-z_]+`)
	for _, panel := range dashboard.Panels {
		if len(panel.Targets) == 0 {
			t.Errorf("the panel %q shows nothing", panel.Title)
		}
		for _, target := range panel.Targets {
			used.Insert(name.FindAllString(target.Expr, -1)...)
		}
	}
	if unknown := used.Difference(have); unknown.Len() > 0 || used.Len() == 0 {
		t.Errorf("the dashboard uses metrics that the server doesn't have: %v", sets.List(unknown))
	}
	for _, o := range all[*corev1.ConfigMap](render(t, "metrics: {dashboard: {enabled: true}}")) {
		if rendered := o.Data[release+".json"]; !json.Valid([]byte(rendered)) || strings.Contains(rendered, "AASERVER_") {
			t.Errorf("the rendered dashboard is not what Grafana can read:\n%s", rendered)
		}
	}
}

// TestReadme keeps the table of values.
func TestReadme(t *testing.T) {
	path := filepath.Join(chart, "README.md")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- begin values: made by go test ./charts -update -->\n", "<!-- end values -->\n"
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the table of values", path)
	}
	compare(t, path, before+begin+valuesTable(t)+end+after)
}

// valuesTable makes a row of each commented value. It knows as much of YAML as
// values.yaml needs: a comment stands above its key, keys are indented by two.
func valuesTable(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(chart, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	type row struct{ path, text string }
	var rows []row
	var path, comment []string
	key := regexp.MustCompile(`^( *)([A-Za-z]+):`)
	for line := range strings.Lines(string(text)) {
		line = strings.TrimRight(line, "\n")
		if c, ok := strings.CutPrefix(strings.TrimSpace(line), "# "); ok {
			comment = append(comment, c)
			continue
		}
		if m := key.FindStringSubmatch(line); m != nil {
			depth := len(m[1]) / 2
			if depth <= len(path) {
				path = append(slices.Clone(path[:depth]), m[2])
				if comment != nil {
					rows = append(rows, row{strings.Join(path, "."), strings.Join(comment, " ")})
				}
			}
		}
		comment = nil
	}

	documented := sets.New[string]()
	for _, r := range rows {
		documented.Insert(r.path)
	}
	hasChildren := func(path string) bool {
		return slices.ContainsFunc(rows, func(r row) bool { return strings.HasPrefix(r.path, path+".") })
	}
	values := map[string]any{}
	var walk func(prefix string, m map[string]any)
	walk = func(prefix string, m map[string]any) {
		for k, v := range m {
			path := prefix + k
			values[path] = v
			if child, ok := v.(map[string]any); ok && (!documented.Has(path) || hasChildren(path)) {
				walk(path+".", child)
			} else if !documented.Has(path) {
				t.Errorf("values.yaml has no comment above %s", path)
			}
		}
	}
	walk("", defaults(t))

	var table strings.Builder
	table.WriteString("| value | default | what it is |\n|---|---|---|\n")
	for _, r := range rows {
		def := ""
		if !hasChildren(r.path) {
			value, err := json.Marshal(values[r.path])
			if err != nil {
				t.Fatal(err)
			}
			if def = "`" + string(value) + "`"; len(def) > 60 {
				def = "see [values.yaml](values.yaml)"
			}
		}
		fmt.Fprintf(&table, "| `%s` | %s | %s |\n", r.path, def, strings.ReplaceAll(r.text, "|", `\|`))
	}
	return table.String()
}

// TestManifest keeps the manifest for those without Helm.
func TestManifest(t *testing.T) {
	dir := filepath.Join(root, "hack", "deploy")
	values, err := os.ReadFile(filepath.Join(dir, "values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	header, err := os.ReadFile(filepath.Join(dir, "header.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	objects := render(t, string(values))
	image := only[*appsv1.Deployment](t, objects).Spec.Template.Spec.Containers[0].Image
	// The APIServices are the first to be deleted. They don't mind to be the first
	// to be created.
	var first, rest []string
	for _, o := range objects {
		if o.meta.Kind == "APIService" {
			first = append(first, withoutHelm(o.text))
		} else {
			rest = append(rest, withoutHelm(o.text))
		}
	}
	documents := append(first,
		"apiVersion: v1\nkind: Namespace\nmetadata:\n  name: "+namespace+"\n  labels:\n    pod-security.kubernetes.io/enforce: restricted\n")
	text := strings.ReplaceAll(string(header), "aaserver:APPVERSION", image) + strings.Join(append(documents, rest...), "---\n")
	if strings.Contains(strings.ToLower(text[len(header):]), "helm") {
		t.Errorf("the manifest has something of Helm's left:\n%s", text)
	}
	decode(t, text)
	compare(t, filepath.Join(dir, "aaserver.yaml"), text)
}

// withoutHelm takes away what is for Helm alone.
func withoutHelm(text string) string {
	text = regexp.MustCompile(`(?m)^(# Source: .*| *helm\.sh/chart: .*| *app\.kubernetes\.io/managed-by: .*)\n`).ReplaceAllString(text, "")
	return regexp.MustCompile(`(?m)^  annotations:\n +# .*\n +helm\.sh/resource-policy: .*\n`).ReplaceAllString(text, "")
}
