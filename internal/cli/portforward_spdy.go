package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/moby/spdystream"
	corev1 "k8s.io/api/core/v1"

	"aaserver.io/aaserver/streaming"
)

const (
	// maxReason bounds what is printed of the reason for a refused connection.
	maxReason = 4 << 10
	// reasonTimeout bounds the wait for the reason, once a connection has
	// ended.
	reasonTimeout = 5 * time.Second
	// farewellTimeout bounds the wait for a server's reason to end a session.
	farewellTimeout = time.Second
	// replyPoll is how often the wait for a new stream's reply looks whether
	// it is still wanted. The SPDY library's wait can't be cancelled.
	replyPoll = 100 * time.Millisecond
)

// errReset is how a connection ends that was cut short.
var errReset = fmt.Errorf("the connection was cut short: %w", syscall.ECONNRESET)

// spdyTunnel is a port-forward session in the protocol that kubectl speaks: for
// each connection an error stream and a data stream with the same request ID.
// It carries TCP alone.
type spdyTunnel struct {
	conn      *spdystream.Connection
	transport *spdyTransport
	// protocol and host name what is spoken, and with whom, for errors.
	protocol, host string
	requests       atomic.Int64

	done    chan struct{}
	running sync.WaitGroup
}

var _ tunnel = (*spdyTunnel)(nil)

// newSPDYTunnel takes over the transport, which it pings.
func newSPDYTunnel(transport *spdyTransport, protocol, host string) (*spdyTunnel, error) {
	conn, err := spdystream.NewConnection(openTransport{transport}, false)
	if err != nil {
		return nil, errors.Join(err, transport.Close())
	}
	t := &spdyTunnel{conn: conn, transport: transport, protocol: protocol, host: host, done: make(chan struct{})}
	t.running.Go(func() {
		defer close(t.done)
		conn.Serve(spdystream.NoOpStreamHandler)
		// A WebSocket's end comes after that of SPDY, and says why.
		timer := time.AfterFunc(farewellTimeout, func() { _ = transport.Close() })
		_, _ = io.Copy(io.Discard, transport)
		timer.Stop()
		_ = transport.Close()
	})
	t.running.Go(func() {
		ticker := time.NewTicker(transport.patience / pingsInPatience)
		defer ticker.Stop()
		for {
			select {
			case <-t.done:
				return
			case <-ticker.C:
			}
			// An answer, whatever it is, is a sign of life; that there is none
			// is found by the transport.
			_, _ = conn.Ping()
		}
	})
	return t, nil
}

// openTransport is left open by the SPDY library: when it is to be closed is the
// tunnel's to say.
type openTransport struct{ *spdyTransport }

func (openTransport) Close() error { return nil }

// lost says whether the streams have ended. The reason may be yet to come.
func (t *spdyTunnel) lost() bool { return closed(t.conn.CloseChan()) }

func (t *spdyTunnel) Done() <-chan struct{} { return t.done }

func (t *spdyTunnel) Err() error {
	if err := t.transport.cause(); err != nil {
		return err
	}
	return errors.New("the server closed it")
}

// Close closes the network connection, which ends all streams.
func (t *spdyTunnel) Close() error {
	_ = t.transport.Close()
	t.running.Wait()
	return nil
}

func (t *spdyTunnel) supports(f forward) error {
	what := ""
	switch {
	case f.reverse:
		what = "forward ports from the target to here"
	case f.remote.Network == "udp":
		what = "forward UDP"
	case f.remote.Network == "unix":
		what = "forward to unix sockets"
	default:
		return nil
	}
	return fmt.Errorf("the server at %s can't %s: this takes the protocol %s, and what could be agreed on is %s", t.host, what, streaming.MuxProtocol, t.protocol)
}

// check knows nothing to object to: what can be forwarded are ports, and they
// were named to the server when the session was opened.
func (*spdyTunnel) check(context.Context, streaming.Endpoint) error { return nil }

// Listen is what the protocol has no way to ask for.
func (t *spdyTunnel) Listen(_ context.Context, at streaming.Endpoint) (streaming.PortListener, error) {
	return nil, t.supports(forward{reverse: true, remote: at})
}

