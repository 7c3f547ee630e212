package policy

import (
	"fmt"
	"net/netip"
	"slices"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// Addresses says which addresses a class allows to be dialled. It is safe for
// use by many goroutines. A nil one allows none.
type Addresses struct {
	class string
	// unreadable says which entry makes the class allow nothing, "" if none
	// does.
	unreadable string
	deny       []netip.Prefix
	protected  []protectedRange
	// allow holds the entries that could be read. An empty list that is
	// restricted allows nothing.
	allow      []netip.Prefix
	restricted bool
	allowText  string
}

// protectedRange is denied but for what the class opens of it by name.
type protectedRange struct {
	prefix netip.Prefix
	what   string
	// opened are the entries of allow that lie within prefix.
	opened []netip.Prefix
}

var protectedRanges = []protectedRange{
	{prefix: netip.MustParsePrefix("127.0.0.0/8"), what: "loopback"},
	{prefix: netip.MustParsePrefix("::1/128"), what: "loopback"},
	{prefix: netip.MustParsePrefix("169.254.0.0/16"), what: "link-local"},
	{prefix: netip.MustParsePrefix("fe80::/10"), what: "link-local"},
	{prefix: netip.MustParsePrefix("224.0.0.0/4"), what: "multicast"},
	{prefix: netip.MustParsePrefix("ff00::/8"), what: "multicast"},
	{prefix: netip.MustParsePrefix("255.255.255.255/32"), what: "broadcast"},
	// To connect to an unspecified address is to connect to this host.
	{prefix: netip.MustParsePrefix("0.0.0.0/8"), what: "unspecified"},
	{prefix: netip.MustParsePrefix("::/128"), what: "unspecified"},
	// Where an address in it leads to is for the network's translator to say:
	// the IPv4 address may be in any of several places (RFC 6052, RFC 8215).
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), what: "local NAT64"},
}

// embeddings are the ways to write an IPv4 address as an IPv6 address that a
// router or the kernel turns back into it. IPv4-mapped addresses aren't among
// them: they are the IPv4 address itself.
var embeddings = []struct {
	prefix netip.Prefix
	what   string
	// offset is where in the address its four bytes are.
	offset int
	// inverted says that they are written as their complement.
	inverted bool
}{
	{prefix: netip.MustParsePrefix("::/96"), what: "IPv4-compatible", offset: 12},
	{prefix: netip.MustParsePrefix("::ffff:0:0:0/96"), what: "IPv4-translated", offset: 12},
	{prefix: netip.MustParsePrefix("64:ff9b::/96"), what: "NAT64", offset: 12},
	{prefix: netip.MustParsePrefix("64:ff9b:1::/48"), what: "NAT64", offset: 12},
	{prefix: netip.MustParsePrefix("2002::/16"), what: "6to4", offset: 2},
	{prefix: netip.MustParsePrefix("2001::/32"), what: "Teredo server", offset: 4},
	{prefix: netip.MustParsePrefix("2001::/32"), what: "Teredo", offset: 12, inverted: true},
}

// NewAddresses compiles what a class says of addresses. services are the
// cluster's service ranges, which are protected as loopback is.
//
// An address is denied if it is in an entry of deny; if it is in a protected
// range, unless an entry of allow lies within that range and holds it; and if
// there are entries of allow, but none holds it. An IPv6 address that leads to
// an IPv4 address is denied if that one is, by deny or by a protected range,
// too. An IPv4-mapped address is the IPv4 address. Zones don't matter.
//
// An entry of deny that can't be read denies everything, and so does an
// invalid service range; one of allow allows nothing.
func NewAddresses(class *v1.TargetClass, services []netip.Prefix) *Addresses {
	if class == nil {
		return nil
	}
	a := &Addresses{
		class:      class.Name,
		protected:  slices.Clone(protectedRanges),
		restricted: len(class.Spec.Addresses.Allow) > 0,
		allowText:  list(class.Spec.Addresses.Allow),
	}
	for _, entry := range class.Spec.Addresses.Deny {
		prefix, ok := parsePrefix(entry)
		if !ok {
			a.unreadable = fmt.Sprintf("the entry %q of its addresses.deny is not a CIDR", clip(entry, maxItemBytes))
			return a
		}
		// With bits set beyond its length, an entry may have been meant to be
		// narrower. It denies the wider range.
		a.deny = append(a.deny, prefix.Masked())
	}
	for _, entry := range class.Spec.Addresses.Allow {
		// For the same reason, such an entry allows nothing.
		if prefix, ok := parsePrefix(entry); ok && prefix == prefix.Masked() {
			a.allow = append(a.allow, prefix)
		}
	}
	for _, service := range services {
		prefix, ok := unmapPrefix(service)
		if !ok {
			a.unreadable = "a service range of the cluster is not valid"
			return a
		}
		a.protected = append(a.protected, protectedRange{prefix: prefix.Masked(), what: "the cluster's services"})
	}
	for i := range a.protected {
		r := &a.protected[i]
		for _, entry := range a.allow {
			if r.prefix.Bits() <= entry.Bits() && r.prefix.Contains(entry.Addr()) {
				r.opened = append(r.opened, entry)
			}
		}
	}
	return a
}

