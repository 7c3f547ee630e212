package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/policy"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

// PortForwardREST is the portforward subresource.
type PortForwardREST struct {
	*connector
}

var _ rest.Connecter = (*PortForwardREST)(nil)

// New implements rest.Storage.
func (*PortForwardREST) New() runtime.Object { return &v1.TargetPortForwardOptions{} }

// Destroy implements rest.Storage.
func (*PortForwardREST) Destroy() {}

// ConnectMethods implements rest.Connecter.
func (*PortForwardREST) ConnectMethods() []string { return upgradeMethods }

// NewConnectOptions implements rest.Connecter.
func (*PortForwardREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &v1.TargetPortForwardOptions{}, false, ""
}

// Connect implements rest.Connecter.
func (r *PortForwardREST) Connect(ctx context.Context, name string, options runtime.Object, responder rest.Responder) (http.Handler, error) {
	opts := options.(*v1.TargetPortForwardOptions)
	if err := badOptions(validation.ValidateTargetPortForwardOptions(opts)); err != nil {
		return nil, err
	}
	to, err := r.access(ctx, name)
	if err != nil {
		return nil, err
	}
	instance, err := pick(to.target, opts.Instance, false)
	if err != nil {
		return nil, err
	}
	var narrowed streaming.PortForwardRequest
	// Of a port that may be forwarded by UDP, though.
	var notTCP, toldNotTCP error
	for i, port := range opts.Ports {
		// Ports that are named beforehand are refused beforehand.
		if err := policy.AllowPortNumber(to.class, to.target, uint16(port)); err != nil {
			r.tell(to.target, err)
			return nil, refusedPort(i, err)
		}
		if err := policy.AllowPort(to.class, to.target, uint16(port), v1.ProtocolTCP); err != nil && notTCP == nil {
			notTCP, toldNotTCP = err, refusedPort(i, err)
		}
		narrowed.Ports = append(narrowed.Ports, uint16(port))
	}
	return r.stream(responder, to, instance, "portforward", func(w http.ResponseWriter, req *http.Request, s *session.Session, stands func()) error {
		if notTCP != nil && !slices.Contains(websocket.Subprotocols(req), streaming.MuxProtocol) {
			r.tell(to.target, notTCP)
			responder.Error(toldNotTCP)
			return notTCP
		}
		f := &forwarding{
			connector: r.connector,
			session:   s,
			began:     to.target,
			named:     opts.Instance,
			ports:     narrowed.Ports,
			picked:    instance,
			reached:   map[string]*reached{},
		}
		defer f.end(req.Context())
		// What fails here still has an HTTP status.
		conn, err := f.reach(req.Context(), to.target, instance)
		if err == nil {
			_, err = ability[driver.PortDialer](conn.conn, to.target, "portforward")
			f.leave(conn)
		}
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		backend := f.backend(req.Context())
		backend.Begun = stands
		return streaming.ServePortForward(w, req, narrowed, r.opts.Streaming, backend)
	}), nil
}

// refusedPort is the answer to a session of which a port is refused. It says
// which of them it is, so that a client can do without.
func refusedPort(i int, err error) error {
	err = statusError(err)
	if status, ok := errors.AsType[*apierrors.StatusError](err); ok {
		status.ErrStatus.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{policy.RefusedPort(i)}}
	}
	return err
}

// forwarding is a session of port-forward. Each of its streams is judged by the
// class, and led to an instance of the target, as they are when it opens: a
// session may last, and outlive the instance that it began with.
type forwarding struct {
	*connector
	session *session.Session
	// began is the target as it was when the session began.
	began *v1.Target
	// named is the only instance that the session is for; "" leaves it open.
	named string
	// ports, if there are any, are the only ones that it is for, and nothing else
	// is.
	ports []uint16

	mu sync.Mutex // protects what follows, and what a reached says that it does
	// picked is where the last stream that named no instance went.
	picked string
	// reached are the instances that new streams use, by their names.
	reached map[string]*reached
	// forwarded and listened are for the audit log.
	forwarded, listened trail
}

// reached is an open instance, which streams share.
type reached struct {
	name string
	// opened is closed when what follows is set.
	opened chan struct{}
	conn   driver.Conn
	err    error
	// givenUp says that err is only of the stream that opened it.
	givenUp bool
	// generation is that of the target that it was opened for: its driver goes
	// by that one's spec, and so has to be what the class was asked about.
	generation int64

	// users and over are protected by the session's mu. What is over has no
	// new users, and is closed with its last.
	users int
	over  bool
}

