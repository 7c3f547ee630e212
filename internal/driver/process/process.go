// Package process is the driver for targets that are processes on the agent's
// own host. Each instance, and each command beside one, is a child under a shim
// (see package shim), which makes sure that nothing of it outlives it, or the
// agent.
//
// A program that uses this package is its own shim: it links package shim.
package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/clock"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process/shim"
)

// Options are the settings of a Driver.
type Options struct {
	// Dir is where logs are kept, by the target's UID and the instance's name.
	// It is made if need be, and belongs to one Driver at a time. Required.
	Dir string
	// LogFileSize is the size in bytes at which a log file is full; 10 MiB if
	// 0.
	LogFileSize int64
	// LogFiles is how many files are kept of an instance's log, the one being
	// written included; 5 if 0.
	LogFiles int
	// Clock tells the time of lines and states; the real one if nil.
	Clock clock.Clock

	// createLogFile is for tests.
	createLogFile func(name string) (logFile, error)
}

// The defaults of Options.
const (
	DefaultLogFileSize = 10 << 20
	DefaultLogFiles    = 5
)

// Driver implements driver.Host.
type Driver struct {
	dir     string
	logs    logSettings
	changes *changes
	shims   shim.Starter

	mu        sync.Mutex // protects what follows; a log's locks come after it
	closed    bool
	instances map[driver.InstanceID]*instance
	open      map[driver.InstanceID]*openedLog
	listeners map[*listener]struct{}
	// busy counts what Close waits for.
	busy sync.WaitGroup
}

var _ driver.Host = (*Driver)(nil)

// openedLog is a log that somebody uses: an instance or a reader.
type openedLog struct {
	*instanceLog
	users int
}

// New makes a driver. Close it to end what it runs.
func New(opts Options) (*Driver, error) {
	if opts.LogFileSize == 0 {
		opts.LogFileSize = DefaultLogFileSize
	}
	if opts.LogFiles == 0 {
		opts.LogFiles = DefaultLogFiles
	}
	if opts.Clock == nil {
		opts.Clock = clock.RealClock{}
	}
	if opts.createLogFile == nil {
		opts.createLogFile = createLogFile
	}
	if opts.Dir == "" || opts.LogFileSize < 0 || opts.LogFiles < 0 {
		return nil, errors.New("process driver: a directory is required, and sizes can't be negative")
	}
	dir, err := filepath.Abs(opts.Dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("process driver: making the directory of its logs: %w", err)
	}
	return &Driver{
		dir: dir,
		logs: logSettings{
			fileSize: opts.LogFileSize,
			files:    opts.LogFiles,
			clock:    opts.Clock,
			create:   opts.createLogFile,
		},
		changes:   newChanges(),
		instances: make(map[driver.InstanceID]*instance),
		open:      make(map[driver.InstanceID]*openedLog),
		listeners: make(map[*listener]struct{}),
	}, nil
}

// errClosed is what becomes of calls after, and readers at, Close.
var errClosed = driver.Errorf(driver.Unavailable, "the agent is shutting down")

// instance is an instance that was started and not removed.
type instance struct {
	id driver.InstanceID
	// run is the present or last run, nil before the first has started.
	run *run
	// starting says that a Start is under way.
	starting bool
	// own says by which ports of the host it is reached, from the beginning of
	// its last Start.
	own map[endpoint]int32
	log *openedLog
}

// running returns the instance's run if it runs. The driver's mu is held.
func (i *instance) running() *run {
	if i == nil || i.run == nil || i.run.terminated != nil {
		return nil
	}
	return i.run
}

