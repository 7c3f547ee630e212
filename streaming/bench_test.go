package streaming

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/client-go/tools/remotecommand"
	criportforward "k8s.io/cri-streaming/pkg/streaming/portforward"
	criremotecommand "k8s.io/cri-streaming/pkg/streaming/remotecommand"
)

// The benchmarks set this package beside k8s.io/cri-streaming, which serves
// the same protocols in kubelets' container runtimes: the same client, payload
// and callback, both ends in this process, on loopback. An operation is a
// chunk of 32 KiB unless the name says otherwise.

// command is what a benchmark's server does once its streams stand.
type command func(ctx context.Context, stdin io.Reader, stdout io.Writer) error

var execServers = map[string]func(b *testing.B, run command) *server{
	"ours": func(b *testing.B, run command) *server {
		return serveCommand(b, CommandRequest{Stdin: true, Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			return run(ctx, stdio.Stdin, stdio.Stdout)
		})
	},
	"cri": func(b *testing.B, run command) *server {
		return newServer(b, func(w http.ResponseWriter, r *http.Request) error {
			criremotecommand.ServeExec(w, r, criExec(run), "", "", "", nil, &criremotecommand.Options{Stdin: true, Stdout: true},
				time.Hour, time.Minute, criremotecommand.SupportedStreamingProtocols)
			return nil
		})
	},
}

type criExec command

func (run criExec) ExecInContainer(ctx context.Context, _, _, _ string, _ []string, in io.Reader, out, _ io.WriteCloser, _ bool, _ <-chan criremotecommand.TerminalSize, _ time.Duration) error {
	return run(ctx, in, out)
}

func eachExecServer(b *testing.B, bench func(b *testing.B, serve func(*testing.B, command) *server)) {
	for _, name := range []string{"ours", "cri"} {
		b.Run(name, func(b *testing.B) { bench(b, execServers[name]) })
	}
}

func BenchmarkExecOutput(b *testing.B) {
	// The command ends once the client has got everything: cri-streaming
	// resets its streams at the end, and what is on its way is lost.
	flood := func(n int, got <-chan struct{}) command {
		return func(_ context.Context, _ io.Reader, stdout io.Writer) error {
			buf := make([]byte, chunkSize)
			for range n {
				if _, err := stdout.Write(buf); err != nil {
					return err
				}
			}
			<-got
			return nil
		}
	}
	b.Run("websocket-v4", func(b *testing.B) {
		eachExecServer(b, func(b *testing.B, serve func(*testing.B, command) *server) {
			done := make(chan struct{})
			s := serve(b, flood(b.N, done))
			b.SetBytes(chunkSize)
			b.ReportAllocs()
			b.ResetTimer()
			c := mustDialWebSocket(b, s.URL, "v4.channel.k8s.io")
			c.SetReadDeadline(time.Time{})
			buf := make([]byte, 64<<10)
			for got := int64(0); got < int64(b.N)*(1+chunkSize); {
				_, r, err := c.NextReader()
				if err != nil {
					b.Fatal(err)
				}
				for {
					n, err := r.Read(buf)
					got += int64(n)
					if err != nil {
						break
					}
				}
			}
			b.StopTimer()
			close(done)
			c.Close()
			s.result(b)
		})
	})
	b.Run("spdy", func(b *testing.B) {
		eachExecServer(b, func(b *testing.B, serve func(*testing.B, command) *server) {
			got := &untilWriter{left: int64(b.N) * chunkSize, done: make(chan struct{})}
			s := serve(b, flood(b.N, got.done))
			e := spdyExecutor("v4.channel.k8s.io")(b, s.URL)
			b.SetBytes(chunkSize)
			b.ReportAllocs()
			b.ResetTimer()
			if err := e.StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdin: strings.NewReader(""), Stdout: got}); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			s.result(b)
		})
	})
}

// untilWriter closes done when so many bytes were written.
type untilWriter struct {
	left int64
	done chan struct{}
}

