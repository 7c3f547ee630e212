package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// cable is the network between a command and its server.
type cable struct {
	net.Listener
	to string

	mu sync.Mutex // protects all below
	// plugged is closed while bytes pass.
	plugged chan struct{}
	refuses bool
	conns   map[*net.TCPConn]bool
	closed  bool
	running sync.WaitGroup
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cable{Listener: listener, to: to, plugged: make(chan struct{}), conns: map[*net.TCPConn]bool{}}
	close(c.plugged)
	c.running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			c.running.Go(func() { c.carry(conn.(*net.TCPConn)) })
		}
	})
	t.Cleanup(func() {
		listener.Close()
		c.plug()
		c.mu.Lock()
		c.closed = true
		c.mu.Unlock()
		c.drop(false)
		c.running.Wait()
	})
	return c
}

func (c *cable) carry(near *net.TCPConn) {
	far, err := net.Dial("tcp", c.to)
	if err != nil {
		near.Close()
		return
	}
	c.mu.Lock()
	refused := c.refuses || c.closed
	c.conns[near], c.conns[far.(*net.TCPConn)] = true, true
	c.mu.Unlock()
	if refused {
		near.SetLinger(0)
		near.Close()
		far.Close()
	}
	var both sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{near, far.(*net.TCPConn)}, {far.(*net.TCPConn), near}} {
		both.Go(func() {
			buffer := make([]byte, 64<<10)
			for {
				n, err := way[0].Read(buffer)
				c.mu.Lock()
				plugged := c.plugged
				c.mu.Unlock()
				<-plugged
				if n > 0 {
					if _, err := way[1].Write(buffer[:n]); err != nil {
						break
					}
				}
				if err != nil {
					break
				}
			}
			way[0].Close()
			way[1].Close()
		})
	}
	both.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.conns, near)
	delete(c.conns, far.(*net.TCPConn))
}

// unplug lets nothing pass, and nobody know.
func (c *cable) unplug() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plugged = make(chan struct{})
}

func (c *cable) plug() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !closed(c.plugged) {
		close(c.plugged)
	}
}

// refuse has connections reset at once, or not any more.
func (c *cable) refuse(refuses bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refuses = refuses
}

// drop ends all connections, by a reset or in order.
func (c *cable) drop(reset bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.conns {
		if reset {
			conn.SetLinger(0)
		}
		conn.Close()
	}
}

// startBehind runs a command line whose server is at the other end of a cable.
func (s *testServer) startBehind(c *cable, args ...string) *running {
	s.t.Helper()
	file := s.kubeconfig()
	config, err := clientcmd.LoadFromFile(file)
	if err != nil {
		s.t.Fatal(err)
	}
	config.Clusters["test"].Server = "https://" + c.Addr().String()
	if err := clientcmd.WriteToFile(*config, file); err != nil {
		s.t.Fatal(err)
	}
	return s.startAt(file, args...)
}

func (s *testServer) cable() *cable {
	s.t.Helper()
	u, err := url.Parse(s.srv.URL)
	if err != nil {
		s.t.Fatal(err)
	}
	return newCable(s.t, u.Host)
}

// wantEcho sends something on a new connection, and wants it back from the
// backend.
func wantEcho(t *testing.T, network, address string, b *backend) {
	t.Helper()
	local, err := net.Dial(network, address)
	if err != nil {
		t.Fatal(err)
	}
	defer local.Close()
	if err := local.SetDeadline(time.Now().Add(timeout)); err != nil {
		t.Fatal(err)
	}
	wantBytes(t, local, b.next(t))
}

// wantBytes has something go both ways.
func wantBytes(t *testing.T, a, b net.Conn) {
	t.Helper()
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		if _, err := way[0].Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 5)
		if _, err := io.ReadFull(way[1], got); err != nil || string(got) != "hello" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
}

func wantReset(t *testing.T, conn net.Conn) {
	t.Helper()
	if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("read %d bytes, %v; want a reset", n, err)
	}
}

// wantRefused connects to what is refused, and may be before the connection
// stands here.
func wantRefused(t *testing.T, address string) {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err == nil {
		defer conn.Close()
		_, err = conn.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the refused connection ended with %v, want a reset", err)
	}
}

