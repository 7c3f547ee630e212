package e2e

import (
	"context"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	_ "github.com/jackc/pgx/v5/stdlib"
	clientv3 "go.etcd.io/etcd/client/v3"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"
	"k8s.io/client-go/util/retry"
	_ "modernc.org/sqlite"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	typedv1 "aaserver.io/aaserver/apis/generated/clientset/versioned/typed/streaming/v1"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/storage/storagetest"
)

// storages are the places that objects can be stored in. Each is started for
// the test, and is empty.
var storages = map[string]func(testing.TB) place{
	"SQLite": func(t testing.TB) place {
		file := filepath.Join(t.TempDir(), "state.db")
		return place{
			flags: []string{"--storage-endpoint=sqlite://" + file},
			read:  func(t testing.TB) contents { return readSQLite(t, file) },
		}
	},
	"PostgreSQL": func(t testing.TB) place {
		url := storagetest.Postgres(t) + "objects"
		return place{
			flags: []string{"--storage-endpoint=" + url},
			read:  func(t testing.TB) contents { return readPostgres(t, url) },
		}
	},
	"etcd": func(t testing.TB) place {
		url, data := storagetest.Etcd(t, filepath.Join(filepath.Dir(binaries.kubectl), "etcd"))
		return place{
			flags: []string{"--etcd-servers=" + url},
			read:  func(t testing.TB) contents { return readEtcd(t, url, data) },
		}
	},
}

// place is a running storage.
type place struct {
	flags []string // that have a server use it
	read  func(testing.TB) contents
}

// contents is what a storage holds.
type contents struct {
	values map[string]string // that are current, by key
	bytes  string            // everything, replaced and deleted values too
}

const (
	// manyTargets is how many targets a server must be able to serve.
	manyTargets = 10_000
	eventTTL    = 15 * time.Second
)

// TestStorage is what is expected of every storage, whatever it is, by the API
// of a server that uses it.
func TestStorage(t *testing.T) {
	for name, begin := range storages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testStorage(t, begin(t))
		})
	}
}

// stored is a server whose storage is looked at through its API.
type stored struct {
	*server
	targets typedv1.StreamingV1Interface
	core    kubernetes.Interface
}

func startStored(t testing.TB, dir string, place place, args ...string) *stored {
	t.Helper()
	s := &stored{server: startServer(t, dir, append(place.flags, args...)...)}
	s.connect(t)
	return s
}

func (s *stored) connect(t testing.TB) {
	t.Helper()
	config := s.config()
	targets, err := versioned.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	s.targets = targets.StreamingV1()
	if s.core, err = kubernetes.NewForConfig(config); err != nil {
		t.Fatal(err)
	}
}

// testStorage's parts follow one another: later ones rely on what earlier ones
// have stored.
func testStorage(t *testing.T, place place) {
	dir := t.TempDir()
	ttl := "--event-ttl=" + eventTTL.String()
	s := startStored(t, dir, place, ttl)
	expiring := s.newEvent(t, "expiring", "first", "")
	t.Run("objects are created, read, updated and deleted", s.testObjects)
	t.Run("of two updates of one version, one is a conflict", s.testConflicts)
	t.Run("a watch from a revision shows all that came after it, in order", func(t *testing.T) { s.testWatch(t, "cached") })
	t.Run("bookmarks and lists are as recent as the storage", s.testBookmarks)
	t.Run("pages are of one revision, in spite of changes", func(t *testing.T) { s.testPages(t, "cached") })
	t.Run("objects may be large, and are refused if too large", s.testSizes)
	old := s.somePage(t)
	t.Run("ten thousand targets", s.testMany)

	s.stop(syscall.SIGTERM, 30*time.Second)
	s = startStored(t, dir, place, ttl, "--watch-cache=false")
	t.Run("without the watch cache: everything is there after a restart", s.testManyAgain)
	t.Run("without the watch cache: a watch from a revision of before the restart", func(t *testing.T) { s.testWatchFrom(t, old) })
	t.Run("without the watch cache: a watch from a revision", func(t *testing.T) { s.testWatch(t, "direct") })
	t.Run("without the watch cache: pages", func(t *testing.T) { s.testPages(t, "direct") })
	t.Run("an event is gone when its time is over", func(t *testing.T) { s.testExpired(t, expiring) })
	expiring = s.newEvent(t, "expiring", "second", "")

	s.stop(syscall.SIGTERM, 30*time.Second)
	s = startStored(t, dir, place, ttl, "--watch-cache=false", "--etcd-compaction-interval=1s")
	t.Run("what was compacted is gone, and said to be", func(t *testing.T) { s.testCompacted(t, old) })
	t.Run("an event of before a restart is gone when its time is over", func(t *testing.T) { s.testExpired(t, expiring) })
}

