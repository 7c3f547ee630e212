// Package session knows who is connected to what. Every stream of the server
// (log, exec, attach, portforward) is a Session of its Manager: it is counted
// against a limit, ends with a cause that is logged and measured, and is ended
// and waited for when the server shuts down.
//
// One session, by its caller:
//
//	ctx, session, err := manager.Start(ctx, info, limits) // or 429, 503
//	err = serve(ctx)                              // ends when ctx does
//	session.End(err)                              // exactly one counts
package session

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/component-base/metrics"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

// DefaultMax is how many sessions a server has at most, unless told otherwise.
const DefaultMax = 10000

// retryAfterSeconds is when a client that was refused is to try again.
const retryAfterSeconds = 5

var (
	// ErrTooMany refuses a session: the server has as many as it may.
	ErrTooMany error = apierrors.NewTooManyRequests("too many sessions are open on this server: close some, or try again later", retryAfterSeconds)

	// ErrDraining refuses a session, and is the cause that ends one, when the
	// server shuts down. The server that comes next, or another replica of it,
	// takes the connection.
	ErrDraining error = &apierrors.StatusError{ErrStatus: metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusServiceUnavailable,
		Reason:  metav1.StatusReasonServiceUnavailable,
		Message: "the server is shutting down: connect again",
		Details: &metav1.StatusDetails{RetryAfterSeconds: 1},
	}}
)

// Limits bound a session and those beside it. What is 0 isn't bounded.
type Limits struct {
	// PerUser is how many sessions its user may have open on targets of its
	// class, this one included; PerTarget how many its target may.
	PerUser, PerTarget int
	// IdleTimeout is how long it may go without a byte either way. It is ended
	// within a quarter of that time more.
	IdleTimeout time.Duration
	// MaxDuration is how long it may last.
	MaxDuration time.Duration
}

// Info says who is connected to what.
type Info struct {
	// User is the name of the user.
	User string
	// Class is the name of the target's TargetClass.
	Class string
	// Namespace and Target name the target; TargetUID tells it from a later
	// one of the same name.
	Namespace, Target string
	TargetUID         types.UID
	// Instance is the name of the target's instance, "" if it is all of them.
	Instance string
	// Subresource is log, exec, attach or portforward.
	Subresource string
	// Protocol is how the client connects: one of the constants below. The
	// subprotocol is negotiated after a session has started.
	Protocol string
}

// Protocols that a session may have.
const (
	ProtocolHTTP      = "http"
	ProtocolWebSocket = "websocket"
	ProtocolSPDY      = "spdy"
)

// Options of a Manager. The zero value is good.
type Options struct {
	// Max is how many sessions there may be at once; DefaultMax if 0.
	Max int
	// Clock tells the time; the real one if nil.
	Clock clock.PassiveClock
	// Code returns the result code, as of HTTP, of a session that ended with
	// an error, by what the caller knows of its errors: an exit code is no
	// failure, and StatusClientGone is not the server's. 0, or a nil Code,
	// leaves it to the Manager, which knows APIStatus and those of contexts.
	Code func(error) int
}

// Manager has the sessions of a server.
type Manager struct {
	max     int
	clock   clock.PassiveClock
	code    func(error) int
	metrics *sessionMetrics

	// mu protects what follows. That a session is registered or refused, and
	// that draining begins, happens under it: none slips in between.
	mu       sync.Mutex
	sessions map[*Session]struct{}
	users    map[classUser]int
	targets  map[types.UID]int
	draining bool
	// drained is closed once draining and without sessions.
	drained chan struct{}
}

// classUser is whose sessions are counted against Limits.PerUser.
type classUser struct{ class, user string }

// NewManager returns a Manager without sessions.
func NewManager(opts Options) *Manager {
	if opts.Max <= 0 {
		opts.Max = DefaultMax
	}
	if opts.Clock == nil {
		opts.Clock = clock.RealClock{}
	}
	return &Manager{
		max:      opts.Max,
		clock:    opts.Clock,
		code:     opts.Code,
		metrics:  newMetrics(),
		sessions: map[*Session]struct{}{},
		users:    map[classUser]int{},
		targets:  map[types.UID]int{},
		drained:  make(chan struct{}),
	}
}

