// Command kubectl-target is the kubectl plugin of aaserver: the logs, exec,
// attach and port-forward of targets.
package main

import (
	"os"

	"aaserver.io/aaserver/internal/cli"
)

func main() {
	os.Exit(cli.Main())
}
