package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apiserver/pkg/admission"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/healthz"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/transport"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/component-base/metrics/legacyregistry"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	aaadmission "aaserver.io/aaserver/internal/admission"
	"aaserver.io/aaserver/internal/admission/classpolicy"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/recorder"
	"aaserver.io/aaserver/internal/storage"
	"aaserver.io/aaserver/registry/target"
)

// checkTimeout bounds each request that asks whether the main API can be used.
const checkTimeout = 5 * time.Second

// ServeOptions is how a server behind kube-aggregator is run.
type ServeOptions struct {
	// StorageEndpoint is the SQL database to store objects in, as kine names
	// it, in place of etcd.
	StorageEndpoint string
	// DataDir holds what a server with an embedded agent, or with SQLite,
	// keeps.
	DataDir string
	// EmbeddedAgent is the name of the agent that the server embeds; none if
	// empty.
	EmbeddedAgent string
	// LeaseNamespace is where the embedded agent's Lease is; where the server
	// itself runs if empty.
	LeaseNamespace string
	// ServiceRanges are the CIDRs of the cluster's services; those that the
	// main API tells if empty.
	ServiceRanges []string
	// AllowedOrigins are the origins that browsers may connect from, beside
	// the server's own.
	AllowedOrigins []string
	// StreamOptions bounds streams and processes.
	StreamOptions

	Recommended *genericoptions.RecommendedOptions
	ServerRun   *genericoptions.ServerRunOptions
}

// NewServeOptions returns the defaults.
func NewServeOptions() *ServeOptions {
	o := &ServeOptions{
		StreamOptions: newStreamOptions(),
		Recommended:   genericoptions.NewRecommendedOptions(etcdPrefix, nil),
		ServerRun:     genericoptions.NewServerRunOptions(),
	}
	o.Recommended.Etcd = newEtcdOptions()
	// Without a certificate given, one is made that nobody has to trust: kept
	// in memory, not in a directory relative to wherever the server was started.
	o.Recommended.SecureServing.ServerCert.CertDirectory = ""
	o.ServerRun.ShutdownWatchTerminationGracePeriod = o.DrainTimeout
	aaadmission.Register(o.Recommended.Admission.Plugins)
	o.Recommended.Admission.RecommendedPluginOrder = aaadmission.Order(o.Recommended.Admission.RecommendedPluginOrder)
	o.Recommended.ExtraAdmissionInitializers = func(*genericapiserver.RecommendedConfig) ([]admission.PluginInitializer, error) {
		return []admission.PluginInitializer{aaadmission.NewInitializer(aaadmission.Options{})}, nil
	}
	return o
}

// AddFlags adds the flags to a set: ours, and all of the generic server's.
func (o *ServeOptions) AddFlags(flags *pflag.FlagSet) {
	flags.StringVar(&o.StorageEndpoint, "storage-endpoint", o.StorageEndpoint, "The SQL database to store objects in, in place of --etcd-servers: sqlite:///path or postgres://user:password@host/database.")
	flags.StringVar(&o.DataDir, "data-dir", o.DataDir, "The directory for what the server keeps beside its objects: the logs of an embedded agent's targets, the socket of an SQL storage.")
	flags.StringVar(&o.EmbeddedAgent, "embedded-agent", o.EmbeddedAgent, "Run an agent of this name in the server. Whoever may write targets that name it then runs commands as the server. Needs --data-dir.")
	flags.StringVar(&o.LeaseNamespace, "lease-namespace", o.LeaseNamespace, "The namespace of the embedded agent's Lease, by which one of several servers holds it. The namespace that the server runs in if not given.")
	flags.StringSliceVar(&o.ServiceRanges, "service-cluster-ip-range", o.ServiceRanges, "The CIDRs of the cluster's services, which targets may not have endpoints in unless their class says so. Read from the cluster's ServiceCIDRs if not given; clusters before Kubernetes 1.33 have none.")
	flags.StringSliceVar(&o.AllowedOrigins, "allowed-origins", o.AllowedOrigins, "The origins, as https://console.example.com, that browsers may connect to streams from. The server's own is always allowed.")
	o.StreamOptions.addFlags(flags)
	o.Recommended.AddFlags(flags)
	o.ServerRun.AddUniversalFlags(flags)
}

