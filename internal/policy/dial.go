package policy

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
)

// Dialer connects to what a class allows. It uses no proxy.
type Dialer struct {
	addresses *Addresses
	opts      DialerOptions
}

// DialerOptions configure a Dialer. The zero value is a good one.
type DialerOptions struct {
	// Resolver looks names up; the system's does if it is nil.
	Resolver *net.Resolver
}

// NewDialer returns a Dialer that connects to the addresses given.
func NewDialer(addresses *Addresses, opts DialerOptions) *Dialer {
	return &Dialer{addresses: addresses, opts: opts}
}

// DialContext connects by TCP or UDP, as net.Dialer.DialContext does. ctx
// bounds the lookup and the dialling.
//
// A name is looked up once, and each of its addresses is judged right before
// it is connected to, so that no second answer can lead elsewhere. Those that
// the class doesn't allow are passed over; if it allows none, the error is a
// *DeniedError.
func (d *Dialer) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	switch network {
	case "tcp", "tcp4", "tcp6", "udp", "udp4", "udp6":
	default:
		return nil, &net.OpError{Op: "dial", Net: network, Err: net.UnknownNetworkError(network)}
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, &net.OpError{Op: "dial", Net: network, Err: err}
	}
	// net.Dialer takes no host for this one.
	if host == "" {
		return nil, &net.OpError{Op: "dial", Net: network, Err: &net.AddrError{Err: "missing host in address", Addr: address}}
	}
	judge := &judge{addresses: d.addresses}
	dialer := &net.Dialer{Resolver: d.opts.Resolver, ControlContext: judge.control}
	conn, err := dialer.DialContext(ctx, network, address)
	if err == nil {
		return conn, nil
	}
	if _, ok := errors.AsType[*DeniedError](err); !ok {
		return nil, err
	}
	// net.Dialer returns the error of the first address. It was denied, but
	// others may have been tried: why those failed is what the user can mend.
	allowed, denied := judge.verdict()
	if allowed.IsValid() {
		return dialer.DialContext(ctx, network, allowed.String())
	}
	return nil, d.denied(host, denied)
}

// denied is the error for a host whose addresses, at least one, aren't allowed.
func (d *Dialer) denied(host string, addrs []netip.Addr) error {
	if d.addresses == nil {
		return errNoClass
	}
	first, reason := addressText(addrs[0]), d.addresses.denies(addrs[0])
	name := clip(host, maxNameBytes)
	switch _, err := netip.ParseAddr(host); {
	case err == nil:
		return d.addresses.Allows(addrs[0])
	case len(addrs) == 1:
		return deny(d.addresses.class, "does not allow the address %s of %q: %s", first, name, reason)
	}
	return deny(d.addresses.class, "allows none of the %d addresses of %q, %s for one: %s", len(addrs), name, first, reason)
}

// judge is asked by net.Dialer before each connect, of a name with addresses
// of both families by two goroutines at once.
type judge struct {
	addresses *Addresses

	// mu protects the following. An attempt that lost the race may go on after
	// the dialling has returned.
	mu sync.Mutex
	// allowed is the first address that was.
	allowed netip.AddrPort
	denied  []netip.Addr
}

func (j *judge) control(_ context.Context, _, address string, _ syscall.RawConn) error {
	// What can't be parsed is no address that could be allowed.
	addr, _ := netip.ParseAddrPort(address)
	err := j.addresses.Allows(addr.Addr())
	j.mu.Lock()
	defer j.mu.Unlock()
	if err != nil {
		j.denied = append(j.denied, addr.Addr())
	} else if !j.allowed.IsValid() {
		j.allowed = addr
	}
	return err
}

func (j *judge) verdict() (allowed netip.AddrPort, denied []netip.Addr) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.allowed, j.denied
}
