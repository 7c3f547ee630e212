package policy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// open is what the class of these tests allows, shut what it doesn't.
	open = "127.0.0.2"
	shut = "127.0.0.1"
)

func testAddresses(allow ...string) *Addresses {
	return NewAddresses(classOf(v1.TargetClassSpec{Addresses: v1.AddressPolicy{Allow: allow}}), nil)
}

// dialTime is far more than a dial on loopback takes.
const dialTime = 30 * time.Second

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), dialTime)
	t.Cleanup(cancel)
	return ctx
}

// greeter is a server that says its address to whoever connects.
type greeter struct {
	port string
	mu   sync.Mutex
	// greeted counts the connections to each address.
	greeted map[string]int
}

// newGreeter listens on one port of all the hosts.
func newGreeter(t *testing.T, hosts ...string) *greeter {
	t.Helper()
	g := &greeter{greeted: map[string]int{}}
	var listeners []net.Listener
	// A port that is free on one address may be taken on another.
	for attempt := 0; len(listeners) < len(hosts); attempt++ {
		g.port = "0"
		for _, host := range hosts {
			listener, err := net.Listen("tcp", net.JoinHostPort(host, g.port))
			if errors.Is(err, syscall.EADDRINUSE) && attempt < 20 {
				for _, l := range listeners {
					l.Close()
				}
				listeners = nil
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			listeners = append(listeners, listener)
			_, g.port, _ = net.SplitHostPort(listener.Addr().String())
		}
	}
	var wg sync.WaitGroup
	t.Cleanup(func() {
		for _, l := range listeners {
			l.Close()
		}
		wg.Wait()
	})
	for i, listener := range listeners {
		wg.Go(func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				g.mu.Lock()
				g.greeted[hosts[i]]++
				g.mu.Unlock()
				io.WriteString(conn, hosts[i])
				conn.Close()
			}
		})
	}
	return g
}

func (g *greeter) count(host string) int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.greeted[host]
}

// zone is a DNS server that gives each name's answers in turn, the last one
// again and again.
type zone struct {
	resolver *net.Resolver
	mu       sync.Mutex
	answers  map[string][][]string
	asked    map[dnsmessage.Question]int
	// silent receives the names that have no answers, to which it says
	// nothing.
	silent chan string
}

func newZone(t *testing.T, answers map[string][][]string) *zone {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	z := &zone{answers: answers, asked: map[dnsmessage.Question]int{}, silent: make(chan string, 16)}
	// A lookup that its caller has left goes on until its connection is closed.
	var queries []net.Conn
	z.resolver = &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		query, err := (&net.Dialer{}).DialContext(ctx, "udp", conn.LocalAddr().String())
		if err == nil {
			z.mu.Lock()
			defer z.mu.Unlock()
			queries = append(queries, query)
		}
		return query, err
	}}
	var wg sync.WaitGroup
	wg.Go(func() {
		query := make([]byte, 4096)
		for {
			n, client, err := conn.ReadFrom(query)
			if err != nil {
				return
			}
			if answer := z.answer(t, query[:n]); answer != nil {
				conn.WriteTo(answer, client)
			}
		}
	})
	t.Cleanup(func() {
		conn.Close()
		wg.Wait()
		z.mu.Lock()
		defer z.mu.Unlock()
		for _, query := range queries {
			query.Close()
		}
	})
	return z
}

func (z *zone) answer(t *testing.T, query []byte) []byte {
	var message dnsmessage.Message
	if err := message.Unpack(query); err != nil || len(message.Questions) != 1 {
		t.Errorf("query %q: %v", query, err)
		return nil
	}
	question := message.Questions[0]
	name := strings.TrimSuffix(question.Name.String(), ".")
	z.mu.Lock()
	defer z.mu.Unlock()
	answers, known := z.answers[name]
	message.Header = dnsmessage.Header{ID: message.ID, Response: true, Authoritative: true, RecursionAvailable: true}
	message.Additionals = nil
	if !known {
		message.RCode = dnsmessage.RCodeNameError
		return pack(t, message)
	}
	if len(answers) == 0 {
		select {
		case z.silent <- name:
		default:
		}
		return nil
	}
	turn := min(z.asked[question], len(answers)-1)
	z.asked[question]++
	for _, answer := range answers[turn] {
		addr := netip.MustParseAddr(answer)
		var body dnsmessage.ResourceBody
		switch {
		case question.Type == dnsmessage.TypeA && addr.Is4():
			body = &dnsmessage.AResource{A: addr.As4()}
		case question.Type == dnsmessage.TypeAAAA && addr.Is6():
			body = &dnsmessage.AAAAResource{AAAA: addr.As16()}
		default:
			continue
		}
		message.Answers = append(message.Answers, dnsmessage.Resource{
			Header: dnsmessage.ResourceHeader{Name: question.Name, Type: question.Type, Class: question.Class},
			Body:   body,
		})
	}
	return pack(t, message)
}

