package session

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/testutil"
	"k8s.io/klog/v2"
	"k8s.io/klog/v2/textlogger"
	clocktesting "k8s.io/utils/clock/testing"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

var exec = Info{
	User: "alice", Namespace: "shop", Target: "web", TargetUID: "u1", Instance: "web-0",
	Subresource: "exec", Protocol: ProtocolWebSocket,
}

func TestStartRefuses(t *testing.T) {
	tests := map[string]struct {
		open, max     int
		drain         bool
		wantErr       error
		wantCode      int32
		wantRetry     bool
		wantInMessage string
	}{
		"nothing below the limit": {open: 1, max: 2},
		"with 429 at the limit": {
			open: 2, max: 2,
			wantErr: ErrTooMany, wantCode: http.StatusTooManyRequests, wantRetry: true, wantInMessage: "close some",
		},
		"with 503 once draining": {
			max: 2, drain: true,
			wantErr: ErrDraining, wantCode: http.StatusServiceUnavailable, wantRetry: true, wantInMessage: "connect again",
		},
		"with 503 when both hold: another replica may have room": {
			open: 2, max: 2, drain: true,
			wantErr: ErrDraining, wantCode: http.StatusServiceUnavailable, wantRetry: true, wantInMessage: "connect again",
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			m := NewManager(Options{Max: test.max})
			for range test.open {
				_, s := start(t, m, exec)
				defer s.End(nil)
			}
			if test.drain {
				ended, end := context.WithCancel(t.Context())
				end()
				_ = m.Drain(ended)
			}
			ctx, s, err := m.Start(t.Context(), exec, Limits{})
			if !errors.Is(err, test.wantErr) {
				t.Fatalf("got error %v, want %v", err, test.wantErr)
			}
			if ctx.Err() != nil {
				t.Error("the returned context has ended")
			}
			if err == nil {
				s.End(nil)
				return
			}
			if s != nil {
				t.Error("a refused session was returned")
			}
			var status apierrors.APIStatus
			if !errors.As(err, &status) || status.Status().Code != test.wantCode {
				t.Errorf("got %#v, want an APIStatus of code %d", err, test.wantCode)
			}
			if _, retry := apierrors.SuggestsClientDelay(err); retry != test.wantRetry {
				t.Errorf("suggests a retry: %v, want %v", retry, test.wantRetry)
			}
			if !strings.Contains(err.Error(), test.wantInMessage) {
				t.Errorf("got %q, which doesn't say %q", err, test.wantInMessage)
			}
		})
	}
}

func TestEndMakesRoom(t *testing.T) {
	m := NewManager(Options{Max: 1})
	ctx, s := start(t, m, exec)
	cause := errors.New("the instance ended")
	s.End(cause)
	s.End(errors.New("a second call doesn't count"))
	if got := context.Cause(ctx); got != cause {
		t.Errorf("got cause %v, want %v", got, cause)
	}
	_, next := start(t, m, exec)
	if next.ID() == s.ID() {
		t.Error("two sessions have one ID")
	}
	next.End(nil)
}

func TestContextEndsWithItsParentsCause(t *testing.T) {
	m := NewManager(Options{})
	gone := errors.New("the client went away")
	parent, leave := context.WithCancelCause(t.Context())
	ctx, s, err := m.Start(parent, exec, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.End(nil)
	leave(gone)
	<-ctx.Done()
	if got := context.Cause(ctx); got != gone {
		t.Errorf("got cause %v, want %v", got, gone)
	}
}

func TestDrainEndsAndWaits(t *testing.T) {
	m := NewManager(Options{})
	var wg sync.WaitGroup
	release := make(chan struct{})
	for range 3 {
		ctx, s := start(t, m, exec)
		wg.Go(func() {
			<-ctx.Done()
			if got := context.Cause(ctx); got != ErrDraining {
				t.Errorf("got cause %v, want %v", got, ErrDraining)
			}
			<-release
			s.End(context.Cause(ctx))
		})
	}

	late := errors.New("the deadline of the shutdown")
	deadline, pass := context.WithCancelCause(t.Context())
	pass(late)
	err := m.Drain(deadline)
	if !errors.Is(err, late) || !strings.Contains(err.Error(), "3") {
		t.Errorf("got %v, want an error that tells of 3 sessions and the deadline", err)
	}

	close(release)
	for range 2 {
		if err := m.Drain(t.Context()); err != nil {
			t.Errorf("draining once the sessions may end: %v", err)
		}
	}
	wg.Wait()
}

// However Start and Drain meet, a session is either refused, or ended and
// waited for.
func TestStartAgainstDrain(t *testing.T) {
	for range 50 {
		m := NewManager(Options{})
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for {
					ctx, s, err := m.Start(t.Context(), exec, Limits{})
					if err != nil {
						if err != ErrDraining {
							t.Errorf("got %v, want %v", err, ErrDraining)
						}
						return
					}
					s.AddOut(1)
					s.End(context.Cause(ctx))
				}
			})
		}
		if err := m.Drain(t.Context()); err != nil {
			t.Error(err)
		}
		m.mu.Lock()
		if len(m.sessions) != 0 {
			t.Errorf("%d sessions outlived Drain", len(m.sessions))
		}
		m.mu.Unlock()
		wg.Wait()
	}
}

