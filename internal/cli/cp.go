package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cmdutil "k8s.io/kubectl/pkg/cmd/util"
	"k8s.io/kubectl/pkg/util/templates"
	"k8s.io/kubectl/pkg/util/term"
	utilexec "k8s.io/utils/exec"

	"aaserver.io/aaserver/apis/generated/clientset/versioned/scheme"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/files"
)

// runFunc runs a command in a target, in the named instance or, if that is "",
// in the first ready one. It returns when the command has ended, or ctx; stdin
// may be read from after that, until it fails.
type runFunc func(ctx context.Context, instance string, command []string, stdin io.Reader, stdout, stderr io.Writer) error

type cpOptions struct {
	ref
	namespace string // "" for the default one
	// upload says that local is copied to remote, rather than the other way.
	upload        bool
	local, remote string

	attributes files.Attributes
	quiet      bool
	progress   bool
	retries    int

	run runFunc
	// pick returns the instance that is used if none is named, "" if that can't
	// be known.
	pick func(context.Context) string
}

func newCpCommand(c *client) *cobra.Command {
	o := &cpOptions{}
	instance := ""
	cmd := &cobra.Command{
		Use:                   "cp [options] {LOCAL TARGET[/INSTANCE]:PATH | TARGET[/INSTANCE]:PATH LOCAL}",
		DisableFlagsInUseLine: true,
		Short:                 "Copy files and directories to and from targets",
		Long: templates.LongDesc(`
			Copy a file, or a directory with everything in it, to or from a target.

			Where a copy goes is as for 'cp -r': into the destination under the source's name
			if that is an existing directory, and to the destination itself otherwise.
			SOURCE/. is a directory's contents. A relative path on the target is relative to
			its working directory. A local path that has a colon is written with ./ before it.

			Modes and times are kept, owners are not. Symbolic links stay links, wherever they
			lead to, and nothing is written through them; one that is named itself as the
			source is followed. Files that are there and aren't in the source are left alone.

			Each file is verified by its SHA-256, and has its name only when it is complete.
			When the connection is lost, the copy goes on where it was, as it does when the
			same command is run again. Warnings are for what the copy isn't missing. The exit
			code is 0 only if everything arrived.

			On a target that has no aaserver beside it, 'tar' is used, and 'sha256sum' if it is
			there.`),
		Example: templates.Examples(`
			# Copy a log file from the first ready instance of target web to the current directory
			kubectl target cp web:/var/log/web.log .

			# Copy a directory to instance web-1 of target web, as /tmp/dir
			kubectl target cp ./dir web/web-1:/tmp/dir

			# Copy what is in a directory into one that exists
			kubectl target cp ./dir/. web:/srv/www

			# Copy from a target in namespace shop
			kubectl target cp shop/web:/etc/hosts ./hosts`),
		ValidArgsFunction: c.completeCopy,
		RunE: func(cmd *cobra.Command, args []string) error {
			if !cmd.Flags().Changed("progress") {
				o.progress = isTerminal(c.ErrOut)
			}
			if err := o.complete(cmd, args, instance); err != nil {
				return err
			}
			return o.copy(cmd.Context(), c)
		},
	}
	cmd.Flags().BoolVar(&o.attributes.Plain, "no-preserve", false, "Don't keep modes and times")
	cmd.Flags().BoolVar(&o.attributes.SetID, "keep-setuid", false, "Keep the set-user-ID, set-group-ID and sticky bits, too")
	cmd.Flags().BoolVarP(&o.quiet, "quiet", "q", false, "Print errors only")
	cmd.Flags().BoolVar(&o.progress, "progress", false, "Show how far the copy is. If omitted, it is shown on a terminal")
	cmd.Flags().IntVar(&o.retries, "retries", 10, "How often in a row to try to go on after a lost connection without getting any further")
	register(cmd, "retries", cobra.NoFileCompletions)
	addInstanceFlag(cmd, c, &instance)
	return cmd
}

// completeCopy completes targets, which a path follows; local files are the
// shell's to complete.
func (c *client) completeCopy(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	if len(args) >= 2 || strings.HasPrefix(toComplete, "/") || strings.HasPrefix(toComplete, ".") || strings.Contains(toComplete, ":") {
		return nil, cobra.ShellCompDirectiveDefault
	}
	refs, _ := c.completeRef(cmd.Context(), toComplete)
	for i := range refs {
		refs[i] += ":"
	}
	return refs, cobra.ShellCompDirectiveNoSpace
}