func pack(t *testing.T, message dnsmessage.Message) []byte {
	packed, err := message.Pack()
	if err != nil {
		t.Error(err)
	}
	return packed
}

// queries is how often the addresses of a name were asked for, by type.
func (z *zone) queries(name string, kind dnsmessage.Type) int {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.asked[dnsmessage.Question{Name: dnsmessage.MustNewName(name + "."), Type: kind, Class: dnsmessage.ClassINET}]
}

func dialString(ctx context.Context, d *Dialer, network, address string) (string, error) {
	conn, err := d.DialContext(ctx, network, address)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	greeting, err := io.ReadAll(conn)
	return string(greeting), err
}

func TestDial(t *testing.T) {
	const closedHost = "127.0.0.4"
	hosts := []string{shut, open, "127.0.0.3"}
	if listener, err := net.Listen("tcp6", "[::1]:0"); err == nil {
		listener.Close()
		hosts = append(hosts, "::1")
	} else if os.Getenv("CI") != "" {
		t.Fatalf("this host has no IPv6 loopback: %v", err)
	} else {
		t.Logf("without IPv6 loopback: %v", err)
	}
	ipv6 := len(hosts) == 4
	zone := newZone(t, map[string][][]string{
		"open.test":        {{open}},
		"shut.test":        {{shut}},
		"shuts.test":       {{shut, "127.0.0.3", "::1"}},
		"first.test":       {{shut, open}},
		"last.test":        {{open, shut}},
		"families.test":    {{"::1", open}},
		"six.test":         {{"::1"}},
		"closed.test":      {{shut, closedHost}},
		"nat64.test":       {{"64:ff9b::127.0.0.1"}},
		"mapped.test":      {{"::ffff:127.0.0.1"}},
		"unspecified.test": {{"0.0.0.0", "::"}},
	})
	const loopback = "127.0.0.0/8 (loopback) has to be opened by an entry of addresses.allow that lies within it"
	tests := map[string]struct {
		allow   []string
		network string
		host    string
		ipv6    bool
		want    string
		// wantDenied is the text of the *DeniedError, wantError what another
		// error is.
		wantDenied string
		wantError  error
	}{
		"an address that is allowed is connected to":      {host: open, want: open},
		"as IPv4-mapped too":                              {host: "::ffff:" + open, want: open},
		"a name of such an address is connected to":       {host: "open.test", want: open},
		"an IPv6 address that is allowed is connected to": {allow: []string{"::1/128"}, host: "::1", ipv6: true, want: "::1"},
		"a name of an IPv6 address that is allowed is":    {allow: []string{"::1/128"}, host: "six.test", ipv6: true, want: "::1"},
		"an address that isn't allowed isn't": {host: shut,
			wantDenied: `class "standard" does not allow the address 127.0.0.1: ` + loopback},
		"nor is an IPv4-mapped one": {host: "::ffff:127.0.0.1",
			wantDenied: `class "standard" does not allow the address 127.0.0.1: ` + loopback},
		"nor is a name of it": {host: "shut.test",
			wantDenied: `class "standard" does not allow the address 127.0.0.1 of "shut.test": ` + loopback},
		"nor is a name of it as IPv4-mapped": {host: "mapped.test",
			wantDenied: `class "standard" does not allow the address 127.0.0.1 of "mapped.test": ` + loopback},
		"nor is an address that leads to it": {host: "64:ff9b::127.0.0.1",
			wantDenied: `class "standard" does not allow the address 64:ff9b::7f00:1: it leads to 127.0.0.1 (NAT64), and ` + loopback},
		"nor is a name of one that leads to it": {host: "nat64.test",
			wantDenied: `class "standard" does not allow the address 64:ff9b::7f00:1 of "nat64.test": it leads to 127.0.0.1 (NAT64), and ` + loopback},
		"nor is the unspecified address, which is this host": {host: "0.0.0.0",
			wantDenied: `class "standard" does not allow the address 0.0.0.0: 0.0.0.0/8 (unspecified) has to be opened by an entry of addresses.allow that lies within it`},
		"nor is its IPv6 form": {host: "::",
			wantDenied: `class "standard" does not allow the address ::: ::/128 (unspecified) has to be opened by an entry of addresses.allow that lies within it`},
		"nor is a name of the unspecified address": {network: "tcp4", host: "unspecified.test",
			wantDenied: `class "standard" does not allow the address 0.0.0.0 of "unspecified.test": 0.0.0.0/8 (unspecified) has to be opened by an entry of addresses.allow that lies within it`},
		"nor is a name of several that aren't allowed": {network: "tcp4", host: "shuts.test",
			wantDenied: `class "standard" allows none of the 2 addresses of "shuts.test", 127.0.0.1 for one: ` + loopback},
		"nor is localhost": {network: "tcp4", host: "localhost",
			wantDenied: `class "standard" does not allow the address 127.0.0.1 of "localhost": ` + loopback},
		"of a name's addresses the denied are passed over":                  {host: "first.test", want: open},
		"whatever their order is":                                           {host: "last.test", want: open},
		"in the other family too":                                           {host: "families.test", want: open},
		"why an allowed address failed counts, not that another was denied": {allow: []string{closedHost + "/32"}, host: "closed.test", wantError: syscall.ECONNREFUSED},
		"an address that is allowed and refuses is said to refuse":          {allow: []string{closedHost + "/32"}, host: closedHost, wantError: syscall.ECONNREFUSED},
		"a name that doesn't exist is said not to":                          {host: "nowhere.test", wantError: &net.DNSError{IsNotFound: true}},
		"a name without addresses of the network's family has none":         {network: "tcp6", host: "open.test", wantError: &net.DNSError{IsNotFound: true}},
		"the system's sockets aren't dialled":                               {network: "unix", host: "/run/x.sock", wantError: net.UnknownNetworkError("unix")},
		"nor is IP itself":                                                  {network: "ip4:icmp", host: open, wantError: net.UnknownNetworkError("ip4:icmp")},
		"no host isn't taken for this one":                                  {host: "", wantError: &net.AddrError{}},
	}
	greeters := newGreeter(t, hosts...)
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if tt.ipv6 && !ipv6 {
				t.Skip("this host has no IPv6 loopback")
			}
			if tt.allow == nil {
				tt.allow = []string{"0.0.0.0/0", "::/0", open + "/32"}
			}
			if tt.network == "" {
				tt.network = "tcp"
			}
			before := greeters.count(shut)
			dialer := NewDialer(testAddresses(tt.allow...), DialerOptions{Resolver: zone.resolver})
			got, err := dialString(testContext(t), dialer, tt.network, net.JoinHostPort(tt.host, greeters.port))
			if got != tt.want {
				t.Errorf("connected to %q, want %q (error %v)", got, tt.want, err)
			}
			if after := greeters.count(shut); after != before {
				t.Errorf("%s was connected to %d times, want never", shut, after-before)
			}
			denied, _ := errors.AsType[*DeniedError](err)
			var dnsError *net.DNSError
			var addrError *net.AddrError
			switch want := tt.wantError.(type) {
			case *net.DNSError:
				if !errors.As(err, &dnsError) || dnsError.IsNotFound != want.IsNotFound {
					t.Errorf("error %v, want a DNS error with IsNotFound %t", err, want.IsNotFound)
				}
			case *net.AddrError:
				if !errors.As(err, &addrError) {
					t.Errorf("error %v, want an address error", err)
				}
			default:
				if tt.wantDenied == "" && !errors.Is(err, want) {
					t.Errorf("error %v, want %v", err, want)
				}
			}
			message := ""
			if denied != nil {
				message = err.Error()
			}
			if diff := cmp.Diff(tt.wantDenied, message); diff != "" {
				t.Errorf("denied (-want +got):\n%s\nerror %v", diff, err)
			}
		})
	}
}

