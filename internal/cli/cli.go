// Package cli is the kubectl plugin "kubectl target": logs, exec, attach, cp and
// port-forward for targets, reading as kubectl's own commands do. Listing,
// describing, changing and scaling targets is left to kubectl, which does it
// for every resource.
//
// A command talks to the API server alone, with the user's kubeconfig. Output
// goes to the streams it is given, so that a command can be run in a test as in
// a shell. Exit codes: those of exec, attach and run are those of the command,
// or 125 if the session ended before the command's exit code was known; 128 plus
// the signal's number after a signal; 1 for every other error.
package cli

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	"k8s.io/kubectl/pkg/util/templates"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/version"
)

// completionName is the name under which kubectl looks for a program that
// completes the arguments of this plugin. The binary answers to it, so that a
// link is all that has to be installed.
const completionName = "kubectl_complete-target"

// terminated is the cause with which a command's context ends after a signal.
type terminated struct {
	signal syscall.Signal
}

func (t terminated) Error() string { return "interrupted by " + t.signal.String() }

// oneWish is how soon after a signal another one means nothing more: timeout(1)
// and others signal a process, and then its group with it in it.
const oneWish = 500 * time.Millisecond

// Main runs the command line of this process and returns its exit code. A
// first SIGINT, SIGTERM or SIGHUP ends the command in good order, a later one
// at once.
func Main() int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	go endOn(signals, cancel, func() { signal.Stop(signals) })

	args := os.Args[1:]
	name := strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe")
	if name == completionName {
		args = append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	return Execute(ctx, genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}, args)
}

// endOn ends a command with the first signal, and then lets signals do what they
// do by themselves.
func endOn(signals <-chan os.Signal, cancel context.CancelCauseFunc, stop func()) {
	s := <-signals
	if number, ok := s.(syscall.Signal); ok {
		cancel(terminated{number})
	}
	cancel(nil)
	time.Sleep(oneWish)
	stop()
}

// Execute runs one command line and returns its exit code. Errors have been
// written to streams.ErrOut when it returns.
func Execute(ctx context.Context, streams genericiooptions.IOStreams, args []string) int {
	cmd := NewCommand(streams)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(ctx)
	var signalled terminated
	if err != nil && (errors.As(context.Cause(ctx), &signalled) || errors.As(err, &signalled)) {
		// Whatever failed failed because the user wanted it to end.
		return 128 + int(signalled.signal)
	}
	message, code := describe(err)
	if message != "" {
		fmt.Fprintln(streams.ErrOut, strings.TrimSuffix(message, "\n"))
	}
	return code
}

// NewCommand returns the root command.
func NewCommand(streams genericiooptions.IOStreams) *cobra.Command {
	root := &cobra.Command{
		Use:         "kubectl-target",
		Annotations: map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl target"},
		Short:       "Logs, exec, attach, cp and port-forward for targets",
		Long: templates.LongDesc(`
			kubectl target reads the logs of targets, runs commands in them, attaches to them,
			copies files to and from them and forwards ports to them. It makes targets that
			run a command, too.

			Targets are listed, created, changed, scaled and deleted by kubectl itself, as in
			'kubectl get targets'.`),
		DisableFlagsInUseLine: true,
		SilenceErrors:         true,
		SilenceUsage:          true,
		Args:                  knownCommand,
		Run:                   func(cmd *cobra.Command, _ []string) { _ = cmd.Help() },
	}
	root.SetIn(streams.In)
	root.SetOut(streams.Out)
	root.SetErr(streams.ErrOut)
	root.CompletionOptions.DisableDefaultCmd = true

	c := newClient(streams)
	c.flags.AddFlags(root.PersistentFlags())
	root.PersistentFlags().DurationVar(&c.peerTimeout, "peer-timeout", c.peerTimeout, "How long a server that gives no sign of life is believed in, on connections that last.")
	addVerbosityFlag(root)

	groups := templates.CommandGroups{
		{
			Message: "Commands for Targets:",
			Commands: []*cobra.Command{
				newLogsCommand(c),
				newRunCommand(c),
				newExecCommand(c),
				newAttachCommand(c),
				newPortForwardCommand(c),
				newCpCommand(c),
			},
		},
		{
			Message:  "Settings Commands:",
			Commands: []*cobra.Command{newCompletionCommand(c)},
		},
	}
	groups.Add(root)
	templates.ActsAsRootCommand(root, []string{"options"}, groups...)
	root.SetUsageFunc(displayName(root, root.UsageFunc()))
	root.AddCommand(newVersionCommand(c), newOptionsCommand(c))
	registerGlobalCompletions(root, c)
	return root
}

