package target

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/apis/audit"
	auditing "k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/client-go/tools/record"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

// fakePorts is a driver whose streams are pipes, and a store of one target and
// one class. Everything in it may be changed between two streams.
type fakePorts struct {
	mu     sync.Mutex // protects what follows
	target *v1.Target // nil if there is none
	class  *v1.TargetClass
	// unreadable is how many reads of the class are to fail.
	unreadable int
	// fail is what comes of streams to an instance, instead of one.
	fail map[string]error
	// opening, unless nil, is received from by each Open.
	opening chan struct{}
	// dialOnly has connections lack the other abilities.
	dialOnly bool
	// log is what was called, in order.
	log []string
	// streams are those that were made.
	streams []*fakeStream
	// listener is the last that was made.
	listener *fakeListener
	// asked are the resource versions that targets were asked for by.
	asked []string
}

func (d *fakePorts) set(change func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	change()
}

// took returns what was called since the last time.
func (d *fakePorts) took() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	log := d.log
	d.log = nil
	return log
}

func (d *fakePorts) note(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.log = append(d.log, fmt.Sprintf(format, args...))
}

// Get implements rest.Getter.
func (d *fakePorts) Get(ctx context.Context, name string, opts *metav1.GetOptions) (runtime.Object, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asked = append(d.asked, opts.ResourceVersion)
	if d.target == nil || d.target.Name != name || d.target.Namespace != request.NamespaceValue(ctx) {
		return nil, apierrors.NewNotFound(api.Resource("targets"), name)
	}
	out := &api.Target{}
	return out, v1.Convert_v1_Target_To_streaming_Target(d.target.DeepCopy(), out, nil)
}

// Class implements policy.Classes.
func (d *fakePorts) Class(_ context.Context, name string) (*v1.TargetClass, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unreadable > 0 {
		d.unreadable--
		return nil, apierrors.NewServiceUnavailable("the storage is down")
	}
	if d.class == nil || d.class.Name != name {
		return nil, apierrors.NewNotFound(api.Resource("targetclasses"), name)
	}
	return d.class.DeepCopy(), nil
}

// DefaultClass implements policy.Classes.
func (d *fakePorts) DefaultClass(context.Context) (string, error) { return "", nil }

func (d *fakePorts) Open(ctx context.Context, req driver.Request) (driver.Conn, error) {
	d.mu.Lock()
	opening, dialOnly := d.opening, d.dialOnly
	d.mu.Unlock()
	if opening != nil {
		select {
		case <-opening:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	d.note("open %s of generation %d", req.Instance, req.Target.Generation)
	conn := &portsConn{driver: d, instance: req.Instance}
	if dialOnly {
		return struct {
			driver.Conn
			driver.PortDialer
		}{conn, conn}, nil
	}
	return conn, nil
}

type portsConn struct {
	driver   *fakePorts
	instance string
}

func (c *portsConn) Close() error {
	c.driver.note("close %s", c.instance)
	return nil
}

func (c *portsConn) stream(what string) (driver.Stream, error) {
	d := c.driver
	d.note("%s %s", c.instance, what)
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.fail[c.instance]; err != nil {
		return nil, err
	}
	stream := &fakeStream{Reader: strings.NewReader("hello")}
	d.streams = append(d.streams, stream)
	return stream, nil
}

func (c *portsConn) DialPort(_ context.Context, network string, port uint16) (driver.Stream, error) {
	return c.stream(fmt.Sprintf("%s %d", network, port))
}

func (c *portsConn) DialSocket(_ context.Context, path string) (driver.Stream, error) {
	return c.stream("unix " + path)
}

func (c *portsConn) ListenPort(_ context.Context, ports []v1.PortRange) (driver.Listener, error) {
	if _, err := c.stream(fmt.Sprintf("listens on one of %d ranges from %d", len(ports), ports[0].Port)); err != nil {
		return nil, err
	}
	l := &fakeListener{port: uint16(ports[0].Port), pending: make(chan *fakeStream), closed: make(chan struct{})}
	c.driver.set(func() { c.driver.listener = l })
	return l, nil
}

// fakeStream says hello.
type fakeStream struct {
	io.Reader
	mu     sync.Mutex // protects what follows
	got    string
	linger int
	closed int
}

func (s *fakeStream) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got += string(p)
	return len(p), nil
}

func (s *fakeStream) CloseWrite() error { return nil }

func (s *fakeStream) SetLinger(seconds int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.linger = seconds
	return nil
}

func (s *fakeStream) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
	return nil
}

func (s *fakeStream) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed > 0
}

// isReset says whether it was closed as TCP connections are to be reset.
func (s *fakeStream) isReset() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed > 0 && s.linger == 0
}

type fakeListener struct {
	port    uint16
	pending chan *fakeStream
	once    sync.Once
	closed  chan struct{}
}

