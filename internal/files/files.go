// Package files copies files and trees over a pair of byte streams: both ends of
// the protocol between "kubectl target cp" and the command [Command] beside an
// instance.
//
// Whoever has the files sends, the other receives. A receiver trusts a sender
// with nothing: it writes below its destination only, through no symbolic link,
// by names it has checked, and everything that it keeps of a sender is bounded.
//
//	sender                              receiver
//	hello, top                    ───▶
//	                              ◀───  hello, root
//	dir, link, file, file, …      ───▶        announced ahead, up to window
//	                              ◀───  want, want, …  what is there, and its hash
//	begin, data…, end, leave, …   ───▶        in the order of the announcements
//	                              ◀───  problem, stop
//	done                          ───▶
//	                              ◀───  done
//
// No file waits for a round trip of its own. What is there already, whole or in
// part, isn't sent again: the receiver says how much it has and that part's
// SHA-256, which the sender compares with its own. So a copy that broke off goes
// on where it was when it is started again, and no state is kept but the files.
//
// A file is written under another name in its directory, and gets its own when
// its SHA-256 is the sender's. What was received of a file that is larger than
// a MiB is kept under that name when the connection breaks.
//
// Modes and times are kept unless [Attributes] says otherwise, owners are not.
// Symbolic links stay links, absolute ones too, and nothing is written through
// them. Sockets, devices and named pipes are left out, with a warning.
package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
)

// Command is the argument 0 by which an exec asks for the other end.
const Command = "aaserver:files"

// Limits of what one side takes from the other. A sender keeps to them, and
// reports what it leaves out.
const (
	// MaxName is the longest name of an entry, in bytes.
	MaxName = 255
	// MaxDepth is how many directories may be inside each other.
	MaxDepth = 256
	// MaxLink is the longest text of a symbolic link, in bytes.
	MaxLink = 4096
	// MaxUnsized is how much is read of a file whose size is said to be 0: those
	// of /proc have more.
	MaxUnsized = 16 << 20

	// window is how many files and ends of directories are announced before
	// their turn.
	window = 1024
	// maxText bounds a message.
	maxText = 2048
	// maxPath bounds the path in a message.
	maxPath = MaxDepth * (MaxName + 1)
	// partialMin is what has to be there of a file to be kept for later.
	partialMin = 1 << 20
)

// Attributes says what is kept of files beside their contents. The zero value
// keeps modes and times.
type Attributes struct {
	// Plain keeps neither modes nor times: new files get the source's mode
	// within the umask, and the time at which they are written.
	Plain bool
	// SetID keeps the set-user-ID, set-group-ID and sticky bits as well.
	SetID bool
}

// mode returns the bits to set of a source's mode.
func (a Attributes) mode(mode fs.FileMode) fs.FileMode {
	if a.SetID {
		return mode & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky)
	}
	return mode & fs.ModePerm
}

// Options are what both ends have in common.
type Options struct {
	// Path is the file or directory to send, or where to put what is received.
	Path string
	// Exact says, to a receiver, that Path is the copy itself even if it is a
	// directory, rather than a directory to put it into.
	Exact      bool
	Attributes Attributes
	// Count has a sender count what there is to send while it sends.
	Count bool
	// Report is told of each thing that goes wrong, on either side. It is called
	// by one goroutine at a time. If nil, this side's problems are told to the
	// other side.
	Report func(Problem)
	// Progress is kept up to date if it isn't nil.
	Progress *Progress
	// Instance is told to the other side.
	Instance string
}

// Problem is something that went wrong with one entry, or something that the
// user should know.
type Problem struct {
	// Path is the entry's, with slashes, beginning with the name of the copy.
	Path string
	Text string
	// Warning says that nothing is missing of what can be copied.
	Warning bool
}

// Progress is how far a copy is. Its counts begin anew with each attempt.
type Progress struct {
	// Files and Bytes are those done, of which Present bytes didn't have to be
	// sent.
	Files, Bytes, Present atomic.Int64
	// TotalFiles and TotalBytes are what there is; 0 while that isn't known.
	TotalFiles, TotalBytes atomic.Int64
	// Current is the path of the file being copied.
	Current atomic.Value
}

func (p *Progress) current(path string) {
	if p != nil {
		p.Current.Store(path)
	}
}

func (p *Progress) add(files, bytes int64) {
	if p != nil {
		p.Files.Add(files)
		p.Bytes.Add(bytes)
	}
}

func (p *Progress) present(bytes int64) {
	if p != nil {
		p.Present.Add(bytes)
		p.Bytes.Add(bytes)
	}
}

func (p *Progress) total(files, bytes int64) {
	if p != nil {
		p.TotalFiles.Store(files)
		p.TotalBytes.Store(bytes)
	}
}

// Result is what is known when a copy has ended, be it with an error.
type Result struct {
	// Met says that the other end has answered.
	Met bool
	// Instance is what the other end said of itself.
	Instance string
	// Root is where the copy is, on the receiver's side: the Path for another
	// attempt, with Exact. It is empty if that isn't settled yet, or if Path can
	// be used again as it is.
	Root string
	// Files and Bytes are those that arrived and were verified, the ones that
	// were there already included. Failed counts problems other than warnings.
	Files, Bytes, Failed int64
}

// FatalError is what ends a copy and would end another attempt as well. Every
// other error of Send and Receive is that of a stream.
type FatalError struct {
	// Text is for the user.
	Text string
	// Remote says that it is the other side's.
	Remote bool
}

func (e *FatalError) Error() string { return e.Text }

