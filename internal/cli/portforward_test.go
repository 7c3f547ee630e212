package cli

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/cli-runtime/pkg/genericiooptions"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

func TestParseForwards(t *testing.T) {
	tcp := func(local, remote uint16) forwardArg {
		return forwardArg{forward: forward{local: localEnd{port: local}, remote: streaming.Endpoint{Network: "tcp", Port: remote}}}
	}
	same := func(f forwardArg) forwardArg {
		f.sameLocal = true
		return f
	}
	named := func(f forwardArg, name, network string) forwardArg {
		f.name, f.remote = name, streaming.Endpoint{Network: network}
		return f
	}
	socket := func(path string) localEnd { return localEnd{network: "unix", path: path} }
	reverse := func(remote uint16, local localEnd) forwardArg {
		return forwardArg{forward: forward{
			reverse: true, anyPort: remote == 0, local: local, remote: streaming.Endpoint{Network: "tcp", Port: remote},
		}}
	}
	web := func(args ...forwardArg) []*forwardedTarget {
		return []*forwardedTarget{{ref: ref{target: "web"}, args: args}}
	}
	const remotePort = ": expected a number from 1 to 65535, the name of one of the target's ports, or the absolute path of a socket"
	const localPort = ": expected a number from 0 to 65535, where 0 is a random port, or the path of a socket with a slash in it"
	const reverseLocal = "': expected a port, HOST:PORT or the path of a socket with a slash in it"
	tests := map[string]struct {
		args, reverse []string
		instance      string
		want          []*forwardedTarget
		wantErr       string
	}{
		"a number stands for both":       {args: []string{"web", "5000"}, want: web(same(tcp(0, 5000)))},
		"a name stands for both":         {args: []string{"web", "http"}, want: web(same(named(tcp(0, 0), "http", "")))},
		"local and remote":               {args: []string{"web", "8888:5000", "8443:https"}, want: web(tcp(8888, 5000), named(tcp(8443, 0), "https", ""))},
		"a random local port":            {args: []string{"web", "0:5000", ":5000", ":http"}, want: web(tcp(0, 5000), tcp(0, 5000), named(tcp(0, 0), "http", ""))},
		"a name that begins with digits": {args: []string{"web", "3proxy"}, want: web(same(named(tcp(0, 0), "3proxy", "")))},
		"the largest port":               {args: []string{"web", "65535:65535"}, want: web(tcp(65535, 65535))},
		"UDP": {args: []string{"web", "5353:53/udp"}, want: web(forwardArg{forward: forward{
			local: localEnd{port: 5353}, remote: streaming.Endpoint{Network: "udp", Port: 53},
		}})},
		"UDP on the same port": {args: []string{"web", "53/udp"}, want: web(forwardArg{sameLocal: true, forward: forward{
			remote: streaming.Endpoint{Network: "udp", Port: 53},
		}})},
		"TCP by name":                     {args: []string{"web", "80/tcp"}, want: web(same(tcp(0, 80)))},
		"a name with its protocol":        {args: []string{"web", ":dns/udp"}, want: web(named(tcp(0, 0), "dns", "udp"))},
		"a local socket":                  {args: []string{"web", "/tmp/x.sock:8080"}, want: web(forwardArg{forward: forward{local: socket("/tmp/x.sock"), remote: streaming.Endpoint{Network: "tcp", Port: 8080}}})},
		"a local socket below here":       {args: []string{"web", "./x.sock:8080"}, want: web(forwardArg{forward: forward{local: socket("./x.sock"), remote: streaming.Endpoint{Network: "tcp", Port: 8080}}})},
		"a local socket below target":     {args: []string{"web", "target/x.sock:8080"}, want: web(forwardArg{forward: forward{local: socket("target/x.sock"), remote: streaming.Endpoint{Network: "tcp", Port: 8080}}})},
		"a local socket with a colon":     {args: []string{"web", "/tmp/a:b:8080"}, want: web(forwardArg{forward: forward{local: socket("/tmp/a:b"), remote: streaming.Endpoint{Network: "tcp", Port: 8080}}})},
		"a remote socket":                 {args: []string{"web", "8080:/run/app.sock"}, want: web(forwardArg{forward: forward{local: localEnd{port: 8080}, remote: streaming.Endpoint{Network: "unix", Path: "/run/app.sock"}}})},
		"a remote socket with a colon":    {args: []string{"web", ":/run/a:b"}, want: web(forwardArg{forward: forward{remote: streaming.Endpoint{Network: "unix", Path: "/run/a:b"}}})},
		"sockets on both sides":           {args: []string{"web", "/tmp/x:/run/y"}, want: web(forwardArg{forward: forward{local: socket("/tmp/x"), remote: streaming.Endpoint{Network: "unix", Path: "/run/y"}}})},
		"reverse to a port":               {args: []string{"web"}, reverse: []string{"9000:3000"}, want: web(reverse(9000, localEnd{network: "tcp", host: "localhost", port: 3000}))},
		"reverse to a host":               {args: []string{"web"}, reverse: []string{"9000:db.example:3000"}, want: web(reverse(9000, localEnd{network: "tcp", host: "db.example", port: 3000}))},
		"reverse to an IPv6 address":      {args: []string{"web"}, reverse: []string{"9000:[::1]:3000"}, want: web(reverse(9000, localEnd{network: "tcp", host: "::1", port: 3000}))},
		"reverse to a socket":             {args: []string{"web"}, reverse: []string{"0:/tmp/a=b:c"}, want: web(reverse(0, socket("/tmp/a=b:c")))},
		"reverse after what is forwarded": {args: []string{"web", "80"}, reverse: []string{"1:2", "3:4"}, want: web(same(tcp(0, 80)), reverse(1, localEnd{network: "tcp", host: "localhost", port: 2}), reverse(3, localEnd{network: "tcp", host: "localhost", port: 4}))},
		"an instance":                     {args: []string{"web/web-1", "80"}, want: []*forwardedTarget{{ref: ref{"web", "web-1"}, args: []forwardArg{same(tcp(0, 80))}}}},
		"an instance by flag":             {args: []string{"target/web", "80"}, instance: "web-1", want: []*forwardedTarget{{ref: ref{"web", "web-1"}, args: []forwardArg{same(tcp(0, 80))}}}},
		"several targets": {args: []string{"web", "80", "target/db/db-0", "81", "tgt/dns", "53/udp"}, reverse: []string{"9000:1", "dns=9001:2", "db/db-0=9002:3"}, want: []*forwardedTarget{
			{ref: ref{target: "web"}, several: true, args: []forwardArg{same(tcp(0, 80)), reverse(9000, localEnd{network: "tcp", host: "localhost", port: 1})}},
			{ref: ref{"db", "db-0"}, several: true, args: []forwardArg{same(tcp(0, 81)), reverse(9002, localEnd{network: "tcp", host: "localhost", port: 3})}},
			{ref: ref{target: "dns"}, several: true, args: []forwardArg{
				{sameLocal: true, forward: forward{remote: streaming.Endpoint{Network: "udp", Port: 53}}},
				reverse(9001, localEnd{network: "tcp", host: "localhost", port: 2}),
			}},
		}},
		"too many parts":                 {args: []string{"web", "1:2:3"}, wantErr: "invalid port format '1:2:3'"},
		"nothing":                        {args: []string{"web", ""}, wantErr: "invalid port format ''"},
		"no remote port":                 {args: []string{"web", "80:"}, wantErr: "invalid port format '80:'"},
		"remote port 0":                  {args: []string{"web", "80:0"}, wantErr: "invalid remote port '0'" + remotePort},
		"remote port out of range":       {args: []string{"web", "65536"}, wantErr: "invalid remote port '65536'" + remotePort},
		"a negative remote port":         {args: []string{"web", "-1"}, wantErr: "invalid remote port '-1'" + remotePort},
		"a local port by name":           {args: []string{"web", "http:80"}, wantErr: "invalid local port 'http'" + localPort},
		"a local port out of range":      {args: []string{"web", "99999:80"}, wantErr: "invalid local port '99999'" + localPort},
		"a protocol that isn't known":    {args: []string{"web", "80/sctp"}, wantErr: "invalid protocol 'sctp' of port '80/sctp': expected tcp or udp"},
		"a local socket for UDP":         {args: []string{"web", "/tmp/x:53/udp"}, wantErr: "the local socket /tmp/x can't be forwarded to a UDP port: it carries connections, not datagrams"},
		"a remote socket alone":          {args: []string{"web", "/run/app.sock"}, wantErr: "invalid forward '/run/app.sock': a socket on the target's side needs a local end, as in '8080:/run/app.sock' or ':/run/app.sock'"},
		"a remote path that isn't clean": {args: []string{"web", ":/run/../etc/x"}, wantErr: "invalid remote socket '/run/../etc/x': the path of a socket is written in its shortest form, /etc/x"},
		"no ports":                       {args: []string{"web"}, wantErr: `nothing is forwarded for target "web": name ports, as in 'web 8080:80', or reverse forwards by -R`},
		"no ports for the second":        {args: []string{"web", "80", "target/db"}, wantErr: `nothing is forwarded for target "db": name ports, as in 'db 8080:80', or reverse forwards by -R`},
		"an instance of which target":    {args: []string{"web", "80", "target/db", "80"}, instance: "web-1", wantErr: "--instance goes with one target: with several, name instances as in target/web/web-1"},
		"a reverse forward of no target": {args: []string{"web", "80"}, reverse: []string{"db=1:2"}, wantErr: `invalid reverse forward 'db=1:2': "db" is none of the targets on the command line`},
		"a reverse forward of one end":   {args: []string{"web"}, reverse: []string{"9000"}, wantErr: "invalid reverse forward '9000': expected REMOTE_PORT:LOCAL, as in 9000:3000, 9000:localhost:3000 or 9000:/tmp/app.sock"},
		"a reverse forward of a name":    {args: []string{"web"}, reverse: []string{"http:80"}, wantErr: "invalid remote port 'http' of the reverse forward 'http:80': expected a number from 0 to 65535, where 0 is any free port"},
		"a reverse forward to port 0":    {args: []string{"web"}, reverse: []string{"80:0"}, wantErr: "invalid local end '0' of the reverse forward '80:0" + reverseLocal},
		"a reverse forward to nowhere":   {args: []string{"web"}, reverse: []string{"80::80"}, wantErr: "invalid local end ':80' of the reverse forward '80::80" + reverseLocal},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseForwards(test.args, test.reverse, test.instance)
			if diff := cmp.Diff(test.wantErr, errorText(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			allow := cmp.AllowUnexported(forwardedTarget{}, ref{}, forwardArg{}, forward{}, localEnd{})
			if diff := cmp.Diff(test.want, got, allow); diff != "" {
				t.Errorf("targets (-want +got):\n%s", diff)
			}
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func TestResolve(t *testing.T) {
	target := process("web", func(target *v1.Target) {
		target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 8080}, {Name: "dns", Port: 53, Protocol: v1.ProtocolUDP}}
	})
	single := process("web", func(target *v1.Target) { target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 8080}} })
	tests := map[string]struct {
		arg     string
		target  *v1.Target
		want    string
		wantErr string
	}{
		"a name is the same port locally":    {arg: "http", target: target, want: "{8080 8080}"},
		"a name with a local port":           {arg: "80:http", target: target, want: "{80 8080}"},
		"a name with a random local port":    {arg: ":http", target: target, want: "{0 8080}"},
		"a number needs no target":           {arg: "80:81", want: "{80 81}"},
		"a name of UDP":                      {arg: "5353:dns", target: target, want: "{5353/udp 53/udp}"},
		"a name of UDP with its protocol":    {arg: "dns/udp", target: target, want: "{53/udp 53/udp}"},
		"a name with another protocol":       {arg: "dns/tcp", target: target, wantErr: `port "dns" of target "web" is a UDP port`},
		"a name of UDP with a socket":        {arg: "/tmp/x:dns", target: target, wantErr: "the local socket /tmp/x can't be forwarded to a UDP port: it carries connections, not datagrams"},
		"a socket with a name":               {arg: "/tmp/x:http", target: target, want: "{/tmp/x 8080}"},
		"a port with a socket":               {arg: "80:/run/x", target: target, want: "{80 /run/x}"},
		"an unknown name":                    {arg: "https", target: target, wantErr: `target "web" has no port named "https": its ports are http (8080), dns (53/udp)`},
		"an unknown name where there is one": {arg: "https", target: single, wantErr: `target "web" has no port named "https": its only port is http (8080)`},
		"a name where there are no ports":    {arg: "https", target: process("db"), wantErr: `target "db" has no port named "https": it lists no ports`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			arg, err := parseForward(test.arg)
			if err != nil {
				t.Fatal(err)
			}
			got, err := resolve([]forwardArg{arg}, test.target)
			if diff := cmp.Diff(test.wantErr, errorText(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if err == nil {
				if diff := cmp.Diff(test.want, got[0].String()); diff != "" {
					t.Errorf("forward (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestParseAddresses(t *testing.T) {
	v4 := listenAddress{family: "4", host: "127.0.0.1", alternative: true}
	v6 := listenAddress{family: "6", host: "::1", alternative: true}
	tests := map[string]struct {
		args    []string
		want    []listenAddress
		wantErr string
	}{
		"localhost is two addresses":  {args: []string{"localhost"}, want: []listenAddress{v4, v6}},
		"each address is used once":   {args: []string{"localhost", "::1", "localhost"}, want: []listenAddress{v4, v6}},
		"addresses of both families":  {args: []string{"0.0.0.0", "::"}, want: []listenAddress{{family: "4", host: "0.0.0.0"}, {family: "6", host: "::"}}},
		"a name other than localhost": {args: []string{"example.com"}, wantErr: "example.com is not a valid IP"},
		"no address at all":           {wantErr: "you must specify at least 1 address"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parseAddresses(test.args)
			if diff := cmp.Diff(test.wantErr, errorText(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(listenAddress{})); diff != "" {
				t.Errorf("addresses (-want +got):\n%s", diff)
			}
		})
	}
}

// backend is what a target listens with.
type backend struct {
	net.Listener
	conns chan *net.TCPConn
}

func newBackend(t *testing.T) *backend {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &backend{Listener: listener, conns: make(chan *net.TCPConn, 100)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			b.conns <- conn.(*net.TCPConn)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-done
	})
	return b
}

func (b *backend) next(t *testing.T) *net.TCPConn {
	t.Helper()
	select {
	case conn := <-b.conns:
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			t.Fatal(err)
		}
		return conn
	case <-time.After(timeout):
		t.Fatal("no connection arrived")
		return nil
	}
}

// portServer is the server's side of port-forward.
type portServer struct {
	// dial and listen make the connections. listen may be nil.
	dial   func(ctx context.Context, to streaming.Endpoint) (streaming.PortStream, error)
	listen func(ctx context.Context, at streaming.Endpoint) (streaming.PortListener, error)

	// check judges endpoints, and judge the ports of a session; both may be nil.
	check func(ctx context.Context, to streaming.Endpoint) error
	judge func(ports []int32) *apierrors.StatusError

	// session is called before each session, which may change these.
	session func()

	mu sync.Mutex // protects all below
	// seen are the options of each session.
	seen []v1.TargetPortForwardOptions
	// end ends the sessions that there are.
	end []context.CancelCauseFunc
	// refusal is what new sessions are answered with, nil to serve them.
	refusal *apierrors.StatusError
}

// servePorts serves port-forward. Port 80 is the backend's, the others are
// refused, unless the test has its own dial.
func (s *testServer) servePorts(b *backend) *portServer {
	p := &portServer{dial: func(ctx context.Context, to streaming.Endpoint) (streaming.PortStream, error) {
		if to.Network != "tcp" || to.Port != 80 {
			return nil, fmt.Errorf("connecting to port %d of instance web-0: connection refused", to.Port)
		}
		return dialLocal(ctx, "tcp", b.Addr().String())
	}}
	s.portforward = func(w http.ResponseWriter, r *http.Request, _ string) {
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		p.mu.Lock()
		refusal, options := p.refusal, decode[v1.TargetPortForwardOptions](s.t, r)
		if refusal == nil && p.judge != nil {
			refusal = p.judge(options.Ports)
		}
		if refusal == nil {
			p.seen = append(p.seen, *options)
			p.end = append(p.end, cancel)
			if p.session != nil {
				p.session()
			}
		}
		backend := streaming.PortForwardBackend{Dial: p.dial, Check: p.check, Listen: p.listen}
		p.mu.Unlock()
		if refusal != nil {
			writeError(w, refusal)
			return
		}
		_ = streaming.ServePortForward(w, r.WithContext(ctx), streaming.PortForwardRequest{}, streaming.Options{}, backend)
	}
	return p
}

// sessions is how many there have been.
func (p *portServer) sessions() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.seen)
}

// refuse answers new sessions with an error, nil serves them.
func (p *portServer) refuse(err *apierrors.StatusError) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusal = err
}

// endAll ends the sessions that there are.
func (p *portServer) endAll(reason string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, end := range p.end {
		end(errors.New(reason))
	}
	p.end = nil
}

func dialLocal(ctx context.Context, network, address string) (streaming.PortStream, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if udp, ok := conn.(*net.UDPConn); ok {
		return datagrams{udp}, nil
	}
	return conn.(streaming.PortStream), nil
}

// datagrams is a UDP connection as a stream.
type datagrams struct{ *net.UDPConn }

func (d datagrams) CloseWrite() error { return d.Close() }

// forEachForwardProtocol runs a test over all that a session may be spoken in.
func forEachForwardProtocol(t *testing.T, test func(t *testing.T, server *testServer)) {
	for name, p := range map[string]struct {
		websockets string
		offer      func(*http.Request)
	}{
		"mux":    {websockets: "true", offer: func(*http.Request) {}},
		"tunnel": {websockets: "true", offer: withoutMux},
		"SPDY":   {websockets: "false", offer: func(*http.Request) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("KUBECTL_PORT_FORWARD_WEBSOCKETS", p.websockets)
			noLeaks(t)
			server := newTestServer(t, process("web", func(target *v1.Target) {
				target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 80}}
			}))
			server.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
				p.offer(r)
				return false
			}
			test(t, server)
		})
	}
}

