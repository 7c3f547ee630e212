package files

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"sync"
	"time"
)

// A frame is a byte that says what, four bytes of length, the payload. Integers
// in a payload are varints, texts follow their length.
const (
	// From both sides.
	frameHello   = 'H' // magic, version, instance
	frameProblem = 'x' // whether a warning, path, text
	frameFatal   = '!' // text; the last frame
	frameDone    = 'z' // from the sender: nothing; from the receiver: files, bytes, failed

	// From the sender.
	frameTop   = 'T' // the source's name, whether it is a directory
	frameDir   = 'D' // a directory's number, parent, name, mode, time
	frameLink  = 'L' // a symbolic link's parent, name, time, text
	frameFile  = 'F' // a file's number, parent, name, mode, time, size
	frameBegin = 'b' // a file's number, how much of what is there is kept
	frameData  = 'd' // contents
	frameEnd   = 'e' // a file's number, how it went, SHA-256
	frameLeave = 'l' // a directory's number: no more comes for it
	frameTotal = 't' // how many files and bytes there are

	// From the receiver.
	frameRoot = 'R' // where the copy is
	frameWant = 'w' // a file's number, how much is there, SHA-256 of that
	frameSkip = 'n' // a file's number, which isn't wanted
	frameStop = 's' // a file's number, of which no more is wanted
)

const (
	magic = Command
	// version is what this side speaks. Sides of different versions speak the
	// older one.
	version = 1

	// chunk is the contents in a frame, at most; maxFrame is any payload.
	chunk    = 128 << 10
	maxFrame = chunk

	header = 5
)

// conn reads and writes frames. One goroutine reads; any may write.
type conn struct {
	r       *bufio.Reader
	payload []byte // of the last frame

	mu  sync.Mutex // protects what follows
	w   *bufio.Writer
	err error // of writing
}

func newConn(r io.Reader, w io.Writer) *conn {
	return &conn{r: bufio.NewReaderSize(r, 64<<10), w: bufio.NewWriterSize(w, 64<<10)}
}

// errBroken says that what came isn't of the protocol.
func errBroken(what string) *FatalError {
	return fatalf("the other side broke the protocol of %s: %s", Command, what)
}

// read returns the next frame. Its payload is valid until the next read.
func (c *conn) read() (kind byte, payload decoder, err error) {
	var head [header]byte
	if _, err := io.ReadFull(c.r, head[:]); err != nil {
		return 0, decoder{}, err
	}
	n := int(binary.BigEndian.Uint32(head[1:]))
	if n > maxFrame {
		return 0, decoder{}, errBroken(fmt.Sprintf("a frame of %d bytes, which is more than %d", uint32(n), maxFrame))
	}
	if cap(c.payload) < n {
		c.payload = make([]byte, max(n, 4096))
	}
	c.payload = c.payload[:n]
	if _, err := io.ReadFull(c.r, c.payload); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, decoder{}, err
	}
	return head[0], decoder{b: c.payload}, nil
}

// idle says whether a read would have to wait.
func (c *conn) idle() bool { return c.r.Buffered() < header }

// write buffers a frame.
func (c *conn) write(kind byte, payload []byte) error {
	var head [header]byte
	head[0] = kind
	binary.BigEndian.PutUint32(head[1:], uint32(len(payload)))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		_, c.err = c.w.Write(head[:])
	}
	if c.err == nil {
		_, c.err = c.w.Write(payload)
	}
	return c.err
}

// writeData buffers a frame of contents. They begin after room for the header.
func (c *conn) writeData(b []byte) error {
	b[0] = frameData
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-header))
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		_, c.err = c.w.Write(b)
	}
	return c.err
}

func (c *conn) flush() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = c.w.Flush()
	}
	return c.err
}

// fatal tells the other side why this one ends.
func (c *conn) fatal(err *FatalError) {
	_ = c.write(frameFatal, new(encoder).text(err.Text, maxText).b)
	_ = c.flush() // if it can't be told, it finds out
}

// hello is each side's first frame.
func (c *conn) hello(instance string) error {
	if err := c.write(frameHello, new(encoder).text(magic, len(magic)).number(version).text(instance, MaxName).b); err != nil {
		return err
	}
	return nil
}

