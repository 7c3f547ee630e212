package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"aaserver.io/aaserver/streaming"
)

const (
	// bufferSize is that of the buffers that connections are copied through. A
	// datagram fits in.
	bufferSize = 64 << 10
	// flowIdle ends a flow of datagrams once none has gone either way for so
	// long.
	flowIdle = time.Minute
	// flowPenalty is how long the datagrams of a flow that was refused are
	// dropped, so that not each of them is another attempt.
	flowPenalty = time.Second
	// maxFlows bounds the flows of one local port. One more ends the one that
	// was idle for longest.
	maxFlows = 128
	// maxFlowQueue and maxFlowBytes bound what waits to be sent on in one
	// flow. What comes beyond that is dropped, as datagrams are.
	maxFlowQueue = 128
	maxFlowBytes = 256 << 10
)

// stream is a connection that can be reset. The Read of one that carries
// datagrams returns one each, and its Write sends one.
type stream interface {
	streaming.PortStream
	Reset() error
}

// acceptor is where the connections to forward come from: a port or socket of
// this machine, or of the target's side.
type acceptor interface {
	// Accept fails with net.ErrClosed once the acceptor is closed.
	Accept() (stream, error)
	Close() error
}

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// join copies both ways until both have ended, and closes both. The end of one
// direction is passed on as such, what fails on one side as a reset of the
// other; ctx ends both by a reset. lost is closed when the session below them
// has ended. It returns what failed; that one side takes no more isn't a
// failure, as the other direction may go on.
func join(ctx context.Context, lost <-chan struct{}, a, b stream) error {
	abort := sync.OnceFunc(func() {
		_ = a.Reset()
		_ = b.Reset()
	})
	finished := make(chan struct{})
	var watching sync.WaitGroup
	// A side may fail after its direction has ended, when nobody reads from it
	// any more.
	watch := func(side stream) {
		var gone <-chan struct{}
		if resettable, ok := side.(interface{ gone() <-chan struct{} }); ok {
			gone = resettable.gone()
		}
		watching.Go(func() {
			select {
			case <-gone:
				abort()
			case <-lost:
				abort()
			case <-finished:
			}
		})
	}
	stop := context.AfterFunc(ctx, abort)
	var copying sync.WaitGroup
	var failures [2]error
	var cut atomic.Bool
	pass := func(to, from stream, failure *error) {
		taken, err := transfer(to, from)
		switch {
		case err != nil:
			*failure = err
			abort()
		case !taken || to.CloseWrite() != nil:
			cut.Store(true)
		default:
			watch(from)
		}
	}
	copying.Go(func() { pass(a, b, &failures[0]) })
	copying.Go(func() { pass(b, a, &failures[1]) })
	copying.Wait()
	close(finished)
	watching.Wait()
	if !stop() || cut.Load() {
		abort()
	}
	_ = a.Close()
	_ = b.Close()
	return errors.Join(failures[:]...)
}

// transfer copies to the end of from, and says whether to took all of it. Only
// what fails on from's side is an error.
func transfer(to io.Writer, from io.Reader) (taken bool, err error) {
	var wrote, read error
	// The streams of the mux protocol do without a copy in between.
	if source, ok := from.(io.WriterTo); ok {
		w := &markedWriter{w: to}
		_, read = source.WriteTo(w)
		if w.err != nil {
			wrote, read = w.err, nil
		}
	} else if sink, ok := to.(io.ReaderFrom); ok {
		r := &markedReader{r: from}
		_, wrote = sink.ReadFrom(r)
		if r.err != nil {
			read = r.err
		}
	} else {
		buffer := buffers.Get().(*[bufferSize]byte)
		defer buffers.Put(buffer)
		for read == nil && wrote == nil {
			var n int
			n, read = from.Read(buffer[:])
			// A datagram may be empty.
			if n > 0 || read == nil {
				_, wrote = to.Write(buffer[:n])
			}
		}
	}
	if read != nil && !errors.Is(read, io.EOF) {
		return false, read
	}
	return wrote == nil, nil
}

// markedWriter and markedReader remember which of them failed.
type markedWriter struct {
	w   io.Writer
	err error
}

