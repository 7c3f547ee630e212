//go:build linux

package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

// console is an origin that the server allows.
const console = "https://console.example.com"

// testTargets are the demo's, and one to write to. The port closed has nothing
// that listens on it.
func testTargets() string {
	return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: web}
spec:
  agentName: local
  replicas: 2
  process: {command: [%[1]s, demo, web], args: ["--listen=127.0.0.1:$(AASERVER_PORT_HTTP)"]}
  ports: [{name: http, port: 8080}, {name: closed, port: 9}]
---
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: ticker}
spec: {agentName: local, process: {command: [%[1]s, demo, ticker]}}
---
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: shell}
spec:
  agentName: local
  terminationGracePeriodSeconds: 1
  process: {command: [%[1]s, demo, shell], stdin: true, tty: true}
---
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: echo}
spec:
  agentName: local
  terminationGracePeriodSeconds: 1
  process: {command: [sh, -c, 'while read line; do echo "out $line"; echo "err $line" >&2; done'], stdin: true}
`, binaries.server)
}

// withTargets is a new namespace with the targets, which are ready.
func withTargets(t *testing.T, a *aggregated, name string) string {
	t.Helper()
	namespace := a.cluster.namespace(t, name)
	a.kubectlStdin(testTargets(), "apply", "-n", namespace, "-f", "-")
	a.kubectl("wait", "-n", namespace, "targets", "--all", "--for=condition=Ready", "--timeout=60s")
	return namespace
}

// TestAggregated is what goes through kube-apiserver's own address: the streams
// by every protocol, and who may use them.
func TestAggregated(t *testing.T) {
	c := sharedCluster(t)
	audit := filepath.Join(t.TempDir(), "audit.log")
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte(`
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules: [{level: Metadata}]
`), 0o600); err != nil {
		t.Fatal(err)
	}
	a := c.serve(t, serveOptions{args: []string{"--allowed-origins", console, "--audit-policy-file", policy, "--audit-log-path", audit}})
	namespace := withTargets(t, a, "shop")

	for name, test := range map[string]func(*testing.T, *aggregated, string){
		"exec":                    testExec,
		"attach":                  testAttach,
		"port-forward":            testPortForward,
		"log":                     testLog,
		"plugin":                  testAggregatedPlugin,
		"kubectl":                 testAggregatedKubectl,
		"rights":                  testRights,
		"a policy for one stream": testStreamPolicy,
		"impersonation":           testImpersonation,
		"tokens":                  testTokens,
		"origins":                 testOrigins,
		"forged headers":          testForgedHeaders,
		"second names": func(t *testing.T, a *aggregated, namespace string) {
			testSecondNames(t, a, namespace, audit)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, a, namespace)
		})
	}
}

// executors are client-go's of every protocol that it speaks.
var executors = map[string]struct {
	halfClose bool
	make      func(*rest.Config, *url.URL) (remotecommand.Executor, error)
}{
	"WebSocket v5": {true, func(config *rest.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(config, http.MethodGet, u.String(), "v5.channel.k8s.io")
	}},
	"WebSocket v4": {false, func(config *rest.Config, u *url.URL) (remotecommand.Executor, error) {
		return remotecommand.NewWebSocketExecutorForProtocols(config, http.MethodGet, u.String(), "v4.channel.k8s.io")
	}},
	"SPDY v4": {true, func(config *rest.Config, u *url.URL) (remotecommand.Executor, error) {
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			return nil, err
		}
		return remotecommand.NewSPDYExecutorForProtocols(transport, upgrader, http.MethodPost, u, "v4.channel.k8s.io")
	}},
}

// oneSize is a terminal's size that never changes.
type oneSize struct {
	size chan remotecommand.TerminalSize
	done <-chan struct{}
}

func newSize(ctx context.Context, width, height uint16) oneSize {
	q := oneSize{make(chan remotecommand.TerminalSize, 1), ctx.Done()}
	q.size <- remotecommand.TerminalSize{Width: width, Height: height}
	return q
}

func (q oneSize) Next() *remotecommand.TerminalSize {
	select {
	case size := <-q.size:
		return &size
	case <-q.done:
		return nil
	}
}

// execPath asks for a command in a shell.
func execPath(namespace, target, script string, options ...string) string {
	query := append(options, "command=sh", "command=-c", "command="+url.QueryEscape(script))
	return targetPath(namespace, target, "exec", query...)
}

// wantExit fails unless a command ended with the exit code.
func wantExit(t *testing.T, err error, code int) {
	t.Helper()
	exit, ok := errors.AsType[utilexec.CodeExitError](err)
	if !ok || exit.Code != code {
		t.Errorf("the command ended with %v, want exit code %d", err, code)
	}
}

// noise is bytes that no protocol expects, of more than one frame.
func noise() []byte {
	b := make([]byte, 300_000)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	return b
}

func testExec(t *testing.T, a *aggregated, namespace string) {
	admin := a.with(t)
	for protocol, e := range executors {
		t.Run(protocol, func(t *testing.T) {
			executor := func(path string) remotecommand.Executor {
				executor, err := e.make(admin.config(), admin.url(path))
				if err != nil {
					t.Fatal(err)
				}
				return executor
			}
			input := noise()
			script := "cat; echo problem >&2; exit 7"
			if !e.halfClose {
				script = strings.Replace(script, "cat", "head -c "+strconv.Itoa(len(input)), 1)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			var stdout, stderr bytes.Buffer
			err := executor(execPath(namespace, "web", script, "stdin=true", "stdout=true", "stderr=true")).
				StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &stdout, Stderr: &stderr})
			wantExit(t, err, 7)
			if !bytes.Equal(stdout.Bytes(), input) || stderr.String() != "problem\n" {
				t.Errorf("of %d bytes %d came back, equal %t; stderr %q", len(input), stdout.Len(), bytes.Equal(stdout.Bytes(), input), stderr.String())
			}

			stdout.Reset()
			err = executor(execPath(namespace, "web", `until [ "$(stty size)" = "33 91" ]; do sleep 0.05; done; echo resized; exit 3`, "stdout=true", "tty=true", "stdin=true")).
				StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: blockedReader{ctx}, Stdout: &stdout, Tty: true, TerminalSizeQueue: newSize(ctx, 91, 33)})
			wantExit(t, err, 3)
			wantContains(t, "output", stdout.String(), "resized\r\n")
		})
	}
	for subprotocol, halfClose := range map[string]bool{"v4.base64.channel.k8s.io": false, "v5.base64.channel.k8s.io": true, "base64.channel.k8s.io": false} {
		t.Run("WebSocket "+subprotocol, func(t *testing.T) {
			input := noise()
			script := "cat; echo problem >&2; exit 7"
			if !halfClose {
				script = strings.Replace(script, "cat", "head -c "+strconv.Itoa(len(input)), 1)
			}
			ch := dialChannels(t, admin.with(t), execPath(namespace, "web", script, "stdin=true", "stdout=true", "stderr=true"), subprotocol)
			ch.send(0, input)
			if halfClose {
				ch.closeStdin()
			}
			got := ch.readAll()
			if !bytes.Equal(got[1], input) || string(got[2]) != "problem\n" {
				t.Errorf("of %d bytes %d came back; stderr %q", len(input), len(got[1]), got[2])
			}
			// The oldest protocol has a text in place of a Status.
			if subprotocol == "base64.channel.k8s.io" {
				wantContains(t, "error", string(got[3]), "exit code 7")
			} else {
				wantContains(t, "status", string(got[3]), `"NonZeroExitCode"`, `"7"`)
			}
		})
	}
	t.Run("a command that doesn't exist is refused before the upgrade", func(t *testing.T) {
		code, message := upgrade(t, admin.with(t), "WebSocket", targetPath(namespace, "web", "exec", "command=no-such", "stdout=true"), nil)
		if code != http.StatusBadRequest || !strings.Contains(message, "no-such") {
			t.Errorf("%d: %s", code, message)
		}
	})
}

// blockedReader has nothing to read until its context ends.
type blockedReader struct{ ctx context.Context }

func (r blockedReader) Read([]byte) (int, error) {
	<-r.ctx.Done()
	return 0, io.EOF
}

// channels are those of a WebSocket, by the byte or the digit that each message
// begins with.
type channels struct {
	t      *testing.T
	conn   *websocket.Conn
	base64 bool
}

func dialChannels(t *testing.T, c *client, path, subprotocol string) channels {
	t.Helper()
	conn, response, err := c.dial(path, nil, subprotocol)
	if err != nil {
		t.Fatalf("%v: %s", err, refusal(response))
	}
	if conn.Subprotocol() != subprotocol {
		t.Fatalf("the server chose %q", conn.Subprotocol())
	}
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	conn.SetWriteDeadline(time.Now().Add(time.Minute))
	return channels{t, conn, strings.Contains(subprotocol, "base64")}
}

func (c channels) send(channel byte, data []byte) {
	c.t.Helper()
	for chunk := range slices.Chunk(data, 16<<10) {
		message, kind := append([]byte{channel}, chunk...), websocket.BinaryMessage
		if c.base64 {
			message, kind = append([]byte{'0' + channel}, base64.StdEncoding.EncodeToString(chunk)...), websocket.TextMessage
		}
		if err := c.conn.WriteMessage(kind, message); err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c channels) closeStdin() {
	c.t.Helper()
	// The same in base64's protocol.
	if err := c.conn.WriteMessage(websocket.BinaryMessage, []byte{255, 0}); err != nil {
		c.t.Fatal(err)
	}
}

// next is a message and its channel.
func (c channels) next() (int, []byte, error) {
	_, message, err := c.conn.ReadMessage()
	if err != nil || len(message) == 0 {
		return -1, nil, err
	}
	if !c.base64 {
		return int(message[0]), message[1:], nil
	}
	data, err := base64.StdEncoding.DecodeString(string(message[1:]))
	return int(message[0] - '0'), data, err
}

// readAll collects what comes until the server closes in order.
func (c channels) readAll() map[int][]byte {
	c.t.Helper()
	got := map[int][]byte{}
	for {
		channel, data, err := c.next()
		if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
			return got
		}
		if err != nil {
			c.t.Fatalf("%v after %d bytes of output", err, len(got[1]))
		}
		got[channel] = append(got[channel], data...)
	}
}

func testAttach(t *testing.T, a *aggregated, namespace string) {
	// One after the other: they share the process.
	width := 80
	for protocol, e := range executors {
		width++ // a size that the terminal hasn't had
		t.Run(protocol, func(t *testing.T) {
			admin := a.with(t)
			executor, err := e.make(admin.config(), admin.url(targetPath(namespace, "echo", "attach", "stdin=true", "stdout=true", "stderr=true")))
			if err != nil {
				t.Fatal(err)
			}
			talk(t, executor, remotecommand.StreamOptions{}, protocol+"\n", "out "+protocol+"\n", "err "+protocol+"\n")

			executor, err = e.make(admin.config(), admin.url(targetPath(namespace, "shell", "attach", "stdin=true", "stdout=true", "tty=true")))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			talk(t, executor, remotecommand.StreamOptions{Tty: true, TerminalSizeQueue: newSize(ctx, uint16(width), 44)},
				"size\n", fmt.Sprintf("%d columns, 44 lines", width))
		})
	}
	t.Run("WebSocket v4.base64.channel.k8s.io", func(t *testing.T) {
		ch := dialChannels(t, a.with(t), targetPath(namespace, "echo", "attach", "stdin=true", "stdout=true", "stderr=true"), "v4.base64.channel.k8s.io")
		ch.send(0, []byte("hello\n"))
		got := map[int]string{}
		for !strings.Contains(got[1], "out hello\n") || !strings.Contains(got[2], "err hello\n") {
			channel, data, err := ch.next()
			if err != nil {
				t.Fatalf("%v after %v", err, got)
			}
			got[channel] += string(data)
		}
	})
	restarts := a.with(t).kubectl("get", "-n", namespace, "targets", "echo", "shell", "-o", "jsonpath={.items[*].status.instances[0].restartCount}")
	if restarts != "0 0" {
		t.Errorf("the processes restarted %s times: a client's leaving ended them", restarts)
	}
}

// talk says something until the answers have come, and leaves.
func talk(t *testing.T, executor remotecommand.Executor, opts remotecommand.StreamOptions, say string, want ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	in, stdin := io.Pipe()
	out := &lockedBuffer{}
	opts.Stdin, opts.Stdout = in, out
	if !opts.Tty {
		opts.Stderr = out
	}
	ended := make(chan error, 1)
	go func() {
		ended <- executor.StreamWithContext(ctx, opts)
	}()
	defer func() {
		cancel()
		stdin.Close()
		<-ended
	}()
	eventually(t, fmt.Sprintf("%q is answered", say), 30*time.Second, func() error {
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("the session ended with %v after %q", err, out)
		default:
		}
		if _, err := io.WriteString(stdin, say); err != nil {
			return err
		}
		for _, part := range want {
			if !strings.Contains(out.String(), part) {
				return fmt.Errorf("no %q in %q", part, out)
			}
		}
		return nil
	})
}

type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// forwardDialers are client-go's, by protocol.
var forwardDialers = map[string]func(*rest.Config, *url.URL) (httpstream.Dialer, error){
	"tunnel": func(config *rest.Config, u *url.URL) (httpstream.Dialer, error) {
		return portforward.NewSPDYOverWebsocketDialerForStreaming(u, config)
	},
	"SPDY": func(config *rest.Config, u *url.URL) (httpstream.Dialer, error) {
		transport, upgrader, err := spdy.RoundTripperFor(config)
		if err != nil {
			return nil, err
		}
		return spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, u), nil
	},
}

// forward forwards ports of a target until the test ends, and returns the local
// addresses.
func forward(t *testing.T, c *client, protocol, path string, ports ...string) []string {
	t.Helper()
	dialer, err := forwardDialers[protocol](c.config(), c.url(path))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{})
	messages := &lockedBuffer{}
	forwarder, err := portforward.NewOnAddressesForStreamingWithContext(ctx, dialer, []string{"127.0.0.1"}, ports, ready, messages, messages)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		ended <- forwarder.ForwardPorts()
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatalf("%s: %v\n%s", protocol, err, messages)
	case <-time.After(time.Minute):
		t.Fatalf("%s: not ready\n%s", protocol, messages)
	}
	got, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, port := range got {
		addresses = append(addresses, fmt.Sprintf("127.0.0.1:%d", port.Local))
	}
	return addresses
}

func testPortForward(t *testing.T, a *aggregated, namespace string) {
	for protocol := range forwardDialers {
		for _, name := range []string{"portforward", "port-forward"} {
			t.Run(protocol+" on "+name, func(t *testing.T) {
				addresses := forward(t, a.with(t), protocol, targetPath(namespace, "web", name), "0:8080", "0:9", "0:1")
				for range 3 {
					wantAnswer(t, addresses[0], "hello from web-")
					// Neither a port that nothing listens on nor one that isn't
					// in the spec takes the session along.
					wantRefused(t, addresses[1])
					wantRefused(t, addresses[2])
				}
				wantAnswer(t, addresses[0], "hello from web-")
			})
		}
	}
	for _, subprotocol := range []string{"v4.channel.k8s.io", "v4.base64.channel.k8s.io"} {
		t.Run("legacy WebSocket "+subprotocol, func(t *testing.T) {
			ch := dialChannels(t, a.with(t), targetPath(namespace, "web", "portforward", "ports=8080", "ports=9"), subprotocol)
			ch.send(0, []byte("GET / HTTP/1.0\r\n\r\n"))
			// The protocol can't say that a connection has ended: it is over
			// when the client goes.
			got := map[int][]byte{}
			for !bytes.Contains(got[0], []byte("hello from web-")) || !bytes.Contains(got[3], []byte("connection refused")) || len(got[1]) < 2 || len(got[2]) < 2 {
				channel, data, err := ch.next()
				if err != nil {
					t.Fatalf("%v after %v", err, got)
				}
				got[channel] = append(got[channel], data...)
			}
			for channel, port := range []uint16{8080, 8080, 9, 9} {
				if binary.LittleEndian.Uint16(got[channel]) != port {
					t.Errorf("channel %d begins with %q, want port %d", channel, got[channel][:2], port)
				}
			}
			if len(got[1]) > 2 || len(got[2]) > 2 {
				t.Errorf("an error of the port that works is %q, data of the one that doesn't %q", got[1][2:], got[2][2:])
			}
		})
	}
	t.Run("a port that isn't in the spec is refused before the upgrade, if it is named there", func(t *testing.T) {
		code, message := upgrade(t, a.with(t), "WebSocket", targetPath(namespace, "web", "portforward", "ports=1"), nil)
		if code != http.StatusForbidden || !strings.Contains(message, "http (8080 TCP), closed (9 TCP)") {
			t.Errorf("%d: %s", code, message)
		}
	})
}

func testLog(t *testing.T, a *aggregated, namespace string) {
	for _, name := range []string{"log", "logs"} {
		for proto, http1 := range map[string]bool{"HTTP/2.0": false, "HTTP/1.1": true} {
			t.Run(name+" over "+proto, func(t *testing.T) {
				admin := a.with(t)
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, admin.url(targetPath(namespace, "ticker", name, "follow=true")).String(), nil)
				if err != nil {
					t.Fatal(err)
				}
				response, err := admin.httpClient(http1).Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer response.Body.Close()
				if response.Proto != proto || response.StatusCode != http.StatusOK || !strings.HasPrefix(response.Header.Get("Content-Type"), "text/plain") {
					t.Errorf("%s %s, Content-Type %q", response.Proto, response.Status, response.Header.Get("Content-Type"))
				}
				wantTicks(t, response.Body)
			})
		}
	}
	for _, subprotocol := range []string{"binary.k8s.io", "base64.binary.k8s.io", ""} {
		t.Run("WebSocket "+subprotocol, func(t *testing.T) {
			var offer []string
			if subprotocol != "" {
				offer = []string{subprotocol}
			}
			conn, response, err := a.with(t).dial(targetPath(namespace, "ticker", "log", "follow=true"), nil, offer...)
			if err != nil {
				t.Fatalf("%v: %s", err, refusal(response))
			}
			if conn.Subprotocol() != subprotocol {
				t.Errorf("the server chose %q", conn.Subprotocol())
			}
			conn.SetReadDeadline(time.Now().Add(time.Minute))
			wantTicks(t, &messageReader{conn: conn, base64: strings.HasPrefix(subprotocol, "base64")})
		})
	}
	t.Run("a limit ends a log in order", func(t *testing.T) {
		conn, response, err := a.with(t).dial(targetPath(namespace, "ticker", "log", "follow=true", "limitBytes=10"), nil, "binary.k8s.io")
		if err != nil {
			t.Fatalf("%v: %s", err, refusal(response))
		}
		text, err := io.ReadAll(&messageReader{conn: conn})
		if err != nil || string(text) != "tick 1\ntic" {
			t.Errorf("%q, %v", text, err)
		}
	})
}

// messageReader reads the messages of a log, to a close in order.
type messageReader struct {
	conn   *websocket.Conn
	base64 bool
	rest   []byte
}

func (r *messageReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		_, message, err := r.conn.ReadMessage()
		if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
			return 0, io.EOF
		}
		if err == nil && r.base64 {
			message, err = base64.StdEncoding.DecodeString(string(message))
		}
		if err != nil {
			return 0, err
		}
		r.rest = message
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// wantTicks reads the ticker's log from its first line to one that was written
// after it was opened.
func wantTicks(t *testing.T, log io.Reader) {
	t.Helper()
	begin := time.Now()
	next := newLineReader(log)
	for i := 1; ; i++ {
		line, err := next()
		if err != nil || line != fmt.Sprintf("tick %d", i) {
			t.Fatalf("line %d is %q, %v", i, line, err)
		}
		// What was there comes at once, what is new each second.
		if time.Since(begin) > 500*time.Millisecond {
			return
		}
	}
}

func newLineReader(r io.Reader) func() (string, error) {
	buf := make([]byte, 1)
	return func() (string, error) {
		var line strings.Builder
		for {
			if _, err := r.Read(buf); err != nil {
				return line.String(), err
			}
			if buf[0] == '\n' {
				return line.String(), nil
			}
			line.WriteByte(buf[0])
		}
	}
}

// testAggregatedPlugin uses the plugin by its name, as kubectl target.
func testAggregatedPlugin(t *testing.T, a *aggregated, namespace string) {
	for variables, spdy := range map[string]bool{"WebSocket": false, "SPDY": true} {
		t.Run(variables, func(t *testing.T) {
			admin := a.with(t)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
			defer cancel()
			target := func(args ...string) *exec.Cmd {
				cmd := admin.command(ctx, binaries.kubectl, append([]string{"target", "-n", namespace}, args...)...)
				cmd.Env = append(cmd.Env, fmt.Sprintf("KUBECTL_REMOTE_COMMAND_WEBSOCKETS=%t", !spdy), fmt.Sprintf("KUBECTL_PORT_FORWARD_WEBSOCKETS=%t", !spdy))
				return cmd
			}
			cmd := target("exec", "-i", "web", "--", "sh", "-c", "cat; echo problem >&2; exit 7")
			cmd.Stdin = strings.NewReader("some input")
			var stdout, stderr strings.Builder
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			cmd.Run()
			if code := cmd.ProcessState.ExitCode(); code != 7 || stdout.String() != "some input" || !strings.HasPrefix(stderr.String(), "problem\n") {
				t.Errorf("exec: exit code %d, stdout %q, stderr %q", code, stdout.String(), stderr.String())
			}

			forwarded := startLines(t, target("port-forward", "web", ":http"))
			forwarded.wait(t, "-> 8080")
			_, rest, _ := strings.Cut(forwarded.String(), "Forwarding from ")
			address, _, _ := strings.Cut(rest, " ->")
			wantAnswer(t, address, "hello from web-")

			attach := target("attach", "-i", "echo")
			in, err := attach.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			attached := startLines(t, attach)
			io.WriteString(in, "plugin by "+variables+"\n")
			attached.wait(t, "out plugin by "+variables+"\n", "err plugin by "+variables+"\n")
			in.Close()
		})
	}
	admin := a.with(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	startLines(t, admin.command(ctx, binaries.kubectl, "target", "logs", "-n", namespace, "-f", "ticker", "--prefix")).
		wait(t, "[ticker/ticker-0] tick 1\n[ticker/ticker-0] tick 2\n")
}

func testAggregatedKubectl(t *testing.T, a *aggregated, _ string) {
	admin := a.with(t)
	namespace := a.cluster.namespace(t, "kubectl")
	kubectl := func(args ...string) string {
		t.Helper()
		return admin.kubectl(append(args, "-n", namespace)...)
	}
	apply := func(manifest string, args ...string) string {
		t.Helper()
		return admin.kubectlStdin(manifest, append([]string{"apply", "-n", namespace, "-f", "-"}, args...)...)
	}
	manifest := func(replicas int, mode string) string {
		return fmt.Sprintf(`
