package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/printers"
	"k8s.io/client-go/rest"
	clientexec "k8s.io/client-go/util/exec"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"
	"k8s.io/utils/ptr"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// startTimeout is how long run waits, unless told otherwise, until the
	// target runs.
	startTimeout = time.Minute
	// lookEvery is how often run looks at the target while it waits. It is no
	// watch, so that run needs no more than the verb get.
	lookEvery = 200 * time.Millisecond
	// removalTime is how long --rm waits for the target to be gone, beside the
	// target's grace period.
	removalTime = 20 * time.Second
	// tryTime is how long one request of that may take. What was lost with the
	// session's connection may be the others', too.
	tryTime = 5 * time.Second
)

// errUnanswered says that a request was made without its outcome being known.
var errUnanswered = errors.New("whether the target was created isn't known: look with 'kubectl get targets'")

type runOptions struct {
	attachOptions
	join, rm    bool
	agent       string
	class       string
	ports, env  []string
	restart     string
	replicas    int32
	timeout     time.Duration
	dryRun      cmdutil.DryRunStrategy
	printFlags  *genericclioptions.PrintFlags
	outputGiven bool
	command     []string
}

func newRunCommand(c *client) *cobra.Command {
	o := &runOptions{
		attachOptions: attachOptions{detachKeys: defaultDetachKeys},
		printFlags:    genericclioptions.NewPrintFlags("created").WithTypeSetter(scheme.Scheme),
	}
	// Only what is of use for one object.
	o.printFlags.TemplatePrinterFlags = nil
	cmd := &cobra.Command{
		Use:                   "run NAME [options] -- COMMAND [args...]",
		DisableFlagsInUseLine: true,
		Short:                 "Create a target that runs a command",
		Long: templates.LongDesc(`
			Create a target that runs a command as a process of an agent, and attach to it if
			--stdin, --tty or --attach asks for that.

			Attached, it begins with what the command has written, up to 64 KiB from before, and
			the exit code is that of the command; 125 if the connection to the server was lost,
			or the server ended the session. The end of an input that isn't a terminal is the
			end of the command's. The keys ctrl-p ctrl-q detach from a terminal.

			With --rm the target is deleted when the command has ended, and after an interruption,
			a lost connection or an error; but not after detaching.

			A port has a name, a number or both, as in http:8080 or dns:53/udp; the command finds
			the port that it is to listen on in the environment, as AASERVER_PORT_HTTP, and in its
			arguments by $(AASERVER_PORT_HTTP).`),
		Example: templates.Examples(`
			# Run a web server, and print that it was created
			kubectl target run web --port=http:8080 -- python3 -m http.server '$(AASERVER_PORT_HTTP)'

			# Run a shell on the machine of agent edge-17, and delete the target afterwards
			kubectl target run shell --agent=edge-17 -i -t --rm -- bash -il

			# Run a command once, and have its output and its exit code
			kubectl target run check --attach --rm -- df -h

			# Send a file through a command
			kubectl target run count -i --rm -- wc -l < access.log

			# Run three instances of a worker, with a variable in their environment
			kubectl target run worker --replicas=3 --env=QUEUE=mail --restart=OnFailure -- /usr/bin/worker

			# Print the target instead of creating it
			kubectl target run web --dry-run=client -o yaml -- sleep 1h`),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			target, err := o.complete(cmd, args)
			if err != nil {
				return err
			}
			return o.run(cmd.Context(), c, target)
		},
	}
	o.addFlags(cmd)
	flags := cmd.Flags()
	flags.StringVar(&o.detachKeys, "detach-keys", defaultDetachKeys, "Key sequence that detaches from a terminal")
	flags.BoolVar(&o.join, "attach", false, "Wait until the target runs, and attach to it. -i and -t do so, too")
	flags.BoolVar(&o.rm, "rm", false, "Delete the target when the session has ended. Only with --attach, -i or -t")
	flags.StringVar(&o.agent, "agent", "", "Name of the agent that hosts the target. If omitted, the server's choice")
	flags.StringVar(&o.class, "class", "", "Name of the TargetClass. If omitted, the default class")
	flags.StringArrayVar(&o.ports, "port", nil, "A port of the target that may be forwarded, as [NAME:]PORT[/udp]. May be repeated")
	flags.StringArrayVar(&o.env, "env", nil, "An environment variable, as NAME=VALUE. May be repeated")
	flags.StringVar(&o.restart, "restart", "", "When a command that has ended is started again: Always, OnFailure or Never. The default is Always, and Never with --rm")
	flags.Int32Var(&o.replicas, "replicas", 1, "How many instances run. More than one can't be attached to")
	flags.DurationVar(&o.timeout, "timeout", startTimeout, "How long to wait until the target runs, before it is attached to")
	o.printFlags.AddFlags(cmd)
	cmdutil.AddDryRunFlag(cmd)

	register(cmd, "restart", cobra.FixedCompletions([]string{string(v1.RestartAlways), string(v1.RestartOnFailure), string(v1.RestartNever)}, cobra.ShellCompDirectiveNoFileComp))
	register(cmd, "output", cobra.FixedCompletions([]string{"json", "yaml", "name"}, cobra.ShellCompDirectiveNoFileComp))
	register(cmd, "dry-run", cobra.FixedCompletions([]string{"none", "server", "client"}, cobra.ShellCompDirectiveNoFileComp))
	register(cmd, "class", c.completeClasses)
	register(cmd, "agent", c.completeAgents)
	for _, flag := range []string{"detach-keys", "port", "env", "replicas", "timeout"} {
		register(cmd, flag, cobra.NoFileCompletions)
	}
	return cmd
}

