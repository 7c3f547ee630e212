// Package storage serves an SQL database as the etcd that the generic API
// server stores its objects in. The work is kine's
// (https://github.com/k3s-io/kine); this package runs it inside the process,
// and makes up for what kine leaves to its caller: a database is looked at
// before it is touched, what is wrong with it is said at once, and a change is
// never acknowledged that wasn't stored.
//
//	Start: parse endpoint → lock, check, try the database → kine → gRPC on a
//	       unix socket that only this user can connect to
//	Close: gRPC ends, handlers joined → kine's goroutines joined → database
//	       closed → lock and socket gone
package storage

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"github.com/k3s-io/kine/pkg/drivers"
	"github.com/k3s-io/kine/pkg/drivers/generic"
	"github.com/k3s-io/kine/pkg/metrics"
	"github.com/k3s-io/kine/pkg/server"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"k8s.io/klog/v2"
)

const (
	// etcdVersion is the version that kine claims, its own default: recent
	// enough for progress notifications, on which consistent reads from the
	// watch cache rely.
	etcdVersion = "3.6.11"

	// maxRequest bounds a request, in bytes: etcd's default of 1.5 MiB and
	// what gRPC adds.
	maxRequest = 2 << 20

	// pollBatch is how many changes kine reads at once. When a batch is full
	// as kine is told to end, its poll loop never does; a batch this large
	// isn't full unless writers outrun the poll by as much.
	pollBatch = 1 << 20

	// drainTimeout is how long Close waits for requests under way. Watches
	// always take all of it, if their clients are still there.
	drainTimeout = time.Second

	// closeTimeout bounds how long Close waits for what kine started.
	closeTimeout = 10 * time.Second
)

// Options says what to serve. Endpoint is required.
type Options struct {
	// Endpoint is a database's URL: sqlite:///path/to/file.db, or
	// postgres://user:password@host:port/database?sslmode=….
	Endpoint string

	// SocketDir is a directory for the socket, which nobody but this process
	// uses. It is created if it is missing. Without it, or if its path is too
	// long for a socket, a directory below os.TempDir is used.
	SocketDir string

	// Metrics takes kine's metrics, if it is set. The same registry may be
	// given to any number of backends.
	Metrics prometheus.Registerer
}

// Backend is a running database.
type Backend struct {
	listener net.Listener
	grpc     *grpc.Server
	// cleanups run in reverse order when everything else has ended.
	cleanups []func()
	// kine ends when stop is called; kineDone is closed when all its
	// goroutines that it counts have ended.
	stop     context.CancelFunc
	kineDone chan struct{}
	served   chan struct{}

	closeOnce sync.Once
	closeErr  error

	done     chan struct{}
	failOnce sync.Once
	err      error // set before done is closed
}

// Start opens the database and serves it. ctx bounds Start alone. An error
// names the file or host at fault, is one line, and never holds a password.
func Start(ctx context.Context, opts Options) (_ *Backend, err error) {
	db, err := parseEndpoint(opts.Endpoint)
	if err != nil {
		return nil, err
	}
	routeLogs()

	b := &Backend{
		kineDone: make(chan struct{}),
		served:   make(chan struct{}),
		done:     make(chan struct{}),
	}
	runCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	b.stop = stop
	var wg sync.WaitGroup
	defer func() {
		if err == nil {
			return
		}
		stop()
		wg.Wait()
		b.cleanUp()
	}()

	release, err := db.prepare(ctx)
	if err != nil {
		return nil, err
	}
	b.cleanups = append(b.cleanups, release)

	listener, removeSocket, err := listen(opts.SocketDir)
	if err != nil {
		return nil, err
	}
	b.cleanups = append(b.cleanups, removeSocket)
	b.listener = listener

	// kine knows one context, for starting and for running.
	unlink := context.AfterFunc(ctx, stop)
	kine, waitClosed, err := db.open(runCtx, &wg, &drivers.Config{
		ConnectionPoolConfig: generic.ConnectionPoolConfig{
			MaxIdle:     20,
			MaxOpen:     40,
			MaxIdleTime: 2 * time.Minute,
		},
		// Compaction is the API server's doing, so that its watch cache knows.
		CompactInterval:  0,
		CompactTimeout:   5 * time.Second,
		CompactMinRetain: 1000,
		CompactBatchSize: 1000,
		PollInterval:     time.Second,
		PollBatchSize:    pollBatch,
	})
	if err == nil {
		err = startKine(runCtx, kine)
	}
	if !unlink() {
		err = context.Cause(ctx)
	}
	if err != nil {
		listener.Close()
		return nil, fmt.Errorf("can't use %s as storage: %w", db, oneLine(err))
	}
	if opts.Metrics != nil {
		if err := registerMetrics(opts.Metrics); err != nil {
			listener.Close()
			return nil, err
		}
	}

	b.grpc = grpc.NewServer(
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}),
		grpc.MaxConcurrentStreams(math.MaxUint32),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.WaitForHandlers(true),
		grpc.ChainUnaryInterceptor(refuseTooLarge, recoverFailedTransaction),
		grpc.StreamInterceptor(refuseRangeStream),
	)
	server.New(kine, "unix", 5*time.Second, etcdVersion).Register(b.grpc)

	go func() {
		defer close(b.served)
		if err := b.grpc.Serve(listener); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			b.finish(fmt.Errorf("the storage for %s stopped: %w", db, err))
		}
	}()
	go func() {
		defer close(b.kineDone)
		wg.Wait()
		waitClosed()
	}()
	klog.V(2).InfoS("Storage is ready", "database", db.String(), "endpoint", b.Endpoint())
	return b, nil
}