func (m *markedWriter) Write(p []byte) (int, error) {
	n, err := m.w.Write(p)
	m.err = err
	return n, err
}

type markedReader struct {
	r   io.Reader
	err error
}

func (m *markedReader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	m.err = err
	return n, err
}

// localStream is a connection of this machine.
type localStream struct {
	streaming.PortStream
}

// Reset closes the connection so that the other side sees that it was cut
// short. A unix socket has no way to say so.
func (s localStream) Reset() error {
	if conn, ok := s.PortStream.(*net.TCPConn); ok {
		_ = conn.SetLinger(0)
	}
	return s.Close()
}

// streamListener accepts the connections of a local port or socket.
type streamListener struct {
	net.Listener
}

func (l streamListener) Accept() (stream, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return localStream{conn.(streaming.PortStream)}, nil
}

// remoteListener accepts the connections of a port that is listened on on the
// target's side.
type remoteListener struct {
	streaming.PortListener
	// admit is told of each.
	admit func()
	// ended is why there are no more.
	ended error
}

func (l *remoteListener) Accept() (stream, error) {
	conn, err := l.PortListener.Accept()
	if err != nil {
		// It is over, whatever the reason.
		l.ended = err
		return nil, fmt.Errorf("%w: %w", net.ErrClosed, err)
	}
	l.admit()
	return conn.(stream), nil
}

// localEnd is the end of a forward on this machine.
type localEnd struct {
	// network is "tcp", "udp" or "unix".
	network string
	// host is where to connect to. Where to listen is told by addresses.
	host string
	// port is 0 for any free one.
	port uint16
	// path is that of "unix".
	path string
}

func (e localEnd) String() string {
	switch {
	case e.network == "unix":
		return e.path
	case e.host != "":
		return net.JoinHostPort(e.host, strconv.Itoa(int(e.port)))
	}
	return withProtocol(e.network, strconv.Itoa(int(e.port)))
}

// withProtocol is String with what isn't TCP told where there is an address.
func (e localEnd) withProtocol() string {
	if e.network == "udp" && e.host != "" {
		return withProtocol("udp", e.String())
	}
	return e.String()
}

// kind says what it is as well.
func (e localEnd) kind() string {
	if e.network == "unix" {
		return "socket " + e.path
	}
	return "port " + e.String()
}

// withProtocol writes what isn't TCP as users do.
func withProtocol(network, port string) string {
	if network == "udp" {
		return port + "/udp"
	}
	return port
}

// dial connects to where a reverse forward leads.
func (e localEnd) dial(ctx context.Context) (stream, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, e.network, e.String())
	if err != nil {
		return nil, err
	}
	return localStream{conn.(streaming.PortStream)}, nil
}

// localListener is one that is open.
type localListener struct {
	acceptor
	// at is where it listens.
	at localEnd
}

// otherHalf is an address of localhost that couldn't be listened on, beside one
// that could: whoever connects to localhost may reach another program there.
type otherHalf struct {
	at  localEnd
	err error
}

// anyPortAttempts bounds the search for a port that is free on both addresses of
// localhost.
const anyPortAttempts = 10

// listen opens the listeners of one end, with any free port the same one on
// all addresses.
func (e localEnd) listen(addresses []listenAddress) (opened []localListener, taken []otherHalf, err error) {
	if e.network == "unix" {
		listener, err := listenUnix(e.path)
		if err != nil {
			return nil, nil, err
		}
		return []localListener{{streamListener{listener}, e}}, nil, nil
	}
	return e.listenPort(addresses, localEnd.listenAt)
}

func (e localEnd) listenPort(addresses []listenAddress, listenAt func(localEnd, listenAddress) (localListener, error)) ([]localListener, []otherHalf, error) {
	for attempt := 1; ; attempt++ {
		opened, taken, err := e.listenOnce(addresses, listenAt)
		if e.port != 0 || attempt == anyPortAttempts || err == nil && len(taken) == 0 {
			return opened, taken, err
		}
		// What is free on one address needn't be on the other: another one may.
		for _, listener := range opened {
			_ = listener.Close()
		}
	}
}