type fakeBackend struct {
	io.Reader
	bytes.Buffer
	closedWrite, closed bool
}

func (f *fakeBackend) Read(p []byte) (int, error) { return f.Reader.Read(p) }
func (f *fakeBackend) CloseWrite() error          { f.closedWrite = true; return nil }
func (f *fakeBackend) Close() error               { f.closed = true; return nil }

func TestCountsBytes(t *testing.T) {
	tests := map[string]struct {
		do              func(*Session) error
		wantIn, wantOut int64
	}{
		"a reader from the client counts as in": {
			do: func(s *Session) error {
				_, err := io.Copy(io.Discard, s.CountIn(io.NopCloser(strings.NewReader("12345"))))
				return err
			},
			wantIn: 5,
		},
		"a writer to the client counts as out": {
			do:      func(s *Session) error { _, err := s.CountOut(io.Discard).Write([]byte("1234567")); return err },
			wantOut: 7,
		},
		"a backend counts both, and passes on the ends of its directions": {
			do: func(s *Session) error {
				backend := &fakeBackend{Reader: strings.NewReader("abc")}
				stream := s.CountBackend(backend)
				if _, err := stream.Write([]byte("12")); err != nil {
					return err
				}
				if _, err := io.ReadAll(stream); err != nil {
					return err
				}
				if err := errors.Join(stream.CloseWrite(), stream.Close()); err != nil {
					return err
				}
				if !backend.closedWrite || !backend.closed {
					return fmt.Errorf("closedWrite %v, closed %v", backend.closedWrite, backend.closed)
				}
				return nil
			},
			wantIn: 2, wantOut: 3,
		},
		"a stream that the client didn't ask for stays nil": {
			do: func(s *Session) error {
				if s.CountIn(nil) != nil || s.CountOut(nil) != nil {
					return errors.New("nil became something")
				}
				return nil
			},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			_, s := start(t, NewManager(Options{}), exec)
			defer s.End(nil)
			if err := test.do(s); err != nil {
				t.Fatal(err)
			}
			if in, out := s.in.Load(), s.out.Load(); in != test.wantIn || out != test.wantOut {
				t.Errorf("got %d in and %d out, want %d and %d", in, out, test.wantIn, test.wantOut)
			}
		})
	}
}

func TestCountingAllocatesNothing(t *testing.T) {
	m, _ := registered(t)
	_, s := start(t, m, exec)
	defer s.End(nil)
	w, r, p := s.CountOut(io.Discard), s.CountIn(io.NopCloser(zeros{})), make([]byte, 512)
	got := testing.AllocsPerRun(100, func() {
		_, _ = w.Write(p)
		_, _ = r.Read(p)
	})
	if got != 0 {
		t.Errorf("a write and a read allocate %v times", got)
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

var errExit = errors.New("command terminated with exit code 3")

func TestCodeOf(t *testing.T) {
	callers := func(err error) int {
		switch {
		case errors.Is(err, errExit):
			return http.StatusOK
		case errors.Is(err, io.ErrClosedPipe):
			return 12345
		}
		return 0
	}
	tests := map[string]struct {
		code func(error) int
		err  error
		want int
	}{
		"an orderly end":               {nil, nil, 200},
		"a client that left":           {nil, fmt.Errorf("copying: %w", context.Canceled), StatusClientGone},
		"a timeout":                    {nil, context.DeadlineExceeded, 504},
		"the server's shutdown":        {nil, fmt.Errorf("exec: %w", ErrDraining), 503},
		"a status":                     {nil, apierrors.NewNotFound(schema.GroupResource{Resource: "targets"}, "web"), 404},
		"a status without a code":      {nil, &apierrors.StatusError{}, 500},
		"anything else":                {nil, io.ErrUnexpectedEOF, 500},
		"what the caller knows":        {callers, fmt.Errorf("exec: %w", errExit), 200},
		"what the caller doesn't know": {callers, fmt.Errorf("exec: %w", ErrDraining), 503},
		"a code of the caller's that there isn't at all": {callers, io.ErrClosedPipe, 500},
		"an orderly end, whatever the caller knows":      {callers, nil, 200},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			if got := NewManager(Options{Code: test.code}).codeOf(test.err); got != test.want {
				t.Errorf("got %d, want %d", got, test.want)
			}
		})
	}
}