// backend makes the streams of a session, which ctx ends with.
func (f *forwarding) backend(ctx context.Context) streaming.PortForwardBackend {
	return streaming.PortForwardBackend{
		Dial:  f.dial,
		Check: f.check,
		Listen: func(call context.Context, at streaming.Endpoint) (streaming.PortListener, error) {
			listener, err := f.listen(call, at)
			if err != nil {
				return nil, err
			}
			// Each connection is new, as those are that clients open.
			listener.allowed = func() error {
				_, err := f.now(ctx, func(to *access) error {
					_, err := policy.AllowReverse(to.class, listener.at.Port)
					return err
				})
				return err
			}
			return listener, nil
		},
	}
}

// way is how a stream gets to an endpoint.
type way struct {
	// what names the endpoint.
	what string
	// allow asks the class.
	allow func(*access) error
	// find returns what connects to it. It doesn't connect.
	find func(driver.Conn, *v1.Target) (dialer, error)
}

type dialer func(context.Context) (driver.Stream, error)

// way finds the way to an endpoint.
func (f *forwarding) way(end streaming.Endpoint) (*way, error) {
	if err := f.permit(end.Network != "unix" && slices.Contains(f.ports, end.Port)); err != nil {
		return nil, err
	}
	switch end.Network {
	case "tcp", "udp":
		protocol := v1.ProtocolTCP
		if end.Network == "udp" {
			protocol = v1.ProtocolUDP
		}
		return &way{
			what:  fmt.Sprintf("%s %d", end.Network, end.Port),
			allow: func(to *access) error { return policy.AllowPort(to.class, to.target, end.Port, protocol) },
			find: func(conn driver.Conn, target *v1.Target) (dialer, error) {
				able, err := ability[driver.PortDialer](conn, target, "portforward")
				return func(ctx context.Context) (driver.Stream, error) { return able.DialPort(ctx, end.Network, end.Port) }, err
			},
		}, nil
	case "unix":
		if !policy.IsSocketPath(end.Path) {
			return nil, apierrors.NewBadRequest("the path of a unix socket has to be absolute, without '.', '..' and needless slashes: /run/app.sock, for example")
		}
		return &way{
			what:  "unix " + end.Path,
			allow: func(to *access) error { return policy.AllowSocket(to.class, end.Path) },
			find: func(conn driver.Conn, target *v1.Target) (dialer, error) {
				able, err := ability[driver.SocketDialer](conn, target, "forwarding to unix sockets")
				return func(ctx context.Context) (driver.Stream, error) { return able.DialSocket(ctx, end.Path) }, err
			},
		}, nil
	}
	return nil, apierrors.NewBadRequest(fmt.Sprintf("the network %q can't be dialled: tcp, udp and unix can", shown(end.Network)))
}

// dial connects a stream.
func (f *forwarding) dial(ctx context.Context, end streaming.Endpoint) (streaming.PortStream, error) {
	way, err := f.way(end)
	if err != nil {
		return nil, err
	}
	stream, on, err := use(ctx, f, end.Instance, way.allow, func(conn driver.Conn, target *v1.Target) (driver.Stream, error) {
		dial, err := way.find(conn, target)
		if err != nil {
			return nil, err
		}
		return dial(ctx)
	})
	if err != nil {
		return nil, err
	}
	f.note(&f.forwarded, on.name+" "+way.what)
	return f.share(on, stream), nil
}

// check does what dial does but for connecting.
func (f *forwarding) check(ctx context.Context, end streaming.Endpoint) error {
	way, err := f.way(end)
	if err != nil {
		return err
	}
	_, on, err := use(ctx, f, end.Instance, way.allow, way.find)
	if err != nil {
		return err
	}
	f.leave(on)
	return nil
}

// permit refuses what a session whose ports were named isn't for: whoever judged
// it by its options, as policies do, knew of nothing else.
func (f *forwarding) permit(named bool) error {
	if len(f.ports) == 0 || named {
		return nil
	}
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusForbidden,
		Reason:  metav1.StatusReasonForbidden,
		Message: "the session was opened for connections to certain ports alone: open one for this port, or without ports",
	}}
}

// listen has an instance's host listen.
func (f *forwarding) listen(ctx context.Context, at streaming.Endpoint) (*reverse, error) {
	if err := f.permit(false); err != nil {
		return nil, err
	}
	if at.Network != "tcp" {
		return nil, apierrors.NewBadRequest(fmt.Sprintf("the network %q can't be listened to: tcp can", shown(at.Network)))
	}
	var ports []v1.PortRange
	allow := func(to *access) (err error) {
		ports, err = policy.AllowReverse(to.class, at.Port)
		return err
	}
	listener, on, err := use(ctx, f, at.Instance, allow, func(conn driver.Conn, target *v1.Target) (driver.Listener, error) {
		able, err := ability[driver.PortListener](conn, target, "reverse forwarding")
		if err != nil {
			return nil, err
		}
		return able.ListenPort(ctx, ports)
	})
	if err != nil {
		return nil, err
	}
	at = streaming.Endpoint{Network: "tcp", Port: listener.Port(), Instance: on.name}
	f.note(&f.listened, fmt.Sprintf("%s tcp %d", on.name, at.Port))
	return &reverse{
		forwarding: f,
		listener:   listener,
		at:         at,
		on:         on,
		release:    sync.OnceFunc(func() { f.leave(on) }),
	}, nil
}

