package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/metadata"
	"k8s.io/kubectl/pkg/util/templates"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// completionTimeout bounds how long a user waits after pressing tab.
	completionTimeout = 3 * time.Second
	// completionLimit bounds how many names are fetched for it.
	completionLimit = 1000
)

func newCompletionCommand(c *client) *cobra.Command {
	shells := map[string]func(*cobra.Command) error{
		"bash":       func(root *cobra.Command) error { return root.GenBashCompletionV2(c.Out, true) },
		"zsh":        func(root *cobra.Command) error { return root.GenZshCompletion(c.Out) },
		"fish":       func(root *cobra.Command) error { return root.GenFishCompletion(c.Out, true) },
		"powershell": func(root *cobra.Command) error { return root.GenPowerShellCompletionWithDesc(c.Out) },
	}
	names := []string{"bash", "zsh", "fish", "powershell"}
	return &cobra.Command{
		Use:                   "completion SHELL",
		DisableFlagsInUseLine: true,
		Short:                 "Output shell completion code for the specified shell (bash, zsh, fish, or powershell)",
		Long: templates.LongDesc(`
			Output shell completion code for the specified shell (bash, zsh, fish, or powershell).

			The code completes the command 'kubectl-target'. For 'kubectl target' it is kubectl's
			own completion that asks this plugin, by a program on the PATH with the name
			'kubectl_complete-target'. A link to this binary is one.`),
		Example: templates.Examples(`
			# Complete 'kubectl target' in every shell that completes kubectl
			ln -s "$(command -v kubectl-target)" ~/.local/bin/kubectl_complete-target

			# Load the completion code for 'kubectl-target' into the current bash
			source <(kubectl-target completion bash)

			# Load the completion code for 'kubectl-target' into the current zsh
			source <(kubectl-target completion zsh)

			# Load the completion code for 'kubectl-target' into every new fish
			kubectl-target completion fish > ~/.config/fish/completions/kubectl-target.fish`),
		ValidArgs: names,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("expected one shell, one of %s\nSee '%s -h' for help and examples", strings.Join(names, ", "), cmd.CommandPath())
			}
			if shells[args[0]] == nil {
				return fmt.Errorf("unsupported shell type %q: expected one of %s", args[0], strings.Join(names, ", "))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return shells[args[0]](cmd.Root()) },
	}
}

// register adds the completion of a flag's value. It fails only for a flag that
// doesn't exist.
func register(cmd *cobra.Command, flag string, complete cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
		panic(err)
	}
}

func registerGlobalCompletions(root *cobra.Command, c *client) {
	register(root, "namespace", c.completeNamespaces)
	register(root, "context", c.completeConfig(func(config configNames) []string { return config.contexts }))
	register(root, "cluster", c.completeConfig(func(config configNames) []string { return config.clusters }))
	register(root, "user", c.completeConfig(func(config configNames) []string { return config.users }))
}

type configNames struct {
	contexts, clusters, users []string
}

// completeConfig completes names of the kubeconfig.
func (c *client) completeConfig(pick func(configNames) []string) cobra.CompletionFunc {
	return func(_ *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		raw, err := c.flags.ToRawKubeConfigLoader().RawConfig()
		if err != nil {
			return failedCompletion(err)
		}
		var names configNames
		for name := range raw.Contexts {
			names.contexts = append(names.contexts, name)
		}
		for name := range raw.Clusters {
			names.clusters = append(names.clusters, name)
		}
		for name := range raw.AuthInfos {
			names.users = append(names.users, name)
		}
		return candidates(pick(names), toComplete), cobra.ShellCompDirectiveNoFileComp
	}
}

func failedCompletion(err error) ([]string, cobra.ShellCompDirective) {
	cobra.CompDebugln(err.Error(), false)
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// candidates returns the names that begin with what was typed, sorted, each
// once.
func candidates(names []string, toComplete string) []string {
	var matching []string
	for _, name := range names {
		if strings.HasPrefix(name, toComplete) {
			matching = append(matching, name)
		}
	}
	slices.Sort(matching)
	return slices.Compact(matching)
}

// completeNamespaces completes the cluster's namespaces, and those that have
// targets: a standalone server keeps no Namespace objects.
func (c *client) completeNamespaces(cmd *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	conn, err := c.connect()
	if err != nil {
		return failedCompletion(err)
	}
	var names []string
	if client, err := metadata.NewForConfig(conn.config); err == nil {
		list, err := client.Resource(schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}).List(ctx, metav1.ListOptions{Limit: completionLimit})
		if err != nil {
			cobra.CompDebugln(err.Error(), false)
		} else {
			for i := range list.Items {
				names = append(names, list.Items[i].Name)
			}
		}
	}
	if len(names) == 0 {
		list, err := conn.clientset.StreamingV1().Targets(metav1.NamespaceAll).List(ctx, metav1.ListOptions{Limit: completionLimit})
		if err != nil {
			return failedCompletion(err)
		}
		for i := range list.Items {
			names = append(names, list.Items[i].Namespace)
		}
	}
	return candidates(names, toComplete), cobra.ShellCompDirectiveNoFileComp
}

