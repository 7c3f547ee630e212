package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/testutil"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
	clocktesting "k8s.io/utils/clock/testing"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func TestMain(m *testing.M) {
	klog.LogToStderr(false)
	klog.SetOutput(io.Discard)
	goleak.VerifyTestMain(m)
}

func TestNewRefuses(t *testing.T) {
	good := Options{
		Name: "local", Client: newFakeAPI(t),
	}
	if _, err := New(good); err != nil {
		t.Fatalf("good options: %v", err)
	}
	tests := map[string]struct {
		change func(*Options)
		want   string
	}{
		"no name":                     {func(o *Options) { o.Name = "" }, "needs a name"},
		"no client":                   {func(o *Options) { o.Client = nil }, "needs a client"},
		"ports that there aren't":     {func(o *Options) { o.PortRange = utilnet.PortRange{Base: 65000, Size: 1000} }, "65000 to 65999"},
		"port 0, which is any of all": {func(o *Options) { o.PortRange = utilnet.PortRange{Base: 0, Size: 10} }, "0 to 9"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			opts := good
			test.change(&opts)
			if _, err := New(opts); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error that says %q", err, test.want)
			}
		})
	}
}

// live is an agent that runs.
type live struct {
	*testing.T
	api      *fakeAPI
	host     *fakeHost
	registry metrics.KubeRegistry
	// stop ends Run and waits for it.
	stop func()
}

func newLive(t *testing.T, api *fakeAPI, host *fakeHost, clock clock.WithTicker) *live {
	t.Helper()
	agent, err := New(Options{Name: "local", Client: api, Clock: clock})
	if err != nil {
		t.Fatal(err)
	}
	l := &live{T: t, api: api, host: host, registry: metrics.NewKubeRegistry()}
	if err := agent.Register(l.registry.Register); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx, map[string]driver.Host{v1.SourceProcess: host}); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	l.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
	})
	t.Cleanup(l.stop)
	return l
}

// eventually waits until a condition holds.
func eventually(t testing.TB, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if holds() {
			return
		}
	}
	t.Fatalf("never happened: %s", what)
}

func (l *live) ready(name string, n int32) {
	l.Helper()
	eventually(l, fmt.Sprintf("%s has %d ready instances", name, n), func() bool {
		target := l.api.get(name)
		return target != nil && target.Status.ObservedGeneration == target.Generation &&
			target.Status.ReadyReplicas == n && target.Status.Replicas == n
	})
}

func TestRunALifeOfATarget(t *testing.T) {
	l := newLive(t, newFakeAPI(t), newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	target := withPorts(web(2), v1.TargetPort{Name: "http", Port: 8080})
	target.Finalizers = []string{v1.FinalizerInstances}
	l.api.create(target)
	l.ready("web", 2)

	// A change on the host comes back without anybody asking.
	l.host.exit("web-1", 1)
	l.ready("web", 1+1)
	eventually(t, "web-1 was restarted", func() bool { return l.api.get("web").Status.Instances[1].RestartCount == 1 })

	l.api.change("web", func(s *v1.TargetSpec) { s.Process.Command = []string{"v2"} })
	eventually(t, "both run v2", func() bool { c := l.host.commands(); return c["web-0"] == "v2" && c["web-1"] == "v2" })
	l.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To[int32](1) })
	l.ready("web", 1)
	l.api.delete("web")
	eventually(t, "the target is gone", func() bool { return l.api.get("web") == nil })
	if running := l.host.running(); len(running) > 0 {
		t.Errorf("still running: %v", running)
	}
	starts, err := testutil.GetCounterValuesFromGatherer(l.registry, "aaserver_agent_instance_starts_total",
		map[string]string{"source": "process"}, "result")
	if err != nil || starts["success"] != 5 {
		t.Errorf("got %v successful starts and error %v, want 5", starts, err)
	}
}

