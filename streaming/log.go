package streaming

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"
)

// The subprotocols of a log over WebSocket. Without one it is binary.
var logSubprotocols = []string{"binary.k8s.io", "base64.binary.k8s.io", ""}

// HeaderLogEnd, in a request that isn't a WebSocket, says that the client knows
// the trailer of that name: the response then ends in order even if the log
// doesn't, and the trailer says how. Its value is a status code, 200 for the
// log's end, a space, and a text of at most 512 bytes. A response without it was
// cut off. A client that doesn't know it could take a log that isn't whole for
// one that is: HTTP has no trailers of a response that is cut off.
const HeaderLogEnd = "X-Log-End"

const maxLogEnd = 512

// ServeLog answers the request with what write writes: chunked, as plain text,
// or in the messages of a WebSocket. follow flushes after each Write, so write
// whole lines or batches of them; out is an http.Flusher besides.
//
// Nothing is sent before the first Write or Flush, or write's successful
// return: an error before that is answered as a metav1.Status. One after that
// cuts the response off, so that the client can tell it from the log's end; a
// WebSocket is closed with the code 1011 and the error's text. Either way the
// error is returned.
//
// write's context ends, with a cause, when the client goes or r's context
// ends. Over plain HTTP, where there are no pings, a client that takes a Write
// or a Flush for longer than Options.StallTimeout has gone, with
// ErrPeerTimeout: a pager may keep it waiting for that long.
//
// Headers in w whose names begin with X-Log- are sent on a WebSocket, too. A
// client that sends [HeaderLogEnd] over plain HTTP is told why its log ends.
func ServeLog(w http.ResponseWriter, r *http.Request, follow bool, opts Options, write func(ctx context.Context, out io.Writer) error) error {
	opts = opts.withDefaults()
	if isWebSocket(r) {
		return serveLogWebSocket(w, r, opts, write)
	}
	out := &httpLog{
		w: w, control: http.NewResponseController(w), follow: follow, stall: opts.StallTimeout,
		trailer: r.Header.Get(HeaderLogEnd) != "" && r.ProtoAtLeast(1, 1),
	}
	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), protocolKey{}, "http"))
	defer cancel(nil)
	written, ended := make(chan struct{}), make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		grace := opts.closeGrace // a paused client doesn't hold a drain up
		if errors.Is(context.Cause(ctx), ErrPeerTimeout) {
			grace = 0
		}
		out.abort(grace, r.ProtoMajor == 1, written)
	})
	out.stalled = time.AfterFunc(out.stall, func() { cancel(ErrPeerTimeout) })
	out.stalled.Stop()
	err := write(ctx, out)
	if err != nil && out.begun {
		out.Flush() // what there is goes out
	}
	close(written)
	if !stop() {
		<-ended
	}
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	told := err == nil || out.trailer && !errors.Is(err, ErrPeerTimeout)
	switch {
	case err != nil && !out.begun:
		return refuse(w, err)
	case told:
		out.begin()
		out.end(err)
		last := opts.StallTimeout
		if ctx.Err() != nil {
			last = opts.closeGrace
		}
		out.control.SetWriteDeadline(time.Now().Add(last))
	default:
		// The end of the response can't be written: the client reports an
		// unexpected EOF.
		out.control.SetWriteDeadline(time.Unix(1, 0))
	}
	return err
}

// httpLog writes a log as the body of a response.
type httpLog struct {
	w       http.ResponseWriter
	control *http.ResponseController
	follow  bool
	stall   time.Duration
	stalled *time.Timer // ends the session
	trailer bool        // the client is told how the log ends
	begun   bool
}

// abort makes writes fail after grace, over HTTP/2 those of this stream alone,
// until all is written. Over HTTP/1.1 that takes more than one deadline: when a
// write fails, net/http closes the connection, and TLS replaces the deadline by
// one in five seconds, for its goodbye.
func (o *httpLog) abort(grace time.Duration, again bool, written <-chan struct{}) {
	timer := time.NewTimer(grace)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			o.control.SetWriteDeadline(time.Unix(1, 0))
			if !again {
				return
			}
			timer.Reset(slowWrite)
		case <-written:
			return
		}
	}
}