func (l *fakeListener) Accept() (driver.Stream, error) {
	select {
	case stream := <-l.pending:
		return stream, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *fakeListener) Port() uint16 { return l.port }

func (l *fakeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// newPorts has a target with three instances that are ready, and a class that
// allows everything.
func newPorts() *fakePorts {
	target := &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "1", Generation: 1, ResourceVersion: "7"}}
	target.Spec.ClassName = "standard"
	target.Spec.AgentName = "local"
	target.Spec.Process = &v1.ProcessSource{Command: []string{"x"}}
	target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 80, Protocol: v1.ProtocolTCP}, {Name: "dns", Port: 53, Protocol: v1.ProtocolUDP}}
	for i := range 3 {
		target.Status.Instances = append(target.Status.Instances, v1.InstanceStatus{
			Name: fmt.Sprint("web-", i), Ready: true, State: v1.InstanceState{Running: &v1.InstanceStateRunning{}},
		})
	}
	class := &v1.TargetClass{ObjectMeta: metav1.ObjectMeta{Name: "standard"}, Spec: v1.TargetClassSpec{
		Sources: []string{v1.SourceProcess}, Agents: []string{"local"}, AgentUser: true,
		Ports: v1.PortPolicy{UnixSockets: []string{"/run/"}, Reverse: []v1.PortRange{{Port: 9000}, {Port: 9100, EndPort: 9199}}},
	}}
	return &fakePorts{target: target, class: class, fail: map[string]error{}}
}

// begin begins a session, without a client.
func (d *fakePorts) begin(t *testing.T, named string, ports ...uint16) (*forwarding, streaming.PortForwardBackend) {
	t.Helper()
	ctx, s, err := session.NewManager(session.Options{}).Start(t.Context(), session.Info{Subresource: "portforward"}, session.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.End(nil) })
	d.mu.Lock()
	defer d.mu.Unlock()
	f := &forwarding{
		connector: &connector{targets: d, opts: Options{
			Recorder: record.NewFakeRecorder(1000),
			Classes:  d,
			Drivers:  func(*v1.Target) (driver.Driver, error) { return d, nil },
		}},
		session: s,
		began:   d.target.DeepCopy(),
		named:   named,
		ports:   ports,
		picked:  "web-0",
		reached: map[string]*reached{},
	}
	return f, f.backend(ctx)
}

// dial dials and hangs up.
func dial(t *testing.T, backend streaming.PortForwardBackend, to streaming.Endpoint) error {
	t.Helper()
	stream, err := backend.Dial(t.Context(), to)
	if err != nil {
		return err
	}
	return stream.Close()
}

func wantStatus(t *testing.T, err error, code int32, text string) {
	t.Helper()
	var status apierrors.APIStatus
	if !errors.As(err, &status) || status.Status().Code != code || !strings.Contains(status.Status().Message, text) {
		t.Errorf("error %v, want a status of code %d that says %q", err, code, text)
	}
}