// Endpoint is what the generic API server takes as --etcd-servers.
func (b *Backend) Endpoint() string { return "unix://" + b.listener.Addr().String() }

// Done is closed when the backend no longer serves: after Close, or because it
// failed. Close must be called in either case.
func (b *Backend) Done() <-chan struct{} { return b.done }

// Err returns why a backend that is done failed, nil if it was closed.
func (b *Backend) Err() error {
	select {
	case <-b.done:
		return b.err
	default:
		return nil
	}
}

// Close ends the backend and returns when the database is closed and nothing
// is left running. Stop the API server first: requests under way are given a
// second. It may be called more than once.
func (b *Backend) Close() error {
	b.closeOnce.Do(func() { b.closeErr = b.close() })
	return b.closeErr
}

func (b *Backend) close() error {
	kill := time.AfterFunc(drainTimeout, b.grpc.Stop)
	b.grpc.GracefulStop()
	kill.Stop()
	<-b.served
	b.stop()

	var err error
	timeout := time.NewTimer(closeTimeout)
	defer timeout.Stop()
	select {
	case <-b.kineDone:
	case <-timeout.C:
		// What was acknowledged is on disk nevertheless.
		err = fmt.Errorf("the database wasn't closed within %s", closeTimeout)
	}
	b.cleanUp()
	b.finish(nil)
	return err
}

func (b *Backend) finish(err error) {
	b.failOnce.Do(func() {
		b.err = err
		close(b.done)
	})
}

func (b *Backend) cleanUp() {
	for i := len(b.cleanups) - 1; i >= 0; i-- {
		b.cleanups[i]()
	}
	b.cleanups = nil
}

// database is one kind of endpoint. Its String is fit to be shown.
type database interface {
	fmt.Stringer
	// prepare fails if the database can't be used, leaving it as it is.
	prepare(ctx context.Context) (release func(), err error)
	// open connects kine to it. ctx bounds its life, wg counts its goroutines;
	// when they have ended, closed waits until the last connection has, too.
	open(ctx context.Context, wg *sync.WaitGroup, cfg *drivers.Config) (_ server.Backend, closed func(), err error)
}

func startKine(ctx context.Context, kine server.Backend) (err error) {
	defer func() {
		if failed, ok := recover().(failedTransaction); ok {
			err = failed
		}
	}()
	return kine.Start(ctx)
}

// registerMetrics doesn't mind that another backend has: the metrics are
// kine's global variables.
func registerMetrics(registry prometheus.Registerer) error {
	for _, c := range []prometheus.Collector{metrics.SQLTotal, metrics.SQLTime, metrics.CompactTotal, metrics.InsertErrorsTotal} {
		err := registry.Register(c)
		if _, ok := errors.AsType[prometheus.AlreadyRegisteredError](err); err != nil && !ok {
			return fmt.Errorf("registering the storage's metrics: %w", err)
		}
	}
	return nil
}

// socketPath is what fits into a socket's address on every platform, and into
// a URL and a flag with commas without any quoting.
var socketPath = regexp.MustCompile(`^/[A-Za-z0-9/._-]{1,98}$`)

// listen opens a socket that nobody but this user can connect to.
func listen(dir string) (_ net.Listener, remove func(), err error) {
	remove = func() {}
	if dir != "" {
		if dir, err = filepath.Abs(dir); err != nil {
			return nil, nil, err
		}
	}
	path := filepath.Join(dir, "storage.sock")
	if dir != "" && socketPath.MatchString(path) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, nil, fmt.Errorf("can't create the directory for the storage's socket: %w", err)
		}
		// A server that was killed leaves its socket behind.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, nil, fmt.Errorf("can't replace the storage's old socket: %w", err)
		}
	} else {
		parent := os.TempDir()
		if !socketPath.MatchString(filepath.Join(parent, "aaserver-0123456789", "storage.sock")) {
			parent = "/tmp"
		}
		private, err := os.MkdirTemp(parent, "aaserver-") // mode 0700
		if err != nil {
			return nil, nil, fmt.Errorf("can't create a directory for the storage's socket: %w", err)
		}
		remove = func() { os.RemoveAll(private) }
		path = filepath.Join(private, "storage.sock")
	}
	config := net.ListenConfig{Control: restrictSocket}
	listener, err := config.Listen(context.Background(), "unix", path)
	if err == nil {
		if err = os.Chmod(path, 0o600); err != nil {
			listener.Close()
		}
	}
	if err != nil {
		remove()
		return nil, nil, fmt.Errorf("can't open the storage's socket: %w", err)
	}
	return listener, remove, nil
}