func (o *httpLog) begin() {
	if !o.begun {
		o.begun = true
		o.w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		o.w.Header().Set("X-Content-Type-Options", "nosniff")
		o.w.Header().Set("Cache-Control", "no-store")
		if o.trailer {
			o.w.Header().Set("Trailer", HeaderLogEnd)
		}
		o.w.WriteHeader(http.StatusOK)
	}
}

// end says in the trailer how the log has ended.
func (o *httpLog) end(err error) {
	if !o.trailer {
		return
	}
	text := "200 this is the end of the log"
	if err != nil {
		status := statusOf(err)
		if status.Code < 400 {
			status.Code = http.StatusInternalServerError
		}
		text = fmt.Sprintf("%d %s", status.Code, status.Message)
	}
	// A header has neither lines nor other control characters.
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
	o.w.Header().Set(HeaderLogEnd, truncate(text, maxLogEnd))
}

func (o *httpLog) Write(p []byte) (int, error) {
	o.stalled.Reset(o.stall)
	defer o.stalled.Stop()
	o.begin()
	n, err := o.w.Write(p)
	if err == nil && o.follow {
		err = o.control.Flush()
	}
	return n, err
}

// Flush sends what was written, and the response's headers if nothing was.
func (o *httpLog) Flush() {
	o.stalled.Reset(o.stall)
	defer o.stalled.Stop()
	o.begin()
	o.control.Flush()
}

func serveLogWebSocket(w http.ResponseWriter, r *http.Request, opts Options, write func(context.Context, io.Writer) error) error {
	subprotocol, err := chooseSubprotocol(r, logSubprotocols)
	if err != nil {
		return refuse(w, err)
	}
	if err := checkOrigin(r, opts); err != nil {
		return refuse(w, err)
	}
	for name, values := range w.Header() {
		if strings.HasPrefix(name, "X-Log-") {
			if opts.header == nil {
				opts.header = http.Header{}
			}
			opts.header[name] = values
		}
	}
	out := &wsLog{w: w, r: r, opts: opts, subprotocol: subprotocol}
	ctx, cancel := context.WithCancelCause(context.WithValue(r.Context(), protocolKey{}, "websocket/"+subprotocol))
	defer cancel(nil)
	out.cancel = cancel
	defer func() {
		if out.conn != nil {
			out.conn.close()
		}
	}()
	err = write(ctx, out)
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil && !out.begun {
		return refuse(out.w, err)
	}
	if begin := out.begin(); begin != nil {
		if err == nil {
			err = begin
		}
		return err
	}
	if out.conn.over() == nil && out.conn.finish(closing(err)) == nil {
		out.conn.linger(out.reader)
	}
	return err
}

// wsLog writes a log as messages. It upgrades the request when it is first
// used.
type wsLog struct {
	w           http.ResponseWriter
	r           *http.Request
	opts        Options
	subprotocol string
	cancel      context.CancelCauseFunc // of write's context

	begun  bool
	err    error
	conn   *wsConn // nil if the upgrade has failed
	reader chan struct{}
}

func (o *wsLog) begin() error {
	if o.begun {
		return o.err
	}
	o.begun = true
	o.conn, o.err = greetWebSocket(o.w, o.r, o.opts, o.subprotocol, noChannel)
	o.w, o.r = nil, nil // with the server's buffers
	if o.err != nil {
		o.cancel(o.err)
		return o.err
	}
	o.reader = make(chan struct{})
	o.conn.wg.Go(func() {
		defer close(o.reader)
		for {
			if _, _, err := o.conn.next(false); err != nil {
				o.cancel(o.conn.gone(err))
				return
			}
		}
	})
	return nil
}

func (o *wsLog) Write(p []byte) (int, error) {
	if err := o.begin(); err != nil {
		return 0, err
	}
	return channelWriter{o.conn, noChannel}.Write(p)
}

// Flush upgrades the request if nothing was written yet.
func (o *wsLog) Flush() { o.begin() }
