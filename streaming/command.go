package streaming

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
)

// CommandRequest says which streams the client asked for.
type CommandRequest struct {
	Stdin, Stdout, Stderr, TTY bool
}

// Stdio is the client's side of a command. Each stream is nil if the client
// didn't ask for it.
type Stdio struct {
	// Stdin is what the client sends. It ends with io.EOF when the client
	// closes its side, and with the cause of the callback's context when that
	// ends. Close says that no more is wanted and unblocks a Read. It is an
	// io.WriterTo, which io.Copy uses.
	Stdin io.ReadCloser
	// Stdout and Stderr block while the client is slow. They fail once it has
	// gone; the context ends then, too. Some seconds after the context's end
	// they fail in any case, also a Write that is under way. Stderr is nil with
	// a terminal.
	Stdout, Stderr io.Writer
	// Resize delivers the sizes of the client's terminal, the last one if
	// several wait. It is closed when no more will come, and nil without a
	// terminal.
	Resize <-chan TerminalSize
}

// TerminalSize is the size of a terminal in characters.
type TerminalSize struct {
	Width, Height uint16
}

// The subprotocols of a command over WebSocket. Without one it is the first
// version, as upstream.
var commandSubprotocols = []string{
	"v5.channel.k8s.io", "v5.base64.channel.k8s.io",
	"v4.channel.k8s.io", "v4.base64.channel.k8s.io",
	"channel.k8s.io", "base64.channel.k8s.io", "",
}

// stdinLimits bound what a command has been sent and hasn't read. See the
// package comment for what the drip is good for. client-go's writes get stuck
// for 25 s at most by it over one TCP connection.
func stdinLimits(opts Options) limits {
	const soft = 1 << 20
	return limits{soft: min(soft, opts.MaxStdin), hard: opts.MaxStdin, drip: 384 << 10, interval: 5 * time.Second}
}

// ServeCommand upgrades the request to one of the protocols of exec and
// attach, collects the client's streams, calls run, sends its outcome as the
// status, and closes the connection. When it returns, all that it started has
// ended.
//
// A failure before the upgrade is answered as a metav1.Status, and returned.
// After it, what run returns is sent and returned: nil is success, an
// *ExitError an exit code, an error that is an APIStatus is sent as that, and
// any other as an InternalError with its text.
//
// run's context ends, with a cause, when the client goes or r's context ends,
// on every protocol. Once r's context has ended, its cause is what the client
// is told, unless run returns nil.
func ServeCommand(w http.ResponseWriter, r *http.Request, req CommandRequest, opts Options, run func(ctx context.Context, stdio Stdio) error) error {
	opts = opts.withDefaults()
	switch {
	case req.TTY && req.Stderr:
		return refuse(w, httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"a terminal has no stderr of its own: ask for tty or stderr, not both"))
	case !req.Stdin && !req.Stdout && !req.Stderr:
		return refuse(w, httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"at least one of stdin, stdout and stderr is needed"))
	case isWebSocket(r):
		return serveCommandWebSocket(w, r, req, opts, run)
	default:
		return serveCommandSPDY(w, r, req, opts, run)
	}
}

func serveCommandWebSocket(w http.ResponseWriter, r *http.Request, req CommandRequest, opts Options, run func(context.Context, Stdio) error) error {
	subprotocol, err := chooseSubprotocol(r, commandSubprotocols)
	if err != nil {
		return refuse(w, err)
	}
	first := remotecommand.StreamErr
	if req.Stdout {
		first = remotecommand.StreamStdOut
	} else if req.Stderr {
		first = remotecommand.StreamStdErr
	}
	c, err := greetWebSocket(w, r, opts, subprotocol, first)
	if err != nil {
		return err
	}
	defer c.close()

	var stdio Stdio
	var stdin *inbox
	var sizes *resizes
	if req.Stdin {
		stdin = newInbox(stdinLimits(opts))
		stdio.Stdin = stdin
		defer stdin.Close()
	}
	if req.Stdout {
		stdio.Stdout = channelWriter{c, remotecommand.StreamStdOut}
	}
	if req.Stderr {
		stdio.Stderr = channelWriter{c, remotecommand.StreamStdErr}
	}
	if req.TTY {
		sizes = newResizes()
		stdio.Resize = sizes.c
	}

	reader := make(chan struct{})
	c.wg.Go(func() {
		defer close(reader)
		err := c.gone(readCommand(c, strings.HasPrefix(subprotocol, "v5."), stdin, sizes))
		if stdin != nil {
			stdin.end(err)
		}
		if sizes != nil {
			sizes.close()
		}
	})
	err = c.run(stdio, stdin, run)
	if stdin != nil {
		stdin.Close()
	}
	status := statusOf(err)
	var text []byte
	if strings.HasPrefix(subprotocol, "v") { // v4 and v5
		text = encodeStatus(status)
	} else if status.Status != metav1.StatusSuccess {
		text = []byte(truncate(status.Message, maxStatus))
	}
	if text != nil {
		if c.finishWith(remotecommand.StreamErr, text) == nil {
			c.linger(reader)
		}
	} else if c.finish(websocket.CloseNormalClosure, "") == nil {
		c.linger(reader)
	}
	return err
}

// run calls the callback and returns what to tell the client.
func (l *link) run(stdio Stdio, stdin *inbox, run func(context.Context, Stdio) error) error {
	if stdin != nil {
		stop := context.AfterFunc(l.ctx, func() { stdin.end(context.Cause(l.ctx)) })
		defer stop()
	}
	return l.ended(run(l.ctx, stdio))
}

