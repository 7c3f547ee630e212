package target

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	auditinternal "k8s.io/apiserver/pkg/apis/audit"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	genericfilters "k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/request"
)

// auditLog keeps what an audit backend is told.
type auditLog struct {
	audit.Backend
	mu     sync.Mutex
	events []string
}

func (l *auditLog) ProcessEvents(events ...*auditinternal.Event) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, event := range events {
		text := string(event.Stage)
		if cause, ok := event.Annotations[causeAnnotation]; ok {
			text += ": " + cause
		}
		l.events = append(l.events, text)
	}
	return true
}

func (l *auditLog) seen() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.events...)
}

func (l *auditLog) EvaluatePolicyRule(authorizer.Attributes) audit.RequestAuditConfig {
	return audit.RequestAuditConfig{Level: auditinternal.LevelMetadata}
}

// detachServer has detach serve sessions within the filters of detachServerOf.
func detachServer(t *testing.T, log *auditLog, upgrade bool, serve func(w http.ResponseWriter, r *http.Request, d *detached) error) (server *httptest.Server, filters chan struct{}) {
	return detachServerOf(t, log, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		detach(w, r, upgrade, func(w http.ResponseWriter, r *http.Request, d *detached) {
			audit.AddAuditAnnotations(r.Context(), sessionAnnotation, "1")
			var ended error = errPanicked
			defer func() { d.end(r.Context(), ended == errPanicked, causeAnnotation, causeOf(ended)) }()
			ended = serve(w, r, d)
		})
	}))
}

// detachServerOf has the generic server's audit log between DetachedSessions and
// a handler. filters tells when they have returned.
func detachServerOf(t *testing.T, log *auditLog, handler http.Handler) (server *httptest.Server, filters chan struct{}) {
	filters = make(chan struct{}, 200) // more than requests
	handler = genericfilters.WithAudit(handler, HoldAudit(log), log, func(*http.Request, *request.RequestInfo) bool { return true })
	handler = genericfilters.WithRequestInfo(handler, &request.RequestInfoFactory{})
	handler = genericfilters.WithAuditInit(handler)
	inner := handler
	handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { filters <- struct{}{} }()
		inner.ServeHTTP(w, r)
	})
	server = httptest.NewServer(DetachedSessions(handler))
	t.Cleanup(server.Close)
	return server, filters
}

func TestUpgradedSessionsOutliveTheFilters(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func() error
		want string
	}{
		"a session that is done":    {func() error { return nil }, "ResponseComplete: done"},
		"a session that has failed": {func() error { return errors.New("it broke") }, "ResponseComplete: it broke"},
		"a session that panics":     {func() error { panic("on purpose") }, "Panic: " + errPanicked.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			log := &auditLog{}
			end, over := make(chan struct{}), make(chan struct{})
			server, filters := detachServer(t, log, true, func(w http.ResponseWriter, r *http.Request, d *detached) error {
				defer close(over)
				conn, _, err := http.NewResponseController(w).Hijack()
				if err != nil {
					return err
				}
				defer conn.Close()
				io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n\r\n")
				d.stands()
				<-end
				if err := r.Context().Err(); err != nil {
					return err
				}
				return tt.end()
			})
			response, err := http.Get(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			<-filters
			if diff := cmp.Diff([]string{"RequestReceived", "ResponseStarted"}, log.seen()); diff != "" {
				t.Errorf("while it lasts, audit has (-want +got):\n%s", diff)
			}
			close(end)
			<-over
			waitFor(t, "the last event", func() bool { return len(log.seen()) > 2 })
			if diff := cmp.Diff([]string{"RequestReceived", "ResponseStarted", tt.want}, log.seen()); diff != "" {
				t.Errorf("in the end, audit has (-want +got):\n%s", diff)
			}
		})
	}
}

