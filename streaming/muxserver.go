package streaming

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// maxMuxHeader bounds the JSON with which a stream begins.
const maxMuxHeader = 4 << 10

// listenPortCause names, in the Details of a listener's Status, the port that
// was chosen.
const listenPortCause metav1.CauseType = "ListenPort"

// muxOpening is the JSON with which a stream begins: that of a client says
// where it leads to, that of a server which listener it belongs to.
type muxOpening struct {
	Network  string `json:"network,omitempty"`
	Port     uint16 `json:"port,omitempty"`
	Path     string `json:"path,omitempty"`
	Instance string `json:"instance,omitempty"`
	// Listen asks for a reverse forward; the stream stands for the listener.
	Listen bool `json:"listen,omitempty"`
	// Check asks whether a connection would be allowed, and for none.
	Check bool `json:"check,omitempty"`
	// Listener is the stream of the listener that took the connection.
	Listener uint32 `json:"listener,omitempty"`
}

func (o muxOpening) endpoint() Endpoint {
	return Endpoint{Network: o.Network, Port: o.Port, Path: o.Path, Instance: o.Instance}
}

// check says what is wrong with a client's opening.
func (o muxOpening) check() error {
	var fault string
	switch o.Network {
	case "tcp", "udp":
		if o.Path != "" {
			fault = "path is for the network unix"
		} else if o.Port == 0 && !o.Listen {
			fault = "port is needed, 1 to 65535"
		}
	case "unix":
		if o.Port != 0 {
			fault = "port is for the networks tcp and udp"
		} else if o.Path == "" || strings.ContainsRune(o.Path, 0) {
			fault = "path is needed, without a NUL"
		}
	default:
		fault = fmt.Sprintf("the network %q is unknown: use tcp, udp or unix", truncate(o.Network, 64))
	}
	switch {
	case o.Listener != 0:
		fault = "listener is the server's to say"
	case o.Listen && o.Check:
		fault = "check is for connections: whether a port may be listened on is said when it is"
	}
	if fault != "" {
		return httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest, "%s", fault)
	}
	return nil
}

// prefixed is JSON after its length in two bytes.
func prefixed(data []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(len(data))), data...)
}

// readPrefixed reads what prefixed makes.
func readPrefixed(s *MuxStream, most int) ([]byte, error) {
	var length [2]byte
	if _, err := s.readFull(length[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(length[:]))
	if n > most {
		return nil, httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest,
			"a header of %d bytes: %d is the most", n, most)
	}
	data := make([]byte, n)
	_, err := s.readFull(data)
	return data, err
}

// readOpening reads the opening of a stream within a time.
func readOpening(s *MuxStream, limit time.Duration) (o muxOpening, err error) {
	timer := time.AfterFunc(limit, func() { s.in.end(ErrSetupTimeout) })
	data, err := readPrefixed(s, maxMuxHeader)
	timer.Stop()
	switch {
	case errors.Is(err, ErrSetupTimeout):
		return o, httpErrorf(http.StatusRequestTimeout, metav1.StatusReasonTimeout, "no header came within %v", limit)
	case err != nil:
		return o, err
	}
	decoder := json.NewDecoder(strings.NewReader(string(data)))
	decoder.DisallowUnknownFields() // they would mean something
	if err = decoder.Decode(&o); err == nil && decoder.InputOffset() != int64(len(data)) {
		err = errors.New("there is more than one value")
	}
	if err != nil {
		return o, httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest, "the header can't be read: %v", err)
	}
	return o, nil
}

// answer answers an opening. After an error nothing more is to come.
func (s *MuxStream) answer(err error) error {
	return s.answerStatus(statusOf(err))
}

func (s *MuxStream) answerStatus(status metav1.Status) error {
	_, err := s.write(nil, prefixed(encodeStatus(status)))
	if status.Status != metav1.StatusSuccess {
		s.CloseWrite()
		s.Reset()
	}
	return err
}

// readAnswer reads what answer writes. A refusal is an error.
func readAnswer(s *MuxStream) (metav1.Status, error) {
	var status metav1.Status
	data, err := readPrefixed(s, maxStatus)
	if err == nil {
		err = json.Unmarshal(data, &status)
	}
	if err == nil && status.Status != metav1.StatusSuccess {
		err = &apierrors.StatusError{ErrStatus: status}
	}
	return status, err
}

