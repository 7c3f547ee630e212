package streaming

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// slowWrite is how long a write takes if the peer, or the way to it, is
	// slow: more than a scheduler's hiccup.
	slowWrite = 200 * time.Millisecond
	// tlsRecord is the most data that goes into one record of TLS.
	tlsRecord = 16 << 10
	// lingerSilence is how long the server waits, after its last word, for a
	// client that sends nothing.
	lingerSilence = 10 * time.Second
)

// link is an upgraded connection: the hijacked net.Conn, whether its peer
// lives, and the session's context.
//
//	open → hijack → beat → (callback) → finish → linger → close
//
// Everything that can go wrong with the connection ends in fail, which cancels
// the context with the cause and closes the connection; that unblocks whoever
// reads or writes it. If the context ends otherwise, the connection is closed
// after Options.closeGrace at the latest.
type link struct {
	opts   Options
	ctx    context.Context // the session's
	cancel context.CancelCauseFunc
	parent context.Context // the request's
	start  time.Time

	// departed is the error of a peer that has gone: ErrClientGone, or
	// ErrServerGone at the client's end of a mux session.
	departed error

	conn net.Conn     // as hijacked
	raw  net.Conn     // conn without TLS, whose Close can wait for the peer
	tcp  *net.TCPConn // the same, nil if it is no TCP connection
	pre  []byte       // what the HTTP server had read already; the reader's

	// Liveness, in nanoseconds since start; 0 is never.
	lastRead  atomic.Int64 // when something was last read
	readStart atomic.Int64 // since when Read waits; 0 if nobody reads
	sendStart atomic.Int64 // since when a write is under way; 0 if none is
	lastData  atomic.Int64 // when data, not a ping, was last written
	congested atomic.Int64 // when a write had last taken long, with more to be sent
	pinged    atomic.Int64 // when the first ping since lastRead was written
	pinging   atomic.Bool  // a ping is being written
	// unanswered counts the pings since lastRead.
	unanswered atomic.Int32

	// The client's own pings: when the last came, which is the reader's, and how
	// many have come one after the other, none of them late.
	lastHeartbeat int64
	heartbeats    atomic.Int32

	wmu  sync.Mutex // serialises writes; protects those below
	head [192]byte  // for the headers of the frame that is being written
	vec  [2][]byte
	last bool // the last frame was written
	// held is written along with the next, in one system call. hold says that
	// the next is held.
	held []byte
	hold bool

	unbound func() // undoes bound

	wg     sync.WaitGroup // all goroutines of the session
	pongs  atomic.Bool    // a pong is being written
	timer  *time.Timer    // the next beat
	bmu    sync.Mutex     // protects silent, and timer's being set
	silent bool           // no more beats
}

func newLink(r *http.Request, opts Options, protocol string) *link {
	l := &link{opts: opts, parent: r.Context(), start: time.Now(), departed: ErrClientGone}
	l.ctx, l.cancel = context.WithCancelCause(context.WithValue(r.Context(), protocolKey{}, protocol))
	return l
}

// hijack takes the connection over from the HTTP server. The reader that it
// returns reads through the link.
func (l *link) hijack(w http.ResponseWriter) (*bufio.ReadWriter, error) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("this connection can't be upgraded: %w", err)
	}
	conn.SetDeadline(time.Time{})
	l.conn, l.raw = conn, conn
	if c, ok := conn.(*tls.Conn); ok {
		l.raw = c.NetConn()
	}
	l.tcp, _ = l.raw.(*net.TCPConn)
	if n := rw.Reader.Buffered(); n > 0 {
		early, _ := rw.Reader.Peek(n)
		l.pre = append(l.pre, early...)
	}
	rw.Reader.Reset(l)
	return rw, nil
}

func (l *link) now() int64 { return max(int64(time.Since(l.start)), 1) }

// Read reads from the connection and notes that the peer lives.
func (l *link) Read(p []byte) (int, error) {
	if len(l.pre) > 0 {
		n := copy(p, l.pre)
		l.pre = l.pre[n:]
		return n, nil
	}
	l.readStart.Store(l.now())
	n, err := l.conn.Read(p)
	if n > 0 {
		l.lastRead.Store(l.now())
	}
	l.readStart.Store(0)
	return n, err
}