// Start implements driver.Host.
func (d *Driver) Start(ctx context.Context, what driver.Instance) error {
	id := what.ID()
	if err := errors.Join(checkPathElement(string(id.Target)), checkPathElement(id.Name)); err != nil {
		return driver.Errorf(driver.Invalid, "%w", err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	i, err := d.reserve(id, ownPorts(what))
	if err != nil {
		return err
	}
	defer d.busy.Done()
	r, err := d.start(what, i)

	d.mu.Lock()
	defer d.mu.Unlock()
	i.starting = false
	if err != nil {
		if i.run == nil {
			delete(d.instances, id)
			d.releaseLog(id, i.log)
		}
		return err
	}
	i.run = r
	d.changes.add(id.Target)
	d.busy.Add(1)
	go func() {
		defer d.busy.Done()
		d.supervise(i, r)
	}()
	if d.closed {
		r.child.Kill()
		return errClosed
	}
	return nil
}

// reserve makes sure that an instance is started once at a time. Unless it
// fails, busy counts the caller.
func (d *Driver) reserve(id driver.InstanceID, own map[endpoint]int32) (*instance, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errClosed
	}
	i := d.instances[id]
	switch {
	case i == nil:
		log, err := d.useLog(id)
		if err != nil {
			return nil, err
		}
		i = &instance{id: id, log: log}
		d.instances[id] = i
	case i.starting || i.running() != nil:
		return nil, driver.Errorf(driver.Internal, "instance %s runs already", id.Name)
	case i.run != nil && !i.run.drained():
		return nil, driver.Errorf(driver.Unavailable, "the output of the last run of instance %s is still held back: %s", id.Name, i.log.message())
	}
	i.starting, i.own = true, own
	d.busy.Add(1)
	return i, nil
}

// Stop implements driver.Host.
func (d *Driver) Stop(_ context.Context, id driver.InstanceID, grace time.Duration) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.instances[id].running(); r != nil {
		r.stop(d.logs.clock, &d.busy, grace)
	}
	return nil
}

