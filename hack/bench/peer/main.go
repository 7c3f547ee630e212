// Command sample-apiserver is k8s.io/sample-apiserver of this module's go.mod,
// with its flags, options, admission and storage, serving the version v1alpha1
// alone. The original serves flunders in two versions and makes a storage for
// each, so that it keeps two watch caches of the same objects: it would be
// charged twice for every write and for memory.
package main

import (
	"os"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/component-base/cli"
	"k8s.io/sample-apiserver/pkg/apis/wardle"
	"k8s.io/sample-apiserver/pkg/apis/wardle/v1alpha1"
	"k8s.io/sample-apiserver/pkg/apiserver"
	"k8s.io/sample-apiserver/pkg/cmd/server"
	"k8s.io/sample-apiserver/pkg/registry/wardle/fischer"
	"k8s.io/sample-apiserver/pkg/registry/wardle/flunder"
)

func main() {
	options := server.NewWardleServerOptions(os.Stdout, os.Stderr)
	cmd := server.NewCommandStartWardleServer(genericapiserver.SetupSignalContext(), options, false)
	cmd.RunE = func(cmd *cobra.Command, args []string) error { return run(cmd, args, options) }
	os.Exit(cli.Run(cmd))
}

func run(cmd *cobra.Command, args []string, options *server.WardleServerOptions) error {
	if err := options.Complete(); err != nil {
		return err
	}
	if err := options.Validate(args); err != nil {
		return err
	}
	config, err := options.Config()
	if err != nil {
		return err
	}
	generic, err := config.GenericConfig.Complete().New("sample-apiserver", genericapiserver.NewEmptyDelegate())
	if err != nil {
		return err
	}
	flunders, err := flunder.NewREST(apiserver.Scheme, config.GenericConfig.RESTOptionsGetter)
	if err != nil {
		return err
	}
	fischers, err := fischer.NewREST(apiserver.Scheme, config.GenericConfig.RESTOptionsGetter)
	if err != nil {
		return err
	}
	group := genericapiserver.NewDefaultAPIGroupInfo(wardle.GroupName, apiserver.Scheme, metav1.ParameterCodec, apiserver.Codecs)
	group.VersionedResourcesStorageMap[v1alpha1.SchemeGroupVersion.Version] = map[string]rest.Storage{
		"flunders": flunders,
		"fischers": fischers,
	}
	if err := generic.InstallAPIGroup(&group); err != nil {
		return err
	}
	err = generic.AddPostStartHook("start-sample-server-informers", func(hook genericapiserver.PostStartHookContext) error {
		config.GenericConfig.SharedInformerFactory.Start(hook.Done())
		options.SharedInformerFactory.Start(hook.Done())
		return nil
	})
	if err != nil {
		return err
	}
	return generic.PrepareRun().RunWithContext(cmd.Context())
}
