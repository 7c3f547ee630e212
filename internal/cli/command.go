package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/klog/v2"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/interrupt"
	"k8s.io/kubectl/pkg/util/term"
	"k8s.io/streaming/pkg/httpstream"
	streamspdy "k8s.io/streaming/pkg/httpstream/spdy"
)

// stdio is the user's side of exec and attach.
type stdio struct {
	stdin, tty, quiet bool
}

func (s *stdio) addFlags(cmd *cobra.Command) {
	cmd.Flags().BoolVarP(&s.stdin, "stdin", "i", false, "Pass stdin to the target")
	cmd.Flags().BoolVarP(&s.tty, "tty", "t", false, "Stdin is a TTY")
	cmd.Flags().BoolVarP(&s.quiet, "quiet", "q", false, "Only print output from the remote session")
}

// terminal returns the user's terminal. It is put into raw mode, and a terminal
// asked for on the other side, only if there is one here to type into.
func (s *stdio) terminal(c *client) term.TTY {
	t := term.TTY{
		Out: c.Out,
		// On a signal the terminal is restored at once. The command's context
		// ends what runs; the default would be to exit here.
		Parent: interrupt.New(func(os.Signal) {}),
	}
	if !s.stdin {
		return t
	}
	t.In = c.In
	if !s.tty {
		return t
	}
	if !t.IsTerminalIn() {
		if !s.quiet {
			fmt.Fprintln(c.ErrOut, "Unable to use a TTY - input is not a terminal or the right kind of file")
		}
		return t
	}
	t.Raw = true
	return t
}

// sizes hands kubectl's terminal sizes to client-go.
type sizes struct {
	queue term.TerminalSizeQueue
}

func (s sizes) Next() *remotecommand.TerminalSize {
	next := s.queue.Next()
	if next == nil {
		return nil
	}
	return &remotecommand.TerminalSize{Width: next.Width, Height: next.Height}
}

// monitor returns the sizes of the terminal, beginning with the given ones, or
// nil if the output isn't a terminal.
func monitor(t *term.TTY, initial ...*term.TerminalSize) remotecommand.TerminalSizeQueue {
	queue := t.MonitorSize(initial...)
	if queue == nil {
		return nil
	}
	return sizes{queue}
}

// stream runs a request for exec or attach to its end. The terminal is as it
// was when it returns.
func (c *connection) stream(ctx context.Context, t term.TTY, target string, u *url.URL, options remotecommand.StreamOptions) error {
	executor, dialled, err := c.executor(u, target)
	if err != nil {
		return err
	}
	return t.Safe(func() error {
		err := executor.StreamWithContext(quiet(ctx), options)
		if err != nil && dialled.err != nil {
			err = dialled.err
		}
		return upgradeError(c.config.Host, err)
	})
}

// quiet keeps client-go from logging, unless -v asks for it. It logs as errors
// what happens in every other session, that the command didn't read all of its
// stdin for example. What matters it returns.
func quiet(ctx context.Context) context.Context {
	if klog.V(1).Enabled() {
		return ctx
	}
	return klog.NewContext(ctx, klog.Logger{})
}

// executor speaks WebSocket, or SPDY where that doesn't get through.
// KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false leaves SPDY alone, as for kubectl.
func (c *connection) executor(u *url.URL, target string) (remotecommand.Executor, *dialResult, error) {
	tlsConfig, proxy, err := c.upgradeConfig()
	if err != nil {
		return nil, nil, err
	}
	upgrader, err := streamspdy.NewRoundTripperWithConfig(streamspdy.RoundTripperConfig{TLS: tlsConfig, Proxier: proxy, PingPeriod: pingPeriod})
	if err != nil {
		return nil, nil, err
	}
	transport, err := rest.HTTPWrappersForConfig(c.config, upgrader)
	if err != nil {
		return nil, nil, err
	}
	dialled := &dialResult{RoundTripper: transport}
	executor, err := remotecommand.NewSPDYExecutorForTransports(dialled,
		spdy.NewUpgraderForStreaming(refusingUpgrader{upgrader, target}), http.MethodPost, u)
	if err != nil || cmdutil.RemoteCommandWebsockets.IsDisabled() {
		return executor, dialled, err
	}
	websocket, err := remotecommand.NewWebSocketExecutor(c.config, http.MethodGet, u.String())
	if err != nil {
		return nil, nil, err
	}
	executor, err = remotecommand.NewFallbackExecutor(websocket, executor, fallBack)
	return executor, dialled, err
}

// dialResult keeps the error of a request, of which client-go's SPDY executor
// leaves the text alone.
type dialResult struct {
	http.RoundTripper
	err error
}

func (d *dialResult) RoundTrip(req *http.Request) (resp *http.Response, err error) {
	resp, d.err = d.RoundTripper.RoundTrip(req)
	return resp, d.err
}

// refusingUpgrader keeps the server's Status, of which client-go's own upgrader
// leaves the message alone.
type refusingUpgrader struct {
	httpstream.UpgradeRoundTripper
	target string
}

func (u refusingUpgrader) NewConnection(resp *http.Response) (httpstream.Connection, error) {
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, responseError(resp, u.target)
	}
	return u.UpgradeRoundTripper.NewConnection(resp)
}

// errDetached is the cause with which a session ends that the user detached
// from.
var errDetached = errors.New("detached")

// detachable calls detach when the user types the keys for it.
type detachable struct {
	io.Reader
	detach func()
}

// newDetachable watches what a terminal in raw mode reads. A terminal has no
// end of file then, so that an end means the keys.
func newDetachable(in io.Reader, keys string, detach func()) (io.Reader, error) {
	reader, err := term.NewDetachableReader(in, keys)
	if err != nil {
		return nil, fmt.Errorf("--detach-keys=%q: %w", keys, err)
	}
	return &detachable{Reader: reader, detach: detach}, nil
}

func (d *detachable) Read(p []byte) (int, error) {
	n, err := d.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		d.detach()
	}
	return n, err
}
