package process

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func TestPorts(t *testing.T) {
	d := newDriver(t, Options{})
	target := newTarget(script("exec sleep 1000"))
	target.Spec.Ports = []v1.TargetPort{{Name: "http", Port: 8080, Protocol: "TCP"}, {Name: "dns", Port: 53, Protocol: "UDP"},
		{Name: "sip", Port: 5060, Protocol: "UDP"}, {Name: "sip-tcp", Port: 5060, Protocol: "TCP"}}
	start(t, d, target, v1.InstancePort{Name: "http", Port: 8080, HostPort: 31021}, v1.InstancePort{Name: "dns", Port: 53, HostPort: 31022},
		v1.InstancePort{Name: "sip", Port: 5060, HostPort: 31023}, v1.InstancePort{Name: "sip-tcp", Port: 5060, HostPort: 31024})

	// What was UDP when the instance was started isn't its own by TCP.
	turned := target.DeepCopy()
	turned.Spec.Ports[1].Protocol = "TCP"
	// Listed since the instance was started: it is no port of the instance.
	later := target.DeepCopy()
	later.Spec.Ports = append(later.Spec.Ports, v1.TargetPort{Name: "ssh", Port: 22, Protocol: "TCP"})

	for name, tt := range map[string]struct {
		target   *v1.Target
		network  string
		port     uint16
		want     string
		wantKind driver.Kind
		wantErr  string
	}{
		"a TCP port leads to its host port": {target, "tcp", 8080, "tcp 127.0.0.1:31021", driver.Unavailable,
			"nothing listens on port 8080 of instance web-0 (127.0.0.1:31021): connection refused"},
		"a UDP port leads to its host port": {target, "udp", 53, "udp 127.0.0.1:31022", driver.Unavailable,
			"nothing listens on port 53 of instance web-0 (127.0.0.1:31022): connection refused"},
		"of two by one number, the one of TCP": {target, "tcp", 5060, "tcp 127.0.0.1:31024", driver.Unavailable,
			"nothing listens on port 5060 of instance web-0 (127.0.0.1:31024): connection refused"},
		"of two by one number, the one of UDP": {target, "udp", 5060, "udp 127.0.0.1:31023", driver.Unavailable,
			"nothing listens on port 5060 of instance web-0 (127.0.0.1:31023): connection refused"},
		"a port that isn't listed is the host's": {target, "tcp", 9090, "tcp 127.0.0.1:9090", driver.Unavailable,
			"nothing listens on port 9090 of instance web-0 (127.0.0.1:9090): connection refused"},
		"one of UDP too": {target, "udp", 9090, "udp 127.0.0.1:9090", driver.Unavailable,
			"nothing listens on port 9090 of instance web-0 (127.0.0.1:9090): connection refused"},
		"a UDP port isn't asked for by TCP": {target, "tcp", 53, "", driver.Invalid,
			"port 53 of instance web-0 is UDP, and was asked for by TCP"},
		"a TCP port isn't asked for by UDP": {target, "udp", 8080, "", driver.Invalid,
			"port 8080 of instance web-0 is TCP, and was asked for by UDP"},
		"a port that was UDP": {turned, "tcp", 53, "", driver.Unavailable,
			"instance web-0 was started before port 53 was listed: it has the port once it is replaced"},
		"a port that the instance was started without": {later, "tcp", 22, "", driver.Unavailable,
			"instance web-0 was started before port 22 was listed: it has the port once it is replaced"},
		"another network": {target, "unix", 22, "", driver.Unsupported,
			`instances of a process can't be reached by the network "unix": tcp and udp are known`},
	} {
		t.Run(name, func(t *testing.T) {
			dialled := ""
			c := open(t, d, tt.target)
			c.req.Dial = func(_ context.Context, network, address string) (net.Conn, error) {
				dialled = network + " " + address
				return nil, &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
			}
			_, err := c.DialPort(t.Context(), tt.network, tt.port)
			if driver.KindOf(err) != tt.wantKind || err == nil || err.Error() != tt.wantErr {
				t.Errorf("error %v of kind %d, want %q of kind %d", err, driver.KindOf(err), tt.wantErr, tt.wantKind)
			}
			if dialled != tt.want {
				t.Errorf("dialled %q, want %q", dialled, tt.want)
			}
		})
	}

	c := open(t, d, target)
	c.req.Dial = func(context.Context, string, string) (net.Conn, error) {
		return nil, driver.Errorf(driver.Invalid, "not allowed")
	}
	if _, err := c.DialPort(t.Context(), "tcp", 8080); driver.KindOf(err) != driver.Invalid {
		t.Errorf("a refusal by the class became %v", err)
	}
}

