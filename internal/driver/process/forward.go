package process

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// endpoint is a port as clients name it.
type endpoint struct {
	network string
	port    int32
}

func endpointOf(port v1.TargetPort) endpoint {
	if port.Protocol == v1.ProtocolUDP {
		return endpoint{"udp", port.Port}
	}
	return endpoint{"tcp", port.Port}
}

// ownPorts says by which ports of the host a run is reached, as its own spec
// said when it was started: a host's port that was given for UDP is another's by
// TCP.
func ownPorts(what driver.Instance) map[endpoint]int32 {
	own := make(map[endpoint]int32)
	for _, p := range what.Ports {
		if p.HostPort == 0 {
			continue
		}
		end := endpoint{"tcp", p.Port}
		for _, listed := range what.Target.Spec.Ports {
			if listed.Name == p.Name {
				end.network = endpointOf(listed).network
			}
		}
		own[end] = p.HostPort
	}
	return own
}

// DialPort implements driver.PortDialer.
func (c *conn) DialPort(ctx context.Context, network string, port uint16) (driver.Stream, error) {
	if network != "tcp" && network != "udp" {
		return nil, driver.Errorf(driver.Unsupported, "instances of a process can't be reached by the network %q: tcp and udp are known", network)
	}
	r, err := c.run()
	if err != nil {
		return nil, err
	}
	end := endpoint{network, int32(port)}
	listed, other := false, ""
	for _, p := range c.req.Target.Spec.Ports {
		if listedAs := endpointOf(p); listedAs == end {
			listed = true
		} else if listedAs.port == end.port {
			other = listedAs.network
		}
	}
	if !listed && other != "" {
		return nil, driver.Errorf(driver.Invalid, "port %d of instance %s is %s, and was asked for by %s", port, c.id.Name, strings.ToUpper(other), strings.ToUpper(network))
	}
	hostPort, own := r.own[end]
	if listed && !own {
		// A port that is listed stands for one of the instance's own. Without
		// that, whoever may list a port would get the host's.
		return nil, driver.Errorf(driver.Unavailable, "instance %s was started before port %d was listed: it has the port once it is replaced", c.id.Name, port)
	}
	if !own {
		hostPort = end.port
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(int(hostPort)))
	connection, err := c.req.Dial(ctx, network, address)
	if err != nil {
		if _, ok := errors.AsType[*driver.Error](err); ok {
			return nil, err
		}
		if errors.Is(err, syscall.ECONNREFUSED) {
			return nil, driver.Errorf(driver.Unavailable, "nothing listens on port %d of instance %s (%s): %w", port, c.id.Name, address, syscall.ECONNREFUSED)
		}
		return nil, driver.Errorf(driver.Unavailable, "port %d of instance %s (%s): %w", port, c.id.Name, address, err)
	}
	if network == "udp" {
		return datagrams{connection}, nil
	}
	stream, ok := connection.(driver.Stream)
	if !ok {
		connection.Close()
		return nil, driver.Errorf(driver.Internal, "port %d of instance %s: a %T can't be closed one way", port, c.id.Name, connection)
	}
	return stream, nil
}

// datagrams is a connected UDP socket, which has no directions that end.
type datagrams struct{ net.Conn }

func (datagrams) CloseWrite() error { return nil }

// DialSocket implements driver.SocketDialer.
func (c *conn) DialSocket(ctx context.Context, path string) (driver.Stream, error) {
	if _, err := c.run(); err != nil {
		return nil, err
	}
	socket, err := openSocket(path)
	if err != nil {
		return nil, err
	}
	defer socket.Close()
	// By its name it could have become another one meanwhile.
	name := "/proc/self/fd/" + strconv.Itoa(int(socket.Fd()))
	ctx, cancel := context.WithTimeoutCause(ctx, socketTimeout,
		driver.Errorf(driver.Unavailable, "whoever listens on the unix socket %s takes no connections: too many wait there already", path))
	defer cancel()
	var stream net.Conn
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		stream, err = (&net.Dialer{}).DialContext(ctx, "unix", name)
		if !errors.Is(err, unix.EAGAIN) {
			break
		}
		// The listener's queue is full. A connect that may block would wait.
		pause := time.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-pause.C:
		}
		pause.Stop()
	}
	switch {
	case err == nil:
		return stream.(*net.UnixConn), nil
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case errors.Is(err, unix.ECONNREFUSED):
		return nil, driver.Errorf(driver.Unavailable, "nobody listens on the unix socket %s: %w", path, unix.ECONNREFUSED)
	case errors.Is(err, unix.EPROTOTYPE):
		return nil, driver.Errorf(driver.Invalid, "%s is a unix socket of another type: only stream sockets can be forwarded", path)
	}
	// The error names the descriptor, which nobody knows.
	if errno, ok := errors.AsType[syscall.Errno](err); ok {
		err = errno
	}
	return nil, driver.Errorf(driver.Unavailable, "connecting to the unix socket %s as the agent's user: %w", path, err)
}