func TestMetrics(t *testing.T) {
	clock := clocktesting.NewFakePassiveClock(time.Unix(1000, 0))
	m := NewManager(Options{Max: 3, Clock: clock})
	registry := metrics.NewKubeRegistry()
	if err := m.Register(registry.Register); err != nil {
		t.Fatal(err)
	}
	_, first := start(t, m, exec)
	_, second := start(t, m, Info{Subresource: "portforward", Protocol: ProtocolSPDY})
	_, third := start(t, m, Info{Subresource: "made up by a client", Protocol: "made up too"})
	if _, _, err := m.Start(t.Context(), exec, Limits{}); err != ErrTooMany {
		t.Fatalf("got %v, want %v", err, ErrTooMany)
	}
	first.AddIn(3)
	first.AddOut(4)
	clock.SetTime(time.Unix(1001, 0))
	first.End(nil)
	third.End(io.ErrUnexpectedEOF)

	want := `
# HELP aaserver_session_bytes_total [ALPHA] Bytes that clients sent (in) and were sent (out), by subresource.
# TYPE aaserver_session_bytes_total counter
aaserver_session_bytes_total{direction="in",subresource="exec"} 3
aaserver_session_bytes_total{direction="in",subresource="other"} 0
aaserver_session_bytes_total{direction="in",subresource="portforward"} 0
aaserver_session_bytes_total{direction="out",subresource="exec"} 4
aaserver_session_bytes_total{direction="out",subresource="other"} 0
aaserver_session_bytes_total{direction="out",subresource="portforward"} 0
# HELP aaserver_sessions [ALPHA] Sessions that are open, by subresource.
# TYPE aaserver_sessions gauge
aaserver_sessions{subresource="exec"} 0
aaserver_sessions{subresource="other"} 0
aaserver_sessions{subresource="portforward"} 1
# HELP aaserver_sessions_total [ALPHA] Sessions that ended or were refused, by subresource, protocol and result code (499: the client went away).
# TYPE aaserver_sessions_total counter
aaserver_sessions_total{code="200",protocol="websocket",subresource="exec"} 1
aaserver_sessions_total{code="429",protocol="websocket",subresource="exec"} 1
aaserver_sessions_total{code="500",protocol="other",subresource="other"} 1
`
	if err := testutil.GatherAndCompare(registry, strings.NewReader(want),
		"aaserver_sessions", "aaserver_sessions_total", "aaserver_session_bytes_total"); err != nil {
		t.Error(err)
	}
	histogram, err := testutil.GetHistogramVecFromGatherer(registry, "aaserver_session_duration_seconds", map[string]string{"subresource": "exec"})
	if err != nil {
		t.Fatal(err)
	}
	if sum := histogram.GetAggregatedSampleSum(); sum != 1 {
		t.Errorf("the exec took %v s, want 1", sum)
	}
	second.End(nil)
}