apiVersion: streaming.aaserver.io/v1
kind: Target
metadata: {name: made}
spec:
  agentName: local
  replicas: %d
  terminationGracePeriodSeconds: 1
  process: {command: [sleep, "1000"], env: [{name: MODE, value: %s}]}
  ports: [{name: http, port: 8080}]
`, replicas, mode)
	}

	wantContains(t, "apply", apply(manifest(1, "a")), "created")
	wantContains(t, "apply again", apply(manifest(1, "b")), "configured")
	kubectl("wait", "target/made", "--for=condition=Ready", "--timeout=60s")
	wantContains(t, "get", kubectl("get", "tgt"), "NAME", "SOURCE", "READY", "INSTANCES", "AGE", "made", "1/1")
	wantContains(t, "get -o wide", kubectl("get", "targets", "-o", "wide"), "PORTS", "CLASS", "AGENT", "http:8080", "local")
	wantContains(t, "get by category", kubectl("get", "aaserver", "-o", "name"), "target.streaming.aaserver.io/made")
	wantContains(t, "describe", kubectl("describe", "target", "made"), "AllInstancesReady", "Host Port")

	wantContains(t, "apply --server-side", apply(manifest(1, "b"), "--server-side", "--field-manager=second", "--force-conflicts"), "serverside-applied")
	conflict := admin.run(binaries.kubectl, manifest(1, "c"), "apply", "--server-side", "--field-manager=third", "-n", namespace, "-f", "-")
	if conflict.code == 0 {
		t.Error("a server-side apply took a field from its manager")
	}
	wantContains(t, "a conflict", conflict.stderr, "conflict", `second`, ".spec.process.env")

	kubectl("scale", "target/made", "--replicas=3")
	kubectl("wait", "target/made", "--for=jsonpath={.status.readyReplicas}=3", "--timeout=60s")
	wantContains(t, "scale", kubectl("get", "--raw", apiPath+"/namespaces/"+namespace+"/targets/made/scale"), `"kind":"Scale"`, `"replicas":3`)

	editor := filepath.Join(t.TempDir(), "editor")
	if err := os.WriteFile(editor, []byte("#!/bin/sh\nsed -i 's/value: b$/value: edited/' \"$1\"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	edit := admin.command(ctx, binaries.kubectl, "edit", "target", "made", "-n", namespace)
	edit.Env = append(edit.Env, "KUBE_EDITOR="+editor)
	if out, err := edit.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wantContains(t, "the edited value", kubectl("get", "target", "made", "-o", "jsonpath={.spec.process.env[0].value}"), "edited")

	// What kube-apiserver merges into its own documents.
	wantContains(t, "explain", kubectl("explain", "target", "--recursive"), "terminationGracePeriodSeconds", "credentialsSecretRef", "restartCount")
	wantContains(t, "explain a field", kubectl("explain", "target.spec.process.workingDir"), "absolute path that the process starts in")
	wantContains(t, "api-resources", kubectl("api-resources", "--api-group="+apiGroup, "-o", "wide"), "targets", "tgt", "deletecollection", "aaserver")

	if got := admin.run(binaries.kubectl, strings.Replace(manifest(1, "a"), "replicas:", "replica:", 1), "create", "-n", namespace, "-f", "-"); got.code == 0 || !strings.Contains(got.stderr, `unknown field "spec.replica"`) {
		t.Errorf("an unknown field: %d, %s", got.code, got.stderr)
	}
	if got := admin.run(binaries.kubectl, manifest(1, "a"), "create", "-n", "no-such-namespace", "-f", "-"); got.code == 0 || !strings.Contains(got.stderr, `"no-such-namespace" not found`) {
		t.Errorf("a namespace that doesn't exist: %d, %s", got.code, got.stderr)
	}
	kubectl("delete", "target", "made", "--timeout=60s")
}

// refusal is what is known of a response to a handshake.
func refusal(response *http.Response) string {
	if response == nil {
		return "no response"
	}
	body, _ := io.ReadAll(io.LimitReader(response.Body, 4<<10))
	var status metav1.Status
	if json.Unmarshal(body, &status) == nil && status.Kind == "Status" {
		return response.Status + ": " + status.Message
	}
	return response.Status + ": " + string(body)
}

// upgrade asks for the upgrade of a stream, gives it up at once, and returns the
// status code with what a refusal said.
func upgrade(t *testing.T, c *client, protocol, path string, header http.Header) (int, string) {
	t.Helper()
	webSocket, spdyProtocol := "v5.channel.k8s.io", "v4.channel.k8s.io"
	if bare, _, _ := strings.Cut(path, "?"); strings.Contains(bare, "forward") {
		webSocket, spdyProtocol = "SPDY/3.1+portforward.k8s.io", "portforward.k8s.io"
	} else if strings.Contains(bare, "/log") {
		webSocket = "binary.k8s.io"
	}
	if protocol == "WebSocket" {
		conn, response, err := c.dial(path, header, webSocket)
		if response == nil {
			t.Fatal(err)
		}
		if conn != nil {
			conn.Close()
			return response.StatusCode, ""
		}
		return response.StatusCode, refusal(response)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, c.url(path).String(), nil)
	if err != nil {
		t.Fatal(err)
	}
	maps.Copy(req.Header, header)
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "SPDY/3.1")
	req.Header.Set("X-Stream-Protocol-Version", spdyProtocol)
	response, err := c.httpClient(true).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode == http.StatusSwitchingProtocols {
		return response.StatusCode, ""
	}
	return response.StatusCode, refusal(response)
}

const allUpgrades = "targets/exec targets/attach targets/portforward targets/port-forward"

// testRights is DESIGN.md's table of subresources and verbs.
func testRights(t *testing.T, a *aggregated, namespace string) {
	c := a.cluster
	other := c.namespace(t, "other")
	a.with(t).kubectlStdin(testTargets(), "apply", "-n", other, "-f", "-")
	a.with(t).kubectl("wait", "-n", other, "targets", "--all", "--for=condition=Ready", "--timeout=60s")

	streams := []string{"exec", "attach", "portforward", "port-forward"}
	paths := map[string]func(namespace string) string{
		"exec":         func(ns string) string { return targetPath(ns, "web", "exec", "command=true", "stdout=true") },
		"attach":       func(ns string) string { return targetPath(ns, "ticker", "attach", "stdout=true") },
		"portforward":  func(ns string) string { return targetPath(ns, "web", "portforward") },
		"port-forward": func(ns string) string { return targetPath(ns, "web", "port-forward") },
		"log":          func(ns string) string { return targetPath(ns, "web", "log") },
		"logs":         func(ns string) string { return targetPath(ns, "web", "logs") },
	}
	const (
		allowed  = ""
		noGet    = "cannot get resource"
		noCreate = "cannot create resource"
	)
	type want struct{ webSocket, spdy string }
	everything := func(w want) map[string]want {
		all := map[string]want{}
		for _, s := range streams {
			all[s] = w
		}
		return all
	}
	check := func(t *testing.T, who *client, namespace string, wants map[string]want) {
		t.Helper()
		for subresource, path := range paths {
			w, ok := wants[subresource]
			if !ok {
				// kube-apiserver refuses it, by the name that was used.
				name := ` "targets/` + subresource + `"`
				w = want{noGet + name, noCreate + name}
			}
			for protocol, want := range map[string]string{"WebSocket": w.webSocket, "SPDY": w.spdy} {
				if strings.HasPrefix(subresource, "log") && protocol == "SPDY" {
					continue // there is none
				}
				code, message := upgrade(t, who, protocol, path(namespace), nil)
				switch {
				case want == allowed && code != http.StatusSwitchingProtocols:
					t.Errorf("%s over %s: %d %s, want 101", subresource, protocol, code, message)
				case want != allowed && (code != http.StatusForbidden || !strings.Contains(message, want)):
					t.Errorf("%s over %s: %d %s, want 403 and %q", subresource, protocol, code, message, want)
				}
			}
		}
	}
	run := func(name string, rules []rule, test func(t *testing.T, who *client)) {
		t.Run(name, func(t *testing.T) { test(t, c.user(t, "user", rules...)) })
	}

	run("nothing", nil, func(t *testing.T, who *client) {
		check(t, who, namespace, nil)
		if r := who.run(binaries.kubectl, "", "get", "targets", "-n", namespace); r.code == 0 || !strings.Contains(r.stderr, "cannot list resource") {
			t.Errorf("get: %d %s", r.code, r.stderr)
		}
	})
	run("get only", []rule{{verbs: "get", resources: allUpgrades}}, func(t *testing.T, who *client) {
		check(t, who, namespace, everything(want{noCreate, noCreate}))
	})
	run("get of everything, as in read-only roles", []rule{{verbs: "get list watch", resources: "*"}}, func(t *testing.T, who *client) {
		wants := everything(want{noCreate, noCreate})
		wants["log"], wants["logs"] = want{}, want{}
		check(t, who, namespace, wants)
		wantContains(t, "get", who.kubectl("get", "targets", "-n", namespace), "web")
	})
	run("create only", []rule{{verbs: "create", resources: allUpgrades}}, func(t *testing.T, who *client) {
		check(t, who, namespace, everything(want{noGet, allowed}))
		// The plugin falls back to SPDY, and the command runs.
		if r := who.target("exec", "web", "-n", namespace, "--", "sh", "-c", "echo ran; exit 4"); r.code != 4 || r.stdout != "ran\n" {
			t.Errorf("exec: %+v", r)
		}
	})
	run("get and create", []rule{{verbs: "get create", resources: allUpgrades}}, func(t *testing.T, who *client) {
		check(t, who, namespace, everything(want{}))
		check(t, who, other, everything(want{}))
	})
	for subresource := range paths {
		run("one subresource only: "+subresource, []rule{{verbs: "get create", resources: "targets/" + subresource}}, func(t *testing.T, who *client) {
			w := want{}
			// kube-apiserver authorizes the name that the client used, and we the
			// canonical one: a second name alone isn't enough.
			switch subresource {
			case "port-forward":
				w = want{`cannot get resource "targets/portforward"`, `cannot create resource "targets/portforward"`}
			case "logs":
				w = want{`cannot get resource "targets/log"`, ""}
			}
			check(t, who, namespace, map[string]want{subresource: w})
		})
	}
	run("one namespace only", []rule{{namespace: namespace, verbs: "get create", resources: allUpgrades + " targets targets/log targets/logs"}}, func(t *testing.T, who *client) {
		wants := everything(want{})
		wants["log"], wants["logs"] = want{}, want{}
		check(t, who, namespace, wants)
		check(t, who, other, nil)
		wantContains(t, "get", who.kubectl("get", "target", "web", "-n", namespace), "web")
		if r := who.run(binaries.kubectl, "", "get", "target", "web", "-n", other); r.code == 0 || !strings.Contains(r.stderr, "cannot get resource") {
			t.Errorf("get in another namespace: %d %s", r.code, r.stderr)
		}
	})
	run("writing targets doesn't include entering them, nor their status", []rule{{verbs: "*", resources: "targets"}}, func(t *testing.T, who *client) {
		check(t, who, namespace, nil)
		for _, subresource := range []string{"status", "scale"} {
			r := who.run(binaries.kubectl, "", "patch", "target", "web", "-n", namespace, "--subresource="+subresource, "--type=merge", "-p", `{}`)
			if r.code == 0 || !strings.Contains(r.stderr, `resource "targets/`+subresource+`"`) {
				t.Errorf("%s: %d %s", subresource, r.code, r.stderr)
			}
		}
	})
	t.Run("roles of the manifest", func(t *testing.T) {
		for role, rights := range map[string]map[string]want{
			"view":  {"log": {}, "logs": {}},
			"edit":  {"exec": {}, "attach": {}, "portforward": {}, "port-forward": {}, "log": {}, "logs": {}},
			"admin": {"exec": {}, "attach": {}, "portforward": {}, "port-forward": {}, "log": {}, "logs": {}},
		} {
			who := c.user(t, role)
			name := userName(t, who)
			_, err := c.kube.RbacV1().RoleBindings(namespace).Create(t.Context(), &rbacv1.RoleBinding{
				ObjectMeta: metav1.ObjectMeta{Name: name},
				Subjects:   []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: name}},
				RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
			}, metav1.CreateOptions{})
			if err != nil {
				t.Fatal(err)
			}
			// The controller-manager collects what built-in roles consist of.
			wanted := map[string]string{"view": "targets/log", "edit": "targets/exec", "admin": "targets/exec"}[role]
			eventually(t, role+" is bound", 30*time.Second, func() error {
				if r := who.run(binaries.kubectl, "", "auth", "can-i", "get", wanted, "-n", namespace); r.code != 0 {
					return errors.New(r.stdout)
				}
				return nil
			})
			check(t, who, namespace, rights)
		}
	})
}

// userName is who a client with a certificate is.
func userName(t *testing.T, c *client) string {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(c.config().CertFile, c.config().KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	return pair.Leaf.Subject.CommonName
}

// testSecondNames looks for the canonical name in the server's audit log.
func testSecondNames(t *testing.T, a *aggregated, namespace, audit string) {
	who := a.cluster.user(t, "second-names", rule{verbs: "get create", resources: "targets/portforward targets/port-forward targets/log targets/logs"})
	name := userName(t, who)
	for _, subresource := range []string{"port-forward", "logs"} {
		if code, message := upgrade(t, who, "WebSocket", targetPath(namespace, "web", subresource), nil); code != http.StatusSwitchingProtocols {
			t.Fatalf("%s: %d %s", subresource, code, message)
		}
	}
	if code, message := upgrade(t, who, "SPDY", targetPath(namespace, "web", "port-forward"), nil); code != http.StatusSwitchingProtocols {
		t.Fatalf("port-forward over SPDY: %d %s", code, message)
	}
	type event struct {
		Verb, RequestURI string
		User             struct{ Username string }
		ObjectRef        struct{ Subresource string }
	}
	eventually(t, "the audit log has the three requests", 30*time.Second, func() error {
		text, err := os.ReadFile(audit)
		if err != nil {
			return err
		}
		var got []string
		for line := range strings.Lines(string(text)) {
			var e event
			if json.Unmarshal([]byte(line), &e) == nil && e.User.Username == name {
				path, _, _ := strings.Cut(e.RequestURI, "?")
				got = append(got, fmt.Sprintf("%s %s %s", e.Verb, e.ObjectRef.Subresource, path[strings.LastIndex(path, "/")+1:]))
			}
		}
		slices.Sort(got)
		want := []string{"create portforward portforward", "get log log", "get portforward portforward"}
		if !slices.Equal(got, want) {
			return fmt.Errorf("%q, want %q", got, want)
		}
		return nil
	})
}

// testStreamPolicy forbids a stream by its canonical name.
func testStreamPolicy(t *testing.T, a *aggregated, _ string) {
	admin := a.with(t)
	namespace := a.cluster.namespace(t, "policed")
	admin.kubectlStdin(testTargets(), "apply", "-n", namespace, "-f", "-")
	admin.kubectl("wait", "-n", namespace, "targets", "--all", "--for=condition=Ready", "--timeout=60s")
	policy := fmt.Sprintf(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: %[1]s}
spec:
  failurePolicy: Fail
  matchConstraints:
    resourceRules: [{apiGroups: [%[2]s], apiVersions: [v1], operations: [CONNECT], resources: [targets/portforward]}]
  validations: [{expression: "false", message: nobody forwards ports here, reason: Forbidden}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: %[1]s}
spec:
  policyName: %[1]s
  validationActions: [Deny]
  matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %[1]s}}}
`, namespace, apiGroup)
	admin.kubectlStdin(policy, "apply", "-f", "-")
	t.Cleanup(func() { admin.kubectlStdin(policy, "delete", "-f", "-") })
	eventually(t, "the policy holds", 30*time.Second, func() error {
		code, message := upgrade(t, admin, "WebSocket", targetPath(namespace, "web", "portforward"), nil)
		if code != http.StatusForbidden || !strings.Contains(message, "nobody forwards ports here") {
			return fmt.Errorf("%d %s", code, message)
		}
		return nil
	})
	for _, protocol := range []string{"WebSocket", "SPDY"} {
		for _, name := range []string{"portforward", "port-forward", "port-forward/", "port-forward?ports=8080"} {
			code, message := upgrade(t, admin, protocol, targetPath(namespace, "web", name), nil)
			if code != http.StatusForbidden || !strings.Contains(message, "nobody forwards ports here") {
				t.Errorf("%s over %s: %d %s", name, protocol, code, message)
			}
		}
		// However the name is written.
		for _, name := range []string{"port-forward//", "port-forward/x", "/port-forward", "./port-forward", "x/../port-forward", "%70ort-forward", "port%2Dforward", "port-forward%2F", "%2Fport-forward", "port-forward%3Fx"} {
			if code, message := upgrade(t, admin, protocol, targetPath(namespace, "web", name), nil); code < 300 {
				t.Errorf("%s over %s: %d %s", name, protocol, code, message)
			}
		}
		if code, message := upgrade(t, admin, protocol, targetPath(namespace, "web", "exec", "command=true", "stdout=true"), nil); code != http.StatusSwitchingProtocols {
			t.Errorf("exec over %s: %d %s", protocol, code, message)
		}
	}
	if r := admin.target("port-forward", "web", ":http", "-n", namespace); r.code == 0 || !strings.Contains(r.stderr, "nobody forwards ports here") {
		t.Errorf("the plugin: %d %s", r.code, r.stderr)
	}
}

