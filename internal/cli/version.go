package cli

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	apimachineryversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/kubectl/pkg/util/templates"
	"sigs.k8s.io/yaml"

	"aaserver.io/aaserver/internal/version"
)

// versions is what the version command prints.
type versions struct {
	Client version.Info              `json:"clientVersion"`
	Server *apimachineryversion.Info `json:"serverVersion,omitempty"`
}

func newVersionCommand(c *client) *cobra.Command {
	clientOnly := false
	output := ""
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the client and server version information",
		Long:  "Print the version of this plugin and of the API server of the current context.",
		Example: templates.Examples(`
			# Print the client and server versions for the current context
			kubectl target version`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "" && output != "yaml" && output != "json" {
				return errors.New(`--output must be 'yaml' or 'json'`)
			}
			v := versions{Client: version.Get()}
			var serverErr error
			if !clientOnly {
				v.Server, serverErr = c.serverVersion()
			}
			if err := printVersions(c, v, output); err != nil {
				return err
			}
			return serverErr
		},
	}
	cmd.Flags().BoolVar(&clientOnly, "client", false, "If true, shows client version only (no server required).")
	cmd.Flags().StringVarP(&output, "output", "o", "", "One of 'yaml' or 'json'.")
	register(cmd, "output", cobra.FixedCompletions([]string{"json", "yaml"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (c *client) serverVersion() (*apimachineryversion.Info, error) {
	config, err := c.flags.ToRESTConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	discoveryClient, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return nil, err
	}
	return discoveryClient.ServerVersion()
}

func printVersions(c *client, v versions, output string) error {
	switch output {
	case "json":
		encoded, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			return err
		}
		fmt.Fprintln(c.Out, string(encoded))
	case "yaml":
		encoded, err := yaml.Marshal(v)
		if err != nil {
			return err
		}
		fmt.Fprint(c.Out, string(encoded))
	default:
		fmt.Fprintf(c.Out, "Client Version: %s\n", v.Client.Version)
		if v.Server != nil {
			fmt.Fprintf(c.Out, "Server Version: %s\n", v.Server.GitVersion)
		}
	}
	return nil
}
