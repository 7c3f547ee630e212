//go:build unix

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"aaserver.io/aaserver/streaming"
)

func TestPortForwardForScripts(t *testing.T) {
	noLeaks(t)
	server := newTestServer(t, process("web"))
	b := newBackend(t)
	p := server.servePorts(b)
	p.listen = func(ctx context.Context, at streaming.Endpoint) (streaming.PortListener, error) {
		var config net.ListenConfig
		listener, err := config.Listen(ctx, "tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		return tcpListener{listener}, nil
	}
	pipe := func(t *testing.T) (*os.File, string) {
		t.Helper()
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer w.Close()
		t.Cleanup(func() { r.Close() })
		fd, err := syscall.Dup(int(w.Fd())) // the command closes it
		if err != nil {
			t.Fatal(err)
		}
		return r, fmt.Sprint(fd)
	}

	t.Run("all that listens is ready, and told as JSON", func(t *testing.T) {
		r, fd := pipe(t)
		socket := filepath.Join(t.TempDir(), "x.sock")
		cmd := server.start(nil, "port-forward", "--address=127.0.0.1", "web/web-0", ":80", socket+":81", ":82/udp", ":/run/app.sock", "-R", "0:3000", "-o", "json", "--ready-fd", fd)
		line, err := io.ReadAll(r)
		if err != nil || string(line) != "ready\n" {
			t.Fatalf("got %q, %v; stderr %q", line, err, cmd.errOut)
		}
		var got []announced
		decoder := json.NewDecoder(strings.NewReader(cmd.out.String()))
		for decoder.More() {
			var one announced
			if err := decoder.Decode(&one); err != nil {
				t.Fatal(err)
			}
			got = append(got, one)
		}
		if len(got) != 5 {
			t.Fatalf("stdout %q", cmd.out)
		}
		for i, port := range []*uint16{&got[0].Local.Port, nil, &got[2].Local.Port, &got[3].Local.Port, &got[4].Remote.Port} {
			if port == nil {
				continue
			}
			if *port == 0 {
				t.Errorf("no port in %+v", got[i])
			}
			if i == 0 {
				wantEcho(t, "tcp", fmt.Sprintf("127.0.0.1:%d", *port), b)
			}
			*port = 1
		}
		one := func(direction string, local, remote announcedEnd) announced {
			return announced{Namespace: "shop", Target: "web", Instance: "web-0", Direction: direction, Local: local, Remote: remote}
		}
		want := []announced{
			one("forward", announcedEnd{"tcp", "127.0.0.1", 1, ""}, announcedEnd{Protocol: "tcp", Port: 80}),
			one("forward", announcedEnd{Protocol: "unix", Path: socket}, announcedEnd{Protocol: "tcp", Port: 81}),
			one("forward", announcedEnd{"udp", "127.0.0.1", 1, ""}, announcedEnd{Protocol: "udp", Port: 82}),
			one("forward", announcedEnd{"tcp", "127.0.0.1", 1, ""}, announcedEnd{Protocol: "unix", Path: "/run/app.sock"}),
			one("reverse", announcedEnd{"tcp", "localhost", 3000, ""}, announcedEnd{Protocol: "tcp", Port: 1}),
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("stdout (-want +got):\n%s", diff)
		}
		cmd.says("Handling connection for ")
	})
	t.Run("a port that is taken isn't ready", func(t *testing.T) {
		r, fd := pipe(t)
		_, taken, _ := net.SplitHostPort(b.Addr().String())
		cmd := server.start(nil, "port-forward", "--address=127.0.0.1", "web", ":80", taken+":80", "--ready-fd", fd)
		if code := cmd.wait(); code != 1 {
			t.Errorf("exit code %d, want 1", code)
		}
		if line, err := io.ReadAll(r); err != nil || len(line) != 0 {
			t.Errorf("got %q, %v", line, err)
		}
		if want := "address already in use"; !strings.Contains(cmd.errOut.String(), want) {
			t.Errorf("stderr %q lacks %q", cmd.errOut, want)
		}
	})
	for name, test := range map[string]struct{ args, want string }{
		"a standard stream":               {"--ready-fd=1", "error: --ready-fd=1 is one of the standard streams: expected 3 or more, as in --ready-fd 3 3>file"},
		"a descriptor that isn't open":    {"--ready-fd=9999", "error: --ready-fd=9999 is not open: open it for the command, as in --ready-fd 9999 9999>file"},
		"a format that isn't known":       {"--output=yaml", "error: --output=yaml is not known: expected json"},
		"a reverse forward of nothing":    {"-R=1", "error: invalid reverse forward '1': expected REMOTE_PORT:LOCAL"},
		"a peer timeout that is no time ": {"--peer-timeout=soon", `invalid argument "soon" for "--peer-timeout" flag`},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := server.start(nil, "port-forward", "web", ":80", test.args)
			if code := cmd.wait(); code != 1 || !strings.Contains(cmd.errOut.String(), test.want) {
				t.Errorf("exit code %d, stderr %q, want 1 and %q", code, cmd.errOut, test.want)
			}
		})
	}
}