func testImpersonation(t *testing.T, a *aggregated, namespace string) {
	c := a.cluster
	path := targetPath(namespace, "web", "exec", "command=true", "stdout=true")
	group := fmt.Sprintf("operators-%d", unique.Add(1))
	c.grant(t, rbacv1.Subject{Kind: rbacv1.GroupKind, APIGroup: rbacv1.GroupName, Name: group}, rule{verbs: "get create", resources: "targets/exec"})
	alice := userName(t, c.user(t, "alice", rule{verbs: "get create", resources: "targets/exec"}))
	mallory := c.user(t, "mallory", rule{verbs: "get create", resources: "targets/log"})
	deputy := c.user(t, "deputy", rule{group: "core", verbs: "impersonate", resources: "users"}, rule{group: "core", verbs: "impersonate", resources: "groups"})

	as := func(user string, groups ...string) http.Header {
		header := http.Header{"Impersonate-User": {user}}
		if len(groups) > 0 {
			header["Impersonate-Group"] = groups
		}
		return header
	}
	for what, tt := range map[string]struct {
		who    *client
		header http.Header
		want   int
		text   string
	}{
		"a deputy by itself":                {deputy, nil, http.StatusForbidden, "cannot "},
		"as a user who may":                 {deputy, as(alice), http.StatusSwitchingProtocols, ""},
		"as a user who may not":             {deputy, as("nobody"), http.StatusForbidden, `User "nobody" cannot `},
		"as a user in a group that may":     {deputy, as("nobody", group), http.StatusSwitchingProtocols, ""},
		"as a user in a group that may not": {deputy, as("nobody", "others"), http.StatusForbidden, `User "nobody" cannot `},
		"without the verb impersonate":      {mallory, as(alice), http.StatusForbidden, "cannot impersonate"},
		"a group without the verb":          {mallory, as(userName(t, mallory), group), http.StatusForbidden, "cannot impersonate"},
	} {
		for _, protocol := range []string{"WebSocket", "SPDY"} {
			if code, message := upgrade(t, tt.who.with(t), protocol, path, tt.header); code != tt.want || !strings.Contains(message, tt.text) {
				t.Errorf("%s over %s: %d %s, want %d %q", what, protocol, code, message, tt.want, tt.text)
			}
		}
	}
	// It is the same at the server's own port, to which anybody may come with a
	// token.
	_, token := c.serviceAccount(t, namespace, "robot", rule{verbs: "get create", resources: "targets/exec"})
	get, _ := direct(t, a, &tls.Config{})
	for user, want := range map[string]string{"admin": "cannot impersonate", "": `cannot list resource "targets"`} {
		header := http.Header{"Authorization": {"Bearer " + token}}
		if user != "" {
			header["Impersonate-User"], header["Impersonate-Group"] = []string{user}, []string{"system:masters"}
		}
		if code, message := get(apiPath+"/namespaces/"+namespace+"/targets", header); code != http.StatusForbidden || !strings.Contains(message, want) {
			t.Errorf("as %q at the server's own port: %s, want %q", user, message, want)
		}
	}
	if r := deputy.target("exec", "web", "-n", namespace, "--as=nobody", "--as-group="+group, "--", "echo", "ran"); r.code != 0 || r.stdout != "ran\n" {
		t.Errorf("the plugin: %+v", r)
	}
	if r := deputy.run(binaries.kubectl, "", "get", "targets", "-n", namespace, "--as="+alice); r.code == 0 || !strings.Contains(r.stderr, `"`+alice+`" cannot list`) {
		t.Errorf("kubectl: %+v", r)
	}
}