func parsePrefix(entry string) (netip.Prefix, bool) {
	prefix, err := netip.ParsePrefix(entry)
	if err != nil {
		return netip.Prefix{}, false
	}
	return unmapPrefix(prefix)
}

// unmapPrefix makes a prefix of IPv4-mapped addresses one of IPv4 addresses. A
// shorter one than all of those is not understood.
func unmapPrefix(prefix netip.Prefix) (netip.Prefix, bool) {
	if !prefix.Addr().Is4In6() {
		return prefix, prefix.IsValid()
	}
	if prefix.Bits() < 96 {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(prefix.Addr().Unmap(), prefix.Bits()-96), true
}

// Allows returns nil if the address may be dialled, and else a *DeniedError.
func (a *Addresses) Allows(addr netip.Addr) error {
	if a == nil {
		return errNoClass
	}
	if reason := a.denies(addr); reason != "" {
		return deny(a.class, "does not allow the address %s: %s", addressText(addr), reason)
	}
	return nil
}

// addressText bounds the zone, which may be of any length.
func addressText(addr netip.Addr) string {
	return clip(addr.String(), maxItemBytes)
}

// denies returns why an address may not be dialled, "" if it may.
func (a *Addresses) denies(addr netip.Addr) string {
	if a.unreadable != "" {
		return a.unreadable
	}
	if !addr.IsValid() {
		return "it is not an IP address"
	}
	// A prefix never contains an address with a zone, nor an IPv4 prefix one
	// that is mapped.
	addr = addr.WithZone("").Unmap()
	if reason := a.deniesRange(addr); reason != "" {
		return reason
	}
	for v4, what := range embedded(addr) {
		if reason := a.deniesRange(v4); reason != "" {
			return fmt.Sprintf("it leads to %s (%s), and %s", v4, what, reason)
		}
	}
	if a.restricted && !contains(a.allow, addr) {
		return "its addresses.allow lists " + a.allowText
	}
	return ""
}

// deniesRange applies what denies alone, whatever else is allowed.
func (a *Addresses) deniesRange(addr netip.Addr) string {
	for _, prefix := range a.deny {
		if prefix.Contains(addr) {
			return fmt.Sprintf("its addresses.deny lists %s", prefix)
		}
	}
	for _, r := range a.protected {
		if r.prefix.Contains(addr) && !contains(r.opened, addr) {
			return fmt.Sprintf("%s (%s) has to be opened by an entry of addresses.allow that lies within it", r.prefix, r.what)
		}
	}
	return ""
}

func contains(prefixes []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// embedded yields the IPv4 addresses that an IPv6 address may lead to, and by
// what.
func embedded(addr netip.Addr) func(yield func(netip.Addr, string) bool) {
	return func(yield func(netip.Addr, string) bool) {
		// :: and ::1 look like IPv4-compatible addresses, and are none.
		if !addr.Is6() || addr.IsUnspecified() || addr.IsLoopback() {
			return
		}
		bytes := addr.As16()
		for _, e := range embeddings {
			if !e.prefix.Contains(addr) {
				continue
			}
			v4 := [4]byte(bytes[e.offset:])
			if e.inverted {
				for i := range v4 {
					v4[i] = ^v4[i]
				}
			}
			if !yield(netip.AddrFrom4(v4), e.what) {
				return
			}
		}
		// ISATAP (RFC 5214) goes by the interface identifier, in any network.
		if bytes[8]&^0x02 == 0 && bytes[9] == 0 && bytes[10] == 0x5e && bytes[11] == 0xfe {
			yield(netip.AddrFrom4([4]byte(bytes[12:])), "ISATAP")
		}
	}
}