// Register registers the metrics. It is called before the first Start, with
// legacyregistry.Register or the Register of a registry of one's own.
func (m *Manager) Register(register func(metrics.Registerable) error) error {
	for _, metric := range m.metrics.all() {
		if err := register(metric); err != nil {
			return fmt.Errorf("registering the metrics of sessions: %w", err)
		}
	}
	return nil
}

// Session is one stream.
type Session struct {
	id      string
	info    Info
	manager *Manager
	log     klog.Logger
	cancel  context.CancelCauseFunc
	started time.Time
	end     sync.Once
	// overtime and idle end the session, if they are set.
	overtime *time.Timer
	idle     atomic.Pointer[time.Timer]

	// What the client sent, and what it was sent, in bytes.
	in, out       atomic.Int64
	inAll, outAll metrics.CounterMetric
}

// Start registers a session, or refuses it with a status: 429 if there are too
// many, 503 while draining. The returned context ends when the session is to
// end, and its cause says why. The caller ends the session when nothing of it is
// left.
func (m *Manager) Start(ctx context.Context, info Info, limits Limits) (context.Context, *Session, error) {
	s := &Session{
		id:      string(uuid.NewUUID()),
		info:    info,
		manager: m,
		started: m.clock.Now(),
	}
	s.log = klog.FromContext(ctx).WithValues("session", s.id, "user", info.User,
		"target", klog.KRef(info.Namespace, info.Target), "subresource", info.Subresource)
	s.inAll, s.outAll = m.metrics.bytesOf(info)
	parent := ctx
	ctx, s.cancel = context.WithCancelCause(ctx)

	if err := m.add(s, limits); err != nil {
		s.cancel(err)
		m.metrics.ended(info, m.codeOf(err))
		s.log.Info("Session refused", "cause", err.Error())
		return parent, nil, err
	}
	s.limit(ctx, limits)
	s.log.V(2).Info("Session started", "instance", info.Instance, "protocol", info.Protocol)
	return ctx, s, nil
}

func (m *Manager) add(s *Session, limits Limits) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	user := classUser{s.info.Class, s.info.User}
	switch {
	case m.draining:
		return ErrDraining
	case len(m.sessions) >= m.max:
		return ErrTooMany
	case limits.PerUser > 0 && m.users[user] >= limits.PerUser:
		return tooMany("user %q has %d sessions open on targets of class %q, the most that one user may have there", s.info.User, limits.PerUser, s.info.Class)
	case limits.PerTarget > 0 && m.targets[s.info.TargetUID] >= limits.PerTarget:
		return tooMany("target %q has %d sessions open, the most that it may have", s.info.Target, limits.PerTarget)
	}
	m.sessions[s] = struct{}{}
	m.users[user]++
	m.targets[s.info.TargetUID]++
	m.metrics.started(s.info)
	return nil
}

func tooMany(format string, args ...any) error {
	return apierrors.NewTooManyRequests(fmt.Sprintf(format, args...)+": close some, or try again later", retryAfterSeconds)
}

// limit has the session end when its time is over.
func (s *Session) limit(ctx context.Context, limits Limits) {
	if most := limits.MaxDuration; most > 0 {
		s.overtime = time.AfterFunc(most, func() {
			s.cancel(timedOut("the session was ended after %s, the longest that it may last: connect again", most))
		})
	}
	if most := limits.IdleTimeout; most > 0 {
		s.watchIdle(ctx, most, 0, 0)
	}
}

// idleChecks is how often a session is looked at in the time that it may be
// idle. That costs what passes through it nothing.
const idleChecks = 4

// watchIdle looks at the session after a while: whether more than moved bytes
// have passed, or it was quiet for one time more.
func (s *Session) watchIdle(ctx context.Context, most time.Duration, moved int64, quiet int) {
	s.idle.Store(time.AfterFunc(max(most/idleChecks, 1), func() {
		if ctx.Err() != nil {
			return
		}
		in, out := s.Bytes()
		if in+out != moved {
			s.watchIdle(ctx, most, in+out, 0)
		} else if quiet+1 < idleChecks {
			s.watchIdle(ctx, most, moved, quiet+1)
		} else {
			s.cancel(timedOut("the session was ended because nothing passed for %s, the longest that it may be idle", most))
		}
	}))
}

func timedOut(format string, args ...any) error {
	return apierrors.NewTimeoutError(fmt.Sprintf(format, args...), 0)
}