func (e localEnd) listenOnce(addresses []listenAddress, listenAt func(localEnd, listenAddress) (localListener, error)) (opened []localListener, taken []otherHalf, err error) {
	var failures []error
	alternatives, found, fatal := 0, 0, false
	for _, address := range addresses {
		if address.alternative {
			alternatives++
		}
		one, err := listenAt(e, address)
		if err != nil {
			failures = append(failures, fmt.Errorf("unable to create listener: Error %w", err))
			fatal = fatal || !address.alternative
			// A host that lacks the address has nobody listening on it, either.
			if address.alternative && address.exists(e.network, listenAt) {
				taken = append(taken, otherHalf{localEnd{network: e.network, host: address.host, port: e.port}, err})
			}
			continue
		}
		if address.alternative {
			found++
		}
		opened = append(opened, one)
		e.port = one.at.port
	}
	if fatal || alternatives > 0 && found == 0 {
		for _, listener := range opened {
			_ = listener.Close()
		}
		return nil, nil, fmt.Errorf("listeners failed to create with the following errors: %v", failures)
	}
	return opened, taken, nil
}

// exists says whether this machine has the address: then it can be listened on,
// on whatever port.
func (a listenAddress) exists(network string, listenAt func(localEnd, listenAddress) (localListener, error)) bool {
	any, err := listenAt(localEnd{network: network}, a)
	if err != nil {
		return false
	}
	_ = any.Close()
	return true
}

func (e localEnd) listenAt(address listenAddress) (localListener, error) {
	family, where := address.family, net.JoinHostPort(address.host, strconv.Itoa(int(e.port)))
	at := localEnd{network: e.network, host: address.host}
	if e.network == "udp" {
		conn, err := net.ListenPacket("udp"+family, where)
		if err != nil {
			return localListener{}, err
		}
		at.port = uint16(conn.LocalAddr().(*net.UDPAddr).Port)
		return localListener{newFlowListener(conn.(*net.UDPConn), flowIdle), at}, nil
	}
	listener, err := net.Listen("tcp"+family, where)
	if err != nil {
		return localListener{}, err
	}
	at.port = uint16(listener.Addr().(*net.TCPAddr).Port)
	return localListener{streamListener{listener}, at}, nil
}

// listenUnix makes a socket for its user alone. One that nobody listens on any
// more is replaced. The socket is removed when the listener is closed, unless
// another one has taken its place.
func listenUnix(path string) (net.Listener, error) {
	config := net.ListenConfig{Control: restrictSocket}
	listener, err := config.Listen(context.Background(), "unix", path)
	if errors.Is(err, syscall.EADDRINUSE) {
		if err := removeStale(path); err != nil {
			return nil, err
		}
		listener, err = config.Listen(context.Background(), "unix", path)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	made, err := os.Lstat(path)
	if err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return &socketListener{UnixListener: listener.(*net.UnixListener), path: path, made: made}, nil
}

// socketListener removes no other's socket.
type socketListener struct {
	*net.UnixListener
	path string
	made fs.FileInfo
}

func (l *socketListener) Close() error {
	now, err := os.Lstat(l.path)
	l.SetUnlinkOnClose(err == nil && os.SameFile(l.made, now))
	return l.UnixListener.Close()
}

// removeStale removes a socket that nobody listens on.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%s exists and is no socket: remove it, or choose another path", path)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		_ = conn.Close()
		return fmt.Errorf("somebody listens on the socket %s: end that, or choose another path", path)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("the socket %s exists, and whether somebody listens on it can't be found out: %w", path, err)
	}
	return os.Remove(path)
}

// flowListener takes the datagrams of one local client address for a
// connection, a flow.
type flowListener struct {
	conn *net.UDPConn
	idle time.Duration

	// mu protects flows. It isn't held while anything is sent.
	mu    sync.Mutex
	flows map[netip.AddrPort]*flow
}

func newFlowListener(conn *net.UDPConn, idle time.Duration) *flowListener {
	return &flowListener{conn: conn, idle: idle, flows: map[netip.AddrPort]*flow{}}
}

func (l *flowListener) Close() error { return l.conn.Close() }

