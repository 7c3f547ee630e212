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

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

func TestParsePorts(t *testing.T) {
	tests := map[string]struct {
		args    []string
		want    []portArg
		wantErr string
	}{
		"a number stands for both": {
			args: []string{"5000"}, want: []portArg{{sameLocal: true, remote: 5000}}},
		"a name stands for both": {
			args: []string{"http"}, want: []portArg{{sameLocal: true, name: "http"}}},
		"local and remote": {
			args: []string{"8888:5000", "8443:https"},
			want: []portArg{{local: 8888, remote: 5000}, {local: 8443, name: "https"}}},
		"a random local port": {
			args: []string{"0:5000", ":5000", ":http"},
			want: []portArg{{remote: 5000}, {remote: 5000}, {name: "http"}}},
		"a name that begins with a digit": {
			args: []string{"3proxy"}, want: []portArg{{sameLocal: true, name: "3proxy"}}},
		"the largest port":          {args: []string{"65535:65535"}, want: []portArg{{local: 65535, remote: 65535}}},
		"too many parts":            {args: []string{"1:2:3"}, wantErr: "invalid port format '1:2:3'"},
		"nothing":                   {args: []string{""}, wantErr: "invalid port format ''"},
		"no remote port":            {args: []string{"80:"}, wantErr: "invalid port format '80:'"},
		"remote port 0":             {args: []string{"80:0"}, wantErr: "invalid remote port '0': expected a number from 1 to 65535 or the name of one of the target's ports"},
		"remote port out of range":  {args: []string{"65536"}, wantErr: "invalid remote port '65536': expected a number from 1 to 65535 or the name of one of the target's ports"},
		"a negative remote port":    {args: []string{"-1"}, wantErr: "invalid remote port '-1': expected a number from 1 to 65535 or the name of one of the target's ports"},
		"a local port by name":      {args: []string{"http:80"}, wantErr: "invalid local port 'http': expected a number from 0 to 65535, where 0 is a random port"},
		"a local port out of range": {args: []string{"99999:80"}, wantErr: "invalid local port '99999': expected a number from 0 to 65535, where 0 is a random port"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := parsePorts(test.args)
			if diff := cmp.Diff(test.wantErr, errorText(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if err == nil {
				if diff := cmp.Diff(test.want, got, cmp.AllowUnexported(portArg{})); diff != "" {
					t.Errorf("ports (-want +got):\n%s", diff)
				}
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

func TestResolvePorts(t *testing.T) {
	target := process("web", func(target *v1.Target) {
		target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 8080}, {Name: "dns", Port: 53, Protocol: v1.ProtocolUDP}}
	})
	single := process("web", func(target *v1.Target) { target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 8080}} })
	tests := map[string]struct {
		arg     string
		target  *v1.Target
		want    portPair
		wantErr string
	}{
		"a name is the same port locally":       {arg: "http", target: target, want: portPair{8080, 8080}},
		"a name with a local port":              {arg: "80:http", target: target, want: portPair{80, 8080}},
		"a name with a random local port":       {arg: ":http", target: target, want: portPair{0, 8080}},
		"a number needs no target":              {arg: "80:81", want: portPair{80, 81}},
		"an unknown name":                       {arg: "https", target: target, wantErr: `target "web" has no port named "https": its ports are http (8080), dns (53)`},
		"an unknown name where there is one":    {arg: "https", target: single, wantErr: `target "web" has no port named "https": its only port is http (8080)`},
		"a name where there are no ports":       {arg: "https", target: process("db"), wantErr: `target "db" has no port named "https": it lists no ports`},
		"UDP isn't forwarded as if it were TCP": {arg: "dns", target: target, wantErr: `port "dns" of target "web" is a UDP port: only TCP can be forwarded`},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			args, err := parsePorts([]string{test.arg})
			if err != nil {
				t.Fatal(err)
			}
			got, err := resolvePorts(args, test.target)
			if diff := cmp.Diff(test.wantErr, errorText(err)); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
			if err == nil {
				if diff := cmp.Diff([]portPair{test.want}, got, cmp.AllowUnexported(portPair{})); diff != "" {
					t.Errorf("ports (-want +got):\n%s", diff)
				}
			}
		})
	}
}

