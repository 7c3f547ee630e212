package cli

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	portforwardconstants "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/websocket"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"aaserver.io/aaserver/streaming"
)

const (
	// pingsInPatience is how many pings a server may leave unanswered before it
	// is given up, about.
	pingsInPatience = 4
	// maxResets bounds what is remembered of streams that the server reset.
	maxResets = 1 << 16
)

// errSilent ends a connection whose server has gone without a word.
var errSilent = errors.New("the server hasn't answered")

// dialPortForward opens a session. One WebSocket offers the mux protocol and
// the tunnel of SPDY, and the server takes what it knows; where no WebSocket
// gets through, and unless muxOnly, it is SPDY by itself.
// KUBECTL_PORT_FORWARD_WEBSOCKETS=false leaves SPDY alone, as for kubectl. ctx
// bounds the dialling.
func (c *connection) dialPortForward(ctx context.Context, target string, u *url.URL, muxOnly bool) (tunnel, error) {
	if cmdutil.PortForwardWebsockets.IsDisabled() {
		t, err := c.dialSPDY(ctx, target, u)
		return t, upgradeError(c.config.Host, err)
	}
	t, err := c.dialWebSocket(ctx, u)
	if err != nil && !muxOnly && fallBack(err) {
		t, err = c.dialSPDY(ctx, target, u)
	}
	return t, upgradeError(c.config.Host, err)
}

// upgradeConfig returns what a transport of our own needs of the configuration.
func (c *connection) upgradeConfig() (*tls.Config, func(*http.Request) (*url.URL, error), error) {
	tlsConfig, err := rest.TLSConfigFor(c.config)
	if err != nil {
		return nil, nil, err
	}
	proxy := c.config.Proxy
	if proxy == nil {
		proxy = utilnet.NewProxierWithNoProxyCIDR(http.ProxyFromEnvironment)
	}
	return tlsConfig, proxy, nil
}

// dialWebSocket opens a session within a WebSocket.
func (c *connection) dialWebSocket(ctx context.Context, u *url.URL) (tunnel, error) {
	roundTripper, holder, err := websocket.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	ws, err := websocket.Negotiate(roundTripper, holder, req, streaming.MuxProtocol, portforwardconstants.WebsocketsSPDYTunnelingPortForwardV1)
	if err != nil {
		return nil, err
	}
	if ws.Subprotocol() == streaming.MuxProtocol {
		mux, err := streaming.NewMuxClient(ws, streaming.MuxOptions{PingInterval: c.peerTimeout / pingsInPatience, PeerTimeout: c.peerTimeout})
		if err != nil {
			return nil, err
		}
		return muxTunnel{mux}, nil
	}
	transport := newSPDYTransport(portforward.NewTunnelingConnection("client", ws), c.peerTimeout)
	// The server's pings don't surface as data, but say that it is there.
	answer := ws.PingHandler()
	ws.SetPingHandler(func(data string) error {
		transport.alive()
		return answer(data)
	})
	ws.SetReadLimit(0)
	return newSPDYTunnel(transport, ws.Subprotocol(), c.config.Host)
}

// dialSPDY opens a session by SPDY.
func (c *connection) dialSPDY(ctx context.Context, target string, u *url.URL) (tunnel, error) {
	upgraded, err := c.upgradeSPDY(ctx, target, u, portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, err
	}
	return newSPDYTunnel(newSPDYTransport(upgraded, c.peerTimeout), portforward.PortForwardProtocolV1Name, c.config.Host)
}

// upgradeSPDY upgrades a plain HTTP/1.1 connection. net/http does the upgrade
// itself, so that proxies and a cancelled context work as for any request.
func (c *connection) upgradeSPDY(ctx context.Context, target string, u *url.URL, protocol string) (io.ReadWriteCloser, error) {
	tlsConfig, proxy, err := c.upgradeConfig()
	if err != nil {
		return nil, err
	}
	base := &http.Transport{
		Proxy:           proxy,
		TLSClientConfig: tlsConfig,
		DialContext:     c.config.Dial,
		// A connection that wasn't upgraded is of no more use.
		DisableKeepAlives: true,
	}
	roundTripper, err := rest.HTTPWrappersForConfig(c.config, base)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderConnection, httpstream.HeaderUpgrade)
	req.Header.Set(httpstream.HeaderUpgrade, spdy.HeaderSpdy31)
	req.Header.Set(httpstream.HeaderProtocolVersion, protocol)
	resp, err := roundTripper.RoundTrip(req)
	if err != nil {
		return nil, &url.Error{Op: "Post", URL: c.config.Host, Err: err}
	}
	upgraded, ok := resp.Body.(io.ReadWriteCloser)
	if resp.StatusCode != http.StatusSwitchingProtocols || !ok || !strings.EqualFold(resp.Header.Get(httpstream.HeaderUpgrade), spdy.HeaderSpdy31) {
		defer resp.Body.Close()
		return nil, responseError(resp, target)
	}
	if got := resp.Header.Get(httpstream.HeaderProtocolVersion); got != protocol {
		upgraded.Close()
		return nil, fmt.Errorf("unable to negotiate protocol: client supports %q, server returned %q", protocol, got)
	}
	return upgraded, nil
}

