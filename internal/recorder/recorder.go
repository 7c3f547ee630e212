// Package recorder writes Events of core/v1, which is where `kubectl describe`,
// `kubectl events` and `kubectl get events` look for them.
//
// Who records an event never waits, and never learns what became of it: events
// are queued, and dropped when the queue is full. Run writes them. Repeats are
// counted, similar ones combined, and floods cut off by client-go's correlator.
// client-go's own broadcaster isn't used: its Shutdown throws away what is
// queued, nothing can wait for its goroutine, and it logs every event that it
// can't write.
package recorder

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/tools/record/util"
	"k8s.io/client-go/tools/reference"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
)

const (
	// queueLength is how many events may wait to be written.
	queueLength = 1000
	// maxMessage bounds messages in bytes. The API allows 1024; the correlator
	// puts a few words before those that it combines.
	maxMessage = 1024 - 64
	// requestTimeout bounds each request.
	requestTimeout = 10 * time.Second
	// flushTimeout bounds how long events are still written at the end.
	flushTimeout = 3 * time.Second
	// tries is how often an event is sent to a server that is away, with a
	// pause that doubles from firstPause on. Meanwhile others wait, and those
	// that don't fit into the queue are dropped.
	tries      = 5
	firstPause = time.Second
	// reportEvery is how often, at most, events that were lost are logged.
	reportEvery = time.Minute
)

// Options of a Recorder. Client and Source are needed.
type Options struct {
	// Client writes events.
	Client typedcorev1.EventsGetter
	// Source says who reports: the component, and as host what tells it from
	// others of its kind.
	Source corev1.EventSource
	// Clock tells the time; the real one if nil.
	Clock clock.Clock
}

// Recorder records events. Objects are those of this API in one of its versions,
// or a *corev1.ObjectReference.
type Recorder struct {
	opts  Options
	queue chan *corev1.Event
	// dropped counts events that found the queue full.
	dropped atomic.Int64

	// What follows is Run's alone.
	correlator *record.EventCorrelator
	lost       int64
	reported   time.Time
}

var _ record.EventRecorder = (*Recorder)(nil)

// New returns a Recorder whose events wait until Run.
func New(opts Options) (*Recorder, error) {
	switch {
	case opts.Client == nil:
		return nil, errors.New("a recorder needs a client")
	case opts.Source.Component == "":
		return nil, errors.New("a recorder needs to know which component reports")
	}
	if opts.Clock == nil {
		opts.Clock = clock.RealClock{}
	}
	return &Recorder{
		opts:  opts,
		queue: make(chan *corev1.Event, queueLength),
		correlator: record.NewEventCorrelatorWithOptions(record.CorrelatorOptions{
			Clock: opts.Clock,
			// By reason, so that one that comes often doesn't hide the others.
			// One in five minutes goes on being written: what ends at the
			// longest back-off comes as often.
			SpamKeyFunc: func(event *corev1.Event) string {
				about := &event.InvolvedObject
				return strings.Join([]string{about.Kind, about.Namespace, about.Name, string(about.UID), event.Type, event.Reason}, "/")
			},
		}),
	}, nil
}

// Event implements record.EventRecorder.
func (r *Recorder) Event(object runtime.Object, kind, reason, message string) {
	r.record(object, nil, kind, reason, message)
}

// Eventf implements record.EventRecorder.
func (r *Recorder) Eventf(object runtime.Object, kind, reason, format string, args ...any) {
	r.record(object, nil, kind, reason, fmt.Sprintf(format, args...))
}

// AnnotatedEventf implements record.EventRecorder.
func (r *Recorder) AnnotatedEventf(object runtime.Object, annotations map[string]string, kind, reason, format string, args ...any) {
	r.record(object, annotations, kind, reason, fmt.Sprintf(format, args...))
}

func (r *Recorder) record(object runtime.Object, annotations map[string]string, kind, reason, message string) {
	about, err := reference.GetReference(scheme.Scheme, object)
	if err != nil {
		klog.Background().Error(err, "An event about what isn't an object of the API", "reason", reason, "message", message)
		return
	}
	now := r.opts.Clock.Now()
	namespace := about.Namespace
	if namespace == "" {
		namespace = metav1.NamespaceDefault
	}
	event := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: namespace, Name: util.GenerateEventName(about.Name, now.UnixNano()), Annotations: annotations,
		},
		InvolvedObject:      *about,
		Type:                kind,
		Reason:              reason,
		Message:             bounded(message),
		Source:              r.opts.Source,
		ReportingController: r.opts.Source.Component,
		ReportingInstance:   r.opts.Source.Host,
		FirstTimestamp:      metav1.NewTime(now),
		LastTimestamp:       metav1.NewTime(now),
		Count:               1,
	}
	select {
	case r.queue <- event:
	default:
		r.dropped.Add(1)
	}
}

