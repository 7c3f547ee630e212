package server

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/spf13/pflag"
	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver/process"
	"aaserver.io/aaserver/internal/policy"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/internal/storage"
	"aaserver.io/aaserver/registry/target"
	"aaserver.io/aaserver/streaming"
)

// etcdPrefix is where everything is stored.
const etcdPrefix = "/registry/" + v1.GroupName

// newEtcdOptions returns the defaults of the storage: objects are stored as
// protobuf.
func newEtcdOptions() *genericoptions.EtcdOptions {
	etcd := genericoptions.NewEtcdOptions(storagebackend.NewDefaultConfig(etcdPrefix, nil))
	etcd.DefaultStorageMediaType = runtime.ContentTypeProtobuf
	return etcd
}

// setStorageCodec says that objects are stored in the version v1, whatever
// version they are written in, and as the media type that the options name.
// What was stored as another is read all the same.
func setStorageCodec(etcd *genericoptions.EtcdOptions) (err error) {
	config := &etcd.StorageConfig
	config.Codec, config.EncodeVersioner, err = serverstorage.NewStorageCodec(serverstorage.StorageCodecConfig{
		StorageMediaType:  etcd.DefaultStorageMediaType,
		StorageSerializer: Codecs,
		StorageVersion:    v1.SchemeGroupVersion,
		MemoryVersion:     schema.GroupVersion{Group: v1.GroupName, Version: runtime.APIVersionInternal},
	})
	return err
}

// openDataDir makes and locks a data directory.
func openDataDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the data directory can't be made: %w", err)
	}
	release, err := storage.LockDir(dir)
	if err != nil {
		return nil, err
	}
	return func() { release() }, nil
}

// startStorage starts a SQL database as the API server's etcd. That it fails
// later ends the group.
func startStorage(ctx context.Context, group *errgroup.Group, opts storage.Options) (*storage.Backend, error) {
	backend, err := storage.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	group.Go(func() error {
		select {
		case <-backend.Done():
			return failed("the storage", backend.Err())
		case <-ctx.Done():
			return nil
		}
	})
	return backend, nil
}

func portInUse(port int, address net.IP) error {
	return fmt.Errorf("port %d of %s is in use: stop what uses it, or choose another with --secure-port", port, address)
}

// failed names the part of the server that has failed.
func failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s has failed: %w", what, err)
}

// StreamOptions is how streams and processes are bounded, however the server is
// run.
type StreamOptions struct {
	// MaxSessions is how many streams may be open at once.
	MaxSessions int
	// Limits bound sessions where a target's class doesn't say.
	Limits policy.Limits
	// DrainTimeout bounds how long open streams may take to end at shutdown.
	DrainTimeout time.Duration
	// StopTimeout bounds how long processes may take to end at shutdown, where
	// their own grace periods are longer.
	StopTimeout time.Duration
	// PingInterval is how often the clients of upgraded connections are pinged,
	// PeerTimeout within which time one that doesn't answer is given up.
	PingInterval, PeerTimeout time.Duration
	// LogFileSize is the size at which a file of an instance's log is full, and
	// LogFiles how many are kept of each instance.
	LogFileSize resource.QuantityValue
	LogFiles    int
}

// maxPingInterval is the longest time between two pings, by which client-go
// also learns that a session lives whose command doesn't read its stdin: it
// gives up 61 s after the last one, which may have been late.
const maxPingInterval = 30 * time.Second

// minLogFileSize keeps a log from being more files than lines.
const minLogFileSize = 64 << 10

func newStreamOptions() StreamOptions {
	return StreamOptions{
		MaxSessions:  session.DefaultMax,
		DrainTimeout: 10 * time.Second,
		StopTimeout:  30 * time.Second,
		PingInterval: streaming.DefaultPingInterval,
		PeerTimeout:  streaming.DefaultPeerTimeout,
		LogFileSize:  resource.QuantityValue{Quantity: *resource.NewQuantity(process.DefaultLogFileSize, resource.BinarySI)},
		LogFiles:     process.DefaultLogFiles,
	}
}

