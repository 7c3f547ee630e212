package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"
	netutils "k8s.io/utils/net"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

const (
	// maxReason bounds what is printed of the reason for a refused connection.
	maxReason = 4 << 10
	// reasonTimeout bounds the wait for the reason, once a connection has
	// ended.
	reasonTimeout = 5 * time.Second
	// acceptPause is waited after a connection couldn't be accepted, for want
	// of file descriptors for example.
	acceptPause = 100 * time.Millisecond
)

type portForwardOptions struct {
	ref
	ports     []portArg
	addresses []listenAddress
}

func newPortForwardCommand(c *client) *cobra.Command {
	o := &portForwardOptions{}
	instance := ""
	addresses := []string{"localhost"}
	cmd := &cobra.Command{
		Use:                   "port-forward TARGET[/INSTANCE] [--instance INSTANCE] [options] [LOCAL_PORT:]REMOTE_PORT [...[LOCAL_PORT_N:]REMOTE_PORT_N]",
		DisableFlagsInUseLine: true,
		Short:                 "Forward one or more local ports to a target",
		Long: templates.LongDesc(`
			Forward one or more local ports to a target.

			A remote port is a number or the name of one of the target's ports. A connection
			that the target refuses is reported and doesn't end the forwarding.`),
		Example: templates.Examples(`
			# Listen on ports 5000 and 6000 locally, forwarding data to/from ports 5000 and 6000 in target web
			kubectl target port-forward web 5000 6000

			# Listen on port 8443 locally, forwarding to the target's port named "https"
			kubectl target port-forward web 8443:https

			# Listen on port 8080 locally, forwarding to 8080 in instance web-1 of target web
			kubectl target port-forward web/web-1 8080

			# Listen on port 8888 on all addresses, forwarding to 5000 in the target
			kubectl target port-forward --address 0.0.0.0 web 8888:5000

			# Listen on a random port locally, forwarding to 5000 in the target
			kubectl target port-forward web :5000`),
		ValidArgsFunction: c.completeTargetThenPorts,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) < 2 {
				return cmdutil.UsageErrorf(cmd, "TARGET and list of PORTS are required for port-forward")
			}
			var err error
			if o.ref, err = parseRef(args[0], instance); err != nil {
				return cmdutil.UsageErrorf(cmd, "%v", err)
			}
			if o.ports, err = parsePorts(args[1:]); err != nil {
				return err
			}
			if o.addresses, err = parseAddresses(addresses); err != nil {
				return err
			}
			return o.run(cmd.Context(), c)
		},
	}
	cmd.Flags().StringSliceVar(&addresses, "address", addresses, "Addresses to listen on (comma separated). Only accepts IP addresses or localhost as a value. When localhost is supplied, kubectl will try to bind on both 127.0.0.1 and ::1 and will fail if neither of these addresses are available to bind.")
	register(cmd, "address", cobra.NoFileCompletions)
	addInstanceFlag(cmd, c, &instance)
	return cmd
}

// portArg is one [LOCAL:]REMOTE of the command line.
type portArg struct {
	// local is the port to listen on, 0 for a random one.
	local uint16
	// sameLocal says that none was given: it is the remote port's number.
	sameLocal bool
	// remote is the remote port's number, 0 if it was named.
	remote uint16
	// name is the remote port's name.
	name string
}

// portPair is a portArg with its remote port found.
type portPair struct {
	local, remote uint16
}

func (p portPair) String() string { return fmt.Sprintf("{%d %d}", p.local, p.remote) }

