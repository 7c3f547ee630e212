// Package builtin is what our own binary does when an exec asks for one of the
// commands that come with it: so far, [files.Command]. A binary that links this
// package is that command when it is called by its name.
//
// It is a process like any other beside an instance, under a shim, of the
// instance's user, in the instance's working directory and environment: what
// that user may not do, it can't. Nothing of the server runs in it.
//
// As package shim does, it takes over as soon as what it imports has been
// initialised: the rest of the binary would take longer than a small copy.
package builtin

import (
	"os"
	"syscall"

	"aaserver.io/aaserver/internal/files"
)

// EnvInstance names the environment variable that tells an instance its own
// name.
const EnvInstance = "AASERVER_INSTANCE"

// Is says whether a command is one of these.
func Is(args []string) bool {
	return len(args) > 0 && args[0] == files.Command
}

// The one init that does something: see the package comment.
func init() {
	if Is(os.Args) {
		os.Exit(run())
	}
}

func run() int {
	// A pipe that is read without blocking can be closed by another goroutine.
	if err := syscall.SetNonblock(0, true); err != nil {
		os.Stderr.WriteString(files.Command + ": no standard input\n")
		return 1
	}
	stdin := os.NewFile(0, "stdin")
	return files.Serve(os.Args, stdin, os.Stdout, os.Stderr, os.Getenv(EnvInstance))
}