func (o *StreamOptions) addFlags(flags *pflag.FlagSet) {
	flags.IntVar(&o.MaxSessions, "max-sessions", o.MaxSessions, "How many logs, execs, attaches and port-forwards may be open at once on this server.")
	flags.IntVar(&o.Limits.SessionsPerUser, "max-sessions-per-user", o.Limits.SessionsPerUser, "How many of them one user may have open at once on targets of one class, where the class doesn't say; 0 for as many as the server may have.")
	flags.IntVar(&o.Limits.SessionsPerTarget, "max-sessions-per-target", o.Limits.SessionsPerTarget, "How many of them may be open at once on one target, where its class doesn't say; 0 for as many as the server may have.")
	flags.DurationVar(&o.Limits.IdleTimeout, "session-idle-timeout", o.Limits.IdleTimeout, "How long an exec, attach or port-forward may go without a byte either way, where the target's class doesn't say; 0 for ever.")
	flags.DurationVar(&o.Limits.MaxDuration, "session-max-duration", o.Limits.MaxDuration, "How long a log, exec, attach or port-forward may last, where the target's class doesn't say; 0 for ever.")
	flags.DurationVar(&o.DrainTimeout, "drain-timeout", o.DrainTimeout, "How long open streams may take to end when the server shuts down.")
	flags.DurationVar(&o.StopTimeout, "stop-timeout", o.StopTimeout, "How long processes may take to end when the server shuts down, where the grace periods of their targets are longer.")
	flags.DurationVar(&o.PingInterval, "stream-ping-interval", o.PingInterval, "How often the client of an open exec, attach, port-forward or WebSocket log is pinged, at most 30s. That also keeps proxies from taking a quiet connection for idle.")
	flags.DurationVar(&o.PeerTimeout, "stream-peer-timeout", o.PeerTimeout, "Within which time a client that no longer answers is found, and its session ended. Pings are sent at least four times as often.")
	flags.Var(&o.LogFileSize, "log-file-size", "The size at which a file of an instance's log is full, in bytes or as a quantity: 10Mi.")
	flags.IntVar(&o.LogFiles, "log-files", o.LogFiles, "How many files are kept of each instance's log; the oldest goes when a new one is begun.")
}

func (o *StreamOptions) validate() []error {
	var errs []error
	if o.MaxSessions < 1 {
		errs = append(errs, fmt.Errorf("--max-sessions %d must be at least 1", o.MaxSessions))
	}
	if o.Limits.SessionsPerUser < 0 {
		errs = append(errs, fmt.Errorf("--max-sessions-per-user %d must not be negative", o.Limits.SessionsPerUser))
	}
	if o.Limits.SessionsPerTarget < 0 {
		errs = append(errs, fmt.Errorf("--max-sessions-per-target %d must not be negative", o.Limits.SessionsPerTarget))
	}
	if o.Limits.IdleTimeout < 0 {
		errs = append(errs, fmt.Errorf("--session-idle-timeout %s must not be negative", o.Limits.IdleTimeout))
	}
	if o.Limits.MaxDuration < 0 {
		errs = append(errs, fmt.Errorf("--session-max-duration %s must not be negative", o.Limits.MaxDuration))
	}
	if o.DrainTimeout < 0 {
		errs = append(errs, fmt.Errorf("--drain-timeout %s must not be negative", o.DrainTimeout))
	}
	if o.LogFileSize.Value() < minLogFileSize {
		errs = append(errs, fmt.Errorf("--log-file-size %s must be at least 64Ki", o.LogFileSize.String()))
	}
	if o.LogFiles < 2 {
		errs = append(errs, fmt.Errorf("--log-files %d must be at least 2: one is being written to", o.LogFiles))
	}
	if o.StopTimeout < 0 {
		errs = append(errs, fmt.Errorf("--stop-timeout %s must not be negative", o.StopTimeout))
	}
	if o.PingInterval < time.Second || o.PingInterval > maxPingInterval {
		errs = append(errs, fmt.Errorf("--stream-ping-interval %s must be between 1s and %s: kubectl gives a connection up that is quiet for a minute", o.PingInterval, maxPingInterval))
	}
	if o.PeerTimeout <= o.PingInterval {
		errs = append(errs, fmt.Errorf("--stream-peer-timeout %s must be longer than --stream-ping-interval %s: a client needs time to answer", o.PeerTimeout, o.PingInterval))
	}
	return errs
}

// streaming are the options of streams. origins are those that browsers may
// connect from, beside the server's own.
func (o *StreamOptions) streaming(origins []string) streaming.Options {
	return streaming.Options{
		CheckOrigin:  checkOrigin(origins),
		PingInterval: o.PingInterval,
		PeerTimeout:  o.PeerTimeout,
	}
}

func (o *StreamOptions) sessions() *session.Manager {
	return session.NewManager(session.Options{Max: o.MaxSessions, Code: target.SessionCode})
}