func TestEndpointsOfAForward(t *testing.T) {
	tcp, udp, unix := streaming.Endpoint{Network: "tcp", Port: 80}, streaming.Endpoint{Network: "udp", Port: 53}, streaming.Endpoint{Network: "unix", Path: "/run/app.sock"}
	at := func(end streaming.Endpoint, instance string) streaming.Endpoint {
		end.Instance = instance
		return end
	}
	for name, tt := range map[string]struct {
		end    streaming.Endpoint
		listen bool
		named  string
		ports  []uint16
		change func(*fakePorts)
		// want is what the driver is asked for.
		want     string
		wantCode int32
		wantErr  string
	}{
		"a TCP port":                        {end: tcp, want: "web-0 tcp 80"},
		"a UDP port":                        {end: udp, want: "web-0 udp 53"},
		"a unix socket":                     {end: unix, want: "web-0 unix /run/app.sock"},
		"a port to listen on":               {end: streaming.Endpoint{Network: "tcp", Port: 9000}, listen: true, want: "web-0 listens on one of 1 ranges from 9000"},
		"any port to listen on":             {end: streaming.Endpoint{Network: "tcp"}, listen: true, want: "web-0 listens on one of 2 ranges from 9000"},
		"an instance that the stream names": {end: at(udp, "web-2"), want: "web-2 udp 53"},
		"an instance of the session":        {end: unix, named: "web-1", want: "web-1 unix /run/app.sock"},
		"the session's, named again":        {end: at(tcp, "web-1"), named: "web-1", want: "web-1 tcp 80"},
		"another than the session's":        {end: at(tcp, "web-2"), named: "web-1", wantCode: http.StatusBadRequest, wantErr: "the session is for instance web-1 alone"},
		"one to listen on, other than the session's": {end: streaming.Endpoint{Network: "tcp", Port: 9000, Instance: "web-2"}, listen: true, named: "web-1",
			wantCode: http.StatusBadRequest, wantErr: "the session is for instance web-1 alone"},
		"an instance that there isn't":         {end: at(tcp, "web-9"), wantCode: http.StatusNotFound, wantErr: `has no instance "web-9": it has web-0, web-1, web-2`},
		"a TCP port by UDP":                    {end: streaming.Endpoint{Network: "udp", Port: 80}, wantCode: http.StatusForbidden, wantErr: "port 80 (UDP) is not among those that are open"},
		"a UDP port by TCP":                    {end: streaming.Endpoint{Network: "tcp", Port: 53}, wantCode: http.StatusForbidden, wantErr: "port 53 (TCP) is not among those that are open"},
		"a socket that isn't allowed":          {end: streaming.Endpoint{Network: "unix", Path: "/var/run/app.sock"}, wantCode: http.StatusForbidden, wantErr: `does not allow connections to the unix socket "/var/run/app.sock"; it allows: /run/`},
		"a socket by a way round":              {end: streaming.Endpoint{Network: "unix", Path: "/run/../app.sock"}, wantCode: http.StatusBadRequest, wantErr: "has to be absolute"},
		"a socket without a path":              {end: streaming.Endpoint{Network: "unix"}, wantCode: http.StatusBadRequest, wantErr: "has to be absolute"},
		"a port to listen on that isn't":       {end: streaming.Endpoint{Network: "tcp", Port: 80}, listen: true, wantCode: http.StatusForbidden, wantErr: "does not allow that port 80 is listened to for a reverse forward; it allows the ports: 9000 TCP, 9100-9199 TCP"},
		"listening by UDP":                     {end: udp, listen: true, wantCode: http.StatusBadRequest, wantErr: `the network "udp" can't be listened to: tcp can`},
		"a network that there isn't":           {end: streaming.Endpoint{Network: strings.Repeat("x", 2000)}, wantCode: http.StatusBadRequest, wantErr: `x…" can't be dialled: tcp, udp and unix can`},
		"a port of the session's":              {end: udp, ports: []uint16{80, 53}, want: "web-0 udp 53"},
		"a port that isn't":                    {end: tcp, ports: []uint16{53}, wantCode: http.StatusForbidden, wantErr: "opened for connections to certain ports alone"},
		"a socket, where ports were named":     {end: unix, ports: []uint16{80}, wantCode: http.StatusForbidden, wantErr: "opened for connections to certain ports alone"},
		"listening, where ports were named":    {end: streaming.Endpoint{Network: "tcp", Port: 9000}, listen: true, ports: []uint16{9000}, wantCode: http.StatusForbidden, wantErr: "opened for connections to certain ports alone"},
		"a socket, where the source has none":  {end: unix, change: func(d *fakePorts) { d.dialOnly = true }, wantCode: http.StatusBadRequest, wantErr: "a target of source process has no forwarding to unix sockets"},
		"listening, where the source can't":    {end: streaming.Endpoint{Network: "tcp", Port: 9000}, listen: true, change: func(d *fakePorts) { d.dialOnly = true }, wantCode: http.StatusBadRequest, wantErr: "a target of source process has no reverse forwarding"},
		"where nobody answers":                 {end: tcp, change: func(d *fakePorts) { d.fail["web-0"] = driver.Errorf(driver.Unavailable, "nobody") }, want: "web-0 tcp 80", wantCode: http.StatusServiceUnavailable, wantErr: "nobody"},
		"without the class":                    {end: unix, change: func(d *fakePorts) { d.class = nil }, wantCode: http.StatusForbidden, wantErr: `class "standard" does not exist`},
		"with the target gone":                 {end: tcp, change: func(d *fakePorts) { d.target = nil }, wantCode: http.StatusNotFound, wantErr: `"web" not found`},
		"with another target by its name":      {end: tcp, change: func(d *fakePorts) { d.target.UID = "2" }, wantCode: http.StatusNotFound, wantErr: `target "web" was deleted, and another one made by its name`},
		"with a class that allows nothing now": {end: unix, change: func(d *fakePorts) { d.class.Spec.Ports = v1.PortPolicy{} }, wantCode: http.StatusForbidden, wantErr: "it allows: none"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newPorts()
			f, backend := d.begin(t, tt.named, tt.ports...)
			defer f.end(t.Context())
			if tt.change != nil {
				tt.change(d)
			}
			var err error
			if tt.listen {
				var l streaming.PortListener
				if l, err = backend.Listen(t.Context(), tt.end); err == nil {
					if got, want := l.Endpoint(), (streaming.Endpoint{Network: "tcp", Port: 9000, Instance: "web-0"}); got != want {
						t.Errorf("it listens at %+v, want %+v", got, want)
					}
					l.Close()
				}
			} else {
				// What is judged without the driver is judged so before, too.
				asked := backend.Check(t.Context(), tt.end)
				if tt.want != "" && asked != nil {
					t.Errorf("it is refused when it is checked: %v", asked)
				} else if tt.want == "" {
					wantStatus(t, asked, tt.wantCode, tt.wantErr)
				}
				err = dial(t, backend, tt.end)
			}
			if tt.wantCode != 0 {
				wantStatus(t, err, tt.wantCode, tt.wantErr)
			} else if err != nil {
				t.Error(err)
			}
			got := ""
			for _, call := range d.took() {
				if strings.HasPrefix(call, "web-") {
					got += call
				}
			}
			if got != tt.want {
				t.Errorf("the driver was asked for %q, want %q", got, tt.want)
			}
			// A cache may answer, but not with what was before the session.
			for _, version := range d.asked {
				if version != "7" {
					t.Errorf("the target was asked for at %q, want 7", d.asked)
				}
			}
		})
	}
}