// readCommand delivers the client's messages until an error. Channels that
// mean nothing here are ignored, as upstream does.
func readCommand(c *wsConn, halfClose bool, stdin *inbox, sizes *resizes) error {
	for {
		channel, r, err := c.next(true)
		if err != nil {
			return err
		}
		switch {
		case channel == remotecommand.StreamStdIn && stdin != nil:
			if err := stdin.receive(r, -1); err != nil {
				return c.protocolError(err)
			}
		case channel == remotecommand.StreamResize && sizes != nil:
			if _, err := io.Copy(sizes, r); err != nil {
				return c.protocolError(err)
			}
		case channel == closeSignal && halfClose:
			var which [1]byte
			if _, err := io.ReadFull(r, which[:]); err == nil && which[0] == remotecommand.StreamStdIn && stdin != nil {
				stdin.end(io.EOF)
			}
		}
	}
}

// resizes turns a stream of JSON objects, {"Width":80,"Height":24}, into
// terminal sizes. What isn't one is dropped.
type resizes struct {
	c  chan TerminalSize // capacity 1: the last size
	mu sync.Mutex        // protects all below
	// pending is an object that hasn't come whole yet.
	pending []byte
	closed  bool
}

// maxResize bounds an object. Clients send 25 bytes.
const maxResize = 1 << 10

func newResizes() *resizes { return &resizes{c: make(chan TerminalSize, 1)} }

func (s *resizes) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for rest := p; len(rest) > 0 && !s.closed; {
		n := min(len(rest), maxResize)
		s.parse(rest[:n])
		rest = rest[n:]
	}
	return len(p), nil
}

func (s *resizes) parse(p []byte) {
	s.pending = append(s.pending, p...)
	for len(s.pending) > 0 {
		var size TerminalSize
		decoder := json.NewDecoder(bytes.NewReader(s.pending))
		err := decoder.Decode(&size)
		if err != nil {
			incomplete := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
			if !incomplete || len(s.pending) > maxResize {
				s.pending = nil
			}
			return
		}
		s.pending = s.pending[decoder.InputOffset():]
		select {
		case <-s.c: // nobody has taken it; it is out of date
		default:
		}
		s.c <- size
	}
	s.pending = nil
}

func (s *resizes) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.c)
	}
}

// The protocols of a command over SPDY, best first.
var commandProtocols = remotecommand.SupportedStreamingProtocols

func serveCommandSPDY(w http.ResponseWriter, r *http.Request, req CommandRequest, opts Options, run func(context.Context, Stdio) error) error {
	protocol, err := negotiateSPDY(w, r, commandProtocols)
	if err != nil {
		return refuse(w, err)
	}
	wanted := map[string]*spdyStream{"error": nil}
	if req.Stdin {
		wanted["stdin"] = nil
	}
	if req.Stdout {
		wanted["stdout"] = nil
	}
	if req.Stderr {
		wanted["stderr"] = nil
	}
	resize := protocol == remotecommand.StreamProtocolV4Name || protocol == remotecommand.StreamProtocolV3Name
	if req.TTY && resize {
		wanted["resize"] = nil
	}
	missing := len(wanted)
	ready := make(chan struct{})

	// Called by the reader alone, until ready.
	accept := func(c *spdyConn, s *spdyStream, headers http.Header) bool {
		kind := headers.Get("streamType")
		if have, ok := wanted[kind]; !ok || have != nil {
			return false
		}
		wanted[kind] = s
		if kind == "stdin" {
			s.in.limits = stdinLimits(opts)
		}
		missing--
		if missing == 0 {
			// It saves the memory of the header decoder.
			c.refuseStreams()
			close(ready)
		}
		return true
	}
	c, err := upgradeSPDY(w, r, opts, "spdy/"+protocol, protocol)
	if err != nil {
		return err
	}
	defer c.close()
	reader := c.serve(accept)

	timer := time.NewTimer(opts.SetupTimeout)
	defer timer.Stop()
	select {
	case <-ready:
	case <-timer.C:
		c.cancel(ErrSetupTimeout)
		return ErrSetupTimeout
	case <-c.ctx.Done():
		return context.Cause(c.ctx)
	}

	var stdio Stdio
	var stdin *inbox
	if s := wanted["stdin"]; s != nil {
		stdin = s.in
		stdio.Stdin = stdin
		defer stdin.Close()
	}
	if s := wanted["stdout"]; s != nil {
		stdio.Stdout = s
	}
	if s := wanted["stderr"]; s != nil {
		stdio.Stderr = s
	}
	if req.TTY {
		sizes := newResizes()
		stdio.Resize = sizes.c
		if s := wanted["resize"]; s != nil {
			c.wg.Go(func() {
				io.Copy(sizes, s.in)
				sizes.close()
			})
			defer s.in.Close()
		} else {
			sizes.close()
		}
	}

	err = c.run(stdio, stdin, run)
	status := statusOf(err)
	var text []byte
	if protocol == remotecommand.StreamProtocolV4Name {
		text = encodeStatus(status)
	} else if status.Status != metav1.StatusSuccess {
		text = []byte(truncate(status.Message, maxStatus))
	}
	for _, kind := range []string{"stdout", "stderr"} {
		if s := wanted[kind]; s != nil {
			s.CloseWrite()
		}
	}
	if text != nil {
		wanted["error"].Write(text)
	}
	wanted["error"].CloseWrite()
	if stdin != nil {
		stdin.Close()
	}
	if c.finish(nil) == nil {
		c.linger(reader)
	}
	return err
}