// direct is somebody at the server's own port.
func direct(t *testing.T, a *aggregated, transport *tls.Config) (get func(path string, header http.Header) (int, string), dial func(path string, header http.Header, subprotocols ...string) (*websocket.Conn, *http.Response, error)) {
	transport.RootCAs = a.ca.pool()
	h := &http.Client{Transport: &http.Transport{TLSClientConfig: transport, DisableKeepAlives: true}, Timeout: time.Minute}
	get = func(path string, header http.Header) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, a.url+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		maps.Copy(req.Header, header)
		response, err := h.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		return response.StatusCode, refusal(response)
	}
	dial = func(path string, header http.Header, subprotocols ...string) (*websocket.Conn, *http.Response, error) {
		t.Helper()
		dialer := websocket.Dialer{TLSClientConfig: transport, Subprotocols: subprotocols, HandshakeTimeout: time.Minute}
		conn, response, err := dialer.DialContext(t.Context(), "wss"+strings.TrimPrefix(a.url, "https")+path, header)
		if conn != nil {
			t.Cleanup(func() { conn.Close() })
		}
		return conn, response, err
	}
	return get, dial
}

// bearer is how a browser says who it is, beside the subprotocol that it wants:
// it can't set headers.
func bearer(token string) string {
	return "base64url.bearer.authorization.k8s.io." + base64.RawURLEncoding.EncodeToString([]byte(token))
}