// Complete fills in what follows from the rest.
func (o *ServeOptions) Complete() error {
	// One kubeconfig is enough to say where the main API is.
	if kubeconfig := o.Recommended.CoreAPI.CoreAPIKubeconfigPath; kubeconfig != "" {
		if o.Recommended.Authentication.RemoteKubeConfigFile == "" {
			o.Recommended.Authentication.RemoteKubeConfigFile = kubeconfig
		}
		if o.Recommended.Authorization.RemoteKubeConfigFile == "" {
			o.Recommended.Authorization.RemoteKubeConfigFile = kubeconfig
		}
	}
	if o.EmbeddedAgent != "" && o.LeaseNamespace == "" {
		o.LeaseNamespace = ownNamespace(o.Recommended.CoreAPI.CoreAPIKubeconfigPath)
	}
	// First, since all else may ask for feature gates.
	if err := o.ServerRun.ComponentGlobalsRegistry.Set(); err != nil {
		return err
	}
	return o.ServerRun.Complete()
}

// ownNamespace is the namespace of the pod that the server runs in, or of the
// kubeconfig's context.
func ownNamespace(kubeconfig string) string {
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(
		&clientcmd.ClientConfigLoadingRules{ExplicitPath: kubeconfig}, &clientcmd.ConfigOverrides{})
	namespace, _, err := loader.Namespace()
	if err != nil {
		return metav1.NamespaceDefault // that it can't be read is said when it is used
	}
	return namespace
}

// Validate says what is wrong with the options.
func (o *ServeOptions) Validate() error {
	var errs []error
	switch {
	case o.StorageEndpoint != "" && o.etcd():
		errs = append(errs, errors.New("--storage-endpoint and --etcd-servers exclude each other: objects are stored in one place"))
	case o.StorageEndpoint != "":
		if err := storage.ValidateEndpoint(o.StorageEndpoint); err != nil {
			errs = append(errs, fmt.Errorf("--storage-endpoint: %w", err))
		}
	case !o.etcd():
		errs = append(errs, errors.New("--etcd-servers or --storage-endpoint is needed: it says where objects are stored"))
	}
	errs = append(errs, validateEtcd(o.Recommended.Etcd)...)
	if o.EmbeddedAgent != "" {
		if o.DataDir == "" {
			errs = append(errs, errors.New("--embedded-agent needs --data-dir: it says where the logs of its targets are kept"))
		}
		for _, message := range validation.IsDNS1123Subdomain(o.EmbeddedAgent) {
			errs = append(errs, fmt.Errorf("--embedded-agent %q: %s", o.EmbeddedAgent, message))
		}
	}
	pair := o.Recommended.SecureServing.ServerCert.CertKey
	if (pair.CertFile == "") != (pair.KeyFile == "") {
		errs = append(errs, errors.New("--tls-cert-file and --tls-private-key-file need each other: give both, or neither"))
	}
	if o.Recommended.SecureServing.BindPort == 0 {
		errs = append(errs, errors.New("--secure-port 0: a port is needed, kube-apiserver reaches the server by it"))
	}
	if _, err := parsePrefixes(o.ServiceRanges); err != nil {
		errs = append(errs, fmt.Errorf("--service-cluster-ip-range: %w", err))
	}
	errs = append(errs, o.StreamOptions.validate()...)
	etcd := o.Recommended.Etcd
	o.Recommended.Etcd = nil // validated above: it demands servers
	errs = append(errs, o.Recommended.Validate()...)
	o.Recommended.Etcd = etcd
	errs = append(errs, o.ServerRun.Validate()...)
	errs = append(errs, o.ServerRun.ComponentGlobalsRegistry.Validate()...)
	return utilerrors.NewAggregate(errs)
}

func (o *ServeOptions) etcd() bool {
	return len(o.Recommended.Etcd.StorageConfig.Transport.ServerList) > 0
}

