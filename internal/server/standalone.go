package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/request/anonymous"
	authenticationunion "k8s.io/apiserver/pkg/authentication/request/union"
	"k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	"k8s.io/apiserver/pkg/authorization/path"
	authorizationunion "k8s.io/apiserver/pkg/authorization/union"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/rest"
	"k8s.io/component-base/metrics/legacyregistry"

	"aaserver.io/aaserver/apis/generated/clientset/versioned"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission"
	"aaserver.io/aaserver/internal/pki"
	"aaserver.io/aaserver/internal/storage"
	"aaserver.io/aaserver/registry/event"
	"aaserver.io/aaserver/registry/target"
)

// LocalAgent is the name of the agent that a standalone server embeds.
const LocalAgent = "local"

// minEventTTL is the shortest time that etcd lets a lease live for.
const minEventTTL = 2 * time.Second

// healthPaths answer everybody, so that a supervisor can probe them.
var healthPaths = []string{"/healthz", "/livez", "/readyz"}

// StandaloneOptions is how a server without a cluster is run.
type StandaloneOptions struct {
	// DataDir holds everything that the server keeps. One server uses it at a
	// time.
	DataDir string
	// StorageEndpoint is the SQL database to store objects in, as kine names
	// it; SQLite in DataDir if empty and no etcd is given.
	StorageEndpoint string
	// Hostnames are further names and addresses that the serving certificate
	// is for.
	Hostnames []string
	// EventTTL is how long an Event is kept after it was last written, in whole
	// seconds.
	EventTTL time.Duration
	// StreamOptions bounds streams and processes.
	StreamOptions
	// Profiling serves profiles of the server at /debug/pprof.
	Profiling bool
	// Demo creates the demo's targets.
	Demo bool

	Etcd          *genericoptions.EtcdOptions
	SecureServing *genericoptions.SecureServingOptionsWithLoopback
	Audit         *genericoptions.AuditOptions

	// Ready, if set, is called once the server answers.
	Ready func(ReadyInfo)
}

// ReadyInfo says how to reach a server.
type ReadyInfo struct {
	// URL is the server's address.
	URL string
	// Kubeconfig is the path of the administrator's kubeconfig.
	Kubeconfig string
}

// NewStandaloneOptions returns the defaults.
func NewStandaloneOptions() *StandaloneOptions {
	serving := genericoptions.NewSecureServingOptions()
	serving.BindAddress = net.IPv4(127, 0, 0, 1)
	serving.BindPort = 7443
	return &StandaloneOptions{
		EventTTL:      event.DefaultTTL,
		StreamOptions: newStreamOptions(),
		Etcd:          newEtcdOptions(),
		SecureServing: serving.WithLoopback(),
		Audit:         genericoptions.NewAuditOptions(),
	}
}

// AddFlags adds the flags to a set.
func (o *StandaloneOptions) AddFlags(flags *pflag.FlagSet) {
	flags.StringVar(&o.DataDir, "data-dir", o.DataDir, "The directory that holds all that the server keeps: database, certificates, kubeconfig, logs. Made if it doesn't exist.")
	flags.StringVar(&o.StorageEndpoint, "storage-endpoint", o.StorageEndpoint, "The SQL database to store objects in: sqlite:///path or postgres://user:password@host/database. SQLite in the data directory if neither this nor --etcd-servers is given.")
	flags.IPVar(&o.SecureServing.BindAddress, "bind-address", o.SecureServing.BindAddress, "The address to serve on. Clients need the administrator's certificate, wherever they are.")
	flags.IntVar(&o.SecureServing.BindPort, "secure-port", o.SecureServing.BindPort, "The port to serve HTTPS on; 0 for any free one.")
	flags.StringSliceVar(&o.Hostnames, "hostname", o.Hostnames, "A further name or address that the serving certificate is for. May be given several times.")
	flags.DurationVar(&o.EventTTL, "event-ttl", o.EventTTL, "How long an Event is kept after it was last written.")
	o.StreamOptions.addFlags(flags)
	flags.BoolVar(&o.Profiling, "profiling", o.Profiling, "Serve profiles of the server to its administrator, at /debug/pprof/.")
	flags.BoolVar(&o.Demo, "demo", o.Demo, "Create the targets web, ticker and shell in the namespace default, to try things on.")
	o.Etcd.AddFlags(flags)
	// There is no garbage collector without a cluster.
	flags.MarkHidden("enable-garbage-collector")
	o.Audit.AddFlags(flags)
}