func TestPortForwardOutlivesItsServer(t *testing.T) {
	forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
		b := newBackend(t)
		p := server.servePorts(b)
		cmd := server.start(nil, "port-forward", "web", ":80")
		address := cmd.address("80")
		local, remote := dial(t, address), b.next(t)
		wantBytes(t, local, remote)
		// One whose target has said all, and waits.
		half, ended := dial(t, address), b.next(t)
		wantBytes(t, half, ended)
		if err := ended.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(half); err != nil || len(rest) != 0 {
			t.Fatalf("got %q, %v", rest, err)
		}

		p.refuse(apierrors.NewServiceUnavailable("the server is starting"))
		p.endAll("the server is shutting down")
		wantReset(t, local)
		until(t, "the half-open connection to be reset", func() bool {
			_, err := half.Write([]byte("x"))
			return err != nil
		})
		cmd.says(`The connection to target "web" was lost: `)
		// One that comes in the meantime waits.
		waiting := dial(t, address)
		cmd.says(`Target "web" can't be connected to: the server is starting. It is tried again until it can.`)
		p.refuse(nil)
		wantBytes(t, waiting, b.next(t))
		cmd.says(`Connected to target "web" again.`)
		for _, once := range []string{"was lost", "can't be connected to", "Connected to"} {
			if n := strings.Count(cmd.errOut.String(), once); n != 1 {
				t.Errorf("%q was said %d times in %q", once, n, cmd.errOut)
			}
		}
		// SPDY by itself has no way to say why.
		if want := ": the server is shutting down. Connecting again."; !strings.HasSuffix(t.Name(), "/SPDY") && !strings.Contains(cmd.errOut.String(), want) {
			t.Errorf("stderr %q lacks %q", cmd.errOut, want)
		}
		wantEcho(t, "tcp", address, b)

		if !strings.HasSuffix(t.Name(), "/mux") {
			return
		}
		// Nobody connects, and it is ready before somebody does.
		p.endAll("again")
		until(t, "a third session", func() bool { return p.sessions() == 3 })
		until(t, "the news of it", func() bool { return strings.Count(cmd.errOut.String(), "Connected to") == 2 })
		cmd.cancel(terminated{syscall.SIGINT})
		if code := cmd.wait(); code != 0 {
			t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
		}
	})
}

func TestPortForwardOutlivesItsNetwork(t *testing.T) {
	faults := map[string]func(*cable){
		"it stalls":               (*cable).unplug,
		"its connections end":     func(c *cable) { c.refuse(true); c.drop(false) },
		"its connections break":   func(c *cable) { c.refuse(true); c.drop(true) },
		"it stalls, then breaks":  func(c *cable) { c.unplug(); c.refuse(true); c.drop(true) },
		"it breaks for a moment":  func(c *cable) { c.drop(true) },
		"it stalls for a moment ": func(c *cable) { c.unplug(); time.AfterFunc(50*time.Millisecond, c.plug) },
	}
	for name, fault := range faults {
		t.Run(name, func(t *testing.T) {
			forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
				b := newBackend(t)
				server.servePorts(b)
				c := server.cable()
				cmd := server.startBehind(c, "port-forward", "web", ":80", "--peer-timeout", "2s")
				address := cmd.address("80")
				local, remote := dial(t, address), b.next(t)
				wantBytes(t, local, remote)
				fault(c)
				if strings.HasPrefix(name, "it stalls for a moment") {
					wantBytes(t, local, remote)
				} else {
					wantReset(t, local)
					cmd.says(`The connection to target "web" was lost: `)
				}
				waiting := dial(t, address)
				c.refuse(false)
				c.plug()
				wantBytes(t, waiting, b.next(t))
			})
		})
	}
}

func TestPortForwardEndsAtOnce(t *testing.T) {
	for name, fault := range map[string]func(*cable){
		"while the server is silent":        (*cable).unplug,
		"while the server can't be dialled": func(c *cable) { c.refuse(true); c.drop(true) },
	} {
		t.Run(name, func(t *testing.T) {
			forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
				b := newBackend(t)
				server.servePorts(b)
				c := server.cable()
				cmd := server.startBehind(c, "port-forward", "web", ":80")
				address := cmd.address("80")
				local, remote := dial(t, address), b.next(t)
				wantBytes(t, local, remote)
				fault(c)
				waiting := dial(t, address)
				until(t, "the connection to be handled", func() bool { return strings.Count(cmd.out.String(), "Handling connection") == 2 })
				began := time.Now()
				cmd.cancel(terminated{syscall.SIGTERM})
				if code := cmd.wait(); code != 0 {
					t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
				}
				if took := time.Since(began); took > 5*time.Second {
					t.Errorf("it took %v", took)
				}
				wantReset(t, waiting)
			})
		})
	}
}