// A name leads to an address that is allowed when it is first asked for, and to
// one that isn't from then on. To check an answer and then to dial the name
// would connect to the second.
func TestDialOfANameThatIsRebound(t *testing.T) {
	greeter := newGreeter(t, open, shut)
	for name, allow := range map[string][]string{
		"with a list of what is allowed": {open + "/32"},
		"with all allowed but protected": {"0.0.0.0/0", "::/0", open + "/32"},
	} {
		t.Run(name, func(t *testing.T) {
			zone := newZone(t, map[string][][]string{"rebound.test": {{open}, {shut}}})
			dialer := NewDialer(testAddresses(allow...), DialerOptions{Resolver: zone.resolver})
			address := net.JoinHostPort("rebound.test", greeter.port)

			got, err := dialString(testContext(t), dialer, "tcp", address)
			if err != nil || got != open {
				t.Fatalf("the first dial connected to %q (error %v), want %q", got, err, open)
			}
			if got := zone.queries("rebound.test", dnsmessage.TypeA); got != 1 {
				t.Errorf("one dial asked %d times for the address, want once", got)
			}
			for range 3 {
				got, err = dialString(testContext(t), dialer, "tcp", address)
				if err == nil {
					t.Fatalf("once rebound, the name was connected to, at %q", got)
				}
				assertDenied(t, err, "standard")
			}
			if got := greeter.count(shut); got != 0 {
				t.Errorf("%s was connected to %d times, want never", shut, got)
			}
		})
	}
}