// Validate says what is wrong with the options.
func (o *StandaloneOptions) Validate() error {
	var errs []error
	if o.DataDir == "" {
		errs = append(errs, errors.New("--data-dir is needed: it says where the server keeps its database, certificates and logs"))
	}
	if o.StorageEndpoint != "" && o.etcd() {
		errs = append(errs, errors.New("--storage-endpoint and --etcd-servers exclude each other: objects are stored in one place"))
	}
	if o.StorageEndpoint != "" {
		if err := storage.ValidateEndpoint(o.StorageEndpoint); err != nil {
			errs = append(errs, fmt.Errorf("--storage-endpoint: %w", err))
		}
	}
	if o.SecureServing.BindPort < 0 || o.SecureServing.BindPort > 65535 {
		errs = append(errs, fmt.Errorf("--secure-port %d must be between 0 and 65535", o.SecureServing.BindPort))
	}
	if o.EventTTL < minEventTTL {
		errs = append(errs, fmt.Errorf("--event-ttl %s must be at least %s", o.EventTTL, minEventTTL))
	}
	errs = append(errs, o.StreamOptions.validate()...)
	errs = append(errs, validateEtcd(o.Etcd)...)
	errs = append(errs, o.Audit.Validate()...)
	return utilerrors.NewAggregate(errs)
}

func (o *StandaloneOptions) etcd() bool {
	return len(o.Etcd.StorageConfig.Transport.ServerList) > 0
}

// Run runs a server until ctx ends or something of it fails. When it returns,
// no process of any target is left.
//
// What is started first ends last: data directory, storage, process host,
// agent, API server.
func (o *StandaloneOptions) Run(ctx context.Context) (err error) {
	dir, err := filepath.Abs(o.DataDir)
	if err != nil {
		return err
	}
	unlock, err := openDataDir(dir)
	if err != nil {
		return err
	}
	defer unlock()

	group, ctx := errgroup.WithContext(ctx)
	etcd := *o.Etcd
	// What is deleted with its dependents, or without them, would wait for a
	// garbage collector for ever.
	etcd.EnableGarbageCollection = false
	if !o.etcd() {
		backend, err := o.startStorage(ctx, group, dir)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, backend.Close()) }()
		etcd.StorageConfig.Transport.ServerList = []string{backend.Endpoint()}
	}
	listener, err := o.listen()
	if err != nil {
		return err
	}
	defer listener.Close()
	certificates, info, err := o.ensureCertificates(dir, listener.Addr().(*net.TCPAddr))
	if err != nil {
		return err
	}

	config, err := o.config(dir, &etcd, listener, certificates)
	if err != nil {
		return err
	}
	local, err := newEmbeddedAgent(LocalAgent, filepath.Join(dir, "logs"), o.StreamOptions, config.Generic)
	if err != nil {
		return err
	}
	config.Extra.Target.Drivers = local.driver
	server, err := config.Complete().New()
	switch {
	case o.etcd() && errors.Is(err, context.DeadlineExceeded):
		return explainEtcd(o.Etcd, err)
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
	group.Go(func() error { return failed("the agent", local.run(ctx, runOptions{served: served})) })
	group.Go(func() error {
		certificates.Run(ctx)
		return nil
	})
	group.Go(func() error {
		if err := createDefaultClass(ctx, config.Generic.LoopbackClientConfig); err != nil {
			if ctx.Err() != nil {
				return nil // it is being shut down
			}
			return failed("the API server", explainEncrypted(err))
		}
		if waitReady(ctx, config.Generic.LoopbackClientConfig) != nil {
			return nil // it is being shut down
		}
		if o.Demo {
			if err := createDemo(ctx, config.Generic.LoopbackClientConfig); err != nil {
				return failed("creating the demo's targets", err)
			}
		}
		if o.Ready != nil {
			o.Ready(info)
		}
		return nil
	})
	return group.Wait()
}

