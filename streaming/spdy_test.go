package streaming

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/moby/spdystream/spdy"
)

// rawSPDY is a client that does what it is told.
type rawSPDY struct {
	t      testing.TB
	conn   net.Conn
	framer *spdy.Framer
	// ended are the frames that ended a stream.
	ended map[spdy.StreamId]spdy.Frame
	// data is what came on the streams.
	data map[spdy.StreamId]string
}

func dialRawSPDY(t testing.TB, address, protocol string) *rawSPDY {
	t.Helper()
	host := strings.TrimPrefix(address, "http://")
	conn, err := net.Dial("tcp", host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(testTimeout))
	fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: %s\r\n\r\n", host, protocol)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("got %s", resp.Status)
	}
	framer, err := spdy.NewFramer(conn, r)
	if err != nil {
		t.Fatal(err)
	}
	return &rawSPDY{t, conn, framer, map[spdy.StreamId]spdy.Frame{}, map[spdy.StreamId]string{}}
}

func (c *rawSPDY) write(f spdy.Frame) {
	c.t.Helper()
	if err := c.framer.WriteFrame(f); err != nil {
		c.t.Fatal(err)
	}
}

func (c *rawSPDY) open(id spdy.StreamId, pairs ...string) {
	c.t.Helper()
	h := http.Header{}
	for i := 0; i < len(pairs); i += 2 {
		h[pairs[i]] = []string{pairs[i+1]}
	}
	c.write(&spdy.SynStreamFrame{StreamId: id, Headers: h})
}

// next reads a frame, nil at the connection's end.
func (c *rawSPDY) next() spdy.Frame {
	c.t.Helper()
	f, err := c.framer.ReadFrame()
	if ne := net.Error(nil); errors.As(err, &ne) && ne.Timeout() {
		c.t.Fatal("the server sends no more")
	}
	if err != nil {
		return nil
	}
	switch f := f.(type) {
	case *spdy.DataFrame:
		c.data[f.StreamId] += string(f.Data)
		if f.Flags&spdy.DataFlagFin != 0 {
			c.ended[f.StreamId] = f
		}
	case *spdy.RstStreamFrame:
		c.ended[f.StreamId] = f
	}
	return f
}

// last reads up to a stream's last frame.
func (c *rawSPDY) last(id spdy.StreamId) spdy.Frame {
	c.t.Helper()
	for c.ended[id] == nil {
		if c.next() == nil {
			c.t.Fatalf("the connection ended before stream %d", id)
		}
	}
	return c.ended[id]
}

func TestSPDYSurplusStreamsAreReset(t *testing.T) {
	running := make(chan struct{})
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
		close(running)
		_, err := io.Copy(stdio.Stdout, stdio.Stdin)
		return err
	})
	c := dialRawSPDY(t, s.URL, "v4.channel.k8s.io")
	c.open(1, "streamtype", "error")
	c.open(3, "streamtype", "stderr") // not asked for
	c.open(5, "streamtype", "stdin")
	c.open(7, "streamtype", "stdin") // a second one
	c.open(9, "streamtype", "stdout")
	wait(t, running, "the command to start")
	for id := spdy.StreamId(11); id < 500; id += 2 {
		c.open(id, "streamtype", "stdin")
	}
	for _, id := range []spdy.StreamId{3, 7, 11, 499} {
		if f, ok := c.last(id).(*spdy.RstStreamFrame); !ok || f.Status != spdy.RefusedStream {
			t.Errorf("stream %d ended with %v, want a refusal", id, c.ended[id])
		}
	}
	c.write(&spdy.DataFrame{StreamId: 7, Data: []byte("to nobody")})
	c.write(&spdy.DataFrame{StreamId: 5, Data: []byte("hello")})
	c.write(&spdy.DataFrame{StreamId: 5, Flags: spdy.DataFlagFin})
	c.last(1)
	if diff := cmp.Diff(map[spdy.StreamId]string{9: "hello", 1: `{"metadata":{},"status":"Success"}`}, c.data, cmp.FilterPath(func(p cmp.Path) bool {
		i, ok := p.Last().(cmp.MapIndex)
		return ok && i.Key().Uint() != 9 && i.Key().Uint() != 1
	}, cmp.Ignore())); diff != "" {
		t.Errorf("data (-want +got):\n%s", diff)
	}
	c.last(9)
	c.conn.Close() // the server waits for that
	if err := s.result(t); err != nil {
		t.Error(err)
	}
}

