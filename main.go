// Command aaserver is an aggregated Kubernetes API server for what is not a
// pod.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"aaserver.io/aaserver/internal/command"
)

func main() {
	os.Exit(run())
}

func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	// A second signal isn't waited for: it ends the program at once.
	context.AfterFunc(ctx, stop)
	return command.Run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr)
}
