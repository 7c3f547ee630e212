package streaming

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
)

// maxMessage bounds a WebSocket message from a client, all its fragments
// together; as upstream's server does. Messages are streamed, not collected.
const maxMessage = 32 << 20

func isWebSocket(r *http.Request) bool {
	return httpstream.IsUpgradeRequest(r) && strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}

// chooseSubprotocol returns the first of the client's subprotocols that is
// supported. A client that offers none gets "", if that is supported.
// Bearer tokens, which browsers can hide among the subprotocols, are never
// chosen and never shown.
func chooseSubprotocol(r *http.Request, supported []string) (string, error) {
	offered := websocket.Subprotocols(r)
	offered = slices.DeleteFunc(offered, func(p string) bool {
		return strings.HasPrefix(p, "base64url.bearer.authorization.k8s.io.")
	})
	if len(offered) == 0 {
		offered = []string{""}
	}
	for _, p := range offered {
		if slices.Contains(supported, p) {
			return p, nil
		}
	}
	named := slices.DeleteFunc(slices.Clone(supported), func(p string) bool { return p == "" })
	return "", httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
		"none of the WebSocket subprotocols %s is supported: use one of %s",
		truncate(fmt.Sprintf("%q", offered), 256), strings.Join(named, ", "))
}

// wsConn is the server's side of a WebSocket. gorilla does the handshake and
// reads; frames are written here: a message costs one system call and no copy,
// and a paused peer blocks neither pings nor the reader.
type wsConn struct {
	*link
	ws     *websocket.Conn
	base64 bool
	first  [1]byte // a message's channel; the reader's
}

// wsNetConn is what gorilla sees of the link.
type wsNetConn struct{ *link }

func (c wsNetConn) Close() error                     { return c.conn.Close() }
func (c wsNetConn) LocalAddr() net.Addr              { return c.conn.LocalAddr() }
func (c wsNetConn) RemoteAddr() net.Addr             { return c.conn.RemoteAddr() }
func (c wsNetConn) SetDeadline(time.Time) error      { return nil }
func (c wsNetConn) SetReadDeadline(time.Time) error  { return nil }
func (c wsNetConn) SetWriteDeadline(time.Time) error { return nil }

// Write takes the handshake, and the close frames that gorilla sends when it
// finds a fault: those it does without if a write is stuck, as the reader must
// not be.
func (c wsNetConn) Write(p []byte) (int, error) {
	if !c.wmu.TryLock() {
		return len(p), nil
	}
	defer c.wmu.Unlock()
	if err := c.write(p, nil); err != nil {
		return 0, err
	}
	c.last = p[0] == 0x80|websocket.CloseMessage
	return len(p), nil
}

// wsHijacker gives gorilla the link for a connection.
type wsHijacker struct {
	http.ResponseWriter
	link *link
}

func (h wsHijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	rw, err := h.link.hijack(h.ResponseWriter)
	if err != nil {
		return nil, nil, err
	}
	return wsNetConn{h.link}, rw, nil
}

// readBuffer is for headers, and for messages that are no longer than those of a
// terminal: what is longer is read past it.
const readBuffer = 512

// unusedBuffers keeps gorilla from having a buffer for each connection.
var unusedBuffers sync.Pool

// upgradeWebSocket upgrades the request, or answers it with a Status. The
// caller closes the connection, which is being pinged.
func upgradeWebSocket(w http.ResponseWriter, r *http.Request, opts Options, subprotocol string) (*wsConn, error) {
	return startWebSocket(w, r, opts, subprotocol, false)
}

// greetWebSocket upgrades the request as upgradeWebSocket does, and sends an
// empty message along with the answer: it says that the connection stands.
func greetWebSocket(w http.ResponseWriter, r *http.Request, opts Options, subprotocol string, channel int) (*wsConn, error) {
	c, err := startWebSocket(w, r, opts, subprotocol, true)
	if err != nil {
		return nil, err
	}
	if err := c.send(channel, nil); err != nil {
		c.close()
		return nil, err
	}
	return c, nil
}