func TestEndLogsWhoWhatAndWhy(t *testing.T) {
	clock := clocktesting.NewFakePassiveClock(time.Unix(1000, 0))
	var out bytes.Buffer
	logger := textlogger.NewLogger(textlogger.NewConfig(textlogger.Output(&out)))
	m := NewManager(Options{Clock: clock})
	_, s, err := m.Start(klog.NewContext(t.Context(), logger), exec, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	s.AddIn(10)
	s.AddOut(20)
	clock.SetTime(time.Unix(1002, 0))
	s.End(ErrDraining)

	_, got, _ := strings.Cut(strings.TrimSpace(out.String()), "] ")
	want := fmt.Sprintf(`"Session ended" session=%q user="alice" target="shop/web" subresource="exec" `+
		`instance="web-0" protocol="websocket" duration="2s" bytesIn=10 bytesOut=20 `+
		`cause="the server is shutting down: connect again"`, s.ID())
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func start(t *testing.T, m *Manager, info Info) (context.Context, *Session) {
	t.Helper()
	ctx, s, err := m.Start(t.Context(), info, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return ctx, s
}

func registered(t *testing.T) (*Manager, metrics.KubeRegistry) {
	t.Helper()
	m, registry := NewManager(Options{}), metrics.NewKubeRegistry()
	if err := m.Register(registry.Register); err != nil {
		t.Fatal(err)
	}
	return m, registry
}

func TestLimitsOfUsersAndTargets(t *testing.T) {
	m := NewManager(Options{})
	limits := Limits{PerUser: 2, PerTarget: 3}
	start := func(class, user string, uid types.UID) (*Session, error) {
		_, s, err := m.Start(t.Context(), Info{Class: class, User: user, Target: "web", TargetUID: uid, Subresource: "exec"}, limits)
		return s, err
	}
	must := func(class, user string, uid types.UID) *Session {
		t.Helper()
		s, err := start(class, user, uid)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	refused := func(class, user string, uid types.UID, want string) {
		t.Helper()
		_, err := start(class, user, uid)
		if !apierrors.IsTooManyRequests(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want a 429 that says %q", err, want)
		}
		if seconds, ok := apierrors.SuggestsClientDelay(err); !ok || seconds <= 0 {
			t.Errorf("%v doesn't say when to try again", err)
		}
	}
	first := must("standard", "jane", "u-1")
	second := must("standard", "jane", "u-2")
	refused("standard", "jane", "u-3", `user "jane" has 2 sessions open on targets of class "standard"`)
	other := must("other", "jane", "u-1")
	must("standard", "joe", "u-1")
	refused("standard", "ann", "u-1", `target "web" has 3 sessions open`)
	first.End(nil)
	first.End(nil) // it counts once
	third := must("standard", "jane", "u-1")
	refused("standard", "ann", "u-1", "target")
	for _, s := range []*Session{second, other, third} {
		s.End(nil)
	}
	if want := 1; len(m.users) != want || len(m.targets) != want {
		t.Errorf("%d users and %d targets are counted, want %d of each: who has left is forgotten", len(m.users), len(m.targets), want)
	}
}

func TestSessionsEndInTime(t *testing.T) {
	for name, tt := range map[string]struct {
		limits Limits
		// traffic is how often a byte passes, never if 0.
		traffic  time.Duration
		wantFrom time.Duration
		wantTo   time.Duration
		want     string
	}{
		"one that may not last is ended, busy or not": {
			limits:  Limits{MaxDuration: time.Minute, IdleTimeout: time.Hour},
			traffic: time.Second, wantFrom: time.Minute, wantTo: time.Minute,
			want: "ended after 1m0s",
		},
		"one through which nothing passes is ended": {
			limits:   Limits{IdleTimeout: time.Minute},
			wantFrom: time.Minute, wantTo: time.Minute + time.Minute/4,
			want: "nothing passed for 1m0s",
		},
		"one through which little passes goes on": {
			limits:  Limits{IdleTimeout: time.Minute, MaxDuration: 24 * time.Hour},
			traffic: 59 * time.Second, wantFrom: 24 * time.Hour, wantTo: 24 * time.Hour,
			want: "ended after 24h0m0s",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, s, err := NewManager(Options{}).Start(t.Context(), Info{Subresource: "exec"}, tt.limits)
				if err != nil {
					t.Fatal(err)
				}
				began := time.Now()
				for ctx.Err() == nil {
					if tt.traffic == 0 {
						<-ctx.Done()
						break
					}
					select {
					case <-time.After(tt.traffic):
						s.AddOut(1)
					case <-ctx.Done():
					}
				}
				took := time.Since(began)
				if took < tt.wantFrom || took > tt.wantTo {
					t.Errorf("it was ended after %s, want between %s and %s", took, tt.wantFrom, tt.wantTo)
				}
				cause := context.Cause(ctx)
				if !apierrors.IsTimeout(cause) || !strings.Contains(cause.Error(), tt.want) {
					t.Errorf("the cause is %v, want a timeout that says %q", cause, tt.want)
				}
				s.End(cause)
			})
		})
	}
}

// TestTimersEndWithTheSession: synctest fails a test that leaves one that goes
// off again and again.
func TestTimersEndWithTheSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, s, err := NewManager(Options{}).Start(t.Context(), Info{Subresource: "exec"}, Limits{IdleTimeout: time.Minute, MaxDuration: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		s.End(nil)
		time.Sleep(2 * time.Hour)
		if cause := context.Cause(ctx); cause != context.Canceled {
			t.Errorf("a session that was done has the cause %v", cause)
		}
	})
}
