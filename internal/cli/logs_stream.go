package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// cursorHeader is the time after which a response's lines are.
	cursorHeader = "X-Log-Cursor"
	// endTrailer says how a log ended: a status code, 200 for its end, and a
	// text. The server sends it to those who have it in the request, and
	// announces it: where it is missing then, the response was cut off.
	endTrailer = "X-Log-End"
	// maxOpening is how many logs are being opened at once.
	maxOpening = 32
	// streamBuffer is how much of each log a connection holds when there may be
	// many.
	streamBuffer = 256 << 10
	dialTimeout  = 30 * time.Second
)

// errUnheard ends a stream of which nothing was heard for too long.
var errUnheard = errors.New("nothing was heard from the server for too long")

// brokenLog is the error of a log that had been opened.
type brokenLog struct {
	err error
	// told says that the server gave the reason.
	told bool
}

func (b *brokenLog) Error() string { return "the log broke off: " + b.err.Error() }
func (b *brokenLog) Unwrap() error { return b.err }

// logClient opens logs. It notices a server that has gone silent: over HTTP/2
// by pings, over HTTP/1.1, which has none, by a log's own silence.
type logClient struct {
	*connection
	opening chan struct{}
}

// connectLogs prepares requests for logs. many says that there may be many at
// once.
func (c *client) connectLogs(many bool) (*logClient, error) {
	conn, err := c.connect(func(config *rest.Config) {
		// A dialer of its own gives the configuration a transport of its own,
		// which can be changed.
		dialer := &net.Dialer{Timeout: dialTimeout, KeepAlive: dialTimeout}
		config.Dial = dialer.DialContext
		config.Wrap(func(rt http.RoundTripper) http.RoundTripper {
			settings := &http.HTTP2Config{SendPingTimeout: c.peerTimeout / 2, PingTimeout: c.peerTimeout / 2}
			if many {
				settings.MaxReceiveBufferPerStream = streamBuffer
			}
			for inner := rt; inner != nil; {
				if transport, ok := inner.(*http.Transport); ok {
					transport.HTTP2 = settings
				}
				wrapper, ok := inner.(utilnet.RoundTripperWrapper)
				if !ok {
					break
				}
				inner = wrapper.WrappedRoundTripper()
			}
			return responses{rt}
		})
	})
	if err != nil {
		return nil, err
	}
	return &logClient{connection: conn, opening: make(chan struct{}, maxOpening)}, nil
}

// responses hands the responses of requests to those who ask in the context:
// rest.Request.Stream returns bodies alone.
type responses struct{ http.RoundTripper }

type responseKey struct{}

func (r responses) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := r.RoundTripper.RoundTrip(req)
	if to, ok := req.Context().Value(responseKey{}).(**http.Response); ok {
		*to = resp
	}
	return resp, err
}

// WrappedRoundTripper implements utilnet.RoundTripperWrapper.
func (r responses) WrappedRoundTripper() http.RoundTripper { return r.RoundTripper }