func testTokens(t *testing.T, a *aggregated, namespace string) {
	c := a.cluster
	may, token := c.serviceAccount(t, namespace, "robot", rule{namespace: namespace, verbs: "get create", resources: "targets/exec"})
	mayNot, otherToken := c.serviceAccount(t, namespace, "visitor")
	path := execPath(namespace, "web", "echo ran; exit 5", "stdout=true")

	if r := may.target("exec", "web", "-n", namespace, "--", "sh", "-c", "echo ran; exit 5"); r.code != 5 || r.stdout != "ran\n" {
		t.Errorf("the plugin with a token: %+v", r)
	}
	for _, protocol := range []string{"WebSocket", "SPDY"} {
		if code, message := upgrade(t, may, protocol, path, nil); code != http.StatusSwitchingProtocols {
			t.Errorf("a token over %s: %d %s", protocol, code, message)
		}
		if code, message := upgrade(t, mayNot, protocol, path, nil); code != http.StatusForbidden || !strings.Contains(message, "system:serviceaccount:"+namespace+":visitor") {
			t.Errorf("a token without rights over %s: %d %s", protocol, code, message)
		}
	}

	anonymous := c.client(t, t.TempDir(), &clientcmdapi.AuthInfo{})
	through := func(path string, header http.Header, subprotocols ...string) (*websocket.Conn, *http.Response, error) {
		return anonymous.dial(path, header, subprotocols...)
	}
	_, straight := direct(t, a, &tls.Config{})
	for way, dial := range map[string]func(string, http.Header, ...string) (*websocket.Conn, *http.Response, error){
		"through kube-apiserver":   through,
		"at the server's own port": straight,
	} {
		conn, response, err := dial(path, http.Header{"Origin": {console}}, bearer(token), "v5.channel.k8s.io")
		if err != nil {
			t.Errorf("a token in the subprotocol, %s: %v: %s", way, err, refusal(response))
			continue
		}
		if conn.Subprotocol() != "v5.channel.k8s.io" {
			t.Errorf("%s, the server chose %q", way, conn.Subprotocol())
		}
		conn.SetReadDeadline(time.Now().Add(time.Minute))
		got := channels{t: t, conn: conn}.readAll()
		if string(got[1]) != "ran\n" || !strings.Contains(string(got[3]), `"5"`) {
			t.Errorf("%s: stdout %q, status %q", way, got[1], got[3])
		}

		for what, tt := range map[string]struct {
			subprotocols []string
			want         int
		}{
			"no token":               {[]string{"v5.channel.k8s.io"}, http.StatusForbidden},
			"a token without rights": {[]string{bearer(otherToken), "v5.channel.k8s.io"}, http.StatusForbidden},
			"a token that is none":   {[]string{bearer("nonsense"), "v5.channel.k8s.io"}, http.StatusUnauthorized},
			// The token alone isn't a protocol to speak.
			"a token and nothing else": {[]string{bearer(token)}, http.StatusUnauthorized},
		} {
			conn, response, err := dial(path, nil, tt.subprotocols...)
			if response == nil {
				t.Fatal(err)
			}
			if conn != nil || response.StatusCode != tt.want && (what != "a token and nothing else" || response.StatusCode != http.StatusForbidden) {
				t.Errorf("%s, %s: %s", what, way, refusal(response))
			}
		}
	}
}