// socketTimeout is how long a connection waits for its place in the queue of a
// unix socket.
const socketTimeout = 10 * time.Second

// openSocket opens the socket at a path without connecting to it. It goes down
// from the root one directory after the other, each found in the one before, so
// that no link that is put there at any time leads elsewhere. That is what
// openat2 does by RESOLVE_NO_SYMLINKS; this knows where the link is, too, and
// needs no new kernel.
func openSocket(path string) (*os.File, error) {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path || path == "/" || strings.ContainsRune(path, 0) {
		return nil, driver.Errorf(driver.Invalid, "%q is no absolute, clean path of a unix socket", path)
	}
	at, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, driver.Errorf(driver.Unavailable, "opening the root directory: %w", err)
	}
	defer func() { at.Close() }()
	elements := strings.Split(path[1:], "/")
	for i, element := range elements {
		name := "/" + strings.Join(elements[:i+1], "/")
		fd, err := openat(int(at.Fd()), element)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil, driver.Errorf(driver.NotFound, "there is no unix socket %s: %s doesn't exist", path, name)
		case errors.Is(err, unix.ENOTDIR):
			return nil, driver.Errorf(driver.NotFound, "there is no unix socket %s: %s is no directory", path, filepath.Dir(name))
		case err != nil:
			return nil, driver.Errorf(driver.Unavailable, "the unix socket %s can't be reached as the agent's user: opening %s: %w", path, name, err)
		}
		found := os.NewFile(uintptr(fd), name)
		at.Close()
		at = found
		var stat unix.Stat_t
		if err := unix.Fstat(fd, &stat); err != nil {
			return nil, driver.Errorf(driver.Unavailable, "looking at %s: %w", name, err)
		}
		switch kind := stat.Mode & unix.S_IFMT; {
		case kind == unix.S_IFLNK:
			return nil, viaLink(path, name)
		case i == len(elements)-1 && kind != unix.S_IFSOCK:
			return nil, driver.Errorf(driver.Invalid, "%s is no unix socket", path)
		case i == len(elements)-1 && stat.Nlink > 1:
			// Where fs.protected_hardlinks is 0, whoever may write to a directory
			// can give it a name of anybody's socket.
			return nil, driver.Errorf(driver.Invalid, "the unix socket %s has %d names, hard links, and isn't connected to, because it may be one that the class doesn't allow: remove the others", path, stat.Nlink)
		}
	}
	socket := at
	at = nil // it is the caller's: closing nil does nothing
	return socket, nil
}

func openat(dir int, name string) (fd int, err error) {
	for {
		if fd, err = unix.Openat(dir, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0); err != unix.EINTR {
			return fd, err
		}
	}
}

// viaLink is the error for a path that leads over a link.
func viaLink(path, link string) error {
	const why = "the unix socket %s is reached over the symbolic link %s, which isn't followed, because it may lead to what the class doesn't allow"
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return driver.Errorf(driver.Invalid, why+"; it leads to nothing", path, link)
	}
	return driver.Errorf(driver.Invalid, why+": name %s instead", path, link, real)
}

// ListenPort implements driver.PortListener.
func (c *conn) ListenPort(ctx context.Context, ports []v1.PortRange) (driver.Listener, error) {
	if _, err := c.run(); err != nil {
		return nil, err
	}
	count := 0
	for _, r := range ports {
		if r.Port < 1 || r.EndPort < r.Port || r.EndPort > 1<<16-1 {
			return nil, driver.Errorf(driver.Internal, "%d to %d is no range of ports", r.Port, r.EndPort)
		}
		count += int(r.EndPort-r.Port) + 1
	}
	if count == 0 {
		return nil, driver.Errorf(driver.Internal, "no ports to listen on were given")
	}
	// Of many, one that the kernel gives to whoever needs any is the least
	// likely to be meant for somebody else.
	for range min(count-1, 4) {
		if port := ephemeral(); slices.ContainsFunc(ports, func(r v1.PortRange) bool { return r.Port <= port && port <= r.EndPort }) {
			if l, err := c.driver.listen(c.id, c.req.Target, port); err == nil {
				return l, nil
			}
		}
	}
	start := rand.IntN(count)
	var last error
	for i := range count {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		l, err := c.driver.listen(c.id, c.req.Target, nth(ports, (start+i)%count))
		if err == nil {
			return l, nil
		}
		if errors.Is(err, errClosed) {
			return nil, err
		}
		last = err
	}
	if count > 1 {
		return nil, driver.Errorf(driver.Unavailable, "none of the %d ports that may be listened to is free: %w", count, last)
	}
	return nil, last
}

