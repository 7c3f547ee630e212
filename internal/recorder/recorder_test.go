package recorder

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/ktesting"
	clocktesting "k8s.io/utils/clock/testing"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestMain(m *testing.M) {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	goleak.VerifyTestMain(m)
}

var events = corev1.SchemeGroupVersion.WithResource("events")

var web = &v1.Target{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "web", UID: "uid-1", ResourceVersion: "7"}}

// bench is a recorder, what it writes to, and its clock.
type bench struct {
	*testing.T
	r     *Recorder
	api   *fake.Clientset
	clock *clocktesting.FakeClock
	log   klog.Logger
	ctx   context.Context
	// end ends Run and waits for it.
	end func()
}

func newBench(t *testing.T) *bench {
	b := &bench{T: t, api: fake.NewSimpleClientset(), clock: clocktesting.NewFakeClock(time.Unix(1_700_000_000, 0))}
	var err error
	b.r, err = New(Options{Client: b.api.CoreV1(), Source: corev1.EventSource{Component: "aaserver-agent", Host: "local"}, Clock: b.clock})
	if err != nil {
		t.Fatal(err)
	}
	b.log = ktesting.NewLogger(t, ktesting.NewConfig(ktesting.BufferLogs(true)))
	b.ctx = klog.NewContext(t.Context(), b.log)
	return b
}

func (b *bench) start() {
	ctx, cancel := context.WithCancel(b.ctx)
	var running sync.WaitGroup
	running.Go(func() { b.r.Run(ctx) })
	b.end = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	b.Cleanup(b.end)
}

// tell records an event at a time of its own.
func (b *bench) tell(kind, reason, format string, args ...any) {
	b.r.Eventf(web, kind, reason, format, args...)
	b.clock.Step(time.Nanosecond)
}

// written returns what is there, sorted, without names and times.
func (b *bench) written() []string {
	b.Helper()
	list, err := b.api.CoreV1().Events(metav1.NamespaceAll).List(b.Context(), metav1.ListOptions{})
	if err != nil {
		b.Fatal(err)
	}
	var lines []string
	for _, e := range list.Items {
		lines = append(lines, fmt.Sprintf("%s %s x%d: %s", e.Type, e.Reason, e.Count, e.Message))
	}
	slices.Sort(lines)
	return lines
}

func (b *bench) want(what string, got, want any) {
	b.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		b.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// logged counts the lines of the log with a text.
func (b *bench) logged(text string) int {
	n := 0
	for _, entry := range b.log.GetSink().(ktesting.Underlier).GetBuffer().Data() {
		if entry.Type == ktesting.LogInfo && entry.Verbosity == 0 && strings.Contains(fmt.Sprint(entry.Message, entry.ParameterKVList), text) {
			n++
		}
	}
	return n
}

func (b *bench) eventually(what string, holds func() bool) {
	b.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if holds() {
			return
		}
	}
	b.Fatalf("never happened: %s", what)
}

// refuse has requests answered with errors, one after the other.
func (b *bench) refuse(errs ...error) {
	var mu sync.Mutex
	b.api.PrependReactor("*", "events", func(action clienttesting.Action) (bool, runtime.Object, error) {
		mu.Lock()
		defer mu.Unlock()
		if action.GetVerb() == "list" || len(errs) == 0 {
			return false, nil, nil
		}
		err := errs[0]
		errs = errs[1:]
		return true, nil, err
	})
}