func testOrigins(t *testing.T, a *aggregated, namespace string) {
	path := targetPath(namespace, "web", "exec", "command=true", "stdout=true")
	for origin, want := range map[string]int{
		console:                      http.StatusSwitchingProtocols,
		"https://evil.example.com":   http.StatusForbidden,
		console + ".evil.example":    http.StatusForbidden,
		"null":                       http.StatusForbidden,
		a.cluster.info.APIServerURL:  http.StatusForbidden, // what the browser sees isn't the server's own host
		"http://console.example.com": http.StatusForbidden,
	} {
		if code, message := upgrade(t, a.with(t), "WebSocket", path, http.Header{"Origin": {origin}}); code != want {
			t.Errorf("origin %s: %d %s, want %d", origin, code, message, want)
		}
	}
}

// testForgedHeaders says to be an administrator by kube-aggregator's headers.
func testForgedHeaders(t *testing.T, a *aggregated, namespace string) {
	c := a.cluster
	dir := t.TempDir()
	clientCert := func(ca *authority, name string) *tls.Config {
		pair := ca.issue(t, filepath.Join(dir, fmt.Sprint(unique.Add(1))), &x509.Certificate{
			Subject:     pkix.Name{CommonName: name},
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		loaded, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
		if err != nil {
			t.Fatal(err)
		}
		// Sent whatever CAs the server names.
		return &tls.Config{GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &loaded, nil }}
	}
	real, err := tls.LoadX509KeyPair(c.info.FrontProxyClient.CertFile, c.info.FrontProxyClient.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	frontProxy := real.Leaf.Subject.CommonName
	forged := http.Header{"X-Remote-User": {"forged"}, "X-Remote-Group": {"system:masters", "system:authenticated"}, "X-Remote-Uid": {"1"}, "X-Remote-Extra-Scopes": {"all"}}
	list := apiPath + "/namespaces/" + namespace + "/targets"
	for what, tt := range map[string]struct {
		tls  *tls.Config
		want []int
	}{
		"no certificate":                                      {&tls.Config{}, []int{http.StatusUnauthorized, http.StatusForbidden}},
		"a certificate of an unknown CA":                      {clientCert(newAuthority(t, "unknown"), frontProxy), []int{http.StatusUnauthorized}},
		"a certificate of an unknown CA with a familiar name": {clientCert(newAuthority(t, readAuthority(t, c.info.FrontProxyCA).cert.Subject.CommonName), frontProxy), []int{http.StatusUnauthorized}},
		"a certificate of the CA of clients":                  {clientCert(readAuthority(t, c.info.ClusterCA), frontProxy), []int{http.StatusForbidden}},
		"another name of the front proxy's CA":                {clientCert(readAuthority(t, c.info.FrontProxyCA), "somebody"), []int{http.StatusUnauthorized, http.StatusForbidden}},
		"the server's own CA":                                 {clientCert(a.ca, frontProxy), []int{http.StatusUnauthorized}},
	} {
		get, dial := direct(t, a, tt.tls)
		if code, message := get(list, forged); !slices.Contains(tt.want, code) || strings.Contains(message, `"forged"`) {
			t.Errorf("%s: %s, want %v", what, message, tt.want)
		}
		_, response, err := dial(targetPath(namespace, "web", "exec", "command=true", "stdout=true"), forged, "v5.channel.k8s.io")
		if response == nil {
			t.Errorf("%s: %v", what, err)
		} else if !slices.Contains(tt.want, response.StatusCode) {
			t.Errorf("exec with %s: %s, want %v", what, refusal(response), tt.want)
		}
	}
	get, _ := direct(t, a, &tls.Config{Certificates: []tls.Certificate{real}})
	if code, message := get(list, forged); code != http.StatusOK {
		t.Errorf("the front proxy itself: %s", message)
	}

	t.Run("through kube-apiserver", func(t *testing.T) {
		// It takes such headers of a client's for nothing, and passes none on.
		who := c.user(t, "forger")
		if code, message := upgrade(t, who, "WebSocket", targetPath(namespace, "web", "exec", "command=true", "stdout=true"), forged); code != http.StatusForbidden || !strings.Contains(message, userName(t, who)) {
			t.Errorf("exec: %d %s", code, message)
		}
	})
}

// TestLongRunning has a kube-apiserver that cuts what it doesn't take for
// long-running after 5 s.
func TestLongRunning(t *testing.T) {
	t.Parallel()
	const (
		timeout = 5 * time.Second
		idle    = 20 * time.Second
	)
	c := startCluster(t, "--apiserver-arg=--request-timeout="+timeout.String())
	a := c.serve(t, serveOptions{})
	namespace := withTargets(t, a, "long")
	admin := a.with(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()

	// follow reads the ticker's log until it breaks or has lasted.
	follow := func(log io.Reader) (time.Duration, error) {
		begin := time.Now()
		next := newLineReader(log)
		for i := 1; time.Since(begin) < idle; i++ {
			line, err := next()
			if err != nil {
				return time.Since(begin), err
			}
			if want := fmt.Sprintf("tick %d", i); line != want {
				return time.Since(begin), fmt.Errorf("a line is %q, want %q", line, want)
			}
		}
		return time.Since(begin), nil
	}
	plain := func(name string, client *http.Client) (time.Duration, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.info.APIServerURL+targetPath(namespace, "ticker", name, "follow=true"), nil)
		if err != nil {
			return 0, err
		}
		response, err := client.Do(req)
		if err != nil {
			return 0, err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return 0, errors.New(refusal(response))
		}
		return follow(response.Body)
	}
	lasts := func(what string, lasted time.Duration, err error) {
		if err != nil {
			t.Errorf("%s ended after %s: %v", what, lasted, err)
		}
	}
	// pause is how long nothing is said. It is what is tested: no condition
	// could be waited for instead.
	pause := func() {
		select {
		case <-time.After(idle):
		case <-ctx.Done():
		}
	}

	var all sync.WaitGroup
	for _, http1 := range []bool{false, true} {
		client := admin.httpClient(http1)
		all.Go(func() {
			lasted, err := plain("log", client)
			lasts(fmt.Sprintf("log (HTTP/1.1: %t)", http1), lasted, err)
		})
		all.Go(func() {
			// kube-apiserver doesn't know the second name.
			lasted, err := plain("logs", client)
			if err == nil || lasted > 2*timeout {
				t.Errorf("logs (HTTP/1.1: %t) lasted %s (%v): docs/targets.md says that it doesn't", http1, lasted, err)
			}
		})
	}
	for _, name := range []string{"log", "logs"} {
		conn, response, err := admin.dial(targetPath(namespace, "ticker", name, "follow=true"), nil, "binary.k8s.io")
		if err != nil {
			t.Fatalf("%s: %v: %s", name, err, refusal(response))
		}
		all.Go(func() {
			lasted, err := follow(&messageReader{conn: conn})
			lasts(name+" as a WebSocket", lasted, err)
		})
	}
	for protocol, e := range executors {
		executor, err := e.make(admin.config(), admin.url(execPath(namespace, "web", `read line; echo "got $line"; exit 6`, "stdin=true", "stdout=true")))
		if err != nil {
			t.Fatal(err)
		}
		in, stdin := io.Pipe()
		all.Go(func() {
			var stdout bytes.Buffer
			err := executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: in, Stdout: &stdout})
			in.Close()
			if exit, ok := errors.AsType[utilexec.CodeExitError](err); !ok || exit.Code != 6 || stdout.String() != "got a word\n" {
				t.Errorf("an idle exec over %s ended with %v and %q", protocol, err, stdout.String())
			}
		})
		all.Go(func() {
			defer stdin.Close()
			pause()
			io.WriteString(stdin, "a word\n")
		})
	}
	for protocol := range forwardDialers {
		for _, name := range []string{"portforward", "port-forward"} {
			address := forward(t, admin, protocol, targetPath(namespace, "web", name), "0:8080")[0]
			wantAnswer(t, address, "hello from web-")
			all.Go(func() {
				pause()
				wantAnswer(t, address, "hello from web-")
			})
		}
	}
	all.Wait()
}
