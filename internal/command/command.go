// Package command is the aaserver binary's commands.
package command

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"k8s.io/component-base/logs"
	logsapi "k8s.io/component-base/logs/api/v1"
	"sigs.k8s.io/yaml"

	"aaserver.io/aaserver/internal/server"
	"aaserver.io/aaserver/internal/version"
)

// Run runs the command that args name until it is done or ctx ends, and returns
// the exit code.
func Run(ctx context.Context, args []string, in io.Reader, out, errOut io.Writer) int {
	root := &cobra.Command{
		Use:   "aaserver",
		Short: "A Kubernetes API server for what is not a pod",
		Long: `aaserver puts processes, containers on lone hosts, SSH hosts and TCP endpoints
into the Kubernetes API as targets, with the subresources that make pods
pleasant: log, exec, attach and portforward, next to status and scale.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errOut)
	root.AddCommand(newServe(), newStandalone(), newVersion(), newDemo())
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(errOut, "error:", err)
		return 1
	}
	return 0
}

func newServe() *cobra.Command {
	opts := server.NewServeOptions()
	logging := logsapi.NewLoggingConfiguration()
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run behind a cluster's kube-aggregator",
		Long: `Runs an aggregated API server: the cluster's kube-apiserver proxies requests for
targets to it, and it asks that for authentication and authorization. It hosts
nothing itself, unless --embedded-agent says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := opts.Complete(); err != nil {
				return err
			}
			if err := opts.Validate(); err != nil {
				return err
			}
			if err := logsapi.ValidateAndApply(logging, nil); err != nil {
				return err
			}
			defer logs.FlushLogs()
			return opts.Run(cmd.Context())
		},
	}
	opts.AddFlags(cmd.Flags())
	logsapi.AddFlags(logging, cmd.Flags())
	return cmd
}

func newStandalone() *cobra.Command {
	opts := server.NewStandaloneOptions()
	logging := logsapi.NewLoggingConfiguration()
	cmd := &cobra.Command{
		Use:   "standalone --data-dir DIR",
		Short: "Run a server that needs no cluster",
		Long: `Runs an API server of its own, with an agent in it that runs targets' processes
as the user who starts it. Everything it keeps is in the data directory, the
administrator's kubeconfig among it; whoever has that file may do everything.

All processes of its targets end with it.`,
		Example: `  aaserver standalone --data-dir ~/.aaserver --demo
  kubectl --kubeconfig ~/.aaserver/kubeconfig get targets`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := opts.Validate(); err != nil {
				return err
			}
			if err := logsapi.ValidateAndApply(logging, nil); err != nil {
				return err
			}
			defer logs.FlushLogs()
			opts.Ready = func(info server.ReadyInfo) { greet(cmd.OutOrStdout(), info, opts.Demo) }
			return opts.Run(cmd.Context())
		},
	}
	opts.AddFlags(cmd.Flags())
	logsapi.AddFlags(logging, cmd.Flags())
	return cmd
}

// greet says how to reach the server, and what to try on the demo's targets.
// The plugin lies beside the server.
func greet(out io.Writer, info server.ReadyInfo, demo bool) {
	fmt.Fprintf(out, "\naaserver is ready at %s\n\n  export KUBECONFIG=%s\n", info.URL, info.Kubeconfig)
	if self, err := os.Executable(); err == nil {
		fmt.Fprintf(out, "  export PATH=%s:$PATH\n", filepath.Dir(self))
	}
	if !demo {
		return
	}
	fmt.Fprint(out, `
  kubectl get targets
  kubectl target exec -it web -- sh
  kubectl target logs -f ticker
  kubectl target attach -it shell
  kubectl target port-forward web 8080:http    # then: curl 127.0.0.1:8080
  kubectl scale target/web --replicas=3

`)
}

func newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print which build this is",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			text, err := yaml.Marshal(version.Get())
			if err != nil {
				return err
			}
			_, err = cmd.OutOrStdout().Write(text)
			return err
		},
	}
}
