package cli

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	gorilla "github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/client-go/transport/websocket"
)

// channels is a session over a WebSocket, in the protocols v5.channel.k8s.io and
// v4.channel.k8s.io: the first byte of a message says what it is of. client-go's
// own client of it knows neither of a server that is silent nor why one closes,
// and gives up a write that takes a minute, though the command may just not read
// its stdin.
type channels struct {
	ws    *gorilla.Conn
	pulse *pulse
	half  bool // v5: stdin can be ended

	wmu sync.Mutex // serialises messages; protects out
	out []byte

	pongs     chan string // what the server's last ping asks to be answered
	closeOnce sync.Once
	closed    chan struct{}
}

var _ remote = (*channels)(nil)

func (c *connection) dialCommandWebSocket(ctx context.Context, session *commandSession) (remote, error) {
	roundTripper, holder, err := websocket.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, session.url.String(), nil)
	if err != nil {
		return nil, err
	}
	protocols := []string{remotecommand.StreamProtocolV5Name}
	if !session.stdin || session.raw {
		// v4 can't end stdin; SPDY can. A terminal's has no end.
		protocols = append(protocols, remotecommand.StreamProtocolV4Name)
	}
	ws, err := websocket.Negotiate(roundTripper, holder, req, protocols...)
	if err != nil {
		return nil, err
	}
	remote := &channels{
		ws:     ws,
		pulse:  &session.pulse,
		half:   ws.Subprotocol() == remotecommand.StreamProtocolV5Name,
		pongs:  make(chan string, 1),
		closed: make(chan struct{}),
	}
	// gorilla would answer by itself, and give the connection up if that took
	// more than a second.
	ws.SetPingHandler(func(payload string) error {
		session.pulse.beat()
		select {
		case <-remote.pongs:
		default:
		}
		remote.pongs <- payload
		return nil
	})
	ws.SetPongHandler(func(string) error {
		session.pulse.beat()
		return nil
	})
	return remote, nil
}

func (c *channels) serve(stdout, stderr io.Writer) (*metav1.Status, error) {
	var text []byte
	buf := make([]byte, 32<<10)
	for {
		var message io.Reader
		_, err := c.pulse.read(func() (int, error) {
			_, r, err := c.ws.NextReader()
			message = r
			return 0, err
		})
		if err == nil {
			c.pulse.beat()
			_, err = c.pulse.read(func() (int, error) { return io.ReadFull(message, buf[:1]) })
		}
		if errors.Is(err, io.EOF) {
			continue // a message without a channel
		}
		if err != nil {
			return decodeStatus(text), closeReason(err)
		}
		var to io.Writer
		switch buf[0] {
		case remotecommand.StreamStdOut:
			to = stdout
		case remotecommand.StreamStdErr:
			to = stderr
		case remotecommand.StreamErr:
			to = (*bounded)(&text)
		default:
			to = io.Discard
		}
		for err == nil {
			var n int
			n, err = c.pulse.read(func() (int, error) { return message.Read(buf) })
			if _, err := to.Write(buf[:n]); err != nil {
				return nil, &outputError{err}
			}
		}
		if !errors.Is(err, io.EOF) {
			return decodeStatus(text), closeReason(err)
		}
		// The status is the last that comes.
		if status := decodeStatus(text); status != nil {
			return status, nil
		}
	}
}

// bounded collects the beginning of what is written to it.
type bounded []byte

func (b *bounded) Write(p []byte) (int, error) {
	*b = append(*b, p[:min(len(p), maxOutcome-len(*b))]...)
	return len(p), nil
}

// closeReason says why a server closed a WebSocket without a status.
func closeReason(err error) error {
	var closed *gorilla.CloseError
	switch {
	case !errors.As(err, &closed):
		return err
	case closed.Code == gorilla.CloseAbnormalClosure:
		return errors.New("it was closed without a word")
	case closed.Text != "":
		return fmt.Errorf("the server closed it: %s (%d)", closed.Text, closed.Code)
	}
	return fmt.Errorf("the server closed it without a reason (%d)", closed.Code)
}

func (c *channels) message(channel byte, p []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.out = append(append(c.out[:0], channel), p...)
	return c.ws.WriteMessage(gorilla.BinaryMessage, c.out)
}

func (c *channels) send(p []byte) error { return c.message(remotecommand.StreamStdIn, p) }

func (c *channels) closeStdin() error {
	if !c.half {
		return nil
	}
	return c.message(remotecommand.StreamClose, []byte{remotecommand.StreamStdIn})
}

func (c *channels) resize(size terminalSize) error {
	return c.message(remotecommand.StreamResize, size.encode())
}

// attend writes control messages without a deadline: a server doesn't read while
// a command doesn't read its stdin, and one write that fails by its deadline is
// the end of a WebSocket.
func (c *channels) attend(period time.Duration) {
	ticker := time.NewTicker(period)
	defer ticker.Stop()
	for {
		var err error
		select {
		case <-c.closed:
			return
		case <-ticker.C:
			err = c.ws.WriteControl(gorilla.PingMessage, nil, time.Time{})
		case payload := <-c.pongs:
			err = c.ws.WriteControl(gorilla.PongMessage, []byte(payload), time.Time{})
		}
		if err != nil {
			<-c.closed
			return
		}
	}
}

func (c *channels) close() {
	c.closeOnce.Do(func() {
		close(c.closed)
		// Below TLS: its own goodbye would wait for a network that is stuck.
		raw := c.ws.NetConn()
		if encrypted, ok := raw.(*tls.Conn); ok {
			raw = encrypted.NetConn()
		}
		hurry := time.AfterFunc(partingTime/2, func() { _ = raw.Close() })
		_ = c.ws.WriteControl(gorilla.CloseMessage, gorilla.FormatCloseMessage(gorilla.CloseNormalClosure, ""), time.Now().Add(partingTime/2))
		_ = c.ws.Close()
		hurry.Stop()
	})
}