// TestChecksLeaveTheInstance: what a check goes through isn't kept by it.
func TestChecksLeaveTheInstance(t *testing.T) {
	d := newPorts()
	f, backend := d.begin(t, "")
	for _, end := range []streaming.Endpoint{{Network: "tcp", Port: 80}, {Network: "unix", Path: "/run/app.sock"}} {
		if err := backend.Check(t.Context(), end); err != nil {
			t.Error(err)
		}
	}
	if on := f.reached["web-0"]; on == nil || on.users != 0 {
		t.Errorf("after the checks, the instance is %+v", on)
	}
	f.end(t.Context())
	if got, want := d.took(), []string{"open web-0 of generation 1", "close web-0"}; !slices.Equal(got, want) {
		t.Errorf("calls %q, want %q", got, want)
	}
}

// TestRefusedPortsAreNamed, so that a client can do without them.
func TestRefusedPortsAreNamed(t *testing.T) {
	for name, tt := range map[string]struct {
		ports     []int32
		wantErr   string
		wantField string
	}{
		"of two, the second":              {ports: []int32{80, 22}, wantErr: "port 22 (TCP) is not among those that are open", wantField: "ports[1]"},
		"one of UDP, without its network": {ports: []int32{80, 53}, wantErr: "port 53 (TCP) is not among those that are open", wantField: "ports[1]"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newPorts()
			f, _ := d.begin(t, "")
			f.opts.Sessions = session.NewManager(session.Options{})
			responder := &refusals{}
			handler, err := (&PortForwardREST{f.connector}).Connect(request.WithNamespace(t.Context(), "shop"), "web", &v1.TargetPortForwardOptions{Ports: tt.ports}, responder)
			if err == nil {
				// By SPDY, which carries TCP alone.
				req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/", nil)
				handler.ServeHTTP(httptest.NewRecorder(), req)
				err = responder.err
			}
			wantStatus(t, err, http.StatusForbidden, tt.wantErr)
			var status apierrors.APIStatus
			if !errors.As(err, &status) {
				t.Fatal("it is no status")
			}
			want := &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: metav1.CauseTypeForbidden, Field: tt.wantField}}}
			if diff := cmp.Diff(want, status.Status().Details); diff != "" {
				t.Errorf("details (-want +got):\n%s", diff)
			}
		})
	}
}

// refusals is a rest.Responder that keeps the error.
type refusals struct{ err error }

func (r *refusals) Object(int, runtime.Object) {}
func (r *refusals) Error(err error)            { r.err = err }

// TestForwardOutlivesInstances: a session that named none goes on with those
// that are ready.
func TestForwardOutlivesInstances(t *testing.T) {
	d := newPorts()
	f, backend := d.begin(t, "")
	defer f.end(t.Context())
	ready := func(which ...string) {
		d.set(func() {
			for i := range d.target.Status.Instances {
				instance := &d.target.Status.Instances[i]
				instance.Ready = slices.Contains(which, instance.Name)
			}
		})
	}
	end := streaming.Endpoint{Network: "tcp", Port: 80}
	for _, step := range []struct {
		what    string
		ready   []string
		failing map[string]error
		want    []string
	}{
		{"it begins with the first", []string{"web-0", "web-1", "web-2"}, nil, []string{"web-0"}},
		{"which ends", []string{"web-1", "web-2"}, nil, []string{"web-1"}},
		{"and comes back: it stays where it is", []string{"web-0", "web-1", "web-2"}, nil, []string{"web-1"}},
		{"until that one ends, which the status doesn't say yet", []string{"web-0", "web-1", "web-2"},
			map[string]error{"web-1": driver.Errorf(driver.NotRunning, "it has ended")}, []string{"web-1", "web-0"}},
		{"and it stays there", []string{"web-0", "web-1", "web-2"}, nil, []string{"web-0"}},
		{"all but the last end", []string{"web-0", "web-1", "web-2"},
			map[string]error{"web-0": driver.Errorf(driver.NotRunning, "it has ended"), "web-1": driver.Errorf(driver.NotRunning, "it has ended")}, []string{"web-0", "web-1", "web-2"}},
	} {
		ready(step.ready...)
		d.set(func() { d.fail = step.failing })
		d.took()
		if err := dial(t, backend, end); err != nil {
			t.Errorf("%s: %v", step.what, err)
		}
		var got []string
		for _, call := range d.took() {
			if name, ok := strings.CutSuffix(call, " tcp 80"); ok {
				got = append(got, name)
			}
		}
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", step.what, diff)
		}
	}

	d.set(func() {
		d.fail = map[string]error{"web-2": driver.Errorf(driver.Unavailable, "nothing listens")}
	})
	d.took()
	wantStatus(t, dial(t, backend, end), http.StatusServiceUnavailable, "nothing listens")
	if got := strings.Join(d.took(), ", "); strings.Contains(got, "web-0 tcp") || strings.Contains(got, "web-1 tcp") {
		t.Errorf("an instance that runs and doesn't answer was passed over: %s", got)
	}
	ready()
	wantStatus(t, dial(t, backend, end), http.StatusConflict, "no instance of target")
	// One that a stream names is left alone by the others.
	ready("web-0", "web-1", "web-2")
	d.set(func() { d.fail = nil })
	if err := dial(t, backend, streaming.Endpoint{Network: "tcp", Port: 80, Instance: "web-1"}); err != nil {
		t.Error(err)
	}
	d.took()
	if err := dial(t, backend, end); err != nil {
		t.Error(err)
	}
	if got := d.took(); !slices.Contains(got, "web-2 tcp 80") {
		t.Errorf("after a stream to another instance, it went %v, want web-2 again", got)
	}

	named, backend := d.begin(t, "web-0")
	defer named.end(t.Context())
	d.set(func() {
		d.fail = map[string]error{"web-0": driver.Errorf(driver.NotRunning, "it has ended")}
	})
	wantStatus(t, dial(t, backend, end), http.StatusConflict, "it has ended")
}