// use asks the class whether a stream may be, finds an instance for it, and
// makes it there. Who succeeds leaves the instance when the stream has ended.
func use[T any](ctx context.Context, f *forwarding, instance string, allow func(*access) error, try func(driver.Conn, *v1.Target) (T, error)) (made T, on *reached, err error) {
	to, err := f.now(ctx, allow)
	if err != nil {
		return made, nil, err
	}
	names, err := f.candidates(to.target, instance)
	if err != nil {
		return made, nil, err
	}
	for _, name := range names {
		if on, err = f.reach(ctx, to.target, name); err == nil {
			if made, err = try(on.conn, to.target); err == nil {
				f.pick(instance, name)
				return made, on, nil
			}
			f.tell(to.target, err)
			// What it goes through may be lost: the next stream has it anew.
			if kind := driver.KindOf(err); kind == driver.Unavailable || kind == driver.Internal {
				f.retire(on)
			}
			f.leave(on)
		}
		// The status of an instance that has ended lags behind it.
		if driver.KindOf(err) != driver.NotRunning {
			break
		}
	}
	return made, nil, statusError(err)
}

// pick remembers where a stream led to that didn't say.
func (f *forwarding) pick(said, name string) {
	if said == "" {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.picked = name
	}
}

// now returns the target and its class as they are by now, if that class allows
// the target, and what a stream wants.
func (f *forwarding) now(ctx context.Context, allow func(*access) error) (*access, error) {
	// No older than the session: a cache may answer.
	ctx = request.WithNamespace(ctx, f.began.Namespace)
	to, err := f.accessAt(ctx, f.began.Name, f.began.ResourceVersion)
	if err != nil {
		return nil, err
	}
	if to.target.UID != f.began.UID {
		return nil, notFound(fmt.Sprintf("target %q was deleted, and another one made by its name: connect again", f.began.Name))
	}
	err = f.judge(to)
	if err == nil {
		err = allow(to)
	}
	if err != nil {
		f.tell(to.target, err)
		return nil, statusError(err)
	}
	return to, nil
}

// judge asks the class about the target, as admission has when the session began.
func (c *connector) judge(to *access) error {
	if c.opts.Unjudged {
		return nil
	}
	var services []netip.Prefix
	if !to.target.Spec.Hosted() {
		var err error
		if services, err = c.services(); err != nil {
			return err
		}
	}
	return policy.AllowTarget(to.class, to.target, services)
}

// candidates are the instances that a stream may lead to, in the order in which
// they are tried: the one that it or its session names, or else those that are
// ready, and first of these the one that the last stream led to.
func (f *forwarding) candidates(target *v1.Target, name string) ([]string, error) {
	if f.named != "" {
		if name != "" && name != f.named {
			return nil, apierrors.NewBadRequest(fmt.Sprintf("the session is for instance %s alone: open another, or one without an instance", f.named))
		}
		name = f.named
	}
	first, err := pick(target, name, false)
	if err != nil {
		return nil, err
	}
	names := []string{first}
	if name != "" {
		return names, nil
	}
	f.mu.Lock()
	picked := f.picked
	f.mu.Unlock()
	for _, instance := range target.Status.Instances {
		switch {
		case !instance.Ready || instance.Name == first:
		case instance.Name == picked:
			names = slices.Insert(names, 0, picked)
		default:
			names = append(names, instance.Name)
		}
	}
	return names, nil
}

// reach returns an open instance, which the caller leaves.
func (f *forwarding) reach(ctx context.Context, target *v1.Target, name string) (*reached, error) {
	f.mu.Lock()
	conn := f.reached[name]
	if conn != nil && conn.generation == target.Generation {
		conn.users++
		f.mu.Unlock()
		select {
		case <-conn.opened:
		case <-ctx.Done():
			f.leave(conn)
			return nil, context.Cause(ctx)
		}
		if conn.err != nil {
			f.leave(conn)
			if conn.givenUp && ctx.Err() == nil {
				return f.reach(ctx, target, name) // it isn't found any more
			}
			return nil, conn.err
		}
		return conn, nil
	}
	previous := conn
	conn = &reached{name: name, opened: make(chan struct{}), generation: target.Generation, users: 1}
	f.reached[name] = conn
	f.mu.Unlock()
	if previous != nil {
		f.retire(previous)
	}

	conn.conn, conn.err = f.open(ctx, &access{target: target}, name)
	if conn.err == nil {
		close(conn.opened)
		return conn, nil
	}
	conn.givenUp = ctx.Err() != nil
	f.retire(conn)
	close(conn.opened)
	f.leave(conn)
	return nil, conn.err
}

