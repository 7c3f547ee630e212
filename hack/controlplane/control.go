package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"
)

// request is what stop, start and restart ask the launcher to do: one line of
// JSON on DIR/control.sock, answered by one.
type request struct {
	Component string `json:"component"`
	Stop      bool   `json:"stop,omitempty"`
	Kill      bool   `json:"kill,omitempty"` // stop it by SIGKILL
	Start     bool   `json:"start,omitempty"`

	reply chan error // buffered
}

type response struct {
	Error string `json:"error,omitempty"`
}

// inDir calls f with a path of the directory that is short, as a unix socket's
// has to be.
func inDir(dir string, f func(short string) error) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return f(fmt.Sprintf("/proc/self/fd/%d", d.Fd()))
}

// serveControl takes requests until its close is called, which waits for all
// that it started.
func serveControl(ctx context.Context, dir string) (requests <-chan request, closeControl func(), err error) {
	var listener *net.UnixListener
	err = inDir(dir, func(short string) error {
		name := short + "/control.sock"
		// One that was left by a launcher that was killed; there is none other
		// now, by the directory's lock.
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	listener.SetUnlinkOnClose(false) // its path means nothing by then
	ctx, cancel := context.WithCancel(ctx)
	queue := make(chan request)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			running.Go(func() { answer(ctx, conn, queue) })
		}
	})
	return queue, func() {
		cancel()
		listener.Close()
		running.Wait()
	}, nil
}

func answer(ctx context.Context, conn net.Conn, queue chan<- request) {
	defer conn.Close()
	unblock := context.AfterFunc(ctx, func() { conn.SetReadDeadline(time.Now()) })
	defer unblock()
	var r request
	if err := json.NewDecoder(io.LimitReader(conn, 4<<10)).Decode(&r); err != nil {
		return
	}
	r.reply = make(chan error, 1)
	var err error
	select {
	case queue <- r:
		select {
		case err = <-r.reply:
		case <-ctx.Done():
			err = fmt.Errorf("the control plane ends: %w", context.Cause(ctx))
		}
	case <-ctx.Done():
		err = fmt.Errorf("the control plane ends: %w", context.Cause(ctx))
	}
	var resp response
	if err != nil {
		resp.Error = err.Error()
	}
	json.NewEncoder(conn).Encode(resp)
}

// ask sends the launcher in dir a request and waits for its answer.
func ask(ctx context.Context, dir string, r request) error {
	var conn net.Conn
	err := inDir(dir, func(short string) (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "unix", short+"/control.sock")
		return err
	})
	if err != nil {
		return fmt.Errorf("no control plane runs in %s: start one with controlplane up --dir %s (%w)", dir, dir, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return err
	}
	var resp response
	if err := json.NewDecoder(conn).Decode(&resp); err != nil {
		return fmt.Errorf("the control plane ended before it answered: %w", err)
	}
	if resp.Error != "" {
		return errors.New(resp.Error)
	}
	return nil
}
