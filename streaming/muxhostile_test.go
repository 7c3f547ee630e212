package streaming

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/gorilla/websocket"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// muxFrame is a frame by hand; value is its length unless it is given.
func muxFrame(kind byte, flags uint16, id uint32, data string, value ...uint32) string {
	length := uint32(len(data))
	if len(value) > 0 {
		length = value[0]
	}
	return string(appendMuxHeader(nil, kind, flags, id, length)) + data
}

// opening is a header by hand, with its length.
func opening(header string) string { return string(prefixed([]byte(header))) }

const dialOne = `{"network":"tcp","port":1}`

func TestMuxRefusesFrames(t *testing.T) {
	window := strings.Repeat("x", muxWindow)
	for name, test := range map[string]struct {
		frames []string
		want   error
	}{
		"an unknown version":                     {[]string{"\x01" + muxFrame(muxPing, muxSYN, 0, "")[1:]}, ErrProtocol},
		"an unknown type":                        {[]string{muxFrame(4, 0, 0, "")}, ErrProtocol},
		"unknown flags":                          {[]string{muxFrame(muxPing, 0x11, 0, "")}, ErrProtocol},
		"a stream of the server's":               {[]string{muxFrame(muxData, muxSYN, 2, opening(dialOne))}, ErrProtocol},
		"stream 0":                               {[]string{muxFrame(muxData, muxSYN, 0, opening(dialOne))}, ErrProtocol},
		"a stream that was never opened":         {[]string{muxFrame(muxData, 0, 1, "x")}, ErrProtocol},
		"a stream that the server never opened":  {[]string{muxFrame(muxData, 0, 2, "x")}, ErrProtocol},
		"a stream that is opened twice":          {[]string{muxFrame(muxData, muxSYN, 1, opening(dialOne)), muxFrame(muxData, muxSYN, 1, "")}, ErrProtocol},
		"a stream that goes back":                {[]string{muxFrame(muxData, muxSYN, 3, opening(dialOne)), muxFrame(muxData, muxSYN, 1, "")}, ErrProtocol},
		"more than the window at once":           {[]string{muxFrame(muxData, muxSYN, 1, "", 1<<31)}, ErrProtocol},
		"more than the window, bit by bit":       {[]string{muxFrame(muxData, muxSYN, 1, opening(dialOne)), muxFrame(muxData, 0, 1, window)}, ErrProtocol},
		"data after the end":                     {[]string{muxFrame(muxData, muxSYN|muxFIN, 1, opening(dialOne)), muxFrame(muxData, 0, 1, "x")}, ErrProtocol},
		"a window without end":                   {[]string{muxFrame(muxData, muxSYN, 1, opening(dialOne)), muxFrame(muxUpdate, 0, 1, "", 1<<31)}, ErrProtocol},
		"gigabytes for a stream that is no more": {[]string{muxFrame(muxData, muxSYN|muxRST, 1, opening(dialOne)), muxFrame(muxData, 0, 1, "", 1<<30)}, ErrProtocol},
		"a frame that ends amid its header":      {[]string{"\x00\x00\x00"}, nil},
		"a frame that ends amid its data":        {[]string{muxFrame(muxData, muxSYN, 1, "x", 100)}, nil},
		"nothing wrong: a goodbye":               {[]string{muxFrame(muxGoAway, 0, 0, "")}, nil},
		"nothing wrong: data after the server's reset": {[]string{
			muxFrame(muxData, muxSYN, 1, opening(dialOne)), muxFrame(muxData, muxRST, 1, ""), muxFrame(muxData, muxFIN, 1, "late"), muxFrame(muxUpdate, 0, 1, "", 1)}, nil},
		"nothing wrong: frames in one message, and cut anywhere": {[]string{
			muxFrame(muxPing, muxSYN, 0, "", 7) + muxFrame(muxData, muxSYN, 1, opening(dialOne))[:20], muxFrame(muxData, muxSYN, 1, opening(dialOne))[20:]}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := servePortForward(t, PortForwardRequest{}, Options{}, func(context.Context, uint16) (PortStream, error) { return newCountedBackend(), nil })
			ws := mustDialWebSocket(t, s.URL, MuxProtocol)
			for _, frame := range test.frames {
				ws.WriteMessage(websocket.BinaryMessage, []byte(frame))
			}
			if test.want == nil {
				ws.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
			}
			// Closed before all is read, it would be reset amid the server's writing.
			var err error
			for err == nil {
				_, _, err = ws.ReadMessage()
			}
			if test.want != nil {
				if closed := (*websocket.CloseError)(nil); !errors.As(err, &closed) || closed.Code != websocket.CloseProtocolError || closed.Text == "" {
					t.Errorf("closed with %v", err)
				}
			}
			ws.Close()
			if err := s.result(t); !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
		})
	}
	t.Run("a message of text", func(t *testing.T) {
		s := servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
		ws := mustDialWebSocket(t, s.URL, MuxProtocol)
		ws.WriteMessage(websocket.TextMessage, []byte(muxFrame(muxPing, muxSYN, 0, "")))
		ws.ReadMessage()
		ws.Close()
		if err := s.result(t); !errors.Is(err, ErrProtocol) {
			t.Errorf("got %v", err)
		}
	})
}

