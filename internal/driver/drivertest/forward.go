package drivertest

import (
	"bytes"
	"io"
	"testing"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func testPort(t *testing.T, h Harness) {
	d, req, opened, refused := h.Port(t)
	dialer := open[driver.PortDialer](t, d, req)

	t.Run("bytes pass, and the directions end independently", func(t *testing.T) {
		stream, err := dialer.DialPort(bounded(t), "tcp", opened)
		if err != nil {
			t.Fatalf("DialPort: %v", err)
		}
		testStream(t, stream)
	})
	t.Run("a port where nothing listens is unavailable", func(t *testing.T) {
		_, err := dialer.DialPort(bounded(t), "tcp", refused)
		wantKind(t, err, driver.Unavailable)
	})
	t.Run("a network that there isn't is unsupported", func(t *testing.T) {
		_, err := dialer.DialPort(bounded(t), "sctp", opened)
		wantKind(t, err, driver.Unsupported)
	})
}

// testStream tests a connection to EchoAfterEOF, and closes it.
func testStream(t *testing.T, stream driver.Stream) {
	t.Helper()
	defer stream.Close()
	data := random(1 << 20)
	if _, err := stream.Write(data); err != nil {
		t.Fatalf("Write: %v", err)
	}
	if err := stream.CloseWrite(); err != nil {
		t.Fatalf("CloseWrite: %v", err)
	}
	got, err := io.ReadAll(stream)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes of %d: %v", len(got), len(data), err)
	}
}

func testDatagrams(t *testing.T, h Harness) {
	d, req, port := h.Datagrams(t)
	stream, err := open[driver.PortDialer](t, d, req).DialPort(bounded(t), "udp", port)
	if err != nil {
		t.Fatalf("DialPort: %v", err)
	}
	defer stream.Close()
	// What is lost for good would leave the test waiting.
	stop := closeLate(t, stream)
	defer stop()
	buf := make([]byte, 64<<10)
	echo := func(data []byte) {
		t.Helper()
		if n, err := stream.Write(data); n != len(data) || err != nil {
			t.Fatalf("Write: %d of %d bytes, %v", n, len(data), err)
		}
	}
	want := func(data []byte) {
		t.Helper()
		n, err := stream.Read(buf)
		if err != nil || !bytes.Equal(buf[:n], data) {
			t.Fatalf("read %d bytes, want a datagram of %d: %v", n, len(data), err)
		}
	}
	for _, size := range []int{1, 1200, 9000, 0, 60000} {
		data := random(size)
		echo(data)
		want(data)
	}
	// Neither is one with the other.
	echo([]byte("first"))
	echo([]byte("second"))
	want([]byte("first"))
	want([]byte("second"))
	if err := stream.CloseWrite(); err != nil {
		t.Errorf("CloseWrite: %v", err)
	}
	echo([]byte("there are no directions that end"))
	want([]byte("there are no directions that end"))
}

func testSocket(t *testing.T, h Harness) {
	d, req, opened, refused := h.Socket(t)
	dialer := open[driver.SocketDialer](t, d, req)

	t.Run("bytes pass, and the directions end independently", func(t *testing.T) {
		stream, err := dialer.DialSocket(bounded(t), opened)
		if err != nil {
			t.Fatalf("DialSocket: %v", err)
		}
		testStream(t, stream)
	})
	for name, test := range map[string]struct {
		path string
		want driver.Kind
	}{
		"a socket where nobody listens is unavailable": {refused, driver.Unavailable},
		"a path where nothing is isn't found":          {opened + "-none", driver.NotFound},
		"one below a socket isn't found":               {opened + "/none", driver.NotFound},
		"a directory is no socket":                     {"/proc", driver.Invalid},
		"a file is no socket":                          {"/proc/version", driver.Invalid},
		"a path over a link is invalid":                {"/proc/self/root" + opened, driver.Invalid},
		"a path that isn't absolute is invalid":        {opened[1:], driver.Invalid},
		"a path that isn't clean is invalid":           {"/proc/.." + opened, driver.Invalid},
		"the root is no path of a socket":              {"/", driver.Invalid},
		"no path is none":                              {"", driver.Invalid},
		"a path with a NUL is invalid":                 {opened + "\x00", driver.Invalid},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := dialer.DialSocket(bounded(t), test.path)
			wantKind(t, err, test.want)
		})
	}
}

func testListen(t *testing.T, h Harness) {
	d, req := h.Instance(t, Instance{Script: idle})
	host := open[driver.PortListener](t, d, req)
	listen := func(t *testing.T, ports ...v1.PortRange) driver.Listener {
		t.Helper()
		l, err := host.ListenPort(bounded(t), ports)
		if err != nil {
			t.Fatalf("ListenPort: %v", err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	accept := func(t *testing.T, l driver.Listener) driver.Stream {
		t.Helper()
		defer closeLate(t, l)()
		stream, err := l.Accept()
		if err != nil {
			t.Fatalf("Accept: %v", err)
		}
		t.Cleanup(func() { stream.Close() })
		return stream
	}
	any := v1.PortRange{Port: 1024, EndPort: 1<<16 - 1}

	t.Run("connections come as streams, and outlive the listener", func(t *testing.T) {
		l := listen(t, any)
		for range 2 {
			client := h.Loopback(t, l.Port())
			stream := accept(t, l)
			done := make(chan struct{})
			go func() {
				defer close(done)
				EchoAfterEOF(client)
			}()
			if err := l.Close(); err != nil {
				t.Fatalf("Close: %v", err)
			}
			testStream(t, stream)
			<-done
			l = listen(t, any)
		}
	})
	t.Run("a listener that is closed accepts no more, and its port is free again", func(t *testing.T) {
		l := listen(t, any)
		port := int32(l.Port())
		failed := make(chan error, 1)
		go func() {
			_, err := l.Accept()
			failed <- err
		}()
		_, err := host.ListenPort(bounded(t), []v1.PortRange{{Port: port, EndPort: port}})
		wantKind(t, err, driver.Unavailable)
		for range 2 {
			if err := l.Close(); err != nil {
				t.Errorf("Close: %v", err)
			}
		}
		select {
		case err := <-failed:
			if err == nil {
				t.Error("Accept of a closed listener has a connection")
			}
		case <-bounded(t).Done():
			t.Error("Accept goes on after Close")
		}
		if got := listen(t, v1.PortRange{Port: port, EndPort: port}).Port(); int32(got) != port {
			t.Errorf("listening on port %d, want %d", got, port)
		}
	})
	t.Run("of several ports one that is free is taken", func(t *testing.T) {
		taken := int32(listen(t, any).Port())
		l := listen(t, v1.PortRange{Port: taken, EndPort: taken}, any)
		if got := int32(l.Port()); got == taken || got < any.Port {
			t.Errorf("listening on port %d, which is taken or wasn't given", got)
		}
	})
}

// closeLate ends what hangs.
func closeLate(t *testing.T, c io.Closer) (stop func()) {
	ctx := bounded(t)
	done := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-ctx.Done():
			c.Close()
		case <-done:
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}
