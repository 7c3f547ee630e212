package process

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/drivertest"
)

func TestMain(m *testing.M) {
	if os.Getenv(envHelperAgent) != "" {
		helperAgent()
	}
	if os.Getenv(envHelperThief) != "" {
		helperThief()
	}
	goleak.VerifyTestMain(m)
}

var lastUID atomic.Int64

// newTarget makes a target with a UID of its own.
func newTarget(source v1.ProcessSource) *v1.Target {
	target := &v1.Target{ObjectMeta: metav1.ObjectMeta{
		Name: "web", Namespace: "shop", UID: types.UID(fmt.Sprint("uid-", lastUID.Add(1))),
	}}
	target.Spec.Process = &source
	v1.SetDefaults_TargetSpec(&target.Spec)
	return target
}

// script is a command for the shell, in which $ means what it does there.
func script(text string) v1.ProcessSource {
	return v1.ProcessSource{Command: []string{"sh", "-c", strings.ReplaceAll(text, "$", "$$")}}
}

func newDriver(t testing.TB, opts Options) *Driver {
	t.Helper()
	if opts.Dir == "" {
		opts.Dir = t.TempDir()
	}
	d, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return d
}

func start(t testing.TB, d *Driver, target *v1.Target, ports ...v1.InstancePort) driver.InstanceID {
	t.Helper()
	what := driver.Instance{Target: target, Name: "web-0", Ports: ports}
	if err := d.Start(t.Context(), what); err != nil {
		t.Fatalf("Start: %v", err)
	}
	return what.ID()
}

func open(t testing.TB, d *Driver, target *v1.Target) *conn {
	t.Helper()
	c, err := d.Open(t.Context(), driver.Request{Target: target, Instance: "web-0", Dial: (&net.Dialer{}).DialContext})
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	return c.(*conn)
}

// await waits until the list of instances is right.
func await(t testing.TB, d *Driver, what string, right func(driver.InstanceStatus) bool) driver.InstanceStatus {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		list, err := d.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, status := range list {
			if right(status) {
				return status
			}
		}
		select {
		case <-d.Changes():
		case <-deadline:
			t.Fatalf("waited for: %s; the list is %+v", what, list)
		}
	}
}

func awaitEnd(t testing.TB, d *Driver, id driver.InstanceID) *v1.InstanceStateTerminated {
	t.Helper()
	return await(t, d, "the end", func(s driver.InstanceStatus) bool {
		return s.ID == id && s.State.Terminated != nil
	}).State.Terminated
}

func TestConformance(t *testing.T) {
	host := func(t *testing.T) driver.Host { return newDriver(t, Options{}) }
	target := func(t *testing.T, what drivertest.Instance) *v1.Target {
		source := script(what.Script)
		source.Stdin, source.TTY = what.Stdin, what.TTY
		target := newTarget(source)
		if what.RestartPolicy != "" {
			target.Spec.RestartPolicy = what.RestartPolicy
		}
		return target
	}
	drivertest.Run(t, drivertest.Harness{
		Host:   host,
		Target: target,
		Port: func(t *testing.T) (driver.Driver, driver.Request, uint16, uint16) {
			// The driver dials where the agent told the instance to listen;
			// who listens there doesn't matter to it.
			listener := echo(t, "tcp", "127.0.0.1:0")
			free, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			free.Close()
			d, req := running(t, v1.InstancePort{Name: "http", Port: 8080, HostPort: portOf(listener.Addr())},
				v1.InstancePort{Name: "off", Port: 8081, HostPort: portOf(free.Addr())})
			return d, req, 8080, 8081
		},
		Datagrams: func(t *testing.T) (driver.Driver, driver.Request, uint16) {
			connection, err := net.ListenPacket("udp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			var serving sync.WaitGroup
			t.Cleanup(func() {
				connection.Close()
				serving.Wait()
			})
			serving.Go(func() { drivertest.EchoDatagrams(connection) })
			d, req := running(t, v1.InstancePort{Name: "udp", Port: 53, HostPort: portOf(connection.LocalAddr())})
			return d, req, 53
		},
		Socket: func(t *testing.T) (driver.Driver, driver.Request, string, string) {
			dir := realDir(t)
			echo(t, "unix", filepath.Join(dir, "open"))
			unused, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "refused")})
			if err != nil {
				t.Fatal(err)
			}
			unused.SetUnlinkOnClose(false)
			unused.Close()
			d, req := running(t)
			return d, req, filepath.Join(dir, "open"), filepath.Join(dir, "refused")
		},
		Loopback: func(t *testing.T, port uint16) net.Conn {
			connection, err := net.Dial("tcp", net.JoinHostPort("localhost", strconv.Itoa(int(port))))
			if err != nil {
				t.Fatal(err)
			}
			return connection
		},
	})
}

// echo serves connections by EchoAfterEOF until the test ends.
func echo(t testing.TB, network, address string) net.Listener {
	t.Helper()
	listener, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() {
		listener.Close()
		serving.Wait()
	})
	serving.Go(func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			drivertest.EchoAfterEOF(c)
		}
	})
	return listener
}

func portOf(addr net.Addr) int32 {
	if udp, ok := addr.(*net.UDPAddr); ok {
		return int32(udp.Port)
	}
	return int32(addr.(*net.TCPAddr).Port)
}

// running starts an instance with these ports, of which those named udp are.
func running(t testing.TB, ports ...v1.InstancePort) (*Driver, driver.Request) {
	t.Helper()
	d, target := newDriver(t, Options{}), newTarget(script("exec sleep 1000"))
	for _, p := range ports {
		listed := v1.TargetPort{Name: p.Name, Port: p.Port, Protocol: v1.ProtocolTCP}
		if p.Name == "udp" {
			listed.Protocol = v1.ProtocolUDP
		}
		target.Spec.Ports = append(target.Spec.Ports, listed)
	}
	start(t, d, target, ports...)
	return d, driver.Request{Target: target, Instance: "web-0", Dial: (&net.Dialer{}).DialContext}
}

// realDir is a directory for sockets, by a short path without links.
func realDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "aaserver-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// skip leaves out a test that this machine lacks something for. In CI, which has
// everything, that is a failure: nobody would see it.
func skip(t *testing.T, why ...any) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(why...)
	}
	t.Skip(why...)
}
