package storage

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/apis/example/install"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
)

// TestGenericServersStorage uses the backend as the generic server does.
func TestGenericServersStorage(t *testing.T) {
	scheme := runtime.NewScheme()
	install.Install(scheme)
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	codecs := serializer.NewCodecFactory(scheme)
	config := storagebackend.NewDefaultConfig("/registry", codecs.LegacyCodec(examplev1.SchemeGroupVersion))
	config.Transport.ServerList = []string{start(t, filepath.Join(t.TempDir(), "state.db")).Endpoint()}
	s, destroy, err := factory.Create(*config.ForResource(schema.GroupResource{Resource: "pods"}),
		func() runtime.Object { return &example.Pod{} }, func() runtime.Object { return &example.PodList{} }, "/pods")
	if err != nil {
		t.Fatal(err)
	}
	defer destroy()
	ctx := t.Context()
	if err := s.ReadinessCheck(); err != nil {
		t.Errorf("readiness: %v", err)
	}

	var first example.Pod
	for i := range 5 {
		pod := &example.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(i), Namespace: "ns", UID: "uid"}}
		if err := s.Create(ctx, "/pods/ns/"+pod.Name, pod, &first, 0); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			defer func(rv string) {
				w, err := s.Watch(ctx, "/pods/", storage.ListOptions{ResourceVersion: rv, Recursive: true, Predicate: storage.Everything})
				if err != nil {
					t.Fatal(err)
				}
				defer w.Stop()
				var got []string
				for range 6 {
					e := <-w.ResultChan()
					pod, ok := e.Object.(*example.Pod)
					if !ok {
						t.Fatalf("%s %v", e.Type, e.Object)
					}
					got = append(got, string(e.Type)+" "+pod.Name)
				}
				want := []string{"ADDED 1", "ADDED 2", "ADDED 3", "ADDED 4", string(watch.Modified) + " 3", string(watch.Deleted) + " 4"}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("watch (-want +got):\n%s", diff)
				}
			}(first.ResourceVersion)
		}
	}
	if err := s.Create(ctx, "/pods/ns/0", &example.Pod{ObjectMeta: metav1.ObjectMeta{Name: "0"}}, nil, 0); !storage.IsExist(err) {
		t.Errorf("a second create: %v", err)
	}

	var updated example.Pod
	if err := s.GuaranteedUpdate(ctx, "/pods/ns/3", &updated, false, nil, func(input runtime.Object, _ storage.ResponseMeta) (runtime.Object, *uint64, error) {
		pod := input.(*example.Pod)
		pod.Labels = map[string]string{"a": "b"}
		return pod, nil, nil
	}, nil); err != nil {
		t.Fatal(err)
	}
	stale := first.ResourceVersion
	if err := s.Delete(ctx, "/pods/ns/3", &example.Pod{}, &storage.Preconditions{ResourceVersion: &stale}, storage.ValidateAllObjectFunc, nil, storage.DeleteOptions{}); !storage.IsInvalidObj(err) {
		t.Errorf("delete of an old version: %v", err)
	}
	if err := s.Delete(ctx, "/pods/ns/4", &example.Pod{}, nil, storage.ValidateAllObjectFunc, nil, storage.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	var got example.Pod
	if err := s.Get(ctx, "/pods/ns/3", storage.GetOptions{}, &got); err != nil || got.Labels["a"] != "b" || got.ResourceVersion != updated.ResourceVersion {
		t.Errorf("get: %v, %v", got, err)
	}
	if err := s.Get(ctx, "/pods/ns/4", storage.GetOptions{}, &got); !storage.IsNotFound(err) {
		t.Errorf("get of what was deleted: %v", err)
	}

	// 10 is where kine's streamed lists would go wrong.
	for i := range 21 {
		pod := &example.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("p%02d", i), Namespace: "paged"}}
		if err := s.Create(ctx, "/pods/paged/"+pod.Name, pod, nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	for namespace, tc := range map[string]struct {
		limit     int64
		wantPages []string
	}{
		"ns":    {limit: 3, wantPages: []string{"0 1 2", "3"}},
		"paged": {limit: 10, wantPages: []string{"p00 p01 p02 p03 p04 p05 p06 p07 p08 p09", "p10 p11 p12 p13 p14 p15 p16 p17 p18 p19", "p20"}},
	} {
		var pages []string
		for more := ""; ; {
			var page example.PodList
			pred := storage.Everything
			pred.Limit, pred.Continue = tc.limit, more
			if err := s.GetList(ctx, "/pods/"+namespace+"/", storage.ListOptions{Recursive: true, Predicate: pred}, &page); err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, pod := range page.Items {
				names = append(names, pod.Name)
			}
			pages = append(pages, strings.Join(names, " "))
			if more = page.Continue; more == "" {
				break
			}
		}
		if diff := cmp.Diff(tc.wantPages, pages); diff != "" {
			t.Errorf("pages of %s (-want +got):\n%s", namespace, diff)
		}
	}
}