// Run runs a server until ctx ends or something of it fails.
func (o *ServeOptions) Run(ctx context.Context) (err error) {
	if err := o.checkMainAPI(ctx); err != nil {
		return err
	}
	if err := o.checkEtcd(ctx); err != nil {
		return err
	}
	if o.DataDir != "" {
		unlock, err := openDataDir(o.DataDir)
		if err != nil {
			return err
		}
		defer unlock()
	}

	group, ctx := errgroup.WithContext(ctx)
	if !o.etcd() {
		opts := storage.Options{Endpoint: o.StorageEndpoint, Metrics: legacyregistry.Registerer()}
		if o.DataDir != "" {
			opts.SocketDir = filepath.Join(o.DataDir, "run")
		}
		backend, err := startStorage(ctx, group, opts)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, backend.Close()) }()
		o.Recommended.Etcd.StorageConfig.Transport.ServerList = []string{backend.Endpoint()}
	}

	config, err := o.config()
	if err != nil {
		return err
	}
	var embedded *embeddedAgent
	if o.EmbeddedAgent != "" {
		if embedded, err = newEmbeddedAgent(o.EmbeddedAgent, filepath.Join(o.DataDir, "logs"), o.StreamOptions, config.Generic); err != nil {
			return err
		}
		config.Extra.Target.Drivers = embedded.driver
	}
	server, err := config.Complete().New()
	switch {
	case o.StorageEndpoint == "" && errors.Is(err, context.DeadlineExceeded):
		return explainEtcd(o.Recommended.Etcd, err)
	case err != nil:
		return err
	}
	group.Go(func() error {
		config.Extra.Recorder.Run(ctx)
		return nil
	})
	served := make(chan struct{})
	group.Go(func() error {
		defer close(served)
		return failed("the API server", server.Generic.PrepareRun().RunWithContext(ctx))
	})
	if embedded != nil {
		main, err := kubernetes.NewForConfig(config.Generic.ClientConfig)
		if err != nil {
			return err
		}
		group.Go(func() error {
			return failed("the embedded agent", embedded.runLeased(ctx, served, main, o.LeaseNamespace))
		})
	}
	return group.Wait()
}

// config assembles the API server's configuration.
func (o *ServeOptions) config() (*Config, error) {
	config := NewConfig()
	generic := &config.Generic.Config
	serving := o.Recommended.SecureServing
	if err := serving.MaybeDefaultWithSelfSignedCerts("localhost", nil, []net.IP{net.IPv4(127, 0, 0, 1)}); err != nil {
		return nil, fmt.Errorf("making a self-signed certificate: %w", err)
	}
	if err := o.ServerRun.ApplyTo(generic); err != nil {
		return nil, err
	}
	generic.EffectiveVersion = effectiveVersion{o.ServerRun.ComponentGlobalsRegistry.EffectiveVersionFor(basecompatibility.DefaultKubeComponent)}
	o.Recommended.FeatureGate = utilfeature.DefaultFeatureGate
	if err := setStorageCodec(o.Recommended.Etcd); err != nil {
		return nil, err
	}
	var stores *Stores
	var events *recorder.Recorder
	var services func() ([]netip.Prefix, error)
	o.Recommended.ExtraAdmissionInitializers = func(generic *genericapiserver.RecommendedConfig) (_ []admission.PluginInitializer, err error) {
		services = o.serviceRanges(generic.SharedInformerFactory)
		if stores, err = NewStores(generic.RESTOptionsGetter, target.StoreOptions{Sources: sets.New(v1.SourceProcess)}); err != nil {
			return nil, err
		}
		if events, err = newServerRecorder(generic); err != nil {
			return nil, err
		}
		return []admission.PluginInitializer{aaadmission.NewInitializer(aaadmission.Options{
			Recorder: events,
			Classes:  stores.Classes,
			Targets:  stores.Targets,
			Services: services,
		})}, nil
	}
	port := serving.BindPort // it is forgotten when it can't be bound
	if err := o.Recommended.ApplyTo(config.Generic); err != nil {
		return nil, explainEncryption(o.Recommended.Etcd, o.explain(err, port))
	}
	main, err := kubernetes.NewForConfig(config.Generic.ClientConfig)
	if err != nil {
		return nil, err
	}
	generic.AddReadyzChecks(healthz.NamedCheck("main-api", func(r *http.Request) error {
		ctx, cancel := context.WithTimeout(r.Context(), checkTimeout)
		defer cancel()
		return main.Discovery().RESTClient().Get().AbsPath("/version").Do(ctx).Error()
	}))

	config.Extra = ExtraConfig{
		Stores:       stores,
		Recorder:     events,
		DrainTimeout: o.DrainTimeout,
		Target: target.Options{
			Drivers:       noDrivers,
			Unjudged:      slices.Contains(o.Recommended.Admission.DisablePlugins, classpolicy.PluginName),
			Limits:        o.Limits,
			Secrets:       mainSecrets(main),
			Dial:          (&net.Dialer{}).DialContext,
			ServiceRanges: services,
			Sessions:      o.sessions(),
			Streaming:     o.streaming(o.AllowedOrigins),
		},
	}
	return config, nil
}