// TestStreamsAreJudgedAsSessionsAre: a class that is tightened, or a target that
// is another, binds new streams of a session, and leaves those that are open.
func TestStreamsAreJudgedAsSessionsAre(t *testing.T) {
	reached := func(d *fakePorts) {
		d.target.Spec.Process = nil
		d.target.Spec.TCP = &v1.TCPSource{Endpoints: []v1.Endpoint{{Name: "a", Host: "10.96.0.1", Port: 80}}}
		d.class.Spec.Sources = []string{v1.SourceTCP}
	}
	for name, tt := range map[string]struct {
		change   func(*fakePorts)
		unjudged bool
		services error
		code     int32 // 0 if streams are to go on
		want     string
	}{
		"a class that allows other sources": {
			change: func(d *fakePorts) { d.class.Spec.Sources = []string{v1.SourceTCP} },
			code:   http.StatusForbidden, want: `spec.process: class "standard" allows the sources: tcp`,
		},
		"a class that allows other agents": {
			change: func(d *fakePorts) { d.class.Spec.Agents = []string{"edge"} },
			code:   http.StatusForbidden, want: `spec.agentName: class "standard" allows the agents: edge`,
		},
		"a class that allows other users": {
			change: func(d *fakePorts) { d.class.Spec.AgentUser = false },
			code:   http.StatusForbidden, want: "spec.process.user: class \"standard\" doesn't allow that it is left out",
		},
		"a target that has become root's": {
			change: func(d *fakePorts) { d.target.Spec.Process.User = "root" },
			code:   http.StatusForbidden, want: "root has to be named",
		},
		"a target of another class": {
			change: func(d *fakePorts) {
				d.class.Name, d.target.Spec.ClassName, d.class.Spec.Agents = "narrow", "narrow", nil
			},
			code: http.StatusForbidden, want: `class "narrow" allows the agents: none`,
		},
		"a class that is gone": {
			change: func(d *fakePorts) { d.class = nil },
			code:   http.StatusForbidden, want: `class "standard" does not exist`,
		},
		"an endpoint that has become one of the cluster's services": {
			change: reached,
			code:   http.StatusForbidden, want: "spec.tcp.endpoints[0].host",
		},
		"services that aren't known": {
			change: reached, services: errors.New("not yet"),
			code: http.StatusServiceUnavailable, want: "isn't known yet: not yet",
		},
		"a target that is gone": {
			change: func(d *fakePorts) { d.target = nil },
			code:   http.StatusNotFound, want: `"web" not found`,
		},
		"a target that was made again": {
			change: func(d *fakePorts) { d.target.UID = "2" },
			code:   http.StatusNotFound, want: "another one made by its name",
		},
		"a port that the target lists and the class doesn't open, beside another": {
			change: func(d *fakePorts) { d.class.Spec.Ports.Allowed = []v1.PortRange{{Port: 80}, {Port: 9000}} },
		},
		"a class that allows other agents, where sessions aren't judged by it": {
			change: func(d *fakePorts) { d.class.Spec.Agents = []string{"edge"} }, unjudged: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := newPorts()
			f, backend := d.begin(t, "")
			defer f.end(t.Context())
			f.opts.Unjudged = tt.unjudged
			f.opts.ServiceRanges = func() ([]netip.Prefix, error) {
				return []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12")}, tt.services
			}
			end := streaming.Endpoint{Network: "tcp", Port: 80}
			open, err := backend.Dial(t.Context(), end)
			if err != nil {
				t.Fatal(err)
			}
			defer open.Close()
			l, err := backend.Listen(t.Context(), streaming.Endpoint{Network: "tcp", Port: 9000})
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			first := d.listener
			accepted := make(chan error, 1)
			go func() {
				stream, err := l.Accept()
				if err == nil {
					err = stream.Close()
				}
				accepted <- err
			}()
			d.set(func() { tt.change(d) })
			another, errListen := backend.Listen(t.Context(), streaming.Endpoint{Network: "tcp", Port: 9000})
			if errListen == nil {
				defer another.Close()
			}
			comes := &fakeStream{Reader: strings.NewReader(""), linger: -1}
			first.pending <- comes
			if tt.code == http.StatusServiceUnavailable { // it may be known with the next one
				waitFor(t, "the reset", comes.isReset)
				l.Close()
				if err := <-accepted; !errors.Is(err, net.ErrClosed) {
					t.Errorf("the listener ended by %v", err)
				}
			} else if err := <-accepted; tt.code == 0 && err != nil || tt.code != 0 && !comes.isReset() {
				t.Errorf("a connection in reverse: %v, and it is reset: %v", err, comes.isReset())
			} else if tt.code != 0 {
				wantStatus(t, err, tt.code, tt.want)
			}
			for what, err := range map[string]error{"dialling": dial(t, backend, end), "listening": errListen} {
				if tt.code == 0 && err != nil {
					t.Errorf("%s: %v", what, err)
				} else if tt.code != 0 {
					t.Run(what, func(t *testing.T) { wantStatus(t, err, tt.code, tt.want) })
				}
			}
			if got, err := io.ReadAll(open); string(got) != "hello" || err != nil {
				t.Errorf("the stream that is open has %q, %v", got, err)
			}
			select {
			case event := <-f.opts.Recorder.(*record.FakeRecorder).Events:
				if tt.code != http.StatusForbidden {
					if tt.code == 0 {
						t.Errorf("an Event: %s", event)
					}
				} else if !strings.Contains(event, v1.EventClassDenied) {
					t.Errorf("the Event is %s", event)
				}
			default:
				if tt.code == http.StatusForbidden {
					t.Error("there is no Event of it")
				}
			}
		})
	}
}