// TestUDPPortWhereNothingListens: the refusal comes with the datagram after the
// one that it is about.
func TestUDPPortWhereNothingListens(t *testing.T) {
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free.Close()
	d, req := running(t, v1.InstancePort{Name: "udp", Port: 53, HostPort: portOf(free.LocalAddr())})
	stream, err := open(t, d, req.Target).DialPort(t.Context(), "udp", 53)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if _, err := stream.Write([]byte("anybody there?")); err != nil {
		t.Fatal(err)
	}
	if n, err := stream.Read(make([]byte, 10)); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("read %d bytes, %v, want the refusal", n, err)
	}
}

// TestSocketsThatAreNotWhatTheySeem: the instance may do as it likes where it
// may write, and the agent, which connects, may do more than it.
func TestSocketsThatAreNotWhatTheySeem(t *testing.T) {
	dir := realDir(t)
	in := func(name string) string { return filepath.Join(dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(in("secret"), 0o700))
	must(os.Mkdir(in("open"), 0o700))
	echo(t, "unix", in("secret/docker.sock"))
	echo(t, "unix", in("open/app.sock"))
	must(os.Symlink(in("secret/docker.sock"), in("open/link")))
	must(os.Symlink("../secret", in("open/dir")))
	must(os.Symlink("nowhere", in("open/broken")))
	echo(t, "unix", in("secret/second.sock"))
	must(os.Link(in("secret/second.sock"), in("open/hard")))
	must(os.WriteFile(in("open/file"), nil, 0o600))
	must(unix.Mkfifo(in("open/fifo"), 0o600))
	for name, network := range map[string]string{"open/datagrams": "unixgram", "open/packets": "unixpacket"} {
		if network == "unixgram" {
			c, err := net.ListenUnixgram(network, &net.UnixAddr{Name: in(name), Net: network})
			must(err)
			t.Cleanup(func() { c.Close() })
			continue
		}
		l, err := net.Listen(network, in(name))
		must(err)
		t.Cleanup(func() { l.Close() })
	}
	d, req := running(t)
	c := open(t, d, req.Target)
	link := func(path, at, leads string) string {
		return "the unix socket " + in(path) + " is reached over the symbolic link " + in(at) +
			", which isn't followed, because it may lead to what the class doesn't allow" + leads
	}

	for name, tt := range map[string]struct {
		path     string
		wantKind driver.Kind
		want     string // "" is a connection
	}{
		"a socket":                     {"open/app.sock", 0, ""},
		"a link to another socket":     {"open/link", driver.Invalid, link("open/link", "open/link", ": name "+in("secret/docker.sock")+" instead")},
		"a linked directory":           {"open/dir/docker.sock", driver.Invalid, link("open/dir/docker.sock", "open/dir", ": name "+in("secret/docker.sock")+" instead")},
		"a link to nothing":            {"open/broken", driver.Invalid, link("open/broken", "open/broken", "; it leads to nothing")},
		"another socket's second name": {"open/hard", driver.Invalid, "the unix socket " + in("open/hard") + " has 2 names, hard links, and isn't connected to, because it may be one that the class doesn't allow: remove the others"},
		"a file":                       {"open/file", driver.Invalid, in("open/file") + " is no unix socket"},
		"a named pipe":                 {"open/fifo", driver.Invalid, in("open/fifo") + " is no unix socket"},
		"a directory":                  {"open", driver.Invalid, in("open") + " is no unix socket"},
		"below a file":                 {"open/file/x", driver.NotFound, "there is no unix socket " + in("open/file/x") + ": " + in("open/file") + " is no directory"},
		"nothing":                      {"open/none/x", driver.NotFound, "there is no unix socket " + in("open/none/x") + ": " + in("open/none") + " doesn't exist"},
		"datagrams":                    {"open/datagrams", driver.Invalid, in("open/datagrams") + " is a unix socket of another type: only stream sockets can be forwarded"},
		"packets":                      {"open/packets", driver.Invalid, in("open/packets") + " is a unix socket of another type: only stream sockets can be forwarded"},
	} {
		t.Run(name, func(t *testing.T) {
			stream, err := c.DialSocket(t.Context(), in(tt.path))
			if err == nil {
				stream.Close()
			}
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil || err.Error() != tt.want || driver.KindOf(err) != tt.wantKind {
				t.Errorf("error %v of kind %d, want %q of kind %d", err, driver.KindOf(err), tt.want, tt.wantKind)
			}
		})
	}

	t.Run("a name longer than a socket's address", func(t *testing.T) {
		long := filepath.Join(dir, strings.Repeat("a/", 100))
		must(os.MkdirAll(long, 0o700))
		must(os.Rename(in("open/app.sock"), filepath.Join(long, "app.sock")))
		stream, err := c.DialSocket(t.Context(), filepath.Join(long, "app.sock"))
		if err != nil {
			t.Fatal(err)
		}
		stream.Close()
	})
}

// TestSocketWhoseQueueIsFull: a connect that doesn't block fails at once, where
// one that may block would wait.
func TestSocketWhoseQueueIsFull(t *testing.T) {
	path := filepath.Join(realDir(t), "app.sock")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := errors.Join(unix.Bind(fd, &unix.SockaddrUnix{Name: path}), unix.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	d, req := running(t)
	c := open(t, d, req.Target)
	first, err := c.DialSocket(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()

	gone := errors.New("the client has gone")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, gone)
	defer cancel()
	if _, err := c.DialSocket(ctx, path); !errors.Is(err, gone) {
		t.Errorf("a client that goes while it waits: %v", err)
	}

	ended := make(chan error, 1)
	go func() {
		stream, err := c.DialSocket(t.Context(), path)
		if err == nil {
			stream.Close()
		}
		ended <- err
	}()
	taken, _, err := unix.Accept(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(taken)
	if err := <-ended; err != nil {
		t.Errorf("a connection that had to wait: %v", err)
	}
}

func TestListenErrors(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	taken := portOf(other.Addr())
	// Nothing listens there: it must not be taken all the same.
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	own := portOf(free.Addr())
	free.Close()
	d, req := running(t, v1.InstancePort{Name: "http", Port: 80, HostPort: own})
	fixed := req.Target.DeepCopy()
	fixed.Spec.Ports = append(fixed.Spec.Ports, v1.TargetPort{Name: "next", Port: 1, HostPort: own + 1, Protocol: v1.ProtocolTCP})
	one := func(port int32) []v1.PortRange { return []v1.PortRange{{Port: port, EndPort: port}} }

	for name, tt := range map[string]struct {
		ports []v1.PortRange
		want  string
	}{
		"another program's port":   {one(taken), "is in use on the agent's host (127.0.0.1:"},
		"the instance's own port":  {one(own), "of the agent's host is an instance's own"},
		"one that it will have":    {one(own + 1), "of the agent's host is that of the target's port next"},
		"of several, none is free": {append(one(taken), one(own)...), "none of the 2 ports that may be listened to is free: "},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := open(t, d, fixed).ListenPort(t.Context(), tt.ports)
			if driver.KindOf(err) != driver.Unavailable || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want %q", err, tt.want)
			}
		})
	}
	for name, ports := range map[string][]v1.PortRange{
		"no ports": nil, "port 0": one(0), "ports that end before they begin": {{Port: 2, EndPort: 1}}, "ports that there aren't": {{Port: 1, EndPort: 65536}},
	} {
		if _, err := open(t, d, fixed).ListenPort(t.Context(), ports); driver.KindOf(err) != driver.Internal || err == nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestListenersEndWithTheirInstance, which is when it is removed, and not when
// it is started again.
func TestListenersEndWithTheirInstance(t *testing.T) {
	any := []v1.PortRange{{Port: 1024, EndPort: 65535}}
	d, req := running(t)
	id := driver.InstanceID{Target: req.Target.UID, Name: "web-0"}
	c := open(t, d, req.Target)
	l, err := c.ListenPort(t.Context(), any)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := d.Stop(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, d, id)
	for what, err := range map[string]error{
		"listening":            second(c.ListenPort(t.Context(), any)),
		"dialling a socket":    second(c.DialSocket(t.Context(), "/run/app.sock")),
		"dialling a port":      second(c.DialPort(t.Context(), "tcp", 80)),
		"dialling one of UDP":  second(c.DialPort(t.Context(), "udp", 80)),
		"dialling a bad path":  second(c.DialSocket(t.Context(), "app.sock")),
		"listening on no port": second(c.ListenPort(t.Context(), nil)),
	} {
		if driver.KindOf(err) != driver.NotRunning {
			t.Errorf("%s while the instance doesn't run: %v", what, err)
		}
	}
	both := func() {
		t.Helper()
		for _, host := range []string{"127.0.0.1", "::1"} {
			client, err := net.Dial("tcp", (&net.TCPAddr{IP: net.ParseIP(host), Port: int(l.Port())}).String())
			if err != nil {
				if host == "::1" && (errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAFNOSUPPORT)) {
					continue // this machine has no IPv6
				}
				t.Fatal(err)
			}
			stream, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(client, host)
			client.Close()
			got, err := io.ReadAll(stream)
			stream.Close()
			if err != nil || string(got) != host {
				t.Errorf("read %q, %v, want %q", got, err, host)
			}
		}
	}
	both()
	start(t, d, req.Target)
	both()

	if err := d.Stop(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, d, id)
	if err := d.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Accept(); driver.KindOf(err) != driver.NotRunning {
		t.Errorf("accepting for an instance that is gone: %v", err)
	}
}

// TestWhoeverWaitsAtAListenersEndIsReset, and doesn't read an end in order.
func TestWhoeverWaitsAtAListenersEndIsReset(t *testing.T) {
	d, req := running(t)
	l, err := open(t, d, req.Target).ListenPort(t.Context(), []v1.PortRange{{Port: 1024, EndPort: 65535}})
	if err != nil {
		t.Fatal(err)
	}
	var clients []net.Conn
	for range 3 { // the first may be with the listener, the others in the kernel's queue
		client, err := net.Dial("tcp", (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(l.Port())}).String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		clients = append(clients, client)
	}
	first, err := l.Accept() // the second is with it by now, or soon
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	for _, client := range clients[1:] {
		client.SetDeadline(time.Now().Add(30 * time.Second))
		if n, err := client.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("read %d bytes, %v, want a reset", n, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestCloseEndsListeners, and whoever connects without being accepted.
func TestCloseEndsListeners(t *testing.T) {
	d, req := running(t)
	c := open(t, d, req.Target)
	var accepting sync.WaitGroup
	for range 3 {
		l, err := c.ListenPort(t.Context(), []v1.PortRange{{Port: 1024, EndPort: 65535}})
		if err != nil {
			t.Fatal(err)
		}
		client, err := net.Dial("tcp", (&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(l.Port())}).String())
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		client.SetDeadline(time.Now().Add(30 * time.Second))
		accepting.Go(func() {
			for {
				stream, err := l.Accept()
				if err != nil {
					if !errors.Is(err, errClosed) {
						t.Errorf("accepting after Close: %v", err)
					}
					return
				}
				stream.Close()
			}
		})
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	accepting.Wait()
	if _, err := c.ListenPort(t.Context(), []v1.PortRange{{Port: 1024, EndPort: 65535}}); err == nil {
		t.Error("a driver that is closed listens")
	}
}