// write writes head, which lies in l.head, and body as one. wmu is held.
func (l *link) write(head, body []byte) error {
	if l.last {
		return net.ErrClosed
	}
	if l.hold {
		l.held, l.hold = append(append(l.held, head...), body...), false
		return nil
	}
	if l.held != nil {
		head, l.held = append(l.held, head...), nil
	}
	began := l.now()
	l.sendStart.Store(began)
	var err error
	switch {
	case len(body) == 0:
		_, err = l.conn.Write(head)
	case l.tcp == l.conn:
		l.vec = [2][]byte{head, body}
		bufs := net.Buffers(l.vec[:])
		_, err = bufs.WriteTo(l.tcp)
		l.vec[1] = nil
	default: // TLS: a record of its own for the header would cost more than a copy
		buf := buffers.Get().(*buffer)
		n := copy(buf[:], head)
		m := copy(buf[n:max(n, tlsRecord)], body) // the rest is copied by TLS anyway
		_, err = l.conn.Write(buf[:n+m])
		if err == nil && m < len(body) {
			_, err = l.conn.Write(body[m:])
		}
		buffers.Put(buf)
	}
	if err != nil {
		l.fail(fmt.Errorf("%w: %w", l.departed, err))
		return context.Cause(l.ctx)
	}
	ended := l.now()
	// A machine that is busy makes a write take long, too.
	if ended-began > int64(slowWrite) && (l.tcp == nil || backlogged(l.tcp)) {
		l.congested.Store(ended)
	}
	if len(body) > 0 {
		l.lastData.Store(ended)
	}
	l.sendStart.Store(0)
	return nil
}

// fail ends the session with a cause. The first one counts.
func (l *link) fail(cause error) {
	l.cancel(cause)
	l.raw.Close()
}

// over returns why nothing can be written to the client any more. Once the
// request's context has ended it can still be told so.
func (l *link) over() error {
	if l.ctx.Err() != nil {
		if cause := context.Cause(l.ctx); errors.Is(cause, l.departed) || errors.Is(cause, ErrPeerTimeout) {
			return cause
		}
	}
	return nil
}

// gone ends the session because reading has ended with err, and returns the
// cause of its end.
func (l *link) gone(err error) error {
	switch {
	case errors.Is(err, ErrProtocol), errors.Is(err, l.departed):
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		err = l.departed
	default:
		err = fmt.Errorf("%w: %w", l.departed, err)
	}
	if l.ctx.Err() == nil && errors.Is(err, l.departed) {
		l.fail(err) // nothing more is owed to it
	}
	l.cancel(err)
	return context.Cause(l.ctx)
}

// farewell ends the session at the client's word. say answers it; close waits
// for that.
func (l *link) farewell(cause error, say func()) {
	l.bmu.Lock() // quiet, and thereby close, waits for it
	defer l.bmu.Unlock()
	l.silence()
	l.cancel(cause)
	say()
}

// beat starts to watch the peer: ping is called at every interval, unless the
// one before hasn't come through yet. stalled says that the peer isn't being
// read from. ping may block; it is on a goroutine of its own. From now on the
// connection doesn't outlive the session's context for long, either.
func (l *link) beat(ping func(stalled bool) error) {
	l.bound()
	interval := l.interval()
	tick := func() {
		l.bmu.Lock()
		if l.silent {
			l.bmu.Unlock()
			return
		}
		l.wg.Add(1)
		defer l.wg.Done()
		dead := l.dead()
		if !dead {
			l.timer.Reset(interval) // before the ping, as that may take long
		}
		l.bmu.Unlock()
		if dead {
			l.fail(ErrPeerTimeout)
			return
		}
		if l.pinging.CompareAndSwap(false, true) {
			if ping(l.readStart.Load() == 0) == nil {
				if l.pinged.Load() <= l.lastRead.Load() {
					l.pinged.Store(l.now())
					l.unanswered.Store(0)
				}
				l.unanswered.Add(1)
			}
			l.pinging.Store(false)
		}
	}
	l.bmu.Lock()
	l.timer = time.AfterFunc(interval, tick)
	l.bmu.Unlock()
}

// interval is the time between two beats.
func (l *link) interval() time.Duration {
	return min(l.opts.PingInterval, l.opts.PeerTimeout/4)
}

// patience is how long a silence lasts before the peer is given up. The beat
// that finds it comes up to an interval later, still within PeerTimeout.
func (l *link) patience() time.Duration { return l.opts.PeerTimeout - l.interval() }

// manyHeartbeats is how many pings of its own show that a client goes on with
// them.
const manyHeartbeats = 3