// knownCommand refuses what is no command: what is kubectl's own to do with
// targets, with how to say so.
func knownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := fmt.Sprintf("See '%s -h' for help and examples", cmd.CommandPath())
	switch args[0] {
	case "get", "describe", "delete", "edit", "scale", "patch", "label", "annotate", "wait":
		hint = fmt.Sprintf("That is for kubectl itself, as in 'kubectl %s target NAME'", args[0])
	case "create", "apply":
		hint = fmt.Sprintf("That is for kubectl itself, as in 'kubectl %s -f FILE'", args[0])
	default:
		cmd.SuggestionsMinimumDistance = 2
		if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
			hint = "Did you mean this?\n\t" + strings.Join(near, "\n\t")
		}
	}
	return fmt.Errorf("unknown command %q for %q\n%s", args[0], cmd.CommandPath(), hint)
}

// displayName puts the name that users type into the one line in which kubectl's
// template has the binary's.
func displayName(root *cobra.Command, usage func(*cobra.Command) error) func(*cobra.Command) error {
	return func(cmd *cobra.Command) error {
		if cmd != root {
			return usage(cmd)
		}
		out := cmd.OutOrStderr()
		var text strings.Builder
		cmd.SetOut(&text)
		err := usage(cmd)
		cmd.SetOut(out)
		if err != nil {
			return err
		}
		_, err = io.WriteString(out, strings.ReplaceAll(text.String(), `"`+root.Name()+" ", `"`+root.DisplayName()+" "))
		return err
	}
}

// addVerbosityFlag offers the one of klog's flags that kubectl's users know:
// -v shows client-go's requests and responses.
func addVerbosityFlag(root *cobra.Command) {
	all := flag.NewFlagSet("", flag.ContinueOnError)
	klog.InitFlags(all)
	verbosity := pflag.PFlagFromGoFlag(all.Lookup("v"))
	verbosity.Shorthand = "v"
	root.PersistentFlags().AddFlag(verbosity)
}

// newOptionsCommand prints the flags that the help of the other commands leaves
// out.
func newOptionsCommand(c *client) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "options",
		Short: "Print the list of flags inherited by all commands",
		Example: templates.Examples(`
			# Print flags inherited by all commands
			kubectl target options`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Usage() },
	}
	cmd.SetOut(c.Out)
	cmd.SetErr(c.Out)
	templates.UseOptionsTemplates(cmd)
	return cmd
}

// client is what all commands share: the streams, and the way to the server,
// which is known once the flags have been parsed.
type client struct {
	genericiooptions.IOStreams
	flags *genericclioptions.ConfigFlags
	// peerTimeout is how long a server may be silent on an upgraded connection,
	// on which both sides ping, before the connection is taken for lost.
	peerTimeout time.Duration
}

func newClient(streams genericiooptions.IOStreams) *client {
	return &client{IOStreams: streams, flags: genericclioptions.NewConfigFlags(true), peerTimeout: time.Minute}
}

// namespace returns the namespace of the flags or of the kubeconfig's context.
func (c *client) namespace() (string, error) {
	namespace, _, err := c.flags.ToRawKubeConfigLoader().Namespace()
	return namespace, err
}

