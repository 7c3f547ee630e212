package shim

import (
	"errors"
	"io"
	"syscall"
)

// The frames of the control connection: a byte that says what, four bytes of
// length, the payload. The driver sends start first, then signal and kill; the
// shim answers with started or failed, and with ended last.
const (
	frameStart  = 'S' // a title and a Command; the command's standard streams come with it
	frameSignal = 's' // a signal's number, for the command alone
	frameKill   = 'k' // end everything

	frameStarted = 'p' // the command's pid
	frameFailed  = 'f' // the errno of the start
	frameEnded   = 'e' // the command's wait status, and how many processes couldn't be killed
)

// maxFrame bounds a frame. The kernel takes at most a quarter of the stack
// limit, at most 6 MiB, for arguments and environment together.
const maxFrame = 8 << 20

// Command is what a shim runs.
type Command struct {
	// Path is the program's file; Args[0] is how it is called.
	Path string
	Args []string
	Env  []string
	Dir  string
	// TTY makes the standard input, which is a terminal then, the command's
	// controlling terminal.
	TTY bool
	// Credential is who the command runs as; nil for who the shim runs as.
	Credential *syscall.Credential
}

// maxTitle bounds the title of a shim, in bytes.
const maxTitle = 160

func frame(kind byte, payload []byte) []byte {
	frame := append([]byte{kind}, numbers(uint32(len(payload)))...)
	return append(frame, payload...)
}

func writeFrame(w io.Writer, kind byte, payload []byte) error {
	_, err := w.Write(frame(kind, payload))
	return err
}

type frameHeader [5]byte

func readFrame(r io.Reader) (kind byte, payload []byte, err error) {
	var header frameHeader
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	return readPayload(r, header)
}

func readPayload(r io.Reader, header frameHeader) (kind byte, payload []byte, err error) {
	n := number(header[1:])
	if n > maxFrame {
		return 0, nil, errFrame
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r, payload)
	return header[0], payload, err
}

var errFrame = errors.New("broken frame on the control connection")

func numbers(values ...uint32) []byte {
	var b []byte
	for _, v := range values {
		b = append(b, byte(v>>24), byte(v>>16), byte(v>>8), byte(v))
	}
	return b
}

func number(b []byte) uint32 {
	return uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
}

func (c *Command) encodeStart(title string) []byte {
	title = title[:min(len(title), maxTitle)]
	b := append(numbers(uint32(len(title))), title...)
	return append(b, c.encode()...)
}

func decodeStart(b []byte) (title string, c Command, err error) {
	if len(b) < 4 || uint64(number(b)) > uint64(len(b)-4) {
		return "", c, errFrame
	}
	n := number(b)
	c, err = decodeCommand(b[4+n:])
	return string(b[4 : 4+n]), c, err
}

// encode writes the fields in order, each list after its length.
func (c *Command) encode() []byte {
	var b []byte
	text := func(s string) {
		b = append(b, numbers(uint32(len(s)))...)
		b = append(b, s...)
	}
	list := func(l []string) {
		b = append(b, numbers(uint32(len(l)))...)
		for _, s := range l {
			text(s)
		}
	}
	text(c.Path)
	list(c.Args)
	list(c.Env)
	text(c.Dir)
	tty := uint32(0)
	if c.TTY {
		tty = 1
	}
	if c.Credential == nil {
		return append(b, numbers(tty, 0)...)
	}
	b = append(b, numbers(tty, 1, c.Credential.Uid, c.Credential.Gid)...)
	return append(b, numbers(c.Credential.Groups...)...)
}

func decodeCommand(b []byte) (c Command, err error) {
	next := func() uint32 {
		if len(b) < 4 {
			err = errFrame
			return 0
		}
		n := number(b)
		b = b[4:]
		return n
	}
	text := func() string {
		n := next()
		if uint64(n) > uint64(len(b)) {
			err = errFrame
			return ""
		}
		s := string(b[:n])
		b = b[n:]
		return s
	}
	list := func() []string {
		var l []string
		for n := next(); n > 0 && err == nil; n-- {
			l = append(l, text())
		}
		return l
	}
	c.Path, c.Args, c.Env, c.Dir = text(), list(), list(), text()
	c.TTY = next() == 1
	if next() == 1 {
		c.Credential = &syscall.Credential{Uid: next(), Gid: next()}
		for len(b) > 0 && err == nil {
			c.Credential.Groups = append(c.Credential.Groups, next())
		}
	}
	return c, err
}
