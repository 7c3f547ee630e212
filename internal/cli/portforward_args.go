package cli

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	netutils "k8s.io/utils/net"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/streaming"
)

// forward leads connections from one side to the other.
type forward struct {
	// local is where to listen, or, of a reverse forward, what to connect to.
	local localEnd
	// remote is what to connect to, or, of a reverse forward, where to listen.
	remote  streaming.Endpoint
	reverse bool
	// anyPort says that a reverse forward may listen on any port.
	anyPort bool
}

// String writes it as kubectl does in its errors.
func (f forward) String() string { return fmt.Sprintf("{%s %s}", f.local, endpointName(f.remote)) }

// endpointName writes an end on the target's side as users do.
func endpointName(e streaming.Endpoint) string {
	if e.Network == "unix" {
		return e.Path
	}
	return withProtocol(e.Network, strconv.Itoa(int(e.Port)))
}

// forwardArg is a forward of the command line. Its remote port may be a name
// still.
type forwardArg struct {
	forward
	// sameLocal says that no local end was given: it is the remote port's
	// number.
	sameLocal bool
	// name is the remote port's. Then the remote network is "" if none was
	// given: it is the port's own.
	name string
}

// isTarget says whether an argument is another target: one with its type. What
// has a colon is a forward, be it from a socket in a directory of that name.
func isTarget(arg string) bool {
	kind, _, slash := strings.Cut(arg, "/")
	return slash && targetTypes[strings.ToLower(kind)] && !strings.Contains(arg, ":")
}

// parseForwards reads the arguments: a target, what is forwarded to it, and
// further targets with their type, each followed by its own. Reverse forwards
// are those of -R, instance is that of --instance.
func parseForwards(args, reverse []string, instance string) ([]*forwardedTarget, error) {
	var targets []*forwardedTarget
	for i, arg := range args {
		if i == 0 || isTarget(arg) {
			r, err := parseRef(arg, instance)
			if err != nil {
				return nil, err
			}
			targets = append(targets, &forwardedTarget{ref: r})
			continue
		}
		parsed, err := parseForward(arg)
		if err != nil {
			return nil, err
		}
		last := targets[len(targets)-1]
		last.args = append(last.args, parsed)
	}
	for _, arg := range reverse {
		target := targets[0]
		name, rest, named := strings.Cut(arg, "=")
		// A path may have such a sign in it, which comes after the port then.
		if named && !strings.Contains(name, ":") {
			i := slices.IndexFunc(targets, func(t *forwardedTarget) bool { return name == t.target || name == t.String() })
			if i < 0 {
				return nil, fmt.Errorf("invalid reverse forward '%s': %q is none of the targets on the command line", arg, name)
			}
			target, arg = targets[i], rest
		}
		parsed, err := parseReverse(arg)
		if err != nil {
			return nil, err
		}
		target.args = append(target.args, parsed)
	}
	if len(targets) > 1 && instance != "" {
		return nil, errors.New("--instance goes with one target: with several, name instances as in target/web/web-1")
	}
	for _, target := range targets {
		target.several = len(targets) > 1
		if len(target.args) == 0 {
			return nil, fmt.Errorf("nothing is forwarded for target %q: name ports, as in '%[1]s 8080:80', or reverse forwards by -R", target.String())
		}
	}
	return targets, nil
}

// parseForward reads [LOCAL:]REMOTE.
func parseForward(arg string) (forwardArg, error) {
	var f forwardArg
	local, remote := "", arg
	given := false
	// A remote path begins with a slash. A local one may have a colon in it,
	// but no port has.
	i := strings.Index(arg, ":/")
	if i < 0 {
		i = strings.LastIndex(arg, ":")
	}
	if i >= 0 {
		local, remote, given = arg[:i], arg[i+1:], true
	}
	if remote == "" || strings.Contains(local, ":") && !strings.Contains(local, "/") {
		return f, fmt.Errorf("invalid port format '%s'", arg)
	}
	if strings.HasPrefix(remote, "/") {
		if !given {
			return f, fmt.Errorf("invalid forward '%s': a socket on the target's side needs a local end, as in '8080:%[1]s' or ':%[1]s'", arg)
		}
		if path.Clean(remote) != remote {
			return f, fmt.Errorf("invalid remote socket '%s': the path of a socket is written in its shortest form, %s", remote, path.Clean(remote))
		}
		f.remote = streaming.Endpoint{Network: "unix", Path: remote}
	} else {
		port, protocol, named := strings.Cut(remote, "/")
		if named && protocol != "tcp" && protocol != "udp" {
			return f, fmt.Errorf("invalid protocol '%s' of port '%s': expected tcp or udp", protocol, remote)
		}
		// The name of a port has a letter in it; anything else is meant to be
		// a number.
		if strings.ContainsAny(strings.ToLower(port), "abcdefghijklmnopqrstuvwxyz") {
			f.name, f.remote.Network = port, protocol
		} else {
			number, err := strconv.ParseUint(port, 10, 16)
			if err != nil || number == 0 {
				return f, fmt.Errorf("invalid remote port '%s': expected a number from 1 to 65535, the name of one of the target's ports, or the absolute path of a socket", port)
			}
			f.remote = streaming.Endpoint{Network: cmp.Or(protocol, "tcp"), Port: uint16(number)}
		}
	}
	f.sameLocal = !given
	switch {
	case strings.Contains(local, "/"):
		if f.remote.Network == "udp" {
			return f, errNoDatagrams(local)
		}
		f.local = localEnd{network: "unix", path: local}
	case local != "":
		number, err := strconv.ParseUint(local, 10, 16)
		if err != nil {
			return f, fmt.Errorf("invalid local port '%s': expected a number from 0 to 65535, where 0 is a random port, or the path of a socket with a slash in it", local)
		}
		f.local.port = uint16(number)
	}
	return f, nil
}

