package process

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/files"
)

// copyBeside copies with the command beside an instance as the other end.
func copyBeside(t *testing.T, c *conn, upload bool, local, remote string) (files.Result, []string, error) {
	t.Helper()
	run, err := c.Exec(t.Context(), driver.ExecOptions{Command: files.Arguments(upload, files.Options{Path: remote})})
	if err != nil {
		return files.Result{}, nil, err
	}
	toRemote, stdin := io.Pipe()
	stdout, fromRemote := io.Pipe()
	var stderr bytes.Buffer
	ended := make(chan error, 1)
	go func() {
		err := run(t.Context(), driver.Stdio{Stdin: toRemote, Stdout: fromRemote, Stderr: &stderr})
		toRemote.Close()
		fromRemote.Close()
		ended <- err
	}()
	var problems []string
	opts := files.Options{Path: local, Report: func(p files.Problem) { problems = append(problems, p.Path+": "+p.Text) }}
	do := files.Receive
	if upload {
		do = files.Send
	}
	result, err := do(t.Context(), stdout, stdin, opts)
	stdin.Close()
	exit := <-ended
	if code, ok := errors.AsType[*driver.ExitError](exit); exit != nil && (!ok || code.Code != 1 || err == nil && problems == nil) {
		t.Errorf("the command ended with %v, stderr %q", exit, stderr.String())
	}
	return result, problems, err
}

func TestFilesAreCopiedBesideAnInstance(t *testing.T) {
	d := newDriver(t, Options{})
	dir := t.TempDir()
	source := script("sleep 1000")
	source.WorkingDir = dir
	target := newTarget(source)
	start(t, d, target)
	c := open(t, d, target)
	contents := strings.Repeat("contents", 1<<18)
	if err := os.WriteFile(filepath.Join(dir, "there"), []byte(contents), 0o640); err != nil {
		t.Fatal(err)
	}
	local := filepath.Join(t.TempDir(), "here")
	result, problems, err := copyBeside(t, c, false, local, "there")
	if err != nil || problems != nil || result.Files != 1 || result.Instance != "web-0" {
		t.Fatalf("%+v, %q, %v", result, problems, err)
	}
	result, problems, err = copyBeside(t, c, true, local, "back")
	if err != nil || problems != nil || result.Files != 1 || result.Instance != "web-0" || result.Root != "back" {
		t.Fatalf("%+v, %q, %v", result, problems, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "back")); err != nil || string(b) != contents {
		t.Errorf("%d bytes came back, %v", len(b), err)
	}
	if info, err := os.Stat(filepath.Join(dir, "back")); err != nil || info.Mode() != 0o640 {
		t.Errorf("%v, %v", info, err)
	}
	_, _, err = copyBeside(t, c, false, local, "nothing")
	if fatal, ok := errors.AsType[*files.FatalError](err); !ok || !fatal.Remote || !strings.Contains(fatal.Text, "nothing: no such file") {
		t.Errorf("a file that isn't there: %v", err)
	}
	_, err = c.Exec(t.Context(), driver.ExecOptions{Command: files.Arguments(true, files.Options{Path: "x"}), TTY: true})
	if failure, ok := errors.AsType[*driver.Error](err); !ok || failure.Kind != driver.Invalid {
		t.Errorf("with a terminal: %v, want Invalid", err)
	}
}

// What a copy may do is what the target's user may.
func TestFilesAreCopiedWithTheRightsOfTheTargetsUserAlone(t *testing.T) {
	if os.Getuid() != 0 {
		skip(t, "only root can run a target as another user")
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		skip(t, err)
	}
	dir := t.TempDir()
	for at := dir; at != os.TempDir() && at != "/"; at = filepath.Dir(at) {
		if err := os.Chmod(at, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write := func(name string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), mode); err != nil {
			t.Fatal(err)
		}
	}
	write("secret", 0o600)
	write("open", 0o644)
	target := newTarget(v1.ProcessSource{Command: []string{"sleep", "1000"}, User: "nobody", WorkingDir: dir})
	d := newDriver(t, Options{})
	start(t, d, target)
	c := open(t, d, target)
	local := t.TempDir()

	if _, _, err := copyBeside(t, c, false, local, "secret"); err != nil {
		t.Errorf("a copy of one file that can't be read broke off: %v", err)
	}
	if _, err := os.Stat(filepath.Join(local, "secret")); err == nil {
		t.Error("a file was read that the user may not read")
	}
	_, problems, err := copyBeside(t, c, false, local, ".")
	if err != nil || fmt.Sprint(problems) != "[secret: permission denied]" {
		t.Errorf("problems %q, %v", problems, err)
	}
	if b, err := os.ReadFile(filepath.Join(local, "open")); err != nil || string(b) != "open" {
		t.Errorf("what may be read is %q, %v", b, err)
	}
	write2 := filepath.Join(local, "open")
	if _, problems, err := copyBeside(t, c, true, write2, "new"); err != nil || fmt.Sprint(problems) != "[new: permission denied]" {
		t.Errorf("writing into a directory of root's: problems %q, %v", problems, err)
	}
	if err := os.Mkdir(filepath.Join(dir, "in"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, "in"), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, problems, err := copyBeside(t, c, true, write2, "in"); err != nil || problems != nil {
		t.Errorf("problems %q, %v", problems, err)
	}
	info, err := os.Stat(filepath.Join(dir, "in/open"))
	if err != nil {
		t.Fatal(err)
	}
	if uid := info.Sys().(*syscall.Stat_t).Uid; fmt.Sprint(uid) != nobody.Uid {
		t.Errorf("the copy belongs to %d, want nobody", uid)
	}
}