// Remove implements driver.Host.
func (d *Driver) Remove(_ context.Context, id driver.InstanceID) error {
	if err := errors.Join(checkPathElement(string(id.Target)), checkPathElement(id.Name)); err != nil {
		return driver.Errorf(driver.Invalid, "%w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	i := d.instances[id]
	if i != nil && (i.starting || i.running() != nil) {
		return driver.Errorf(driver.Internal, "instance %s can't be removed while it runs", id.Name)
	}
	if d.closed {
		return errClosed
	}
	delete(d.instances, id)
	for l := range d.listeners {
		if l.instance == id {
			l.end(driver.Errorf(driver.NotRunning, "instance %s is gone, and what listens for it with it", id.Name))
		}
	}
	return d.deleteLog(id)
}

// deleteLog ends a log's readers and deletes its files. mu is held.
func (d *Driver) deleteLog(id driver.InstanceID) error {
	if log := d.open[id]; log != nil {
		delete(d.open, id)
		log.close(nil)
	}
	dir := d.logDir(id)
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("deleting the log of instance %s: %w", id.Name, err)
	}
	// The target's directory goes with its last instance's.
	os.Remove(filepath.Dir(dir))
	return nil
}

// Retain implements driver.Host.
func (d *Driver) Retain(_ context.Context, targets []types.UID) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return errClosed
	}
	// What is in use is known to be of a target, whatever the caller thinks.
	keep := slices.Clone(targets)
	for id := range d.instances {
		keep = append(keep, id.Target)
	}
	for id := range d.open {
		if !slices.Contains(keep, id.Target) {
			if err := d.deleteLog(id); err != nil {
				return err
			}
		}
	}
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return fmt.Errorf("reading the directory of logs: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && !slices.Contains(keep, types.UID(e.Name())) {
			errs = append(errs, os.RemoveAll(filepath.Join(d.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// List implements driver.Host.
func (d *Driver) List(context.Context) ([]driver.InstanceStatus, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var list []driver.InstanceStatus
	for id, i := range d.instances {
		if i.run == nil {
			continue // being started for the first time
		}
		status := driver.InstanceStatus{ID: id, Ports: slices.Clone(i.run.ports), Message: i.log.message()}
		if i.run.terminated != nil {
			status.State.Terminated = i.run.terminated.DeepCopy()
		} else {
			status.State.Running = &v1.InstanceStateRunning{StartedAt: metav1.NewTime(i.run.startedAt)}
		}
		list = append(list, status)
	}
	slices.SortFunc(list, func(a, b driver.InstanceStatus) int {
		return compareIDs(a.ID, b.ID)
	})
	return list, nil
}

func compareIDs(a, b driver.InstanceID) int {
	switch {
	case a.Target < b.Target, a.Target == b.Target && a.Name < b.Name:
		return -1
	case a == b:
		return 0
	}
	return 1
}

// Changes implements driver.Host.
func (d *Driver) Changes() <-chan types.UID { return d.changes.out }

// Shutdown implements driver.Host.
func (d *Driver) Shutdown(ctx context.Context) error {
	d.mu.Lock()
	var runs []*run
	for _, i := range d.instances {
		if r := i.running(); r != nil {
			r.stop(d.logs.clock, &d.busy, r.grace)
			runs = append(runs, r)
		}
	}
	d.mu.Unlock()
	for _, r := range runs {
		select {
		case <-r.ended:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// Close implements driver.Host.
func (d *Driver) Close() error {
	d.mu.Lock()
	first := !d.closed
	d.closed = true
	var lost []error
	for _, i := range d.instances {
		if r := i.running(); r != nil {
			r.child.Kill()
		}
	}
	for l := range d.listeners {
		l.end(errClosed)
	}
	d.mu.Unlock()
	// Logs that can't be written hold their instance's end up no longer than
	// its processes live, so this ends.
	for _, r := range d.runs() {
		<-r.ended
	}
	if first {
		d.mu.Lock()
		for id, log := range d.open {
			if why := log.message(); why != "" {
				lost = append(lost, fmt.Errorf("the last output of instance %s is lost: %s", id.Name, why))
			}
			log.close(errClosed)
		}
		d.mu.Unlock()
	}
	d.busy.Wait()
	d.shims.Close()
	if first {
		d.changes.close()
	}
	return errors.Join(lost...)
}

func (d *Driver) runs() []*run {
	d.mu.Lock()
	defer d.mu.Unlock()
	var runs []*run
	for _, i := range d.instances {
		if i.run != nil {
			runs = append(runs, i.run)
		}
	}
	return runs
}

func (d *Driver) logDir(id driver.InstanceID) string {
	return filepath.Join(d.dir, string(id.Target), id.Name)
}

// useLog opens an instance's log, or shares it. mu is held.
func (d *Driver) useLog(id driver.InstanceID) (*openedLog, error) {
	log := d.open[id]
	if log == nil {
		l, err := openLog(&d.logs, d.logDir(id), func() { d.changes.add(id.Target) })
		if err != nil {
			return nil, driver.Errorf(driver.Unavailable, "the log of instance %s can't be opened: %w", id.Name, err)
		}
		log = &openedLog{instanceLog: l}
		d.open[id] = log
	}
	log.users++
	return log, nil
}

// releaseLog undoes useLog. mu is held.
func (d *Driver) releaseLog(id driver.InstanceID, log *openedLog) {
	log.users--
	if log.users == 0 && d.open[id] == log {
		delete(d.open, id)
		log.close(nil)
	}
}

// changes merges the UIDs of changed targets until they are received.
type changes struct {
	out  chan types.UID
	stop chan struct{}
	done chan struct{}

	mu      sync.Mutex // protects pending
	pending []types.UID
	more    chan struct{} // has a place for one
}

func newChanges() *changes {
	c := &changes{
		out:  make(chan types.UID),
		stop: make(chan struct{}),
		done: make(chan struct{}),
		more: make(chan struct{}, 1),
	}
	go c.deliver()
	return c
}

func (c *changes) add(uid types.UID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !slices.Contains(c.pending, uid) {
		c.pending = append(c.pending, uid)
	}
	select {
	case c.more <- struct{}{}:
	default:
	}
}

func (c *changes) deliver() {
	defer close(c.done)
	for {
		select {
		case <-c.more:
		case <-c.stop:
			return
		}
		for {
			c.mu.Lock()
			if len(c.pending) == 0 {
				c.mu.Unlock()
				break
			}
			// A change from here on isn't merged into this one, whose receiver
			// might look before it.
			uid := c.pending[0]
			c.pending = c.pending[1:]
			c.mu.Unlock()
			select {
			case c.out <- uid:
			case <-c.stop:
				return
			}
		}
	}
}

func (c *changes) close() {
	close(c.stop)
	<-c.done
}

// end describes how the run has ended.
func (r *run) end(status syscall.WaitStatus, message string, finishedAt time.Time) *v1.InstanceStateTerminated {
	t := &v1.InstanceStateTerminated{
		ExitCode:   int32(exitCode(status)),
		Reason:     "Completed",
		Message:    message,
		StartedAt:  metav1.NewTime(r.startedAt),
		FinishedAt: metav1.NewTime(finishedAt),
	}
	switch {
	case status.Signaled():
		t.Signal = int32(status.Signal())
		t.Reason = "Killed"
	case t.ExitCode != 0:
		t.Reason = "Error"
	}
	return t
}

// exitCode is a command's exit code as a shell sees it.
func exitCode(status syscall.WaitStatus) int {
	if status.Signaled() {
		return 128 + int(status.Signal())
	}
	return status.ExitStatus()
}

// exitError is what a Run returns for a command's end.
func exitError(code int) error {
	if code == 0 {
		return nil
	}
	return &driver.ExitError{Code: code}
}
