package streaming

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// The defaults of Options.PingInterval and Options.PeerTimeout.
const (
	DefaultPingInterval = 15 * time.Second
	DefaultPeerTimeout  = 60 * time.Second
)

// Options bound upgraded connections. The zero value is safe.
type Options struct {
	// CheckOrigin says whether a request with this Origin header may be
	// upgraded. nil allows requests without an Origin, and those whose Origin
	// has the request's Host.
	CheckOrigin func(*http.Request) bool

	// PingInterval is how often the server sends a ping, at least four times in
	// each PeerTimeout; 0 is DefaultPingInterval. client-go gives a WebSocket
	// up after 61 s without a pong, so more than 30 s is unwise: see the package
	// comment on commands that don't read their stdin.
	PingInterval time.Duration

	// PeerTimeout is within which time a client is taken for dead that gives no
	// sign of life; 0 is DefaultPeerTimeout. Anything that it sends is a sign,
	// and so is that its kernel acknowledges what it is sent while the client
	// itself can't answer, because it isn't reading or isn't being read from.
	PeerTimeout time.Duration

	// StallTimeout is how long a client may neither take any of the data that
	// waits for it nor send anything, while its kernel is still alive: a
	// terminal under ^S or a pager. 0 is 30 minutes. Clients that ping while
	// they are paused, as client-go does over WebSocket, aren't subject to it:
	// they have PeerTimeout from their last ping.
	// A log over plain HTTP has it for each write.
	StallTimeout time.Duration

	// SetupTimeout is how long a client may take to create the streams it
	// promised; 0 is 30 s.
	SetupTimeout time.Duration

	// MaxStdin bounds what is kept in memory, in bytes, of what one command
	// was sent and hasn't read; 0 is 32 MiB. More than 1 MiB is kept only for a
	// command that goes without reading for a time, and so that its client's
	// writes don't time out: see the package comment.
	//
	// There is no bound over all commands. A client can fill 32 MiB in seven
	// minutes, so that n commands at a time may take n × 32 MiB: a server that
	// lets those whom it doesn't trust have thousands chooses less, down to
	// 1 MiB, with which client-go can send nothing more to a command that
	// doesn't read for a minute.
	MaxStdin int

	// MaxForwards bounds the connections that are open at a time in one
	// port-forward session, those whose streams aren't complete yet included;
	// 0 is 256. Each may have 1 MiB that its port hasn't read; over the mux
	// protocol 256 KiB, and more within MaxWindows.
	MaxForwards int

	// MaxWindows bounds, in bytes, by how much the windows of the connections
	// of one mux session may grow in all, beyond 256 KiB for each; 0 is 32 MiB.
	// That is what it takes to fill a fast and long way; memory is taken only
	// for what a port hasn't read.
	MaxWindows int64

	// IdleDatagrams is for how long nothing may pass over a forwarded "udp"
	// connection, either way, before it is closed; 0 is 2 minutes, the least
	// that RFC 4787 asks of NATs.
	IdleDatagrams time.Duration

	// closeGrace is how long what was already under way may take to be written
	// once the session's context has ended; 0 is 5 s. Tests shorten it.
	closeGrace time.Duration

	// header is sent with the answer to a WebSocket's handshake.
	header http.Header
}

func (o Options) withDefaults() Options {
	if o.CheckOrigin == nil {
		o.CheckOrigin = sameOrigin
	}
	if o.PingInterval <= 0 {
		o.PingInterval = DefaultPingInterval
	}
	if o.PeerTimeout <= 0 {
		o.PeerTimeout = DefaultPeerTimeout
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = 30 * time.Minute
	}
	o.StallTimeout = max(o.StallTimeout, o.PeerTimeout)
	if o.SetupTimeout <= 0 {
		o.SetupTimeout = 30 * time.Second
	}
	if o.MaxStdin <= 0 {
		o.MaxStdin = 32 << 20
	}
	if o.MaxForwards <= 0 {
		o.MaxForwards = 256
	}
	if o.IdleDatagrams <= 0 {
		o.IdleDatagrams = 2 * time.Minute
	}
	if o.closeGrace <= 0 {
		o.closeGrace = 5 * time.Second
	}
	return o
}

func sameOrigin(r *http.Request) bool {
	origin := r.Header.Get("Origin")
	if origin == "" {
		return true
	}
	u, err := url.Parse(origin)
	return err == nil && strings.EqualFold(u.Host, r.Host)
}

// What can end a session, besides its own callback and the request's context.
// It is the cause of the callback's context, and what Serve* returns, possibly
// wrapped; or what MuxClient.Err does.
var (
	// ErrClientGone: the client closed its connection, or the connection
	// broke.
	ErrClientGone = errors.New("the client has gone")
	// ErrServerGone: the same of the server, at the client's end of a mux
	// session.
	ErrServerGone = errors.New("the server has closed the connection")
	// ErrPeerTimeout: the client gave no sign of life for Options.PeerTimeout,
	// or took nothing for Options.StallTimeout. At the client's end of a mux
	// session it is the server, and the text says so.
	ErrPeerTimeout = errors.New("the client no longer answers")
	// ErrSetupTimeout: the client didn't create the streams it promised within
	// Options.SetupTimeout.
	ErrSetupTimeout = errors.New("the client did not create its streams in time")
	// ErrProtocol: the client broke the protocol; likewise.
	ErrProtocol = errors.New("the client broke the protocol")
	// ErrStreamReset: the other end gave up one stream. It ends that stream
	// alone.
	ErrStreamReset = errors.New("the stream was reset")
)

// ExitError is how the callback of ServeCommand reports an exit code other
// than 0.
type ExitError struct {
	// Code is the exit code, 1 to 255.
	Code int
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("command terminated with exit code %d", e.Code)
}

type protocolKey struct{}

// Protocol says which protocol was negotiated, for records: for example
// "websocket/v5.channel.k8s.io", "spdy/v4.channel.k8s.io" or "http". ctx is
// what the callback of Serve* was given.
func Protocol(ctx context.Context) string {
	name, _ := ctx.Value(protocolKey{}).(string)
	return name
}