// Accept sorts datagrams into their flows until there is a new one.
func (l *flowListener) Accept() (stream, error) {
	buffer := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buffer)
	for {
		n, from, err := l.conn.ReadFromUDPAddrPort(buffer[:])
		if err != nil {
			return nil, err
		}
		f, isNew := l.flow(from)
		f.put(buffer[:n])
		if isNew {
			return f, nil
		}
	}
}

// flow finds the flow of an address or begins one.
func (l *flowListener) flow(from netip.AddrPort) (f *flow, isNew bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if f := l.flows[from]; f != nil && (f.refused.Load() || !closed(f.ended)) {
		return f, false
	}
	if len(l.flows) >= maxFlows {
		var oldest *flow
		for _, f := range l.flows {
			if oldest == nil || f.active.Load() < oldest.active.Load() {
				oldest = f
			}
		}
		delete(l.flows, oldest.client)
		oldest.end()
	}
	f = &flow{listener: l, client: from, queue: make(chan []byte, maxFlowQueue), ended: make(chan struct{})}
	f.idle = time.AfterFunc(l.idle, f.expire)
	f.touch()
	l.flows[from] = f
	return f, true
}

// flow is the datagrams of one local client, as a stream of datagrams. It has
// no directions that end by themselves.
type flow struct {
	listener *flowListener
	client   netip.AddrPort
	queue    chan []byte
	queued   atomic.Int64 // bytes
	active   atomic.Int64 // when the last datagram went, in nanoseconds
	idle     *time.Timer
	once     sync.Once
	ended    chan struct{}
	// refused says that its client's datagrams are dropped for now.
	refused atomic.Bool
}

var _ stream = (*flow)(nil)

// errFlowEnded is how a flow ends that went idle, or had to make place.
var errFlowEnded = errors.New("the flow has ended")

func (f *flow) put(datagram []byte) {
	if closed(f.ended) {
		return
	}
	if f.queued.Add(int64(len(datagram))) > maxFlowBytes {
		f.queued.Add(-int64(len(datagram)))
		return
	}
	select {
	case f.queue <- append([]byte(nil), datagram...):
		f.touch()
	default:
		f.queued.Add(-int64(len(datagram)))
	}
}

func (f *flow) touch() { f.active.Store(time.Now().UnixNano()) }

// expire ends the flow, or looks again when it might be idle.
func (f *flow) expire() {
	if rest := f.listener.idle - time.Since(time.Unix(0, f.active.Load())); rest > 0 {
		f.idle.Reset(rest)
		return
	}
	f.end()
}

func (f *flow) end() {
	f.once.Do(func() {
		f.idle.Stop()
		close(f.ended)
	})
}

func (f *flow) Read(p []byte) (int, error) {
	select {
	case <-f.ended:
		return 0, errFlowEnded
	default:
	}
	select {
	case datagram := <-f.queue:
		f.queued.Add(-int64(len(datagram)))
		return copy(p, datagram), nil
	case <-f.ended:
		return 0, errFlowEnded
	}
}

func (f *flow) Write(p []byte) (int, error) {
	if closed(f.ended) {
		return 0, errFlowEnded
	}
	f.touch()
	n, err := f.listener.conn.WriteToUDPAddrPort(p, f.client)
	if errors.Is(err, net.ErrClosed) {
		return n, err
	}
	// One that can't be delivered is lost, as datagrams are.
	return len(p), nil
}

// refuse ends the flow, and drops the datagrams of its client for a while.
func (f *flow) refuse() {
	f.refused.Store(true)
	f.end()
	time.AfterFunc(flowPenalty, f.remove)
}

func (f *flow) CloseWrite() error { return f.Close() }

func (f *flow) Reset() error { return f.Close() }

// Close ends the flow. The next datagram of its client begins another.
func (f *flow) Close() error {
	f.end()
	if !f.refused.Load() {
		f.remove()
	}
	return nil
}

func (f *flow) remove() {
	f.listener.mu.Lock()
	defer f.listener.mu.Unlock()
	if f.listener.flows[f.client] == f {
		delete(f.listener.flows, f.client)
	}
}
