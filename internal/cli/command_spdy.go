package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/remotecommand"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// spdyStreams is a session over SPDY, in version 4 of the protocol. client-go's
// own client of it takes the end of the connection for the end of the command,
// with exit code 0.
type spdyStreams struct {
	guard func(part func()) // runs what is on a goroutine of its own
	conn  httpstream.Connection
	link  *spdyLink
	// Streams that weren't asked for are nil. Each is written by one goroutine.
	stdin, stdout, stderr, outcome, sizes httpstream.Stream

	closeOnce sync.Once
	closed    chan struct{}
}

var _ remote = (*spdyStreams)(nil)

func (c *connection) dialCommandSPDY(ctx context.Context, session *commandSession) (remote, error) {
	upgraded, err := c.upgradeSPDY(ctx, session.target, session.url, remotecommand.StreamProtocolV4Name)
	if err != nil {
		return nil, err
	}
	link := &spdyLink{ReadWriteCloser: upgraded, pulse: &session.pulse}
	conn, err := spdy.NewClientConnectionWithPings(link, min(pingEvery, c.peerTimeout/4))
	if err != nil {
		return nil, errors.Join(err, link.Close())
	}
	s := &spdyStreams{guard: session.guard, conn: conn, link: link, closed: make(chan struct{})}
	stop := context.AfterFunc(ctx, s.close)
	defer stop()
	for _, stream := range []struct {
		wanted bool
		name   string
		to     *httpstream.Stream
	}{
		{true, corev1.StreamTypeError, &s.outcome},
		{session.stdin, corev1.StreamTypeStdin, &s.stdin},
		{true, corev1.StreamTypeStdout, &s.stdout},
		{!session.raw, corev1.StreamTypeStderr, &s.stderr},
		{session.raw, corev1.StreamTypeResize, &s.sizes},
	} {
		if !stream.wanted {
			continue
		}
		opened, err := conn.CreateStream(http.Header{corev1.StreamType: {stream.name}})
		if err != nil {
			s.close()
			return nil, fmt.Errorf("opening the stream %s: %w", stream.name, err)
		}
		*stream.to = opened
	}
	return s, nil
}

func (s *spdyStreams) serve(stdout, stderr io.Writer) (*metav1.Status, error) {
	var text []byte
	var mu sync.Mutex // protects failed
	var failed error
	var copying sync.WaitGroup
	deliver := func(from httpstream.Stream, to io.Writer) {
		if from == nil {
			return
		}
		copying.Go(func() {
			s.guard(func() {
				buf := make([]byte, 32<<10)
				for {
					n, err := from.Read(buf)
					if _, err := to.Write(buf[:n]); err != nil {
						mu.Lock()
						failed = &outputError{err}
						mu.Unlock()
						s.close()
						return
					}
					if err != nil {
						return
					}
				}
			})
		})
	}
	deliver(s.stdout, stdout)
	deliver(s.stderr, stderr)
	deliver(s.outcome, (*bounded)(&text))
	copying.Wait()
	if failed != nil {
		return nil, failed
	}
	// The end of the connection, too, reads as the end of each stream.
	if status := decodeStatus(text); status != nil {
		return status, nil
	}
	if err := s.link.failure(); err != nil {
		return nil, err
	}
	return nil, errors.New("it was closed without a word")
}

func (s *spdyStreams) send(p []byte) error {
	_, err := s.stdin.Write(p)
	return err
}

func (s *spdyStreams) closeStdin() error { return s.stdin.Close() }

func (s *spdyStreams) resize(size terminalSize) error {
	_, err := s.sizes.Write(size.encode())
	return err
}

// attend waits: the SPDY library pings by itself.
func (s *spdyStreams) attend(time.Duration) { <-s.closed }

func (s *spdyStreams) close() {
	s.closeOnce.Do(func() {
		close(s.closed)
		// Without a goodbye, which could get stuck, as could TLS's.
		done := make(chan struct{})
		go func() {
			defer close(done)
			_ = s.link.Close()
			_ = s.conn.Close()
		}()
		select {
		case <-done:
		case <-time.After(partingTime / 2):
		}
	})
}

// spdyLink is the connection below SPDY.
type spdyLink struct {
	io.ReadWriteCloser
	pulse *pulse

	mu  sync.Mutex // protects err
	err error

	closeOnce sync.Once
}

var _ net.Conn = (*spdyLink)(nil)

func (l *spdyLink) Read(p []byte) (int, error) {
	n, err := l.pulse.read(func() (int, error) { return l.ReadWriteCloser.Read(p) })
	if err != nil && !errors.Is(err, io.EOF) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.err == nil {
			l.err = err
		}
	}
	return n, err
}

// failure returns why the connection can't be read, nil if it was closed.
func (l *spdyLink) failure() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Close never fails, as the SPDY library would wait for somebody to hear of it.
func (l *spdyLink) Close() error {
	l.closeOnce.Do(func() { _ = l.ReadWriteCloser.Close() })
	return nil
}

// The SPDY library never asks for what follows; the upgraded body of a response
// has none of it.

func (l *spdyLink) LocalAddr() net.Addr              { return &net.TCPAddr{} }
func (l *spdyLink) RemoteAddr() net.Addr             { return &net.TCPAddr{} }
func (l *spdyLink) SetDeadline(time.Time) error      { return os.ErrNoDeadline }
func (l *spdyLink) SetReadDeadline(time.Time) error  { return os.ErrNoDeadline }
func (l *spdyLink) SetWriteDeadline(time.Time) error { return os.ErrNoDeadline }
