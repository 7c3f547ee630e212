package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"k8s.io/kubectl/pkg/util/interrupt"
	"k8s.io/kubectl/pkg/util/term"
)

// console is the user's side of a session: a terminal, or what stands for it.
type console struct {
	stdio
	term.TTY
	ErrOut io.Writer
	// raw says that the user's terminal becomes the command's: what is typed
	// goes there as it is.
	raw bool
	// size is the terminal's at the beginning, and sizes those that it has from
	// then on; nil if the output is no terminal.
	size  *terminalSize
	sizes term.TerminalSizeQueue
}

// console returns the user's side. A terminal is asked for on the other side
// only if there is one here to type into.
func (s *stdio) console(c *client) *console {
	local := &console{stdio: *s, TTY: term.TTY{In: c.In, Out: c.Out}, ErrOut: c.ErrOut}
	if !s.stdin || !s.tty {
		return local
	}
	if !local.IsTerminalIn() {
		if !s.quiet {
			fmt.Fprintln(c.ErrOut, "Unable to use a TTY - input is not a terminal or the right kind of file")
		}
		return local
	}
	local.raw = true
	return local
}

// safe runs a session, and restores the terminal afterwards, whatever happens:
// on signals at once.
func (l *console) safe(cancel context.CancelCauseFunc, session func() error) error {
	t := l.TTY
	if !l.stdin {
		t.In = nil
	}
	t.Raw = l.raw
	// The default would be to exit here. Signals end the command's context, but
	// for one that is Go's outside of a session.
	t.Parent = interrupt.New(func(os.Signal) {})
	quits := make(chan os.Signal, 1)
	signal.Notify(quits, syscall.SIGQUIT)
	over := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-quits:
			cancel(terminated{syscall.SIGQUIT})
		case <-over:
		}
	})
	defer watching.Wait()
	defer close(over)
	defer signal.Stop(quits)
	if l.raw {
		if size := t.GetSize(); size != nil {
			l.size = &terminalSize{Width: size.Width, Height: size.Height}
		}
		if queue := t.MonitorSize(); queue != nil {
			l.sizes = queue
		}
	}
	return t.Safe(session)
}

// tell tells the user of the session something, in a line of its own.
func (l *console) tell(message string) {
	if l.quiet {
		return
	}
	line := "\n[" + message + "]\n"
	if l.raw {
		line = "\r\n[" + message + "]\r\n"
	}
	fmt.Fprint(l.ErrOut, line)
}

const (
	plainText  = "\x1b[0m"
	showCursor = "\x1b[?25h"
)

// reset has the terminal show plain text after a session that its program
// couldn't end in good order.
func (l *console) reset(err error) {
	var broken *brokenError
	if l.raw && l.IsTerminalOut() && os.Getenv("TERM") != "dumb" && (errors.Is(err, errDetached) || errors.As(err, &broken)) {
		fmt.Fprint(l.Out, plainText+showCursor)
		if errors.As(err, &broken) {
			fmt.Fprintln(l.Out)
		}
	}
}

// wantsOut finds the keys that end a session with a silent server: ctrl-c, or ~.
// as in ssh, of which the first key may have been typed before.
func wantsOut(before byte, keys []byte) bool {
	return bytes.IndexByte(keys, 3) >= 0 || bytes.Contains(keys, []byte("~.")) || before == '~' && keys[0] == '.'
}

const (
	// maxKeys is what is read from a terminal at once, and typedAhead how often
	// before the reader waits for the network.
	maxKeys    = 4 << 10
	typedAhead = 256
)

// keyboard reads a terminal in raw mode also while nobody takes what is typed,
// so that the user's own keys work when the network doesn't.
type keyboard struct {
	keys chan []byte
	rest []byte
	err  error // set before keys is closed
}

// newKeyboard begins to read, until an error or the first key after the end of
// ctx: a read of a terminal can't be ended. seen is shown what is typed, and the
// key before it.
func newKeyboard(ctx context.Context, in io.Reader, seen func(before byte, keys []byte)) io.Reader {
	k := &keyboard{keys: make(chan []byte, typedAhead)}
	go func() {
		defer close(k.keys)
		buf := make([]byte, maxKeys)
		before := byte(0)
		for {
			n, err := in.Read(buf)
			if n > 0 {
				seen(before, buf[:n])
				before = buf[n-1]
				select {
				case k.keys <- bytes.Clone(buf[:n]):
				case <-ctx.Done():
				}
			}
			if err == nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				k.err = err
				return
			}
		}
	}()
	return k
}

func (k *keyboard) Read(p []byte) (int, error) {
	if len(k.rest) == 0 {
		keys, ok := <-k.keys
		if !ok {
			return 0, k.err
		}
		k.rest = keys
	}
	n := copy(p, k.rest)
	k.rest = k.rest[n:]
	return n, nil
}

// errDetached is the cause with which a session ends that the user detached
// from.
var errDetached = errors.New("detached")

// detachable calls detach when the user types the keys for it.
type detachable struct {
	io.Reader
	detach func()
}

// newDetachable watches what a terminal in raw mode reads. A terminal has no
// end of file then, so that an end means the keys.
func newDetachable(in io.Reader, keys string, detach func()) (io.Reader, error) {
	reader, err := term.NewDetachableReader(in, keys)
	if err != nil {
		return nil, fmt.Errorf("--detach-keys=%q: %w", keys, err)
	}
	return &detachable{Reader: reader, detach: detach}, nil
}

func (d *detachable) Read(p []byte) (int, error) {
	n, err := d.Reader.Read(p)
	if errors.Is(err, io.EOF) {
		d.detach()
	}
	return n, err
}