func parsePorts(args []string) ([]portArg, error) {
	ports := make([]portArg, 0, len(args))
	for _, arg := range args {
		local, remote, both := strings.Cut(arg, ":")
		if !both {
			local, remote = "", arg
		}
		if strings.Contains(remote, ":") || remote == "" {
			return nil, fmt.Errorf("invalid port format '%s'", arg)
		}
		port := portArg{sameLocal: !both}
		if local != "" {
			number, err := strconv.ParseUint(local, 10, 16)
			if err != nil {
				return nil, fmt.Errorf("invalid local port '%s': expected a number from 0 to 65535, where 0 is a random port", local)
			}
			port.local = uint16(number)
		}
		// The name of a port has a letter in it; anything else is meant to be
		// a number.
		if strings.ContainsAny(strings.ToLower(remote), "abcdefghijklmnopqrstuvwxyz") {
			port.name = remote
		} else {
			number, err := strconv.ParseUint(remote, 10, 16)
			if err != nil || number == 0 {
				return nil, fmt.Errorf("invalid remote port '%s': expected a number from 1 to 65535 or the name of one of the target's ports", remote)
			}
			port.remote = uint16(number)
		}
		ports = append(ports, port)
	}
	return ports, nil
}

// resolvePorts finds named ports in the target's spec. target may be nil if no
// port is named.
func resolvePorts(args []portArg, target *v1.Target) ([]portPair, error) {
	pairs := make([]portPair, 0, len(args))
	for _, arg := range args {
		pair := portPair{local: arg.local, remote: arg.remote}
		if arg.name != "" {
			port, err := namedPort(target, arg.name)
			if err != nil {
				return nil, err
			}
			pair.remote = port
		}
		if arg.sameLocal {
			pair.local = pair.remote
		}
		pairs = append(pairs, pair)
	}
	return pairs, nil
}

func namedPort(target *v1.Target, name string) (uint16, error) {
	var known []string
	for _, port := range target.Spec.Ports {
		if port.Name == name {
			if port.Protocol == v1.ProtocolUDP {
				return 0, fmt.Errorf("port %q of target %q is a UDP port: only TCP can be forwarded", name, target.Name)
			}
			return uint16(port.Port), nil
		}
		known = append(known, fmt.Sprintf("%s (%d)", port.Name, port.Port))
	}
	if len(known) == 0 {
		return 0, fmt.Errorf("target %q has no port named %q: it lists no ports", target.Name, name)
	}
	if len(known) == 1 {
		return 0, fmt.Errorf("target %q has no port named %q: its only port is %s", target.Name, name, known[0])
	}
	return 0, fmt.Errorf("target %q has no port named %q: its ports are %s", target.Name, name, strings.Join(known, ", "))
}

// listenAddress is a local address to listen on.
type listenAddress struct {
	network, host string
	// alternative says that it is one of those that localhost stands for, of
	// which one is enough.
	alternative bool
}

func parseAddresses(args []string) ([]listenAddress, error) {
	var addresses []listenAddress
	seen := map[string]bool{}
	add := func(a listenAddress) {
		if !seen[a.host] {
			seen[a.host] = true
			addresses = append(addresses, a)
		}
	}
	for _, arg := range args {
		ip := netutils.ParseIPSloppy(arg)
		switch {
		case arg == "localhost":
			add(listenAddress{network: "tcp4", host: "127.0.0.1", alternative: true})
			add(listenAddress{network: "tcp6", host: "::1", alternative: true})
		case ip == nil:
			return nil, fmt.Errorf("%s is not a valid IP", arg)
		case ip.To4() != nil:
			add(listenAddress{network: "tcp4", host: arg})
		default:
			add(listenAddress{network: "tcp6", host: arg})
		}
	}
	if len(addresses) == 0 {
		return nil, errors.New("you must specify at least 1 address")
	}
	return addresses, nil
}

// query returns the request's options. The ports narrow the session, so that
// the server can refuse them before anything has begun.
func (o *portForwardOptions) query(pairs []portPair) *v1.TargetPortForwardOptions {
	options := &v1.TargetPortForwardOptions{Instance: o.instance}
	seen := map[uint16]bool{}
	for _, pair := range pairs {
		if !seen[pair.remote] {
			seen[pair.remote] = true
			options.Ports = append(options.Ports, int32(pair.remote))
		}
	}
	return options
}

func (o *portForwardOptions) run(ctx context.Context, c *client) error {
	err := o.forward(ctx, c)
	if ctx.Err() != nil {
		// ^C is how one ends a port-forward.
		return nil
	}
	return err
}