func TestNewRefuses(t *testing.T) {
	good := Options{Client: fake.NewSimpleClientset().CoreV1(), Source: corev1.EventSource{Component: "c"}}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Options){
		"no client":    func(o *Options) { o.Client = nil },
		"no component": func(o *Options) { o.Source.Component = "" },
	} {
		opts := good
		change(&opts)
		if _, err := New(opts); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// Each sentence is a story; what waits when Run is to end is written first, so
// that everything is there when it has.
func TestRecorder(t *testing.T) {
	forbidden := func() error {
		return apierrors.NewForbidden(events.GroupResource(), "", errors.New("no rights"))
	}
	tests := map[string]func(*bench){
		"an event says whom it is about, who tells and when": func(b *bench) {
			b.tell("Normal", "Started", "Started instance %s", "web-0")
			b.start()
			b.end()
			list, err := b.api.CoreV1().Events("shop").List(b.Context(), metav1.ListOptions{})
			if err != nil || len(list.Items) != 1 {
				b.Fatalf("got %v, error %v", list.Items, err)
			}
			got := list.Items[0]
			at := metav1.NewTime(time.Unix(1_700_000_000, 0))
			b.want("event", got, corev1.Event{
				ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: got.Name},
				InvolvedObject: corev1.ObjectReference{
					APIVersion: "streaming.aaserver.io/v1", Kind: "Target", Namespace: "shop", Name: "web", UID: "uid-1", ResourceVersion: "7",
				},
				Type: "Normal", Reason: "Started", Message: "Started instance web-0",
				Source:              corev1.EventSource{Component: "aaserver-agent", Host: "local"},
				ReportingController: "aaserver-agent", ReportingInstance: "local",
				FirstTimestamp: at, LastTimestamp: at, Count: 1,
			})
		},
		"repeats are counted": func(b *bench) {
			b.start()
			for range 5 {
				b.tell("Warning", "Exited", "Instance web-0 exited with code 1")
			}
			b.tell("Warning", "Exited", "Instance web-0 exited with code 2")
			b.end()
			b.want("events", b.written(), []string{
				"Warning Exited x1: Instance web-0 exited with code 2",
				"Warning Exited x5: Instance web-0 exited with code 1",
			})
		},
		"what happens to 256 instances is combined, in few requests, and hides nothing else": func(b *bench) {
			for n := range 256 {
				b.tell("Normal", "Started", "Started instance web-%d", n)
			}
			b.tell("Normal", "Scaled", "Scaled up from 1 to 256 instances")
			b.start()
			b.end()
			lines := b.written()
			if len(lines) != 11 || lines[0] != "Normal Scaled x1: Scaled up from 1 to 256 instances" ||
				!strings.HasPrefix(lines[1], "Normal Started x16: (combined from similar events): Started instance web-") {
				b.Errorf("got %d:\n%s", len(lines), strings.Join(lines, "\n"))
			}
			if requests := len(b.api.Actions()) - 1; requests > 27 {
				b.Errorf("%d requests", requests)
			}
		},
		"one that has expired is written again, with its count": func(b *bench) {
			b.start()
			b.tell("Warning", "BackOff", "again")
			b.eventually("it is written", func() bool { return len(b.written()) == 1 })
			list, _ := b.api.CoreV1().Events("shop").List(b.Context(), metav1.ListOptions{})
			if err := b.api.Tracker().Delete(events, "shop", list.Items[0].Name); err != nil {
				b.Fatal(err)
			}
			b.tell("Warning", "BackOff", "again")
			b.end()
			b.want("events", b.written(), []string{"Warning BackOff x2: again"})
		},
		"a server that is away is asked again": func(b *bench) {
			b.refuse(errors.New("connection refused"), apierrors.NewInternalError(errors.New("the storage is away")))
			b.tell("Normal", "Started", "Started instance web-0")
			b.tell("Normal", "Started", "Started instance web-1")
			b.start()
			for range 2 {
				b.eventually("it waits", func() bool { return b.clock.Waiters() > 0 })
				b.clock.Step(10 * time.Second)
			}
			b.eventually("both are written", func() bool { return len(b.written()) == 2 })
			if n := b.logged("can't be written"); n > 0 {
				b.Errorf("%d lines in the log", n)
			}
		},
		"a server that stays away is given up for an event": func(b *bench) {
			b.refuse(slices.Repeat([]error{errors.New("connection refused")}, tries)...)
			b.tell("Normal", "Started", "Started instance web-0")
			b.tell("Normal", "Started", "Started instance web-1")
			b.start()
			for range tries - 1 {
				b.eventually("it waits", func() bool { return b.clock.Waiters() > 0 })
				b.clock.Step(time.Minute)
			}
			b.eventually("the other is written", func() bool { return len(b.written()) == 1 })
			b.want("log", b.logged("connection refused"), 1)
		},
		"what is refused is logged once in a while, and nothing else happens": func(b *bench) {
			b.refuse(slices.Repeat([]error{forbidden()}, 21)...)
			b.start()
			for n := range 20 {
				b.tell("Warning", fmt.Sprintf("Reason%d", n), "it happened")
			}
			b.eventually("all were tried", func() bool { return len(b.api.Actions()) >= 20 })
			b.want("log", b.logged("no rights"), 1)
			b.clock.Step(reportEvery)
			b.tell("Warning", "Reason", "it happened")
			b.tell("Warning", "Last", "it happened")
			b.end()
			b.want("log a minute later", b.logged("no rights"), 2)
			b.want("lost since then", b.logged("lost 20"), 1)
			b.want("events", b.written(), []string{"Warning Last x1: it happened"})
		},
		"a namespace that ends is nothing to log": func(b *bench) {
			ending := apierrors.NewForbidden(events.GroupResource(), "", errors.New("the namespace is ending"))
			ending.ErrStatus.Details.Causes = []metav1.StatusCause{{Type: corev1.NamespaceTerminatingCause}}
			b.refuse(ending, apierrors.NewNotFound(corev1.Resource("namespaces"), "shop"))
			b.tell("Normal", "Stopping", "one")
			b.tell("Normal", "Stopping", "two")
			b.start()
			b.end()
			b.want("log", b.logged("can't be written"), 0)
			b.want("events", b.written(), []string(nil))
		},
		"more than the queue holds are dropped, and logged once": func(b *bench) {
			for n := range queueLength + 50 {
				b.tell("Normal", "Started", "Started instance web-%d", n)
			}
			b.start()
			b.end()
			b.want("log", b.logged("too many at once"), 1)
			b.want("how many", b.logged("lost 50"), 1)
		},
		"long messages are cut, and stay texts": func(b *bench) {
			b.start()
			for n := range 12 {
				b.tell("Warning", "StartError", "%d\xff%s", n, strings.Repeat("é", 5000))
			}
			b.end()
			list, _ := b.api.CoreV1().Events("shop").List(b.Context(), metav1.ListOptions{})
			if len(list.Items) != 10 {
				b.Errorf("got %d events, want 9 and one for the rest", len(list.Items))
			}
			for _, e := range list.Items {
				if len(e.Message) > 1024 || !utf8.ValidString(e.Message) || !strings.HasSuffix(e.Message, "é…") {
					b.Errorf("got %d bytes: %q", len(e.Message), e.Message)
				}
			}
		},
		"what isn't an object of the API is no reason to end": func(b *bench) {
			b.r.Event(&corev1.Pod{}, "Normal", "Odd", "of another API")
			b.r.Event(nil, "Normal", "Odd", "nothing")
			b.start()
			b.end()
			b.want("events", b.written(), []string(nil))
		},
		"it can be run again": func(b *bench) {
			b.start()
			b.tell("Normal", "Started", "one")
			b.end()
			b.tell("Normal", "Started", "two")
			b.start()
			b.end()
			b.want("events", b.written(), []string{"Normal Started x1: one", "Normal Started x1: two"})
		},
	}
	for name, story := range tests {
		t.Run(name, func(t *testing.T) { story(newBench(t)) })
	}
}

// A server that takes requests and never answers holds up neither those who
// record nor the end of Run.
func TestServerThatHangs(t *testing.T) {
	asked := make(chan struct{}, 1)
	gone := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // the server notices a client that goes only then
		select {
		case asked <- struct{}{}:
		default:
		}
		select {
		case <-r.Context().Done():
		case <-gone:
		}
	}))
	defer server.Close()
	defer close(gone)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client, err := kubernetes.NewForConfig(&rest.Config{Host: server.URL, Transport: transport})
	if err != nil {
		t.Fatal(err)
	}
	b := newBench(t)
	b.r.opts.Client = client.CoreV1()
	b.start()
	b.tell("Normal", "Started", "one")
	<-asked
	for n := range 2 * queueLength {
		b.tell("Normal", "Started", "Started instance web-%d", n)
	}
	ended := make(chan struct{})
	var ending sync.WaitGroup
	defer ending.Wait()
	ending.Go(func() {
		defer close(ended)
		b.end()
	})
	b.eventually("Run ends when the time to flush is up", func() bool {
		b.clock.Step(flushTimeout)
		select {
		case <-ended:
			return true
		default:
			return false
		}
	})
	b.want("log", b.logged("can't be written"), 1)
}