func (m *Manager) remove(s *Session) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, s)
	user := classUser{s.info.Class, s.info.User}
	if m.users[user]--; m.users[user] == 0 {
		delete(m.users, user)
	}
	if m.targets[s.info.TargetUID]--; m.targets[s.info.TargetUID] == 0 {
		delete(m.targets, s.info.TargetUID)
	}
	if m.draining && len(m.sessions) == 0 {
		close(m.drained)
	}
}

// Drain refuses new sessions, ends every one there is with ErrDraining, and
// returns when all have ended, or with an error that tells how many have not
// when ctx ends. It may be called again.
func (m *Manager) Drain(ctx context.Context) error {
	m.mu.Lock()
	if !m.draining {
		m.draining = true
		if len(m.sessions) == 0 {
			close(m.drained)
		}
	}
	for s := range m.sessions {
		s.cancel(ErrDraining)
	}
	m.mu.Unlock()

	select {
	case <-m.drained:
		return nil
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.sessions) == 0 {
		return nil
	}
	return fmt.Errorf("sessions that had not ended: %d: %w", len(m.sessions), context.Cause(ctx))
}

// ID names the session; it is unique everywhere.
func (s *Session) ID() string { return s.id }

// End says that nothing of the session is left. err is why it ended, nil if it
// was done. The first call counts.
func (s *Session) End(err error) {
	s.end.Do(func() {
		duration := s.manager.clock.Since(s.started)
		s.cancel(err)
		for _, timer := range []*time.Timer{s.overtime, s.idle.Load()} {
			if timer != nil {
				timer.Stop()
			}
		}
		s.manager.metrics.finished(s.info, s.manager.codeOf(err), duration)
		cause := "done"
		if err != nil {
			cause = err.Error()
		}
		s.log.Info("Session ended", "instance", s.info.Instance, "protocol", s.info.Protocol,
			"duration", duration, "bytesIn", s.in.Load(), "bytesOut", s.out.Load(), "cause", cause)
		// Last: once it is removed, Drain returns and the process may end.
		s.manager.remove(s)
	})
}

// Bytes returns how many bytes the client has sent, and was sent, by now.
func (s *Session) Bytes() (in, out int64) { return s.in.Load(), s.out.Load() }

// AddIn counts bytes that the client sent.
func (s *Session) AddIn(bytes int) {
	if bytes > 0 {
		s.in.Add(int64(bytes))
		s.inAll.Add(float64(bytes))
	}
}

// AddOut counts bytes that the client was sent.
func (s *Session) AddOut(bytes int) {
	if bytes > 0 {
		s.out.Add(int64(bytes))
		s.outAll.Add(float64(bytes))
	}
}

// CountIn counts what is read from the client. Of nil it makes nil.
func (s *Session) CountIn(r io.ReadCloser) io.ReadCloser {
	if r == nil {
		return nil
	}
	return &countedReader{ReadCloser: r, session: s}
}

type countedReader struct {
	io.ReadCloser
	session *Session
}

func (r *countedReader) Read(p []byte) (int, error) {
	n, err := r.ReadCloser.Read(p)
	r.session.AddIn(n)
	return n, err
}