// await reads the other side's first frame.
func (c *conn) await() (instance string, err error) {
	kind, p, err := c.read()
	if err != nil {
		return "", err
	}
	if kind == frameFatal {
		return "", remoteFatal(p)
	}
	if kind != frameHello || p.text(len(magic)) != magic {
		return "", fatalf("the other side doesn't speak the protocol of %s", Command)
	}
	if v := p.number(); v < 1 {
		return "", fatalf("the other side speaks version %d of the protocol of %s, which is too old: update it", v, Command)
	}
	// A later version may say more.
	return p.text(MaxName), p.err
}

func remoteFatal(p decoder) error {
	text := p.text(maxFrame)
	if p.end() != nil {
		return p.err
	}
	return &FatalError{Text: text, Remote: true}
}

func encodeProblem(p Problem) []byte {
	return new(encoder).flag(p.Warning).text(p.Path, maxPath).text(p.Text, maxText).b
}

func decodeProblem(p decoder) (Problem, error) {
	problem := Problem{Warning: p.flag(), Path: p.text(maxPath), Text: p.text(maxText)}
	return problem, p.end()
}

// encoder writes a payload.
type encoder struct{ b []byte }

func (e *encoder) number(n uint64) *encoder {
	e.b = binary.AppendUvarint(e.b, n)
	return e
}

// text writes at most limit bytes of a text.
func (e *encoder) text(s string, limit int) *encoder {
	s = s[:min(len(s), limit)]
	e.number(uint64(len(s)))
	e.b = append(e.b, s...)
	return e
}

func (e *encoder) flag(f bool) *encoder {
	if f {
		return e.number(1)
	}
	return e.number(0)
}

func (e *encoder) time(t time.Time) *encoder {
	e.b = binary.AppendVarint(e.b, t.Unix())
	return e.number(uint64(t.Nanosecond()))
}

// mode writes a mode as Unix has it.
func (e *encoder) mode(m fs.FileMode) *encoder {
	bits := uint64(m.Perm())
	for i, bit := range specialBits {
		if m&bit != 0 {
			bits |= 0o1000 << i
		}
	}
	return e.number(bits)
}

var specialBits = [...]fs.FileMode{fs.ModeSticky, fs.ModeSetgid, fs.ModeSetuid}

// decoder reads a payload. After an error it returns zero values.
type decoder struct {
	b   []byte
	err error
}

var errPayload = errBroken("a frame that can't be read")

func (d *decoder) fail() {
	d.b = nil
	if d.err == nil {
		d.err = errPayload
	}
}

func (d *decoder) number() uint64 {
	n, size := binary.Uvarint(d.b)
	if size <= 0 {
		d.fail()
		return 0
	}
	d.b = d.b[size:]
	return n
}

// size reads a number that is an int64.
func (d *decoder) size() int64 {
	n := d.number()
	if int64(n) < 0 {
		d.fail()
		return 0
	}
	return int64(n)
}

func (d *decoder) text(limit int) string {
	n := d.number()
	if n > uint64(len(d.b)) || n > uint64(limit) {
		d.fail()
		return ""
	}
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

func (d *decoder) flag() bool {
	n := d.number()
	if n > 1 {
		d.fail()
	}
	return n == 1
}

func (d *decoder) time() time.Time {
	seconds, size := binary.Varint(d.b)
	if size <= 0 {
		d.fail()
		return time.Time{}
	}
	d.b = d.b[size:]
	nanoseconds := d.number()
	if nanoseconds >= 1e9 {
		d.fail()
		return time.Time{}
	}
	return time.Unix(seconds, int64(nanoseconds))
}

func (d *decoder) mode() fs.FileMode {
	n := d.number()
	if n > 0o7777 {
		d.fail()
		return 0
	}
	mode := fs.FileMode(n & 0o777)
	for i, bit := range specialBits {
		if n&(0o1000<<i) != 0 {
			mode |= bit
		}
	}
	return mode
}

// end says whether the payload was read, and nothing is left of it.
func (d *decoder) end() error {
	if len(d.b) > 0 {
		d.fail()
	}
	return d.err
}

// A partial copy is called after the file, so that another attempt finds it.
const (
	partialPrefix = ".aaserver-"
	partialSuffix = ".part"
	partialLength = len(partialPrefix) + 32 + len(partialSuffix)
)

func partialName(name string) bool {
	return len(name) == partialLength && strings.HasPrefix(name, partialPrefix) && strings.HasSuffix(name, partialSuffix)
}

// lost is the error of a stream that ended before the copy did.
func lost(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the connection ended before the copy did: %w", io.ErrUnexpectedEOF)
	}
	return err
}