// readMuxFrame reads the next frame that isn't a ping.
func readMuxFrame(t testing.TB, r io.Reader) (kind byte, flags uint16, id uint32, data []byte) {
	t.Helper()
	var head [muxHeader]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		t.Fatal(err)
	}
	kind, flags, id = head[1], binary.BigEndian.Uint16(head[2:]), binary.BigEndian.Uint32(head[4:])
	if kind == muxData {
		data = make([]byte, binary.BigEndian.Uint32(head[8:]))
		if _, err := io.ReadFull(r, data); err != nil {
			t.Fatal(err)
		}
	}
	return kind, flags, id, data
}

// messages reads the messages of a client's WebSocket as one stream.
type messages struct {
	ws  *websocket.Conn
	msg io.Reader
}

func (m *messages) Read(p []byte) (int, error) {
	for {
		if m.msg == nil {
			_, r, err := m.ws.NextReader()
			if err != nil {
				return 0, err
			}
			m.msg = r
		}
		n, err := m.msg.Read(p)
		if err == io.EOF {
			m.msg, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func TestMuxRefusesHeaders(t *testing.T) {
	for name, test := range map[string]struct {
		data string
		want string
	}{
		"that isn't JSON":       {opening("hello"), "the header can't be read: invalid character 'h' looking for beginning of value"},
		"with an unknown field": {opening(`{"network":"tcp","port":1,"tls":true}`), `the header can't be read: json: unknown field "tls"`},
		"with two values":       {opening(dialOne + dialOne), "the header can't be read: there is more than one value"},
		"with too large a port": {opening(`{"network":"tcp","port":65536}`), "the header can't be read: json: cannot unmarshal number 65536 into Go struct field muxOpening.port of type uint16"},
		"that names a listener": {opening(`{"network":"tcp","port":1,"listener":4}`), "listener is the server's to say"},
		"that listens to ask":   {opening(`{"network":"tcp","port":1,"listen":true,"check":true}`), "check is for connections: whether a port may be listened on is said when it is"},
		"that is too long":      {"\x10\x01", "a header of 4097 bytes: 4096 is the most"},
		"that doesn't come":     {"\x00", "no header came within 50ms"},
		"that is nothing":       {opening(""), "the header can't be read: EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := servePortForward(t, PortForwardRequest{}, Options{SetupTimeout: 50 * time.Millisecond}, dialLoopback)
			if !strings.Contains(name, "come") {
				s = servePortForward(t, PortForwardRequest{}, Options{}, dialLoopback)
			}
			ws := mustDialWebSocket(t, s.URL, MuxProtocol)
			ws.WriteMessage(websocket.BinaryMessage, []byte(muxFrame(muxData, muxSYN, 1, test.data)))
			r := &messages{ws: ws}
			kind, flags, id, data := readMuxFrame(t, r)
			if kind != muxData || flags != muxACK || id != 1 || len(data) < 2 {
				t.Fatalf("got type %d, flags %d, id %d, %q", kind, flags, id, data)
			}
			var status metav1.Status
			if err := json.Unmarshal(data[2:], &status); err != nil || int(binary.BigEndian.Uint16(data)) != len(data)-2 {
				t.Fatalf("%q: %v", data, err)
			}
			if diff := cmp.Diff(test.want, status.Message); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if kind, flags, _, _ = readMuxFrame(t, r); kind != muxUpdate || flags != muxFIN {
				t.Errorf("then type %d with flags %d", kind, flags)
			}
			if kind, flags, _, _ = readMuxFrame(t, r); kind != muxUpdate || flags != muxRST {
				t.Errorf("then type %d with flags %d", kind, flags)
			}
			ws.Close()
			s.result(t)
		})
	}
}

// TestMuxFloods sends what costs the client nothing and asks for answers, and
// reads none of them.
func TestMuxFloods(t *testing.T) {
	for name, frame := range map[string]func(i uint32) string{
		"of pings":                    func(i uint32) string { return muxFrame(muxPing, muxSYN, 0, "", i) },
		"of streams":                  func(i uint32) string { return muxFrame(muxUpdate, muxSYN, 2*i+1, "") },
		"of streams that are reset":   func(i uint32) string { return muxFrame(muxData, muxSYN|muxRST, 2*i+1, opening(dialOne)) },
		"of streams that are refused": func(i uint32) string { return muxFrame(muxData, muxSYN, 2*i+1, opening("{}")) },
		"of listeners that are reset soon": func(i uint32) string {
			return muxFrame(muxData, muxSYN, 2*i+1, opening(`{"network":"tcp","listen":true}`)) + muxFrame(muxUpdate, muxRST, 2*i+1, "")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := serveMuxWith(t, PortForwardRequest{}, Options{MaxForwards: 8, SetupTimeout: time.Minute}, PortForwardBackend{
				Dial:   func(context.Context, Endpoint) (PortStream, error) { return newCountedBackend(), nil },
				Listen: listening(make(chan tcpListener, 1<<20)).Listen,
			})
			ws := mustDialWebSocket(t, s.URL, MuxProtocol)
			before, goroutines := inUse()
			ws.SetWriteDeadline(time.Now().Add(2 * time.Second))
			most := uint32(1 << 17)
			if name == "of pings" || name == "of streams" {
				most = 1 << 21 // their answers are to be more than sockets hold
			}
			for i := uint32(0); i < most; {
				var batch bytes.Buffer
				for range 2048 {
					batch.WriteString(frame(i))
					i++
				}
				if ws.WriteMessage(websocket.BinaryMessage, batch.Bytes()) != nil {
					break // it isn't taken: the server has been made to wait
				}
			}
			// Streams, as many again that are told that there are too many, their
			// helpers, one that writes.
			eventually(t, "a heap and a number of goroutines as before", func() bool {
				after, goroutinesAfter := inUse()
				return after-before < 4<<20 && goroutinesAfter-goroutines < 4*8+10
			})
			ws.Close()
			s.result(t)
		})
	}
}

func TestMuxMessagesEndWithAFrame(t *testing.T) {
	data := muxFrame(muxData, muxSYN, 1, strings.Repeat("x", 88))
	control := muxFrame(muxUpdate, 0, 1, "", 1<<20)
	for name, test := range map[string]struct {
		queue string
		most  int
		want  int
	}{
		"all that fits":                    {data + control, 1000, 112},
		"just what fits":                   {data + control, 112, 112},
		"not a part of what has no data":   {data + control, 111, 100},
		"not a part of what has data":      {control + data, 111, 12},
		"a window's growth isn't a length": {control + control, 20, 12},
		"nothing of nothing":               {"", 1000, 0},
	} {
		if got := wholeFrames([]byte(test.queue), test.most); got != test.want {
			t.Errorf("%s: got %d, want %d", name, got, test.want)
		}
	}
}

// TestMuxClientRefusesFrames is the same for a server that can't be trusted.
func TestMuxClientRefusesFrames(t *testing.T) {
	for name, test := range map[string]struct {
		send string
		want error
	}{
		"a stream of the client's":      {muxFrame(muxData, muxSYN, 1, ""), ErrProtocol},
		"an unknown type":               {muxFrame(9, 0, 0, ""), ErrProtocol},
		"a window overrun":              {muxFrame(muxData, 0, 1, "", 1<<31), ErrProtocol},
		"data of a stream never opened": {muxFrame(muxData, 0, 99, "x"), ErrProtocol},
		"a goodbye":                     {muxFrame(muxGoAway, 0, 0, ""), ErrServerGone},
		"an answer that is too long":    {muxFrame(muxData, muxACK, 1, "\xff\xff"), nil},
		"an answer that isn't JSON":     {muxFrame(muxData, muxACK, 1, opening("hello")), nil},
		"an end without an answer":      {muxFrame(muxData, muxACK|muxFIN, 1, ""), nil},
		"a reset":                       {muxFrame(muxData, muxRST, 1, ""), nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			upgrader := websocket.Upgrader{Subprotocols: []string{MuxProtocol}}
			s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
				ws, err := upgrader.Upgrade(w, r, nil)
				if err != nil {
					return err
				}
				defer ws.Close()
				ws.ReadMessage() // the client's first stream
				ws.WriteMessage(websocket.BinaryMessage, []byte(test.send))
				for {
					if _, _, err := ws.ReadMessage(); err != nil {
						return err
					}
				}
			})
			c := dialMux(t, s.URL, MuxOptions{})
			_, err := c.Dial(testContext(t), Endpoint{Network: "tcp", Port: 1})
			if err == nil {
				t.Error("Dial has succeeded")
			}
			if test.want != nil {
				wait(t, c.Done(), "the session's end")
				if err := c.Err(); !errors.Is(err, test.want) {
					t.Errorf("the session ended with %v, want %v", err, test.want)
				}
			} else if err := c.Err(); err != nil {
				t.Errorf("the session ended with %v", err)
			}
			c.Close()
			s.result(t)
		})
	}
	t.Run("streams for no listener", func(t *testing.T) {
		upgrader := websocket.Upgrader{Subprotocols: []string{MuxProtocol}}
		answers := make(chan uint16, 1)
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			ws, err := upgrader.Upgrade(w, r, nil)
			if err != nil {
				return err
			}
			defer ws.Close()
			ws.WriteMessage(websocket.BinaryMessage, []byte(muxFrame(muxData, muxSYN, 2, opening(`{"listener":1}`))))
			_, flags, _, _ := readMuxFrame(t, &messages{ws: ws})
			answers <- flags
			return nil
		})
		c := dialMux(t, s.URL, MuxOptions{})
		if flags := wait(t, answers, "the answer"); flags != muxRST {
			t.Errorf("got flags %d, want a reset", flags)
		}
		c.Close()
	})
}