// ephemeral is a port that was free just now, 0 if there is none.
func ephemeral() int32 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0
	}
	defer l.Close()
	return int32(l.Addr().(*net.TCPAddr).Port)
}

// nth is a port of several ranges.
func nth(ports []v1.PortRange, n int) int32 {
	for _, r := range ports {
		if size := int(r.EndPort-r.Port) + 1; n < size {
			return r.Port + int32(n)
		} else {
			n -= size
		}
	}
	panic("process: more ports than there are")
}

// listen listens on one port.
func (d *Driver) listen(id driver.InstanceID, target *v1.Target, port int32) (*listener, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	// An instance that doesn't listen yet, or just now, must find its port free.
	for _, i := range d.instances {
		for end, hostPort := range i.own {
			if end.network == "tcp" && hostPort == port {
				return nil, driver.Errorf(driver.Unavailable, "port %d of the agent's host is an instance's own, and can't be listened to beside it", port)
			}
		}
	}
	for _, p := range target.Spec.Ports {
		if endpointOf(p).network == "tcp" && p.HostPort == port {
			return nil, driver.Errorf(driver.Unavailable, "port %d of the agent's host is that of the target's port %s, and can't be listened to beside it", port, p.Name)
		}
	}
	l := &listener{instance: id, port: uint16(port), accepted: make(chan driver.Stream), ended: make(chan struct{})}
	for _, host := range []string{"127.0.0.1", "::1"} {
		// Listening on an address of one's own doesn't block.
		tcp, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		switch {
		case errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EADDRNOTAVAIL):
			continue // a host may lack one of the families
		case err != nil:
			for _, tcp := range l.tcp {
				tcp.Close()
			}
			return nil, listenError(host, port, err)
		}
		l.tcp = append(l.tcp, tcp)
	}
	if len(l.tcp) == 0 {
		return nil, driver.Errorf(driver.Unavailable, "port %d can't be listened to: the agent's host has no loopback address", port)
	}
	for _, tcp := range l.tcp {
		l.loops.Go(func() { l.accept(tcp) })
	}
	d.listeners[l] = struct{}{}
	d.busy.Add(1)
	go func() {
		defer d.busy.Done()
		l.loops.Wait()
		d.mu.Lock()
		defer d.mu.Unlock()
		delete(d.listeners, l)
	}()
	return l, nil
}

func listenError(host string, port int32, err error) error {
	address := net.JoinHostPort(host, strconv.Itoa(int(port)))
	errno, ok := errors.AsType[syscall.Errno](err)
	switch {
	case errno == unix.EADDRINUSE:
		return driver.Errorf(driver.Unavailable, "port %d is in use on the agent's host (%s): another program listens there: %w", port, address, errno)
	case errno == unix.EACCES:
		return driver.Errorf(driver.Unavailable, "the agent's user may not listen on port %d (%s), as only root may on the lowest ports: %w", port, address, errno)
	case ok:
		err = errno
	}
	return driver.Errorf(driver.Unavailable, "listening on %s of the agent's host: %w", address, err)
}

// listener implements driver.Listener. A goroutine for each address of the host
// accepts connections, one at a time; the others wait in the kernel's queues.
type listener struct {
	instance driver.InstanceID
	port     uint16
	tcp      []net.Listener
	loops    sync.WaitGroup
	accepted chan driver.Stream

	once  sync.Once
	ended chan struct{} // closed after err is set
	err   error
}

// Accept implements driver.Listener.
func (l *listener) Accept() (driver.Stream, error) {
	select {
	case stream := <-l.accepted:
		return stream, nil
	case <-l.ended:
		return nil, l.err
	}
}

// Port implements driver.Listener.
func (l *listener) Port() uint16 { return l.port }

// Close implements driver.Listener. When it returns, nothing of the listener is
// left.
func (l *listener) Close() error {
	l.end(net.ErrClosed)
	l.loops.Wait()
	return nil
}

// end closes the listener, without waiting for what it leaves.
func (l *listener) end(why error) {
	l.once.Do(func() {
		l.err = why
		close(l.ended)
		for _, tcp := range l.tcp {
			tcp.Close()
		}
	})
}

func (l *listener) accept(tcp net.Listener) {
	for wait := time.Duration(0); ; {
		connection, err := tcp.Accept()
		if err == nil {
			wait = 0
			tcp := connection.(*net.TCPConn)
			select {
			case l.accepted <- tcp:
			case <-l.ended:
				// A reset, as the kernel has for those in its queue.
				tcp.SetLinger(0)
				tcp.Close()
			}
			continue
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		// There are too many open files, or no memory: both pass.
		wait = min(max(2*wait, 5*time.Millisecond), time.Second)
		pause := time.NewTimer(wait)
		select {
		case <-pause.C:
		case <-l.ended:
			pause.Stop()
		}
	}
}
