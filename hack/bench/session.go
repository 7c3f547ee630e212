//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	portforwardconstants "k8s.io/apimachinery/pkg/util/portforward"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/streaming/pkg/httpstream"

	"aaserver.io/aaserver/streaming"
)

// config is what client-go needs to ask kube-apiserver.
func (c *cluster) config() *rest.Config {
	return &rest.Config{
		Host: c.info.APIServerURL,
		TLSClientConfig: rest.TLSClientConfig{
			CAFile: c.info.ClusterCA.CertFile, CertFile: c.info.Admin.CertFile, KeyFile: c.info.Admin.KeyFile,
		},
	}
}

// url is a target's subresource behind kube-apiserver. A query comes in pairs.
func (c *cluster) url(target, subresource string, query ...string) (*url.URL, error) {
	u, err := url.Parse(c.info.APIServerURL + targetPath(target) + "/" + subresource)
	if err != nil {
		return nil, err
	}
	values := url.Values{}
	for i := 0; i < len(query); i += 2 {
		values.Add(query[i], query[i+1])
	}
	u.RawQuery = values.Encode()
	return u, nil
}

// dial opens a WebSocket.
func (c *cluster) dial(ctx context.Context, u *url.URL, subprotocols ...string) (*websocket.Conn, error) {
	dialer := websocket.Dialer{TLSClientConfig: c.client.tls.Clone(), Subprotocols: subprotocols, ReadBufferSize: 32 << 10, WriteBufferSize: 32 << 10}
	secure := *u
	secure.Scheme = "wss"
	conn, response, err := dialer.DialContext(ctx, secure.String(), nil)
	if err != nil && response != nil {
		text, _ := io.ReadAll(response.Body)
		err = fmt.Errorf("%w: %s: %s", err, response.Status, text)
	}
	return conn, err
}

// exec runs a command by client-go, over WebSocket or SPDY.
func (c *cluster) exec(ctx context.Context, spdy bool, target string, options remotecommand.StreamOptions, command ...string) error {
	var query []string
	for name, wanted := range map[string]bool{"stdin": options.Stdin != nil, "stdout": options.Stdout != nil, "stderr": options.Stderr != nil, "tty": options.Tty} {
		if wanted {
			query = append(query, name, "true")
		}
	}
	for _, arg := range command {
		query = append(query, "command", arg)
	}
	u, err := c.url(target, "exec", query...)
	if err != nil {
		return err
	}
	var executor remotecommand.Executor
	if spdy {
		executor, err = remotecommand.NewSPDYExecutor(c.config(), http.MethodPost, u)
	} else {
		executor, err = remotecommand.NewWebSocketExecutor(c.config(), http.MethodGet, u.String())
	}
	if err != nil {
		return err
	}
	return executor.StreamWithContext(ctx, options)
}

// echoed runs cat with so many bytes, and wants them back.
func (c *cluster) echoed(ctx context.Context, spdy bool, target string, size int) error {
	sent := make([]byte, size)
	rand.Read(sent)
	var got bytes.Buffer
	err := c.exec(ctx, spdy, target, remotecommand.StreamOptions{Stdin: bytes.NewReader(sent), Stdout: &got}, "cat")
	if err == nil && !bytes.Equal(got.Bytes(), sent) {
		err = fmt.Errorf("%d of %d bytes came back, or others", got.Len(), size)
	}
	return err
}

// openMux opens a session of our own protocol.
func (c *cluster) openMux(ctx context.Context, target string) (*streaming.MuxClient, error) {
	u, err := c.url(target, "portforward")
	if err != nil {
		return nil, err
	}
	conn, err := c.dial(ctx, u, streaming.MuxProtocol)
	if err != nil {
		return nil, err
	}
	return streaming.NewMuxClient(conn, streaming.MuxOptions{})
}

// openTunnel opens a session as client-go does.
func (c *cluster) openTunnel(target string) (httpstream.Connection, error) {
	u, err := c.url(target, "portforward")
	if err != nil {
		return nil, err
	}
	dialer, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, c.config())
	if err != nil {
		return nil, err
	}
	conn, protocol, err := dialer.Dial(portforwardconstants.PortForwardV1Name)
	if err == nil && protocol != portforwardconstants.PortForwardV1Name {
		err = errors.Join(fmt.Errorf("the protocol is %q", protocol), conn.Close())
	}
	return conn, err
}

// dialTunnel opens a connection to a port, as client-go does.
func dialTunnel(session httpstream.Connection, id int, port int) (httpstream.Stream, error) {
	headers := http.Header{}
	headers.Set(corev1.StreamType, corev1.StreamTypeError)
	headers.Set(corev1.PortHeader, strconv.Itoa(port))
	headers.Set(corev1.PortForwardRequestIDHeader, strconv.Itoa(id))
	errorStream, err := session.CreateStream(headers)
	if err != nil {
		return nil, err
	}
	errorStream.Close() // nothing is sent on it
	headers.Set(corev1.StreamType, corev1.StreamTypeData)
	return session.CreateStream(headers)
}

// fetch has the backend send so many bytes over a connection to it.
func fetch(conn io.ReadWriter, size int64) error {
	if _, err := conn.Write(binary.BigEndian.AppendUint64([]byte{wantBytes}, uint64(size))); err != nil {
		return err
	}
	got, err := io.Copy(io.Discard, conn)
	if err == nil && got != size {
		err = fmt.Errorf("%d of %d bytes came", got, size)
	}
	return err
}

// readLog reads a log until ctx ends or the log does, and returns how many
// lines came.
func (c *cluster) readLog(ctx context.Context, webSocket bool, target string, query ...string) (lines int, err error) {
	u, err := c.url(target, "log", query...)
	if err != nil {
		return 0, err
	}
	count := func(p []byte) { lines += bytes.Count(p, []byte{'\n'}) }
	if webSocket {
		conn, err := c.dial(ctx, u, "binary.k8s.io")
		if err != nil {
			return 0, err
		}
		defer conn.Close()
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		for {
			_, message, err := conn.ReadMessage()
			count(message)
			switch {
			case ctx.Err() != nil || websocket.IsCloseError(err, websocket.CloseNormalClosure):
				return lines, nil
			case err != nil:
				return lines, err
			}
		}
	}
	response, err := c.client.open(ctx, c.client.http, request{path: strings.TrimPrefix(u.String(), c.client.base)})
	if err != nil {
		if ctx.Err() != nil {
			err = nil
		}
		return 0, err
	}
	defer response.Body.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := response.Body.Read(buf)
		count(buf[:n])
		switch {
		case errors.Is(err, io.EOF) || ctx.Err() != nil:
			return lines, nil
		case err != nil:
			return lines, err
		}
	}
}