// startWebSocket upgrades the request. hold says that the answer waits for what
// is sent first.
func startWebSocket(w http.ResponseWriter, r *http.Request, opts Options, subprotocol string, hold bool) (*wsConn, error) {
	if err := checkOrigin(r, opts); err != nil {
		return nil, refuse(w, err)
	}
	c := &wsConn{
		link:   newLink(r, opts, "websocket/"+subprotocol),
		base64: strings.Contains(subprotocol, "base64."),
	}
	c.hold = hold
	upgrader := websocket.Upgrader{
		WriteBufferPool: &unusedBuffers,                           // frames aren't written by it
		ReadBufferSize:  readBuffer,                               // and net/http's is let go of
		CheckOrigin:     func(*http.Request) bool { return true }, // done above
		Error: func(w http.ResponseWriter, _ *http.Request, code int, reason error) {
			status := metav1.StatusReasonBadRequest
			if code >= 500 {
				status = metav1.StatusReasonInternalError
			}
			w.Header().Set("Sec-WebSocket-Version", "13")
			refuse(w, httpErrorf(int32(code), status, "%v", reason))
		},
	}
	header := opts.header.Clone()
	if subprotocol != "" {
		if header == nil {
			header = http.Header{}
		}
		header.Set("Sec-Websocket-Protocol", subprotocol)
	}
	ws, err := upgrader.Upgrade(wsHijacker{w, c.link}, r, header)
	if err != nil {
		c.cancel(err)
		return nil, err
	}
	c.ws = ws
	ws.SetReadLimit(maxMessage)
	ws.SetPingHandler(c.pong)
	ws.SetPongHandler(func(string) error { return nil })
	ws.SetCloseHandler(func(code int, text string) error {
		c.farewell(c.protocolError(&websocket.CloseError{Code: code, Text: text}), func() {
			c.control(websocket.CloseMessage, websocket.FormatCloseMessage(code, ""))
		})
		return nil
	})
	c.beat(func(stalled bool) error {
		if stalled {
			// The client's pings aren't read at the moment. A pong that it
			// didn't ask for answers them: RFC 6455, section 5.5.3.
			if err := c.control(websocket.PongMessage, nil); err != nil {
				return err
			}
		}
		return c.control(websocket.PingMessage, nil)
	})
	return c, nil
}

// pong answers a ping without blocking the reader. Only the last of those that
// come while a write is stuck is owed an answer.
func (c *wsConn) pong(payload string) error {
	c.heartbeat()
	if c.pongs.CompareAndSwap(false, true) {
		c.wg.Go(func() {
			c.control(websocket.PongMessage, []byte(payload))
			c.pongs.Store(false)
		})
	}
	return nil
}

// frame begins a final frame in l.head. wmu is held.
func (l *link) frame(opcode int, length int) []byte {
	head := append(l.head[:0], 0x80|byte(opcode))
	switch {
	case length < 126:
		return append(head, byte(length))
	case length < 1<<16:
		return binary.BigEndian.AppendUint16(append(head, 126), uint16(length))
	default:
		return binary.BigEndian.AppendUint64(append(head, 127), uint64(length))
	}
}

// control writes a control frame. A close frame is the last.
func (c *wsConn) control(opcode int, payload []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	err := c.write(append(c.frame(opcode, len(payload)), payload...), nil)
	c.last = c.last || opcode == websocket.CloseMessage
	return err
}

// noChannel writes a message that has no channel.
const noChannel = -1

// send writes one message. p is at most frameSize long, in base64 chunkSize.
func (c *wsConn) send(channel int, p []byte) error {
	if c.base64 {
		buf := buffers.Get().(*buffer)
		defer buffers.Put(buf)
		encoded := buf[:base64.StdEncoding.EncodedLen(len(p))]
		base64.StdEncoding.Encode(encoded, p)
		return c.message(websocket.TextMessage, channel, '0', encoded)
	}
	return c.message(websocket.BinaryMessage, channel, 0, p)
}

func (c *wsConn) message(opcode, channel int, zero byte, p []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.over(); err != nil {
		return err
	}
	if channel == noChannel {
		return c.write(c.frame(opcode, len(p)), p)
	}
	return c.write(append(c.frame(opcode, 1+len(p)), zero+byte(channel)), p)
}

