// Package server is the API server: options become a config, a completed
// config becomes a server, and a server is run. Each step is a type of its own,
// so that what isn't ready can't be used.
//
//	StandaloneOptions ─ Run ─┬─ Config ─ Complete ─ New ─ PrepareRun ─ RunWithContext
//	                         └─ storage, certificates, embedded agent
package server

import (
	"context"
	"fmt"
	"maps"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	"k8s.io/apiserver/pkg/registry/generic"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/kube-openapi/pkg/common"

	"aaserver.io/aaserver/apis/generated/openapi"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/v1alpha1"
	"aaserver.io/aaserver/internal/recorder"
	"aaserver.io/aaserver/internal/storage"
	"aaserver.io/aaserver/internal/version"
	"aaserver.io/aaserver/registry/access"
	"aaserver.io/aaserver/registry/event"
	"aaserver.io/aaserver/registry/target"
	"aaserver.io/aaserver/registry/targetclass"
)

// Config is what a server is made of.
type Config struct {
	Generic *genericapiserver.RecommendedConfig
	Extra   ExtraConfig
}

// ExtraConfig is what is ours beside the generic server's configuration.
type ExtraConfig struct {
	// Stores keep the objects.
	Stores *Stores
	// Target configures the resource targets. Its Classes and Recorder are
	// those given here; they needn't be set.
	Target target.Options
	// Standalone serves what is otherwise the main API server's and clients rely
	// on: SelfSubjectAccessReview and Events.
	Standalone bool
	// EventTTL is how long an Event is kept after it was last written.
	EventTTL time.Duration
	// Recorder writes the server's Events. Whoever runs the server runs it.
	Recorder *recorder.Recorder
	// DrainTimeout bounds how long open sessions may take to end at shutdown.
	DrainTimeout time.Duration
}

// NewConfig returns a configuration that lacks what depends on how the server
// is run: serving, storage, authentication, authorization and drivers.
func NewConfig() *Config {
	generic := genericapiserver.NewRecommendedConfig(Codecs)
	namer := openapinamer.NewDefinitionNamer(Scheme)
	generic.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(openAPIDefinitions, namer)
	generic.OpenAPIConfig.Info.Title = "aaserver"
	generic.OpenAPIConfig.Info.Version = version.Get().Version
	generic.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(openAPIDefinitions, namer)
	generic.OpenAPIV3Config.Info.Title = "aaserver"
	generic.OpenAPIV3Config.Info.Version = version.Get().Version
	generic.EffectiveVersion = newEffectiveVersion()
	generic.LongRunningFunc = longRunning
	generic.BuildHandlerChainFunc = buildHandlerChain
	return &Config{Generic: generic}
}

func openAPIDefinitions(ref common.ReferenceCallback) map[string]common.OpenAPIDefinition {
	definitions := openapi.GetOpenAPIDefinitions(ref)
	maps.Copy(definitions, event.OpenAPIDefinitions(ref))
	return definitions
}

// Stores keep the objects of the group. They are made before the server, since
// admission reads them.
type Stores struct {
	Targets *target.Store
	Classes *targetclass.REST
}

// NewStores opens the stores.
func NewStores(optsGetter generic.RESTOptionsGetter, opts target.StoreOptions) (*Stores, error) {
	optsGetter = storage.SayTooLarge(optsGetter)
	targets, err := target.NewStore(Scheme, optsGetter, opts)
	if err != nil {
		return nil, fmt.Errorf("the storage of targets: %w", err)
	}
	classes, err := targetclass.NewStorage(Scheme, optsGetter)
	if err != nil {
		return nil, fmt.Errorf("the storage of classes: %w", err)
	}
	return &Stores{Targets: targets, Classes: classes}, nil
}

type completedConfig struct {
	generic genericapiserver.CompletedConfig
	extra   ExtraConfig
}

// CompletedConfig is a configuration that a server can be made of.
type CompletedConfig struct {
	*completedConfig
}

// Complete fills in what follows from the rest.
func (c *Config) Complete() CompletedConfig {
	completed := completedConfig{c.Generic.Complete(), c.Extra}
	completed.extra.Target.Classes = c.Extra.Stores.Classes
	completed.extra.Target.Recorder = c.Extra.Recorder
	return CompletedConfig{&completed}
}

// Server is a server that can be run.
type Server struct {
	Generic *genericapiserver.GenericAPIServer
}

// New makes the server, with every resource installed.
func (c completedConfig) New() (*Server, error) {
	server, err := c.generic.New("aaserver", genericapiserver.NewEmptyDelegate())
	if err != nil {
		return nil, err
	}
	targets := target.NewStorage(c.extra.Stores.Targets, c.extra.Target).Map()
	resources := maps.Clone(targets)
	resources["targetclasses"] = c.extra.Stores.Classes
	group := genericapiserver.NewDefaultAPIGroupInfo(v1.GroupName, Scheme, ParameterCodec, Codecs)
	group.VersionedResourcesStorageMap[v1.SchemeGroupVersion.Version] = resources
	group.VersionedResourcesStorageMap[v1alpha1.SchemeGroupVersion.Version] = targets
	if err := server.InstallAPIGroup(&group); err != nil {
		return nil, err
	}

	if c.extra.Standalone {
		group := genericapiserver.NewDefaultAPIGroupInfo(authorizationv1.GroupName, Scheme, ParameterCodec, Codecs)
		group.VersionedResourcesStorageMap[authorizationv1.SchemeGroupVersion.Version] = access.Storage(c.generic.Authorization.Authorizer)
		if err := server.InstallAPIGroup(&group); err != nil {
			return nil, err
		}
		events, err := event.Storage(Scheme, storage.SayTooLarge(c.generic.RESTOptionsGetter), c.extra.EventTTL)
		if err != nil {
			return nil, fmt.Errorf("the storage of events: %w", err)
		}
		core := genericapiserver.NewDefaultAPIGroupInfo(corev1.GroupName, Scheme, ParameterCodec, Codecs)
		core.VersionedResourcesStorageMap[corev1.SchemeGroupVersion.Version] = events
		if err := server.InstallLegacyAPIGroup(genericapiserver.DefaultLegacyAPIPrefix, &core); err != nil {
			return nil, err
		}
	}

	sessions := c.extra.Target.Sessions
	if err := sessions.Register(legacyregistry.Register); err != nil {
		return nil, err
	}
	// The generic server waits for its own requests, but knows nothing of
	// upgraded connections: they are ended and waited for here.
	err = server.AddPreShutdownHook("drain-sessions", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), c.extra.DrainTimeout)
		defer cancel()
		return sessions.Drain(ctx)
	})
	if err != nil {
		return nil, err
	}
	return &Server{Generic: server}, nil
}