func TestDialUDP(t *testing.T) {
	zone := newZone(t, map[string][][]string{"open.test": {{open}}, "shut.test": {{shut}}, "first.test": {{shut, open}}})
	server, err := net.ListenPacket("udp", open+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.LocalAddr().String())
	dialer := NewDialer(testAddresses(open+"/32"), DialerOptions{Resolver: zone.resolver})
	for _, host := range []string{open, "open.test", "first.test"} {
		conn, err := dialer.DialContext(testContext(t), "udp", net.JoinHostPort(host, port))
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		if _, err := io.WriteString(conn, host); err != nil {
			t.Errorf("%s: %v", host, err)
		}
		conn.Close()
		server.SetReadDeadline(time.Now().Add(dialTime))
		datagram := make([]byte, 64)
		n, _, err := server.ReadFrom(datagram)
		if err != nil || string(datagram[:n]) != host {
			t.Errorf("%s: got %q (error %v)", host, datagram[:n], err)
		}
	}
	for _, host := range []string{shut, "shut.test", "255.255.255.255", "224.0.0.1"} {
		conn, err := dialer.DialContext(testContext(t), "udp", net.JoinHostPort(host, port))
		if err == nil {
			conn.Close()
		}
		assertDenied(t, err, "standard")
	}
}

func TestDialEndsWithItsContext(t *testing.T) {
	zone := newZone(t, map[string][][]string{"silent.test": {}})
	ctx, cancel := context.WithCancel(testContext(t))
	done := make(chan error, 1)
	go func() {
		_, err := NewDialer(testAddresses(), DialerOptions{Resolver: zone.resolver}).DialContext(ctx, "tcp", "silent.test:80")
		done <- err
	}()
	<-zone.silent
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want %v", err, context.Canceled)
	}

	_, err := NewDialer(testAddresses(open+"/32"), DialerOptions{}).DialContext(ctx, "tcp", net.JoinHostPort(open, "80"))
	if !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: error %v, want %v", err, context.Canceled)
	}
}

func TestDialWithoutClass(t *testing.T) {
	greeter := newGreeter(t, shut)
	for _, host := range []string{shut, "localhost"} {
		_, err := dialString(testContext(t), NewDialer(nil, DialerOptions{}), "tcp4", net.JoinHostPort(host, greeter.port))
		assertDenied(t, err, "")
	}
	if got := greeter.count(shut); got != 0 {
		t.Errorf("connected %d times, want never", got)
	}
}

func TestDialsAtOnce(t *testing.T) {
	greeter := newGreeter(t, open, shut)
	zone := newZone(t, map[string][][]string{"both.test": {{shut, open, "::1"}}, "shut.test": {{shut, "::1"}}})
	dialer := NewDialer(testAddresses("0.0.0.0/0", "::/0", open+"/32"), DialerOptions{Resolver: zone.resolver})
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			name := []string{"both.test", "shut.test"}[i%2]
			got, err := dialString(testContext(t), dialer, "tcp", net.JoinHostPort(name, greeter.port))
			_, denied := errors.AsType[*DeniedError](err)
			if wantDenied := i%2 == 1; denied != wantDenied || !denied && got != open {
				t.Errorf("dial %d of %s: connected to %q, error %v", i, name, got, err)
			}
		})
	}
	wg.Wait()
	if got := greeter.count(shut); got != 0 {
		t.Errorf("%s was connected to %d times, want never", shut, got)
	}
}