func (w *untilWriter) Write(p []byte) (int, error) {
	if w.left -= int64(len(p)); w.left == 0 {
		close(w.done)
	}
	return len(p), nil
}

type countingWriter int64

func (w *countingWriter) Write(p []byte) (int, error) {
	*w += countingWriter(len(p))
	return len(p), nil
}

func BenchmarkExecInput(b *testing.B) {
	drain := func(n int, done chan<- struct{}) command {
		return func(_ context.Context, stdin io.Reader, _ io.Writer) error {
			defer close(done)
			_, err := io.CopyN(io.Discard, stdin, int64(n)*chunkSize)
			return err
		}
	}
	overWebSocket := func(protocol string, serve func(*testing.B, command) *server) func(b *testing.B) {
		return func(b *testing.B) {
			done := make(chan struct{})
			s := serve(b, drain(b.N, done))
			b.SetBytes(chunkSize)
			b.ReportAllocs()
			b.ResetTimer()
			c := mustDialWebSocket(b, s.URL, protocol)
			c.SetWriteDeadline(time.Time{})
			buf := make([]byte, 1+chunkSize)
			for range b.N {
				if err := c.WriteMessage(websocket.BinaryMessage, buf); err != nil {
					b.Fatal(err)
				}
			}
			wait(b, done, "the command")
			b.StopTimer()
			c.Close()
			s.result(b)
		}
	}
	b.Run("websocket-v4", func(b *testing.B) {
		for _, name := range []string{"ours", "cri"} {
			b.Run(name, overWebSocket("v4.channel.k8s.io", execServers[name]))
		}
	})
	b.Run("websocket-v5", func(b *testing.B) { // which cri-streaming doesn't speak
		b.Run("ours", overWebSocket("v5.channel.k8s.io", execServers["ours"]))
	})
	b.Run("spdy", func(b *testing.B) {
		eachExecServer(b, func(b *testing.B, serve func(*testing.B, command) *server) {
			s := serve(b, drain(b.N, make(chan struct{})))
			e := spdyExecutor("v4.channel.k8s.io")(b, s.URL)
			b.SetBytes(chunkSize)
			b.ReportAllocs()
			b.ResetTimer()
			if err := e.StreamWithContext(context.Background(), remotecommand.StreamOptions{
				Stdin: io.LimitReader(endless{}, int64(b.N)*chunkSize), Stdout: io.Discard,
			}); err != nil {
				b.Fatal(err)
			}
		})
	})
}

type criForwarder func(ctx context.Context, port uint16) (PortStream, error)

func (dial criForwarder) PortForward(ctx context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	c, err := dial(ctx, uint16(port))
	if err != nil {
		return err
	}
	defer c.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(c, stream)
		c.CloseWrite()
	}()
	io.Copy(stream, struct{ io.Reader }{c})
	stream.Close()
	<-done
	return nil
}

var forwardServers = map[string]func(b *testing.B) *server{
	"ours": func(b *testing.B) *server { return servePortForward(b, PortForwardRequest{}, Options{}, dialLoopback) },
	"cri": func(b *testing.B) *server {
		return newServer(b, func(w http.ResponseWriter, r *http.Request) error {
			criportforward.ServePortForward(w, r, criForwarder(dialLoopback), "", "", nil, time.Hour, time.Minute, criportforward.SupportedProtocols)
			return nil
		})
	},
}

