//go:build linux

package main

import (
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	portforwardconstants "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// upstreamGroup is the API group of the upstream server.
const upstreamGroup = "upstream.bench.aaserver.io"

// runUpstream is the least server that forwards ports with what Kubernetes has
// for it: client-go's tunnelling connection, the SPDY connection of
// k8s.io/streaming, and a pair of io.Copy for each connection, as
// k8s.io/cri-streaming does. It checks nothing.
func runUpstream(args []string) error {
	flags := flag.NewFlagSet("upstream", flag.ExitOnError)
	backend := flags.String("backend", "", "where all connections lead")
	certFile := flags.String("cert", "", "")
	keyFile := flags.String("key", "", "")
	flags.Parse(args)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("Forwarding from %s\n", listener.Addr())
	upgrader := websocket.Upgrader{Subprotocols: []string{portforwardconstants.WebsocketsSPDYTunnelingPortForwardV1}}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !websocket.IsWebSocketUpgrade(r) {
			return // kube-aggregator asks whether the group is there
		}
		conn, err := upgrader.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		serveUpstream(portforward.NewTunnelingConnection("server", conn), *backend)
	})}
	return server.ServeTLS(listener, *certFile, *keyFile)
}

// serveUpstream serves a session until its client goes.
func serveUpstream(conn net.Conn, backend string) {
	var mu sync.Mutex
	errorStreams := map[string]httpstream.Stream{}
	session, err := spdy.NewServerConnection(conn, func(stream httpstream.Stream, replied <-chan struct{}) error {
		id := stream.Headers().Get(corev1.PortForwardRequestIDHeader)
		mu.Lock()
		defer mu.Unlock()
		if stream.Headers().Get(corev1.StreamType) == corev1.StreamTypeError {
			errorStreams[id] = stream
			return nil
		}
		errorStream := errorStreams[id]
		delete(errorStreams, id)
		go func() {
			<-replied
			defer stream.Close()
			defer errorStream.Close()
			next, err := net.Dial("tcp", backend)
			if err != nil {
				fmt.Fprint(errorStream, err)
				return
			}
			defer next.Close()
			go func() {
				io.Copy(next, stream)
				next.(*net.TCPConn).CloseWrite()
			}()
			io.Copy(stream, next)
		}()
		return nil
	})
	if err != nil {
		conn.Close()
		return
	}
	<-session.CloseChan()
}