// closing is how a WebSocket is closed for err, nil if all is done.
func closing(err error) (code int, reason string) {
	if err != nil {
		return websocket.CloseInternalServerErr, statusOf(err).Message
	}
	return websocket.CloseNormalClosure, ""
}

// finish sends the close frame; no more pings follow.
func (c *wsConn) finish(code int, reason string) error {
	c.quiet()
	return c.control(websocket.CloseMessage, websocket.FormatCloseMessage(c.closeCode(code), truncate(reason, 120)))
}

// closeCode is code, unless the client broke the protocol.
func (c *wsConn) closeCode(code int) int {
	if errors.Is(context.Cause(c.ctx), ErrProtocol) {
		return websocket.CloseProtocolError
	}
	return code
}

// finishWith sends a message and the close frame as one; no more pings follow.
// p is at most maxStatus long.
func (c *wsConn) finishWith(channel int, p []byte) error {
	c.quiet()
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if err := c.over(); err != nil {
		return err
	}
	opcode, zero := websocket.BinaryMessage, byte(0)
	if c.base64 {
		opcode, zero = websocket.TextMessage, '0'
		p = base64.StdEncoding.AppendEncode(nil, p)
	}
	frames := append(c.frame(opcode, 1+len(p)), zero+byte(channel))
	frames = append(append(make([]byte, 0, 2*maxStatus), frames...), p...)
	code := websocket.FormatCloseMessage(c.closeCode(websocket.CloseNormalClosure), "")
	frames = append(append(frames, c.frame(websocket.CloseMessage, len(code))...), code...)
	err := c.write(frames, nil)
	c.last = true
	return err
}

// closeSignal is the channel of the CLOSE signal; its number isn't shifted in
// the base64 form, and what follows isn't encoded.
const closeSignal = remotecommand.StreamClose

// next returns the next message and, if channels is true, its channel. The
// message's reader decodes base64.
func (c *wsConn) next(channels bool) (channel byte, r io.Reader, err error) {
	for {
		_, r, err = c.ws.NextReader()
		if err != nil {
			return 0, nil, c.protocolError(err)
		}
		if !channels {
			break
		}
		if _, err = io.ReadFull(r, c.first[:]); err == io.EOF {
			continue // no channel, no data
		} else if err != nil {
			return 0, nil, c.protocolError(err)
		}
		channel = c.first[0]
		if channel == closeSignal {
			return channel, r, nil
		}
		if c.base64 {
			channel -= '0'
		}
		break
	}
	if c.base64 {
		r = base64.NewDecoder(base64.StdEncoding, r)
	}
	return channel, r, nil
}

// protocolError tells a client that broke the protocol from one that left, and
// one that left in order, or just so, from one that had a reason.
func (c *wsConn) protocolError(err error) error {
	var corrupt base64.CorruptInputError
	var closed *websocket.CloseError
	var network net.Error
	switch {
	case websocket.IsCloseError(err, websocket.CloseNormalClosure, websocket.CloseGoingAway, websocket.CloseNoStatusReceived, websocket.CloseAbnormalClosure):
		return ErrClientGone
	case errors.As(err, &closed):
		return fmt.Errorf("%w: %w", ErrClientGone, err)
	case errors.Is(err, websocket.ErrReadLimit), errors.As(err, &corrupt), err == io.ErrUnexpectedEOF: // the last two are base64's
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	case errors.Is(err, io.EOF), errors.As(err, &network), errors.Is(err, net.ErrClosed):
		return err
	default: // gorilla's errors have no types
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
}

// channelWriter writes to one channel of a WebSocket.
type channelWriter struct {
	conn    *wsConn
	channel int
}

func (w channelWriter) Write(p []byte) (int, error) {
	most := frameSize
	if w.conn.base64 {
		most = chunkSize
	}
	var n int
	for {
		part := p[n:min(len(p), n+most)]
		if err := w.conn.send(w.channel, part); err != nil {
			return n, err
		}
		if n += len(part); n >= len(p) {
			return n, nil
		}
	}
}