// complete makes the target of the command line.
func (o *runOptions) complete(cmd *cobra.Command, args []string) (*v1.Target, error) {
	dash := cmd.ArgsLenAtDash()
	switch {
	case len(args) == 0 || dash == 0:
		return nil, cmdutil.UsageErrorf(cmd, "NAME is required for run")
	case dash > 1 || dash < 0 && len(args) > 1:
		return nil, cmdutil.UsageErrorf(cmd, "expected one NAME, and two dashes before the command: run NAME -- COMMAND [args...]")
	}
	o.target, o.command = args[0], args[1:]
	o.join = o.join || o.stdin || o.tty
	o.outputGiven = cmd.Flag("output").Changed
	var err error
	if o.dryRun, err = cmdutil.GetDryRunStrategy(cmd); err != nil {
		return nil, err
	}
	switch {
	case len(o.command) == 0:
		return nil, cmdutil.UsageErrorf(cmd, "you must specify at least one command for the target")
	case o.tty && !o.stdin:
		return nil, cmdutil.UsageErrorf(cmd, "-i/--stdin is required with -t/--tty")
	case o.rm && !o.join:
		return nil, cmdutil.UsageErrorf(cmd, "--rm should only be used with --attach, -i or -t")
	case o.join && o.replicas != 1:
		return nil, cmdutil.UsageErrorf(cmd, "--replicas=%d can't be attached to: leave --attach, -i and -t out", o.replicas)
	case o.join && o.outputGiven && o.dryRun == cmdutil.DryRunNone:
		return nil, cmdutil.UsageErrorf(cmd, "--output can't be used with --attach, -i or -t, as the output is the command's")
	case o.timeout <= 0:
		return nil, errors.New("--timeout must be greater than 0")
	}
	target := &v1.Target{
		ObjectMeta: metav1.ObjectMeta{Name: o.target},
		Spec: v1.TargetSpec{
			ClassName:     o.class,
			AgentName:     o.agent,
			RestartPolicy: v1.RestartPolicy(o.restart),
			Process:       &v1.ProcessSource{Command: o.command, Stdin: o.stdin, TTY: o.tty},
		},
	}
	if o.restart == "" && o.rm {
		target.Spec.RestartPolicy = v1.RestartNever
	}
	if cmd.Flag("replicas").Changed {
		target.Spec.Replicas = ptr.To(o.replicas)
	}
	for _, variable := range o.env {
		name, value, ok := strings.Cut(variable, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("--env=%s: expected NAME=VALUE", variable)
		}
		target.Spec.Process.Env = append(target.Spec.Process.Env, v1.EnvVar{Name: name, Value: value})
	}
	for _, text := range o.ports {
		port, err := parseTargetPort(text)
		if err != nil {
			return nil, err
		}
		target.Spec.Ports = append(target.Spec.Ports, port)
	}
	return target, nil
}

// parseTargetPort reads [NAME:]PORT[/PROTOCOL].
func parseTargetPort(text string) (v1.TargetPort, error) {
	rest, protocol, _ := strings.Cut(text, "/")
	protocol = strings.ToUpper(protocol)
	name, number, named := strings.Cut(rest, ":")
	if !named {
		name, number = "", rest
	}
	port, err := strconv.ParseUint(number, 10, 16)
	if err != nil || port == 0 || named && name == "" || protocol != "" && protocol != string(v1.ProtocolTCP) && protocol != string(v1.ProtocolUDP) {
		return v1.TargetPort{}, fmt.Errorf("--port=%s: expected [NAME:]PORT[/udp], with a port from 1 to 65535", text)
	}
	if name == "" {
		name = fmt.Sprintf("port-%d", port)
	}
	return v1.TargetPort{Name: name, Port: int32(port), Protocol: v1.Protocol(protocol)}, nil
}