// retire keeps new streams from an open instance.
func (f *forwarding) retire(conn *reached) {
	f.mu.Lock()
	conn.over = true
	unused := conn.users == 0
	if f.reached[conn.name] == conn {
		delete(f.reached, conn.name)
	}
	f.mu.Unlock()
	if unused {
		conn.close()
	}
}

// leave says that a stream doesn't use an open instance any more.
func (f *forwarding) leave(conn *reached) {
	f.mu.Lock()
	conn.users--
	unused := conn.over && conn.users == 0
	f.mu.Unlock()
	if unused {
		conn.close()
	}
}

func (r *reached) close() {
	if r.conn != nil {
		r.conn.Close()
	}
}

// share counts a stream, and has it leave what it goes through when it is
// closed.
func (f *forwarding) share(on *reached, stream driver.Stream) streaming.PortStream {
	shared := &sharedStream{Stream: f.session.CountBackend(stream), release: sync.OnceFunc(func() { f.leave(on) })}
	if tcp, ok := stream.(lingerer); ok {
		return &resettable{shared, tcp}
	}
	return shared
}

type sharedStream struct {
	session.Stream
	release func()
}

func (s *sharedStream) Close() error {
	defer s.release()
	return s.Stream.Close()
}

// lingerer is a connection that can be reset, as *net.TCPConn can: by closing it
// with nothing left to send. Package streaming tells a client's reset by it.
type lingerer interface{ SetLinger(seconds int) error }

// hangUp closes a connection that is refused, with a reset if it can be: its peer
// isn't to take that for an end in order.
func hangUp(stream driver.Stream) {
	if tcp, ok := stream.(lingerer); ok {
		tcp.SetLinger(0)
	}
	stream.Close()
}

type resettable struct {
	*sharedStream
	lingerer
}

// end closes what is left when all streams have ended, and says in the audit log
// what they were for.
func (f *forwarding) end(ctx context.Context) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, conn := range f.reached {
		conn.close()
	}
	for key, trail := range map[string]trail{"forwarded": f.forwarded, "listened": f.listened} {
		if len(trail.entries) > 0 {
			audit.AddAuditAnnotation(ctx, auditPrefix+key, trail.String())
		}
	}
}

// shown is what an error repeats of what a client sent.
func shown(text string) string {
	const most = 64
	if len(text) <= most {
		return text
	}
	return text[:most] + "…"
}

// trail is a bounded set of texts, in the order of their first time.
type trail struct {
	entries []string // as JSON
	bytes   int
	more    bool
}

func (f *forwarding) note(to *trail, text string) {
	encoded, err := json.Marshal(text)
	if err != nil {
		return // strings can always be encoded
	}
	entry := string(encoded)
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case to.more, slices.Contains(to.entries, entry):
	case to.bytes+len(entry) > maxAuditValue-64: // what else there is in it
		to.entries, to.more = append(to.entries, `"…"`), true
	default:
		to.entries = append(to.entries, entry)
		to.bytes += len(entry) + len(",")
	}
}

func (t trail) String() string { return "[" + strings.Join(t.entries, ",") + "]" }

// reverse is a listener of a session.
type reverse struct {
	*forwarding
	listener driver.Listener
	at       streaming.Endpoint
	on       *reached
	release  func()
	// allowed asks the class, as it is by now.
	allowed func() error
}

var _ streaming.PortListener = (*reverse)(nil)

// Accept implements streaming.PortListener. A class that doesn't allow the port
// any more, or a target that is gone, ends the listener.
func (r *reverse) Accept() (streaming.PortStream, error) {
	// It is the stream's, which may outlive the listener.
	r.mu.Lock()
	r.on.users++
	r.mu.Unlock()
	for {
		stream, err := r.listener.Accept()
		if err != nil {
			r.leave(r.on)
			return nil, statusError(err)
		}
		if err := r.allowed(); err == nil {
			return r.share(r.on, stream), nil
		} else if hangUp(stream); apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
			r.Close()
			r.leave(r.on)
			return nil, err
		}
		// What the class says can't be known at the moment: this connection is
		// refused, and others may go.
	}
}

// Endpoint implements streaming.PortListener.
func (r *reverse) Endpoint() streaming.Endpoint { return r.at }

// Close implements streaming.PortListener.
func (r *reverse) Close() error {
	defer r.release()
	return r.listener.Close()
}