// TestMuxExampleOfTheDocumentation holds docs/protocol.md to what is sent.
func TestMuxExampleOfTheDocumentation(t *testing.T) {
	page, err := os.ReadFile("../docs/protocol.md")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, block := range regexp.MustCompile("(?s)```hex\n(.*?)```").FindAllSubmatch(page, -1) {
		var frame []byte
		for line := range strings.Lines(string(block[1])) {
			line, _, _ = strings.Cut(line, "   ") // what it says
			data, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(line), " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			frame = append(frame, data...)
		}
		got = append(got, string(frame))
	}

	var want []string
	port := make(chan uint16, 1)
	s := servePortForward(t, PortForwardRequest{}, Options{}, func(_ context.Context, to uint16) (PortStream, error) {
		port <- to
		return newSilentBackend(), nil
	})
	ws := mustDialWebSocket(t, s.URL, MuxProtocol)
	if len(got) != 4 {
		t.Fatalf("the page has %d frames", len(got))
	}
	ws.WriteMessage(websocket.BinaryMessage, []byte(got[0]))
	_, answer, err := ws.ReadMessage()
	if err != nil || wait(t, port, "the dial") != 8080 {
		t.Errorf("the page's opening isn't taken: %v", err)
	}
	ws.Close()
	s.result(t)

	header, _ := json.Marshal(muxOpening{Network: "tcp", Port: 8080})
	want = append(want,
		muxFrame(muxData, muxSYN, 1, opening(string(header))),
		string(answer),
		muxFrame(muxData, 0, 1, "hi\n"),
		muxFrame(muxUpdate, muxFIN, 1, ""))
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("what is sent and what the page says (-want +got):\n%s", diff)
	}
}