func TestPortForwardRefusedAtTheStart(t *testing.T) {
	forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
		b := newBackend(t)
		p := server.servePorts(b)
		for name, test := range map[string]struct {
			args    []string
			refusal *apierrors.StatusError
			want    string
		}{
			"an unknown target":      {args: []string{"db", "80"}, want: `Error from server (NotFound): targets.streaming.aaserver.io "db" not found`},
			"an unknown second one":  {args: []string{"web", ":80", "target/db", "80"}, want: `Error from server (NotFound): targets.streaming.aaserver.io "db" not found`},
			"an unknown port's name": {args: []string{"web", ":https"}, want: `error: target "web" has no port named "https": its only port is http (80)`},
			"a port not allowed":     {args: []string{"web", ":80"}, refusal: apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New("port 80 isn't open")), want: `Error from server (Forbidden): targets.streaming.aaserver.io "web" is forbidden: port 80 isn't open`},
			"an unready instance":    {args: []string{"web", ":80"}, refusal: apierrors.NewConflict(v1.Resource("targets"), "web", errors.New("it doesn't run")), want: `it doesn't run`},
			"no time":                {args: []string{"web", ":80", "--peer-timeout=0"}, want: "error: --peer-timeout is 0s: it has to be more than 0"},
		} {
			t.Run(name, func(t *testing.T) {
				p.refuse(test.refusal)
				cmd := server.start(nil, append([]string{"port-forward"}, test.args...)...)
				if code := cmd.wait(); code != 1 {
					t.Errorf("exit code %d, want 1", code)
				}
				if got := cmd.errOut.String(); !strings.Contains(got, test.want) || strings.Count(got, "\n") != 1 {
					t.Errorf("stderr %q, want one line with %q", got, test.want)
				}
				if cmd.out.String() != "" {
					t.Errorf("stdout %q", cmd.out)
				}
			})
		}
	})
}

func TestPortForwardOfPortsThatAreRefused(t *testing.T) {
	forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
		b := newBackend(t)
		p := server.servePorts(b)
		denied := func(what string) *apierrors.StatusError {
			return apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New("its class opens no "+what))
		}
		p.check = func(_ context.Context, to streaming.Endpoint) error {
			if to.Network == "tcp" && to.Port == 80 {
				return nil
			}
			return denied(endpointName(to))
		}
		p.judge = func(ports []int32) *apierrors.StatusError {
			if i := slices.IndexFunc(ports, func(port int32) bool { return port != 80 && port != 53 }); i >= 0 {
				status := denied(fmt.Sprint(ports[i]))
				status.ErrStatus.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: metav1.CauseTypeForbidden, Field: fmt.Sprintf("ports[%d]", i)}}}
				return status
			}
			return nil
		}
		told := func(what string) string {
			return fmt.Sprintf("Unable to forward to port %s of target \"web\": targets.streaming.aaserver.io \"web\" is forbidden: its class opens no %[1]s\n", what)
		}
		t.Run("the others are forwarded", func(t *testing.T) {
			cmd := server.start(nil, "port-forward", "web", ":22", ":80", ":23")
			wantEcho(t, "tcp", cmd.address("80"), b)
			if diff := cmp.Diff(told("22")+told("23"), cmd.errOut.String()); diff != "" {
				t.Errorf("stderr (-want +got):\n%s", diff)
			}
			// A port that isn't open any more keeps no session from the others.
			p.mu.Lock()
			p.judge = func(ports []int32) *apierrors.StatusError {
				if len(ports) == 0 {
					return nil
				}
				status := denied("80")
				status.ErrStatus.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: metav1.CauseTypeForbidden, Field: "ports[0]"}}}
				return status
			}
			p.mu.Unlock()
			p.endAll("anew")
			cmd.says("Connected to target \"web\" again.")
			cmd.cancel(terminated{syscall.SIGINT})
			if code := cmd.wait(); code != 0 {
				t.Errorf("exit code %d, want 0", code)
			}
		})
		p.judge = func(ports []int32) *apierrors.StatusError {
			if i := slices.IndexFunc(ports, func(port int32) bool { return port == 22 || port == 23 }); i >= 0 {
				status := denied(fmt.Sprint(ports[i]))
				status.ErrStatus.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{Type: metav1.CauseTypeForbidden, Field: fmt.Sprintf("ports[%d]", i)}}}
				return status
			}
			return nil
		}
		tests := map[string]struct {
			args []string
			want string
		}{
			"a single one is the error": {args: []string{":22"}, want: "Error from server (Forbidden): targets.streaming.aaserver.io \"web\" is forbidden: its class opens no 22\n"},
			"none is left":              {args: []string{":22", "0:23"}, want: told("22") + told("23") + "error: none of the requested ports can be forwarded: [{0 22} {0 23}]\n"},
		}
		if strings.HasSuffix(t.Name(), "/mux") {
			tests["a socket is refused before anybody connects"] = struct {
				args []string
				want string
			}{args: []string{":/run/app.sock"}, want: "Error from server (Forbidden): targets.streaming.aaserver.io \"web\" is forbidden: its class opens no /run/app.sock\n"}
			tests["UDP is refused where the number is open"] = struct {
				args []string
				want string
			}{args: []string{":53/udp"}, want: "Error from server (Forbidden): targets.streaming.aaserver.io \"web\" is forbidden: its class opens no 53/udp\n"}
		}
		for name, test := range tests {
			t.Run(name, func(t *testing.T) {
				cmd := server.start(nil, append([]string{"port-forward", "web"}, test.args...)...)
				if code := cmd.wait(); code != 1 {
					t.Errorf("exit code %d, want 1", code)
				}
				if diff := cmp.Diff(test.want, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
				if cmd.out.String() != "" {
					t.Errorf("stdout %q", cmd.out)
				}
			})
		}
	})
}