func newTarget(name string) *v1.Target {
	return &v1.Target{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       v1.TargetSpec{Replicas: new(int32), Process: &v1.ProcessSource{Command: []string{"sleep", "1000"}}},
	}
}

// newEvent creates an event: nobody but the test writes to those.
func (s *stored) newEvent(t testing.TB, namespace, name, note string) *corev1.Event {
	t.Helper()
	event, err := s.core.CoreV1().Events(namespace).Create(t.Context(), &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Name: name, Namespace: namespace},
		InvolvedObject: corev1.ObjectReference{APIVersion: apiGroup + "/v1", Kind: "Target", Namespace: namespace, Name: "x"},
		Type:           corev1.EventTypeNormal,
		Reason:         "Test",
		Message:        note,
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return event
}

// settled returns a target once its agent has nothing to write any more.
func (s *stored) settled(t testing.TB, namespace, name string) (target *v1.Target) {
	t.Helper()
	s.eventually("the agent has seen "+name, 30*time.Second, func() (err error) {
		target, err = s.targets.Targets(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err == nil && target.Status.ObservedGeneration != target.Generation {
			err = fmt.Errorf("generation %d, observed %d", target.Generation, target.Status.ObservedGeneration)
		}
		return err
	})
	return target
}

func revision(t testing.TB, s string) uint64 {
	t.Helper()
	rev, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("resourceVersion: %v", err)
	}
	return rev
}