func bounded(message string) string {
	message = strings.ToValidUTF8(message, "\uFFFD")
	if len(message) <= maxMessage {
		return message
	}
	return strings.ToValidUTF8(message[:maxMessage-len("…")], "") + "…"
}

// Run writes events until ctx ends, and then, for a few seconds at most, those
// that wait. It may be called again when it has returned.
func (r *Recorder) Run(ctx context.Context) {
	// What is under way when ctx ends goes on until the time for it is up.
	writing, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var timing sync.WaitGroup
	timing.Go(func() {
		defer cancel()
		select {
		case <-ctx.Done():
		case <-writing.Done():
			return
		}
		select {
		case <-r.opts.Clock.After(flushTimeout):
		case <-writing.Done():
		}
	})
	defer timing.Wait()
	defer cancel()

	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case event := <-r.queue:
			r.write(ctx, writing, event)
		}
	}
	for writing.Err() == nil {
		select {
		case event := <-r.queue:
			r.write(ctx, writing, event)
			continue
		default:
		}
		break
	}
	if n := len(r.queue); n > 0 {
		r.lose(ctx, int64(n), errors.New("there was no time to write them at the end"))
	}
}

// write writes one event, by writing, with a pause between tries that ctx ends.
func (r *Recorder) write(ctx, writing context.Context, event *corev1.Event) {
	if n := r.dropped.Swap(0); n > 0 {
		r.lose(ctx, n, errors.New("there were too many at once"))
	}
	result, err := r.correlator.EventCorrelate(event)
	if err != nil {
		r.lose(ctx, 1, err)
		return
	}
	if result.Skip {
		return
	}
	pause := firstPause
	for try := 1; ; try++ {
		err := r.send(writing, result)
		switch {
		case err == nil:
			return
		case apierrors.IsAlreadyExists(err), apierrors.IsNotFound(err), apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
			// It is there already, or its namespace is ending or gone.
			klog.FromContext(ctx).V(4).Info("Event refused", "reason", event.Reason, "err", err.Error())
			return
		case !away(err) || try == tries || ctx.Err() != nil:
			r.lose(ctx, 1, err)
			return
		}
		select {
		case <-ctx.Done(): // once more, at once
		case <-r.opts.Clock.After(pause):
			pause *= 2
		}
	}
}

// send makes the request that the correlator has decided on.
func (r *Recorder) send(ctx context.Context, result *record.EventCorrelateResult) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	events := r.opts.Client.Events(result.Event.Namespace)
	if result.Event.Count > 1 {
		written, err := events.Patch(ctx, result.Event.Name, types.StrategicMergePatchType, result.Patch, metav1.PatchOptions{})
		if err == nil {
			r.correlator.UpdateState(written)
		}
		if !apierrors.IsNotFound(err) {
			return err
		}
		// It has expired, or never came to be.
	}
	result.Event.ResourceVersion = ""
	written, err := events.Create(ctx, result.Event, metav1.CreateOptions{})
	if err == nil {
		r.correlator.UpdateState(written)
	}
	return err
}

// away says that the server may answer another time.
func away(err error) bool {
	if status := apierrors.APIStatus(nil); !errors.As(err, &status) {
		return true // it didn't answer
	}
	return apierrors.IsTooManyRequests(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsInternalError(err) ||
		apierrors.IsTimeout(err) || apierrors.IsServerTimeout(err)
}

// lose logs, once in a while, that events are lost.
func (r *Recorder) lose(ctx context.Context, events int64, err error) {
	r.lost += events
	now := r.opts.Clock.Now()
	if !r.reported.IsZero() && now.Sub(r.reported) < reportEvery {
		return
	}
	klog.FromContext(ctx).Info("Events can't be written: `kubectl describe` won't show them", "component", r.opts.Source.Component, "lost", r.lost, "err", err.Error())
	r.lost, r.reported = 0, now
}