// startStorage starts the SQL database: the one that was asked for, or SQLite
// in the data directory.
func (o *StandaloneOptions) startStorage(ctx context.Context, group *errgroup.Group, dir string) (*storage.Backend, error) {
	endpoint := o.StorageEndpoint
	if endpoint == "" {
		database := filepath.Join(dir, "db")
		if err := os.MkdirAll(database, 0o700); err != nil {
			return nil, fmt.Errorf("the database's directory can't be made: %w", err)
		}
		file := filepath.Join(database, "state.db")
		if err := checkNotLost(file, filepath.Join(dir, "logs")); err != nil {
			return nil, err
		}
		var err error
		if endpoint, err = storage.SQLiteEndpoint(file); err != nil {
			return nil, err
		}
	}
	return startStorage(ctx, group, storage.Options{
		Endpoint:  endpoint,
		SocketDir: filepath.Join(dir, "run"),
		Metrics:   legacyregistry.Registerer(),
	})
}

// checkNotLost refuses to begin with an empty database where there was another:
// the logs of targets are kept by what it knew.
func checkNotLost(file, logs string) error {
	if info, err := os.Stat(file); err == nil && info.Size() > 0 {
		return nil
	}
	targets, err := os.ReadDir(logs)
	if err != nil || len(targets) == 0 {
		return nil // a new directory
	}
	return fmt.Errorf("the database %s is missing or empty, but %s holds logs of targets that it knew: restore it, or remove %s to begin anew", file, logs, logs)
}

// listen opens the port before anything is written for it.
func (o *StandaloneOptions) listen() (net.Listener, error) {
	address := net.JoinHostPort(o.SecureServing.BindAddress.String(), strconv.Itoa(o.SecureServing.BindPort))
	listener, err := net.Listen("tcp", address)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, portInUse(o.SecureServing.BindPort, o.SecureServing.BindAddress)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return nil, fmt.Errorf("%s is no address of this machine: choose another with --bind-address", o.SecureServing.BindAddress)
	case err != nil:
		return nil, fmt.Errorf("can't listen on %s: %w", address, err)
	}
	return listener, nil
}

// ensureCertificates makes or renews certificates and kubeconfig for a server
// that listens on address.
func (o *StandaloneOptions) ensureCertificates(dir string, address *net.TCPAddr) (*pki.Files, ReadyInfo, error) {
	reach := address.IP
	hosts := o.Hostnames
	if reach.IsUnspecified() {
		reach = net.IPv4(127, 0, 0, 1)
	} else {
		hosts = append([]string{reach.String()}, hosts...)
	}
	info := ReadyInfo{
		URL:        "https://" + net.JoinHostPort(reach.String(), strconv.Itoa(address.Port)),
		Kubeconfig: filepath.Join(dir, "kubeconfig"),
	}
	files, err := pki.Ensure(filepath.Join(dir, "pki"), pki.Options{Hosts: hosts})
	if err != nil {
		return nil, ReadyInfo{}, err
	}
	if err := files.WriteKubeconfig(info.Kubeconfig, info.URL); err != nil {
		return nil, ReadyInfo{}, err
	}
	return files, info, nil
}

