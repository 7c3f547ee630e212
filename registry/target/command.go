package target

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/registry/rest"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

var upgradeMethods = []string{http.MethodGet, http.MethodPost}

// ExecREST is the exec subresource.
type ExecREST struct {
	*connector
}

var _ rest.Connecter = (*ExecREST)(nil)

// New implements rest.Storage.
func (*ExecREST) New() runtime.Object { return &v1.TargetExecOptions{} }

// Destroy implements rest.Storage.
func (*ExecREST) Destroy() {}

// ConnectMethods implements rest.Connecter.
func (*ExecREST) ConnectMethods() []string { return upgradeMethods }

// NewConnectOptions implements rest.Connecter.
func (*ExecREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &v1.TargetExecOptions{}, false, ""
}

// Connect implements rest.Connecter.
func (r *ExecREST) Connect(ctx context.Context, name string, options runtime.Object, responder rest.Responder) (http.Handler, error) {
	opts := options.(*v1.TargetExecOptions)
	v1.SetDefaults_TargetExecOptions(opts)
	if err := badOptions(validation.ValidateTargetExecOptions(opts)); err != nil {
		return nil, err
	}
	auditCommand(ctx, opts.Command)
	streams := streaming.CommandRequest{Stdin: opts.Stdin, Stdout: opts.Stdout, Stderr: opts.Stderr, TTY: opts.TTY}
	return r.command(ctx, name, opts.Instance, "exec", streams, responder,
		func(ctx context.Context, conn driver.Conn, target *v1.Target) (driver.Run, error) {
			execer, err := ability[driver.Execer](conn, target, "exec")
			if err != nil {
				return nil, err
			}
			return execer.Exec(ctx, driver.ExecOptions{Command: opts.Command, TTY: opts.TTY})
		})
}

// AttachREST is the attach subresource.
type AttachREST struct {
	*connector
}

var _ rest.Connecter = (*AttachREST)(nil)

// New implements rest.Storage.
func (*AttachREST) New() runtime.Object { return &v1.TargetAttachOptions{} }

// Destroy implements rest.Storage.
func (*AttachREST) Destroy() {}

// ConnectMethods implements rest.Connecter.
func (*AttachREST) ConnectMethods() []string { return upgradeMethods }

// NewConnectOptions implements rest.Connecter.
func (*AttachREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &v1.TargetAttachOptions{}, false, ""
}

// Connect implements rest.Connecter.
func (r *AttachREST) Connect(ctx context.Context, name string, options runtime.Object, responder rest.Responder) (http.Handler, error) {
	opts := options.(*v1.TargetAttachOptions)
	v1.SetDefaults_TargetAttachOptions(opts)
	if err := badOptions(validation.ValidateTargetAttachOptions(opts)); err != nil {
		return nil, err
	}
	streams := streaming.CommandRequest{Stdin: opts.Stdin, Stdout: opts.Stdout, Stderr: opts.Stderr, TTY: opts.TTY}
	return r.command(ctx, name, opts.Instance, "attach", streams, responder,
		func(ctx context.Context, conn driver.Conn, target *v1.Target) (driver.Run, error) {
			attacher, err := ability[driver.Attacher](conn, target, "attach")
			if err != nil {
				return nil, err
			}
			return attacher.Attach(ctx, driver.AttachOptions{
				Stdin: opts.Stdin, TTY: opts.TTY, Replay: opts.Replay, CloseStdin: opts.CloseStdin,
			})
		})
}

// prepareFunc asks an open instance for a command.
type prepareFunc func(ctx context.Context, conn driver.Conn, target *v1.Target) (driver.Run, error)

// command is exec and attach: prepared while a failure is still an
// HTTP status, and only then upgraded.
func (c *connector) command(ctx context.Context, name, instance, subresource string, streams streaming.CommandRequest, responder rest.Responder, prepare prepareFunc) (http.Handler, error) {
	to, err := c.access(ctx, name)
	if err != nil {
		return nil, err
	}
	if instance, err = pick(to.target, instance, false); err != nil {
		return nil, err
	}
	return c.stream(responder, to, instance, subresource, func(w http.ResponseWriter, r *http.Request, s *session.Session, stands func()) error {
		conn, err := c.open(r.Context(), to, instance)
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		defer conn.Close()
		run, err := prepare(r.Context(), conn, to.target)
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		return streaming.ServeCommand(w, r, streams, c.opts.Streaming, func(ctx context.Context, stdio streaming.Stdio) error {
			stands()
			return runCommand(ctx, run, stdio, s)
		})
	}), nil
}

// firstSizeTimeout is how long a terminal waits for its first size.
const firstSizeTimeout = 200 * time.Millisecond

// runCommand adapts the wire's streams to the driver's, and the driver's error
// to the wire's, so that neither package knows the other.
func runCommand(ctx context.Context, run driver.Run, stdio streaming.Stdio, s *session.Session) error {
	local := driver.Stdio{
		Stdin:  s.CountIn(stdio.Stdin),
		Stdout: s.CountOut(stdio.Stdout),
		Stderr: s.CountOut(stdio.Stderr),
	}
	if stdio.Resize != nil {
		ctx, cancel := context.WithCancel(ctx)
		sizes := make(chan driver.TerminalSize, 1)
		local.Resize = sizes
		// A program that asks for the size at once would get none otherwise:
		// clients send it right after the upgrade.
		select {
		case size, ok := <-stdio.Resize:
			if ok {
				sizes <- driver.TerminalSize(size)
			}
		case <-time.After(firstSizeTimeout):
		case <-ctx.Done():
		}
		var forwarding sync.WaitGroup
		forwarding.Go(func() {
			defer close(sizes)
			for {
				select {
				case size, ok := <-stdio.Resize:
					if !ok {
						return
					}
					select {
					case sizes <- driver.TerminalSize(size):
					case <-ctx.Done():
						return
					}
				case <-ctx.Done():
					return
				}
			}
		})
		defer forwarding.Wait()
		defer cancel()
	}
	err := run(ctx, local)
	if exit, ok := errors.AsType[*driver.ExitError](err); ok {
		return &streaming.ExitError{Code: exit.Code}
	}
	return statusError(err)
}