// TestInstancesAreOpenedOnce for all streams to them, until what their driver
// goes by has changed.
func TestInstancesAreOpenedOnce(t *testing.T) {
	d := newPorts()
	f, backend := d.begin(t, "")
	end := streaming.Endpoint{Network: "tcp", Port: 80}
	d.opening = make(chan struct{})
	var streams sync.WaitGroup
	for range 8 {
		streams.Go(func() {
			if err := dial(t, backend, end); err != nil {
				t.Error(err)
			}
		})
	}
	d.opening <- struct{}{}
	streams.Wait()
	d.set(func() { d.opening = nil })
	opened := func() (got []string) {
		for _, call := range d.took() {
			if !strings.HasPrefix(call, "web-") {
				got = append(got, call)
			}
		}
		return got
	}
	want := func(what string, want ...string) {
		t.Helper()
		if diff := cmp.Diff(want, opened()); diff != "" {
			t.Errorf("%s (-want +got):\n%s", what, diff)
		}
	}
	want("eight streams at once", "open web-0 of generation 1")

	long, err := backend.Dial(t.Context(), end)
	if err != nil {
		t.Fatal(err)
	}
	d.set(func() { d.target.Generation = 2 })
	if err := dial(t, backend, end); err != nil {
		t.Fatal(err)
	}
	want("another generation, with a stream of the old one open", "open web-0 of generation 2")
	for range 2 {
		if err := long.Close(); err != nil {
			t.Error(err)
		}
	}
	want("that stream has ended", "close web-0")

	d.set(func() { d.fail["web-0"] = driver.Errorf(driver.Unavailable, "the way is lost") })
	wantStatus(t, dial(t, backend, end), http.StatusServiceUnavailable, "the way is lost")
	want("a way that is lost", "close web-0")
	d.set(func() { d.fail["web-0"] = driver.Errorf(driver.Invalid, "that is wrong") })
	wantStatus(t, dial(t, backend, end), http.StatusBadRequest, "that is wrong")
	want("what was wrong by itself", "open web-0 of generation 2")
	f.end(t.Context())
	want("the session's end", "close web-0")
}

// TestAStreamThatIsGivenUp while it opens an instance takes none with it that
// waits for the same.
func TestAStreamThatIsGivenUp(t *testing.T) {
	d := newPorts()
	f, backend := d.begin(t, "")
	defer f.end(t.Context())
	end := streaming.Endpoint{Network: "tcp", Port: 80}
	d.opening = make(chan struct{})
	users := func() int {
		f.mu.Lock()
		defer f.mu.Unlock()
		if conn := f.reached["web-0"]; conn != nil {
			return conn.users
		}
		return 0
	}
	await := func(n int) {
		t.Helper()
		waitFor(t, fmt.Sprintf("%d streams that use the instance", n), func() bool { return users() == n })
	}
	given := errors.New("the client has given it up")
	ctx, giveUp := context.WithCancelCause(t.Context())
	var streams sync.WaitGroup
	streams.Go(func() {
		if _, err := backend.Dial(ctx, end); !errors.Is(err, given) {
			t.Errorf("the one that was given up: %v", err)
		}
	})
	await(1)
	for range 8 {
		streams.Go(func() {
			if err := dial(t, backend, end); err != nil {
				t.Errorf("one that waited: %v", err)
			}
		})
	}
	await(9)
	giveUp(given)
	await(8)
	close(d.opening)
	streams.Wait()
	if got := d.took(); !slices.Equal(got[:1], []string{"open web-0 of generation 1"}) || slices.Contains(got[1:], got[0]) {
		t.Errorf("calls: %v", got)
	}
}

