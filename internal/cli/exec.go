package cli

import (
	"context"

	"github.com/spf13/cobra"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

type execOptions struct {
	stdio
	ref
	command []string
}

func newExecCommand(c *client) *cobra.Command {
	o := &execOptions{}
	instance := ""
	cmd := &cobra.Command{
		Use:                   "exec TARGET[/INSTANCE] [--instance INSTANCE] [options] -- COMMAND [args...]",
		DisableFlagsInUseLine: true,
		Short:                 "Execute a command in a target",
		Long: templates.LongDesc(`
			Execute a command in a target, beside what runs there.

			The exit code is that of the command; 125 if the connection to the server was lost,
			or the server ended the session, before the command had ended; 128 and the signal's
			number after a signal; and 1 if the command couldn't be run.

			A server that gives no sign of life is believed in for a minute (--peer-timeout).
			After some seconds of silence a message says so, and ctrl-c or ~. end a session with
			a terminal at once. The server ends the command when it finds that its client has
			gone.`),
		Example: templates.Examples(`
			# Get output from running the 'date' command in the first ready instance of target web
			kubectl target exec web -- date

			# Get output from running the 'date' command in instance web-1 of target web
			kubectl target exec web/web-1 -- date

			# Switch to raw terminal mode; sends stdin to 'bash' in target web
			# and sends stdout/stderr from 'bash' back to the client
			kubectl target exec web -i -t -- bash -il

			# Feed a local file to a command
			kubectl target exec web -i -- psql < dump.sql

			# List contents of /usr, sorted by modification time. The two dashes (--) separate
			# the command's flags from those of kubectl. Don't surround the command and its
			# arguments with quotes: it isn't run in a shell
			kubectl target exec web -- ls -t /usr`),
		ValidArgsFunction: c.completeTargets(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := o.complete(cmd, args, instance); err != nil {
				return err
			}
			return o.run(cmd.Context(), c)
		},
	}
	o.addFlags(cmd)
	addInstanceFlag(cmd, c, &instance)
	return cmd
}

func (o *execOptions) complete(cmd *cobra.Command, args []string, instance string) error {
	dash := cmd.ArgsLenAtDash()
	switch {
	case len(args) == 0 || dash == 0:
		return cmdutil.UsageErrorf(cmd, "TARGET or target/NAME must be specified")
	case dash > 1 || dash < 0 && len(args) > 1:
		return cmdutil.UsageErrorf(cmd, "exec [TARGET] [COMMAND] is not supported. Use exec [TARGET] -- [COMMAND] instead")
	}
	var err error
	if o.ref, err = parseRef(args[0], instance); err != nil {
		return cmdutil.UsageErrorf(cmd, "%v", err)
	}
	if o.command = args[1:]; len(o.command) == 0 {
		return cmdutil.UsageErrorf(cmd, "you must specify at least one command for the target")
	}
	return nil
}

// query returns the request's options.
func (o *execOptions) query(raw bool) *v1.TargetExecOptions {
	return &v1.TargetExecOptions{
		Instance: o.instance,
		Stdin:    o.stdin,
		Stdout:   true,
		Stderr:   !raw,
		TTY:      raw,
		Command:  o.command,
	}
}

func (o *execOptions) run(ctx context.Context, c *client) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	local := o.console(c)
	r := conn.subresource("POST", o.target, "exec").VersionedParams(o.query(local.raw), scheme.ParameterCodec)
	if err := r.Error(); err != nil {
		return err
	}
	return conn.stream(ctx, local, request{
		ref:    o.ref,
		url:    r.URL(),
		broken: "the server ends the command when it notices, and how far that came isn't known",
	})
}
