package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// defaultDetachKeys are kubectl's.
const defaultDetachKeys = "ctrl-p,ctrl-q"

type attachOptions struct {
	stdio
	ref
	detachKeys string
	replay     bool
}

// defaultRows is the height of a terminal that doesn't tell its own.
const defaultRows = 24

func newAttachCommand(c *client) *cobra.Command {
	o := &attachOptions{}
	instance := ""
	cmd := &cobra.Command{
		Use:                   "attach TARGET[/INSTANCE] [--instance INSTANCE] [options]",
		DisableFlagsInUseLine: true,
		Short:                 "Attach to the running process of a target",
		Long: templates.LongDesc(`
			Attach to the standard streams of a process that is already running in a target.

			The process goes on when the client leaves. The keys ctrl-p ctrl-q detach from a
			terminal. A terminal begins with the last screenful of what was written before.

			The exit code is that of the process if it ends meanwhile, 0 after detaching, and 125
			if the connection to the server was lost, or the server ended the session. After some
			seconds without a sign of life of the server a message says so, and ctrl-c or ~. end
			a session with a terminal at once.`),
		Example: templates.Examples(`
			# Get output from the first ready instance of target web
			kubectl target attach web

			# Get output from instance web-1 of target web
			kubectl target attach web/web-1

			# Switch to raw terminal mode; sends stdin to target shell
			# and sends its output back to the client
			kubectl target attach shell -i -t

			# Detach with other keys, and begin with an empty screen
			kubectl target attach shell -i -t --detach-keys=ctrl-a,d --replay=false`),
		ValidArgsFunction: c.completeTargets(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return cmdutil.UsageErrorf(cmd, "expected one argument, TARGET or target/NAME, saw %d: %v", len(args), args)
			}
			var err error
			if o.ref, err = parseRef(args[0], instance); err != nil {
				return cmdutil.UsageErrorf(cmd, "%v", err)
			}
			return o.run(cmd.Context(), c)
		},
	}
	o.addFlags(cmd)
	cmd.Flags().StringVar(&o.detachKeys, "detach-keys", defaultDetachKeys, "Key sequence that detaches from a terminal")
	cmd.Flags().BoolVar(&o.replay, "replay", true, "If the output is a terminal, begin with the last screenful of what was written before")
	register(cmd, "detach-keys", cobra.NoFileCompletions)
	addInstanceFlag(cmd, c, &instance)
	return cmd
}

// hasTerminal says whether the target's instances have a terminal.
func hasTerminal(spec *v1.TargetSpec) bool {
	switch {
	case spec.Process != nil:
		return spec.Process.TTY
	case spec.Container != nil:
		return spec.Container.TTY
	}
	return false
}

func (o *attachOptions) run(ctx context.Context, c *client) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	target, err := conn.target(ctx, o.target)
	if err != nil {
		return err
	}
	// As kubectl does: a terminal of the user's is useless without one on the
	// other side, and one on the other side shows nothing readable without the
	// user's.
	switch has := hasTerminal(&target.Spec); {
	case o.tty && !has:
		o.tty = false
		if !o.quiet {
			fmt.Fprintf(c.ErrOut, "error: Unable to use a TTY - target %s did not allocate one\n", o.target)
		}
	case !o.tty && has && o.stdin:
		o.tty = true
	}
	local := o.console(c)
	var replay int64
	if o.replay && local.IsTerminalOut() {
		replay = defaultRows
		if size := local.GetSize(); size != nil && size.Height > 0 {
			replay = int64(size.Height)
		}
	}
	if !o.quiet && o.stdin && replay == 0 {
		fmt.Fprintln(c.ErrOut, "If you don't see a command prompt, try pressing enter.")
	}
	again := ""
	if local.raw {
		again = " -i -t"
	}
	again = fmt.Sprintf("'kubectl target attach %s%s'", o.ref, again)
	err = conn.attach(ctx, local, o, &v1.TargetAttachOptions{Replay: replay}, fmt.Sprintf("what runs in target %s goes on: attach again with %s", o.target, again))
	if errors.Is(err, errDetached) {
		if !o.quiet {
			fmt.Fprintf(c.ErrOut, "\nDetached from target %s, which goes on. Resume with %s\n", o.ref, again)
		}
		return nil
	}
	return err
}

// attach joins an instance. It returns errDetached when the user has left it.
func (c *connection) attach(ctx context.Context, local *console, o *attachOptions, query *v1.TargetAttachOptions, broken string) error {
	query.Instance, query.Stdin, query.TTY = o.instance, o.stdin, local.raw
	query.Stdout, query.Stderr = true, !local.raw
	r := c.subresource("POST", o.target, "attach").VersionedParams(query, scheme.ParameterCodec)
	if err := r.Error(); err != nil {
		return err
	}
	return c.stream(ctx, local, request{ref: o.ref, url: r.URL(), detachKeys: o.detachKeys, nudge: true, broken: broken})
}

// target fetches a target.
func (c *connection) target(ctx context.Context, name string) (*v1.Target, error) {
	bounded, cancel := context.WithTimeoutCause(ctx, c.peerTimeout, errUnresponsive)
	defer cancel()
	target, err := c.clientset.StreamingV1().Targets(c.namespace).Get(bounded, name, metav1.GetOptions{})
	return target, c.unanswered(ctx, bounded, err)
}

// unanswered returns why a request failed: because ctx has ended, or bounded, or
// err.
func (c *connection) unanswered(ctx, bounded context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case errors.Is(context.Cause(bounded), errUnresponsive):
		return fmt.Errorf("%w: nothing has come from %s for %v (--peer-timeout)", errUnresponsive, c.config.Host, c.peerTimeout)
	}
	return err
}
