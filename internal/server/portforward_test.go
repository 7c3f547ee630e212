package server

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/drivertest"
	"aaserver.io/aaserver/internal/driver/process"
	"aaserver.io/aaserver/streaming"
)

// mux opens a session of port-forward by the mux protocol.
func (s *policyServer) mux(t *testing.T, target, query string) *streaming.MuxClient {
	t.Helper()
	config := s.as("admin")
	tls, err := rest.TLSConfigFor(config)
	if err != nil {
		t.Fatal(err)
	}
	url := s.client(t, "admin").StreamingV1().RESTClient().Get().Namespace("shop").Resource("targets").Name(target).SubResource("portforward").URL()
	url.Scheme, url.RawQuery = "wss", query
	dialer := websocket.Dialer{TLSClientConfig: tls, Subprotocols: []string{streaming.MuxProtocol}}
	ws, response, err := dialer.DialContext(t.Context(), url.String(), http.Header{"Authorization": {"Bearer " + config.BearerToken}})
	if err != nil {
		if response != nil {
			body, _ := io.ReadAll(response.Body)
			t.Fatalf("%v: %s", err, body)
		}
		t.Fatal(err)
	}
	client, err := streaming.NewMuxClient(ws, streaming.MuxOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// testForwards forwards everything that can be: from a client of the mux
// protocol through the API to a process, and back.
func testForwards(t *testing.T, s *policyServer) {
	host, err := process.New(process.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := host.Close(); err != nil {
			t.Error(err)
		}
	})
	s.process.Store(host)
	t.Cleanup(func() { s.process.Store(nil) })
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("the test hangs"))
	t.Cleanup(cancel)

	// What an instance would listen to.
	dir, err := os.MkdirTemp("", "aaserver-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, "app.sock")
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "allowed"), 0o700), os.Symlink(socket, filepath.Join(dir, "allowed", "link"))); err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(serving.Wait)
	tcp := echoes(t, &serving, "tcp", "127.0.0.1:0")
	echoes(t, &serving, "unix", socket)
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { udp.Close() })
	serving.Go(func() { drivertest.EchoDatagrams(udp) })

	class := v1.TargetClassSpec{
		Sources: []string{v1.SourceProcess}, Agents: []string{"local"}, AgentUser: true,
		Ports: v1.PortPolicy{
			UnixSockets: []string{socket, filepath.Join(dir, "allowed") + "/"},
			Reverse:     []v1.PortRange{{Port: 1024, EndPort: 65535}},
		},
	}
	s.class(t, "local", class)
	targets := s.client(t, "admin").StreamingV1().Targets("shop")
	target, err := targets.Create(ctx, &v1.Target{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: v1.TargetSpec{
		ClassName: "local", AgentName: "local",
		Process: &v1.ProcessSource{Command: []string{"sleep", "1000"}},
		Ports:   []v1.TargetPort{{Name: "http", Port: 80}, {Name: "dns", Port: 80, Protocol: v1.ProtocolUDP}},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ports := []v1.InstancePort{
		{Name: "http", Port: 80, HostPort: int32(tcp.(*net.TCPAddr).Port)},
		{Name: "dns", Port: 80, HostPort: int32(udp.LocalAddr().(*net.UDPAddr).Port)},
	}
	if err := host.Start(ctx, driver.Instance{Target: target, Name: "web-0", Ports: ports}); err != nil {
		t.Fatal(err)
	}
	target.Status.Instances = []v1.InstanceStatus{{
		Name: "web-0", Ready: true, Ports: ports, State: v1.InstanceState{Running: &v1.InstanceStateRunning{StartedAt: metav1.Now()}},
	}}
	if _, err := targets.UpdateStatus(ctx, target, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	client := s.mux(t, "web", "")
	// talk says something, and wants it back at the end.
	talk := func(t *testing.T, stream streaming.PortStream) {
		t.Helper()
		defer stream.Close()
		stop := context.AfterFunc(ctx, func() { stream.Close() })
		defer stop()
		text := strings.Repeat("anybody there? ", 10000)
		if _, err := io.WriteString(stream, text); err != nil {
			t.Fatal(err)
		}
		if err := stream.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(stream); err != nil || string(got) != text {
			t.Errorf("read %d bytes, %v, want the %d that were written", len(got), err, len(text))
		}
	}

	for name, end := range map[string]streaming.Endpoint{
		"a port":                  {Network: "tcp", Port: 80},
		"a port of an instance":   {Network: "tcp", Port: 80, Instance: "web-0"},
		"a unix socket":           {Network: "unix", Path: socket},
		"a socket of an instance": {Network: "unix", Path: socket, Instance: "web-0"},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := client.Dial(ctx, end)
			if err != nil {
				t.Fatal(err)
			}
			talk(t, stream)
		})
	}
	t.Run("datagrams", func(t *testing.T) {
		stream, err := client.Dial(ctx, streaming.Endpoint{Network: "udp", Port: 80})
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		stop := context.AfterFunc(ctx, func() { stream.Close() })
		defer stop()
		buf := make([]byte, 64<<10)
		for _, text := range []string{"one", strings.Repeat("two", 3000), "three"} {
			if _, err := io.WriteString(stream, text); err != nil {
				t.Fatal(err)
			}
			if n, err := stream.Read(buf); err != nil || string(buf[:n]) != text {
				t.Fatalf("read %d bytes, %v, want %d", n, err, len(text))
			}
		}
	})
	for name, tt := range map[string]struct {
		end  streaming.Endpoint
		code int32
		want string
	}{
		"a socket that the class doesn't allow": {streaming.Endpoint{Network: "unix", Path: filepath.Join(dir, "other.sock")}, http.StatusForbidden, `class "local" does not allow connections to the unix socket`},
		"a link to one that it does":            {streaming.Endpoint{Network: "unix", Path: filepath.Join(dir, "allowed", "link")}, http.StatusBadRequest, "name " + socket + " instead"},
		"a socket that there isn't":             {streaming.Endpoint{Network: "unix", Path: filepath.Join(dir, "allowed", "none")}, http.StatusNotFound, "there is no unix socket"},
		"a port that isn't listed":              {streaming.Endpoint{Network: "udp", Port: 81}, http.StatusForbidden, "port 81 (UDP)"},
		"an instance that there isn't":          {streaming.Endpoint{Network: "udp", Port: 80, Instance: "web-1"}, http.StatusNotFound, `has no instance "web-1"`},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := client.Dial(ctx, tt.end)
			var status apierrors.APIStatus
			if !errors.As(err, &status) || status.Status().Code != tt.code || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want a status of code %d that says %q", err, tt.code, tt.want)
			}
		})
	}

	t.Run("in reverse", func(t *testing.T) {
		listener, err := client.Listen(ctx, streaming.Endpoint{Network: "tcp"})
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		address := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(listener.Endpoint().Port)))
		connect := func() net.Conn {
			t.Helper()
			connection, err := new(net.Dialer).DialContext(ctx, "tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			return connection
		}
		outside := connect()
		accepted, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		serving.Go(func() { drivertest.EchoAfterEOF(outside) })
		talk(t, accepted)

		port := listener.Endpoint().Port
		_, err = client.Listen(ctx, streaming.Endpoint{Network: "tcp", Port: port})
		if !apierrors.IsServiceUnavailable(err) || !strings.Contains(err.Error(), "is in use on the agent's host") {
			t.Errorf("listening twice: %v", err)
		}

		narrower := *class.DeepCopy()
		narrower.Ports.Reverse = nil
		s.class(t, "local", narrower)
		defer s.class(t, "local", class)
		refused := connect()
		defer refused.Close()
		if _, err := listener.Accept(); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "is listened to for a reverse forward") {
			t.Errorf("with a class that doesn't allow it any more: %v", err)
		}
		if n, err := refused.Read(make([]byte, 1)); err == nil {
			t.Errorf("the connection that was refused says %d bytes", n)
		}
	})

	t.Run("a session whose target the class doesn't allow any more", func(t *testing.T) {
		end := streaming.Endpoint{Network: "tcp", Port: 80}
		before, err := client.Dial(ctx, end)
		if err != nil {
			t.Fatal(err)
		}
		narrower := *class.DeepCopy()
		narrower.AgentUser = false
		s.class(t, "local", narrower)
		defer s.class(t, "local", class)
		if _, err := client.Dial(ctx, end); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "spec.process.user: ") {
			t.Errorf("a new connection: %v", err)
		}
		talk(t, before)
	})

	t.Run("a session of certain ports", func(t *testing.T) {
		client := s.mux(t, "web", "ports=80")
		stream, err := client.Dial(ctx, streaming.Endpoint{Network: "tcp", Port: 80})
		if err != nil {
			t.Fatal(err)
		}
		talk(t, stream)
		for _, end := range []streaming.Endpoint{{Network: "tcp", Port: 81}, {Network: "unix", Path: socket}} {
			if _, err := client.Dial(ctx, end); !apierrors.IsForbidden(err) {
				t.Errorf("%+v: %v", end, err)
			}
		}
		if _, err := client.Listen(ctx, streaming.Endpoint{Network: "tcp"}); !apierrors.IsForbidden(err) {
			t.Errorf("in reverse: %v", err)
		}
	})

	t.Run("a session of a port that is UDP", func(t *testing.T) {
		udpOnly := *class.DeepCopy()
		udpOnly.Ports.Allowed = []v1.PortRange{{Port: 80, Protocol: v1.ProtocolUDP}}
		s.class(t, "local", udpOnly)
		defer s.class(t, "local", class)
		if _, err := s.mux(t, "web", "ports=80").Dial(ctx, streaming.Endpoint{Network: "udp", Port: 80}); err != nil {
			t.Errorf("by mux: %v", err)
		}
		err := s.client(t, "admin").StreamingV1().RESTClient().Get().Namespace("shop").Resource("targets").Name("web").SubResource("portforward").
			Param("ports", "80").SetHeader("Upgrade", "websocket").SetHeader("Connection", "upgrade").Do(ctx).Error()
		if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "does not allow port 80 (TCP)") {
			t.Errorf("by a protocol that knows TCP alone: %v", err)
		}
	})

	t.Run("a session that is idle", func(t *testing.T) {
		idle := *class.DeepCopy()
		idle.Limits.IdleTimeoutSeconds = ptr.To[int64](1)
		s.class(t, "local", idle)
		defer s.class(t, "local", class)
		client := s.mux(t, "web", "")
		if _, err := client.Dial(ctx, streaming.Endpoint{Network: "udp", Port: 80}); err != nil {
			t.Fatal(err)
		}
		if _, err := client.Listen(ctx, streaming.Endpoint{Network: "tcp"}); err != nil {
			t.Fatal(err)
		}
		select {
		case <-client.Done():
			if err := client.Err(); !strings.Contains(err.Error(), "nothing passed for 1s") {
				t.Errorf("it ended by %v", err)
			}
		case <-ctx.Done():
			t.Error("it goes on")
		}
	})
}

// echoes serves connections by EchoAfterEOF until the test ends.
func echoes(t *testing.T, serving *sync.WaitGroup, network, address string) net.Addr {
	t.Helper()
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	serving.Go(func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { drivertest.EchoAfterEOF(connection) })
		}
	})
	return listener.Addr()
}