// heartbeat notes a ping of the client's own. It is called by the reader.
func (l *link) heartbeat() {
	now := l.now()
	if now-l.lastHeartbeat > int64(l.patience())/3 {
		l.heartbeats.Store(0)
	}
	l.lastHeartbeat = now
	l.heartbeats.Add(1)
}

// dead says whether to give the peer up.
//
// A peer that can answer pings is dead once it has left some unanswered and was
// silent for all that time. It can't answer if it isn't being read from, as a
// command doesn't read its stdin, or if it doesn't read: a paused client, or a
// slow one with megabytes on the way to it. Anything that it sends shows that it
// lives all the same. client-go's WebSocket sends pings of its own while it is
// paused, and so is dead when those cease. From others nothing is to be had but
// what their kernel acknowledges, and behind a proxy not even that: they have
// StallTimeout.
func (l *link) dead() bool {
	now, patience := l.now(), int64(l.patience())
	heard, reading, sending := l.lastRead.Load(), l.readStart.Load(), l.sendStart.Load()
	silent := reading != 0 && now-max(heard, reading) >= patience
	stuck := sending != 0 && now-sending > int64(slowWrite)
	if reading != 0 && !stuck && l.congested.Load() <= heard {
		return silent && l.pinged.Load() > heard && l.unanswered.Load() > 1
	}
	if silent && l.heartbeats.Load() >= manyHeartbeats {
		return true
	}
	progress := max(heard, reading, l.lastData.Load())
	if (reading != 0 || stuck) && now-progress >= int64(l.opts.StallTimeout) {
		return true
	}
	return l.tcp != nil && unacknowledged(l.tcp, time.Duration(patience))
}

// quiet ends the beats.
func (l *link) quiet() {
	l.bmu.Lock()
	defer l.bmu.Unlock()
	l.silence()
}

// silence ends the beats. bmu is held.
func (l *link) silence() {
	l.silent = true
	if l.timer != nil {
		l.timer.Stop()
	}
}

// bound closes the connection some time after the session's context has ended,
// for whatever reason, so that a client which takes nothing holds up neither
// the callback nor a drain.
func (l *link) bound() {
	closed, done := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(l.ctx, func() {
		defer close(done)
		timer := time.NewTimer(l.opts.closeGrace)
		defer timer.Stop()
		select {
		case <-timer.C:
			l.raw.Close()
		case <-closed:
		}
	})
	l.unbound = func() {
		close(closed)
		if !stop() {
			<-done
		}
	}
}

// linger waits until the client, which has been told that this was all, closes
// the connection, so that closing it here with unread data doesn't make the
// kernel throw away what the client hasn't read. reader is closed when reading
// has ended; what a client that broke the protocol goes on to send is read
// nevertheless, until closeGrace is over.
func (l *link) linger(reader <-chan struct{}) {
	began := l.now()
	silence := min(lingerSilence, l.opts.PeerTimeout)
	timer := time.NewTimer(silence)
	defer timer.Stop()
	for {
		select {
		case <-reader:
			if errors.Is(context.Cause(l.ctx), ErrProtocol) {
				io.Copy(io.Discard, l)
			}
			return
		case <-timer.C:
			now := l.now()
			quiet := time.Duration(now - max(began, l.lastRead.Load()))
			if quiet >= silence || time.Duration(now-began) > l.opts.StallTimeout {
				return
			}
			timer.Reset(silence - quiet)
		}
	}
}

// close closes the connection and waits for the session's goroutines.
func (l *link) close() {
	l.quiet()
	l.unbound()
	if l.conn != l.raw {
		// TLS says goodbye, for which it would wait five seconds.
		hurry := time.AfterFunc(slowWrite, func() { l.raw.Close() })
		l.conn.Close()
		hurry.Stop()
	}
	l.raw.Close()
	l.wg.Wait()
	l.cancel(nil)
}

// ended returns what to tell the client, and the caller: err unless the
// session was ended from outside, which then explains it better.
func (l *link) ended(err error) error {
	if err != nil && l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	return err
}

// checkOrigin refuses upgrades that a foreign web page has asked for.
func checkOrigin(r *http.Request, opts Options) error {
	if !opts.CheckOrigin(r) {
		return httpErrorf(http.StatusForbidden, metav1.StatusReasonForbidden,
			"the origin %q may not open streams here", truncate(r.Header.Get("Origin"), 256))
	}
	return nil
}
