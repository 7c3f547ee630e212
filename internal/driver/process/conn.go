package process

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process/shim"
)

// conn implements driver.Conn.
type conn struct {
	driver *Driver
	req    driver.Request
	id     driver.InstanceID

	mu   sync.Mutex  // protects held
	held []*audience // whose last output is kept for who is about to join
}

var (
	_ driver.Execer       = (*conn)(nil)
	_ driver.Attacher     = (*conn)(nil)
	_ driver.Logger       = (*conn)(nil)
	_ driver.PortDialer   = (*conn)(nil)
	_ driver.SocketDialer = (*conn)(nil)
	_ driver.PortListener = (*conn)(nil)
)

// Open implements driver.Driver.
func (d *Driver) Open(_ context.Context, req driver.Request) (driver.Conn, error) {
	id := driver.InstanceID{Target: req.Target.UID, Name: req.Instance}
	if err := errors.Join(checkPathElement(string(id.Target)), checkPathElement(id.Name)); err != nil {
		return nil, driver.Errorf(driver.Invalid, "%w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	// One that was scaled down may still run, or have a log.
	if d.instances[id] == nil && !slices.Contains(req.Target.InstanceNames(), id.Name) {
		if _, err := os.Stat(d.logDir(id)); err != nil {
			return nil, driver.Errorf(driver.NotFound, "target %q has no instance %q", req.Target.Name, id.Name)
		}
	}
	return &conn{driver: d, req: req, id: id}, nil
}

// Close implements driver.Conn.
func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, a := range c.held {
		a.release()
	}
	c.held = nil
	return nil
}

// run returns the instance's run, or fails with NotRunning.
func (c *conn) run() (*run, error) {
	d := c.driver
	d.mu.Lock()
	defer d.mu.Unlock()
	i := d.instances[c.id]
	if r := i.running(); r != nil {
		return r, nil
	}
	if i == nil || i.run == nil {
		return nil, driver.Errorf(driver.NotRunning, "instance %s doesn't run: it hasn't been started", c.id.Name)
	}
	t := i.run.terminated
	return nil, driver.Errorf(driver.NotRunning, "instance %s doesn't run: it ended with exit code %d (%s)", c.id.Name, t.ExitCode, t.Reason)
}

// Exec implements driver.Execer.
func (c *conn) Exec(_ context.Context, opts driver.ExecOptions) (driver.Run, error) {
	r, err := c.run()
	if err != nil {
		return nil, err
	}
	command, err := r.setting.command(opts.Command, opts.TTY)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, stdio driver.Stdio) error {
		return r.exec(ctx, &c.driver.shims, c.req.Target.Namespace+"/"+c.id.Name+" exec", command, stdio)
	}, nil
}

// exec runs a command beside the instance.
func (r *run) exec(ctx context.Context, shims *shim.Starter, title string, command *shim.Command, stdio driver.Stdio) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	streams, err := newStreams(command, stdio.Stdin != nil, stdio.Stdout != nil, stdio.Stderr != nil)
	if err != nil {
		return err
	}
	defer streams.close()
	if command.TTY {
		// A size that is known already is there before the command looks.
		select {
		case size, ok := <-stdio.Resize:
			if ok {
				setSize(streams.in, size)
			}
		default:
		}
	}
	child, err := shims.Start(title, command, streams.stdin, streams.stdout, streams.stderr)
	streams.started()
	if err != nil {
		return r.setting.startError(command, err)
	}
	if !r.addExec(child) {
		child.Kill()
		child.Wait()
		return r.gone()
	}
	defer r.removeExec(child)
	stop := context.AfterFunc(ctx, child.Kill)
	defer stop()

	var input, output sync.WaitGroup
	if stdio.Stdin != nil {
		input.Go(func() {
			// A terminal's input has no end: as with containers, a client
			// whose own has one leaves the command waiting for more.
			if _, err := io.Copy(streams.in, stdio.Stdin); err != nil {
				stdio.Stdin.Close() // the command has closed its end
			} else if !command.TTY {
				streams.in.Close()
			}
		})
	}
	resized := make(chan struct{})
	if command.TTY && stdio.Resize != nil {
		input.Go(func() { resize(streams.in, stdio.Resize, resized) })
	}
	var writeErr error
	var once sync.Once
	deliver := func(f *os.File, w io.Writer) {
		if f == nil {
			return
		}
		if w == nil {
			w = io.Discard
		}
		output.Go(func() {
			copyOutput(f, execBuffer, func(data []byte, _ bool) (int, error) {
				if len(data) == 0 {
					return 0, nil
				}
				n, err := w.Write(data)
				if err != nil {
					once.Do(func() { writeErr = err })
					child.Kill()
				}
				return n, err
			})
		})
	}
	deliver(streams.out, stdio.Stdout)
	deliver(streams.err, stdio.Stderr)

	result := child.Wait()
	streams.ended()
	output.Wait()
	close(resized)
	if stdio.Stdin != nil {
		stdio.Stdin.Close()
	}
	input.Wait()

	killed := result.Status.Signaled() && result.Status.Signal() == syscall.SIGKILL
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case killed && r.over():
		return r.gone()
	case writeErr != nil:
		return fmt.Errorf("writing to the client: %w", writeErr)
	}
	return exitError(exitCode(result.Status))
}

