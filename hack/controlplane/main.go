// Command controlplane runs a real Kubernetes control plane on this machine's
// loopback, to test against and to try things with: etcd, kube-apiserver and
// kube-controller-manager, without nodes. It makes their certificates, waits
// until they are ready, and ends them with itself, however it ends. Linux only.
//
// Everything lies in one directory: certificates, etcd's data, a log for each
// component, kubeconfigs for an administrator and for a user without rights,
// and controlplane.json, the Info that tests read.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	// Who signals again doesn't want to wait.
	context.AfterFunc(ctx, stop)
	err := newCommand().ExecuteContext(ctx)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "controlplane:", err)
	var ended *endedError
	if errors.As(err, &ended) {
		if end := tail(ended.log, 10); end != "" {
			fmt.Fprintln(os.Stderr, "\t"+strings.ReplaceAll(end, "\n", "\n\t"))
		}
	}
	os.Exit(1)
}

func newCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "controlplane",
		Short:         "A Kubernetes control plane on loopback, to test against",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.DisableDefaultCmd = true
	root.AddCommand(
		newUp(),
		newControl("stop", "Stop one component of a running control plane", request{Stop: true}),
		newControl("start", "Start a component that was stopped, and wait until it is ready", request{Start: true}),
		newControl("restart", "Stop a component, start it again, and wait until it is ready", request{Stop: true, Start: true}),
		newRotate(),
	)
	return root
}

func newUp() *cobra.Command {
	var o upOptions
	cmd := &cobra.Command{
		Use:   "up --dir DIR",
		Short: "Run a control plane until it is interrupted",
		Long: `Runs etcd, kube-apiserver and kube-controller-manager on 127.0.0.1 until it is
interrupted. It ends with an error if one of them ends by itself. The same
directory holds the same cluster the next time.

When everything is ready, DIR/controlplane.json says where it is and what lies
where. DIR/admin.kubeconfig may do everything, DIR/user.kubeconfig nothing but
what a role gives the user "user".`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for flag, port := range map[string]int{"apiserver-port": o.APIServerPort, "etcd-port": o.EtcdPort} {
				if port < 0 || port > 65535 {
					return fmt.Errorf("--%s=%d isn't a port", flag, port)
				}
			}
			err := up(cmd.Context(), o, cmd.OutOrStdout())
			if cmd.Context().Err() != nil && errors.Is(err, context.Cause(cmd.Context())) {
				fmt.Fprintln(cmd.OutOrStdout(), "Stopped.")
				return nil
			}
			return err
		},
	}
	addDir(cmd, &o.Dir)
	cmd.Flags().StringVar(&o.BinDir, "bin-dir", "", "where the components' programs are (default: beside this one)")
	cmd.Flags().IntVar(&o.APIServerPort, "apiserver-port", 0, "kube-apiserver's port (default: a free one)")
	cmd.Flags().IntVar(&o.EtcdPort, "etcd-port", 0, "etcd's port (default: a free one)")
	cmd.Flags().StringArrayVar(&o.APIServerArgs, "apiserver-arg", nil, "a flag for kube-apiserver, as --apiserver-arg=--request-timeout=5s; repeatable; a value wins over what is set here, a list is added to it")
	cmd.Flags().StringArrayVar(&o.ControllerManagerArgs, "controller-manager-arg", nil, "the same for kube-controller-manager")
	cmd.Flags().BoolVar(&o.NoControllerManager, "no-controller-manager", false, "run no kube-controller-manager: namespaces then have no service accounts, and what is deleted keeps its dependents")
	return cmd
}

func newControl(name, short string, r request) *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   name + " --dir DIR COMPONENT",
		Short: short,
		Long:  short + `: etcd, kube-apiserver or kube-controller-manager. The others run on.`,
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Component = args[0]
			return ask(cmd.Context(), dir, r)
		},
	}
	addDir(cmd, &dir)
	if r.Stop {
		cmd.Flags().BoolVar(&r.Kill, "kill", false, "stop it by SIGKILL")
	}
	return cmd
}

func newRotate() *cobra.Command {
	var dir string
	var overlap time.Duration
	cmd := &cobra.Command{
		Use:   "rotate-front-proxy --dir DIR",
		Short: "Replace the front-proxy CA and the aggregator's certificate while they are in use",
		Long: `Replaces the front-proxy CA and the aggregator's certificate while they are in
use: first both CAs are trusted, then the certificate changes, then the old CA
is forgotten. Returns when kube-apiserver has published the new CA alone.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if overlap < 0 {
				return fmt.Errorf("--overlap=%s is negative", overlap)
			}
			return rotateFrontProxy(cmd.Context(), dir, overlap, cmd.OutOrStdout())
		},
	}
	addDir(cmd, &dir)
	cmd.Flags().DurationVar(&overlap, "overlap", 5*time.Second, "how long both CAs are trusted before and after the certificate changes; 0 replaces everything at once")
	return cmd
}

func addDir(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "dir", "", "the control plane's directory")
	cmd.MarkFlagRequired("dir")
}