// WriteTo lets io.Copy use the client's own, which needs no buffer.
func (r *countedReader) WriteTo(w io.Writer) (int64, error) {
	return io.Copy(writerFunc(func(p []byte) (int, error) {
		n, err := w.Write(p)
		r.session.AddIn(n)
		return n, err
	}), r.ReadCloser)
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// CountOut counts what is written to the client. Of nil it makes nil.
func (s *Session) CountOut(w io.Writer) io.Writer {
	if w == nil {
		return nil
	}
	return &countedWriter{w: w, session: s}
}

type countedWriter struct {
	w       io.Writer
	session *Session
}

func (w *countedWriter) Write(p []byte) (int, error) {
	n, err := w.w.Write(p)
	w.session.AddOut(n)
	return n, err
}

// Stream is a connection whose directions end independently; driver.Stream is
// one.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// CountBackend counts a connection to a backend: what is written to it comes
// from the client, what is read from it goes there.
func (s *Session) CountBackend(stream Stream) Stream {
	return &countedStream{Stream: stream, session: s}
}

type countedStream struct {
	Stream
	session *Session
}

func (c *countedStream) Read(p []byte) (int, error) {
	n, err := c.Stream.Read(p)
	c.session.AddOut(n)
	return n, err
}

func (c *countedStream) Write(p []byte) (int, error) {
	n, err := c.Stream.Write(p)
	c.session.AddIn(n)
	return n, err
}

// SetLinger lets a forwarded connection be reset, if the backend's can be.
func (c *countedStream) SetLinger(seconds int) error {
	if s, ok := c.Stream.(interface{ SetLinger(int) error }); ok {
		return s.SetLinger(seconds)
	}
	return nil
}

// StatusClientGone is the result code of a session that its client ended
// without a goodbye, as in nginx's logs; HTTP has none for it.
const StatusClientGone = 499

// codeOf returns the result code of a session that ended with err.
func (m *Manager) codeOf(err error) int {
	if err == nil {
		return http.StatusOK
	}
	if m.code != nil {
		if code := m.code(err); code != 0 {
			return bounded(code)
		}
	}
	var status apierrors.APIStatus
	switch {
	case errors.As(err, &status):
		return bounded(int(status.Status().Code))
	case errors.Is(err, context.Canceled):
		return StatusClientGone
	case errors.Is(err, context.DeadlineExceeded):
		return http.StatusGatewayTimeout
	}
	return http.StatusInternalServerError
}

// bounded makes a code that there isn't an internal error's: codes are a label.
func bounded(code int) int {
	if code == StatusClientGone || http.StatusText(code) != "" {
		return code
	}
	return http.StatusInternalServerError
}

// sessionMetrics are values of a Manager, not of the package: a process may
// have several servers, as tests do.
type sessionMetrics struct {
	open     *metrics.GaugeVec
	total    *metrics.CounterVec
	bytes    *metrics.CounterVec
	duration *metrics.HistogramVec
}

func newMetrics() *sessionMetrics {
	return &sessionMetrics{
		open: metrics.NewGaugeVec(&metrics.GaugeOpts{
			Name:           "aaserver_sessions",
			Help:           "Sessions that are open, by subresource.",
			StabilityLevel: metrics.ALPHA,
		}, []string{"subresource"}),
		total: metrics.NewCounterVec(&metrics.CounterOpts{
			Name:           "aaserver_sessions_total",
			Help:           "Sessions that ended or were refused, by subresource, protocol and result code (499: the client went away).",
			StabilityLevel: metrics.ALPHA,
		}, []string{"subresource", "protocol", "code"}),
		bytes: metrics.NewCounterVec(&metrics.CounterOpts{
			Name:           "aaserver_session_bytes_total",
			Help:           "Bytes that clients sent (in) and were sent (out), by subresource.",
			StabilityLevel: metrics.ALPHA,
		}, []string{"subresource", "direction"}),
		duration: metrics.NewHistogramVec(&metrics.HistogramOpts{
			Name: "aaserver_session_duration_seconds",
			Help: "How long sessions took, by subresource.",
			// From 10 ms, a short exec, to 46 h, a forward over a weekend.
			Buckets:        metrics.ExponentialBuckets(0.01, 4, 13),
			StabilityLevel: metrics.ALPHA,
		}, []string{"subresource"}),
	}
}

func (m *sessionMetrics) all() []metrics.Registerable {
	return []metrics.Registerable{m.open, m.total, m.bytes, m.duration}
}

func (m *sessionMetrics) started(info Info) {
	m.open.WithLabelValues(subresourceLabel(info)).Inc()
}

func (m *sessionMetrics) ended(info Info, code int) {
	m.total.WithLabelValues(subresourceLabel(info), protocolLabel(info), strconv.Itoa(code)).Inc()
}

func (m *sessionMetrics) finished(info Info, code int, duration time.Duration) {
	m.ended(info, code)
	m.open.WithLabelValues(subresourceLabel(info)).Dec()
	m.duration.WithLabelValues(subresourceLabel(info)).Observe(duration.Seconds())
}

func (m *sessionMetrics) bytesOf(info Info) (in, out metrics.CounterMetric) {
	subresource := subresourceLabel(info)
	return m.bytes.WithLabelValues(subresource, "in"), m.bytes.WithLabelValues(subresource, "out")
}

// A label's values are bounded here, whatever a client sends: those that
// aren't known are one.
const otherLabel = "other"

func subresourceLabel(info Info) string {
	switch info.Subresource {
	case "log", "exec", "attach", "portforward":
		return info.Subresource
	}
	return otherLabel
}

func protocolLabel(info Info) string {
	switch info.Protocol {
	case ProtocolHTTP, ProtocolWebSocket, ProtocolSPDY:
		return info.Protocol
	}
	return otherLabel
}
