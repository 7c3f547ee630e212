package charts

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/version"
)

const renewAfter = "streaming.aaserver.io/renew-after"

// clusterKinds are the kinds that the chart renders by default, by group and
// version, and whether they are namespaced.
var clusterKinds = map[string]map[string]bool{
	"v1":                           {"Namespace": false, "Secret": true, "Service": true, "ServiceAccount": true, "PersistentVolumeClaim": true},
	"apps/v1":                      {"Deployment": true},
	"networking.k8s.io/v1":         {"NetworkPolicy": true},
	"rbac.authorization.k8s.io/v1": {"ClusterRole": false, "ClusterRoleBinding": false, "Role": true, "RoleBinding": true},
	"apiregistration.k8s.io/v1":    {"APIService": false},
}

// renderIn renders in a cluster that has one Secret, or none: as much of a
// cluster as the chart looks at.
func renderIn(t *testing.T, secret *corev1.Secret, values string) ([]object, error) {
	t.Helper()
	objects := map[string]any{
		"/version": &version.Info{Major: "1", Minor: "37", GitVersion: "v1.37.0"},
		"/api":     &metav1.APIVersions{Versions: []string{"v1"}},
		"/api/v1/namespaces/kube-system": &corev1.Namespace{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"},
			ObjectMeta: metav1.ObjectMeta{Name: "kube-system"},
		},
	}
	// Helm looks up every kind that it renders, too.
	groups := &metav1.APIGroupList{}
	for group, kinds := range clusterKinds {
		path := "/apis/" + group
		if group == "v1" {
			path = "/api/v1"
		} else {
			version := metav1.GroupVersionForDiscovery{GroupVersion: group, Version: "v1"}
			groups.Groups = append(groups.Groups, metav1.APIGroup{
				Name:             strings.TrimSuffix(group, "/v1"),
				Versions:         []metav1.GroupVersionForDiscovery{version},
				PreferredVersion: version,
			})
		}
		resources := &metav1.APIResourceList{GroupVersion: group}
		for kind, namespaced := range kinds {
			plural, _ := meta.UnsafeGuessKindToResource(schema.FromAPIVersionAndKind(group, kind))
			resources.APIResources = append(resources.APIResources, metav1.APIResource{Name: plural.Resource, Kind: kind, Namespaced: namespaced, Verbs: metav1.Verbs{"get"}})
		}
		objects[path] = resources
	}
	objects["/apis"] = groups
	if secret != nil {
		secret = secret.DeepCopy()
		if secret.Annotations == nil {
			secret.Annotations = map[string]string{}
		}
		// Without these Helm takes it for somebody else's.
		secret.Annotations["meta.helm.sh/release-name"] = release
		secret.Annotations["meta.helm.sh/release-namespace"] = namespace
		secret.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}
		objects["/api/v1/namespaces/"+namespace+"/secrets/"+secret.Name] = secret
	}
	cluster := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", runtime.ContentTypeJSON)
		object, ok := objects[r.URL.Path]
		if !ok || r.Method != http.MethodGet {
			w.WriteHeader(http.StatusNotFound)
			object = apierrors.NewNotFound(corev1.Resource("objects"), r.URL.Path).Status()
		}
		if err := json.NewEncoder(w).Encode(object); err != nil {
			t.Errorf("answering %s: %v", r.URL, err)
		}
	}))
	defer cluster.Close()

	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"c",
		"clusters":[{"name":"c","cluster":{"server":"` + cluster.URL + `"}}],
		"contexts":[{"name":"c","context":{"cluster":"c"}}]}`
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := runHelm(t, values, "template", release, chart, "--dry-run=server", "--disable-openapi-validation", "--kubeconfig", kubeconfig)
	if err != nil {
		return nil, err
	}
	return decode(t, out), nil
}

// TestGeneratedCertificate goes through the life of one.
func TestGeneratedCertificate(t *testing.T) {
	const serverName = release + "." + namespace + ".svc"
	upgrade := func(t *testing.T, secret *corev1.Secret) (*corev1.Secret, *apiService) {
		t.Helper()
		objects, err := renderIn(t, secret, "")
		if err != nil {
			t.Fatal(err)
		}
		checkTogether(t, objects)
		return only[*corev1.Secret](t, objects), apiServices(t, objects)[0]
	}
	began := time.Now().Truncate(time.Second)
	first, _ := upgrade(t, nil)

	t.Run("it is to be renewed when a fifth of its ten years is left", func(t *testing.T) {
		seconds, err := strconv.ParseInt(first.Annotations[renewAfter], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		const wait = 8 * 365 * 24 * time.Hour
		if at := time.Unix(seconds, 0); at.Before(began.Add(wait)) || at.After(time.Now().Add(wait)) {
			t.Errorf("it is to be renewed at %s, want eight years from now", at)
		}
	})
	t.Run("an upgrade keeps it", func(t *testing.T) {
		t.Parallel()
		second, _ := upgrade(t, first)
		if diff := cmp.Diff(first, second); diff != "" {
			t.Errorf("-first +second:\n%s", diff)
		}
	})
	t.Run("an upgrade renews it in time, and the old one is trusted on", func(t *testing.T) {
		t.Parallel()
		due := first.DeepCopy()
		due.Annotations[renewAfter] = strconv.FormatInt(began.Unix()-1, 10)
		renewed, api := upgrade(t, due)
		for _, key := range []string{"tls.crt", "tls.key"} {
			if bytes.Equal(renewed.Data[key], due.Data[key]) {
				t.Errorf("%s is the old one", key)
			}
		}
		verify(t, map[string][]byte{"ca.crt": api.Spec.CABundle, "tls.crt": due.Data["tls.crt"], "tls.key": due.Data["tls.key"]}, serverName)
		kept, _ := upgrade(t, renewed)
		if diff := cmp.Diff(renewed, kept); diff != "" {
			t.Errorf("the next upgrade doesn't keep the renewed one (-renewed +kept):\n%s", diff)
		}
	})
	t.Run("one that is incomplete is replaced", func(t *testing.T) {
		t.Parallel()
		for _, key := range []string{"ca.crt", "tls.crt", "tls.key"} {
			broken := first.DeepCopy()
			delete(broken.Data, key)
			upgrade(t, broken) // verifies what comes out
		}
	})
}

func TestGivenCertificate(t *testing.T) {
	const values = "certificates: {source: secret, secret: {name: serving}}"
	given := func(data map[string][]byte) *corev1.Secret {
		return &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "serving"}, Data: data}
	}
	t.Run("the CA is the Secret's", func(t *testing.T) {
		t.Parallel()
		objects, err := renderIn(t, given(map[string][]byte{"ca.crt": []byte("a CA")}), values)
		if err != nil {
			t.Fatal(err)
		}
		if got := apiServices(t, objects)[0].Spec.CABundle; string(got) != "a CA" {
			t.Errorf("caBundle is %q, want the Secret's ca.crt", got)
		}
	})
	t.Run("the CA that is given as a value goes first", func(t *testing.T) {
		t.Parallel()
		objects, err := renderIn(t, given(map[string][]byte{"ca.crt": []byte("a CA")}), certificateSources["secret"])
		if err != nil {
			t.Fatal(err)
		}
		if got := apiServices(t, objects)[0].Spec.CABundle; !bytes.HasPrefix(got, []byte("-----BEGIN")) {
			t.Errorf("caBundle is %q, want the value", got)
		}
	})
	for name, secret := range map[string]*corev1.Secret{
		"without a Secret it says what is missing":               nil,
		"without a CA in the Secret it says what is missing":     given(map[string][]byte{"tls.crt": []byte("a certificate")}),
		"with an empty CA in the Secret it says what is missing": given(map[string][]byte{"ca.crt": nil}),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			_, err := renderIn(t, secret, values)
			if want := "put it into ca.crt of the Secret aaserver-system/serving"; err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("got %v, want %q", err, want)
			}
		})
	}
}