func TestParseAddresses(t *testing.T) {
	v4 := listenAddress{network: "tcp4", host: "127.0.0.1", alternative: true}
	v6 := listenAddress{network: "tcp6", host: "::1", alternative: true}
	tests := map[string]struct {
		args    []string
		want    []listenAddress
		wantErr string
	}{
		"localhost is two addresses":  {args: []string{"localhost"}, want: []listenAddress{v4, v6}},
		"each address is used once":   {args: []string{"localhost", "::1", "localhost"}, want: []listenAddress{v4, v6}},
		"addresses of both families":  {args: []string{"0.0.0.0", "::"}, want: []listenAddress{{network: "tcp4", host: "0.0.0.0"}, {network: "tcp6", host: "::"}}},
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

// servePorts forwards port 80 to the backend and refuses the others.
func (s *testServer) servePorts(b *backend, end context.Context, seen *v1.TargetPortForwardOptions) {
	s.portforward = func(w http.ResponseWriter, r *http.Request, _ string) {
		options := decode[v1.TargetPortForwardOptions](s.t, r)
		*seen = *options
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		defer context.AfterFunc(end, func() { cancel(context.Cause(end)) })()
		_ = streaming.ServePortForward(w, r.WithContext(ctx), streaming.PortForwardRequest{}, streaming.Options{},
			streaming.PortForwardBackend{Dial: func(ctx context.Context, to streaming.Endpoint) (streaming.PortStream, error) {
				if to.Port != 80 {
					return nil, fmt.Errorf("connecting to port %d of instance web-0: connection refused", to.Port)
				}
				var d net.Dialer
				conn, err := d.DialContext(ctx, "tcp", b.Addr().String())
				if err != nil {
					return nil, err
				}
				return conn.(*net.TCPConn), nil
			}})
	}
}

var forwardingLine = regexp.MustCompile(`Forwarding from (127\.0\.0\.1:\d+) -> (\d+)`)

// address waits until a remote port is forwarded, and returns where.
func (r *running) address(remote string) string {
	r.t.Helper()
	address := ""
	until(r.t, "port "+remote+" to be forwarded", func() bool {
		for _, match := range forwardingLine.FindAllStringSubmatch(r.out.String(), -1) {
			if match[2] == remote {
				address = match[1]
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
	forEachTransport(t, func(t *testing.T) {
		noLeaks(t)
		server := newTestServer(t, process("web", func(target *v1.Target) {
			target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 80}}
		}))
		b := newBackend(t)
		var seen v1.TargetPortForwardOptions
		server.servePorts(b, t.Context(), &seen)
		cmd := server.start(nil, "port-forward", "web/web-0", ":http", ":81", "0:80")
		good, bad := cmd.address("80"), cmd.address("81")
		if diff := cmp.Diff(v1.TargetPortForwardOptions{Instance: "web-0", Ports: []int32{80, 81}}, seen); diff != "" {
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
			refused, err := net.Dial("tcp", bad)
			if err == nil {
				_, err = refused.Read(make([]byte, 1))
				refused.Close()
			}
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("the refused connection ended with %v, want a reset", err)
			}
			_, port, _ := net.SplitHostPort(bad)
			want := "error: forwarding " + port + " -> 81: connecting to port 81 of instance web-0: connection refused\n"
			until(t, "the reason", func() bool { return strings.Contains(cmd.errOut.String(), want) })
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

func TestPortForwardLosesItsServer(t *testing.T) {
	forEachTransport(t, func(t *testing.T) {
		noLeaks(t)
		server := newTestServer(t, process("web"))
		b := newBackend(t)
		end, cancel := context.WithCancelCause(context.Background())
		defer cancel(nil)
		var seen v1.TargetPortForwardOptions
		server.servePorts(b, end, &seen)
		cmd := server.start(nil, "port-forward", "web", ":80")
		local, remote := dial(t, cmd.address("80")), b.next(t)
		if _, err := remote.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(local, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		cancel(errors.New("the server shuts down"))
		if code := cmd.wait(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		for _, want := range []string{
			"error: the connection to the server was lost",
			`port-forwarding to target "web" has ended: run the command again to go on` + "\n",
		} {
			if got := cmd.errOut.String(); !strings.Contains(got, want) {
				t.Errorf("stderr %q lacks %q", got, want)
			}
		}
		if _, err := local.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the local connection ended with %v, want a reset", err)
		}
	})
}

func TestPortForwardWherePortsAreTaken(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	var seen v1.TargetPortForwardOptions
	server.servePorts(b, t.Context(), &seen)
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
