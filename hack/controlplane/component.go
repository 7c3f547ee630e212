package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// readyTimeout is long, for machines that are busy.
	readyTimeout = 2 * time.Minute
	readyPoll    = 50 * time.Millisecond
	// stopTimeout is how long a component may take to end when it is told to.
	stopTimeout = 15 * time.Second
)

// component is one program of the control plane.
type component struct {
	name    string
	program string
	args    []string
	log     string
	// ready asks once whether the component does its work.
	ready func(context.Context) error

	process *process // nil while it is stopped
}

type process struct {
	*os.Process
	ended    chan struct{} // closed when it has been waited for
	expected atomic.Bool   // told to end
}

// endedError is the end of a component that no one asked for.
type endedError struct {
	name, log string
	state     *os.ProcessState
}

func (e *endedError) Error() string {
	return fmt.Sprintf("%s ended early (%s): see %s", e.name, e.state, e.log)
}

// start starts the program; ended is told if it ends before stop is called.
// The calling goroutine must be locked to a thread that lives as long as this
// process: the kernel ends the program with that thread, whatever ends this
// process.
func (c *component) start(ended func(error)) error {
	log, err := os.OpenFile(c.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(c.program, c.args...)
	cmd.Stdout, cmd.Stderr = log, log
	// All is on loopback: a proxy could only get in between.
	cmd.Env = slices.DeleteFunc(os.Environ(), func(variable string) bool {
		name, _, _ := strings.Cut(strings.ToLower(variable), "=")
		return name == "http_proxy" || name == "https_proxy" || name == "all_proxy"
	})
	// A process group of its own keeps a terminal's interrupt from it: it is
	// this process that stops the components, in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	p := &process{Process: cmd.Process, ended: make(chan struct{})}
	c.process = p
	go func() {
		defer close(p.ended)
		cmd.Wait() // its error is in the state
		if !p.expected.Load() {
			ended(&endedError{name: c.name, log: c.log, state: cmd.ProcessState})
		}
	}()
	return nil
}

// waitReady waits until the component is ready or ctx ends.
func (c *component) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, readyTimeout, fmt.Errorf("%s isn't ready after %s: see %s", c.name, readyTimeout, c.log))
	defer cancel()
	ticker := time.NewTicker(readyPoll)
	defer ticker.Stop()
	for {
		err := c.ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			if cause := context.Cause(ctx); errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return fmt.Errorf("%w: %w", cause, err)
			}
			return context.Cause(ctx)
		case <-ticker.C:
		}
	}
}

func (c *component) running() bool {
	if c.process == nil {
		return false
	}
	select {
	case <-c.process.ended:
		return false
	default:
		return true
	}
}

// stop ends the program by the signal, and waits for its end. What doesn't heed
// the signal in time is killed.
func (c *component) stop(signal syscall.Signal) {
	p := c.process
	if p == nil {
		return
	}
	p.expected.Store(true)
	// A stopped process takes no signal but SIGKILL before it continues.
	p.Signal(signal)
	p.Signal(syscall.SIGCONT)
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-p.ended:
	case <-timer.C:
		p.Kill()
		<-p.ended
	}
	c.process = nil
}

// tail returns a file's last lines, bounded.
func tail(name string, lines int) string {
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	const limit = 8 << 10
	if info, err := f.Stat(); err == nil && info.Size() > limit {
		f.Seek(-limit, io.SeekEnd)
	}
	content, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return ""
	}
	all := bytes.Split(bytes.TrimSpace(content), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
