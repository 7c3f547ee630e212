package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"
	"k8s.io/utils/clock"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

const (
	// acceptPause is waited after a connection couldn't be accepted, for want
	// of file descriptors for example.
	acceptPause = 100 * time.Millisecond
	// listenerGrace is how long a port of a reverse forward is asked for again
	// without a word and each listenerPause, once its listener has ended: the
	// server may have to let go of it first, or the instance to start.
	listenerGrace = 10 * time.Second
	listenerPause = 500 * time.Millisecond
)

type portForwardOptions struct {
	targets   []*forwardedTarget
	addresses []listenAddress
	// ready is told when everything listens, nil if nobody asked.
	ready *os.File
	// json prints objects instead of sentences.
	json bool
}

// forwardedTarget is a target with what is forwarded to it and from it, over
// one session.
type forwardedTarget struct {
	ref
	args []forwardArg
	// several says that it isn't the only one.
	several bool
}

func newPortForwardCommand(c *client) *cobra.Command {
	o := &portForwardOptions{}
	instance, output := "", ""
	readyFD := -1
	addresses := []string{"localhost"}
	var reverse []string
	cmd := &cobra.Command{
		Use:                   "port-forward TARGET[/INSTANCE] [options] [LOCAL:]REMOTE... [-R [TARGET=]REMOTE_PORT:LOCAL]... [target/TARGET[/INSTANCE] [LOCAL:]REMOTE...]...",
		DisableFlagsInUseLine: true,
		Short:                 "Forward local ports and sockets to a target, or ports of a target to here",
		Long: templates.LongDesc(`
			Forward local ports and sockets to a target, or ports of a target to here.

			REMOTE is a port of the target by number or name, with '/udp' after a number that is
			UDP's, or the absolute path of a unix socket on the target's host. LOCAL is a port, or
			the path of a unix socket, which has a slash in it; it is made for its user alone.
			Without LOCAL, the port is the remote one; with an empty or 0 one, any free port is
			taken.

			With -R, the target's host listens on REMOTE_PORT of its loopback address, 0 for any
			free port, and connections to it are made here: to LOCAL, a port of localhost, HOST:PORT
			or the path of a unix socket.

			Several targets are forwarded at once by naming each of the others as target/NAME
			before its own ports. A reverse forward belongs to the first target, if it doesn't
			name another one.

			Forwarding goes on until it is interrupted. Once the connection to the server was
			lost, or the target was restarted or made anew, connections are reset that can't be
			kept, and new ones wait for up to 30 seconds until there is a connection to the server
			again. A connection that the target refuses is reported and doesn't end the
			forwarding.

			What the target's class doesn't allow, and a port or socket that can't be listened on, is
			told at the start. The rest is forwarded, unless --ready-fd is given.

			UDP, unix sockets and reverse forwards need WebSockets to get through to the server:
			behind a proxy that holds them up, only TCP can be forwarded. Unix sockets and reverse
			forwards have to be allowed by the target's class, in its spec.ports.`),
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
			kubectl target port-forward web :5000

			# Forward the UDP port 5353 to the target's port 53
			kubectl target port-forward dns 5353:53/udp

			# Forward a local unix socket to port 8080, and port 2375 to a unix socket on the target's host
			kubectl target port-forward web /tmp/web.sock:8080 2375:/run/docker.sock

			# Have the target's host listen on port 9000, forwarding to port 3000 here
			kubectl target port-forward web -R 9000:3000

			# Forward to two targets at once
			kubectl target port-forward web 8080:http target/db 5432

			# For a script: wait until the ports listen, and learn which they are
			kubectl target port-forward web :http -o json --ready-fd 3 3>ready >ports.json &`),
		ValidArgsFunction: c.completePortForward,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || len(args) == 1 && len(reverse) == 0 {
				return cmdutil.UsageErrorf(cmd, "TARGET and list of PORTS are required for port-forward")
			}
			var err error
			if o.targets, err = parseForwards(args, reverse, instance); err != nil {
				return cmdutil.UsageErrorf(cmd, "%v", err)
			}
			if o.addresses, err = parseAddresses(addresses); err != nil {
				return err
			}
			switch output {
			case "":
			case "json":
				o.json = true
			default:
				return cmdutil.UsageErrorf(cmd, "--output=%s is not known: expected json", output)
			}
			if readyFD >= 0 {
				if o.ready, err = openReady(readyFD); err != nil {
					return cmdutil.UsageErrorf(cmd, "%v", err)
				}
				defer o.ready.Close()
			}
			return o.run(cmd.Context(), c)
		},
	}
	cmd.Flags().StringSliceVar(&addresses, "address", addresses, "Addresses to listen on (comma separated). Only accepts IP addresses or localhost as a value. When localhost is supplied, both 127.0.0.1 and ::1 are listened on. One of them is enough, with a warning if the other is in use.")
	register(cmd, "address", cobra.NoFileCompletions)
	cmd.Flags().StringArrayVarP(&reverse, "reverse", "R", nil, "[TARGET[/INSTANCE]=]REMOTE_PORT:LOCAL: have the target's host listen on REMOTE_PORT, and forward its connections to LOCAL, a port, HOST:PORT or the path of a unix socket. May be given more than once.")
	register(cmd, "reverse", cobra.NoFileCompletions)
	cmd.Flags().IntVar(&readyFD, "ready-fd", readyFD, "Number of an open file descriptor that gets a line, and is closed, once all ports and sockets listen. With it, one that can't be listened on, or is refused, ends the command.")
	register(cmd, "ready-fd", cobra.NoFileCompletions)
	cmd.Flags().StringVarP(&output, "output", "o", output, "Output format. One of: (json). Prints an object for each port and socket that is listened on; everything else goes to stderr.")
	register(cmd, "output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
	addInstanceFlag(cmd, c, &instance)
	return cmd
}

// openReady takes over a file descriptor of this process.
func openReady(fd int) (*os.File, error) {
	if fd <= 2 {
		return nil, fmt.Errorf("--ready-fd=%d is one of the standard streams: expected 3 or more, as in --ready-fd 3 3>file", fd)
	}
	file := os.NewFile(uintptr(fd), "ready-fd")
	if file == nil {
		return nil, fmt.Errorf("--ready-fd=%d is not a file descriptor", fd)
	}
	if _, err := file.Stat(); err != nil {
		return nil, fmt.Errorf("--ready-fd=%d is not open: open it for the command, as in --ready-fd %[1]d %[1]d>file", fd)
	}
	return file, nil
}

// maxUnprinted is how many messages wait for who reads them. More are dropped.
const maxUnprinted = 1000

// printer writes messages without holding up those who have them: a pipe that
// nobody reads is no reason for connections to wait, nor for an interrupt.
type printer struct {
	messages chan []byte
	done     chan struct{}
}

func newPrinter(w io.Writer) *printer {
	p := &printer{messages: make(chan []byte, maxUnprinted), done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for message := range p.messages {
			_, _ = w.Write(message) // nobody can be told
		}
	}()
	return p
}

// Write takes one message.
func (p *printer) Write(message []byte) (int, error) {
	select {
	case p.messages <- bytes.Clone(message):
	default:
	}
	return len(message), nil
}

// close waits until all is written, if somebody reads it. There are no more
// messages. A write to a pipe that nobody reads ends with the process.
func (p *printer) close() {
	close(p.messages)
	timer := time.NewTimer(abortGrace)
	defer timer.Stop()
	select {
	case <-p.done:
	case <-timer.C:
	}
}

func (o *portForwardOptions) run(ctx context.Context, c *client) error {
	// That nobody reads any more what is printed is no reason to end.
	unread := make(chan os.Signal, 1)
	signal.Notify(unread, syscall.SIGPIPE)
	defer signal.Stop(unread)
	conn, err := c.connect()
	if err != nil {
		return err
	}
	out, errOut := newPrinter(c.Out), newPrinter(c.ErrOut)
	f := &forwarder{
		options: o,
		conn:    conn,
		out:     out,
		errOut:  errOut,
	}
	f.human = f.out
	if o.json {
		f.human = f.errOut
	}
	err = f.run(ctx)
	out.close()
	errOut.close()
	if ctx.Err() != nil {
		// ^C is how one ends a port-forward.
		return nil
	}
	return err
}

// forwarder is a port-forward that runs.
type forwarder struct {
	options *portForwardOptions
	conn    *connection
	// human has what is said about connections; it is out or errOut.
	out, human, errOut io.Writer
	running            sync.WaitGroup
}

// run forwards until ctx ends, and returns when nothing of it is left. It
// begins with all that can fail: sessions, then ports and sockets.
func (f *forwarder) run(ctx context.Context) error {
	var routes []*route
	var failed []unforwarded
	defer func() {
		f.running.Wait()
		for _, r := range routes {
			if r.listener != nil {
				_ = r.listener.Close()
			}
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		for _, r := range routes {
			if r.from != nil {
				_ = r.from.Close()
			}
		}
	}()
	for _, target := range f.options.targets {
		keeper, forwards, refused, err := f.open(ctx, target)
		if err != nil {
			return err
		}
		failed = append(failed, refused...)
		if keeper == nil {
			continue
		}
		f.running.Go(func() { keeper.run(ctx) })
		for _, forward := range forwards {
			opened, err := f.listen(ctx, target, keeper, forward)
			if err != nil {
				failed = append(failed, unforwarded{forward, target, err})
			}
			routes = append(routes, opened...)
		}
	}
	if err := f.report(failed, len(routes) == 0); err != nil {
		return err
	}
	for _, r := range routes {
		f.announce(r)
	}
	if ready := f.options.ready; ready != nil {
		_, err := io.WriteString(ready, "ready\n")
		if err := errors.Join(err, ready.Close()); err != nil {
			return fmt.Errorf("telling that all ports are ready: %w", err)
		}
	}
	for _, r := range routes {
		f.running.Go(func() {
			if r.reverse {
				f.serveReverse(ctx, r)
			} else {
				f.serve(ctx, r)
			}
		})
	}
	<-ctx.Done()
	return nil
}

// unforwarded is a forward that there won't be.
type unforwarded struct {
	forward
	target *forwardedTarget
	err    error
}

// String says so, for a local port in kubectl's words.
func (u unforwarded) String() string {
	switch {
	case u.reverse:
		return fmt.Sprintf("Unable to have target %q listen on port %d: %s", u.target, u.remote.Port, sentence(u.err))
	case !u.here():
		kind := "port"
		if u.remote.Network == "unix" {
			kind = "socket"
		}
		return fmt.Sprintf("Unable to forward to %s %s of target %q: %s", kind, endpointName(u.remote), u.target, sentence(u.err))
	}
	return fmt.Sprintf("Unable to listen on %s: %v", u.local.kind(), u.err)
}

// report tells of forwards that there won't be. The others go on, as with
// kubectl; it is an error if there are none, or somebody waits for all.
func (f *forwarder) report(failed []unforwarded, all bool) error {
	if len(failed) == 0 {
		return nil
	}
	if f.options.ready != nil || all && len(failed) == 1 && !failed[0].here() {
		return failed[0].err
	}
	here := true
	forwards := make([]forward, len(failed))
	for i, u := range failed {
		fmt.Fprintln(f.errOut, u)
		here = here && u.here()
		forwards[i] = u.forward
	}
	switch {
	case !all:
		return nil
	case here:
		return fmt.Errorf("unable to listen on any of the requested ports: %v", forwards)
	}
	return fmt.Errorf("none of the requested ports can be forwarded: %v", forwards)
}

// here says whether it failed on this machine.
func (u unforwarded) here() bool {
	return !u.reverse && refusal(u.err) == nil
}

// open makes the session with a target, unless all that is asked of it is
// refused: it returns what is left, and what was refused.
func (f *forwarder) open(ctx context.Context, target *forwardedTarget) (*keeper, []forward, []unforwarded, error) {
	var object *v1.Target
	if slices.ContainsFunc(target.args, func(a forwardArg) bool { return a.name != "" }) {
		var err error
		if object, err = f.conn.clientset.StreamingV1().Targets(f.conn.namespace).Get(ctx, target.target, metav1.GetOptions{}); err != nil {
			return nil, nil, nil, err
		}
	}
	forwards, err := resolve(target.args, object)
	if err != nil {
		return nil, nil, nil, err
	}
	var refused []unforwarded
	refuse := func(err error, which func(forward) bool) {
		forwards = slices.DeleteFunc(forwards, func(f forward) bool {
			if which(f) {
				refused = append(refused, unforwarded{f, target, err})
				return true
			}
			return false
		})
	}
	// A server that spoke the mux protocol still does: that it can't be
	// reached by WebSocket for a moment doesn't make it forget UDP.
	mux, first := false, true
	patience := min(connectTimeout, f.conn.peerTimeout)
	keeper, err := newKeeper(ctx, target.String(), f.errOut, func(ctx context.Context) (tunnel, error) {
		ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("the server at %s hasn't answered for %v", f.conn.config.Host, patience))
		defer cancel()
		query := target.query(forwards)
		t, err := f.dial(ctx, target, query, mux)
		for err != nil {
			port, ok := refusedPort(err, query.Ports)
			switch {
			case !ok:
				return nil, cmp.Or(context.Cause(ctx), err)
			case first:
				refuse(err, func(f forward) bool { return !f.reverse && f.remote.Network != "unix" && int32(f.remote.Port) == port })
				if len(forwards) == 0 {
					return nil, errAllRefused
				}
				query = target.query(forwards)
			default:
				// That a port isn't open any more is for its connections to tell.
				query.Ports = nil
			}
			t, err = f.dial(ctx, target, query, mux)
		}
		if first {
			for _, forward := range forwards {
				if err := t.supports(forward); err != nil {
					return nil, errors.Join(err, t.Close())
				}
			}
			for _, one := range slices.Clone(forwards) {
				if one.reverse {
					continue // it is judged when it listens
				}
				err := t.check(ctx, one.remote)
				if !transient(err) {
					refuse(err, func(f forward) bool { return f == one })
				} else if err != nil {
					return nil, errors.Join(cmp.Or(context.Cause(ctx), err), t.Close())
				}
			}
			if len(forwards) == 0 {
				return nil, errors.Join(errAllRefused, t.Close())
			}
		}
		_, mux = t.(muxTunnel)
		first = false
		return t, nil
	})
	if errors.Is(err, errAllRefused) {
		return nil, nil, refused, nil
	}
	return keeper, forwards, refused, err
}

// errAllRefused is why there is no session with a target.
var errAllRefused = errors.New("all that was asked for is refused")

// dial opens a session.
func (f *forwarder) dial(ctx context.Context, target *forwardedTarget, query *v1.TargetPortForwardOptions, muxOnly bool) (tunnel, error) {
	request := f.conn.subresource("POST", target.target, "portforward").VersionedParams(query, scheme.ParameterCodec)
	if err := request.Error(); err != nil {
		return nil, err
	}
	return f.conn.dialPortForward(ctx, target.target, request.URL(), muxOnly)
}

// refusedPort returns which port of a session is why the server refuses it.
func refusedPort(err error, ports []int32) (port int32, ok bool) {
	status := refusal(err)
	if status == nil || status.ErrStatus.Details == nil {
		return 0, false
	}
	for _, cause := range status.ErrStatus.Details.Causes {
		for i, port := range ports {
			if cause.Type == metav1.CauseTypeForbidden && cause.Field == field.NewPath("ports").Index(i).String() {
				return port, true
			}
		}
	}
	return 0, false
}

// query returns the request's options. Ports narrow the session, so that the
// server can refuse them before anything has begun; it is for nothing else
// then.
func (t *forwardedTarget) query(forwards []forward) *v1.TargetPortForwardOptions {
	options := &v1.TargetPortForwardOptions{Instance: t.instance}
	for _, f := range forwards {
		if f.reverse || f.remote.Network == "unix" {
			options.Ports = nil
			return options
		}
		if port := int32(f.remote.Port); !slices.Contains(options.Ports, port) {
			options.Ports = append(options.Ports, port)
		}
	}
	return options
}

// route is a forward that listens, at one address of those it may have.
type route struct {
	forward
	target *forwardedTarget
	keeper *keeper
	// at is where a local one listens, and from where its connections come.
	at   localEnd
	from acceptor
	// session is what a reverse one listens on, by listener.
	session  *session
	listener streaming.PortListener
}

// remoteName names the target's side, with the target where it isn't plain.
func (r *route) remoteName() string {
	if r.reverse || r.target.several {
		return r.target.String() + ":" + endpointName(r.remote)
	}
	return endpointName(r.remote)
}

// localName names this side for messages about connections.
func (r *route) localName() string {
	at := r.at
	if !r.reverse {
		at.host = ""
	}
	return at.String()
}

// ends are the names of where connections come from and where they go.
func (r *route) ends() (from, to string) {
	if r.reverse {
		return r.remoteName(), r.localName()
	}
	return r.localName(), r.remoteName()
}

// listen opens what a forward needs to take connections.
func (f *forwarder) listen(ctx context.Context, target *forwardedTarget, keeper *keeper, forward forward) (routes []*route, err error) {
	if forward.reverse {
		r := &route{forward: forward, target: target, keeper: keeper, at: forward.local}
		ctx, cancel := context.WithTimeoutCause(ctx, connectTimeout, errNoAnswer)
		defer cancel()
		s, err := keeper.acquire(ctx)
		if err != nil {
			return nil, err
		}
		if err := r.listenOn(ctx, s, false); err != nil {
			return nil, fmt.Errorf("target %q can't listen on port %d: %w", target, forward.remote.Port, err)
		}
		return []*route{r}, nil
	}
	opened, taken, err := forward.local.listen(f.options.addresses)
	for _, half := range taken {
		localhost := half.at
		localhost.host = "localhost"
		fmt.Fprintf(f.errOut, "warning: %s can't be listened on (%v): what connects to %s may reach another program there. %s is forwarded: connect to that, or choose another port.\n",
			half.at.withProtocol(), cause(half.err), localhost.withProtocol(), opened[0].at.withProtocol())
	}
	for _, listener := range opened {
		routes = append(routes, &route{forward: forward, target: target, keeper: keeper, at: listener.at, from: listener})
	}
	return routes, err
}

// cause is an error of listening without what the address says.
func cause(err error) error {
	if operation, ok := errors.AsType[*net.OpError](err); ok {
		return operation.Err
	}
	return err
}

// announced is a route in JSON. Its fields are for scripts: they stay.
type announced struct {
	Namespace string `json:"namespace"`
	Target    string `json:"target"`
	Instance  string `json:"instance,omitempty"`
	// Direction is "forward", from local to remote, or "reverse".
	Direction string       `json:"direction"`
	Local     announcedEnd `json:"local"`
	Remote    announcedEnd `json:"remote"`
}

// announcedEnd has an address and port, or a path.
type announcedEnd struct {
	// Protocol is "tcp", "udp" or "unix".
	Protocol string `json:"protocol"`
	Address  string `json:"address,omitempty"`
	Port     uint16 `json:"port,omitempty"`
	Path     string `json:"path,omitempty"`
}

// announce tells the user of a route that listens.
func (f *forwarder) announce(r *route) {
	if !f.options.json {
		to := r.remoteName()
		from := r.at.withProtocol()
		if r.reverse {
			from, to = to, from
		}
		fmt.Fprintf(f.out, "Forwarding from %s -> %s\n", from, to)
		return
	}
	a := announced{
		Namespace: f.conn.namespace,
		Target:    r.target.target,
		Instance:  r.target.instance,
		Direction: "forward",
		Local:     announcedEnd{r.at.network, r.at.host, r.at.port, r.at.path},
		Remote:    announcedEnd{Protocol: r.remote.Network, Port: r.remote.Port, Path: r.remote.Path},
	}
	if r.reverse {
		a.Direction = "reverse"
	}
	_ = json.NewEncoder(f.out).Encode(a)
}

// accept forwards the connections of an acceptor until it is closed.
func (f *forwarder) accept(ctx context.Context, r *route, from acceptor, forward func(context.Context, stream) error) {
	name, to := r.ends()
	for {
		conn, err := from.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			fmt.Fprintf(f.errOut, "error: accepting a connection for %s: %v\n", name, err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		f.running.Go(func() {
			fmt.Fprintf(f.human, "Handling connection for %s\n", name)
			if err := forward(ctx, conn); err != nil && ctx.Err() == nil {
				fmt.Fprintf(f.errOut, "error: forwarding %s -> %s: %s\n", name, to, sentence(err))
			}
		})
	}
}

// serve forwards what comes in locally.
func (f *forwarder) serve(ctx context.Context, r *route) {
	f.accept(ctx, r, r.from, func(ctx context.Context, local stream) error {
		s, remote, err := r.keeper.connect(ctx, r.remote)
		if err != nil {
			refuse(local)
			return err
		}
		defer r.keeper.release(s)
		refused, ok := errors.AsType[*refusedError](join(ctx, s.Done(), local, remote))
		if !ok {
			// That a connection was cut short is seen by who uses it.
			return nil
		}
		r.keeper.refused(ctx, s)
		return refused
	})
}

// refuse ends a connection that can't be forwarded.
func refuse(local stream) {
	if f, ok := local.(*flow); ok {
		f.refuse()
		return
	}
	_ = local.Reset()
}

// serveReverse forwards what comes in on the target's side, where it listens
// anew on each session.
func (f *forwarder) serveReverse(ctx context.Context, r *route) {
	for {
		lost := f.acceptReverse(ctx, r)
		pauses := retries.DelayWithReset(clock.RealClock{}, settled)
		told, ended := "", time.Now()
		if lost != nil {
			told = sentence(lost)
			fmt.Fprintf(f.errOut, "Target %q doesn't listen on port %d any more: %s. It is asked to again.\n", r.target, r.remote.Port, told)
		}
		for r.listener == nil {
			s, err := r.keeper.acquire(ctx)
			if err != nil {
				return
			}
			soon := time.Since(ended) < listenerGrace
			chosen := r.remote.Port
			if err = r.listenOn(ctx, s, !soon); err == nil {
				if told != "" {
					fmt.Fprintf(f.errOut, "Target %q listens on port %d again.\n", r.target, r.remote.Port)
				}
				if r.remote.Port != chosen {
					f.announce(r)
				}
				break
			}
			if stale(err) && r.keeper.renew(ctx, s) {
				continue
			}
			if ctx.Err() != nil {
				return
			}
			pause := listenerPause
			if !soon {
				pause = pauses()
				if reason := sentence(err); reason != told && !closed(s.Done()) {
					told = reason
					fmt.Fprintf(f.errOut, "Target %q can't listen on port %d: %s. It is tried again until it can.\n", r.target, r.remote.Port, reason)
				}
			}
			if !r.pause(ctx, s, pause) {
				return
			}
		}
	}
}

// acceptReverse forwards until the listener ends: with its session, when that
// is replaced, or because the server closed it, for the reason that is returned.
func (f *forwarder) acceptReverse(ctx context.Context, r *route) (lost error) {
	s, over := r.session, make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-ctx.Done():
		case <-s.Done():
		case <-s.replaced:
		case <-over:
		}
		_ = r.listener.Close()
	})
	from := &remoteListener{PortListener: r.listener, admit: func() { r.keeper.hold(s) }}
	f.accept(ctx, r, from, func(ctx context.Context, remote stream) error {
		defer r.keeper.release(s)
		local, err := r.local.dial(ctx)
		if err != nil {
			_ = remote.Reset()
			return err
		}
		_ = join(ctx, s.Done(), local, remote)
		return nil
	})
	if ctx.Err() == nil && !closed(s.Done()) && !closed(s.replaced) {
		lost = from.ended
	}
	close(over)
	watching.Wait()
	r.listener = nil
	r.keeper.release(s)
	return lost
}

// listenOn has the target's side listen, over a session that was acquired. The
// port that was chosen once is asked for again. Only if it may move, and any
// port was asked for first, another one will do.
func (r *route) listenOn(ctx context.Context, s *session, move bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, connectTimeout, errNoAnswer)
	defer cancel()
	at := r.remote
	listener, err := s.Listen(ctx, at)
	if err != nil && move && r.anyPort && ctx.Err() == nil && !closed(s.Done()) {
		at.Port = 0
		listener, err = s.Listen(ctx, at)
	}
	if err != nil {
		r.keeper.release(s)
		return err
	}
	r.remote = listener.Endpoint()
	r.session, r.listener = s, listener
	return nil
}

// pause waits before another attempt on a session, or until there is another
// one.
func (r *route) pause(ctx context.Context, s *session, pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.Done():
	case <-s.replaced:
	case <-ctx.Done():
	}
	return ctx.Err() == nil
}

// completePortForward completes port-forward's arguments: a target, then its
// ports by name and number, after the local port where one was typed, or
// another target.
func (c *client) completePortForward(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	if len(args) == 0 || isTarget(toComplete) {
		return c.completeRef(cmd.Context(), toComplete)
	}
	// The last target that was named is the one whose ports follow.
	last := 0
	for i, arg := range args {
		if isTarget(arg) {
			last = i
		}
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	target, err := c.completedTarget(ctx, args[last:])
	if err != nil {
		return failedCompletion(err)
	}
	local := ""
	if before, _, ok := strings.Cut(toComplete, ":"); ok {
		local = before + ":"
	}
	var names []string
	for _, port := range target.Spec.Ports {
		number := withProtocol(strings.ToLower(string(cmp.Or(port.Protocol, v1.ProtocolTCP))), fmt.Sprint(port.Port))
		given := slices.ContainsFunc(args[last+1:], func(arg string) bool {
			remote := arg[strings.LastIndex(arg, ":")+1:]
			return remote == port.Name || remote == number
		})
		if !given {
			names = append(names, local+port.Name, local+number)
		}
	}
	return candidates(names, toComplete), cobra.ShellCompDirectiveNoFileComp
}