// withoutMux makes of a server one that doesn't know the mux protocol.
func withoutMux(r *http.Request) {
	if offered := r.Header.Get("Sec-WebSocket-Protocol"); offered != "" {
		r.Header.Set("Sec-WebSocket-Protocol", strings.TrimPrefix(offered, streaming.MuxProtocol+", "))
	}
}

var forwardingLine = regexp.MustCompile(`Forwarding from (\S+) -> (\S+)\n`)

// address waits until a remote end is forwarded, and returns from where, the
// first address that there is.
func (r *running) address(remote string) string {
	r.t.Helper()
	address := ""
	until(r.t, remote+" to be forwarded", func() bool {
		for _, match := range forwardingLine.FindAllStringSubmatch(r.out.String(), -1) {
			if match[2] == remote && address == "" {
				address = strings.TrimSuffix(match[1], "/udp")
			}
		}
		select {
		case <-r.done:
			r.t.Fatalf("ended early with code %d: %s", r.code, r.errOut)
		default:
		}
		return address != ""
	})
	return address
}

// says waits until the command has said something on stderr.
func (r *running) says(want string) {
	r.t.Helper()
	r.t.Cleanup(func() {
		if r.t.Failed() {
			r.t.Logf("stderr: %s", r.errOut)
		}
	})
	until(r.t, fmt.Sprintf("%q on stderr", want), func() bool { return strings.Contains(r.errOut.String(), want) })
}