// serviceRanges finds the ranges of the cluster's services: those that were
// given, or else those that the main API knows at the time.
func (o *ServeOptions) serviceRanges(main informers.SharedInformerFactory) func() ([]netip.Prefix, error) {
	if len(o.ServiceRanges) > 0 {
		return func() ([]netip.Prefix, error) { return parsePrefixes(o.ServiceRanges) }
	}
	known := main.Networking().V1().ServiceCIDRs()
	synced := known.Informer().HasSynced
	return func() ([]netip.Prefix, error) {
		if !synced() {
			return nil, errors.New("the cluster's ServiceCIDRs haven't been read yet; --service-cluster-ip-range names them to a server that can't read them")
		}
		list, err := known.Lister().List(labels.Everything())
		if err != nil {
			return nil, err
		}
		var ranges []string
		for _, cidr := range list {
			ranges = append(ranges, cidr.Spec.CIDRs...)
		}
		return parsePrefixes(ranges)
	}
}

func parsePrefixes(cidrs []string) ([]netip.Prefix, error) {
	var prefixes []netip.Prefix
	for _, cidr := range cidrs {
		prefix, err := netip.ParsePrefix(cidr)
		if err != nil {
			return nil, err
		}
		prefixes = append(prefixes, prefix)
	}
	return prefixes, nil
}

// explain adds to an error of the generic server's options what to do about it.
func (o *ServeOptions) explain(err error, port int) error {
	pair := o.Recommended.SecureServing.ServerCert.CertKey
	switch path := (*fs.PathError)(nil); {
	case pair.CertFile != "" && strings.Contains(err.Error(), "tls:"):
		return fmt.Errorf("--tls-cert-file %s and --tls-private-key-file %s can't be used together: %w", pair.CertFile, pair.KeyFile, err)
	case errors.As(err, &path) && (path.Path == pair.CertFile || path.Path == pair.KeyFile):
		return fmt.Errorf("--tls-cert-file and --tls-private-key-file: %w", err)
	case strings.Contains(err.Error(), syscall.EADDRINUSE.Error()):
		return portInUse(port, o.Recommended.SecureServing.BindAddress)
	}
	return err
}

// checkMainAPI says in one line why the main API can't be used, before anything
// is started that would only wait for it.
func (o *ServeOptions) checkMainAPI(ctx context.Context) error {
	path := o.Recommended.CoreAPI.CoreAPIKubeconfigPath
	config, err := mainAPIConfig(path)
	if err != nil {
		return err
	}
	config.Timeout = checkTimeout
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return fmt.Errorf("the kubeconfig can't be used: %w", err)
	}
	if _, err := client.Discovery().ServerVersion(); err != nil {
		return fmt.Errorf("the main API server at %s can't be used, check --kubeconfig: %w", config.Host, err)
	}
	if o.Recommended.Authentication.SkipInClusterLookup {
		return nil
	}
	const configMap = "extension-apiserver-authentication"
	_, err = client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Get(ctx, configMap, metav1.GetOptions{})
	switch {
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		return fmt.Errorf("the server's own account may not read the ConfigMap %s/%s, which says whom to trust: bind it to the Role extension-apiserver-authentication-reader there: %w", metav1.NamespaceSystem, configMap, err)
	case err != nil:
		return fmt.Errorf("reading the ConfigMap %s/%s: %w", metav1.NamespaceSystem, configMap, err)
	}
	return nil
}

