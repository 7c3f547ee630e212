//go:build linux

package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
)

// roles are what this program is when it is started by itself as a part of
// what is measured: a process of its own, whose processor time can be told
// apart. The role is the first argument.
var roles = map[string]func(args []string) error{
	"role-backend":   runBackend,
	"role-relay":     runRelay,
	"role-client-go": runClientGo,
	"role-exec":      runExecServer,
	"role-upstream":  runUpstream,
	produceRole:      produceLines,
	serveFilesRole:   serveFiles,
}

// A client of the backend says what it wants by one byte and a length in eight
// bytes, the higher ones first.
const (
	wantBytes = 'd' // that many bytes, and the end
	sendBytes = 'u' // it sends that many, and gets one byte back
)

// runBackend is the service that is forwarded to.
func runBackend(args []string) error {
	flags := flag.NewFlagSet("backend", flag.ExitOnError)
	address := flags.String("listen", "127.0.0.1:0", "")
	flags.Parse(args)
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go serveBackend(conn.(*net.TCPConn))
	}
}

func serveBackend(conn *net.TCPConn) {
	defer conn.Close()
	var head [9]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return
	}
	size := int64(binary.BigEndian.Uint64(head[1:]))
	if head[0] == sendBytes {
		if n, err := io.Copy(io.Discard, io.LimitReader(conn, size)); err == nil && n == size {
			conn.Write([]byte{'.'})
		}
		return
	}
	chunk := make([]byte, 256<<10)
	for size > 0 {
		n, err := conn.Write(chunk[:min(size, int64(len(chunk)))])
		if err != nil {
			return
		}
		size -= int64(n)
	}
}

// runRelay copies connections, and does nothing else: what a hop costs if
// nobody multiplexes, authorizes or counts.
func runRelay(args []string) error {
	flags := flag.NewFlagSet("relay", flag.ExitOnError)
	to := flags.String("to", "", "the next hop's address")
	accepts := flags.Bool("accept-tls", false, "")
	dials := flags.Bool("dial-tls", false, "")
	certFile := flags.String("cert", "", "")
	keyFile := flags.String("key", "", "")
	flags.Parse(args)
	cert, err := tls.LoadX509KeyPair(*certFile, *keyFile)
	if err != nil {
		return err
	}
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	if len(cert.Certificate) > 1 { // the authority that signed it
		ca, err := x509.ParseCertificate(cert.Certificate[1])
		if err != nil {
			return err
		}
		roots.AddCert(ca)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("Forwarding from %s\n", listener.Addr())
	if *accepts {
		listener = tls.NewListener(listener, &tls.Config{Certificates: []tls.Certificate{cert}})
	}
	dial := func() (net.Conn, error) { return net.Dial("tcp", *to) }
	if *dials {
		dial = func() (net.Conn, error) {
			return tls.Dial("tcp", *to, &tls.Config{RootCAs: roots, ServerName: "127.0.0.1"})
		}
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go relay(conn, dial)
	}
}

func relay(conn net.Conn, dial func() (net.Conn, error)) {
	defer conn.Close()
	next, err := dial()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer next.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyHalf(next, conn)
	}()
	copyHalf(conn, next)
	<-done
}

func copyHalf(to, from net.Conn) {
	_, err := io.Copy(to, from)
	if half, ok := to.(interface{ CloseWrite() error }); ok && err == nil {
		half.CloseWrite()
		return
	}
	to.Close()
}

// runClientGo forwards a port as kubectl does: client-go's SPDY in a WebSocket.
func runClientGo(args []string) error {
	flags := flag.NewFlagSet("client-go", flag.ExitOnError)
	address := flags.String("url", "", "the subresource")
	var config rest.Config
	flags.StringVar(&config.CAFile, "ca", "", "")
	flags.StringVar(&config.CertFile, "cert", "", "")
	flags.StringVar(&config.KeyFile, "key", "", "")
	port := flags.String("port", "", "the target's port")
	flags.Parse(args)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	u, err := url.Parse(*address)
	if err != nil {
		return err
	}
	config.Host = u.Host
	dialer, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, &config)
	if err != nil {
		return err
	}
	// A line for each connection is nothing that anybody reads here.
	forwarder, err := portforward.NewOnAddressesForStreamingWithContext(ctx, dialer, []string{"127.0.0.1"}, []string{"0:" + *port}, make(chan struct{}), &firstLine{w: os.Stdout}, os.Stderr)
	if err != nil {
		return err
	}
	if err := forwarder.ForwardPorts(); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// firstLine drops all but the first write.
type firstLine struct {
	w    io.Writer
	done bool
}

func (f *firstLine) Write(p []byte) (int, error) {
	if f.done {
		return len(p), nil
	}
	f.done = true
	return f.w.Write(p)
}