// stream opens a log and reads it to its end. The end of a log that was opened
// is a brokenLog unless it is in good order.
func (c *logClient) stream(ctx context.Context, target string, query *v1.TargetLogOptions, read func(*http.Response, io.Reader) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	select {
	case c.opening <- struct{}{}:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	resp, body, err := c.open(ctx, cancel, target, query)
	<-c.opening
	if err != nil {
		return err
	}
	defer body.Close()
	err = read(resp, &endingReader{body, resp})
	var output *outputError
	var broken *brokenLog
	switch {
	case errors.As(err, &output):
		return err
	case context.Cause(ctx) == errUnheard:
		return &brokenLog{err: errUnheard}
	case errors.As(err, &broken):
		return broken
	case err != nil:
		return &brokenLog{err: err}
	}
	return nil
}

// endingReader reads the body of a log. Its end is an error if the trailer
// doesn't say that the log has ended: the last line may be a part of one then, as
// where a body breaks off.
type endingReader struct {
	io.Reader
	resp *http.Response
}

func (r *endingReader) Read(p []byte) (int, error) {
	_, announced := r.resp.Trailer[endTrailer]
	n, err := r.Reader.Read(p)
	if err == io.EOF && announced {
		if ended := ending(r.resp.Trailer.Get(endTrailer)); ended != nil {
			err = ended
		}
	}
	return n, err
}

// ending returns what the trailer of a log says.
func ending(trailer string) error {
	code, text, _ := strings.Cut(trailer, " ")
	switch n, err := strconv.Atoi(code); {
	case trailer == "":
		return &brokenLog{err: io.ErrUnexpectedEOF}
	case err == nil && n < http.StatusBadRequest:
		return nil
	default:
		return &brokenLog{err: errors.New(text), told: true}
	}
}

func (c *logClient) open(ctx context.Context, cancel context.CancelCauseFunc, target string, query *v1.TargetLogOptions) (*http.Response, io.ReadCloser, error) {
	watchdog := time.AfterFunc(c.peerTimeout, func() { cancel(errUnheard) })
	var resp *http.Response
	body, err := c.subresource(http.MethodGet, target, "log").SetHeader(endTrailer, "1").VersionedParams(query, scheme.ParameterCodec).
		Stream(context.WithValue(ctx, responseKey{}, &resp))
	watchdog.Stop()
	if err != nil {
		if context.Cause(ctx) == errUnheard {
			err = fmt.Errorf("opening the log of target %q: %w", target, errUnheard)
		}
		return nil, nil, err
	}
	if resp.ProtoMajor == 1 {
		body = &watchedBody{body, watchdog, c.peerTimeout}
	}
	return resp, body, nil
}

// watchedBody ends a stream that says nothing while it is read.
type watchedBody struct {
	io.ReadCloser
	watchdog *time.Timer
	silence  time.Duration
}

func (b *watchedBody) Read(p []byte) (int, error) {
	b.watchdog.Reset(b.silence)
	defer b.watchdog.Stop()
	return b.ReadCloser.Read(p)
}

// position is how far an instance's log has been read.
//
// The times of an instance's lines increase, and the server returns what comes
// after a time. It keeps a long line in parts, each with a time of its own, and
// gives the first one's where it returns the line from its beginning. So a log
// is resumed a nanosecond before the last line, which then comes again as a
// whole, and what was read of it is skipped.
type position struct {
	// before is the server's word for where the log began, "" if it gave none.
	before string
	// last is the time of the last line, of which so many bytes of text were
	// read, or all of it.
	last  time.Time
	taken int
	whole bool
}

// cursor is where to resume, "" if that isn't known.
func (p *position) cursor() string {
	if p.last.IsZero() {
		return p.before
	}
	return p.last.Add(-1).UTC().Format(time.RFC3339Nano)
}

// parseLine takes off a line's instance, if it has one, and says how many bytes
// its time takes. A line of which that can't be told has the time of the one
// before.
func parseLine(text []byte, prefixed bool, before time.Time) (instance, raw []byte, stamp int, at time.Time) {
	raw, at = text, before
	if prefixed {
		if name, rest, ok := bytes.Cut(text, []byte("] ")); ok && bytes.HasPrefix(name, []byte{'['}) {
			instance, raw = name[1:], rest
		}
	}
	if i := bytes.IndexByte(raw, ' '); i > 0 {
		if t, err := time.Parse(time.RFC3339Nano, string(raw[:i])); err == nil {
			stamp, at = i+1, t
		}
	}
	return instance, raw, stamp, at
}

// logReader pushes the lines of responses into a source.
type logReader struct {
	to *lineSource
	// from returns the origin of lines. With prefixed it is told the instance
	// that stands before each.
	from     func(instance []byte) *origin
	prefixed bool
	max      int // lineBuffer, or less in a test
	// goesOn says that the log is read on from where it ends: what stands after
	// the last newline is the beginning of a line, which comes again as a whole.
	goesOn bool
}

// read pushes what p hasn't seen of an instance's log; with nil, all of a log of
// any instances. A last line without a newline is one, but not where the log
// broke off: it will come again.
func (r *logReader) read(body io.Reader, p *position) error {
	lines := &lineReader{r: body, max: r.max}
	all := p == nil
	if all {
		p = &position{}
	}
	var whose *origin
	begins, skip, drop := true, 0, false
	for {
		text, ended, err := lines.next()
		switch {
		case err == nil:
		case !errors.Is(err, io.EOF):
			return err
		case begins && len(text) == 0, r.goesOn:
			return nil
		default:
			ended = true
		}
		l := line{raw: text, at: p.last, ends: ended}
		if begins {
			var instance []byte
			instance, l.raw, l.stamp, l.at = parseLine(text, r.prefixed, p.last)
			whose = r.from(instance)
			skip, drop = 0, false
			known := l.stamp > 0 && !all
			switch {
			case known && (l.at.Before(p.last) || l.at.Equal(p.last) && p.whole):
				drop = true
			case known && l.at.Equal(p.last) && p.taken > 0:
				skip = p.taken
				l.raw, l.stamp = l.raw[l.stamp:], 0
			default:
				if p.taken > 0 && !p.whole {
					// The rest of a line that was cut is no more.
					if err := r.to.push(line{from: whose, at: p.last, ends: true}); err != nil {
						return err
					}
				}
				l.begins = true
				p.last, p.taken, p.whole = l.at, 0, false
			}
		}
		l.from = whose
		begins = ended
		if !drop {
			skipped := min(skip, len(l.raw))
			l.raw, skip = l.raw[skipped:], skip-skipped
			if len(l.raw) > 0 || l.begins || l.ends {
				l.raw = bytes.Clone(l.raw)
				if err := r.to.push(l); err != nil {
					return err
				}
			}
			p.taken += len(l.raw) - l.stamp
			p.whole = ended
		}
		if err != nil {
			return nil
		}
	}
}