// FuzzMuxFrames throws bytes at the server's end.
func FuzzMuxFrames(f *testing.F) {
	f.Add([]byte(muxFrame(muxData, muxSYN, 1, opening(dialOne))), uint16(0))
	f.Add([]byte(muxFrame(muxData, muxSYN, 1, opening(`{"network":"udp","port":1}`))+muxFrame(muxData, 0, 1, "\x00\x02ab\x00")), uint16(3))
	f.Add([]byte(muxFrame(muxData, muxSYN, 1, opening(`{"network":"tcp","listen":true}`))+muxFrame(muxUpdate, muxFIN, 1, "")), uint16(14))
	f.Add([]byte(muxFrame(muxUpdate, muxSYN, 1, "")+muxFrame(muxUpdate, 0, 1, "", 1<<20)+muxFrame(muxUpdate, muxRST, 1, "")), uint16(1))
	f.Add([]byte(muxFrame(muxPing, muxSYN, 0, "", 1)+muxFrame(muxGoAway, 0, 0, "")), uint16(5))
	results := make(chan error)
	s := newServer(f, func(w http.ResponseWriter, r *http.Request) error {
		results <- ServePortForward(w, r, PortForwardRequest{}, Options{MaxForwards: 4}, PortForwardBackend{
			Dial: func(context.Context, Endpoint) (PortStream, error) {
				near, far := net.Pipe()
				go func() { // ends with the stream
					io.Copy(far, far)
					far.Close()
				}()
				return pipeStream{near}, nil
			},
			Listen: func(ctx context.Context, at Endpoint) (PortListener, error) { return newDeafListener(at), nil },
		})
		return nil
	})
	s.results = make(chan error, 1<<20)
	f.Fuzz(func(t *testing.T, frames []byte, cut uint16) {
		ws := mustDialWebSocket(t, s.URL, MuxProtocol)
		n := min(int(cut), len(frames))
		ws.WriteMessage(websocket.BinaryMessage, frames[:n])
		ws.WriteMessage(websocket.BinaryMessage, frames[n:])
		ws.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
		for err := error(nil); err == nil; {
			_, _, err = ws.ReadMessage()
		}
		ws.NetConn().(*net.TCPConn).SetLinger(0) // a port that waits is one less for the next ones
		ws.Close()
		wait(t, results, "the session to end")
	})
}

