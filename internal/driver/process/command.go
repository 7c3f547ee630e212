package process

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process/builtin"
	"aaserver.io/aaserver/internal/driver/process/shim"
)

const (
	defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	defaultTerm = "xterm-256color"
)

// setting is what the processes of an instance have in common: its own and
// those of exec.
type setting struct {
	account account
	env     []v1.EnvVar
	dir     string
}

// account is who a process runs as.
type account struct {
	name, home, shell string
	// credential is nil if it is who the agent runs as.
	credential *syscall.Credential
}

// newSetting works out user, environment and working directory.
func newSetting(instance driver.Instance) (*setting, error) {
	source := instance.Target.Spec.Process
	if source == nil {
		return nil, driver.Errorf(driver.Invalid, "target %q isn't a process", instance.Target.Name)
	}
	account, err := lookUpAccount(source.User)
	if err != nil {
		return nil, err
	}
	s := &setting{account: account, env: []v1.EnvVar{
		{Name: "PATH", Value: defaultPath},
		{Name: "HOME", Value: account.home},
		{Name: "USER", Value: account.name},
		{Name: "LOGNAME", Value: account.name},
		{Name: "SHELL", Value: account.shell},
		{Name: "LANG", Value: "C.UTF-8"},
		{Name: builtin.EnvInstance, Value: instance.Name},
	}}
	for _, p := range instance.Ports {
		if p.HostPort != 0 {
			s.setenv(v1.PortEnvName(p.Name), strconv.Itoa(int(p.HostPort)))
		}
	}
	for _, e := range source.Env {
		s.setenv(e.Name, expand(e.Value, s.getenv))
	}
	s.dir = source.WorkingDir
	if s.dir == "" {
		s.dir = account.home
		if account.do(func() error { return enterable(s.dir) }) != nil {
			s.dir = "/"
		}
	}
	return s, nil
}

func (s *setting) getenv(name string) (string, bool) {
	for _, e := range s.env {
		if e.Name == name {
			return e.Value, true
		}
	}
	return "", false
}

func (s *setting) setenv(name, value string) {
	for i := range s.env {
		if s.env[i].Name == name {
			s.env[i].Value = value
			return
		}
	}
	s.env = append(s.env, v1.EnvVar{Name: name, Value: value})
}

