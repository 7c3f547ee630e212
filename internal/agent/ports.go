package agent

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

// hostPort is a port of the agent's host.
type hostPort struct {
	number   int32
	protocol v1.Protocol
}

func (p hostPort) String() string {
	return fmt.Sprintf("%d/%s", p.number, p.protocol)
}

// portTable knows which instance has which ports of the host. An instance has
// its ports from its first start until it is removed, so that none is given
// twice.
type portTable struct {
	ports utilnet.PortRange
	// inUse says whether a port can't be listened on now.
	inUse func(hostPort) bool

	// mu protects what follows.
	mu    sync.Mutex
	owner map[hostPort]portOwner
	// next is where to look for a free port: one that was just given up is
	// the last to be given again, so that a late client doesn't reach another
	// instance.
	next int
}

type portOwner struct {
	id driver.InstanceID
	// namespace is for people.
	namespace string
}

// newPortTable begins somewhere in the range: two agents on one machine are
// unlikely to meet.
func newPortTable(ports utilnet.PortRange) *portTable {
	return &portTable{
		ports: ports,
		inUse: portInUse,
		owner: map[hostPort]portOwner{},
		next:  rand.IntN(ports.Size),
	}
}

// portError says that an instance can't have a port.
type portError struct {
	port string
	err  error
}

func (e *portError) Error() string { return "port " + e.port + ": " + e.err.Error() }

func (e *portError) Unwrap() error { return e.err }

// reserve keeps for an instance what it had before the agent was started. What
// another one has already is not had twice.
func (t *portTable) reserve(owner portOwner, want []v1.TargetPort, had []v1.InstancePort) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, w := range want {
		port := hostPort{number: previous(had, w.Name), protocol: protocolOf(w)}
		if _, taken := t.owner[port]; port.number != 0 && !taken {
			t.owner[port] = owner
		}
	}
}

// assign finds a host port for each port that an instance, which doesn't run,
// wants: the fixed one, the one it had, or a free one.
func (t *portTable) assign(owner portOwner, want []v1.TargetPort, had []v1.InstancePort) ([]v1.InstancePort, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var assigned []v1.InstancePort
	given := map[hostPort]bool{}
	for _, w := range want {
		port, err := t.find(owner, w, previous(had, w.Name), given)
		if err != nil {
			return nil, &portError{port: w.Name, err: err}
		}
		given[port] = true
		assigned = append(assigned, v1.InstancePort{Name: w.Name, Port: w.Port, HostPort: port.number})
	}
	t.drop(owner.id)
	for port := range given {
		t.owner[port] = owner
	}
	return assigned, nil
}

func (t *portTable) find(owner portOwner, want v1.TargetPort, had int32, given map[hostPort]bool) (hostPort, error) {
	// free says whether the instance may have a port, and if not, why.
	free := func(port hostPort) error {
		if other, taken := t.owner[port]; taken && other.id != owner.id {
			return fmt.Errorf("port %s of the host is in use by instance %s/%s", port, other.namespace, other.id.Name)
		}
		if given[port] {
			return fmt.Errorf("port %s of the host is wanted twice", port)
		}
		if t.inUse(port) {
			return fmt.Errorf("port %s of the host is in use by another program", port)
		}
		return nil
	}
	port := hostPort{number: want.HostPort, protocol: protocolOf(want)}
	if want.HostPort != 0 {
		return port, free(port)
	}
	port.number = had
	if t.ports.Contains(int(had)) && free(port) == nil {
		return port, nil
	}
	for range t.ports.Size {
		port.number = int32(t.ports.Base + t.next)
		t.next = (t.next + 1) % t.ports.Size
		if free(port) == nil {
			return port, nil
		}
	}
	return port, fmt.Errorf("none of the host ports %s is free: stop some instances, or give the agent a wider range", t.ports)
}

// release gives up the ports of an instance.
func (t *portTable) release(id driver.InstanceID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.drop(id)
}

func (t *portTable) drop(id driver.InstanceID) {
	for port, owner := range t.owner {
		if owner.id == id {
			delete(t.owner, port)
		}
	}
}

func previous(had []v1.InstancePort, name string) int32 {
	for _, p := range had {
		if p.Name == name {
			return p.HostPort
		}
	}
	return 0
}

func protocolOf(port v1.TargetPort) v1.Protocol {
	if port.Protocol == "" {
		return v1.ProtocolTCP
	}
	return port.Protocol
}

// portInUse tries to listen on the loopback address and on all addresses: what
// instances do differs, and so does what other programs do. Only "in use"
// counts: a privileged port may be allowed to the instance though it isn't to
// the agent.
func portInUse(port hostPort) bool {
	for _, host := range []string{"127.0.0.1", ""} {
		address := net.JoinHostPort(host, strconv.Itoa(int(port.number)))
		var err error
		if port.protocol == v1.ProtocolUDP {
			var conn net.PacketConn
			if conn, err = net.ListenPacket("udp", address); err == nil {
				err = conn.Close()
			}
		} else {
			var listener net.Listener
			if listener, err = net.Listen("tcp", address); err == nil {
				err = listener.Close()
			}
		}
		if errors.Is(err, unix.EADDRINUSE) {
			return true
		}
	}
	return false
}