// connection is a configuration and a clientset made from it.
type connection struct {
	config    *rest.Config
	clientset versioned.Interface
	rest      rest.Interface
	namespace string
	// peerTimeout is the client's.
	peerTimeout time.Duration
}

// connect prepares requests to the server; it doesn't make any. changes are made
// to a configuration of its own.
func (c *client) connect(changes ...func(*rest.Config)) (*connection, error) {
	if c.peerTimeout <= 0 {
		return nil, fmt.Errorf("--peer-timeout is %v: it has to be more than 0", c.peerTimeout)
	}
	config, err := c.flags.ToRESTConfig()
	if err != nil {
		return nil, err
	}
	config = rest.CopyConfig(config)
	// The server decides how much is too much, by priority and fairness.
	config.QPS = -1
	config.UserAgent = "kubectl-target/" + version.Get().Version + " (" + version.Get().Platform + ")"
	config.WarningHandler = rest.NewWarningWriter(c.ErrOut, rest.WarningWriterOptions{Deduplicate: true})
	for _, change := range changes {
		change(config)
	}
	namespace, err := c.namespace()
	if err != nil {
		return nil, err
	}
	clientset, err := versioned.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	return &connection{
		config:    config,
		clientset: clientset,
		rest:      clientset.StreamingV1().RESTClient(),
		namespace: namespace,

		peerTimeout: c.peerTimeout,
	}, nil
}

// subresource returns a request for a subresource of a target.
func (c *connection) subresource(verb, target, subresource string) *rest.Request {
	return c.rest.Verb(verb).Namespace(c.namespace).Resource("targets").Name(target).SubResource(subresource)
}

// ref is a target, and an instance of it if one was named.
type ref struct {
	target, instance string
}

func (r ref) String() string {
	if r.instance != "" {
		return r.target + "/" + r.instance
	}
	return r.target
}

// targetTypes are the names of the resource that may stand before a slash, as
// in kubectl's TYPE/NAME.
var targetTypes = map[string]bool{
	"target":                     true,
	"targets":                    true,
	"tgt":                        true,
	"targets." + v1.GroupName:    true,
	"target." + v1.GroupName:     true,
	"targets.v1." + v1.GroupName: true,
}

// parseRef reads [TYPE/]TARGET[/INSTANCE], and the value of --instance. A first
// part that names the type is the type: a target called "target" has to be
// written as target/target.
func parseRef(arg, instance string) (ref, error) {
	parts := strings.Split(arg, "/")
	if len(parts) > 1 {
		switch {
		case targetTypes[strings.ToLower(parts[0])]:
			parts = parts[1:]
		case !strings.HasPrefix(parts[1], parts[0]+"-") && parts[1] != "":
			return ref{}, fmt.Errorf("%q is neither target/NAME nor TARGET/INSTANCE: the names of the instances of target %q begin with \"%[2]s-\"", arg, parts[0])
		}
	}
	for _, part := range parts {
		if part == "" {
			return ref{}, fmt.Errorf("%q is not a target: expected TARGET, TARGET/INSTANCE or target/NAME", arg)
		}
	}
	if len(parts) > 2 {
		return ref{}, fmt.Errorf("%q has too many parts: expected TARGET, TARGET/INSTANCE or target/NAME", arg)
	}
	r := ref{target: parts[0], instance: instance}
	if len(parts) == 2 {
		if instance != "" && instance != parts[1] {
			return ref{}, fmt.Errorf("%q and --instance=%s name two instances", arg, instance)
		}
		r.instance = parts[1]
	}
	return r, nil
}

// addInstanceFlag adds --instance, which all commands have.
func addInstanceFlag(cmd *cobra.Command, c *client, instance *string) {
	cmd.Flags().StringVar(instance, "instance", "", "Name of the instance. If omitted, the first instance that is ready is used.")
	register(cmd, "instance", c.completeInstances)
}