func (o *cpOptions) complete(cmd *cobra.Command, args []string, instance string) error {
	if len(args) != 2 {
		return cmdutil.UsageErrorf(cmd, "a source and a destination are required")
	}
	if o.retries < 0 {
		return cmdutil.UsageErrorf(cmd, "--retries can't be negative")
	}
	o.progress = o.progress && !o.quiet
	fromTarget, fromPath, fromRemote := cutRemote(args[0])
	toTarget, toPath, toRemote := cutRemote(args[1])
	target := fromTarget
	switch {
	case fromRemote && toRemote:
		return cmdutil.UsageErrorf(cmd, "%q and %q are both on targets: one of them must be local (write ./NAME for a local file with a colon)", args[0], args[1])
	case fromRemote:
		o.remote, o.local = fromPath, args[1]
	case toRemote:
		o.upload, target, o.local, o.remote = true, toTarget, args[0], toPath
	default:
		return cmdutil.UsageErrorf(cmd, "neither %q nor %q is on a target: write it as TARGET:PATH", args[0], args[1])
	}
	if o.local == "" || o.remote == "" {
		return cmdutil.UsageErrorf(cmd, "a path is empty: write . for the current or working directory")
	}
	var err error
	if o.namespace, o.ref, err = parseCopyRef(target, instance); err != nil {
		return cmdutil.UsageErrorf(cmd, "%v", err)
	}
	return nil
}

// cutRemote takes TARGET:PATH apart. What begins as a path is a path.
func cutRemote(arg string) (target, path string, remote bool) {
	if filepath.IsAbs(arg) || filepath.VolumeName(arg) != "" || strings.HasPrefix(arg, "/") || strings.HasPrefix(arg, ".") {
		return "", arg, false
	}
	return strings.Cut(arg, ":")
}

// parseCopyRef reads [NAMESPACE/]TARGET[/INSTANCE], or what other commands take.
// Of two names the first is a namespace, as for kubectl cp, unless the second can
// be an instance of it.
func parseCopyRef(arg, instance string) (namespace string, r ref, err error) {
	parts := strings.Split(arg, "/")
	isType := targetTypes[strings.ToLower(parts[0])]
	if !isType && (len(parts) == 3 || len(parts) == 2 && !strings.HasPrefix(parts[1], parts[0]+"-")) {
		if parts[0] == "" {
			return "", ref{}, fmt.Errorf("%q has an empty namespace", arg)
		}
		namespace = parts[0]
		arg = strings.Join(parts[1:], "/")
	}
	r, err = parseRef(arg, instance)
	return namespace, r, err
}

func (o *cpOptions) copy(ctx context.Context, c *client) error {
	conn, err := c.connect()
	if err != nil {
		return err
	}
	if o.namespace != "" {
		conn.namespace = o.namespace
	}
	o.run = conn.runner(o.target)
	o.pick = func(ctx context.Context) string { return conn.firstReady(ctx, o.target) }
	show := newCopyDisplay(c.ErrOut, o)
	err = o.copyAll(ctx, show)
	show.close(err == nil)
	if err != nil {
		return interrupted(ctx, err)
	}
	if n := show.failures(); n > 0 {
		fmt.Fprintf(c.ErrOut, "error: not everything was copied: %d failed\n", n)
		return errFailed
	}
	return nil
}

const (
	// retryBase and retryMax are the first and the longest pause before the copy
	// is gone on with.
	retryBase = 500 * time.Millisecond
	retryMax  = 30 * time.Second
	// partingPatience is how long the other end may take to exit when everything
	// has been said.
	partingPatience = 5 * time.Second
)

