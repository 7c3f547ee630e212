package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/cli-runtime/pkg/printers"
	"k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// selectorTail is how many lines of each target a selector shows, as for
	// kubectl logs.
	selectorTail = 10
	// pageSize is how many targets are fetched at once.
	pageSize = 500
)

type logsOptions struct {
	ref
	selector                                           string
	follow, previous, timestamps, allInstances, prefix bool
	tail                                               int64
	tailGiven                                          bool
	since                                              time.Duration
	sinceTime                                          string
	limitBytes                                         int64
	stream, output                                     string
	quiet                                              bool
}

func newLogsCommand(c *client) *cobra.Command {
	o := &logsOptions{tail: -1, stream: "all"}
	instance := ""
	cmd := &cobra.Command{
		Use:                   "logs [-f] [-p] (TARGET[/INSTANCE] | -l SELECTOR) [--instance INSTANCE] [options]",
		DisableFlagsInUseLine: true,
		Short:                 "Print the logs of a target",
		Long: templates.LongDesc(`
			Print the logs of an instance of a target, of all its instances, or of all instances
			of the targets that a selector selects.

			The logs of many instances are merged by time: what they have written so far exactly,
			what they write while they are followed within a fifth of a second. A selector shows
			the last 10 lines of each instance, unless --tail says otherwise. There is no limit to
			the number of targets.

			With -f, a lost connection is made anew, and the log goes on where it was: no line is
			lost and none comes twice, whether the network, the API server or the target's server
			was away. A server that says nothing for the time of --peer-timeout is taken for lost.
			The user is told on standard error, but not with -q. The log of an instance ends when
			the instance does, for good or until it runs anew.

			With a selector, -f also follows targets that appear later or are created anew, until
			it is interrupted. Instances that come while their target is followed are shown from
			their first line. With -v=1, what comes and ends is told on standard error.

			With -o json, each line is an object on a line of its own: time, namespace, target,
			instance, line, and the stream if one was asked for by --stream. A line that isn't
			UTF-8 has its bytes in base64, too. One of more than 64 KiB comes in several objects,
			of which all but the last are partial.

			--timestamps puts the time before each line, and --prefix [TARGET/INSTANCE], which is in
			colour on a terminal unless NO_COLOR is set.

			With -p and --all-instances or a selector, instances that had no previous run are named
			on standard error. It is an error only if none had one.`),
		Example: templates.Examples(`
			# Return snapshot logs from the first ready instance of target web
			kubectl target logs web

			# Return snapshot logs from instance web-1 of target web
			kubectl target logs web/web-1

			# Begin streaming the logs of all instances of target web, each line with its instance
			kubectl target logs -f web --all-instances --prefix

			# Begin streaming the logs of all targets with the label app=shop, those that come later too
			kubectl target logs -f -l app=shop --prefix

			# Begin streaming what they write from now on, as JSON
			kubectl target logs -f -l app=shop --tail=0 -o json | jq -r 'select(.line | test("error")) | .instance'

			# Return snapshot of the logs of the previous run of instance web-0
			kubectl target logs -p web/web-0

			# Display only the most recent 20 lines of output in target web
			kubectl target logs --tail=20 web

			# Show what target web wrote to standard error in the last hour
			kubectl target logs --since=1h --stream=stderr web`),
		ValidArgsFunction: c.completeTargets(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.tailGiven = cmd.Flag("tail").Changed
			if err := o.complete(cmd, args, instance); err != nil {
				return err
			}
			return interrupted(cmd.Context(), o.run(cmd.Context(), c))
		},
	}
	flags := cmd.Flags()
	flags.BoolVarP(&o.follow, "follow", "f", false, "Specify if the logs should be streamed. A lost connection is made anew.")
	flags.BoolVarP(&o.previous, "previous", "p", false, "If true, print the logs of the previous run of the instance, if there was one.")
	flags.BoolVar(&o.timestamps, "timestamps", false, "Include timestamps on each line in the log output")
	flags.BoolVar(&o.allInstances, "all-instances", false, "Get the logs of all instances of the target(s). Defaults to true with a selector.")
	flags.BoolVar(&o.prefix, "prefix", false, "Prefix each log line with its target and instance")
	flags.Int64Var(&o.tail, "tail", o.tail, "Lines of recent log file to display, of each instance. Defaults to -1 with no selector, showing all log lines otherwise 10, if a selector is provided.")
	flags.Int64Var(&o.limitBytes, "limit-bytes", 0, "Maximum bytes of logs to return, of each target if a selector is provided. Defaults to no limit.")
	flags.DurationVar(&o.since, "since", 0, "Only return logs newer than a relative duration like 5s, 2m, or 3h. Defaults to all logs. Only one of since-time / since may be used.")
	flags.StringVar(&o.sinceTime, "since-time", "", "Only return logs after a specific date (RFC3339). Defaults to all logs. Only one of since-time / since may be used.")
	flags.StringVarP(&o.output, "output", "o", "", "Output format. json prints an object for each line. One of: (json).")
	flags.BoolVarP(&o.quiet, "quiet", "q", false, "If true, don't tell when the connection is lost and when it stands again.")
	flags.StringVar(&o.stream, "stream", o.stream, "Which output to return: all, stdout or stderr.")
	flags.StringVarP(&o.selector, "selector", "l", "", "Selector (label query) to filter on, supports '=', '==', '!=', 'in', 'notin'.(e.g. -l key1=value1,key2=value2,key3 in (value3)).")
	register(cmd, "stream", cobra.FixedCompletions([]string{"all", "stdout", "stderr"}, cobra.ShellCompDirectiveNoFileComp))
	register(cmd, "output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
	for _, flag := range []string{"tail", "limit-bytes", "since", "since-time", "selector"} {
		register(cmd, flag, cobra.NoFileCompletions)
	}
	addInstanceFlag(cmd, c, &instance)
	return cmd
}

func (o *logsOptions) complete(cmd *cobra.Command, args []string, instance string) error {
	switch {
	case len(args) == 1 && o.selector != "":
		return util.UsageErrorf(cmd, "only a selector (-l) or a TARGET name is allowed")
	case len(args) == 0 && o.selector != "":
		if instance != "" {
			return util.UsageErrorf(cmd, "a selector (-l) and --instance exclude each other")
		}
		if _, err := labels.Parse(o.selector); err != nil {
			return err
		}
	case len(args) == 1:
		var err error
		if o.ref, err = parseRef(args[0], instance); err != nil {
			return util.UsageErrorf(cmd, "%v", err)
		}
	default:
		return util.UsageErrorf(cmd, "expected 'logs [-f] [-p] (TARGET[/INSTANCE] | -l SELECTOR)'.\nTARGET or target/NAME is a required argument for the logs command")
	}
	if o.selector != "" && !cmd.Flag("all-instances").Changed {
		// As with pods, it is what runs that is selected.
		o.allInstances = true
	}
	switch {
	case o.since != 0 && o.sinceTime != "":
		return errors.New("at most one of --since and --since-time may be used")
	case o.since < 0:
		return errors.New("--since must be greater than 0")
	case o.limitBytes < 0 || o.limitBytes == 0 && cmd.Flag("limit-bytes").Changed:
		return errors.New("--limit-bytes must be greater than 0")
	case o.tail < -1:
		return errors.New("--tail must be greater than or equal to -1")
	case o.output != "" && o.output != "json":
		return fmt.Errorf("--output=%s: expected json", o.output)
	case o.allInstances && o.instance != "":
		return errors.New("--all-instances excludes the name of an instance")
	}
	return nil
}

// query returns the request's options.
func (o *logsOptions) query() (*v1.TargetLogOptions, error) {
	if o.previous {
		o.follow = false // it has ended
	}
	options := &v1.TargetLogOptions{
		Instance:     o.instance,
		Follow:       o.follow,
		Previous:     o.previous,
		Timestamps:   o.timestamps,
		AllInstances: o.allInstances,
		Prefix:       o.prefix,
	}
	switch strings.ToLower(o.stream) {
	case "", "all":
	case "stdout":
		options.Stream = v1.LogStreamStdout
	case "stderr":
		options.Stream = v1.LogStreamStderr
	default:
		return nil, fmt.Errorf("--stream=%s: expected all, stdout or stderr", o.stream)
	}
	if o.sinceTime != "" {
		t, err := time.Parse(time.RFC3339, o.sinceTime)
		if err != nil {
			return nil, fmt.Errorf("--since-time=%s is not a time in RFC 3339, such as 2026-01-02T15:04:05Z", o.sinceTime)
		}
		options.SinceTime = &metav1.Time{Time: t}
	}
	if o.since > 0 {
		// Seconds are what the server takes; rather a line too many.
		options.SinceSeconds = ptr.To(int64((o.since + time.Second - 1) / time.Second))
	}
	if o.limitBytes > 0 {
		options.LimitBytes = ptr.To(o.limitBytes)
	}
	switch {
	case o.tail >= 0:
		options.TailLines = ptr.To(o.tail)
	case o.selector != "" && !o.tailGiven:
		options.TailLines = ptr.To(int64(selectorTail))
	}
	return options, nil
}

func (o *logsOptions) run(ctx context.Context, c *client) error {
	query, err := o.query()
	if err != nil {
		return err
	}
	conn, err := c.connectLogs(o.selector != "" || o.allInstances)
	if err != nil {
		return err
	}
	if !o.follow && o.selector == "" && !o.prefix && !o.json() {
		// The server's bytes are what is wanted.
		copied := make(chan error, 1)
		go func() {
			copied <- conn.stream(ctx, o.target, query, func(_ *http.Response, body io.Reader) error {
				_, err := io.Copy(outputWriter{c.Out}, body)
				return err
			})
		}()
		select {
		case err := <-copied:
			return err
		case <-ctx.Done():
		}
		// As for the merger: a write that is stuck ends with the process.
		timer := time.NewTimer(abortGrace)
		defer timer.Stop()
		select {
		case <-copied:
		case <-timer.C:
		}
		return context.Cause(ctx)
	}
	out := newMerger(c.Out, lineStyle{
		prefix:     o.prefix,
		timestamps: o.timestamps,
		color:      printers.AllowsColorOutput(c.Out),
		json:       o.json(),
		namespace:  conn.namespace,
		stream:     strings.ToLower(string(query.Stream)),
	})
	if !o.follow {
		return o.print(ctx, c, conn, out, query)
	}
	f := newFollower(ctx, conn, out, c.ErrOut, query)
	f.quiet = o.quiet
	if o.selector == "" {
		return f.followTarget(o.target)
	}
	return f.followSelected(o.selector)
}

func (o *logsOptions) json() bool { return o.output == "json" }

// print prints the log of a target, or those of the selected targets, merged by
// time. That one of them fails doesn't keep the others back.
func (o *logsOptions) print(ctx context.Context, c *client, conn *logClient, out *merger, query *v1.TargetLogOptions) error {
	names := []string{o.target}
	if o.selector != "" {
		targets, err := listTargets(ctx, conn.connection, metav1.ListOptions{LabelSelector: o.selector})
		if err != nil {
			return err
		}
		if len(targets) == 0 {
			fmt.Fprintf(c.ErrOut, "No resources found in %s namespace.\n", conn.namespace)
			return nil
		}
		names = names[:0]
		for i := range targets {
			names = append(names, targets[i].Name)
		}
		slices.Sort(names)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	out.patience = 0 // no line may come too late
	out.failed = func(err error) { cancel(err) }
	stop := context.AfterFunc(ctx, func() { out.end(errMergerEnded) })
	defer stop()

	errs := make([]error, len(names))
	var streams sync.WaitGroup
	sources := make([]*lineSource, len(names))
	for i := range names {
		sources[i] = out.source(sourcePast)
	}
	for i, name := range names {
		streams.Go(func() {
			defer sources[i].close()
			errs[i] = o.printTarget(ctx, conn, name, query.DeepCopy(), sources[i])
		})
	}
	go out.run()
	streams.Wait()
	if ctx.Err() != nil {
		out.abort()
		return context.Cause(ctx)
	}
	if err := out.finish(); err != nil {
		return err
	}
	failed, without := false, 0
	for _, err := range errs {
		switch {
		case err == nil:
			continue
		case o.selector == "":
			return err
		case o.previous && apierrors.IsNotFound(err):
			without++ // as for the instances of one target
		default:
			failed = true
		}
		message, _ := describe(err)
		fmt.Fprintln(c.ErrOut, message)
	}
	if failed || without == len(errs) {
		return errFailed
	}
	return nil
}

// printTarget pushes the log of a target.
func (o *logsOptions) printTarget(ctx context.Context, conn *logClient, name string, query *v1.TargetLogOptions, to *lineSource) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var limit *byteLimit
	if query.LimitBytes != nil {
		limit = &byteLimit{left: *query.LimitBytes, reached: func() { cancel(errLimit) }}
	}
	query.Timestamps, query.Prefix, query.LimitBytes = true, true, nil
	origins := map[string]*origin{}
	lines := &logReader{to: to, prefixed: true, max: lineBuffer, from: func(instance []byte) *origin {
		from, ok := origins[string(instance)]
		if !ok {
			from = &origin{target: name, instance: string(instance), limit: limit}
			origins[from.instance] = from
		}
		return from
	}}
	err := conn.stream(ctx, name, query, func(_ *http.Response, body io.Reader) error { return lines.read(body, nil) })
	if errors.Is(context.Cause(ctx), errLimit) {
		return nil
	}
	return err
}

// listTargets returns all targets of the namespace that the options are about.
func listTargets(ctx context.Context, conn *connection, options metav1.ListOptions) ([]v1.Target, error) {
	var targets []v1.Target
	options.Limit = pageSize
	for {
		page, err := conn.clientset.StreamingV1().Targets(conn.namespace).List(ctx, options)
		if err != nil {
			return nil, err
		}
		targets = append(targets, page.Items...)
		if options.Continue = page.Continue; options.Continue == "" {
			return targets, nil
		}
	}
}
