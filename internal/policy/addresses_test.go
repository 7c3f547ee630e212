package policy

import (
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

func TestAddresses(t *testing.T) {
	services := []netip.Prefix{netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/112")}
	everything := []string{"0.0.0.0/0", "::/0"}
	tests := map[string]struct {
		allow, deny []string
		allowed     []string
		denied      []string
	}{
		"an empty policy allows all but the protected ranges": {
			allowed: []string{
				"192.0.2.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "10.95.255.255", "10.112.0.0", "1.0.0.0", "126.255.255.255", "128.0.0.0",
				"169.253.255.255", "169.255.0.0", "223.255.255.255", "240.0.0.0", "255.255.255.254",
				"2001:db8::1", "fd00::1", "fd00:10:96::1:0", "fec0::1", "fe7f::1", "feff::1", "2600::",
			},
			denied: []string{
				"127.0.0.1", "127.0.0.0", "127.255.255.255", "::1",
				"169.254.0.0", "169.254.169.254", "169.254.255.255", "fe80::1", "febf:ffff::1",
				"224.0.0.1", "239.255.255.255", "ff02::1", "ff00::",
				"0.0.0.0", "0.255.255.255", "::", "255.255.255.255",
				"10.96.0.0", "10.96.0.1", "10.111.255.255", "fd00:10:96::", "fd00:10:96::ffff",
			},
		},
		"an entry that contains a protected range doesn't open it": {
			allow:   append([]string{"127.0.0.0/7", "169.254.0.0/15", "fe80::/9", "10.96.0.0/11", "224.0.0.0/3", "0.0.0.0/7"}, everything...),
			allowed: []string{"192.0.2.1", "2001:db8::1"},
			denied:  []string{"127.0.0.1", "::1", "169.254.1.1", "fe80::1", "10.96.0.1", "fd00:10:96::1", "224.0.0.1", "255.255.255.255", "0.0.0.0", "::", "64:ff9b:1::1"},
		},
		"an entry within a protected range opens what it holds, and no more": {
			allow:   append([]string{"127.0.0.2/32", "127.9.0.0/16", "::1/128", "169.254.169.254/32", "fe80::/64", "10.96.0.0/12", "fd00:10:96::a/128", "224.0.0.251/32", "0.0.0.0/32", "255.255.255.255/32"}, everything...),
			allowed: []string{"127.0.0.2", "127.9.1.1", "::1", "169.254.169.254", "fe80::1", "10.96.0.1", "10.111.1.1", "fd00:10:96::a", "224.0.0.251", "0.0.0.0", "255.255.255.255", "192.0.2.1"},
			denied:  []string{"127.0.0.1", "127.0.0.3", "127.10.1.1", "169.254.169.253", "fe80:0:0:1::1", "fd00:10:96::b", "224.0.0.1", "0.0.0.1", "::"},
		},
		"an entry within one protected range doesn't open another": {
			allow:  append([]string{"127.0.0.0/8"}, everything...),
			denied: []string{"::1", "169.254.1.1", "10.96.0.1"},
		},
		"entries of allow are the only ones allowed": {
			allow:   []string{"10.20.0.0/16", "2001:db8::/32"},
			allowed: []string{"10.20.0.0", "10.20.255.255", "2001:db8::1", "2001:db8:ffff::"},
			denied:  []string{"10.19.255.255", "10.21.0.0", "192.0.2.1", "2001:db7::1", "2001:db9::", "127.0.0.1"},
		},
		"deny wins over allow": {
			allow:   []string{"10.0.0.0/8", "127.0.0.1/32"},
			deny:    []string{"10.20.0.0/16", "127.0.0.0/8"},
			allowed: []string{"10.19.0.1", "10.21.0.1"},
			denied:  []string{"10.20.0.1", "127.0.0.1"},
		},
		"deny alone leaves the rest": {
			deny:    []string{"10.0.0.0/8", "2001:db8::/32"},
			allowed: []string{"192.0.2.1", "11.0.0.1", "2001:db9::1"},
			denied:  []string{"10.1.2.3", "2001:db8::1", "127.0.0.1"},
		},
		"an IPv4-mapped address is the IPv4 address": {
			allow:   []string{"10.20.0.0/16", "127.0.0.2/32", "::ffff:0:0/96"},
			deny:    []string{"10.20.9.0/24"},
			allowed: []string{"::ffff:10.20.1.1", "::ffff:127.0.0.2", "::ffff:192.0.2.1"},
			denied:  []string{"::ffff:10.20.9.1", "::ffff:127.0.0.1", "::ffff:7f00:1", "::ffff:169.254.169.254", "::ffff:0.0.0.0", "::ffff:10.96.0.1"},
		},
		"entries written as IPv4-mapped are the IPv4 ones": {
			allow:   []string{"::ffff:10.0.0.0/104", "::ffff:127.0.0.2/128"},
			deny:    []string{"::ffff:10.20.0.0/112"},
			allowed: []string{"10.1.1.1", "127.0.0.2", "::ffff:10.1.1.1"},
			denied:  []string{"10.20.1.1", "::ffff:10.20.1.1", "127.0.0.1", "192.0.2.1"},
		},
		"::/0 is no IPv4 network": {
			allow:   []string{"::/0"},
			allowed: []string{"2001:db8::1"},
			denied:  []string{"192.0.2.1", "::ffff:192.0.2.1"},
		},
		"an IPv6 address that leads to a denied IPv4 address is denied": {
			deny:    []string{"10.20.0.0/16"},
			allowed: []string{"64:ff9b::c000:201", "64:ff9b::a00:1", "2002:c000:201::1", "::192.0.2.1", "::ffff:0:192.0.2.1", "2001:0:c000:201::3fff:fdfe", "2001:db8::5efe:c000:201"},
			denied: []string{
				// Of 127.0.0.1, 169.254.169.254, 10.96.0.1 and 10.20.0.1 each.
				"64:ff9b::127.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b::10.96.0.1", "64:ff9b::10.20.0.1",
				"2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:a60:1::", "2002:a14:1::dead:beef",
				"::127.0.0.1", "::169.254.169.254", "::10.96.0.1", "::10.20.0.1",
				"::ffff:0:127.0.0.1", "::ffff:0:169.254.169.254", "::ffff:0:10.96.0.1", "::ffff:0:10.20.0.1",
				"2001:0:7f00:1::3fff:fdfe", "2001:0:c000:201::80ff:fffe", "2001:0:c000:201::f59f:fffe", "2001:0:c000:201::f5eb:fffe",
				"2001:db8::5efe:127.0.0.1", "2001:db8::200:5efe:10.20.0.1",
				"64:ff9b::0.0.0.0", "64:ff9b::224.0.0.1", "::2",
			},
		},
		"an entry of allow for the IPv6 address doesn't open the IPv4 address that it leads to": {
			allow:   []string{"64:ff9b::/96", "64:ff9b::127.0.0.1/128", "2002::/16", "::127.0.0.1/128"},
			allowed: []string{"64:ff9b::192.0.2.1", "2002:c000:201::1"},
			denied:  []string{"64:ff9b::127.0.0.1", "2002:7f00:1::1", "::127.0.0.1"},
		},
		"an entry of allow for an IPv4 address doesn't open the IPv6 addresses that lead to it": {
			allow:   []string{"192.0.2.0/24", "127.0.0.0/8"},
			allowed: []string{"192.0.2.1", "127.0.0.1"},
			denied:  []string{"64:ff9b::192.0.2.1", "2002:c000:201::1", "::192.0.2.1", "64:ff9b::127.0.0.1"},
		},
		"a network's own NAT64 has to be opened by name": {
			allow:   append([]string{"64:ff9b:1:a::/96"}, everything...),
			deny:    []string{"10.20.0.0/16"},
			allowed: []string{"64:ff9b:1:a::192.0.2.1"},
			denied:  []string{"64:ff9b:1::192.0.2.1", "64:ff9b:1:b::192.0.2.1", "64:ff9b:1:a::127.0.0.1", "64:ff9b:1:a::10.20.0.1"},
		},
		"a zone doesn't matter": {
			allow:   []string{"fe80::/64", "2001:db8::/32"},
			deny:    []string{"fe80::bad/128"},
			allowed: []string{"fe80::1%eth0", "2001:db8::1%1", "fe80::1"},
			denied:  []string{"fe80::bad%eth0", "fe80:0:0:1::1%eth0", "::1%lo", "::ffff:127.0.0.1%lo", "ff02::1%eth0"},
		},
		"an entry of deny that can't be read denies everything": {
			deny:   []string{"10.0.0.0/8", "10.20.0.0"},
			denied: []string{"192.0.2.1", "2001:db8::1"},
		},
		"so does an empty one, whatever is allowed": {
			allow:  append([]string{"192.0.2.1/32"}, everything...),
			deny:   []string{""},
			denied: []string{"192.0.2.1"},
		},
		"so does one of more than the IPv4-mapped addresses": {deny: []string{"::ffff:0:0/95"}, denied: []string{"192.0.2.1", "2001:db8::1"}},
		"so does one with a zone":                            {deny: []string{"fe80::%eth0/64"}, denied: []string{"192.0.2.1"}},
		"so does one with leading zeros":                     {deny: []string{"010.0.0.0/8"}, denied: []string{"192.0.2.1"}},
		"an entry of deny with host bits denies the whole network": {
			deny:    []string{"10.20.30.40/8", "2001:db8::1/32"},
			allowed: []string{"11.0.0.1"},
			denied:  []string{"10.0.0.1", "10.20.30.40", "2001:db8:ffff::1"},
		},
		"entries of allow that can't be read allow nothing": {
			allow:  []string{"", "10.20.0.0", "10.20.30.40/8", "fe80::%eth0/64", "*", "::ffff:0:0/95", "localhost", "0.0.0.0/33", "::/129", "2001:db8::1/32"},
			denied: []string{"192.0.2.1", "10.20.0.0", "10.20.30.40", "2001:db8::1", "127.0.0.1", "fe80::1"},
		},
		"beside one that can": {
			allow:   []string{"nonsense", "192.0.2.0/24"},
			allowed: []string{"192.0.2.1"},
			denied:  []string{"198.51.100.1"},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			addresses := NewAddresses(classOf(v1.TargetClassSpec{Addresses: v1.AddressPolicy{Allow: tt.allow, Deny: tt.deny}}), services)
			for _, addr := range tt.allowed {
				if err := addresses.Allows(netip.MustParseAddr(addr)); err != nil {
					t.Errorf("%s is denied, want it to be allowed: %v", addr, err)
				}
			}
			for _, addr := range tt.denied {
				err := addresses.Allows(netip.MustParseAddr(addr))
				if err == nil {
					t.Errorf("%s is allowed, want it to be denied", addr)
					continue
				}
				assertDenied(t, err, "standard")
			}
		})
	}
}

func TestAddressesThatAreNone(t *testing.T) {
	target := netip.MustParseAddr("192.0.2.1")
	tests := map[string]struct {
		addresses *Addresses
		addr      netip.Addr
		want      string
	}{
		"without a class nothing is allowed": {
			addresses: NewAddresses(nil, nil), addr: target,
			want: "without a TargetClass nothing is allowed",
		},
		"with a service range that isn't valid nothing is allowed": {
			addresses: NewAddresses(classOf(v1.TargetClassSpec{}), []netip.Prefix{{}}), addr: target,
			want: `class "standard" does not allow the address 192.0.2.1: a service range of the cluster is not valid`,
		},
		"an address that isn't valid isn't allowed": {
			addresses: NewAddresses(classOf(v1.TargetClassSpec{}), nil),
			want:      `class "standard" does not allow the address invalid IP: it is not an IP address`,
		},
		"a service range is protected with its host bits, and as IPv4-mapped": {
			addresses: NewAddresses(classOf(v1.TargetClassSpec{}), []netip.Prefix{netip.MustParsePrefix("::ffff:192.0.2.128/120")}), addr: target,
			want: `class "standard" does not allow the address 192.0.2.1: 192.0.2.0/24 (the cluster's services) has to be opened by an entry of addresses.allow that lies within it`,
		},
		"an entry that can't be read is named": {
			addresses: NewAddresses(classOf(v1.TargetClassSpec{Addresses: v1.AddressPolicy{Deny: []string{"10.0.0.0/8", "foo"}}}), nil), addr: target,
			want: `class "standard" does not allow the address 192.0.2.1: the entry "foo" of its addresses.deny is not a CIDR`,
		},
		"an entry that denies is named": {
			addresses: NewAddresses(classOf(v1.TargetClassSpec{Addresses: v1.AddressPolicy{Deny: []string{"192.0.2.0/24"}}}), nil), addr: target,
			want: `class "standard" does not allow the address 192.0.2.1: its addresses.deny lists 192.0.2.0/24`,
		},
		"what an address leads to is named": {
			addresses: NewAddresses(classOf(v1.TargetClassSpec{}), nil), addr: netip.MustParseAddr("2002:7f00:1::1"),
			want: `class "standard" does not allow the address 2002:7f00:1::1: it leads to 127.0.0.1 (6to4), and 127.0.0.0/8 (loopback) has to be opened by an entry of addresses.allow that lies within it`,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			err := tt.addresses.Allows(tt.addr)
			if err == nil {
				t.Fatal("allowed")
			}
			if diff := cmp.Diff(tt.want, err.Error()); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

// FuzzAddresses holds what is allowed against the package net, which shares no
// code with net/netip, and each way to write an IPv4 address against the
// address.
func FuzzAddresses(f *testing.F) {
	addr := func(s string) []byte { return netip.MustParseAddr(s).AsSlice() }
	f.Add("", "", "10.96.0.0/12", uint32(0), addr("127.0.0.1"))
	f.Add("0.0.0.0/0 ::/0", "10.0.0.0/8", "10.96.0.0/12", uint32(0), addr("::ffff:10.1.1.1"))
	f.Add("127.0.0.2/32", "", "fd00::/108", uint32(0x9f), addr("127.0.0.2"))
	f.Add("64:ff9b::/96 127.0.0.0/8", "127.0.0.1/32", "", uint32(0x80_ff), addr("64:ff9b::127.0.0.1"))
	f.Add("2002::/16", "192.0.2.1/8", "", uint32(0x90_00_ff), addr("2002:c000:201::1"))
	f.Add("::ffff:10.0.0.0/104", "::ffff:10.20.0.0/112", "::ffff:10.96.0.0/108", uint32(0x90_00_91), addr("10.20.0.1"))
	f.Add("fe80::/10 ff02::1/128", "x", "0.0.0.0/0", uint32(0), addr("fe80::1"))
	f.Add("64:ff9b:1:a::/96", "::/128", "::/0", uint32(0x90), addr("64:ff9b:1:a::1"))
	f.Fuzz(func(t *testing.T, allow, denyList, service string, near uint32, bytes []byte) {
		addr, ok := netip.AddrFromSlice(bytes)
		if !ok || len(allow)+len(denyList) > 1024 {
			return
		}
		policy := v1.AddressPolicy{Allow: strings.Fields(allow), Deny: strings.Fields(denyList)}
		var services []netip.Prefix
		if prefix, err := netip.ParsePrefix(service); err == nil {
			services = append(services, prefix)
		}
		// Networks that hold the address are seldom hit on by chance: each byte
		// of near with its highest bit set makes one.
		network := func(b byte) (netip.Prefix, bool) {
			prefix, err := addr.Unmap().Prefix(int(b&0x7f) + 1)
			return prefix, err == nil && b&0x80 != 0
		}
		if prefix, ok := network(byte(near)); ok {
			policy.Allow = append(policy.Allow, prefix.String())
		}
		if prefix, ok := network(byte(near >> 8)); ok {
			policy.Deny = append(policy.Deny, prefix.String())
		}
		if prefix, ok := network(byte(near >> 16)); ok {
			services = append(services, prefix)
		}
		addresses := NewAddresses(classOf(v1.TargetClassSpec{Addresses: policy}), services)
		allows := func(addr netip.Addr) bool { return addresses.Allows(addr) == nil }

		if allows(addr) {
			if reason := oracle(policy, services, addr); reason != "" {
				t.Errorf("%s is allowed, but %s (policy %+v, services %v)", addr, reason, policy, services)
			}
		}
		if zoned := addr.Unmap(); zoned.Is6() && allows(zoned) != allows(zoned.WithZone("eth0")) {
			t.Errorf("%s is judged otherwise with a zone", zoned)
		}
		v4 := addr.Unmap()
		if !v4.Is4() {
			return
		}
		if mapped := netip.AddrFrom16(v4.As16()); allows(mapped) != allows(v4) {
			t.Errorf("%s is judged otherwise than %s", mapped, v4)
		}
		// What isn't allowed for itself isn't in disguise either, unless it
		// just isn't listed in allow.
		policy.Allow = nil
		addresses = NewAddresses(classOf(v1.TargetClassSpec{Addresses: policy}), services)
		b := v4.As4()
		for _, disguise := range [][16]byte{
			{12: b[0], b[1], b[2], b[3]},
			{8: 0xff, 0xff, 12: b[0], b[1], b[2], b[3]},
			{0x00, 0x64, 0xff, 0x9b, 12: b[0], b[1], b[2], b[3]},
			{0x00, 0x64, 0xff, 0x9b, 0, 1, 12: b[0], b[1], b[2], b[3]},
			{0x20, 0x02, b[0], b[1], b[2], b[3]},
			{0x20, 0x01, 0, 0, b[0], b[1], b[2], b[3], 12: 0x3f, 0xff, 0xfd, 0xfe},
			{0x20, 0x01, 0, 0, 192, 0, 2, 1, 12: ^b[0], ^b[1], ^b[2], ^b[3]},
			{0x26, 0x00, 10: 0x5e, 0xfe, b[0], b[1], b[2], b[3]},
		} {
			if disguised := netip.AddrFrom16(disguise); !allows(v4) && allows(disguised) {
				t.Errorf("%s is allowed, and %s is denied: %v", disguised, v4, addresses.Allows(v4))
			}
		}
	})
}

// oracle says why an address must not be allowed, "" if it may be.
func oracle(policy v1.AddressPolicy, services []netip.Prefix, addr netip.Addr) string {
	ip := net.IP(addr.AsSlice())
	var allow []*net.IPNet
	for _, entry := range policy.Allow {
		if _, network, err := net.ParseCIDR(entry); err == nil {
			allow = append(allow, network)
		}
	}
	// opened says that an entry of at most the size of a range holds the
	// address: with the address in both, it lies within the range.
	opened := func(hostBits int) bool {
		for _, network := range allow {
			ones, bits := network.Mask.Size()
			if network.Contains(ip) && bits-ones <= hostBits {
				return true
			}
		}
		return false
	}
	for _, entry := range policy.Deny {
		_, network, err := net.ParseCIDR(entry)
		if err != nil {
			return "an entry of deny can't be read"
		}
		if network.Contains(ip) {
			return "deny lists it"
		}
	}
	v4 := ip.To4()
	switch {
	case ip.IsLoopback() && v4 != nil && !opened(24), ip.IsLoopback() && v4 == nil && !opened(0):
		return "it is loopback"
	case ip.IsLinkLocalUnicast() && v4 != nil && !opened(16), ip.IsLinkLocalUnicast() && v4 == nil && !opened(118):
		return "it is link-local"
	case ip.IsMulticast() && v4 != nil && !opened(28), ip.IsMulticast() && v4 == nil && !opened(120):
		return "it is multicast"
	case ip.IsUnspecified() && v4 == nil && !opened(0), v4 != nil && v4[0] == 0 && !opened(24):
		return "it is unspecified"
	case ip.Equal(net.IPv4bcast) && !opened(0):
		return "it is broadcast"
	}
	for _, service := range services {
		_, network, err := net.ParseCIDR(service.String())
		if err != nil {
			return "a service range can't be read"
		}
		ones, bits := network.Mask.Size()
		if network.Contains(ip) && !opened(bits-ones) {
			return "it is a service"
		}
	}
	if len(policy.Allow) > 0 && !opened(128) {
		return "allow doesn't list it"
	}
	return ""
}