// config assembles the API server's configuration. dir is the data directory.
func (o *StandaloneOptions) config(dir string, etcd *genericoptions.EtcdOptions, listener net.Listener, certificates *pki.Files) (*Config, error) {
	config := NewConfig()
	generic := &config.Generic.Config

	serving := o.SecureServing
	serving.Listener = listener
	serving.ServerCert.CertKey = genericoptions.CertKey{CertFile: certificates.Serving, KeyFile: certificates.Serving}
	if err := serving.ApplyToConfig(generic); err != nil {
		return nil, err
	}
	if err := setStorageCodec(etcd); err != nil {
		return nil, err
	}
	if err := etcd.ApplyTo(generic); err != nil {
		return nil, explainEncryption(etcd, err)
	}
	if err := o.Audit.ApplyTo(generic); err != nil {
		return nil, err
	}

	ca, err := dynamiccertificates.NewDynamicCAContentFromFile("client-ca", certificates.CACert)
	if err != nil {
		return nil, err
	}
	if err := generic.Authentication.ApplyClientCert(ca, generic.SecureServing); err != nil {
		return nil, err
	}
	var anyone []apiserver.AnonymousAuthCondition
	for _, path := range healthPaths {
		anyone = append(anyone, apiserver.AnonymousAuthCondition{Path: path})
	}
	generic.Authentication.Authenticator = authenticationunion.New(
		x509.NewDynamic(ca.VerifyOptions, x509.CommonNameUserConversion),
		anonymous.NewAuthenticator(anyone),
	)
	health, err := path.NewAuthorizer(healthPaths)
	if err != nil {
		return nil, err
	}
	generic.Authorization.Authorizer, err = authorizationunion.New(
		authorizationunion.NamedAuthorizer{AuthorizerName: "Administrators", Authorizer: authorizerfactory.NewPrivilegedGroups(user.SystemPrivilegedGroup)},
		authorizationunion.NamedAuthorizer{AuthorizerName: "Health", Authorizer: health},
	)
	if err != nil {
		return nil, err
	}
	// There are no flow schemas without a cluster; the limits of requests in
	// flight stand.
	generic.FlowControl = nil
	generic.EnableProfiling = o.Profiling
	// Without it, http.Server waits for every watch, the agent's own among
	// them, until its time is up.
	generic.ShutdownWatchTerminationGracePeriod = o.DrainTimeout

	stores, err := NewStores(generic.RESTOptionsGetter, target.StoreOptions{
		DefaultAgent: LocalAgent,
		Sources:      sets.New(v1.SourceProcess),
		Agents:       sets.New(LocalAgent),
	})
	if err != nil {
		return nil, err
	}
	events, err := newServerRecorder(config.Generic)
	if err != nil {
		return nil, err
	}
	generic.AdmissionControl, err = admission.NewChain(generic.Authorization.Authorizer, admission.Options{
		Recorder: events,
		Classes:  stores.Classes,
		Targets:  stores.Targets,
		Services: noServices,
	})
	if err != nil {
		return nil, err
	}

	config.Extra = ExtraConfig{
		Stores:       stores,
		Recorder:     events,
		Standalone:   true,
		EventTTL:     o.EventTTL,
		DrainTimeout: o.DrainTimeout,
		Target: target.Options{
			Limits:        o.Limits,
			Secrets:       secretFiles(filepath.Join(dir, "secrets")).get,
			Dial:          (&net.Dialer{}).DialContext,
			ServiceRanges: noServices,
			Sessions:      o.sessions(),
			Streaming:     o.streaming(nil),
		},
	}
	return config, nil
}

// noServices are the service ranges where there is no cluster.
func noServices() ([]netip.Prefix, error) { return nil, nil }

// createDefaultClass makes a class that allows everything, if there is none at
// all: whoever may write targets here is the administrator. What he makes of it
// stays.
func createDefaultClass(ctx context.Context, config *rest.Config) error {
	client, err := versioned.NewForConfig(config)
	if err != nil {
		return err
	}
	classes := client.StreamingV1().TargetClasses()
	list, err := classes.List(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return fmt.Errorf("looking for classes: %w", err)
	}
	if len(list.Items) > 0 {
		return nil
	}
	_, err = classes.Create(ctx, &v1.TargetClass{
		ObjectMeta: metav1.ObjectMeta{
			Name:        "default",
			Annotations: map[string]string{v1.AnnotationDefaultClass: "true"},
		},
		Spec: v1.TargetClassSpec{
			Sources:   []string{v1.SourceProcess, v1.SourceContainer, v1.SourceSSH, v1.SourceTCP},
			Agents:    []string{v1.ClassWildcard},
			Users:     []string{v1.ClassWildcard, "root"},
			AgentUser: true,
			Addresses: v1.AddressPolicy{Allow: []string{
				"0.0.0.0/0", "::/0", // and, since these alone don't open them:
				"127.0.0.0/8", "::1/128", "169.254.0.0/16", "fe80::/10",
			}},
			Ports: v1.PortPolicy{
				Unlisted:    true,
				UnixSockets: []string{"/"},
				Reverse:     []v1.PortRange{{Port: 1, EndPort: 65535}},
			},
		},
	}, metav1.CreateOptions{FieldManager: "aaserver"})
	if err != nil {
		return fmt.Errorf("creating the default class: %w", err)
	}
	return nil
}

// waitReady returns once the server says that it is ready, or with an error
// when ctx ends.
func waitReady(ctx context.Context, config *rest.Config) error {
	config = rest.CopyConfig(config)
	config.NegotiatedSerializer = Codecs.WithoutConversion()
	config.GroupVersion = &v1.SchemeGroupVersion
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return err
	}
	return wait.PollUntilContextCancel(ctx, 50*time.Millisecond, true, func(ctx context.Context) (bool, error) {
		return client.Get().AbsPath("/readyz").Do(ctx).Error() == nil, nil
	})
}