// command makes a shim's command of a program and its arguments. It fails with
// Invalid if it is plain that it can't be run.
func (s *setting) command(args []string, tty bool) (*shim.Command, error) {
	if len(args) == 0 || args[0] == "" {
		return nil, driver.Errorf(driver.Invalid, "the command is empty")
	}
	if tty && builtin.Is(args) {
		return nil, driver.Errorf(driver.Invalid, "command %q can't have a terminal", args[0])
	}
	c := &shim.Command{Args: args, Dir: s.dir, TTY: tty, Credential: s.account.credential}
	for _, e := range s.env {
		c.Env = append(c.Env, e.Name+"="+e.Value)
	}
	if _, ok := s.getenv("TERM"); tty && !ok {
		c.Env = append(c.Env, "TERM="+defaultTerm)
	}
	for _, text := range append(append([]string{c.Dir}, args...), c.Env...) {
		if strings.IndexByte(text, 0) >= 0 {
			return nil, driver.Errorf(driver.Invalid, "a zero byte can't be part of a command, its environment or working directory")
		}
	}
	path, _ := s.getenv("PATH")
	err := s.account.do(func() (err error) {
		if err := enterable(s.dir); err != nil {
			return s.explain("working directory", s.dir, err)
		}
		if builtin.Is(args) {
			c.Path = ownBinary
			return s.explainOwn(args[0], executable(ownBinary))
		}
		c.Path, err = s.find(args[0], path)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// ownBinary leads to the binary that runs, for a shim as for the agent, even
// where another user can't get by its path, or when it was replaced since.
const ownBinary = "/proc/self/exe"

// explainOwn says why a command that comes with the server can't be run.
func (s *setting) explainOwn(name string, err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return driver.Errorf(driver.Invalid, "command %q: user %q may not execute the server's own binary: chmod a+x it", name, s.account.name)
	}
	if err != nil {
		return s.explain("command", name, err)
	}
	return nil
}

// find looks a program up as execvp does. It runs as the program's user.
func (s *setting) find(name, path string) (string, error) {
	if strings.Contains(name, "/") {
		file := name
		if !filepath.IsAbs(file) {
			file = filepath.Join(s.dir, file)
		}
		if err := executable(file); err != nil {
			return "", s.explain("command", name, err)
		}
		return file, nil
	}
	var denied error
	for _, dir := range filepath.SplitList(path) {
		if !filepath.IsAbs(dir) {
			dir = filepath.Join(s.dir, dir)
		}
		file := filepath.Join(dir, name)
		err := executable(file)
		if err == nil {
			return file, nil
		}
		// A directory in PATH that the user may not search is no reason.
		if info, statErr := os.Stat(file); statErr == nil && info.Mode().IsRegular() {
			denied = s.explain("command", file, err)
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", driver.Errorf(driver.Invalid, "command %q not found in PATH (%s)", name, path)
}

// explain says why a file can't be used, for a person who wrote the spec or
// the command.
func (s *setting) explain(what, name string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return driver.Errorf(driver.Invalid, "%s %q doesn't exist", what, name)
	case errors.Is(err, fs.ErrPermission):
		return driver.Errorf(driver.Invalid, "%s %q: permission denied for user %q", what, name, s.account.name)
	}
	return driver.Errorf(driver.Invalid, "%s %q: %w", what, name, err)
}

// startError explains why the kernel refused to start a command.
func (s *setting) startError(c *shim.Command, err error) error {
	start, ok := errors.AsType[*shim.StartError](err)
	if !ok {
		return driver.Errorf(driver.Unavailable, "command %q can't be started: %w", c.Args[0], err)
	}
	switch start.Errno {
	case syscall.ENOENT, syscall.EACCES, syscall.ENOTDIR, syscall.ELOOP, syscall.EPERM:
		// Something in between, or between our look and the kernel's.
		if err := s.account.do(func() error { return enterable(c.Dir) }); err != nil {
			return s.explain("working directory", c.Dir, err)
		}
		if err := s.account.do(func() error { return executable(c.Path) }); err != nil {
			return s.explain("command", c.Args[0], err)
		}
		if start.Errno == syscall.ENOENT {
			return driver.Errorf(driver.Invalid, "command %q: its interpreter or dynamic loader doesn't exist", c.Args[0])
		}
		return driver.Errorf(driver.Invalid, "command %q: %w", c.Args[0], start.Errno)
	case syscall.ENOEXEC:
		return driver.Errorf(driver.Invalid, "command %q: %w: it is no program for this machine, or a script whose first line doesn't name an interpreter (#!/bin/sh)", c.Args[0], start.Errno)
	case syscall.E2BIG:
		return driver.Errorf(driver.Invalid, "command %q: %w: arguments and environment are too long", c.Args[0], start.Errno)
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE:
		return driver.Errorf(driver.Unavailable, "command %q can't be started: the agent's host is short of processes, memory or files: %w", c.Args[0], start.Errno)
	}
	return driver.Errorf(driver.Invalid, "command %q: %w", c.Args[0], start.Errno)
}

// enterable says whether a directory can be a working directory.
func enterable(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return syscall.ENOTDIR
	}
	return accessible(dir)
}

// executable says whether a file is a program that can be run, and whether the
// interpreter exists that it names, if it is a script.
func executable(file string) error {
	info, err := os.Stat(file)
	switch {
	case err != nil:
		return err
	case info.IsDir():
		return syscall.EISDIR
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		return syscall.EACCES
	}
	if err := accessible(file); err != nil {
		return err
	}
	interpreter := interpreter(file)
	if interpreter == "" {
		return nil
	}
	if _, err := os.Stat(interpreter); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("bad interpreter: %q doesn't exist", interpreter)
	}
	return nil
}

// interpreter returns the absolute path after "#!" at a script's beginning, ""
// if it can't be read or is no script.
func interpreter(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	var buf [256]byte
	n, _ := f.Read(buf[:])
	line, ok := strings.CutPrefix(string(buf[:n]), "#!")
	if !ok {
		return ""
	}
	line, _, _ = strings.Cut(line, "\n")
	fields := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' })
	if len(fields) == 0 || !filepath.IsAbs(fields[0]) {
		return ""
	}
	return fields[0]
}

// accessible says whether this thread may execute a file, or enter a
// directory.
func accessible(name string) error {
	err := unix.Faccessat(unix.AT_FDCWD, name, unix.X_OK, unix.AT_EACCESS)
	if err == unix.ENOSYS {
		return nil // before Linux 5.8: the kernel will tell when it is run
	}
	return err
}

// do runs a function that looks at files with the account's eyes: groups, ACLs
// and what network file systems think of it included.
func (a account) do(look func() error) error {
	if a.credential == nil {
		return look()
	}
	result := make(chan error)
	go func() {
		// The identity is this thread's alone, and the thread ends with the
		// goroutine, since it isn't unlocked.
		runtime.LockOSThread()
		result <- func() error {
			groups := a.credential.Groups
			if len(groups) == 0 {
				groups = []uint32{a.credential.Gid}
			}
			if err := setThreadIdentity(a.credential.Uid, a.credential.Gid, groups); err != nil {
				return fmt.Errorf("switching to user %q: %w", a.name, err)
			}
			return look()
		}()
	}()
	return <-result
}

// lookUpAccount finds the user that a spec names, the agent's own if it names
// none.
func lookUpAccount(name string) (account, error) {
	uid := os.Geteuid()
	if name == "" {
		name = strconv.Itoa(uid)
	}
	u, err := user.Lookup(name)
	number, numberErr := strconv.ParseUint(name, 10, 32)
	if err != nil && numberErr == nil {
		if u, err = user.LookupId(name); err != nil {
			// A number needs no entry in the list of users.
			u, err = &user.User{Uid: name, Gid: name, Username: name, HomeDir: "/"}, nil
			if int(number) == uid {
				u.Gid = strconv.Itoa(os.Getegid())
			}
		}
	}
	if err != nil {
		if _, ok := errors.AsType[user.UnknownUserError](err); ok {
			return account{}, driver.Errorf(driver.Invalid, "user %q doesn't exist on the agent's host", name)
		}
		return account{}, driver.Errorf(driver.Unavailable, "looking up user %q: %w", name, err)
	}
	id, err1 := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(err1, err2); err != nil {
		return account{}, driver.Errorf(driver.Unavailable, "looking up user %q: %w", name, err)
	}
	// A class that allows any user but root judges the name alone: what is root
	// by another name, or by a number with zeros before it, isn't taken for it.
	if id == 0 && uid == 0 && name != "root" && name != "0" {
		return account{}, driver.Errorf(driver.Invalid, "user %q is root on the agent's host: name root or 0 to run as root", name)
	}
	a := account{name: u.Username, home: u.HomeDir, shell: loginShell(u.Username)}
	if a.home == "" {
		a.home = "/"
	}
	if id == uint64(uid) {
		return a, nil
	}
	if uid != 0 {
		return account{}, driver.Errorf(driver.Invalid, "the agent runs as uid %d and can't switch to user %q: start aaserver as root, or leave user out", uid, name)
	}
	a.credential = &syscall.Credential{Uid: uint32(id), Gid: uint32(gid)}
	// A user without an entry is in no groups.
	groups, _ := u.GroupIds()
	for _, group := range groups {
		if g, err := strconv.ParseUint(group, 10, 32); err == nil {
			a.credential.Groups = append(a.credential.Groups, uint32(g))
		}
	}
	return a, nil
}

// loginShell reads a user's shell from the list of users, which os/user leaves
// out.
func loginShell(name string) string {
	passwd, _ := os.ReadFile("/etc/passwd")
	for line := range strings.Lines(string(passwd)) {
		fields := strings.Split(strings.TrimSpace(line), ":")
		if len(fields) == 7 && fields[0] == name && fields[6] != "" {
			return fields[6]
		}
	}
	return "/bin/sh"
}

// expand replaces $(NAME) as Kubernetes does: by the variable's value if there
// is one, and not at all if there is none. $$ stands for $.
func expand(text string, value func(string) (string, bool)) string {
	var b strings.Builder
	for {
		before, rest, found := strings.Cut(text, "$")
		b.WriteString(before)
		if !found {
			return b.String()
		}
		text = rest
		switch {
		case strings.HasPrefix(rest, "$"):
			b.WriteByte('$')
			text = rest[1:]
		case strings.HasPrefix(rest, "("):
			name, after, closed := strings.Cut(rest[1:], ")")
			if !closed {
				b.WriteByte('$')
				continue
			}
			text = after
			if v, ok := value(name); ok {
				b.WriteString(v)
			} else {
				b.WriteString("$(" + name + ")")
			}
		default:
			b.WriteByte('$')
		}
	}
}