// copyAll copies, and goes on when the connection is lost.
func (o *cpOptions) copyAll(ctx context.Context, show *copyDisplay) error {
	local := files.Options{Path: o.local, Attributes: o.attributes, Report: show.problem, Count: o.progress}
	remote := files.Options{Path: o.remote, Attributes: o.attributes, Count: o.progress}
	met := false
	best, failed := int64(-1), 0
	for {
		local.Progress = show.begin()
		result, err := o.attempt(ctx, local, remote)
		if err == nil {
			show.failed = result.Failed
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !met && !result.Met && unknownCommand(err) {
			return o.copyByTar(ctx, show)
		}
		if fatal, ok := errors.AsType[*files.FatalError](err); ok {
			if fatal.Remote {
				return fmt.Errorf("on target %s: %s", o.ref, printable(fatal.Text))
			}
			return errors.New(printable(fatal.Text))
		}
		// A session that stood and broke is the same to the user, whether the
		// two ends had met or were about to.
		_, broken := errors.AsType[*brokenError](err)
		if met = met || result.Met; !met && !broken || !transient(err) {
			return err
		}
		// Another instance wouldn't have what this one has.
		if o.instance == "" && strings.HasPrefix(result.Instance, o.target+"-") {
			o.instance = result.Instance
		}
		if result.Root != "" {
			to := &local
			if o.upload {
				to = &remote
			}
			to.Path, to.Exact = result.Root, true
		}
		failed++
		if done := local.Progress.Bytes.Load() + local.Progress.Files.Load(); done > best {
			best, failed = done, min(failed, 1)
		}
		if failed > o.retries {
			return fmt.Errorf("gave up: %w", err)
		}
		pause := min(retryBase<<min(failed-1, 10), retryMax)
		show.note("%v; going on in %v", err, pause)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// attempt copies as far as a connection lasts.
func (o *cpOptions) attempt(ctx context.Context, local, remote files.Options) (files.Result, error) {
	var do = files.Receive
	if o.upload {
		do = files.Send
	}
	var result files.Result
	err := o.duplex(ctx, files.Arguments(o.upload, remote), func(ctx context.Context, in io.ReadCloser, out io.Writer) (err error) {
		result, err = do(ctx, in, out, local)
		return err
	})
	return result, err
}

// errTalkOver closes the streams of a command that isn't needed any more.
var errTalkOver = errors.New("the copy has ended")

// duplex runs a command and talks to it. Its result is that of talk, unless the
// command's tells more.
func (o *cpOptions) duplex(ctx context.Context, command []string, talk func(ctx context.Context, in io.ReadCloser, out io.Writer) error) error {
	runCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stdin, out := io.Pipe()
	in, stdout := io.Pipe()
	stderr := &lastWords{}
	var runErr error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		runErr = o.run(runCtx, o.instance, command, stdin, stdout, stderr)
		stdin.CloseWithError(io.ErrClosedPipe)
		stdout.Close()
	}()
	err := talk(ctx, in, out)
	out.Close()
	in.CloseWithError(errTalkOver)
	// It has no reason to go on.
	patience := time.AfterFunc(partingPatience, func() { cancel(errTalkOver) })
	<-ended
	patience.Stop()
	if !streamEnded(err) || runErr == nil || errors.Is(runErr, errTalkOver) {
		return err
	}
	exit := utilexec.ExitError(nil)
	if text := stderr.String(); text != "" && errors.As(runErr, &exit) {
		return fmt.Errorf("%w: %s", runErr, printable(text))
	}
	return runErr
}

// streamEnded says whether a talk ended for a reason that the command's end may
// explain.
func streamEnded(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, errNeedsExit)
}

// runner runs commands in a target.
func (c *connection) runner(target string) runFunc {
	return func(ctx context.Context, instance string, command []string, stdin io.Reader, stdout, stderr io.Writer) error {
		r := c.subresource("POST", target, "exec").VersionedParams(&v1.TargetExecOptions{
			Instance: instance, Stdin: true, Stdout: true, Stderr: true, Command: command,
		}, scheme.ParameterCodec)
		if err := r.Error(); err != nil {
			return err
		}
		local := &console{stdio: stdio{stdin: true}, TTY: term.TTY{In: stdin, Out: stdout}, ErrOut: stderr}
		return c.stream(ctx, local, request{ref: ref{target, instance}, url: r.URL(), broken: "the copy isn't complete"})
	}
}

// firstReady returns the first instance of a target that is ready. Who may exec
// need not be allowed to see the target.
func (c *connection) firstReady(ctx context.Context, name string) string {
	target, err := c.clientset.StreamingV1().Targets(c.namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return ""
	}
	for _, instance := range target.Status.Instances {
		if instance.Ready {
			return instance.Name
		}
	}
	return ""
}

// unknownCommand says whether an exec failed because the target has no such
// command.
func unknownCommand(err error) bool {
	if exit := utilexec.ExitError(nil); errors.As(err, &exit) {
		return exit.ExitStatus() == 126 || exit.ExitStatus() == 127
	}
	return apierrors.IsBadRequest(err) || apierrors.IsInvalid(err)
}

// lastWords keeps the end of what a command says of itself.
type lastWords struct {
	mu  sync.Mutex // protects buf
	buf []byte
}

func (l *lastWords) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	const limit = 1 << 10
	if l.buf = append(l.buf, p...); len(l.buf) > limit {
		l.buf = append([]byte(nil), l.buf[len(l.buf)-limit:]...)
	}
	return len(p), nil
}

func (l *lastWords) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(bytes.TrimSpace(l.buf))
}