func TestResponsesGoOnWithoutTheFilters(t *testing.T) {
	for name, tt := range map[string]struct {
		panics  bool
		wantErr error
		want    string
	}{
		"one that is done ends in order": {want: "ResponseComplete: done"},
		"one that panics is cut off":     {panics: true, wantErr: io.ErrUnexpectedEOF, want: "Panic: " + errPanicked.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			log := &auditLog{}
			more := make(chan struct{})
			server, filters := detachServer(t, log, false, func(w http.ResponseWriter, r *http.Request, d *detached) error {
				io.WriteString(w, "one\n")
				http.NewResponseController(w).Flush()
				d.stands()
				<-more
				io.WriteString(w, "two\n")
				if tt.panics {
					http.NewResponseController(w).Flush()
					panic("on purpose")
				}
				return nil
			})
			response, err := http.Get(server.URL)
			if err != nil {
				t.Fatal(err)
			}
			defer response.Body.Close()
			<-filters
			body := bufio.NewReader(response.Body)
			if line, err := body.ReadString('\n'); line != "one\n" {
				t.Fatalf("%q, %v", line, err)
			}
			close(more)
			rest, err := io.ReadAll(body)
			if string(rest) != "two\n" || !errors.Is(err, tt.wantErr) {
				t.Errorf("the rest is %q, %v, want two and %v", rest, err, tt.wantErr)
			}
			if diff := cmp.Diff([]string{"RequestReceived", "ResponseStarted", tt.want}, log.seen()); diff != "" {
				t.Errorf("audit has (-want +got):\n%s", diff)
			}
		})
	}
}

func TestWhatDoesNotStandEndsWithinTheFilters(t *testing.T) {
	log := &auditLog{}
	server, _ := detachServer(t, log, true, func(w http.ResponseWriter, r *http.Request, d *detached) error {
		switch r.URL.Path {
		case "/panics":
			panic("on purpose")
		case "/fails":
			http.Error(w, "not now", http.StatusConflict)
			return errors.New("not now")
		}
		<-r.Context().Done() // the client's patience
		return context.Cause(r.Context())
	})
	response, err := http.Get(server.URL + "/fails")
	if err != nil {
		t.Fatal(err)
	}
	response.Body.Close()
	if response.StatusCode != http.StatusConflict {
		t.Errorf("status %s", response.Status)
	}
	waitFor(t, "the last event", func() bool { return len(log.seen()) == 3 })
	if response, err = http.Get(server.URL + "/panics"); err == nil {
		response.Body.Close()
		t.Errorf("a panic was answered: %s", response.Status)
	}
	waitFor(t, "the last event", func() bool { return len(log.seen()) == 5 })

	ctx, cancel := context.WithCancel(t.Context())
	leaving, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/waits", nil)
	if err != nil {
		t.Fatal(err)
	}
	left := make(chan struct{})
	go func() {
		defer close(left)
		if response, err := http.DefaultClient.Do(leaving); err == nil {
			response.Body.Close()
			t.Errorf("what waits was answered: %s", response.Status)
		}
	}()
	waitFor(t, "the request", func() bool { return len(log.seen()) == 6 })
	cancel()
	<-left
	waitFor(t, "the end of the request whose client went", func() bool { return len(log.seen()) == 8 })
	want := []string{
		"RequestReceived", "ResponseStarted", "ResponseComplete: not now",
		"RequestReceived", "Panic: " + errPanicked.Error(),
		"RequestReceived", "ResponseStarted: context canceled", "ResponseComplete: context canceled",
	}
	if diff := cmp.Diff(want, log.seen()); diff != "" {
		t.Errorf("audit has (-want +got):\n%s", diff)
	}
}

func TestASessionThatIsOverAtOnceHasOneLastEvent(t *testing.T) {
	log := &auditLog{}
	server, _ := detachServer(t, log, false, func(w http.ResponseWriter, _ *http.Request, d *detached) error {
		io.WriteString(w, "one")
		d.stands()
		return nil
	})
	const times = 100
	for range times {
		response, err := http.Get(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			t.Error(err)
		}
		response.Body.Close()
	}
	last := 0
	for _, event := range log.seen() {
		if strings.HasPrefix(event, "ResponseComplete") {
			last++
		}
	}
	if last != times {
		t.Errorf("%d sessions have %d last events", times, last)
	}
}