func TestSPDYSetupTimeoutClosesTheConnection(t *testing.T) {
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{SetupTimeout: 50 * time.Millisecond}, func(context.Context, Stdio) error {
		t.Error("run was called")
		return nil
	})
	c := dialRawSPDY(t, s.URL, "v4.channel.k8s.io")
	c.open(1, "streamtype", "error")
	for c.next() != nil {
	}
	if err := s.result(t); !errors.Is(err, ErrSetupTimeout) {
		t.Errorf("got %v, want %v", err, ErrSetupTimeout)
	}
}

func TestSPDYResetEndsThatStreamAlone(t *testing.T) {
	s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true, Stderr: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
		// The client says when it has reset the stream.
		if _, err := io.ReadFull(stdio.Stdin, make([]byte, 1)); err != nil {
			return err
		}
		if _, err := stdio.Stdout.Write([]byte("x")); !errors.Is(err, ErrStreamReset) {
			t.Errorf("writing to a stream that was reset: %v, want %v", err, ErrStreamReset)
		}
		if ctx.Err() != nil {
			t.Errorf("the session ended with the stream: %v", context.Cause(ctx))
		}
		_, err := io.Copy(stdio.Stderr, stdio.Stdin)
		return err
	})
	c := dialRawSPDY(t, s.URL, "v4.channel.k8s.io")
	for i, kind := range []string{"error", "stdin", "stdout", "stderr"} {
		c.open(spdy.StreamId(2*i+1), "streamtype", kind)
	}
	c.write(&spdy.RstStreamFrame{StreamId: 5, Status: spdy.Cancel})
	c.write(&spdy.DataFrame{StreamId: 3, Data: []byte("."), Flags: 0})
	c.write(&spdy.DataFrame{StreamId: 3, Data: []byte("on it goes"), Flags: spdy.DataFlagFin})
	c.last(1)
	c.last(7)
	if diff := cmp.Diff("on it goes", c.data[7]); diff != "" {
		t.Errorf("stderr (-want +got):\n%s", diff)
	}
	c.conn.Close() // the server waits for that
	if err := s.result(t); err != nil {
		t.Error(err)
	}
}