func dial(t *testing.T, address string) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		t.Fatal(err)
	}
	return conn.(*net.TCPConn)
}

func noLeaks(t *testing.T) {
	current := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, current) })
}

func TestPortForward(t *testing.T) {
	forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
		b := newBackend(t)
		p := server.servePorts(b)
		cmd := server.start(nil, "port-forward", "web/web-0", ":http", ":81", "0:80")
		good, bad := cmd.address("80"), cmd.address("81")
		if diff := cmp.Diff([]v1.TargetPortForwardOptions{{Instance: "web-0", Ports: []int32{80, 81}}}, p.seen); diff != "" {
			t.Errorf("options (-want +got):\n%s", diff)
		}

		t.Run("bytes go both ways, and each direction ends by itself", func(t *testing.T) {
			var wg sync.WaitGroup
			for range 8 {
				local := dial(t, good)
				remote := b.next(t)
				wg.Go(func() { // the target sends back what it gets, after it got it all
					data, err := io.ReadAll(remote)
					if err != nil {
						t.Error(err)
					}
					if _, err := remote.Write(data); err != nil {
						t.Error(err)
					}
					remote.Close()
				})
				wg.Go(func() {
					sent := make([]byte, 1<<20)
					_, _ = rand.Read(sent)
					if _, err := local.Write(sent); err != nil {
						t.Error(err)
					}
					if err := local.CloseWrite(); err != nil {
						t.Error(err)
					}
					got, err := io.ReadAll(local)
					if err != nil {
						t.Error(err)
					}
					if !bytes.Equal(sent, got) {
						t.Errorf("got other bytes back than were sent: %d instead of %d", len(got), len(sent))
					}
				})
			}
			wg.Wait()
		})

		t.Run("the target ends its direction first", func(t *testing.T) {
			local, remote := dial(t, good), b.next(t)
			if _, err := remote.Write([]byte("bye")); err != nil {
				t.Fatal(err)
			}
			if err := remote.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(local); err != nil || string(got) != "bye" {
				t.Fatalf("got %q, %v", got, err)
			}
			if _, err := local.Write([]byte("and thanks")); err != nil {
				t.Fatal(err)
			}
			if err := local.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(remote); err != nil || string(got) != "and thanks" {
				t.Fatalf("got %q, %v", got, err)
			}
		})

		t.Run("a reset of the target arrives as a reset", func(t *testing.T) {
			local, remote := dial(t, good), b.next(t)
			if _, err := remote.Write([]byte("half")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(local, make([]byte, 4)); err != nil {
				t.Fatal(err)
			}
			if err := remote.SetLinger(0); err != nil {
				t.Fatal(err)
			}
			remote.Close()
			if n, err := local.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read %d bytes, %v; want a reset", n, err)
			}
		})

		t.Run("a reset of the target arrives after the client has ended its direction", func(t *testing.T) {
			local, remote := dial(t, good), b.next(t)
			if err := local.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(remote); err != nil || len(got) != 0 {
				t.Fatalf("got %q, %v", got, err)
			}
			if err := remote.SetLinger(0); err != nil {
				t.Fatal(err)
			}
			remote.Close()
			if n, err := local.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("read %d bytes, %v; want a reset", n, err)
			}
		})

		t.Run("a reset of the client ends the target's connection", func(t *testing.T) {
			local, remote := dial(t, good), b.next(t)
			if err := local.SetLinger(0); err != nil {
				t.Fatal(err)
			}
			local.Close()
			if _, err := remote.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("the target's connection goes on: %v", err)
			}
		})

		t.Run("a refused connection is reported and doesn't end the others", func(t *testing.T) {
			local, remote := dial(t, good), b.next(t)
			wantRefused(t, bad)
			_, port, _ := net.SplitHostPort(bad)
			want := "error: forwarding " + port + " -> 81: connecting to port 81 of instance web-0: connection refused\n"
			cmd.says(want)
			if _, err := local.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(remote, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			_, port, _ = net.SplitHostPort(good)
			if want := "Handling connection for " + port + "\n"; !strings.Contains(cmd.out.String(), want) {
				t.Errorf("stdout %q lacks %q", cmd.out, want)
			}
		})

		t.Run("an interrupt ends it in good order", func(t *testing.T) {
			local, remote := dial(t, good), b.next(t)
			cmd.cancel(terminated{syscall.SIGINT})
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, want 0; stderr %q", code, cmd.errOut)
			}
			if _, err := local.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the local connection ended with %v, want a reset", err)
			}
			if _, err := remote.Read(make([]byte, 1)); err == nil {
				t.Error("the target's connection goes on")
			}
			if conn, err := net.Dial("tcp", good); err == nil {
				conn.Close()
				t.Error("the port is still open")
			}
		})
	})
}