// The agent asks for what it wants by field selector: a server with many
// agents doesn't send it the targets of others.
func TestRunWatchesItsOwnTargets(t *testing.T) {
	l := newLive(t, newFakeAPI(t), newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	l.api.create(web(1))
	l.ready("web", 1)
	l.stop()
	var seen []string
	for _, action := range l.api.Actions() {
		switch action := action.(type) {
		case clienttesting.ListActionImpl:
			seen = append(seen, "list "+action.ListOptions.FieldSelector)
		case clienttesting.WatchActionImpl:
			seen = append(seen, "watch "+action.ListOptions.FieldSelector)
		}
	}
	if got, want := strings.Join(seen, ", "), "list spec.agentName=local, watch spec.agentName=local"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestRunWritesNothingWhenNothingChanges(t *testing.T) {
	l := newLive(t, newFakeAPI(t), newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	target := l.api.create(web(3))
	l.ready("web", 3)
	// Each change that is told makes the agent look again; the first look
	// comes after those that were under way.
	look := func() {
		before := l.host.listed()
		l.host.changes <- target.UID
		eventually(t, "the agent has looked", func() bool { return l.host.listed() > before })
	}
	look()
	look()
	requests := len(l.api.Actions())
	for range 50 {
		look()
	}
	if more := l.api.Actions()[requests:]; len(more) > 0 {
		t.Errorf("%d requests while nothing changed, the first: %v", len(more), more[0])
	}
}

// The host's fake fails the test when two calls for one target overlap.
func TestRunSeesToOneTargetOnceAtATime(t *testing.T) {
	l := newLive(t, newFakeAPI(t), newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	var uids []types.UID
	for _, name := range []string{"web", "db"} {
		uids = append(uids, l.api.create(named(web(4), name)).UID)
		l.ready(name, 4)
	}
	for n := range 200 {
		l.host.changes <- uids[n%2]
		if n%20 == 0 {
			l.api.change("web", func(s *v1.TargetSpec) { s.Replicas = ptr.To(int32(n/20%2) * 4) })
		}
	}
	l.ready("db", 4)
	l.ready("web", 4)
}

func TestRunLeavesInstancesRunning(t *testing.T) {
	l := newLive(t, newFakeAPI(t), newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	l.api.create(web(2))
	l.ready("web", 2)
	l.host.take()
	l.stop()
	if events := l.host.take(); len(events) > 0 {
		t.Errorf("at its end, the agent did %v", events)
	}
	l.host.exit("web-0", 1)
	if status := l.api.get("web").Status; status.ReadyReplicas != 2 {
		t.Errorf("after its end, the agent wrote %v", status)
	}
}

func TestRunEndsWhenTheServerIsAway(t *testing.T) {
	api := newFakeAPI(t)
	asked := make(chan struct{}, 100)
	api.PrependReactor("list", "targets", func(clienttesting.Action) (bool, runtime.Object, error) {
		asked <- struct{}{}
		return true, nil, errors.New("the server is away")
	})
	l := newLive(t, api, newFakeHost(t, clock.RealClock{}), clock.RealClock{})
	<-asked
	l.stop()
}

func TestRunWaitsForAHostThatCantBeAsked(t *testing.T) {
	api, fake := newFakeAPI(t), clocktesting.NewFakeClock(began)
	host := newFakeHost(t, fake)
	host.listErr = driver.Errorf(driver.Unavailable, "the daemon isn't running")
	created := api.create(web(1))
	l := newLive(t, api, host, fake)
	eventually(t, "it was asked", func() bool { return host.listed() > 0 })
	host.mu.Lock()
	host.listErr = nil
	host.mu.Unlock()
	eventually(t, "the instance runs", func() bool { fake.Step(time.Second); return len(host.running()) == 1 })
	l.ready("web", 1)
	host.mu.Lock()
	defer host.mu.Unlock()
	if len(host.retained) != 1 || host.retained[0] != created.UID {
		t.Errorf("retained %v, want %v", host.retained, created.UID)
	}
}

func TestPortInUse(t *testing.T) {
	listen := map[string]func(address string) (io.Closer, net.Addr, error){
		"TCP": func(address string) (io.Closer, net.Addr, error) {
			l, err := net.Listen("tcp", address)
			if err != nil {
				return nil, nil, err
			}
			return l, l.Addr(), nil
		},
		"UDP": func(address string) (io.Closer, net.Addr, error) {
			c, err := net.ListenPacket("udp", address)
			if err != nil {
				return nil, nil, err
			}
			return c, c.LocalAddr(), nil
		},
	}
	for protocol, listen := range listen {
		for name, address := range map[string]string{"loopback": "127.0.0.1:0", "all addresses": "0.0.0.0:0"} {
			t.Run(protocol+" on "+name, func(t *testing.T) {
				closer, addr, err := listen(address)
				if err != nil {
					t.Fatal(err)
				}
				var number int
				switch addr := addr.(type) {
				case *net.TCPAddr:
					number = addr.Port
				case *net.UDPAddr:
					number = addr.Port
				}
				port := hostPort{number: int32(number), protocol: protocolOf(v1.TargetPort{Protocol: v1.Protocol(protocol)})}
				if !portInUse(port) {
					t.Errorf("port %s seems free while it is listened on", port)
				}
				if err := closer.Close(); err != nil {
					t.Fatal(err)
				}
				// Somebody else may have it for a moment.
				eventually(t, "the port is free again", func() bool { return !portInUse(port) })
			})
		}
	}
}