func TestSPDYFrames(t *testing.T) {
	control := func(kind uint16, flags byte, payload string) []byte {
		f := binary.BigEndian.AppendUint16(nil, 0x8003)
		f = binary.BigEndian.AppendUint16(f, kind)
		f = binary.BigEndian.AppendUint32(f, uint32(flags)<<24|uint32(len(payload)))
		return append(f, payload...)
	}
	cases := map[string]struct {
		frames []byte
		want   error // nil if the session goes on
	}{
		"settings":                          {control(4, 0, "\x00\x00\x00\x00"), nil},
		"a window update":                   {control(9, 0, "\x00\x00\x00\x01\x00\x01\x00\x00"), nil},
		"a type that isn't known":           {control(77, 0, "\x00\x00\x00\x01"), nil},
		"an empty control frame":            {control(77, 0, ""), nil},
		"data of a stream that isn't known": {append(binary.BigEndian.AppendUint32([]byte{0, 0, 0, 99}, 5), "12345"...), nil},
		"a reset of what isn't known":       {control(3, 0, "\x00\x00\x00\x63\x00\x00\x00\x05"), nil},
		"a pong to nothing":                 {control(6, 0, "\x00\x00\x00\x02"), nil},
		"a control frame of 16 MiB":         {binary.BigEndian.AppendUint32([]byte{0x80, 3, 0, 1}, 0xffffff), ErrProtocol},
		"another version":                   {[]byte{0x80, 2, 0, 6, 0, 0, 0, 4, 0, 0, 0, 1}, ErrProtocol},
		"goodbye":                           {control(7, 0, "\x00\x00\x00\x01\x00\x00\x00\x00"), ErrClientGone},
		"no SPDY at all":                    {[]byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n" + strings.Repeat("x", 5<<20)), nil},
	}
	for name, tc := range cases {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := serveCommand(t, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				_, err := io.Copy(stdio.Stdout, stdio.Stdin)
				return err
			})
			c := dialRawSPDY(t, s.URL, "v4.channel.k8s.io")
			c.open(1, "streamtype", "error")
			c.open(3, "streamtype", "stdin")
			c.open(5, "streamtype", "stdout")
			c.conn.Write(tc.frames)
			if name == "no SPDY at all" {
				c.conn.Close()
				if err := s.result(t); !errors.Is(err, ErrClientGone) {
					t.Errorf("got %v, want %v", err, ErrClientGone)
				}
				return
			}
			if tc.want == nil {
				c.write(&spdy.PingFrame{Id: 1})
				c.write(&spdy.DataFrame{StreamId: 3, Flags: spdy.DataFlagFin, Data: []byte("on it goes")})
				pong := false
				for c.ended[5] == nil || !pong {
					f := c.next()
					if f == nil {
						t.Fatal("the connection ended")
					}
					if p, ok := f.(*spdy.PingFrame); ok && p.Id == 1 {
						pong = true
					}
				}
				if diff := cmp.Diff("on it goes", c.data[5]); diff != "" {
					t.Errorf("stdout (-want +got):\n%s", diff)
				}
			}
			if tc.want == nil {
				c.conn.Close() // the server waits for that
			} else {
				for c.next() != nil {
				}
			}
			if err := s.result(t); !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

func TestSPDYStreamIDs(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	c := dialRawSPDY(t, s.URL, "portforward.k8s.io")
	c.open(5, "streamtype", "error", "port", "80", "requestid", "1")
	for _, id := range []spdy.StreamId{2, 3, 1} {
		c.open(id, "streamtype", "error", "port", "80", "requestid", "2")
		if f, ok := c.last(id).(*spdy.RstStreamFrame); !ok || f.Status != spdy.ProtocolError {
			t.Errorf("stream %d ended with %v, want a protocol error", id, c.ended[id])
		}
	}
}

func TestSPDYDecompressionIsBounded(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	c := dialRawSPDY(t, s.URL, "portforward.k8s.io")
	c.open(1, "streamtype", strings.Repeat("a", 1<<20))
	for c.next() != nil {
	}
	if err := s.result(t); !errors.Is(err, ErrProtocol) {
		t.Errorf("got %v, want %v", err, ErrProtocol)
	}
}

func TestSPDYRepliesNeedNoCompressor(t *testing.T) {
	// Upstream's decoder reads the hand-made header blocks, any number of them.
	var wire bytes.Buffer
	client, server := net.Pipe()
	defer client.Close()
	defer server.Close()
	r, err := http.NewRequestWithContext(t.Context(), "POST", "/", nil)
	if err != nil {
		t.Fatal(err)
	}
	l := newLink(r, Options{}.withDefaults(), "")
	l.conn = server
	c := newSPDYConn(l, bufio.NewReader(server))
	errs := make(chan error, 1)
	go func() {
		for id := uint32(1); id < 2000; id += 2 {
			if err := c.reply(id); err != nil {
				errs <- err
				return
			}
		}
		errs <- nil
	}()
	framer, err := spdy.NewFramer(&wire, client)
	if err != nil {
		t.Fatal(err)
	}
	for id := spdy.StreamId(1); id < 2000; id += 2 {
		f, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		reply, ok := f.(*spdy.SynReplyFrame)
		if !ok || reply.StreamId != id || len(reply.Headers) != 0 {
			t.Fatalf("got %v, want a reply to %d", f, id)
		}
	}
	if err := <-errs; err != nil {
		t.Error(err)
	}
}