func fatalf(format string, args ...any) *FatalError {
	return &FatalError{Text: fmt.Sprintf(format, args...)}
}

// reason is an error's last word: the text that the user reads names the file.
func reason(err error) string {
	if e, ok := errors.AsType[syscall.Errno](err); ok {
		return e.Error()
	}
	if e, ok := errors.AsType[*fs.PathError](err); ok {
		return e.Err.Error()
	}
	return err.Error()
}

// exhausted says whether an error of writing a file will be met by the next
// file, too.
func exhausted(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, errQuota) || errors.Is(err, syscall.EROFS)
}

// reporter tells problems to the user: here, or by the other side.
type reporter struct {
	conn   *conn
	report func(Problem)

	mu     sync.Mutex // protects what follows, and is held during report
	failed int64
	told   map[string]bool
}

// problem is one of this side.
func (r *reporter) problem(p Problem) error {
	if r.report == nil {
		r.mu.Lock()
		if !p.Warning {
			r.failed++
		}
		r.mu.Unlock()
		return r.conn.write(frameProblem, encodeProblem(p))
	}
	r.relay(p)
	return nil
}

// once reports a problem that every file would have, for the first of them.
func (r *reporter) once(p Problem) error {
	r.mu.Lock()
	told := r.told[p.Text]
	if r.told == nil {
		r.told = make(map[string]bool)
	}
	r.told[p.Text] = true
	r.mu.Unlock()
	if told {
		return nil
	}
	return r.problem(p)
}

// relay is for problems of the other side.
func (r *reporter) relay(p Problem) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !p.Warning {
		r.failed++
	}
	if r.report != nil {
		r.report(p)
	}
}

func (r *reporter) failures() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.failed
}

// until reads until a context ends: what is there already may be large.
func until(ctx context.Context, r io.Reader) io.Reader { return &untilReader{ctx, r} }

type untilReader struct {
	ctx context.Context
	io.Reader
}

func (u *untilReader) Read(p []byte) (int, error) {
	if u.ctx.Err() != nil {
		return 0, context.Cause(u.ctx)
	}
	return u.Reader.Read(p)
}

// validName says whether an entry may have a name: it is one element of a path,
// on this system.
func validName(name string) error {
	switch {
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q is no name for a file", name)
	case len(name) > MaxName:
		return fmt.Errorf("a name of %d bytes is too long: %d is the limit", len(name), MaxName)
	}
	for i := range len(name) {
		if c := name[i]; c == 0 || c == '/' || c == filepath.Separator {
			return fmt.Errorf("%q has a character that no name of a file can have", name)
		}
	}
	if !filepath.IsLocal(name) {
		return fmt.Errorf("%q is no name for a file on this system", name)
	}
	if partialName(name) {
		return fmt.Errorf("%q is a name for unfinished copies", name)
	}
	return nil
}

// topName returns the name under which a source is put into a directory: none
// if its contents are to be put there.
func topName(source string) string {
	slashed := filepath.ToSlash(source)
	name := path.Base(path.Clean(slashed))
	if name == "." || name == ".." || name == "/" || path.Base(slashed) == "." {
		return ""
	}
	return name
}

// Serve is the other end: it does what its arguments say, those of
// [Arguments], and returns the exit code. The streams are closed by the caller.
// To close stdin must unblock a Read.
func Serve(args []string, stdin io.ReadCloser, stdout, stderr io.Writer, instance string) int {
	receive, opts, err := parseArguments(args)
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", Command, err)
		return 2
	}
	opts.Instance = instance
	do := Send
	if receive {
		do = Receive
	}
	result, err := do(context.Background(), stdin, stdout, opts)
	switch fatal := (*FatalError)(nil); {
	case errors.As(err, &fatal) && fatal.Remote:
		return 1
	case err != nil:
		fmt.Fprintf(stderr, "%s: %v\n", Command, err)
		return 1
	case result.Failed > 0:
		return 1
	}
	return 0
}

// Arguments returns the command that serves as the other end: of the options,
// Path, Exact, Attributes and Count.
func Arguments(receive bool, opts Options) []string {
	args := []string{Command, "send"}
	if receive {
		args[1] = "receive"
	}
	for _, f := range flags(&opts) {
		if *f.value {
			args = append(args, f.name)
		}
	}
	return append(args, "--", opts.Path)
}

type flag struct {
	name  string
	value *bool
}

func flags(opts *Options) []flag {
	return []flag{
		{"--exact", &opts.Exact},
		{"--no-preserve", &opts.Attributes.Plain},
		{"--keep-setuid", &opts.Attributes.SetID},
		{"--count", &opts.Count},
	}
}

func parseArguments(args []string) (receive bool, opts Options, err error) {
	const usage = "this is a part of kubectl target cp, which starts it by itself: use that instead"
	if len(args) < 4 || args[1] != "send" && args[1] != "receive" {
		return false, opts, errors.New(usage)
	}
	receive = args[1] == "receive"
	args = args[2:]
next:
	for ; args[0] != "--"; args = args[1:] {
		if len(args) < 3 {
			return false, opts, errors.New(usage)
		}
		for _, f := range flags(&opts) {
			if f.name == args[0] {
				*f.value = true
				continue next
			}
		}
		return false, opts, fmt.Errorf("unknown option %q: the plugin and the server are of different versions", args[0])
	}
	if len(args) != 2 || args[1] == "" {
		return false, opts, errors.New(usage)
	}
	opts.Path = args[1]
	return receive, opts, nil
}