// deafListener accepts nothing.
type deafListener struct {
	at   Endpoint
	once sync.Once
	done chan struct{}
}

func newDeafListener(at Endpoint) *deafListener {
	return &deafListener{at: at, done: make(chan struct{})}
}

func (l *deafListener) Accept() (PortStream, error) {
	<-l.done
	return nil, net.ErrClosed
}

func (l *deafListener) Endpoint() Endpoint { return l.at }

func (l *deafListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

// FuzzMuxOpening looks for headers that pass and shouldn't.
func FuzzMuxOpening(f *testing.F) {
	f.Add(dialOne)
	f.Add(`{"network":"unix","path":"/x","instance":"web-0"}`)
	f.Add(`{"network":"udp","listen":true}`)
	f.Fuzz(func(t *testing.T, header string) {
		var o muxOpening
		if json.Unmarshal([]byte(header), &o) != nil || o.check() != nil {
			return
		}
		switch to := o.endpoint(); {
		case to.Network == "unix" && to.Path != "" && to.Port == 0:
		case (to.Network == "tcp" || to.Network == "udp") && to.Path == "" && (to.Port != 0 || o.Listen):
		default:
			t.Errorf("%+v has passed", o)
		}
	})
}

// TestMuxIdleSessionIsSmall counts what the server keeps of a session in which
// nothing happens, and for each idle connection in it.
func TestMuxIdleSessionIsSmall(t *testing.T) {
	const sessions, conns = 50, 20
	s := servePortForward(t, PortForwardRequest{}, Options{}, func(context.Context, uint16) (PortStream, error) {
		return newSilentBackend(), nil
	})
	s.results = make(chan error, sessions)
	bytes, goroutines := inUse()
	var all []*websocket.Conn
	for range sessions {
		all = append(all, idleMux(t, s.URL))
	}
	bytesNow, goroutinesNow := inUse()
	perSession := (bytesNow - bytes) / sessions
	t.Logf("an idle session: %d bytes with the client's socket, %d goroutines", perSession, (goroutinesNow-goroutines)/sessions)
	// The HTTP server's handler, and the reader.
	if n := goroutinesNow - goroutines; n > 2*sessions+4 {
		t.Errorf("%d sessions have %d goroutines", sessions, n)
	}
	if perSession > 48<<10 {
		t.Errorf("an idle session takes %d bytes", perSession)
	}

	ws := all[0]
	r := &messages{ws: ws}
	for i := range uint32(conns) {
		ws.WriteMessage(websocket.BinaryMessage, []byte(muxFrame(muxData, muxSYN, 2*i+1, opening(dialOne))))
		readMuxFrame(t, r)
	}
	eventually(t, "both directions of all connections", func() bool { _, n := inUse(); return n >= goroutinesNow+2*conns })
	bytesThen, goroutinesThen := inUse()
	perConn := (bytesThen - bytesNow) / conns
	t.Logf("an idle connection: %d bytes, %d goroutines", perConn, (goroutinesThen-goroutinesNow)/conns)
	if perConn > 24<<10 {
		t.Errorf("an idle connection takes %d bytes", perConn)
	}
	for _, ws := range all {
		ws.Close()
		s.result(t)
	}
}

// idleMux is a client of which little but its socket is left.
func idleMux(t testing.TB, address string) *websocket.Conn {
	t.Helper()
	dialer := websocket.Dialer{Subprotocols: []string{MuxProtocol}, ReadBufferSize: 256, WriteBufferSize: 256}
	ws, _, err := dialer.Dial(strings.Replace(address, "http", "ws", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ws.Close() })
	return ws
}

// silentBackend says nothing.
type silentBackend struct{ *countedBackend }

func newSilentBackend() silentBackend { return silentBackend{newCountedBackend()} }

func (s silentBackend) Read([]byte) (int, error) {
	<-s.closed
	return 0, net.ErrClosed
}