func TestPortForwardWherePortsAreTaken(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	server.servePorts(b)
	_, taken, _ := net.SplitHostPort(b.Addr().String())

	t.Run("one of them", func(t *testing.T) {
		cmd := server.start(nil, "port-forward", "--address", "127.0.0.1", "web", taken+":80", ":80")
		dial(t, cmd.address("80"))
		b.next(t)
		if got, want := cmd.errOut.String(), "Unable to listen on port "+taken+": "; !strings.HasPrefix(got, want) {
			t.Errorf("stderr %q, want it to begin with %q", got, want)
		}
		cmd.cancel(terminated{syscall.SIGTERM})
		if code := cmd.wait(); code != 0 {
			t.Errorf("exit code %d, want 0", code)
		}
	})
	t.Run("all of them", func(t *testing.T) {
		cmd := server.start(nil, "port-forward", "--address", "127.0.0.1", "web", taken+":80")
		if code := cmd.wait(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if got, want := cmd.errOut.String(), "error: unable to listen on any of the requested ports: [{"+taken+" 80}]\n"; !strings.HasSuffix(got, want) {
			t.Errorf("stderr %q, want it to end with %q", got, want)
		}
	})
}

// frames is a network connection that delivers bytes in pieces.
type frames struct {
	pieces [][]byte
	closed chan struct{}
}

func (f *frames) Read(p []byte) (int, error) {
	if len(f.pieces) == 0 {
		<-f.closed
		return 0, io.EOF
	}
	n := copy(p, f.pieces[0])
	if f.pieces[0] = f.pieces[0][n:]; len(f.pieces[0]) == 0 {
		f.pieces = f.pieces[1:]
	}
	return n, nil
}

func (f *frames) Write(p []byte) (int, error) { return len(p), nil }

func (f *frames) Close() error {
	close(f.closed)
	return nil
}

func frame(control bool, kind uint16, payload ...byte) []byte {
	header := make([]byte, 8, 8+len(payload))
	if control {
		binary.BigEndian.PutUint16(header, 0x8003)
		binary.BigEndian.PutUint16(header[2:], kind)
	} else {
		binary.BigEndian.PutUint32(header, uint32(kind))
	}
	header[5], header[6], header[7] = byte(len(payload)>>16), byte(len(payload)>>8), byte(len(payload))
	return append(header, payload...)
}

func TestResetsAreFoundHoweverTheBytesArrive(t *testing.T) {
	reset := func(id byte) []byte { return frame(true, 3, 0, 0, 0, id, 0, 0, 0, 5) }
	stream := bytes.Join([][]byte{
		frame(true, 2, 0, 0, 0, 1, 0, 0, 0, 0),              // SYN_REPLY
		frame(false, 1, bytes.Repeat([]byte{0x80}, 300)...), // data that looks like headers
		reset(3),
		frame(false, 1), // empty
		reset(7),
		frame(true, 6, 0, 0, 0, 9), // PING, with a number that isn't a stream's
	}, nil)
	for size := 1; size <= 20; size++ {
		f := &frames{closed: make(chan struct{})}
		for rest := stream; len(rest) > 0; {
			n := min(size, len(rest))
			f.pieces = append(f.pieces, rest[:n])
			rest = rest[n:]
		}
		transport := newSPDYTransport(f, time.Hour)
		watched := transport.resetOf(3)
		got := make([]byte, len(stream))
		if _, err := io.ReadFull(transport, got); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(stream, got) {
			t.Fatalf("in pieces of %d: the bytes are changed", size)
		}
		if !closed(watched) || !closed(transport.resetOf(7)) {
			t.Errorf("in pieces of %d: a reset was missed", size)
		}
		for _, id := range []uint32{1, 5, 9} {
			if closed(transport.resetOf(id)) {
				t.Errorf("in pieces of %d: stream %d wasn't reset", size, id)
			}
		}
		transport.Close()
	}
}

func TestSilentServerIsGivenUp(t *testing.T) {
	f := &frames{closed: make(chan struct{})}
	transport := newSPDYTransport(f, time.Millisecond)
	if _, err := transport.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read ended with %v", err)
	}
	if err := transport.cause(); !errors.Is(err, errSilent) {
		t.Errorf("cause %v, want %v", err, errSilent)
	}
}

// stuckAfter is a pipe whose reader goes on no more once it has read a text.
type stuckAfter struct {
	*output
	text string
	free chan struct{}
}

func (s stuckAfter) Write(p []byte) (int, error) {
	if strings.Contains(s.String(), s.text) {
		<-s.free
	}
	return s.output.Write(p)
}

func TestPortForwardWhoseOutputNobodyReads(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	server.servePorts(b)
	out := &output{}
	stuck := stuckAfter{out, "Forwarding from", make(chan struct{})}
	defer close(stuck.free)
	cmd := startWith(t, genericiooptions.IOStreams{Out: stuck}, "--kubeconfig", server.kubeconfig(), "port-forward", "--address=127.0.0.1", "web", ":80")
	cmd.out = out
	address := cmd.address("80")
	for range 3 {
		local := dial(t, address)
		wantBytes(t, local, b.next(t))
	}
	cmd.cancel(terminated{syscall.SIGTERM})
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}
