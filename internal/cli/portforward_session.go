package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/utils/clock"

	"aaserver.io/aaserver/streaming"
)

const (
	// connectTimeout bounds how long a connection waits until it is forwarded:
	// for a session, and then for the target. An attempt to make a session has
	// no longer, either.
	connectTimeout = 30 * time.Second
	// minRetry is the least time between the attempts to make a session, and
	// between those to renew one that stands but has nothing behind it.
	minRetry = time.Second
	// minSPDYRenewal is the latter for SPDY, which doesn't tell a port that
	// refuses from an instance that is gone.
	minSPDYRenewal = 10 * time.Second
	// settled is how long ago the last attempt was when the pauses begin anew.
	settled = 2 * time.Minute
)

// errNoAnswer is the cause with which an attempt ends that takes too long.
var errNoAnswer = fmt.Errorf("nothing has answered for %v", connectTimeout)

// retries are the pauses before a session is made again while nobody asks for
// it: 1 s to 30 s.
var retries = wait.Backoff{Duration: time.Second, Factor: 2, Jitter: 0.5, Steps: 10, Cap: 20 * time.Second}

// tunnel is a port-forward session with a server, in some protocol.
type tunnel interface {
	// Dial connects to an end on the target's side. ctx bounds the dialling.
	Dial(ctx context.Context, to streaming.Endpoint) (stream, error)
	// Listen has the target's side listen.
	Listen(ctx context.Context, at streaming.Endpoint) (streaming.PortListener, error)
	// Done is closed when the session has ended; Err says why.
	Done() <-chan struct{}
	Err() error
	// Close ends it, and all its connections by a reset.
	Close() error
	// supports returns an error for the user if the protocol can't carry a
	// forward.
	supports(f forward) error
	// check asks whether the target may be connected to at an end, if the
	// protocol can ask. Nothing is connected to.
	check(ctx context.Context, to streaming.Endpoint) error
}

// muxTunnel is a session in the mux protocol, which carries everything.
type muxTunnel struct {
	*streaming.MuxClient
}

var _ tunnel = muxTunnel{}