// completeTargets completes the first arguments, so many, as TARGET,
// TARGET/INSTANCE or target/NAME.
func (c *client) completeTargets(arguments int) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if len(args) >= arguments {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return c.completeRef(cmd.Context(), toComplete)
	}
}

func (c *client) completeRef(ctx context.Context, toComplete string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(ctx, completionTimeout)
	defer cancel()
	conn, err := c.connect()
	if err != nil {
		return failedCompletion(err)
	}
	prefix, rest := "", toComplete
	if kind, after, ok := strings.Cut(toComplete, "/"); ok && targetTypes[strings.ToLower(kind)] {
		prefix, rest = kind+"/", after
	}
	if name, _, ok := strings.Cut(rest, "/"); ok && name != "" {
		target, err := conn.clientset.StreamingV1().Targets(conn.namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return failedCompletion(err)
		}
		var names []string
		for _, instance := range instanceNames(target) {
			names = append(names, prefix+name+"/"+instance)
		}
		return candidates(names, toComplete), cobra.ShellCompDirectiveNoFileComp
	}
	list, err := conn.clientset.StreamingV1().Targets(conn.namespace).List(ctx, metav1.ListOptions{Limit: completionLimit})
	if err != nil {
		return failedCompletion(err)
	}
	var names []string
	for i := range list.Items {
		names = append(names, prefix+list.Items[i].Name)
	}
	return candidates(names, toComplete), cobra.ShellCompDirectiveNoFileComp
}

// instanceNames returns the instances that a target has, or is to have.
func instanceNames(target *v1.Target) []string {
	names := target.InstanceNames()
	for _, instance := range target.Status.Instances {
		names = append(names, instance.Name)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// completedTarget fetches the target that the first argument names.
func (c *client) completedTarget(ctx context.Context, args []string) (*v1.Target, error) {
	if len(args) == 0 {
		return nil, fmt.Errorf("no target has been named yet")
	}
	r, err := parseRef(args[0], "")
	if err != nil {
		return nil, err
	}
	conn, err := c.connect()
	if err != nil {
		return nil, err
	}
	return conn.clientset.StreamingV1().Targets(conn.namespace).Get(ctx, r.target, metav1.GetOptions{})
}

// completeClasses completes the name of a TargetClass.
func (c *client) completeClasses(cmd *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	conn, err := c.connect()
	if err != nil {
		return failedCompletion(err)
	}
	list, err := conn.clientset.StreamingV1().TargetClasses().List(ctx, metav1.ListOptions{Limit: completionLimit})
	if err != nil {
		return failedCompletion(err)
	}
	var names []string
	for i := range list.Items {
		names = append(names, list.Items[i].Name)
	}
	return candidates(names, toComplete), cobra.ShellCompDirectiveNoFileComp
}

// completeAgents completes the name of an agent: one that has targets.
func (c *client) completeAgents(cmd *cobra.Command, _ []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	conn, err := c.connect()
	if err != nil {
		return failedCompletion(err)
	}
	list, err := conn.clientset.StreamingV1().Targets(conn.namespace).List(ctx, metav1.ListOptions{Limit: completionLimit})
	if err != nil {
		return failedCompletion(err)
	}
	var names []string
	for i := range list.Items {
		if agent := list.Items[i].Spec.AgentName; agent != "" {
			names = append(names, agent)
		}
	}
	return candidates(names, toComplete), cobra.ShellCompDirectiveNoFileComp
}

// completeInstances completes the value of --instance.
func (c *client) completeInstances(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	target, err := c.completedTarget(ctx, args)
	if err != nil {
		return failedCompletion(err)
	}
	return candidates(instanceNames(target), toComplete), cobra.ShellCompDirectiveNoFileComp
}