func TestPortForwardFromHalfOfLocalhost(t *testing.T) {
	noLeaks(t)
	taken, err := net.Listen("tcp6", "[::1]:0")
	if err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Skipf("this machine has no ::1: %v", err)
	}
	defer taken.Close()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	server.servePorts(b)
	cmd := server.start(nil, "port-forward", "web", port+":80", "-o", "json")
	until(t, "it to listen", func() bool { return strings.Count(cmd.out.String(), "\n") == 1 })
	wantEcho(t, "tcp", "127.0.0.1:"+port, b)
	want := fmt.Sprintf("warning: [::1]:%s can't be listened on (bind: address already in use): what connects to localhost:%[1]s may reach another program there. 127.0.0.1:%[1]s is forwarded: connect to that, or choose another port.\n", port)
	if got := cmd.errOut.String(); !strings.HasPrefix(got, want) {
		t.Errorf("stderr %q, want %q first", got, want)
	}
	cmd.cancel(terminated{syscall.SIGINT})
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, want 0", code)
	}
}

type closedAcceptor struct{ acceptor }

func (closedAcceptor) Close() error { return nil }

func TestListeningOnLocalhost(t *testing.T) {
	both := []listenAddress{{family: "4", host: "127.0.0.1", alternative: true}, {family: "6", host: "::1", alternative: true}}
	inUse := errors.New("in use")
	for name, test := range map[string]struct {
		port uint16
		// on6 says what of ::1 there is.
		on6       func(port uint16) error
		want      []uint16
		wantTaken int
	}{
		"both halves":         {port: 80, on6: func(uint16) error { return nil }, want: []uint16{80, 80}},
		"the other is taken":  {port: 80, on6: func(port uint16) error { return map[uint16]error{80: inUse}[port] }, want: []uint16{80}, wantTaken: 1},
		"there is no other":   {port: 80, on6: func(uint16) error { return inUse }, want: []uint16{80}},
		"any port, free here": {on6: func(port uint16) error { return map[uint16]error{1000: inUse, 1001: inUse}[port] }, want: []uint16{1002, 1002}},
		"any port, none free": {on6: func(port uint16) error {
			if port != 0 {
				return inUse
			}
			return nil
		}, want: []uint16{1000 + anyPortAttempts - 1}, wantTaken: 1},
	} {
		t.Run(name, func(t *testing.T) {
			next := uint16(1000)
			opened, taken, err := localEnd{network: "tcp", port: test.port}.listenPort(both, func(e localEnd, a listenAddress) (localListener, error) {
				if a.family == "6" {
					if err := test.on6(e.port); err != nil {
						return localListener{}, err
					}
				}
				if a.family == "4" && e.port == 0 {
					e.port = next
					next++
				}
				return localListener{closedAcceptor{}, e}, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			var got []uint16
			for _, one := range opened {
				got = append(got, one.at.port)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
			if len(taken) != test.wantTaken {
				t.Errorf("taken: %v, want %d", taken, test.wantTaken)
			}
		})
	}
}

func TestPortForwardToATargetMadeAnew(t *testing.T) {
	forEachForwardProtocol(t, func(t *testing.T, server *testServer) {
		b := newBackend(t)
		p := server.servePorts(b)
		var generation atomic.Int64
		p.session = func() {
			mine := generation.Load()
			p.dial = func(ctx context.Context, _ streaming.Endpoint) (streaming.PortStream, error) {
				if generation.Load() != mine {
					return nil, apierrors.NewConflict(v1.Resource("targets"), "web", errors.New("the instance doesn't run any more"))
				}
				return dialLocal(ctx, "tcp", b.Addr().String())
			}
		}
		cmd := server.start(nil, "port-forward", "web", ":80")
		address := cmd.address("80")
		local, remote := dial(t, address), b.next(t)
		wantBytes(t, local, remote)
		generation.Add(1)
		if strings.HasSuffix(t.Name(), "/mux") {
			wantEcho(t, "tcp", address, b)
			if got := p.sessions(); got != 2 {
				t.Errorf("%d sessions, want 2", got)
			}
		} else {
			// SPDY doesn't tell this from a port that refuses.
			wantRefused(t, address)
			cmd.says("the instance doesn't run any more")
		}
		// What the old session carries goes on.
		wantBytes(t, local, remote)
	})
}

func TestPortForwardOfDatagrams(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("dns", func(target *v1.Target) {
		target.Spec.Ports = []v1.TargetPort{{Name: "dns", Port: 53, Protocol: v1.ProtocolUDP}}
	}))
	far, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	echo := make(chan struct{})
	go func() { // answers with who asked
		defer close(echo)
		buffer := make([]byte, 1<<16)
		for {
			n, from, err := far.ReadFrom(buffer)
			if err != nil {
				return
			}
			_, _ = far.WriteTo(append([]byte(from.String()+" "), buffer[:n]...), from)
		}
	}()
	t.Cleanup(func() {
		far.Close()
		<-echo
	})
	p := server.servePorts(newBackend(t))
	p.dial = func(ctx context.Context, to streaming.Endpoint) (streaming.PortStream, error) {
		if to != (streaming.Endpoint{Network: "udp", Port: 53}) {
			return nil, fmt.Errorf("nothing listens on %+v", to)
		}
		return dialLocal(ctx, "udp", far.LocalAddr().String())
	}
	cmd := server.start(nil, "port-forward", "dns", ":dns", ":54/udp")
	address := cmd.address("53/udp")
	ask := func(conn net.Conn, question string) (from, answer string) {
		t.Helper()
		if _, err := conn.Write([]byte(question)); err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 1<<16)
		n, err := conn.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		from, answer, _ = strings.Cut(string(buffer[:n]), " ")
		return from, answer
	}
	client := func(address string) net.Conn {
		t.Helper()
		conn, err := net.Dial("udp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	flows := map[string]bool{}
	for range 2 {
		conn := client(address)
		first, answer := ask(conn, "who am I?")
		if answer != "who am I?" {
			t.Errorf("got %q", answer)
		}
		for _, question := range []string{"", strings.Repeat("x", 40000), "bye"} {
			from, answer := ask(conn, question)
			if answer != question {
				t.Errorf("got %d bytes for %d", len(answer), len(question))
			}
			if from != first {
				t.Errorf("the flow moved from %s to %s", first, from)
			}
		}
		flows[first] = true
	}
	if len(flows) != 2 {
		t.Errorf("two clients share a flow: %v", flows)
	}

	before := p.sessions()
	refused := client(cmd.address("54/udp"))
	for range 20 {
		if _, err := refused.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	cmd.says("/udp -> 54/udp: nothing listens on ")
	if n := strings.Count(cmd.errOut.String(), "nothing listens"); n != 1 {
		t.Errorf("it was said %d times", n)
	}

	p.endAll("the server is shutting down")
	cmd.says(`Connected to target "dns" again.`)
	if _, answer := ask(client(address), "anybody there?"); answer != "anybody there?" {
		t.Errorf("got %q", answer)
	}
	if got := p.sessions(); got != before+1 {
		t.Errorf("%d sessions, want %d", got, before+1)
	}
}

func TestFlows(t *testing.T) {
	listen := func(t *testing.T, idle time.Duration) (*flowListener, *net.UDPAddr) {
		conn, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return newFlowListener(conn, idle), conn.LocalAddr().(*net.UDPAddr)
	}
	accept := func(t *testing.T, l *flowListener, to *net.UDPAddr) (*flow, *net.UDPConn) {
		t.Helper()
		client, err := net.DialUDP("udp4", nil, to)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		s, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return s.(*flow), client
	}
	t.Run("one that is idle ends, and its client may begin another", func(t *testing.T) {
		l, to := listen(t, 20*time.Millisecond)
		f, client := accept(t, l, to)
		buffer := make([]byte, 10)
		if n, err := f.Read(buffer); err != nil || n != 1 {
			t.Fatal(n, err)
		}
		if _, err := f.Read(buffer); !errors.Is(err, errFlowEnded) {
			t.Fatalf("read ended with %v", err)
		}
		if _, err := client.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		again, err := l.Accept()
		if err != nil || again == stream(f) {
			t.Fatalf("got %v, %v", again, err)
		}
		f.Close() // leaves the other one alone
		if len(l.flows) != 1 {
			t.Errorf("%d flows, want 1", len(l.flows))
		}
	})
	t.Run("one more than there may be ends the one that was idle for longest", func(t *testing.T) {
		l, to := listen(t, time.Hour)
		var flows []*flow
		for range maxFlows {
			f, _ := accept(t, l, to)
			flows = append(flows, f)
		}
		flows[0].put([]byte("y"))
		f, _ := accept(t, l, to)
		if closed(flows[0].ended) || !closed(flows[1].ended) || closed(f.ended) {
			t.Error("it isn't the oldest one that has ended")
		}
		if len(l.flows) != maxFlows {
			t.Errorf("%d flows, want %d", len(l.flows), maxFlows)
		}
	})
	t.Run("what isn't sent on is bounded", func(t *testing.T) {
		l, _ := listen(t, time.Hour)
		f, _ := l.flow(netip.MustParseAddrPort("127.0.0.1:1"))
		for range 10 {
			f.put(make([]byte, 60<<10))
		}
		if n := len(f.queue); n != maxFlowBytes/(60<<10) {
			t.Errorf("%d large datagrams wait", n)
		}
		f, _ = l.flow(netip.MustParseAddrPort("127.0.0.1:2"))
		for range 2 * maxFlowQueue {
			f.put(nil)
		}
		if n := len(f.queue); n != maxFlowQueue {
			t.Errorf("%d empty datagrams wait", n)
		}
	})
}

func TestLocalSocketThatAnotherHasReplacedStays(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	first, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the other's socket is gone: %v", err)
	}
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestPortForwardOfUnixSockets(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	dir := t.TempDir()
	app := filepath.Join(dir, "app.sock")
	listener, err := net.Listen("unix", app)
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	p := server.servePorts(b)
	p.dial = func(ctx context.Context, to streaming.Endpoint) (streaming.PortStream, error) {
		if to.Network == "unix" {
			return dialLocal(ctx, "unix", to.Path)
		}
		return dialLocal(ctx, "tcp", b.Addr().String())
	}
	accepted := func(t *testing.T) net.Conn {
		t.Helper()
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			t.Fatal(err)
		}
		return conn
	}
	stale := filepath.Join(dir, "stale.sock")
	left, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	left.SetUnlinkOnClose(false)
	left.Close()

	both := filepath.Join(dir, "both.sock")
	cmd := server.start(nil, "port-forward", "web", stale+":80", ":"+app, both+":"+app)
	if got := cmd.address("80"); got != stale {
		t.Errorf("forwarded from %s, want %s", got, stale)
	}
	wantEcho(t, "unix", stale, b)
	for _, from := range [][2]string{{"tcp", cmd.address(app)}, {"unix", both}} {
		local, err := net.Dial(from[0], from[1])
		if err != nil {
			t.Fatal(err)
		}
		defer local.Close()
		remote := accepted(t)
		wantBytes(t, local, remote)
		if err := local.(streaming.PortStream).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(remote); err != nil || len(rest) != 0 {
			t.Errorf("got %q, %v", rest, err)
		}
		if _, err := remote.Write([]byte("still here")); err != nil {
			t.Fatal(err)
		}
		remote.Close()
		if rest, err := io.ReadAll(local); err != nil || string(rest) != "still here" {
			t.Errorf("got %q, %v", rest, err)
		}
	}
	info, err := os.Stat(both)
	if err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if diff := cmp.Diff([]v1.TargetPortForwardOptions{{}}, p.seen); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}

	t.Run("a socket that somebody listens on is left alone", func(t *testing.T) {
		second := server.start(nil, "port-forward", "web", both+":80")
		if code := second.wait(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if want := "somebody listens on the socket " + both; !strings.Contains(second.errOut.String(), want) {
			t.Errorf("stderr %q lacks %q", second.errOut, want)
		}
	})
	t.Run("a file that is no socket is left alone", func(t *testing.T) {
		file := filepath.Join(dir, "file")
		if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
		second := server.start(nil, "port-forward", "web", file+":80")
		if code := second.wait(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if want := file + " exists and is no socket"; !strings.Contains(second.errOut.String(), want) {
			t.Errorf("stderr %q lacks %q", second.errOut, want)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
			t.Errorf("got %q, %v", got, err)
		}
	})
	cmd.cancel(terminated{syscall.SIGTERM})
	if code := cmd.wait(); code != 0 {
		t.Errorf("exit code %d, stderr %q", code, cmd.errOut)
	}
	for _, path := range []string{stale, both} {
		if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// tcpListener is the target's side of a reverse forward.
type tcpListener struct {
	net.Listener
}

func (l tcpListener) Accept() (streaming.PortStream, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return conn.(streaming.PortStream), nil
}

func (l tcpListener) Endpoint() streaming.Endpoint {
	return streaming.Endpoint{Network: "tcp", Port: uint16(l.Addr().(*net.TCPAddr).Port)}
}

func TestReversePortForward(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	p := server.servePorts(b)
	p.listen = func(ctx context.Context, at streaming.Endpoint) (streaming.PortListener, error) {
		if at.Port == 1 {
			return nil, apierrors.NewForbidden(v1.Resource("targets"), "web", errors.New("its class opens no such port"))
		}
		var config net.ListenConfig
		listener, err := config.Listen(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", at.Port))
		if err != nil {
			return nil, err
		}
		return tcpListener{listener}, nil
	}
	path := filepath.Join(t.TempDir(), "app.sock")
	socket, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	_, port, _ := net.SplitHostPort(b.Addr().String())
	cmd := server.start(nil, "port-forward", "web", "-R", "0:"+b.Addr().String(), "-R", "0:"+port, "-R", "0:"+path)
	onTarget := func(local string) string {
		t.Helper()
		name := cmd.address(local)
		target, port, _ := strings.Cut(name, ":")
		if target != "web" {
			t.Errorf("forwarded from %s", name)
		}
		return "127.0.0.1:" + port
	}
	byAddress, byPort, bySocket := onTarget(b.Addr().String()), onTarget("localhost:"+port), onTarget(path)
	check := func() {
		t.Helper()
		wantEcho(t, "tcp", byAddress, b)
		wantEcho(t, "tcp", byPort, b)
		remote := dial(t, bySocket)
		local, err := socket.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer local.Close()
		wantBytes(t, remote, local)
		if err := remote.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(local); err != nil || len(rest) != 0 {
			t.Errorf("got %q, %v", rest, err)
		}
	}
	check()

	open, local := dial(t, byAddress), b.next(t)
	wantBytes(t, open, local)
	p.endAll("the server is shutting down")
	cmd.says(`Connected to target "web" again.`)
	if _, err := local.Read(make([]byte, 1)); err == nil {
		t.Error("the connection goes on")
	}
	for _, address := range []string{byAddress, byPort, bySocket} {
		until(t, "it to listen on the same port again", func() bool {
			conn, err := net.Dial("tcp", address)
			if err == nil {
				conn.Close()
			}
			return err == nil
		})
	}
	drain := time.After(200 * time.Millisecond)
	for drained := false; !drained; { // the connections that only looked
		select {
		case <-b.conns:
		case <-drain:
			drained = true
		}
	}
	conn, err := socket.Accept()
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	check()

	t.Run("what connects to nobody here is reset and told", func(t *testing.T) {
		free, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		nobody := free.Addr().String()
		free.Close()
		cmd := server.start(nil, "port-forward", "web", "-R", "0:"+nobody)
		wantRefused(t, strings.Replace(cmd.address(nobody), "web", "127.0.0.1", 1))
		cmd.says(" -> " + nobody + ": dial tcp " + nobody + ": connect: connection refused")
	})
	t.Run("a port that isn't allowed ends the command if there is nothing else", func(t *testing.T) {
		cmd := server.start(nil, "port-forward", "web", "-R", "1:3000")
		if code := cmd.wait(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if want := "its class opens no such port"; !strings.Contains(cmd.errOut.String(), want) {
			t.Errorf("stderr %q lacks %q", cmd.errOut, want)
		}
		if cmd.out.String() != "" {
			t.Errorf("stdout %q", cmd.out)
		}
	})
	t.Run("a port that isn't allowed leaves the others alone", func(t *testing.T) {
		cmd := server.start(nil, "port-forward", "web", ":80", "-R", "1:3000")
		wantEcho(t, "tcp", cmd.address("80"), b)
		cmd.says("Unable to have target \"web\" listen on port 1: targets.streaming.aaserver.io \"web\" is forbidden: its class opens no such port\n")
	})
}

func TestReversePortForwardFromATargetMadeAnew(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	p := server.servePorts(b)
	var generation atomic.Int64
	listeners := make(chan net.Listener, 10)
	p.session = func() {
		mine := generation.Load()
		p.listen = func(ctx context.Context, at streaming.Endpoint) (streaming.PortListener, error) {
			if generation.Load() != mine {
				return nil, apierrors.NewConflict(v1.Resource("targets"), "web", errors.New("it was deleted, and another one made by its name"))
			}
			var config net.ListenConfig
			listener, err := config.Listen(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", at.Port))
			if err != nil {
				return nil, err
			}
			listeners <- listener
			return tcpListener{listener}, nil
		}
	}
	cmd := server.start(nil, "port-forward", "web", "-R", "0:"+b.Addr().String())
	at := strings.Replace(cmd.address(b.Addr().String()), "web", "127.0.0.1", 1)
	wantEcho(t, "tcp", at, b)
	generation.Add(1)
	(<-listeners).Close() // as the server does when the instance has ended
	select {
	case <-listeners:
	case <-time.After(timeout):
		t.Fatalf("nothing listens any more; stderr %q", cmd.errOut)
	}
	wantEcho(t, "tcp", at, b)
	_, port, _ := net.SplitHostPort(at)
	cmd.says("Target \"web\" doesn't listen on port " + port + " any more: no longer listening: ")
	cmd.says("Target \"web\" listens on port " + port + " again.\n")
	if got := p.sessions(); got != 2 {
		t.Errorf("%d sessions, want 2", got)
	}
}

func TestPortForwardOfSeveralTargets(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"), process("db"))
	b := newBackend(t)
	p := server.servePorts(b)
	cmd := server.start(nil, "port-forward", "web", ":80", ":81", "target/db/db-1", ":80")
	web, db := cmd.address("web:80"), cmd.address("db/db-1:80")
	wantEcho(t, "tcp", web, b)
	wantEcho(t, "tcp", db, b)
	if diff := cmp.Diff([]v1.TargetPortForwardOptions{{Ports: []int32{80, 81}}, {Instance: "db-1", Ports: []int32{80}}}, p.seen); diff != "" {
		t.Errorf("options (-want +got):\n%s", diff)
	}
	// One that is lost leaves the other alone.
	local, remote := dial(t, db), b.next(t)
	p.mu.Lock()
	p.end[0](errors.New("enough"))
	p.mu.Unlock()
	cmd.says(`Connected to target "web" again.`)
	wantBytes(t, local, remote)
	wantEcho(t, "tcp", web, b)
	if strings.Contains(cmd.errOut.String(), "db") {
		t.Errorf("stderr %q", cmd.errOut)
	}
}

func TestPortForwardOfWhatAServerCant(t *testing.T) {
	for protocol, p := range map[string]struct {
		websockets string
		spoken     string
	}{
		"tunnel": {"true", "SPDY/3.1+portforward.k8s.io"},
		"SPDY":   {"false", "portforward.k8s.io"},
	} {
		t.Setenv("KUBECTL_PORT_FORWARD_WEBSOCKETS", p.websockets)
		server := newTestServer(t, process("web"))
		server.servePorts(newBackend(t))
		server.intercept = func(_ http.ResponseWriter, r *http.Request) bool {
			withoutMux(r)
			return false
		}
		for what, args := range map[string][]string{
			"forward UDP":                           {":53/udp"},
			"forward to unix sockets":               {":80", ":/run/app.sock"},
			"forward ports from the target to here": {"-R", "9000:3000"},
		} {
			t.Run(protocol+" can't "+what, func(t *testing.T) {
				noLeaks(t)
				cmd := server.start(nil, append([]string{"port-forward", "web"}, args...)...)
				if code := cmd.wait(); code != 1 {
					t.Errorf("exit code %d, want 1", code)
				}
				want := fmt.Sprintf("error: the server at %s can't %s: this takes the protocol v1.mux.streaming.aaserver.io, and what could be agreed on is %s\n", server.srv.URL, what, p.spoken)
				if diff := cmp.Diff(want, cmd.errOut.String()); diff != "" {
					t.Errorf("stderr (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// side is a stream of which the test is the other end.
type side struct {
	in       chan []byte
	out      bytes.Buffer
	readErr  error
	writeErr error
	ended    atomic.Bool
	resets   atomic.Int64
	closing  sync.Once
	reset    chan struct{}
}

func newSide(data ...string) *side {
	s := &side{in: make(chan []byte, len(data)), readErr: io.EOF, reset: make(chan struct{})}
	for _, d := range data {
		s.in <- []byte(d)
	}
	close(s.in)
	return s
}

func (s *side) Read(p []byte) (int, error) {
	if d, ok := <-s.in; ok {
		return copy(p, d), nil
	}
	if s.readErr == nil { // nothing more until it is reset
		<-s.reset
		return 0, net.ErrClosed
	}
	return 0, s.readErr
}

func (s *side) Write(p []byte) (int, error) {
	if s.writeErr != nil {
		return 0, s.writeErr
	}
	return s.out.Write(p)
}

func (s *side) CloseWrite() error {
	s.ended.Store(true)
	return nil
}

func (s *side) Reset() error {
	s.resets.Add(1)
	s.closing.Do(func() { close(s.reset) })
	return nil
}

func (s *side) Close() error { return nil }

func (s *side) gone() <-chan struct{} { return s.reset }

func TestJoin(t *testing.T) {
	broken := errors.New("broken")
	tests := map[string]struct {
		a, b      *side
		before    func(a, b *side, cancel func())
		wantA     string
		wantB     string
		wantErr   error
		wantReset bool
	}{
		"both ends in order": {a: newSide("1", "2"), b: newSide("3"), wantA: "3", wantB: "12"},
		"one breaks": {a: newSide("1"), b: newSide("3"), before: func(a, b *side, _ func()) { a.readErr, b.readErr = broken, nil },
			wantA: "3", wantB: "1", wantErr: broken, wantReset: true},
		"one takes no more, and what it says still goes on": {a: newSide("1"), b: newSide("3", "4"), before: func(_, b *side, _ func()) { b.writeErr = broken },
			wantA: "34", wantReset: true},
		"the context ends": {a: newSide(), b: newSide(), before: func(a, b *side, cancel func()) {
			a.readErr, b.readErr = nil, nil
			cancel()
		}, wantErr: net.ErrClosed, wantReset: true},
		"one is reset after its direction has ended": {a: newSide("1"), b: newSide(), before: func(a, b *side, _ func()) {
			b.readErr = nil
			_ = a.Reset()
		}, wantB: "1", wantErr: net.ErrClosed, wantReset: true},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			if test.before != nil {
				test.before(test.a, test.b, cancel)
			}
			if err := join(ctx, nil, test.a, test.b); !errors.Is(err, test.wantErr) || (err == nil) != (test.wantErr == nil) {
				t.Errorf("error %v, want %v", err, test.wantErr)
			}
			if got := test.a.out.String(); got != test.wantA {
				t.Errorf("a got %q, want %q", got, test.wantA)
			}
			if got := test.b.out.String(); got != test.wantB {
				t.Errorf("b got %q, want %q", got, test.wantB)
			}
			if got := test.b.resets.Load() > 0; got != test.wantReset {
				t.Errorf("b was reset: %t, want %t", got, test.wantReset)
			}
		})
	}
}