func (o *runOptions) run(ctx context.Context, c *client, target *v1.Target) error {
	printer, err := cmdutil.PrintFlagsWithDryRunStrategy(o.printFlags, o.dryRun).ToPrinter()
	if err != nil {
		return err
	}
	conn, err := c.connect()
	if err != nil {
		return err
	}
	if o.dryRun == cmdutil.DryRunClient {
		target.Namespace = conn.namespace
		return printer.PrintObj(target, c.Out)
	}
	local := o.console(c)
	if o.join {
		// Without a terminal here, one there would hide the end of the input.
		target.Spec.Process.TTY = local.raw
	}
	created, err := o.create(ctx, conn, target)
	if err != nil {
		return err
	}
	if !o.join || o.dryRun != cmdutil.DryRunNone {
		return printer.PrintObj(created, c.Out)
	}
	if !o.quiet {
		// The output is the command's.
		_ = printer.PrintObj(created, c.ErrOut)
	}
	err = o.session(ctx, c, conn, local, created)
	switch {
	case errors.Is(err, errDetached):
		if !o.quiet {
			kept := ""
			if o.rm {
				kept = fmt.Sprintf(" It isn't deleted any more by --rm: 'kubectl delete target %s' does that.", o.target)
			}
			fmt.Fprintf(c.ErrOut, "\nDetached from target %s, which goes on. Resume with 'kubectl target attach %[1]s -i -t'.%s\n", o.target, kept)
		}
		return nil
	case !o.rm:
		return err
	}
	if ctx.Err() != nil && !o.quiet {
		fmt.Fprintf(c.ErrOut, "Deleting target %s; its processes have %v to end. Another ctrl-c or signal leaves that to the server.\n", o.target, created.Spec.GracePeriod())
	}
	if removeErr := conn.remove(context.WithoutCancel(ctx), created); removeErr != nil {
		fmt.Fprintf(c.ErrOut, "error: target %s may be left: %v; delete it with 'kubectl delete target %[1]s'\n", o.target, removeErr)
		if err == nil {
			err = errFailed
		}
	} else if !o.quiet {
		_ = (&printers.TypeSetterPrinter{Delegate: &printers.NamePrinter{Operation: "deleted"}, Typer: scheme.Scheme}).PrintObj(created, c.ErrOut)
	}
	return err
}

// create creates the target, or asks the server whether it would.
func (o *runOptions) create(ctx context.Context, conn *connection, target *v1.Target) (*v1.Target, error) {
	options := metav1.CreateOptions{FieldManager: "kubectl-target"}
	if o.dryRun == cmdutil.DryRunServer {
		options.DryRun = []string{metav1.DryRunAll}
	}
	bounded, cancel := context.WithTimeoutCause(ctx, conn.peerTimeout, errUnresponsive)
	defer cancel()
	created, err := conn.clientset.StreamingV1().Targets(conn.namespace).Create(bounded, target, options)
	if err != nil && bounded.Err() != nil {
		return nil, fmt.Errorf("%w; %w", conn.unanswered(ctx, bounded, err), errUnanswered)
	}
	if errors.As(err, new(*url.Error)) && !neverSent(err) {
		return nil, fmt.Errorf("%v; %w", err, errUnanswered) //nolint:errorlint // only the text says all
	}
	return created, err
}

// session attaches to the target as soon as it runs. If it has ended by then,
// its log has what it wrote.
func (o *runOptions) session(ctx context.Context, c *client, conn *connection, local *console, created *v1.Target) error {
	o.instance = created.InstanceNames()[0]
	broken := fmt.Sprintf("what runs in target %s goes on: attach again with 'kubectl target attach %[1]s'", o.target)
	if o.rm {
		broken = fmt.Sprintf("target %s is deleted now (--rm)", o.target)
	}
	timeout := fmt.Errorf("it doesn't run after %v (--timeout)", o.timeout)
	waiting, cancel := context.WithTimeoutCause(ctx, o.timeout, timeout)
	defer cancel()
	for {
		ended, err := conn.awaitStart(waiting, created, o.instance)
		switch {
		case err != nil && ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return fmt.Errorf("target %s can't be attached to: %w", o.target, err)
		case ended != nil:
			return o.replayLog(ctx, c, conn, ended)
		}
		err = conn.attach(ctx, local, &o.attachOptions, &v1.TargetAttachOptions{Replay: math.MaxInt64, CloseStdin: o.stdin && !local.raw}, broken)
		// It may have ended just before, or be about to be started again.
		if !apierrors.IsConflict(err) {
			return err
		}
		if !sleep(waiting, lookEvery) {
			return fmt.Errorf("target %s can't be attached to: %w", o.target, context.Cause(waiting))
		}
	}
}

