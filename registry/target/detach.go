package target

import (
	"context"
	"fmt"
	"net/http"
	"runtime/debug"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	auditinternal "k8s.io/apiserver/pkg/apis/audit"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/endpoints/metrics"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// A session that stands, in which most often nothing happens, needs none of the
// filters that its request has passed. They would keep a stack of 32 KiB for it,
// and the buffers of net/http's connection. So it has a goroutine of its own, and
// once it stands the filters return:
//
//	filters → Connect → handler … waits … returns → filters return → DetachedSessions
//	                       │                 ▲                             │
//	                       └► open → upgrade ┴ stands → … → end            └ waits for the end,
//	                                                                         unless upgraded
//
// What the filters do as they return is done anew at the end of the session, where
// it is about that: the last event of the audit log, and the gauge of requests
// that run long. The latency that they measure, and the span of a trace, are those
// of the beginning; aaserver_session_duration_seconds has the session's.
//
// Until a session stands, everything is as for any other request. Who waits for
// the goroutine afterwards is session.Manager, when it drains.

// DetachedSessions lets the sessions of next, with all filters, outlive these. It
// belongs outside of them, and HoldAudit before their audit log.
func DetachedSessions(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// The filters find this one, and add none.
		ctx := audit.WithAuditContext(r.Context())
		f := &filters{outside: ctx, returned: make(chan struct{})}
		f.serve(next, w, r.WithContext(context.WithValue(ctx, filtersKey{}, f)))
		if f.over == nil {
			return
		}
		// The response is being written.
		<-f.over
		if f.panicked {
			panic(http.ErrAbortHandler) // logged already
		}
	})
}

// HoldAudit keeps from an audit log what the filters tell it of the end of a
// session that has only left them: an event that knows a session, and not why it
// has ended. No client can make one. The metric of events counts it all the same.
func HoldAudit(backend audit.Backend) audit.Backend { return heldBackend{backend} }

type heldBackend struct{ audit.Backend }

func (b heldBackend) ProcessEvents(events ...*auditinternal.Event) bool {
	ok := true
	for _, event := range events {
		if _, begun := event.Annotations[sessionAnnotation]; begun && event.Stage == auditinternal.StageResponseComplete {
			if _, ended := event.Annotations[causeAnnotation]; !ended {
				continue
			}
		}
		ok = b.Backend.ProcessEvents(event) && ok
	}
	return ok
}

// filters are those that one request passes.
type filters struct {
	outside  context.Context // the request's, as it reached them
	returned chan struct{}   // closed when they have
	// over is closed at the end of a session whose response they began; nil if
	// there is none. It is set before they return.
	over     chan struct{}
	panicked bool // set before over is closed
}

type filtersKey struct{}

func (f *filters) serve(next http.Handler, w http.ResponseWriter, r *http.Request) {
	defer close(f.returned)
	next.ServeHTTP(w, r)
}

// detached is a session's goroutine.
type detached struct {
	filters *filters    // nil if there are none to leave
	unbind  func() bool // of a connection that is to be upgraded
	returns chan struct{}
	// What follows is set before returns is closed, for the handler.
	stood    bool
	panicked any // instead
	// begin is what the goroutine begins with. It is let go of, as the response
	// is reached by it.
	begin func()
}

// detach serves a session. It returns when the session stands, or has failed
// before.
func detach(w http.ResponseWriter, r *http.Request, upgrade bool, serve func(w http.ResponseWriter, r *http.Request, d *detached)) {
	d := &detached{}
	d.filters, _ = r.Context().Value(filtersKey{}).(*filters)
	if d.filters == nil {
		serve(w, r, d)
		return
	}
	// What filters add to a context leads to the response, too.
	ctx := d.filters.outside
	if upgrade {
		// This one ends when the filters have returned. net/http no longer knows of
		// the client then: package streaming does.
		var cancel context.CancelCauseFunc
		ctx, cancel = context.WithCancelCause(context.WithoutCancel(ctx))
		d.unbind = context.AfterFunc(d.filters.outside, func() { cancel(context.Cause(d.filters.outside)) })
	}
	ctx = request.WithNamespace(ctx, request.NamespaceValue(r.Context()))
	info, _ := request.RequestInfoFrom(r.Context())
	d.returns = make(chan struct{})
	d.begin = func() { serve(w, r.WithContext(ctx), d) }
	go d.run(ctx, r, info)
	<-d.returns
	if d.panicked != nil {
		panic(d.panicked)
	}
}

func (d *detached) run(ctx context.Context, r *http.Request, info *request.RequestInfo) {
	defer func() {
		p := recover()
		if !d.stood {
			if p != nil && p != http.ErrAbortHandler {
				p = fmt.Sprintf("%v\n%s", p, debug.Stack()) // of where it was
			}
			d.panicked = p
			close(d.returns)
			return
		}
		if p != nil { // as net/http would survive it
			for _, handle := range utilruntime.PanicHandlers {
				handle(ctx, p)
			}
		}
		if d.filters.over != nil {
			d.filters.panicked = p != nil
			close(d.filters.over)
		}
	}()
	metrics.RecordLongRunning(r, info, metrics.APIServerComponent, d.serve)
}

func (d *detached) serve() {
	begin := d.begin
	d.begin = nil
	begin()
}

// stands says that the client has been answered, and that the session goes on.
// The session's goroutine calls it, maybe more than once.
func (d *detached) stands() {
	if d.filters == nil || d.stood {
		return
	}
	d.stood = true
	if d.unbind != nil {
		d.unbind()
		d.unbind = nil
	} else {
		d.filters.over = make(chan struct{})
	}
	close(d.returns)
}

// end has a session leave annotations in the audit log, and its last event, if
// the filters don't.
func (d *detached) end(ctx context.Context, panicked bool, annotations ...string) {
	if d.stood {
		<-d.filters.returned // they take a session without a cause for one that goes on
	}
	audit.AddAuditAnnotations(ctx, annotations...)
	ac := audit.AuditContextFrom(ctx)
	if !d.stood || !ac.Enabled() {
		return
	}
	stage := auditinternal.StageResponseComplete
	if panicked {
		stage = auditinternal.StagePanic
		ac.SetEventResponseStatus(&metav1.Status{
			Code:    http.StatusInternalServerError,
			Status:  metav1.StatusFailure,
			Reason:  metav1.StatusReasonInternalError,
			Message: errPanicked.Error(),
		})
	}
	ac.ProcessEventStage(ctx, stage)
}