// errNoDatagrams refuses UDP over a unix socket, which carries streams.
func errNoDatagrams(path string) error {
	return fmt.Errorf("the local socket %s can't be forwarded to a UDP port: it carries connections, not datagrams", path)
}

// parseReverse reads REMOTE_PORT:LOCAL.
func parseReverse(arg string) (forwardArg, error) {
	f := forwardArg{forward: forward{reverse: true, remote: streaming.Endpoint{Network: "tcp"}}}
	remote, local, ok := strings.Cut(arg, ":")
	if !ok || local == "" {
		return f, fmt.Errorf("invalid reverse forward '%s': expected REMOTE_PORT:LOCAL, as in 9000:3000, 9000:localhost:3000 or 9000:/tmp/app.sock", arg)
	}
	number, err := strconv.ParseUint(remote, 10, 16)
	if err != nil {
		return f, fmt.Errorf("invalid remote port '%s' of the reverse forward '%s': expected a number from 0 to 65535, where 0 is any free port", remote, arg)
	}
	f.remote.Port, f.anyPort = uint16(number), number == 0
	if strings.Contains(local, "/") {
		f.local = localEnd{network: "unix", path: local}
		return f, nil
	}
	host, port := "localhost", local
	if i := strings.LastIndex(local, ":"); i >= 0 {
		host, port = strings.Trim(local[:i], "[]"), local[i+1:]
	}
	number, err = strconv.ParseUint(port, 10, 16)
	if err != nil || number == 0 || host == "" {
		return f, fmt.Errorf("invalid local end '%s' of the reverse forward '%s': expected a port, HOST:PORT or the path of a socket with a slash in it", local, arg)
	}
	f.local = localEnd{network: "tcp", host: host, port: uint16(number)}
	return f, nil
}

// resolve finds named ports in the target's spec. target may be nil if no port
// is named.
func resolve(args []forwardArg, target *v1.Target) ([]forward, error) {
	forwards := make([]forward, 0, len(args))
	for _, arg := range args {
		f := arg.forward
		if arg.name != "" {
			var err error
			if f.remote, err = namedPort(target, arg.name, f.remote.Network); err != nil {
				return nil, err
			}
		}
		switch {
		case f.local.network != "":
			if f.remote.Network == "udp" && f.local.network == "unix" {
				return nil, errNoDatagrams(f.local.path)
			}
		case f.remote.Network == "udp":
			f.local.network = "udp"
		default:
			f.local.network = "tcp"
		}
		if arg.sameLocal {
			f.local.port = f.remote.Port
		}
		forwards = append(forwards, f)
	}
	return forwards, nil
}

func namedPort(target *v1.Target, name, network string) (streaming.Endpoint, error) {
	var known []string
	for _, port := range target.Spec.Ports {
		own := strings.ToLower(string(cmp.Or(port.Protocol, v1.ProtocolTCP)))
		if port.Name == name {
			if network != "" && network != own {
				return streaming.Endpoint{}, fmt.Errorf("port %q of target %q is a %s port", name, target.Name, strings.ToUpper(own))
			}
			return streaming.Endpoint{Network: own, Port: uint16(port.Port)}, nil
		}
		known = append(known, fmt.Sprintf("%s (%s)", port.Name, withProtocol(own, strconv.Itoa(int(port.Port)))))
	}
	switch len(known) {
	case 0:
		return streaming.Endpoint{}, fmt.Errorf("target %q has no port named %q: it lists no ports", target.Name, name)
	case 1:
		return streaming.Endpoint{}, fmt.Errorf("target %q has no port named %q: its only port is %s", target.Name, name, known[0])
	}
	return streaming.Endpoint{}, fmt.Errorf("target %q has no port named %q: its ports are %s", target.Name, name, strings.Join(known, ", "))
}

// listenAddress is a local address to listen on.
type listenAddress struct {
	// family is "4" or "6".
	family, host string
	// alternative says that it is one of those that localhost stands for, of
	// which one is enough.
	alternative bool
}

func parseAddresses(args []string) ([]listenAddress, error) {
	var addresses []listenAddress
	seen := map[string]bool{}
	add := func(a listenAddress) {
		if !seen[a.host] {
			seen[a.host] = true
			addresses = append(addresses, a)
		}
	}
	for _, arg := range args {
		ip := netutils.ParseIPSloppy(arg)
		switch {
		case arg == "localhost":
			add(listenAddress{family: "4", host: "127.0.0.1", alternative: true})
			add(listenAddress{family: "6", host: "::1", alternative: true})
		case ip == nil:
			return nil, fmt.Errorf("%s is not a valid IP", arg)
		case ip.To4() != nil:
			add(listenAddress{family: "4", host: arg})
		default:
			add(listenAddress{family: "6", host: arg})
		}
	}
	if len(addresses) == 0 {
		return nil, errors.New("you must specify at least 1 address")
	}
	return addresses, nil
}