func BenchmarkPortForward(b *testing.B) {
	for _, direction := range []string{"from-port", "to-port"} {
		for _, kind := range []string{"spdy/ours", "spdy/cri", "tunnel/ours"} {
			b.Run(direction+"/"+kind, func(b *testing.B) {
				client, name, _ := strings.Cut(kind, "/")
				port := backend(b, func(c *net.TCPConn) {
					if direction == "to-port" {
						io.CopyN(io.Discard, c, int64(b.N)*chunkSize)
						return
					}
					buf := make([]byte, chunkSize)
					for range b.N {
						if _, err := c.Write(buf); err != nil {
							return
						}
					}
				})
				s := forwardServers[name](b)
				dialer := forwardClients["SPDY"]
				if client == "tunnel" {
					dialer = forwardClients["tunnel"]
				}
				conn := dialSPDY(b, dialer, s.URL)
				b.SetBytes(chunkSize)
				b.ReportAllocs()
				b.ResetTimer()
				data, _ := openPair(b, conn, port, "1", nil)
				if direction == "to-port" {
					buf := make([]byte, chunkSize)
					for range b.N {
						if _, err := data.Write(buf); err != nil {
							b.Fatal(err)
						}
					}
					io.Copy(io.Discard, data)
				} else if n, err := io.Copy(io.Discard, data); err != nil || n != int64(b.N)*chunkSize {
					b.Fatal(n, err)
				}
				b.StopTimer()
				conn.Close()
			})
		}
	}
}

// BenchmarkExec is a whole exec: connect, upgrade, one byte out, status, close.
func BenchmarkExec(b *testing.B) {
	one := func(_ context.Context, _ io.Reader, stdout io.Writer) error {
		_, err := stdout.Write([]byte("x"))
		return err
	}
	for protocol, client := range map[string]func(testing.TB, string) remotecommand.Executor{
		"websocket-v4": wsExecutor("v4.channel.k8s.io"),
		"spdy":         spdyExecutor("v4.channel.k8s.io"),
	} {
		b.Run(protocol, func(b *testing.B) {
			eachExecServer(b, func(b *testing.B, serve func(*testing.B, command) *server) {
				s := serve(b, one)
				s.results = make(chan error, b.N)
				b.ReportAllocs()
				b.ResetTimer()
				for range b.N {
					var got countingWriter
					err := client(b, s.URL).StreamWithContext(context.Background(), remotecommand.StreamOptions{Stdout: &got, Stdin: strings.NewReader("")})
					if err != nil || got != 1 {
						b.Fatal(err, got)
					}
				}
			})
		})
	}
}

// BenchmarkIdleSession measures what the server keeps for an exec in which
// nothing happens; an operation is a session. Of the client's side only the
// socket is left.
func BenchmarkIdleSession(b *testing.B) {
	for _, protocol := range []string{"websocket-v4", "spdy"} {
		b.Run(protocol, func(b *testing.B) {
			eachExecServer(b, func(b *testing.B, serve func(*testing.B, command) *server) {
				const sessions = 200
				for range b.N {
					running := make(chan struct{}, sessions)
					end := make(chan struct{})
					s := serve(b, func(context.Context, io.Reader, io.Writer) error {
						running <- struct{}{}
						<-end
						return nil
					})
					s.results = make(chan error, sessions)
					bytes, goroutines := inUse()
					var conns []net.Conn
					for range sessions {
						if protocol == "spdy" {
							c := dialRawSPDY(b, s.URL, "v4.channel.k8s.io")
							c.open(1, "streamtype", "error")
							c.open(3, "streamtype", "stdin")
							c.open(5, "streamtype", "stdout")
							conns = append(conns, c.conn)
						} else {
							conns = append(conns, rawWebSocket(b, s.addr()))
						}
						<-running
					}
					bytesNow, goroutinesNow := inUse()
					b.ReportMetric(float64(bytesNow-bytes)/sessions, "B/session")
					b.ReportMetric(float64(goroutinesNow-goroutines)/sessions, "goroutines/session")
					for _, c := range conns {
						c.Close()
					}
					close(end)
					for range sessions {
						s.result(b)
					}
				}
			})
		})
	}
}

// rawWebSocket upgrades a socket by hand.
func rawWebSocket(b *testing.B, address string) net.Conn {
	c, err := net.Dial("tcp", address)
	if err != nil {
		b.Fatal(err)
	}
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nOrigin: http://%s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n", address, address)
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		b.Fatal(err, resp)
	}
	return c
}

func inUse() (bytes int64, goroutines int) {
	for range 3 {
		runtime.GC() // finalizers and pools take more than one
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse), runtime.NumGoroutine()
}