// checkEtcd says in one line why etcd can't be used, if none of its servers can.
// The storage would try for 20 seconds, and then say that the time is over.
func (o *ServeOptions) checkEtcd(ctx context.Context) error {
	etcd := o.Recommended.Etcd.StorageConfig.Transport
	if !o.etcd() || o.Recommended.EgressSelector.ConfigFile != "" {
		return nil // it isn't used, or not reached from here
	}
	tlsConfig, err := transport.TLSConfigFor(&transport.Config{TLS: transport.TLSConfig{
		CAFile: etcd.TrustedCAFile, CertFile: etcd.CertFile, KeyFile: etcd.KeyFile,
	}})
	if err != nil {
		return fmt.Errorf("--etcd-cafile, --etcd-certfile and --etcd-keyfile: %w", err)
	}
	client := http.Client{Transport: &http.Transport{TLSClientConfig: tlsConfig, DisableKeepAlives: true}, Timeout: checkTimeout}
	var errs []error
	for _, server := range etcd.ServerList {
		err := probeEtcd(ctx, &client, server)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return explainEtcd(o.Recommended.Etcd, utilerrors.NewAggregate(errs))
}

// probeEtcd fails if no connection can be made. What comes by it is left to the
// storage to judge: an answer to a plain HTTP request needn't be one of etcd.
func probeEtcd(ctx context.Context, client *http.Client, server string) error {
	if !strings.HasPrefix(server, "http://") && !strings.HasPrefix(server, "https://") {
		return nil // a unix socket, for example
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(server, "/")+"/version", nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err == nil {
		response.Body.Close()
		return nil
	}
	// An alert of TLS is a remote error. A server that speaks gRPC alone may
	// reset the connection: that isn't one.
	network, ok := errors.AsType[*net.OpError](err)
	_, certificate := errors.AsType[*tls.CertificateVerificationError](err)
	if certificate || ok && (network.Op == "dial" || network.Op == "remote error") {
		return errors.Unwrap(err) // without the URL, which is none of etcd's own
	}
	return nil
}

func explainEtcd(etcd *genericoptions.EtcdOptions, err error) error {
	return fmt.Errorf("etcd at %s can't be used, check --etcd-servers, --etcd-cafile, --etcd-certfile and --etcd-keyfile: %w", strings.Join(etcd.StorageConfig.Transport.ServerList, ","), err)
}

func mainAPIConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("--kubeconfig is needed outside a cluster: it says where the main API server is (%w)", err)
		}
		return config, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, fmt.Errorf("--kubeconfig %s: it names no server", kubeconfig)
	case err != nil:
		return nil, fmt.Errorf("--kubeconfig %s: %w", kubeconfig, err)
	}
	return config, nil
}

// noDrivers is a server that hosts nothing.
func noDrivers(target *v1.Target) (driver.Driver, error) {
	return nil, driver.Errorf(driver.Unavailable, "agent %q is not connected", target.Spec.AgentName)
}

// checkOrigin allows requests without an Origin, from the same host, and from
// the origins that are listed. Behind kube-aggregator the host is this server's
// own, never the one that the browser sees.
func checkOrigin(allowed []string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		origin := r.Header.Get("Origin")
		if origin == "" {
			return true
		}
		for _, a := range allowed {
			if strings.EqualFold(origin, a) {
				return true
			}
		}
		_, host, ok := strings.Cut(origin, "://")
		return ok && strings.EqualFold(host, r.Host)
	}
}