// serveMux serves a session over the mux protocol.
func (f *forwarder) serveMux(ws *wsConn) error {
	c := newMuxConn(ws, false, f.opts.MaxWindows)
	defer c.close()
	f.begin()
	c.accept = func(s *MuxStream) bool { return f.acceptMux(c, s) }
	reader := c.serve(c.gone)
	<-c.ctx.Done()
	cause := context.Cause(c.ctx)
	if cause == ErrClientGone { //nolint:errorlint // wrapped, it says that something went wrong
		cause = nil
	}
	c.drain()
	if c.over() == nil && c.finish(closing(cause)) == nil {
		c.linger(reader)
	}
	return cause
}

// reserve takes one of the connections that may be open at a time.
func (f *forwarder) reserve() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.count >= f.opts.MaxForwards {
		return false
	}
	f.count++
	return true
}

func (f *forwarder) release() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.count--
}

// acceptMux takes a stream, be it to say that there are too many.
func (f *forwarder) acceptMux(c *muxConn, s *MuxStream) bool {
	if f.reserve() {
		c.wg.Go(func() {
			defer f.release()
			f.serveStream(c, s)
		})
		return true
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.surplus >= f.opts.MaxForwards {
		return false
	}
	f.surplus++
	c.wg.Go(func() {
		s.answer(httpErrorf(http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests,
			"more than %d connections at a time", f.opts.MaxForwards))
		f.mu.Lock()
		defer f.mu.Unlock()
		f.surplus--
	})
	return true
}

// serveStream serves one stream of the client, from its header to its end.
func (f *forwarder) serveStream(c *muxConn, s *MuxStream) {
	defer s.finish()
	o, err := readOpening(s, f.opts.SetupTimeout)
	if err == nil {
		err = f.permit(o)
	}
	if err != nil {
		s.answer(err)
		return
	}
	ctx, cancel := context.WithCancelCause(c.ctx)
	defer cancel(nil)
	s.watch(cancel)
	if o.Listen {
		f.listen(ctx, c, s, o.endpoint())
		return
	}
	if o.Check {
		if f.backend.Check != nil {
			err = f.backend.Check(ctx, o.endpoint())
		}
		s.answer(err)
		return
	}
	backend, err := f.backend.Dial(ctx, o.endpoint())
	if err != nil {
		s.answer(err)
		return
	}
	s.datagrams = o.Network == "udp"
	if s.answer(nil) != nil {
		hangUp(backend)
		return
	}
	f.joinMux(c.ctx, s, backend)
}

// permit refuses what the session isn't for.
func (f *forwarder) permit(o muxOpening) error {
	if err := o.check(); err != nil {
		return err
	}
	// A session whose ports were named is for those alone.
	if len(f.allowed) > 0 && (o.Listen || o.Network == "unix" || !slices.Contains(f.allowed, o.Port)) {
		return httpErrorf(http.StatusForbidden, metav1.StatusReasonForbidden,
			"this session is for connections to the ports %v", f.allowed)
	}
	if o.Listen && f.backend.Listen == nil {
		return httpErrorf(http.StatusBadRequest, metav1.StatusReasonBadRequest, "there are no reverse forwards here")
	}
	return nil
}

// finish lets go of a stream that is done with. It is reset if the client may
// still send.
func (s *MuxStream) finish() {
	s.mu.Lock()
	over := s.sent && s.ended
	s.mu.Unlock()
	if !over {
		s.Reset()
	}
}

// listen serves a reverse forward until its stream ends.
func (f *forwarder) listen(ctx context.Context, c *muxConn, s *MuxStream, at Endpoint) {
	listener, err := f.backend.Listen(ctx, at)
	if err != nil {
		s.answer(err)
		return
	}
	stop := context.AfterFunc(ctx, func() { listener.Close() })
	defer stop()
	defer listener.Close()
	status := metav1.Status{Status: metav1.StatusSuccess}
	if port := listener.Endpoint().Port; port != 0 {
		status.Details = &metav1.StatusDetails{Causes: []metav1.StatusCause{{
			Type: listenPortCause, Message: strconv.Itoa(int(port)),
		}}}
	}
	if s.answerStatus(status) != nil {
		return
	}
	var over sync.WaitGroup
	defer over.Wait()
	over.Go(func() {
		io.Copy(io.Discard, s) // nothing is to come but its end
		listener.Close()
	})
	for {
		conn, err := listener.Accept()
		if err != nil {
			if s.mu.Lock(); s.ended { // at the client's wish
				s.mu.Unlock()
				s.CloseWrite()
				return
			}
			s.mu.Unlock()
			s.answer(fmt.Errorf("no longer listening: %w", err))
			return
		}
		if !f.reserve() {
			hangUp(conn)
			continue
		}
		c.wg.Go(func() {
			defer f.release()
			f.reverse(c, s.id, at.Network == "udp", conn)
		})
	}
}

// reverse offers the client a connection that a listener took.
func (f *forwarder) reverse(c *muxConn, listener uint32, datagrams bool, conn PortStream) {
	header, err := json.Marshal(muxOpening{Listener: listener})
	var s *MuxStream
	if err == nil {
		s, err = c.open(prefixed(header), nil)
	}
	if err != nil {
		hangUp(conn)
		return
	}
	defer s.finish()
	timer := time.AfterFunc(f.opts.SetupTimeout, func() { s.Reset() })
	_, err = readAnswer(s)
	timer.Stop()
	if err != nil {
		hangUp(conn)
		return
	}
	s.datagrams = datagrams
	f.joinMux(c.ctx, s, conn)
}

// hangUp closes a connection to a port so that its peer sees a reset, if it
// can: *net.TCPConn can.
func hangUp(conn PortStream) {
	if c, ok := conn.(interface{ SetLinger(seconds int) error }); ok {
		c.SetLinger(0)
	}
	conn.Close()
}

// joinMux copies both ways until both have ended, and closes the backend. A
// half-close is passed on, and so is a reset. The caller finishes the stream.
func (f *forwarder) joinMux(ctx context.Context, s *MuxStream, backend PortStream) {
	var once sync.Once
	closeBackend := func(how func(PortStream)) { once.Do(func() { how(backend) }) }
	orderly := func(b PortStream) { b.Close() }
	defer closeBackend(orderly)
	// The client's reset, and the session's end, which the client's kernel
	// would tell as a reset, too.
	s.watch(func(error) { closeBackend(hangUp) })
	defer s.watch(nil)
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		closeBackend(hangUp)
	})
	defer func() {
		if !stop() {
			<-ended
		}
	}()

	var r io.Reader = backend
	var w io.Writer = backend
	if s.datagrams {
		idle := time.AfterFunc(f.opts.IdleDatagrams, func() {
			closeBackend(orderly)
			// One that the client doesn't take would wait for ever: what it is in
			// the middle of can't end in order.
			if s.writing() {
				s.Reset()
			}
		})
		defer idle.Stop()
		r = touching{r: backend, idle: idle, limit: f.opts.IdleDatagrams}
		w = touching{w: backend, idle: idle, limit: f.opts.IdleDatagrams}
	}

	var wg sync.WaitGroup
	wg.Go(func() {
		w := &markedWriter{w: w}
		_, err := s.WriteTo(w)
		switch {
		case err == nil:
			// Datagrams have no half-close: who has no more to send has gone.
			if s.datagrams || backend.CloseWrite() != nil {
				closeBackend(orderly)
			}
		case w.err != nil && s.datagrams: // nobody is there, which only one call tells
			closeBackend(orderly)
		case w.err != nil:
			// What the backend still says is passed on; then finish resets the
			// stream.
		default:
			closeBackend(hangUp)
		}
		s.discard()
	})
	_, err := s.ReadFrom(r)
	if err == nil || s.datagrams {
		s.CloseWrite()
	}
	if err != nil || s.datagrams {
		s.Reset()
	}
	wg.Wait()
}

// touching puts off the end of an idle connection.
type touching struct {
	r     io.Reader
	w     io.Writer
	idle  *time.Timer
	limit time.Duration
}

func (t touching) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if err == nil {
		t.idle.Reset(t.limit)
	}
	return n, err
}

func (t touching) Write(p []byte) (int, error) {
	t.idle.Reset(t.limit)
	return t.w.Write(p)
}