func (s *stored) testObjects(t *testing.T) {
	ctx, targets := t.Context(), s.targets.Targets("objects")
	made, err := targets.Create(ctx, newTarget("a"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if made.UID == "" || made.ResourceVersion == "" || made.CreationTimestamp.IsZero() || made.Generation != 1 {
		t.Errorf("created with %+v", made.ObjectMeta)
	}
	if _, err := targets.Create(ctx, newTarget("a"), metav1.CreateOptions{}); !apierrors.IsAlreadyExists(err) {
		t.Errorf("created again: %v", err)
	}
	if _, err := targets.Get(ctx, "none", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("what isn't there: %v", err)
	}
	was := s.settled(t, "objects", "a")
	was.Labels = map[string]string{"is": "changed"}
	was.Annotations = map[string]string{"text": "ünïcode \x01 '\"\\ 😀\n"}
	updated, err := targets.Update(ctx, was, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	got, err := targets.Get(ctx, "a", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(updated, got); diff != "" {
		t.Errorf("read other than it was updated (-updated +read):\n%s", diff)
	}
	if got.UID != made.UID || revision(t, got.ResourceVersion) <= revision(t, made.ResourceVersion) || got.Annotations["text"] != was.Annotations["text"] {
		t.Errorf("updated to %+v", got.ObjectMeta)
	}
	list, err := targets.List(ctx, metav1.ListOptions{LabelSelector: "is=changed"})
	if err != nil || len(list.Items) != 1 || list.Items[0].UID != made.UID {
		t.Errorf("list: %v, %v", list, err)
	}

	other := types.UID("another")
	if err := targets.Delete(ctx, "a", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &other}}); !apierrors.IsConflict(err) {
		t.Errorf("deleting another of its name: %v", err)
	}
	if err := targets.Delete(ctx, "a", metav1.DeleteOptions{Preconditions: &metav1.Preconditions{ResourceVersion: &made.ResourceVersion}}); !apierrors.IsConflict(err) {
		t.Errorf("deleting an old version: %v", err)
	}
	if err := targets.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.eventually("the target is gone", 30*time.Second, func() error {
		_, err := targets.Get(ctx, "a", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it isn't: %v", err)
	})
	again, err := targets.Create(ctx, newTarget("a"), metav1.CreateOptions{})
	if err != nil || again.UID == made.UID {
		t.Errorf("created anew: %v, %v", again, err)
	}
}

func (s *stored) testConflicts(t *testing.T) {
	ctx, targets := t.Context(), s.targets.Targets("conflicts")
	if _, err := targets.Create(ctx, newTarget("a"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	first := s.settled(t, "conflicts", "a")
	second := first.DeepCopy()
	first.Annotations, second.Annotations = map[string]string{"by": "first"}, map[string]string{"by": "second"}
	if _, err := targets.Update(ctx, first, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := targets.Update(ctx, second, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("the second update: %v", err)
	}

	// None of many is lost.
	const writers, each = 8, 5
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for range each {
				// A conflict is to be expected as often as there are others.
				backoff := retry.DefaultBackoff
				backoff.Steps = 1000
				backoff.Factor = 1
				err := retry.RetryOnConflict(backoff, func() error {
					target, err := targets.Get(ctx, "a", metav1.GetOptions{})
					if err != nil {
						return err
					}
					n, _ := strconv.Atoi(target.Annotations["count"])
					target.Annotations["count"] = strconv.Itoa(n + 1)
					_, err = targets.Update(ctx, target, metav1.UpdateOptions{})
					return err
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := targets.Get(ctx, "a", metav1.GetOptions{})
	if want := strconv.Itoa(writers * each); err != nil || got.Annotations["count"] != want || got.Annotations["by"] != "first" {
		t.Errorf("annotations %v, %v; want count %s by first", got.Annotations, err, want)
	}
}

// next returns the next event of a watch.
func next(t testing.TB, w watch.Interface) watch.Event {
	t.Helper()
	select {
	case event, ok := <-w.ResultChan():
		if !ok {
			t.Fatal("the watch has ended")
		}
		return event
	case <-time.After(30 * time.Second):
		t.Fatal("the watch shows nothing")
	}
	return watch.Event{}
}

func (s *stored) testWatch(t *testing.T, namespace string) {
	ctx, events := t.Context(), s.core.CoreV1().Events(namespace)
	before := s.newEvent(t, namespace, "before", "")
	a := s.newEvent(t, namespace, "a", "1")
	a.Message = "2"
	if _, err := events.Update(ctx, a, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.newEvent(t, namespace, "b", "")
	s.newEvent(t, namespace+"-other", "c", "")
	if err := events.Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w, err := events.Watch(ctx, metav1.ListOptions{ResourceVersion: before.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	var got []string
	last := revision(t, before.ResourceVersion)
	want := []string{"ADDED a 1", "MODIFIED a 2", "ADDED b ", "DELETED a 2", "ADDED later "}
	for i := range want {
		if i == len(want)-1 {
			s.newEvent(t, namespace, "later", "")
		}
		shown := next(t, w)
		event, ok := shown.Object.(*corev1.Event)
		if !ok {
			t.Fatalf("%s %v", shown.Type, shown.Object)
		}
		got = append(got, fmt.Sprintf("%s %s %s", shown.Type, event.Name, event.Message))
		if rev := revision(t, event.ResourceVersion); rev <= last {
			t.Errorf("revision %d after %d", rev, last)
		} else {
			last = rev
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("watch (-want +got):\n%s", diff)
	}
}

func (s *stored) testBookmarks(t *testing.T) {
	ctx, targets := t.Context(), s.targets.Targets("bookmarks")
	if _, err := targets.Create(ctx, newTarget("a"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	from := s.settled(t, "bookmarks", "a").ResourceVersion

	// The storage's revision moves on without any target changing, and the
	// watch cache has to ask for it.
	moved := revision(t, s.newEvent(t, "bookmarks", "moved", "").ResourceVersion)
	list, err := targets.List(ctx, metav1.ListOptions{})
	if err != nil || len(list.Items) != 1 || revision(t, list.ResourceVersion) < moved {
		t.Errorf("a list is of revision %s, %v; want at least %d", list.ResourceVersion, err, moved)
	}
	moved = revision(t, s.newEvent(t, "bookmarks", "moved-again", "").ResourceVersion)
	w, err := targets.Watch(ctx, metav1.ListOptions{
		SendInitialEvents: new(true), AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if event := next(t, w); event.Type != watch.Added || event.Object.(*v1.Target).Name != "a" {
		t.Errorf("the initial events begin with %s %v", event.Type, event.Object)
	}
	event := next(t, w)
	mark, ok := event.Object.(*v1.Target)
	if !ok || event.Type != watch.Bookmark || mark.Annotations[metav1.InitialEventsAnnotationKey] != "true" || revision(t, mark.ResourceVersion) < moved {
		t.Errorf("the initial events end with %s %v, want a bookmark of at least %d", event.Type, event.Object, moved)
	}

	// Bookmarks come shortly before a watch ends.
	w, err = targets.Watch(ctx, metav1.ListOptions{ResourceVersion: from, AllowWatchBookmarks: true, TimeoutSeconds: new(int64(4))})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if event = next(t, w); event.Type != watch.Bookmark {
		t.Fatalf("%s %v, want a bookmark", event.Type, event.Object)
	}
	mark = event.Object.(*v1.Target)
	if revision(t, mark.ResourceVersion) < revision(t, from) {
		t.Errorf("a bookmark of %s after %s", mark.ResourceVersion, from)
	}
	if _, err := targets.Patch(ctx, "a", types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	w, err = targets.Watch(ctx, metav1.ListOptions{ResourceVersion: mark.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if event = next(t, w); event.Type != watch.Modified || event.Object.(*v1.Target).Labels["a"] != "b" {
		t.Errorf("after the bookmark: %s %v", event.Type, event.Object)
	}
}

func names(list *corev1.EventList) []string {
	var names []string
	for _, event := range list.Items {
		names = append(names, event.Name)
	}
	return names
}

func (s *stored) testPages(t *testing.T, namespace string) {
	namespace += "-pages"
	ctx, events := t.Context(), s.core.CoreV1().Events(namespace)
	var want []string
	for i := range 25 {
		want = append(want, s.newEvent(t, namespace, fmt.Sprintf("p%02d", i), "").Name)
	}
	first, err := events.List(ctx, metav1.ListOptions{Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	if n := first.RemainingItemCount; n == nil || *n != 15 {
		t.Errorf("%v remain after the first page", n)
	}
	for _, name := range []string{"p03", "p12", "p24"} {
		if err := events.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"p00a", "p12a", "p99"} {
		s.newEvent(t, namespace, name, "")
	}
	got, page := names(first), first
	for page.Continue != "" {
		if page, err = events.List(ctx, metav1.ListOptions{Limit: 10, Continue: page.Continue}); err != nil {
			t.Fatal(err)
		}
		if page.ResourceVersion != first.ResourceVersion {
			t.Errorf("a page of revision %s, the first is of %s", page.ResourceVersion, first.ResourceVersion)
		}
		got = append(got, names(page)...)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}
	exact, err := events.List(ctx, metav1.ListOptions{ResourceVersion: first.ResourceVersion, ResourceVersionMatch: metav1.ResourceVersionMatchExact})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, names(exact)); diff != "" {
		t.Errorf("a list of the old revision (-want +got):\n%s", diff)
	}
	now, err := events.List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	changed := slices.DeleteFunc(slices.Concat(want, []string{"p00a", "p12a", "p99"}), func(name string) bool {
		return name == "p03" || name == "p12" || name == "p24"
	})
	slices.Sort(changed)
	if diff := cmp.Diff(changed, names(now)); diff != "" {
		t.Errorf("a list of now (-want +got):\n%s", diff)
	}

	for what, options := range map[string]metav1.ListOptions{
		"a token that is none":          {Limit: 10, Continue: "x"},
		"a token together with another": {Limit: 10, Continue: first.Continue, ResourceVersion: first.ResourceVersion},
	} {
		if _, err := events.List(ctx, options); !apierrors.IsBadRequest(err) && !apierrors.IsInvalid(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	rev := strconv.FormatUint(revision(t, now.ResourceVersion)+1_000_000, 10)
	if _, err := events.List(ctx, metav1.ListOptions{ResourceVersion: rev, ResourceVersionMatch: metav1.ResourceVersionMatchExact}); err == nil {
		t.Error("a revision of the future is listed")
	}
}

// testSizes: 1.5 MiB is the limit of a write in every storage, 3 MiB that of a
// request.
func (s *stored) testSizes(t *testing.T) {
	ctx, targets := t.Context(), s.targets.Targets("sizes")
	sized := func(name string, size int) *v1.Target {
		target := newTarget(name)
		target.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Other", UID: "uid", Name: strings.Repeat("x", size)}}
		return target
	}
	const fits = 3<<19 - 8<<10
	if _, err := targets.Create(ctx, sized("large", fits), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	large := s.settled(t, "sizes", "large")
	if n := len(large.OwnerReferences[0].Name); n != fits {
		t.Errorf("%d bytes were kept of %d", n, fits)
	}
	large.Labels = map[string]string{"a": "b"}
	if _, err := targets.Update(ctx, large, metav1.UpdateOptions{}); err != nil {
		t.Error(err)
	}
	if list, err := targets.List(ctx, metav1.ListOptions{}); err != nil || len(list.Items) != 1 || len(list.Items[0].OwnerReferences[0].Name) != fits {
		t.Errorf("a list of it: %v", err)
	}

	for _, size := range []int{3 << 19, 2 << 20, 3<<20 - 8<<10, 3<<20 + 1} {
		grown := large.DeepCopy()
		grown.ResourceVersion = ""
		grown.OwnerReferences[0].Name = strings.Repeat("x", size)
		_, created := targets.Create(ctx, sized("larger", size), metav1.CreateOptions{})
		_, updated := targets.Update(ctx, grown, metav1.UpdateOptions{})
		for what, err := range map[string]error{"created": created, "updated": updated} {
			if !apierrors.IsRequestEntityTooLargeError(err) || apierrors.ReasonForError(err) != metav1.StatusReasonRequestEntityTooLarge || !strings.Contains(err.Error(), "limit is ") {
				t.Errorf("%s with %d bytes: %v", what, size, tail(fmt.Sprint(err), 300))
			}
		}
	}
	if _, err := targets.Get(ctx, "larger", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("what was refused is there: %v", err)
	}
	if target, err := targets.Get(ctx, "large", metav1.GetOptions{}); err != nil || len(target.OwnerReferences[0].Name) != fits {
		t.Errorf("what wasn't updated has changed: %v", err)
	}
}

func (s *stored) testMany(t *testing.T) {
	ctx, targets := t.Context(), s.targets.Targets("many")
	list, err := targets.List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// A server ends a watch whose client can't keep up: it is to be resumed.
	w, err := watchtools.NewRetryWatcherWithContext(ctx, list.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (watch.Interface, error) {
			return targets.Watch(ctx, options)
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	watched := make(chan int, 1)
	go func() {
		var last uint64
		n := 0
		for event := range w.ResultChan() {
			target, ok := event.Object.(*v1.Target)
			if !ok {
				t.Errorf("the watch shows %v", event.Object)
				break
			}
			if rev, err := strconv.ParseUint(target.ResourceVersion, 10, 64); err != nil || rev <= last {
				t.Errorf("revision %s after %d", target.ResourceVersion, last)
			} else {
				last = rev
			}
			if event.Type == watch.Added {
				n++
			}
			if n == manyTargets {
				break
			}
		}
		watched <- n
	}()

	createMany(t, targets, manyTargets)
	select {
	case n := <-watched:
		if n != manyTargets {
			t.Errorf("the watch showed %d", n)
		}
	case <-time.After(60 * time.Second):
		t.Error("the watch doesn't show them all")
	}
	s.wantMany(t, metav1.ListOptions{}, metav1.ListOptions{Limit: 1500}, metav1.ListOptions{LabelSelector: "tenth=true", Limit: 400})
}

func createMany(t testing.TB, targets typedv1.TargetInterface, n int) {
	t.Helper()
	const writers = 16
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := w; i < n; i += writers {
				target := newTarget(fmt.Sprintf("t-%05d", i))
				target.Labels = map[string]string{"tenth": strconv.FormatBool(i%10 == 0)}
				// As the agent would, which has a write less to do then.
				target.Finalizers = []string{v1.FinalizerInstances}
				if _, err := targets.Create(t.Context(), target, metav1.CreateOptions{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
}

// wantMany lists all targets of the namespace, in ways.
func (s *stored) wantMany(t *testing.T, ways ...metav1.ListOptions) {
	t.Helper()
	ctx, targets := t.Context(), s.targets.Targets("many")
	for _, options := range ways {
		want, what := manyTargets, options.String()
		if options.LabelSelector != "" {
			want /= 10
		}
		var got []string
		for {
			list, err := targets.List(ctx, options)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			for i := range list.Items {
				got = append(got, list.Items[i].Name)
			}
			if options.Continue = list.Continue; list.Continue == "" {
				break
			}
		}
		if len(got) != want || !slices.IsSorted(got) || len(slices.Compact(got)) != want {
			t.Errorf("%s: %d targets, sorted: %t; want %d once each", what, len(got), slices.IsSorted(got), want)
		}
	}
}

func (s *stored) testManyAgain(t *testing.T) {
	s.wantMany(t, metav1.ListOptions{Limit: 1500})
	large, err := s.targets.Targets("sizes").Get(t.Context(), "large", metav1.GetOptions{})
	if err != nil || large.Labels["a"] != "b" || len(large.OwnerReferences[0].Name) < 1<<20 {
		t.Errorf("a large target after the restart: %v", err)
	}
}

// page is the first page of a list, as it was before much else was stored.
type page struct{ revision, next string }

func (s *stored) somePage(t *testing.T) page {
	for i := range 4 {
		if _, err := s.targets.Targets("old").Create(t.Context(), newTarget(fmt.Sprintf("old-%d", i)), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	list, err := s.targets.Targets("old").List(t.Context(), metav1.ListOptions{Limit: 2})
	if err != nil || len(list.Items) != 2 || list.Continue == "" {
		t.Fatalf("a page of two: %v", err)
	}
	if err := s.targets.Targets("old").Delete(t.Context(), "old-3", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	return page{list.ResourceVersion, list.Continue}
}

func (s *stored) testWatchFrom(t *testing.T, old page) {
	list, err := s.targets.Targets("old").List(t.Context(), metav1.ListOptions{Limit: 2, Continue: old.next})
	if err != nil || len(list.Items) != 2 || list.Items[1].Name != "old-3" || list.ResourceVersion != old.revision {
		t.Errorf("the rest of the page: %v, %v", list, err)
	}
	w, err := s.targets.Targets("old").Watch(t.Context(), metav1.ListOptions{ResourceVersion: old.revision})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	for {
		event := next(t, w)
		target, ok := event.Object.(*v1.Target)
		if !ok || event.Type == watch.Added {
			t.Fatalf("%s %v", event.Type, event.Object)
		}
		if event.Type == watch.Deleted {
			if target.Name != "old-3" {
				t.Errorf("%s was deleted", target.Name)
			}
			return
		}
	}
}

func (s *stored) testCompacted(t *testing.T, old page) {
	ctx, targets := t.Context(), s.targets.Targets("old")
	var expired error
	s.eventually("the old page has expired", 60*time.Second, func() error {
		_, expired = targets.List(ctx, metav1.ListOptions{Limit: 2, Continue: old.next})
		if expired == nil {
			return fmt.Errorf("it hasn't")
		}
		return nil
	})
	wantGone := func(what string, err error) {
		t.Helper()
		status, ok := err.(apierrors.APIStatus)
		if !ok || status.Status().Code != http.StatusGone || status.Status().Reason != metav1.StatusReasonExpired {
			t.Errorf("%s: %#v", what, err)
		}
	}
	wantGone("the continue token", expired)

	// What is offered instead goes on from there, with what there is now.
	status, ok := expired.(apierrors.APIStatus)
	if !ok || status.Status().ListMeta.Continue == "" {
		t.Fatalf("no token is offered to go on with: %v", expired)
	}
	list, err := targets.List(ctx, metav1.ListOptions{Limit: 2, Continue: status.Status().ListMeta.Continue})
	if err != nil || len(list.Items) != 1 || list.Items[0].Name != "old-2" || revision(t, list.ResourceVersion) <= revision(t, old.revision) {
		t.Errorf("going on without consistency: %v, %v", list, err)
	}

	_, err = targets.List(ctx, metav1.ListOptions{ResourceVersion: old.revision, ResourceVersionMatch: metav1.ResourceVersionMatchExact})
	wantGone("a list of the old revision", err)
	w, err := targets.Watch(ctx, metav1.ListOptions{ResourceVersion: old.revision})
	if err == nil {
		event := next(t, w)
		w.Stop()
		err = apierrors.FromObject(event.Object)
		if event.Type != watch.Error {
			t.Errorf("the watch shows %s", event.Type)
		}
	}
	wantGone("a watch from the old revision", err)

	// Compaction takes nothing away that is current.
	all, err := s.targets.Targets("many").List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil || all.RemainingItemCount == nil || *all.RemainingItemCount != manyTargets-1 {
		t.Errorf("after the first of %d targets, %v remain (%v)", manyTargets, all.RemainingItemCount, err)
	}
}

func (s *stored) testExpired(t *testing.T, event *corev1.Event) {
	s.eventually("the event has expired", 2*eventTTL, func() error {
		_, err := s.core.CoreV1().Events(event.Namespace).Get(t.Context(), event.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("it is there: %v", err)
	})
	if age := time.Since(event.CreationTimestamp.Time); age < eventTTL-time.Second {
		t.Errorf("it was kept for %s only", age)
	}
}

func readSQLite(t testing.TB, file string) contents {
	t.Helper()
	c := readSQL(t, "sqlite", "file:"+file+"?mode=ro")
	c.bytes = ""
	for _, suffix := range []string{"", "-wal"} {
		text, err := os.ReadFile(file + suffix)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		c.bytes += string(text)
	}
	return c
}

func readPostgres(t testing.TB, url string) contents {
	t.Helper()
	return readSQL(t, "pgx", url)
}

func readSQL(t testing.TB, driver, source string) contents {
	t.Helper()
	db, err := sql.Open(driver, source)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	rows, err := db.QueryContext(t.Context(), `SELECT name, deleted, value, old_value FROM kine ORDER BY id`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	c := contents{values: map[string]string{}}
	for rows.Next() {
		var name string
		var deleted int
		var value, old []byte
		if err := rows.Scan(&name, &deleted, &value, &old); err != nil {
			t.Fatal(err)
		}
		c.bytes += string(value) + string(old)
		if c.values[name] = string(value); deleted != 0 {
			delete(c.values, name)
		}
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return c
}

func readEtcd(t testing.TB, url, data string) contents {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, DialTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	all, err := client.Get(t.Context(), "", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	c := contents{values: map[string]string{}}
	for _, kv := range all.Kvs {
		c.values[string(kv.Key)] = string(kv.Value)
	}
	var text strings.Builder
	if err := filepath.WalkDir(data, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		file, err := os.ReadFile(path)
		text.Write(file)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	c.bytes = text.String()
	return c
}

// encryptionKeys are 32 bytes each, as AES-256 and secretbox want them.
var encryptionKeys = map[string]string{
	"key1": base64.StdEncoding.EncodeToString([]byte(strings.Repeat("1", 32))),
	"key2": base64.StdEncoding.EncodeToString([]byte(strings.Repeat("2", 32))),
}

// encryption is a provider configuration; identity stands for plain text.
func encryption(resources string, providers ...string) string {
	text := "kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n- resources: [" + resources + "]\n  providers:\n"
	for _, provider := range providers {
		if provider == "identity" {
			text += "  - identity: {}\n"
		} else {
			text += fmt.Sprintf("  - secretbox: {keys: [{name: %s, secret: %s}]}\n", provider, encryptionKeys[provider])
		}
	}
	return text
}

// TestEncryptionAtRest reads what a storage holds past the server.
func TestEncryptionAtRest(t *testing.T) {
	for name, begin := range storages {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testEncryption(t, begin(t))
		})
	}
}

func testEncryption(t *testing.T, place place) {
	const resources = "'*.streaming.aaserver.io', events"
	rewrite := func(s *stored) {
		t.Helper()
		s.kubectlStdin(s.kubectl("get", "targets,targetclasses,events", "-A", "-o", "json"), "replace", "-f", "-")
	}
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "encryption.yaml")
	start := func(config string) *stored {
		t.Helper()
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		return startStored(t, dir, place, "--encryption-provider-config="+file)
	}
	restart := func(s *stored, config string) *stored {
		t.Helper()
		s.stop(syscall.SIGTERM, 30*time.Second)
		return start(config)
	}
	create := func(s *stored, name, secret string) {
		t.Helper()
		target := newTarget(name)
		target.Spec.Process.Env = []v1.EnvVar{{Name: "SECRET", Value: secret}}
		if _, err := s.targets.Targets("default").Create(t.Context(), target, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		s.settled(t, "default", name)
	}
	wantSecrets := func(s *stored, want ...string) {
		t.Helper()
		list, err := s.targets.Targets("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, target := range list.Items {
			got = append(got, target.Name+"="+target.Spec.Process.Env[0].Value)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("read by the server (-want +got):\n%s", diff)
		}
	}
	// How each object is stored: by which key, or in plain text.
	wantStored := func(want map[string]string) {
		t.Helper()
		got := map[string]string{}
		for key, value := range place.read(t).values {
			if !strings.Contains(key, "/targets/") && !strings.Contains(key, "/events/") {
				continue
			}
			by := "plain text"
			if rest, ok := strings.CutPrefix(value, "k8s:enc:secretbox:v1:"); ok {
				by, _, _ = strings.Cut(rest, ":")
			}
			got[path.Base(key)] = by
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("stored (-want +got):\n%s", diff)
		}
	}

	s := startStored(t, dir, place)
	create(s, "a", "secret-of-a")
	if c := place.read(t); !strings.Contains(c.bytes, "secret-of-a") {
		t.Error("what is stored in plain text can't be found: the test would show nothing")
	}

	s = restart(s, encryption(resources, "key1", "identity"))
	create(s, "b", "secret-of-b")
	s.newEvent(t, "default", "c", "secret-of-c")
	wantSecrets(s, "a=secret-of-a", "b=secret-of-b")
	wantStored(map[string]string{"a": "plain text", "b": "key1", "c": "key1"})
	for _, secret := range []string{"secret-of-b", "secret-of-c"} {
		if strings.Contains(place.read(t).bytes, secret) {
			t.Errorf("%s is stored in plain text", secret)
		}
	}
	event, err := s.core.CoreV1().Events("default").Get(t.Context(), "c", metav1.GetOptions{})
	if err != nil || event.Message != "secret-of-c" {
		t.Errorf("the event: %v, %v", event, err)
	}

	// The old key is kept until everything is rewritten by the new one.
	s = restart(s, encryption(resources, "key2", "key1", "identity"))
	wantSecrets(s, "a=secret-of-a", "b=secret-of-b")
	rewrite(s)
	wantStored(map[string]string{"a": "key2", "b": "key2", "c": "key2"})

	s = restart(s, encryption(resources, "key2"))
	wantSecrets(s, "a=secret-of-a", "b=secret-of-b")

	// Back to plain text.
	s = restart(s, encryption("'*.*'", "identity", "key2"))
	rewrite(s)
	s = restart(s, encryption("'*.*'", "identity"))
	wantSecrets(s, "a=secret-of-a", "b=secret-of-b")
	wantStored(map[string]string{"a": "plain text", "b": "plain text", "c": "plain text"})
}

// TestEncryptionRefuses: whoever gives a configuration wants objects encrypted.
func TestEncryptionRefuses(t *testing.T) {
	good := encryption("targets.streaming.aaserver.io", "key1", "identity")
	replaced := func(old, new string) []string { return []string{strings.Replace(good, old, new, 1)} }
	for name, tt := range map[string]struct {
		config []string // the file's text, if there is one
		args   []string
		want   string
	}{
		"no such file":           {nil, nil, "no such file"},
		"an empty file":          {[]string{""}, nil, "is empty"},
		"no YAML":                {[]string{"a: ["}, nil, "yaml: "},
		"another version":        {replaced("apiserver.config.k8s.io/v1", "v1"), nil, `no kind "EncryptionConfiguration" is registered`},
		"an unknown field":       {replaced("providers", "provider"), nil, `unknown field "resources[0].provider"`},
		"an unknown provider":    {replaced("identity", "other"), nil, `unknown field "resources[0].providers[1].other"`},
		"a short key":            {replaced(encryptionKeys["key1"], "c2hvcnQ="), nil, "secret is not of the expected length, got 5, expected one of [32]"},
		"a key that isn't coded": {replaced(encryptionKeys["key1"], "'?'"), nil, "secrets must be base64 encoded"},
		"targets without group":  {replaced("targets.streaming.aaserver.io", "targets"), nil, "targets aren't named in it, and would be stored in plain text: name targets.streaming.aaserver.io"},
		"other resources alone":  {replaced("targets.streaming.aaserver.io", "secrets"), nil, "targets aren't named in it"},
		"reload without a file":  {nil, []string{"--encryption-provider-config-automatic-reload"}, "must be set with --encryption-provider-config"},
	} {
		t.Run(name, func(t *testing.T) {
			dir, file := t.TempDir(), filepath.Join(t.TempDir(), "encryption.yaml")
			args := tt.args
			if args == nil {
				args = []string{"--encryption-provider-config=" + file}
			}
			if tt.config != nil {
				if err := os.WriteFile(file, []byte(tt.config[0]), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			s := launch(t, &client{t: t, dir: dir}, append([]string{"standalone", "--data-dir", dir, "--secure-port=0"}, args...)...)
			t.Cleanup(s.kill)
			select {
			case <-s.ended:
			case <-time.After(30 * time.Second):
				t.Fatal("the server goes on")
			}
			if code := s.cmd.ProcessState.ExitCode(); code != 1 {
				t.Errorf("exit code %d", code)
			}
			if want := "error: --encryption-provider-config"; !strings.Contains(s.output(), want) {
				t.Errorf("no %q in: %s", want, s.output())
			}
			wantContains(t, "the refusal", s.output(), tt.want)
		})
	}
}

// BenchmarkStorage compares the storages, by events, which nobody else writes.
func BenchmarkStorage(b *testing.B) {
	for _, name := range slices.Sorted(maps.Keys(storages)) {
		b.Run(name, func(b *testing.B) {
			s := startStored(b, b.TempDir(), storages[name](b))
			s.benchmark(b)
		})
	}
}

func (s *stored) benchmark(b *testing.B) {
	var n atomic.Int64
	create := func(b *testing.B, namespace string) {
		s.newEvent(b, namespace, fmt.Sprintf("e-%08d", n.Add(1)), strings.Repeat("x", 1000))
	}
	b.Run("create", func(b *testing.B) {
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				create(b, "many")
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "creates/s")
	})
	// Most of it is the same for all: the list comes from the watch cache,
	// which asks the storage how recent that is.
	b.Run("list", func(b *testing.B) {
		for range 1000 {
			create(b, "list")
		}
		for b.Loop() {
			list, err := s.core.CoreV1().Events("list").List(b.Context(), metav1.ListOptions{})
			if err != nil || len(list.Items) < 1000 {
				b.Fatalf("%d events, %v", len(list.Items), err)
			}
		}
	})
	b.Run("create to watch", func(b *testing.B) {
		w, err := s.core.CoreV1().Events("watch").Watch(b.Context(), metav1.ListOptions{})
		if err != nil {
			b.Fatal(err)
		}
		defer w.Stop()
		for b.Loop() {
			create(b, "watch")
			next(b, w)
		}
	})
}