func (o *portForwardOptions) forward(ctx context.Context, c *client) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	var target *v1.Target
	for _, port := range o.ports {
		if port.name != "" && target == nil {
			if target, err = conn.clientset.StreamingV1().Targets(conn.namespace).Get(ctx, o.target, metav1.GetOptions{}); err != nil {
				return err
			}
		}
	}
	pairs, err := resolvePorts(o.ports, target)
	if err != nil {
		return err
	}
	request := conn.subresource("POST", o.target, "portforward").VersionedParams(o.query(pairs), scheme.ParameterCodec)
	if err := request.Error(); err != nil {
		return err
	}
	remote, err := conn.dialPortForward(ctx, o.target, request.URL())
	if err != nil {
		return err
	}
	f := &forwarder{remote: remote, out: &lockedWriter{w: c.Out}, errOut: &lockedWriter{w: c.ErrOut}}
	err = f.run(ctx, pairs, o.addresses)
	if errors.Is(err, errLost) {
		reason := ""
		if cause := remote.transport.cause(); cause != nil {
			reason = " (" + cause.Error() + ")"
		}
		return fmt.Errorf("the connection to the server was lost%s, and port-forwarding to target %q has ended: run the command again to go on", reason, o.target)
	}
	return err
}

// errLost ends a port-forward whose connection to the server has ended.
var errLost = errors.New("lost connection")

// lockedWriter lets many connections report.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// forwarder is the client's side of the port-forward protocol: for each
// connection an error stream and a data stream with the same request ID.
type forwarder struct {
	remote      *portForwardConnection
	out, errOut io.Writer
	requests    atomic.Int64
}

// run forwards until ctx ends or the connection to the server is lost, and
// returns when nothing of it is left.
func (f *forwarder) run(ctx context.Context, pairs []portPair, addresses []listenAddress) error {
	var running sync.WaitGroup
	defer running.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer f.remote.Close()

	var listeners []net.Listener
	defer func() {
		for _, listener := range listeners {
			listener.Close()
		}
	}()
	listening := false
	for _, pair := range pairs {
		opened, port, err := f.listen(pair, addresses)
		listeners = append(listeners, opened...)
		if err != nil {
			fmt.Fprintf(f.errOut, "Unable to listen on port %d: %v\n", pair.local, err)
			continue
		}
		listening = true
		for _, listener := range opened {
			running.Go(func() { f.accept(ctx, listener, portPair{local: port, remote: pair.remote}, &running) })
		}
	}
	if !listening {
		return fmt.Errorf("unable to listen on any of the requested ports: %v", pairs)
	}
	select {
	case <-ctx.Done():
		return nil
	case <-f.remote.CloseChan():
		return errLost
	}
}

// listen opens the listeners of one port. With a random port, all addresses
// get the same one.
func (f *forwarder) listen(pair portPair, addresses []listenAddress) (opened []net.Listener, port uint16, err error) {
	var failures []error
	alternatives, found, fatal := 0, 0, false
	port = pair.local
	for _, address := range addresses {
		if address.alternative {
			alternatives++
		}
		listener, err := net.Listen(address.network, net.JoinHostPort(address.host, strconv.Itoa(int(port))))
		if err != nil {
			failures = append(failures, fmt.Errorf("unable to create listener: Error %w", err))
			fatal = fatal || !address.alternative
			continue
		}
		if address.alternative {
			found++
		}
		opened = append(opened, listener)
		port = uint16(listener.Addr().(*net.TCPAddr).Port)
	}
	if fatal || alternatives > 0 && found == 0 {
		for _, listener := range opened {
			listener.Close()
		}
		return nil, 0, fmt.Errorf("listeners failed to create with the following errors: %v", failures)
	}
	for _, listener := range opened {
		fmt.Fprintf(f.out, "Forwarding from %s -> %d\n", listener.Addr(), pair.remote)
	}
	return opened, port, nil
}