// spdyTransport is the connection below SPDY. It reads along, because the SPDY
// library shows the end of a stream and its reset as the same io.EOF, and it
// closes the connection when nothing has come for too long.
type spdyTransport struct {
	conn io.ReadWriteCloser
	// idle fires when the server has been silent while we waited for it. While
	// a stalled stream keeps us from reading, it doesn't run.
	idle     *time.Timer
	patience time.Duration

	// Used by the one goroutine that reads.
	header    [8]byte
	read      int    // bytes of header that have been read
	remaining uint32 // bytes of the payload that haven't
	reset     bool   // the frame is a RST_STREAM
	id        [4]byte
	idRead    int

	// mu protects resets and err.
	mu sync.Mutex
	// resets has a channel for each stream that somebody waits for, closed
	// when the stream is reset.
	resets map[uint32]chan struct{}
	err    error

	closeOnce sync.Once
}

var _ net.Conn = (*spdyTransport)(nil)

func newSPDYTransport(conn io.ReadWriteCloser, patience time.Duration) *spdyTransport {
	t := &spdyTransport{conn: conn, patience: patience, resets: map[uint32]chan struct{}{}}
	t.idle = time.AfterFunc(patience, func() { t.fail(fmt.Errorf("%w for %v", errSilent, patience)) })
	t.idle.Stop()
	return t
}

// fail closes the connection for a reason.
func (t *spdyTransport) fail(err error) {
	t.mu.Lock()
	if t.err == nil {
		t.err = err
	}
	t.mu.Unlock()
	_ = t.Close()
}

// cause returns why the connection ended, nil if the server closed it in good
// order.
func (t *spdyTransport) cause() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// alive says that something has come from the server.
func (t *spdyTransport) alive() { t.idle.Reset(t.patience) }

func (t *spdyTransport) Read(p []byte) (int, error) {
	t.idle.Reset(t.patience)
	n, err := t.conn.Read(p)
	t.idle.Stop()
	t.scan(p[:n])
	if err != nil && !errors.Is(err, io.EOF) {
		t.mu.Lock()
		if t.err == nil {
			t.err = err
		}
		t.mu.Unlock()
	}
	return n, err
}

// scan follows the frames of SPDY/3.1 (section 2.2): 8 bytes of header, of which
// the last three are the payload's length; a control frame's first bit is set
// and its bytes 2 and 3 are its type. RST_STREAM (section 2.6.3) is type 3; its
// payload begins with the stream's number.
func (t *spdyTransport) scan(p []byte) {
	for len(p) > 0 {
		if t.read < len(t.header) {
			n := copy(t.header[t.read:], p)
			t.read += n
			p = p[n:]
			if t.read < len(t.header) {
				return
			}
			t.remaining = binary.BigEndian.Uint32(t.header[4:]) & 0xffffff
			t.reset = t.header[0]&0x80 != 0 && binary.BigEndian.Uint16(t.header[2:]) == 3
			t.idRead = 0
		}
		n := uint32(min(uint64(t.remaining), uint64(len(p))))
		if t.reset && t.idRead < len(t.id) {
			t.idRead += copy(t.id[t.idRead:], p[:n])
			if t.idRead == len(t.id) {
				t.markReset(binary.BigEndian.Uint32(t.id[:]) & 0x7fffffff)
			}
		}
		p = p[n:]
		if t.remaining -= n; t.remaining == 0 {
			t.read = 0
		}
	}
}

func (t *spdyTransport) markReset(id uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ch, ok := t.resets[id]
	if !ok {
		if len(t.resets) >= maxResets {
			return
		}
		ch = make(chan struct{})
		t.resets[id] = ch
	}
	select {
	case <-ch:
	default:
		close(ch)
	}
}

// resetOf returns a channel that is closed when the server has reset the
// stream. It is closed before the stream's reader sees the end.
func (t *spdyTransport) resetOf(id uint32) <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	ch, ok := t.resets[id]
	if !ok {
		ch = make(chan struct{})
		t.resets[id] = ch
	}
	return ch
}

// forget ends the interest in a stream.
func (t *spdyTransport) forget(id uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.resets, id)
}

func (t *spdyTransport) Write(p []byte) (int, error) { return t.conn.Write(p) }

// Close never fails: that a connection which is over couldn't be closed in good
// order helps nobody, and the SPDY library would wait for somebody to hear of
// it.
func (t *spdyTransport) Close() error {
	t.closeOnce.Do(func() {
		_ = t.conn.Close()
		t.idle.Stop()
	})
	return nil
}

// The SPDY library never asks for what follows; the upgraded body of a response
// has none of it.

func (t *spdyTransport) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (t *spdyTransport) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (t *spdyTransport) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (t *spdyTransport) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (t *spdyTransport) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
