package streaming

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"sync"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// dialMux starts a session with a server.
func dialMux(t testing.TB, address string, opts MuxOptions) *MuxClient {
	t.Helper()
	c, err := NewMuxClient(mustDialWebSocket(t, address, MuxProtocol), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func mustDial(t testing.TB, c *MuxClient, port uint16) *MuxStream {
	t.Helper()
	s, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: port})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestMuxEchoes(t *testing.T) {
	s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
	c := dialMux(t, s.URL, MuxOptions{})
	port := echoBackend(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			stream := mustDial(t, c, port)
			data := random(t, 2_700_000+i)
			var writer sync.WaitGroup
			writer.Go(func() {
				if _, err := stream.Write(data); err != nil {
					t.Error(err)
				}
				stream.CloseWrite()
			})
			got, err := io.ReadAll(stream)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("got %d bytes back that differ from the %d sent, %v", len(got), len(data), err)
			}
			writer.Wait()
			stream.Close()
		})
	}
	wg.Wait()
	c.mu.Lock()
	if n := len(c.conn.streams); n != 0 {
		t.Errorf("%d streams are left", n)
	}
	c.mu.Unlock()
	c.Close()
	if err := s.result(t); err != nil {
		t.Errorf("ServePortForward: %v", err)
	}
}

func TestMuxDialIsRefused(t *testing.T) {
	s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
		return ServePortForward(w, r, PortForwardRequest{}, Options{}, PortForwardBackend{Dial: func(context.Context, Endpoint) (PortStream, error) {
			return nil, apierrors.NewForbidden(schema.GroupResource{Resource: "targets"}, "web", errors.New("not that port"))
		}})
	})
	c := dialMux(t, s.URL, MuxOptions{})
	_, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: 1})
	if !apierrors.IsForbidden(err) {
		t.Errorf("got %v", err)
	}
}