// accept forwards the connections of a listener until it is closed.
func (f *forwarder) accept(ctx context.Context, listener net.Listener, pair portPair, running *sync.WaitGroup) {
	for {
		conn, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintf(f.errOut, "error: accepting a connection for %d: %v\n", pair.local, err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		running.Go(func() {
			fmt.Fprintf(f.out, "Handling connection for %d\n", pair.local)
			if err := f.handle(ctx, conn.(*net.TCPConn), pair.remote); err != nil && ctx.Err() == nil {
				fmt.Fprintf(f.errOut, "error: forwarding %d -> %d: %v\n", pair.local, pair.remote, err)
			}
		})
	}
}

// handle forwards one connection and returns when both sides have ended, with
// an error if the target didn't take it. Each direction ends by itself; a reset
// of either side becomes a reset of the other.
func (f *forwarder) handle(ctx context.Context, local *net.TCPConn, port uint16) error {
	abortLocal := func() {
		_ = local.SetLinger(0)
		_ = local.Close()
	}
	headers := http.Header{}
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	headers.Set(corev1.PortHeader, strconv.Itoa(int(port)))
	headers.Set(corev1.PortForwardRequestIDHeader, strconv.FormatInt(f.requests.Add(1)-1, 10))
	headers.Set(streaming.HeaderErrorText, "true")
	errorStream, err := f.remote.CreateStream(headers)
	if err != nil {
		abortLocal()
		return fmt.Errorf("creating the error stream: %w", err)
	}
	defer f.remote.RemoveStreams(errorStream)
	defer errorStream.Reset()
	// Nothing is ever sent on it.
	_ = errorStream.Close()

	headers.Del(streaming.HeaderErrorText)
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := f.remote.CreateStream(headers)
	if err != nil {
		abortLocal()
		timer := time.AfterFunc(reasonTimeout, func() { _ = errorStream.Reset() })
		defer timer.Stop()
		if text := readReason(errorStream); text != "" {
			return errors.New(text)
		}
		return fmt.Errorf("creating the data stream: %w", err)
	}
	defer f.remote.RemoveStreams(data)
	defer data.Reset()
	reset := f.remote.transport.resetOf(data.Identifier())
	defer f.remote.transport.forget(data.Identifier())

	abort := sync.OnceFunc(func() {
		abortLocal()
		_ = data.Reset()
	})
	stop := context.AfterFunc(ctx, abort)
	defer stop()

	reason := make(chan string, 1)
	var copying, reading sync.WaitGroup
	reading.Go(func() {
		text := readReason(errorStream)
		if text != "" {
			abort()
		}
		reason <- text
	})

	received := int64(0)
	remoteDone := make(chan struct{})
	localDone := make(chan struct{})
	copying.Go(func() {
		defer close(remoteDone)
		n, err := io.Copy(local, data)
		received = n
		// The SPDY library shows all of this as the end of the stream.
		if err != nil || ctx.Err() != nil || closed(reset) || closed(f.remote.CloseChan()) {
			abort()
			return
		}
		_ = local.CloseWrite()
	})
	copying.Go(func() {
		defer close(localDone)
		if _, err := io.Copy(data, local); err != nil {
			abort()
			return
		}
		_ = data.Close()
	})
	// The target may reset the connection after it has ended its own direction.
	copying.Go(func() {
		<-remoteDone
		select {
		case <-localDone:
		case <-reset:
			abort()
		case <-f.remote.CloseChan():
			abort()
		}
	})
	copying.Wait()
	_ = local.Close()
	if ctx.Err() != nil {
		_ = errorStream.Reset()
	}
	timer := time.AfterFunc(reasonTimeout, func() { _ = errorStream.Reset() })
	defer timer.Stop()
	reading.Wait()
	if text := <-reason; text != "" {
		return errors.New(text)
	}
	if received == 0 && closed(reset) {
		return errors.New("the target refused or reset the connection")
	}
	return nil
}

// readReason reads an error stream to its end.
func readReason(r io.Reader) string {
	text, _ := io.ReadAll(io.LimitReader(r, maxReason))
	_, _ = io.Copy(io.Discard, r)
	return strings.TrimSpace(string(text))
}

func closed[T any](ch <-chan T) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
