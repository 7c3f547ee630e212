package streaming

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/gorilla/websocket"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
)

// tlsForwards are ways to forward a port by TLS, all with the same hops: a
// local listener, one way by TLS, and a copy to the port. Each returns the
// local port.
var tlsForwards = map[string]func(b *testing.B, port uint16) uint16{
	"mux": func(b *testing.B, port uint16) uint16 {
		s := newTLSServer(b)
		dialer := websocket.Dialer{Subprotocols: []string{MuxProtocol}, TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
		ws, _, err := dialer.Dial(strings.Replace(s.URL, "https", "wss", 1), nil)
		if err != nil {
			b.Fatal(err)
		}
		c, err := NewMuxClient(ws, MuxOptions{})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { c.Close() })
		return relay(b, nil, func() (PortStream, error) {
			return c.Dial(b.Context(), Endpoint{Network: "tcp", Port: port})
		})
	},
	"tunnel": func(b *testing.B, port uint16) uint16 {
		s := newTLSServer(b)
		u, err := url.Parse(s.URL)
		if err != nil {
			b.Fatal(err)
		}
		d, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, &rest.Config{Host: s.URL, TLSClientConfig: rest.TLSClientConfig{Insecure: true}})
		if err != nil {
			b.Fatal(err)
		}
		local, _ := forward(b, d, port)
		return local[0]
	},
	"relay": func(b *testing.B, port uint16) uint16 { // one TLS connection for each
		cert := httptest.NewUnstartedServer(nil)
		cert.StartTLS()
		defer cert.Close()
		far := relay(b, cert.TLS, func() (PortStream, error) { return dialLoopback(b.Context(), port) })
		return relay(b, nil, func() (PortStream, error) {
			return tls.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(far))), &tls.Config{InsecureSkipVerify: true})
		})
	},
}

func newTLSServer(b *testing.B) *httptest.Server {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ServePortForward(w, r, PortForwardRequest{}, Options{}, backendOf(dialLoopback))
	}))
	b.Cleanup(s.Close)
	return s
}

// relay listens and copies each connection to what dial makes.
func relay(b *testing.B, config *tls.Config, dial func() (PortStream, error)) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	if config != nil {
		l = tls.NewListener(l, config)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer near.Close()
				far, err := dial()
				if err != nil {
					b.Error(err)
					return
				}
				defer far.Close()
				var up sync.WaitGroup
				up.Go(func() {
					io.Copy(far, near)
					far.CloseWrite()
				})
				io.Copy(near, far)
				near.(PortStream).CloseWrite()
				up.Wait()
			})
		}
	})
	b.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return port
}

// BenchmarkForwardTLS forwards to a port what all connections send, or from it
// what they get, one MiB an operation.
func BenchmarkForwardTLS(b *testing.B) {
	const unit = 1 << 20
	for _, direction := range []string{"from-port", "to-port"} {
		for _, conns := range []int{1, 100} {
			for _, way := range []string{"mux", "tunnel", "relay"} {
				b.Run(fmt.Sprintf("%s/%d/%s", direction, conns, way), func(b *testing.B) {
					each := int64(b.N) * unit / int64(conns)
					write := func(c net.Conn) {
						buf := make([]byte, 32<<10)
						for left := each; left > 0; {
							n, err := c.Write(buf[:min(left, int64(len(buf)))])
							if err != nil {
								b.Error(err)
								return
							}
							left -= int64(n)
						}
					}
					port := backend(b, func(c *net.TCPConn) {
						if direction == "from-port" {
							write(c)
							c.CloseWrite()
							io.Copy(io.Discard, c)
							return
						}
						n, err := io.Copy(io.Discard, c)
						if err != nil || n != each {
							b.Error(n, err)
						}
					})
					local := tlsForwards[way](b, port)
					b.SetBytes(unit)
					b.ReportAllocs()
					before := cpu(b)
					b.ResetTimer()
					var wg sync.WaitGroup
					for range conns {
						wg.Go(func() {
							c, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(local))))
							if err != nil {
								b.Error(err)
								return
							}
							defer c.Close()
							if direction == "to-port" {
								write(c)
								c.(*net.TCPConn).CloseWrite()
								io.Copy(io.Discard, c)
							} else if n, err := io.CopyN(io.Discard, c, each); err != nil {
								b.Error(n, err)
							}
						})
					}
					wg.Wait()
					b.StopTimer()
					b.ReportMetric((cpu(b)-before)/float64(b.N)*1024, "cpu-s/GiB")
				})
			}
		}
	}
}

// cpu is the time that this process has taken, in seconds.
func cpu(b *testing.B) float64 {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Sec+u.Stime.Sec) + float64(u.Utime.Usec+u.Stime.Usec)/1e6
}

// BenchmarkMuxBesideStalled moves a MiB an operation over 100 connections of a
// session, with and without one beside them whose client reads nothing, or
// whose port does.
func BenchmarkMuxBesideStalled(b *testing.B) {
	const conns, unit, stalledPort = 100, 1 << 20, 1
	for _, stalled := range []string{"none", "client", "port"} {
		b.Run(stalled, func(b *testing.B) {
			each := max(int64(b.N)*unit/conns, 1)
			port := backend(b, func(c *net.TCPConn) {
				io.CopyN(c, endless{}, each)
				c.CloseWrite()
				io.Copy(io.Discard, c)
			})
			s := servePortForward(b, PortForwardRequest{}, Options{}, func(ctx context.Context, to uint16) (PortStream, error) {
				if to == stalledPort {
					return newCountedBackend(), nil
				}
				return dialLoopback(ctx, to)
			})
			c := dialMux(b, s.URL, MuxOptions{})
			defer c.Close()
			if stalled != "none" {
				stream := mustDial(b, c, stalledPort)
				if stalled == "port" {
					go io.Copy(stream, endless{}) // ends with the session
				}
				eventually(b, "a full window", func() bool {
					stream.mu.Lock()
					defer stream.mu.Unlock()
					return stalled == "port" && stream.credit == 0 || stalled == "client" && stream.left == 0
				})
			}
			b.SetBytes(unit)
			b.ResetTimer()
			var wg sync.WaitGroup
			for range conns {
				wg.Go(func() {
					stream := mustDial(b, c, port)
					if n, err := io.Copy(io.Discard, stream); n != each || err != nil {
						b.Error(n, err)
					}
					stream.Close()
				})
			}
			wg.Wait()
		})
	}
}