func TestReverseForward(t *testing.T) {
	d := newPorts()
	f, backend := d.begin(t, "")
	l, err := backend.Listen(t.Context(), streaming.Endpoint{Network: "tcp"})
	if err != nil {
		t.Fatal(err)
	}
	comes := func() *fakeStream {
		stream := &fakeStream{Reader: strings.NewReader("hello"), linger: -1}
		d.listener.pending <- stream
		return stream
	}
	type result struct {
		stream streaming.PortStream
		err    error
	}
	accepted := make(chan result)
	accept := func() {
		stream, err := l.Accept()
		accepted <- result{stream, err}
	}

	go accept()
	first := comes()
	got := <-accepted
	if got.err != nil {
		t.Fatal(got.err)
	}
	if text, err := io.ReadAll(got.stream); string(text) != "hello" || err != nil {
		t.Errorf("read %q, %v", text, err)
	}
	io.WriteString(got.stream, "you too")
	got.stream.Close()
	if in, out := f.session.Bytes(); in != 7 || out != 5 || first.got != "you too" || !first.isClosed() || first.isReset() {
		t.Errorf("%d bytes in, %d out, %q arrived, closed %v, reset %v", in, out, first.got, first.isClosed(), first.isReset())
	}

	// What the class says isn't known: that one is refused, and the next is not.
	d.set(func() { d.unreadable = 1 })
	go accept()
	refused, next := comes(), comes()
	got = <-accepted
	if got.err != nil {
		t.Fatalf("after a class that couldn't be read: %v", got.err)
	}
	if !refused.isReset() || next.isClosed() {
		t.Errorf("refused is reset: %v, and the one after it closed: %v", refused.isReset(), next.isClosed())
	}
	open := got.stream

	// The class doesn't allow the port any more.
	d.set(func() { d.class.Spec.Ports.Reverse = []v1.PortRange{{Port: 9001}} })
	go accept()
	denied := comes()
	got = <-accepted
	wantStatus(t, got.err, http.StatusForbidden, "does not allow that port 9000 is listened to")
	if !denied.isReset() {
		t.Error("a connection that the class denies isn't reset")
	}
	select {
	case <-d.listener.closed:
	default:
		t.Error("what the class denies is listened to still")
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accepting after Close: %v", err)
	}

	// Connections outlive the listener, and what it goes through lives as long.
	d.set(func() { d.target.Generation = 2 })
	if err := dial(t, backend, streaming.Endpoint{Network: "tcp", Port: 80}); err != nil {
		t.Fatal(err)
	}
	if got := d.took(); slices.Contains(got, "close web-0") {
		t.Errorf("what a connection goes through was closed: %v", got)
	}
	open.Close()
	if got, want := d.took(), []string{"close web-0"}; !slices.Equal(got, want) {
		t.Errorf("after the last connection: %v, want %v", got, want)
	}
}

// TestPortForwardsOutliveTheFilters by every protocol, and are accounted for as
// sessions are that don't.
func TestPortForwardsOutliveTheFilters(t *testing.T) {
	upgrade := func(headers string) string {
		return "Host: test\r\nConnection: Upgrade\r\n" + headers + "\r\n"
	}
	webSocket := func(protocol string) string {
		return "GET /?ports=80 HTTP/1.1\r\n" + upgrade("Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: "+protocol+"\r\n")
	}
	for name, opening := range map[string]string{
		"SPDY":                "POST / HTTP/1.1\r\n" + upgrade("Upgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: portforward.k8s.io\r\nContent-Length: 0\r\n"),
		"SPDY in a WebSocket": webSocket("SPDY/3.1+portforward.k8s.io"),
		"mux":                 webSocket(streaming.MuxProtocol),
		"the legacy protocol": webSocket("v4.channel.k8s.io"),
	} {
		for how, tt := range map[string]struct {
			end  func(client net.Conn, sessions *session.Manager)
			want string
		}{
			"until its client goes": {func(client net.Conn, _ *session.Manager) { client.Close() }, "ResponseComplete: done"},
			"until it is drained": {func(client net.Conn, sessions *session.Manager) {
				// Drain waits for the client's goodbye.
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				sessions.Drain(ctx)
				client.Close()
			}, "ResponseComplete: " + session.ErrDraining.Error()},
		} {
			t.Run(name+", "+how, func(t *testing.T) {
				d := newPorts()
				sessions := session.NewManager(session.Options{})
				r := &PortForwardREST{&connector{targets: d, opts: Options{
					Recorder: record.NewFakeRecorder(10), Classes: d, Sessions: sessions,
					Drivers: func(*v1.Target) (driver.Driver, error) { return d, nil },
				}}}
				log := &auditLog{}
				server, filters := detachServerOf(t, log, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
					ctx := request.WithNamespace(req.Context(), "shop")
					var opts v1.TargetPortForwardOptions
					if req.URL.Query().Get("ports") != "" {
						opts.Ports = []int32{80}
					}
					handler, err := r.Connect(ctx, "web", &opts, nil)
					if err != nil {
						t.Error(err)
						return
					}
					handler.ServeHTTP(w, req.WithContext(ctx))
				}))
				client, err := new(net.Dialer).DialContext(t.Context(), "tcp", server.Listener.Addr().String())
				if err != nil {
					t.Fatal(err)
				}
				defer client.Close()
				if _, err := io.WriteString(client, opening); err != nil {
					t.Fatal(err)
				}
				response, err := http.ReadResponse(bufio.NewReader(client), nil)
				if err != nil || response.StatusCode != http.StatusSwitchingProtocols {
					t.Fatalf("%v, %v", response, err)
				}
				select {
				case <-filters:
				case <-time.After(30 * time.Second):
					t.Fatal("the filters keep the session")
				}
				if diff := cmp.Diff([]string{"RequestReceived", "ResponseStarted"}, log.seen()); diff != "" {
					t.Errorf("while it lasts, audit has (-want +got):\n%s", diff)
				}
				tt.end(client, sessions)
				waitFor(t, "the last event", func() bool { return len(log.seen()) > 2 })
				if diff := cmp.Diff([]string{"RequestReceived", "ResponseStarted", tt.want}, log.seen()); diff != "" {
					t.Errorf("in the end, audit has (-want +got):\n%s", diff)
				}
				client.Close()
				// Who drains waits for sessions that have left the filters.
				if err := sessions.Drain(t.Context()); err != nil {
					t.Error(err)
				}
				if got := d.took(); !slices.Contains(got, "close web-0") {
					t.Errorf("the instance is open still: %v", got)
				}
			})
		}
	}
}