func (t muxTunnel) Dial(ctx context.Context, to streaming.Endpoint) (stream, error) {
	s, err := t.MuxClient.Dial(ctx, to)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (muxTunnel) supports(forward) error { return nil }

func (t muxTunnel) check(ctx context.Context, to streaming.Endpoint) error { return t.Check(ctx, to) }

// refusedError is the target's refusal of a connection over SPDY, which has no
// codes.
type refusedError struct{ error }

// noSessionError ends the wait for a session.
type noSessionError struct {
	reason error
}

func (e *noSessionError) Error() string {
	return "there is no connection to the server: " + sentence(e.reason)
}

// session is a tunnel and how many use it.
type session struct {
	tunnel
	since time.Time
	users int
	// retired says that another one has taken its place: it ends with its last
	// user.
	retired bool
	// replaced is closed when that happens.
	replaced chan struct{}
}

// keeper keeps a session with a target:
//
//	        opened            lost: told, once
//	start ─────────▶ standing ─────────────────▶ lost ─┐ failed: told if the reason is a new one
//	                  │  ▲  ▲                     │ ▲──┘
//	 has nothing      ▼  │  └─────────────────────┘
//	 behind it any   renewed                     opened: at once for a connection that
//	 more                                        waits, else after a pause; told
//
// A renewed session goes on for the connections that it has.
type keeper struct {
	// target is what to call it.
	target string
	// open makes a session within a bounded time.
	open   func(context.Context) (tunnel, error)
	errOut io.Writer

	// wanted is told when a connection waits for a session.
	wanted chan struct{}
	// renewals are sessions that are to be renewed.
	renewals chan *session

	// mu protects what follows, and what sessions hold.
	mu sync.Mutex
	// current is nil while there is no session.
	current *session
	// reason is why there is none.
	reason error
	// changed is closed, and replaced, when one of these changes or an attempt
	// has failed.
	changed chan struct{}
	// open sessions, the retired ones too.
	sessions map[*session]bool
}

// newKeeper makes the first session. What is wrong with it is an error.
func newKeeper(ctx context.Context, target string, errOut io.Writer, open func(context.Context) (tunnel, error)) (*keeper, error) {
	k := &keeper{
		target:   target,
		open:     open,
		errOut:   errOut,
		wanted:   make(chan struct{}, 1),
		renewals: make(chan *session),
		changed:  make(chan struct{}),
		sessions: map[*session]bool{},
	}
	t, err := k.open(ctx)
	if err != nil {
		return nil, err
	}
	k.set(t, nil)
	return k, nil
}

// set replaces the current session, or says why there is none.
func (k *keeper) set(t tunnel, reason error) {
	k.mu.Lock()
	old := k.current
	k.current, k.reason = nil, reason
	if t != nil {
		k.current = &session{tunnel: t, since: time.Now(), replaced: make(chan struct{})}
		k.sessions[k.current] = true
	}
	var unused *session
	if old != nil {
		old.retired = true
		close(old.replaced)
		if old.users == 0 || t == nil {
			unused = old
			delete(k.sessions, old)
		}
	}
	close(k.changed)
	k.changed = make(chan struct{})
	k.mu.Unlock()
	if unused != nil {
		_ = unused.Close()
	}
}

// run keeps the session until ctx ends, and then closes it.
func (k *keeper) run(ctx context.Context) {
	defer k.close()
	pauses := retries.DelayWithReset(clock.RealClock{}, settled)
	var attempt time.Time
	for {
		s := k.current // nobody else sets it
		select {
		case <-ctx.Done():
			return
		case <-s.Done():
			k.set(nil, s.Err())
			fmt.Fprintf(k.errOut, "The connection to target %q was lost: %s. Connecting again.\n", k.target, sentence(s.Err()))
			if !k.reconnect(ctx, &attempt, pauses) {
				return
			}
			fmt.Fprintf(k.errOut, "Connected to target %q again.\n", k.target)
		case asked := <-k.renewals:
			if asked == s && time.Since(attempt) >= minRetry {
				attempt = time.Now()
				if t, err := k.open(ctx); err == nil {
					k.set(t, nil)
					continue
				}
			}
			k.announce()
		}
	}
}

// reconnect makes a session, however long it takes, and returns false if ctx
// ended first.
func (k *keeper) reconnect(ctx context.Context, attempt *time.Time, pauses wait.DelayFunc) bool {
	told := ""
	for {
		timer := time.NewTimer(pauses())
		select {
		case <-timer.C:
		case <-k.wanted:
			timer.Reset(minRetry - time.Since(*attempt))
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
		case <-ctx.Done():
		}
		timer.Stop()
		if ctx.Err() != nil {
			return false
		}
		*attempt = time.Now()
		t, err := k.open(ctx)
		if err == nil {
			k.set(t, nil)
			return true
		}
		if ctx.Err() != nil {
			return false
		}
		k.set(nil, err)
		if reason := sentence(err); reason != told {
			told = reason
			fmt.Fprintf(k.errOut, "Target %q can't be connected to: %s. It is tried again until it can.\n", k.target, reason)
		}
	}
}

// announce wakes those who wait for a change.
func (k *keeper) announce() {
	k.mu.Lock()
	defer k.mu.Unlock()
	close(k.changed)
	k.changed = make(chan struct{})
}

// close closes all sessions.
func (k *keeper) close() {
	k.mu.Lock()
	sessions := k.sessions
	k.sessions = map[*session]bool{}
	k.mu.Unlock()
	for s := range sessions {
		_ = s.Close()
	}
}

// acquire waits for a session, for no longer than ctx lasts. release follows
// it.
func (k *keeper) acquire(ctx context.Context) (*session, error) {
	for {
		k.mu.Lock()
		s, changed, reason := k.current, k.changed, k.reason
		if s != nil && !closed(s.Done()) {
			s.users++
			k.mu.Unlock()
			return s, nil
		}
		k.mu.Unlock()
		if s == nil {
			select {
			case k.wanted <- struct{}{}:
			default:
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			if s != nil {
				reason = s.Err()
			}
			return nil, &noSessionError{reason: reason}
		}
	}
}

// hold has one more use a session that is in use.
func (k *keeper) hold(s *session) {
	k.mu.Lock()
	defer k.mu.Unlock()
	s.users++
}

// release closes a retired session after its last user.
func (k *keeper) release(s *session) {
	k.mu.Lock()
	s.users--
	unused := s.retired && s.users == 0 && k.sessions[s]
	if unused {
		delete(k.sessions, s)
	}
	k.mu.Unlock()
	if unused {
		_ = s.Close()
	}
}

// renew asks for another session in place of one that stands, and waits until
// that was tried. It returns whether there is another one.
func (k *keeper) renew(ctx context.Context, s *session) bool {
	k.mu.Lock()
	changed := k.changed
	k.mu.Unlock()
	select {
	case k.renewals <- s:
	case <-changed:
	case <-s.Done():
	case <-ctx.Done():
		return false
	}
	select {
	case <-changed:
	case <-s.Done():
	case <-ctx.Done():
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current != s
}

// connect dials through whatever session there is, waiting for one if need be.
// The session is released by the function that is returned.
func (k *keeper) connect(ctx context.Context, to streaming.Endpoint) (*session, stream, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, connectTimeout, errNoAnswer)
	defer cancel()
	for renewed := false; ; {
		s, err := k.acquire(ctx)
		if err != nil {
			return nil, nil, err
		}
		conn, err := s.Dial(ctx, to)
		if err == nil {
			return s, conn, nil
		}
		k.release(s)
		switch {
		case ctx.Err() != nil:
			return nil, nil, context.Cause(ctx)
		case closed(s.Done()):
			// It was lost; there will be another.
		case !renewed && stale(err) && k.renew(ctx, s):
			renewed = true
		default:
			return nil, nil, err
		}
	}
}

// stale says whether a refusal may come from a session whose target or instance
// is no longer there, which a new session would find anew.
func stale(err error) bool {
	return apierrors.IsNotFound(err) || apierrors.IsConflict(err) || apierrors.IsGone(err)
}

// refused tells of a refusal that came without a code, after the connection was
// opened. The next connection may have another session then.
func (k *keeper) refused(ctx context.Context, s *session) {
	if time.Since(s.since) >= minSPDYRenewal {
		k.renew(ctx, s)
	}
}

// sentence returns an error's text as it stands within a sentence: without
// what the protocols put around what the server says.
func sentence(err error) string {
	message := err.Error()
	var status apierrors.APIStatus
	if errors.As(err, &status) && status.Status().Message != "" {
		message = status.Status().Message
	} else if farewell, ok := errors.AsType[*websocket.CloseError](err); ok && farewell.Text != "" {
		message = farewell.Text
	} else if request, ok := errors.AsType[*url.Error](err); ok {
		message = request.Err.Error()
	}
	return strings.TrimRight(strings.Join(strings.Fields(message), " "), ".")
}