// over says whether the instance has ended, or is about to.
func (r *run) over() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closing
}

func (r *run) gone() error {
	return driver.Errorf(driver.NotRunning, "instance %s has ended, and the command beside it with it", r.instance.Name)
}

// Attach implements driver.Attacher.
func (c *conn) Attach(_ context.Context, opts driver.AttachOptions) (driver.Run, error) {
	r, err := c.run()
	if err != nil {
		return nil, err
	}
	if opts.Stdin && r.stdin == nil {
		return nil, driver.Errorf(driver.Invalid, "instance %s has no standard input: set spec.process.stdin, or attach without", c.id.Name)
	}
	if opts.TTY && !r.tty {
		return nil, driver.Errorf(driver.Invalid, "instance %s has no terminal: set spec.process.tty, or attach without", c.id.Name)
	}
	if opts.Stdin && r.stdin.closed() {
		return nil, driver.Errorf(driver.Invalid, "the standard input of instance %s was ended by a client that had attached: attach without", c.id.Name)
	}
	if opts.Replay > 0 {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !r.audience.hold() {
			// It has ended since, and may have been started again.
			if _, err := c.run(); err != nil {
				return nil, err
			}
			return nil, driver.Errorf(driver.NotRunning, "instance %s has just ended, and was started again: attach again", c.id.Name)
		}
		c.held = append(c.held, r.audience)
	}
	return func(ctx context.Context, stdio driver.Stdio) error { return r.attach(ctx, opts, stdio) }, nil
}

// attach joins a client to the instance's streams.
func (r *run) attach(ctx context.Context, opts driver.AttachOptions, stdio driver.Stdio) error {
	m := r.audience.join(opts.Replay)
	defer r.audience.leave(m)
	inputCtx, cancel := context.WithCancel(ctx)
	var input sync.WaitGroup
	defer func() {
		cancel()
		if stdio.Stdin != nil {
			stdio.Stdin.Close()
		}
		input.Wait()
	}()
	if stdio.Stdin != nil && r.stdin != nil {
		input.Go(func() {
			to := writerFunc(func(data []byte) (int, error) {
				if err := r.stdin.write(inputCtx, data); err != nil {
					stdio.Stdin.Close()
					return 0, err
				}
				return len(data), nil
			})
			// The end of the client's input, unless it is to be handed on, and its
			// failure leave the instance's as it is.
			if _, err := io.Copy(to, stdio.Stdin); err == nil && opts.CloseStdin && !r.tty {
				r.stdin.close(inputCtx)
			}
		})
	}
	if r.tty && stdio.Resize != nil {
		input.Go(func() { resize(r.streams.in, stdio.Resize, inputCtx.Done()) })
	}
	for {
		chunk, err := m.next(ctx)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		w := stdio.Stdout
		if chunk.stream == v1.LogStreamStderr {
			w = stdio.Stderr
		}
		if w == nil {
			continue
		}
		if _, err := w.Write(chunk.data); err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return fmt.Errorf("writing to the client: %w", err)
		}
	}
	<-r.ended
	return exitError(int(r.terminated.ExitCode))
}

type writerFunc func(data []byte) (int, error)

func (f writerFunc) Write(data []byte) (int, error) { return f(data) }

// resize sets the terminal to each size that comes; the last one counts,
// whoever of several clients it is from.
func resize(terminal *os.File, sizes <-chan driver.TerminalSize, done <-chan struct{}) {
	for {
		select {
		case size, ok := <-sizes:
			if !ok {
				return
			}
			setSize(terminal, size)
		case <-done:
			return
		}
	}
}

// Logs implements driver.Logger.
func (c *conn) Logs(_ context.Context, opts driver.LogOptions) (driver.LogReader, error) {
	d := c.driver
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	log, err := d.useLog(c.id)
	if err != nil {
		return nil, err
	}
	r, err := log.read(opts)
	if err != nil {
		d.releaseLog(c.id, log)
		if errors.Is(err, errNoPrevious) {
			return nil, driver.Errorf(driver.NotFound, "instance %s has no log of a previous run", c.id.Name)
		}
		return nil, err
	}
	return &openReader{logReader: r, release: func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.releaseLog(c.id, log)
	}}, nil
}

// openReader is a reader that counts as a user of its log.
type openReader struct {
	*logReader
	once    sync.Once
	release func()
}

func (r *openReader) Close() error {
	err := r.logReader.Close()
	r.once.Do(r.release)
	return err
}