// TestStreamsCanBeReset, which package streaming does by SetLinger.
func TestStreamsCanBeReset(t *testing.T) {
	d := newPorts()
	f, backend := d.begin(t, "")
	defer f.end(t.Context())
	stream, err := backend.Dial(t.Context(), streaming.Endpoint{Network: "tcp", Port: 80})
	if err != nil {
		t.Fatal(err)
	}
	d.streams[0].linger = -1
	resets, ok := stream.(interface{ SetLinger(int) error })
	if !ok {
		t.Fatalf("a %T can't be reset, though what it is made of can", stream)
	}
	if err := errors.Join(resets.SetLinger(0), stream.Close()); err != nil || d.streams[0].linger != 0 || d.streams[0].closed != 1 {
		t.Errorf("linger %d, closed %d times, %v", d.streams[0].linger, d.streams[0].closed, err)
	}
	if _, ok := f.share(&reached{}, struct{ driver.Stream }{d.streams[0]}).(interface{ SetLinger(int) error }); ok {
		t.Error("what can't be reset seems to be")
	}
}

func TestAuditSaysWhatWasReached(t *testing.T) {
	ctx := auditing.WithAuditContext(t.Context())
	if err := auditing.AuditContextFrom(ctx).Init(auditing.RequestAuditConfig{Level: audit.LevelMetadata}, nil); err != nil {
		t.Fatal(err)
	}
	annotation := func(key string) (list []string) {
		t.Helper()
		text, ok := auditing.AuditContextFrom(ctx).GetEventAnnotation("streaming.aaserver.io/" + key)
		if !ok {
			return nil
		}
		if len(text) > maxAuditValue {
			t.Errorf("%s has %d bytes", key, len(text))
		}
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			t.Errorf("%s: %v", key, err)
		}
		return list
	}
	d := newPorts()
	f, backend := d.begin(t, "")
	for _, end := range []streaming.Endpoint{
		{Network: "unix", Path: "/run/a b,\"c\".sock"}, {Network: "tcp", Port: 80}, {Network: "udp", Port: 53, Instance: "web-1"}, {Network: "tcp", Port: 80},
		{Network: "unix", Path: "/etc/passwd"}, {Network: "tcp", Port: 22},
	} {
		if err := dial(t, backend, end); err != nil && !apierrors.IsForbidden(err) {
			t.Error(err)
		}
	}
	l, err := backend.Listen(t.Context(), streaming.Endpoint{Network: "tcp", Port: 9100})
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	f.end(ctx)
	if diff := cmp.Diff([]string{"web-0 unix /run/a b,\"c\".sock", "web-0 tcp 80", "web-1 udp 53"}, annotation("forwarded")); diff != "" {
		t.Errorf("forwarded (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"web-0 tcp 9100"}, annotation("listened")); diff != "" {
		t.Errorf("listened (-want +got):\n%s", diff)
	}

	ctx = auditing.WithAuditContext(t.Context())
	if err := auditing.AuditContextFrom(ctx).Init(auditing.RequestAuditConfig{Level: audit.LevelMetadata}, nil); err != nil {
		t.Fatal(err)
	}
	f, backend = d.begin(t, "")
	for i := range 200 {
		if err := dial(t, backend, streaming.Endpoint{Network: "unix", Path: fmt.Sprintf("/run/%s%d.sock", strings.Repeat("<", 20), i)}); err != nil {
			t.Error(err)
		}
	}
	f.end(ctx)
	if got := annotation("forwarded"); len(got) < 20 || got[len(got)-1] != "…" || annotation("listened") != nil {
		t.Errorf("of many sockets, these are recorded: %q, %q", got, annotation("listened"))
	}
}