// Dial opens the streams of a connection. That the target refuses it is only
// known when it is read from.
func (t *spdyTunnel) Dial(ctx context.Context, to streaming.Endpoint) (stream, error) {
	if err := t.supports(forward{remote: to}); err != nil {
		return nil, err
	}
	headers := func(kind string) http.Header {
		h := http.Header{}
		h.Set(corev1.StreamType, kind)
		h.Set(corev1.PortHeader, strconv.Itoa(int(to.Port)))
		return h
	}
	id := strconv.FormatInt(t.requests.Add(1)-1, 10)
	s := &spdyStream{tunnel: t, told: make(chan struct{})}
	for _, one := range []struct {
		kind   string
		stream **spdystream.Stream
	}{{corev1.StreamTypeError, &s.errors}, {corev1.StreamTypeData, &s.data}} {
		h := headers(one.kind)
		h.Set(corev1.PortForwardRequestIDHeader, id)
		if one.kind == corev1.StreamTypeError {
			h.Set(streaming.HeaderErrorText, "true")
		}
		opened, err := t.conn.CreateStream(h, nil, false)
		if err != nil {
			if s.errors != nil {
				_ = s.errors.Reset()
			}
			return nil, fmt.Errorf("creating the %s stream: %w", one.kind, err)
		}
		*one.stream = opened
	}
	s.reset = t.transport.resetOf(s.data.Identifier())
	refused := s.reply(ctx, s.errors)
	if refused != nil {
		close(s.told)
	} else {
		s.reading.Go(s.listen)
		refused = s.reply(ctx, s.data)
	}
	if refused == nil {
		return s, nil
	}
	err := s.failure()
	_ = s.Close()
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case t.lost():
		<-t.done
		return nil, t.Err()
	}
	return nil, err
}

// reply waits until the server has taken one of the streams, or said why it
// doesn't. If it fails, the stream has been reset: the library's reader would
// wait for ever to tell of a reset.
func (s *spdyStream) reply(ctx context.Context, one *spdystream.Stream) error {
	for {
		err := one.WaitTimeout(replyPoll)
		if errors.Is(err, spdystream.ErrTimeout) && ctx.Err() == nil && !s.tunnel.lost() && !s.refused() {
			continue
		}
		if err != nil {
			_ = one.Reset()
		}
		return err
	}
}

// refused says whether the server has said why it doesn't take the connection.
func (s *spdyStream) refused() bool { return closed(s.told) && s.reason != "" }

// spdyStream is one connection.
type spdyStream struct {
	tunnel       *spdyTunnel
	errors, data *spdystream.Stream
	// reset is closed once the server has reset the data.
	reset <-chan struct{}
	// received says that something came.
	received bool

	// told is closed once the error stream has ended; reason is what it said.
	told    chan struct{}
	reason  string
	reading sync.WaitGroup
	closing sync.Once
}

// listen reads the error stream to its end.
func (s *spdyStream) listen() {
	// Nothing is ever sent on it.
	_ = s.errors.Close()
	text, _ := io.ReadAll(io.LimitReader(s.errors, maxReason))
	_, _ = io.Copy(io.Discard, s.errors)
	s.reason = strings.TrimSpace(string(text))
	close(s.told)
	if s.reason != "" {
		_ = s.data.Reset()
	}
}

// Read returns io.EOF only where the target ended its direction in order.
func (s *spdyStream) Read(p []byte) (int, error) {
	n, err := s.data.Read(p)
	s.received = s.received || n > 0
	// The library shows all of this as the end of the stream.
	if err != nil && (closed(s.reset) || s.tunnel.lost() || s.refused()) {
		err = s.failure()
	}
	return n, err
}

// failure waits for what the server says of a connection that has failed.
func (s *spdyStream) failure() error {
	timer := time.NewTimer(reasonTimeout)
	defer timer.Stop()
	select {
	case <-s.told:
	case <-s.tunnel.conn.CloseChan():
	case <-timer.C:
	}
	switch {
	case s.refused():
		return &refusedError{errors.New(s.reason)}
	case s.tunnel.lost():
		return errReset
	case !s.received:
		return &refusedError{errors.New("the target refused or reset the connection")}
	}
	return errReset
}

func (s *spdyStream) Write(p []byte) (int, error) { return s.data.Write(p) }

func (s *spdyStream) CloseWrite() error { return s.data.Close() }

// Reset tells the target's side even if this one's direction has ended, which
// the library's Reset doesn't.
func (s *spdyStream) Reset() error {
	if s.data.IsFinished() {
		_ = s.data.Cancel()
	}
	return s.data.Reset()
}

// gone is closed when the target's side has ended for good.
func (s *spdyStream) gone() <-chan struct{} { return s.reset }

// Close ends what is left of it.
func (s *spdyStream) Close() error {
	s.closing.Do(func() {
		_ = s.data.Reset()
		_ = s.errors.Reset()
		s.reading.Wait()
		s.tunnel.transport.forget(s.data.Identifier())
	})
	return nil
}

func closed[T any](ch <-chan T) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
