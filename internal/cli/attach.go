package cli

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/remotecommand"
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
}

func newAttachCommand(c *client) *cobra.Command {
	o := &attachOptions{}
	instance := ""
	cmd := &cobra.Command{
		Use:                   "attach TARGET[/INSTANCE] [--instance INSTANCE] [flags]",
		DisableFlagsInUseLine: true,
		Short:                 "Attach to the running process of a target",
		Long: templates.LongDesc(`
			Attach to the standard streams of a process that is already running in a target.

			The process goes on when the client leaves. The keys ctrl-p ctrl-q detach from a
			terminal.`),
		Example: templates.Examples(`
			# Get output from the first ready instance of target web
			kubectl target attach web

			# Get output from instance web-1 of target web
			kubectl target attach web/web-1

			# Switch to raw terminal mode; sends stdin to target shell
			# and sends its output back to the client
			kubectl target attach shell -i -t`),
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

// query returns the request's options.
func (o *attachOptions) query(raw bool) *v1.TargetAttachOptions {
	return &v1.TargetAttachOptions{
		Instance: o.instance,
		Stdin:    o.stdin,
		Stdout:   true,
		Stderr:   !raw,
		TTY:      raw,
	}
}

func (o *attachOptions) run(ctx context.Context, c *client) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	target, err := conn.clientset.StreamingV1().Targets(conn.namespace).Get(ctx, o.target, metav1.GetOptions{})
	if err != nil {
		return interrupted(ctx, err)
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

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t := o.terminal(c)
	options := remotecommand.StreamOptions{Stdin: t.In, Stdout: c.Out, Stderr: c.ErrOut, Tty: t.Raw}
	if t.Raw {
		if options.Stdin, err = newDetachable(t.In, o.detachKeys, func() { cancel(errDetached) }); err != nil {
			return err
		}
		if size := t.GetSize(); size != nil {
			// A change of size makes programs draw their screen again, also when
			// the size is the one that the last client had.
			larger := *size
			larger.Width++
			larger.Height++
			options.TerminalSizeQueue = monitor(&t, &larger, size)
		}
		options.Stderr = nil
	}
	request := conn.subresource("POST", o.target, "attach").VersionedParams(o.query(t.Raw), scheme.ParameterCodec)
	if err := request.Error(); err != nil {
		return err
	}
	if !o.quiet && o.stdin {
		fmt.Fprintln(c.ErrOut, "If you don't see a command prompt, try pressing enter.")
	}
	err = interrupted(ctx, conn.stream(ctx, t, o.target, request.URL(), options))
	if errors.Is(err, errDetached) {
		if !o.quiet {
			fmt.Fprintf(c.ErrOut, "\nDetached from target %s, which goes on. Resume with 'kubectl target attach %[1]s -i -t'\n", o.ref)
		}
		return nil
	}
	return err
}