// awaitStart waits until the instance runs, or has ended for good. A reason that
// keeps it from running is an error at once.
func (c *connection) awaitStart(ctx context.Context, created *v1.Target, instance string) (ended *v1.InstanceStateTerminated, err error) {
	last := "its agent hasn't said anything of it: it may be down"
	if agent := created.Spec.AgentName; agent != "" {
		last = fmt.Sprintf("agent %q hasn't said anything of it: it may be down, or not exist", agent)
	}
	for {
		target, err := c.target(ctx, created.Name)
		switch {
		case ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %s", context.Cause(ctx), last)
		case apierrors.IsNotFound(err), err == nil && target.UID != created.UID:
			return nil, errors.New("it was deleted meanwhile")
		case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
			return nil, err
		case err != nil:
			last = err.Error() // the server may come back
			target = created
		}
		for _, i := range target.Status.Instances {
			if i.Name != instance {
				continue
			}
			switch state := i.State; {
			case state.Running != nil:
				return nil, nil
			case state.Terminated != nil && state.Terminated.Reason == reasonStartError:
				return nil, errors.New(state.Terminated.Message)
			case state.Terminated != nil:
				return state.Terminated, nil
			case state.Waiting != nil && state.Waiting.Reason == reasonStartError:
				return nil, errors.New(state.Waiting.Message)
			case state.Waiting != nil && state.Waiting.Reason == reasonBackoff:
				return nil, fmt.Errorf("it ends as soon as it is started: %s; see 'kubectl target logs %s'", state.Waiting.Message, created.Name)
			case state.Waiting != nil && state.Waiting.Message != "":
				last = state.Waiting.Reason + ": " + state.Waiting.Message
			case state.Waiting != nil:
				last = "it is waiting: " + state.Waiting.Reason
			}
		}
		if !sleep(ctx, lookEvery) {
			return nil, fmt.Errorf("%w: %s", context.Cause(ctx), last)
		}
	}
}

// Reasons in an instance's state that an agent gives.
const (
	reasonStartError = "StartError"
	reasonBackoff    = "CrashLoopBackOff"
)

// replayLog shows what an instance has written that has ended.
func (o *runOptions) replayLog(ctx context.Context, c *client, conn *connection, ended *v1.InstanceStateTerminated) error {
	for _, stream := range []struct {
		of  v1.LogStream
		out io.Writer
	}{{v1.LogStreamStdout, c.Out}, {v1.LogStreamStderr, c.ErrOut}} {
		query := &v1.TargetLogOptions{Instance: o.instance, Stream: stream.of}
		body, err := conn.subresource("GET", o.target, "log").VersionedParams(query, scheme.ParameterCodec).Stream(ctx)
		if err == nil {
			_, err = io.Copy(stream.out, body)
			err = errors.Join(err, body.Close())
		}
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return &brokenError{fmt.Errorf("the command has ended with exit code %d, and its output can't be read: %w", ended.ExitCode, err)}
		}
	}
	if ended.ExitCode == 0 {
		return nil
	}
	return clientexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", ended.ExitCode), Code: int(ended.ExitCode)}
}

// remove deletes the target, and waits until nothing of it is left. A server
// that can't be reached is tried again, for as long as the target may take to
// end and some time more.
func (c *connection) remove(ctx context.Context, target *v1.Target) error {
	patience := target.Spec.GracePeriod() + removalTime
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("it isn't gone after %v", patience))
	defer cancel()
	targets := c.clientset.StreamingV1().Targets(c.namespace)
	// A target that has come in its place by the same name isn't ours.
	options := metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(target.UID))}
	var last error
	transport := http.RoundTripper(nil)
	if client, ok := c.rest.(*rest.RESTClient); ok && client.Client != nil {
		transport = client.Client.Transport
	}
	utilnet.CloseIdleConnectionsFor(transport)
	try := func(request func(ctx context.Context) error) error {
		once, cancel := context.WithTimeout(ctx, tryTime)
		defer cancel()
		err := request(once)
		if once.Err() != nil {
			utilnet.CloseIdleConnectionsFor(transport)
		}
		return err
	}
	for deleted := false; ; {
		var err error
		if !deleted {
			err = try(func(ctx context.Context) error { return targets.Delete(ctx, target.Name, options) })
			deleted = err == nil
		} else {
			var now *v1.Target
			err = try(func(ctx context.Context) (err error) {
				now, err = targets.Get(ctx, target.Name, metav1.GetOptions{})
				return err
			})
			if err == nil && now.UID != target.UID {
				return nil
			}
		}
		switch {
		case apierrors.IsNotFound(err), !deleted && apierrors.IsConflict(err):
			return nil
		case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
			if deleted {
				return nil // it can't be seen, and it has been asked for
			}
			return err
		case err != nil && ctx.Err() == nil:
			last = err
		case err == nil:
			last = nil
		}
		if !sleep(ctx, lookEvery) {
			return errors.Join(context.Cause(ctx), last)
		}
	}
}
