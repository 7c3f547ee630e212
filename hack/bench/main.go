//go:build linux

// Command bench measures our server beside its peers, each figure beside the
// peer's in one run, and prints tables in Markdown. Its arguments are the parts
// to measure, all of them if there are none but the last:
//
//	api      the API at scale, beside k8s.io/sample-apiserver
//	forward  port-forwards, beside client-go's, bare TLS relays and ssh -L
//	exec     exec, beside k8s.io/cri-streaming
//	idle     what sessions occupy in which nothing happens
//	latency  the first bytes of execs and port-forwards, beside a bare GET
//	soak     every kind of session for ten minutes: what the server occupies
//	         after that, beside before. Only if it is asked for
//
// What is compared is measured by turns, round by round: what disturbs the
// machine then disturbs all. A figure is the median of the rounds, a ratio the
// median of the rounds' own ratios.
//
// In the part api, both servers are processes of their own on loopback, started
// with the same flags, with delegated authentication and authorization, and asked
// directly, not through the aggregator, by the same client certificate of an
// administrator.
//
// It ends all that it started, also when it is interrupted.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"
)

func main() {
	if len(os.Args) > 1 {
		if role := roles[os.Args[1]]; role != nil {
			if err := role(os.Args[2:]); err != nil {
				fmt.Fprintln(os.Stderr, os.Args[1]+":", err)
				os.Exit(1)
			}
			return
		}
	}
	// client-go logs what its callers are told, too.
	klog.SetLogger(logr.Discard())
	// What is started here ends with this thread.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// Who signals again doesn't want to wait: the kernel ends what is left.
	context.AfterFunc(ctx, stop)
	var o options
	flag.StringVar(&o.bin, "bin-dir", "bin", "where the programs are: aaserver, bench-sample-apiserver and controlplane/")
	flag.IntVar(&o.rounds, "rounds", 5, "how many rounds are measured")
	flag.IntVar(&o.objects, "objects", 10000, "how many objects are listed and watched")
	flag.IntVar(&o.size.writes, "writes", 1000, "how many objects are created, updated and deleted in a round")
	flag.IntVar(&o.size.reads, "reads", 2000, "how many objects are got in a round")
	flag.IntVar(&o.size.events, "events", 200, "how many updates the watchers see in a round")
	flag.StringVar(&o.profiles, "profiles", "", "a directory for a CPU profile of each operation of each server, taken after the rounds, and heap profiles")
	o.logs.addFlags()
	flag.DurationVar(&o.soak, "soak", 10*time.Minute, "how long the part soak uses the server")
	flag.Parse()
	if err := o.run(ctx, os.Stdout); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	bin             string
	rounds, objects int
	size            sizes
	profiles        string
	soak            time.Duration
	logs            logsOptions
}

// soakPart is measured only if it is named.
const soakPart = "soak"

// part measures something, and prints it. dir is for what it stores.
type part struct {
	name string
	run  func(ctx context.Context, o options, dir string, out io.Writer) error
}

// parts are what can be measured, in this order.
var parts = []part{
	{"api", measureAPI},
	{"forward", measureForward},
	{"exec", measureExec},
	{"idle", measureIdle},
	{"latency", measureLatency},
	{"logs", measureLogs},
	{soakPart, measureSoak},
}

func (o *options) validate(chosen []string) error {
	for _, name := range chosen {
		if !slices.ContainsFunc(parts, func(p part) bool { return p.name == name }) {
			return fmt.Errorf("there is no part %q", name)
		}
	}
	switch {
	case o.rounds < 1 || o.objects < 1 || o.size.writes < 1 || o.size.reads < 1 || o.size.events < 1:
		return errors.New("every number must be at least 1")
	case o.soak <= 0:
		return errors.New("-soak must be longer than nothing")
	case o.size.events > o.objects:
		return errors.New("-events can't be more than -objects")
	}
	return nil
}

// bench is a run.
type bench struct {
	options
	out        io.Writer
	ours, peer *server
	variants   []*variant // the peer's first
	small      group
	realistic  group
	memory     []memoryRow
	samples    map[string]map[string][]sample // by operation and variant
}

// group is what is compared with each other: objects of one size, which is
// that of the answer in JSON, managed fields included.
type group struct {
	size           int
	peer           *variant
	json, protobuf *variant
}

// smallSize is the size in bytes that objects of all kinds are padded to.
const smallSize = 2048

func (o *options) run(ctx context.Context, out io.Writer) (err error) {
	chosen := flag.Args()
	if err := o.validate(chosen); err != nil {
		return err
	}
	// A program in the working directory is none that is looked for elsewhere.
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for _, p := range parts {
		wanted := slices.Contains(chosen, p.name) || len(chosen) == 0 && p.name != soakPart
		if !wanted {
			continue
		}
		own := filepath.Join(dir, p.name)
		if err := os.Mkdir(own, 0o755); err != nil {
			return err
		}
		if err := p.run(ctx, *o, own, out); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

// measureAPI sets our server beside the peer's.
func measureAPI(ctx context.Context, o options, dir string, out io.Writer) error {
	plane, info, err := startControlPlane(ctx, filepath.Join(o.bin, "controlplane", "controlplane"), dir)
	if err != nil {
		return err
	}
	defer plane.stop()

	b := &bench{options: o, out: out, samples: map[string]map[string][]sample{}}
	b.ours = &server{name: "aaserver", program: filepath.Join(o.bin, "aaserver"), args: []string{"serve"}, plane: info, dir: dir}
	b.peer = &server{name: "sample-apiserver", program: filepath.Join(o.bin, "bench-sample-apiserver"), plane: info, dir: dir}
	for _, s := range []*server{b.peer, b.ours} {
		if err := s.start(ctx); err != nil {
			return err
		}
		defer s.stop()
	}
	begin := time.Now()
	if err := b.fill(ctx); err != nil {
		return err
	}
	logf("filled after %s", time.Since(begin).Round(time.Second))
	for round := range o.rounds {
		if err := b.round(ctx, round); err != nil {
			return err
		}
		logf("round %d of %d after %s", round+1, o.rounds, time.Since(begin).Round(time.Second))
	}
	if err := b.remember(ctx, whenDone, b.peer, b.ours); err != nil {
		return err
	}
	if err := b.report(ctx); err != nil {
		return err
	}
	if o.profiles == "" {
		return nil
	}
	return b.profile(ctx)
}

func logf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "bench: "+format+"\n", args...)
}

// memoryRow is what the servers occupied at one moment.
type memoryRow struct {
	when   string
	server map[*server]memory
}

func (b *bench) remember(ctx context.Context, when string, servers ...*server) error {
	row := memoryRow{when, map[*server]memory{}}
	for _, s := range servers {
		m, err := s.memory(ctx)
		if err != nil {
			return err
		}
		row.server[s] = m
	}
	b.memory = append(b.memory, row)
	return nil
}

const (
	whenEmpty   = "just started, with nothing stored"
	whenWritten = "after the small objects were created"
	whenSmall   = "started again, with the small objects"
	whenLarge   = "started again, with small and large objects"
	whenDone    = "after the benchmark"
)

// fill creates what is listed and watched, and looks at the memory meanwhile.
func (b *bench) fill(ctx context.Context) error {
	if err := b.createNamespaces(ctx); err != nil {
		return err
	}
	if err := b.createClass(ctx); err != nil {
		return err
	}
	const json, protobuf = kruntime.ContentTypeJSON, kruntime.ContentTypeProtobuf
	b.small = group{
		size:     smallSize,
		peer:     &variant{name: "sample-apiserver", server: b.peer, resource: flunders{}, mediaType: json, namespace: "bench-s", scratch: "bench-1"},
		json:     &variant{name: "ours, JSON", server: b.ours, resource: targets{}, mediaType: json, namespace: "bench-s", scratch: "bench-2"},
		protobuf: &variant{name: "ours, protobuf", server: b.ours, resource: targets{}, mediaType: protobuf, namespace: "bench-s", scratch: "bench-3"},
	}
	b.realistic = group{
		peer:     &variant{name: "sample-apiserver, large", server: b.peer, resource: flunders{}, mediaType: json, namespace: "bench-l", scratch: "bench-4"},
		json:     &variant{name: "realistic, JSON", server: b.ours, resource: targets{realistic: true}, mediaType: json, namespace: "bench-l", scratch: "bench-5"},
		protobuf: &variant{name: "realistic, protobuf", server: b.ours, resource: targets{realistic: true}, mediaType: protobuf, namespace: "bench-l", scratch: "bench-6"},
	}
	b.variants = []*variant{
		b.small.peer, b.small.json, b.small.protobuf,
		b.realistic.peer, b.realistic.json, b.realistic.protobuf,
	}
	for _, v := range b.variants {
		v.objects = b.objects
	}
	// Realistic targets are as large as they are, the peer's are made so.
	var err error
	if b.realistic.size, err = b.realistic.json.objectSize(ctx); err != nil {
		return err
	}
	for v, size := range map[*variant]int{
		b.small.peer: b.small.size, b.small.json: b.small.size, b.realistic.peer: b.realistic.size,
	} {
		if v.padding, err = v.pad(ctx, size); err != nil {
			return err
		}
	}
	b.small.protobuf.padding = b.small.json.padding

	if err := b.remember(ctx, whenEmpty, b.peer, b.ours); err != nil {
		return err
	}
	if err := b.fillGroup(ctx, b.small); err != nil {
		return err
	}
	if err := b.remember(ctx, whenWritten, b.peer, b.ours); err != nil {
		return err
	}
	if err := b.restart(ctx, whenSmall, b.peer, b.ours); err != nil {
		return err
	}
	if err := b.fillGroup(ctx, b.realistic); err != nil {
		return err
	}
	return b.restart(ctx, whenLarge, b.peer, b.ours)
}

func (b *bench) fillGroup(ctx context.Context, g group) error {
	for _, v := range []*variant{g.peer, g.json} {
		if err := v.create(ctx, v.namespace, v.objects); err != nil {
			return err
		}
	}
	return nil
}

// restart starts servers again: what they occupy then is what is stored, not
// the history of how it came there.
func (b *bench) restart(ctx context.Context, when string, servers ...*server) error {
	for _, s := range servers {
		s.stop()
		if err := s.start(ctx); err != nil {
			return err
		}
		for _, v := range b.variants {
			if v.server != s {
				continue
			}
			// Until its cache is filled, it answers that there are too many
			// requests.
			err := s.wait(ctx, func(ctx context.Context) error {
				return s.client.drop(ctx, request{path: v.resource.collection(v.namespace) + "?resourceVersion=0", accept: v.mediaType})
			})
			if err != nil {
				return err
			}
		}
	}
	return b.remember(ctx, when, servers...)
}

func (b *bench) createNamespaces(ctx context.Context) error {
	main, err := newClient(b.ours.plane.APIServerURL, b.ours.plane.ClusterCA.CertFile, b.ours.plane.Admin)
	if err != nil {
		return err
	}
	defer main.http.CloseIdleConnections()
	for _, name := range []string{"bench-s", "bench-l", "bench-1", "bench-2", "bench-3", "bench-4", "bench-5", "bench-6"} {
		body := fmt.Appendf(nil, `{"apiVersion":"v1","kind":"Namespace","metadata":{"name":%q}}`, name)
		if err := main.drop(ctx, request{method: http.MethodPost, path: "/api/v1/namespaces", body: body, mediaType: kruntime.ContentTypeJSON}); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) createClass(ctx context.Context) error {
	class := class()
	body, err := json.Marshal(class)
	if err != nil {
		return err
	}
	return b.ours.client.drop(ctx, request{
		method: http.MethodPost, path: "/apis/" + class.APIVersion + "/targetclasses", body: body, mediaType: kruntime.ContentTypeJSON,
	})
}

// objectSize creates an object, returns how large it is and deletes it again.
func (v *variant) objectSize(ctx context.Context) (size int, err error) {
	if err := v.create(ctx, v.scratch, 1); err != nil {
		return 0, err
	}
	path := v.path(v.scratch, objectName(0))
	body, err := v.server.client.do(ctx, request{path: path, accept: kruntime.ContentTypeJSON})
	if err != nil {
		return 0, err
	}
	return len(body), v.server.client.drop(ctx, request{method: http.MethodDelete, path: path})
}

// pad returns how much padding makes an object that large in JSON.
func (v *variant) pad(ctx context.Context, want int) (int, error) {
	size, err := v.objectSize(ctx)
	if err != nil {
		return 0, err
	}
	if size > want {
		return 0, fmt.Errorf("%s: an object has %d bytes, want %d at most", v.name, size, want)
	}
	return want - size, nil
}

// create creates objects with their status.
func (v *variant) create(ctx context.Context, namespace string, count int) error {
	requests, err := v.creates(namespace, count)
	if err != nil {
		return err
	}
	if err := v.send(ctx, requests); err != nil {
		return err
	}
	if !v.resource.withStatus(v.resource.object(objectName(0), 0)) {
		return nil
	}
	for i := range requests {
		obj := v.resource.object(objectName(i), v.padding)
		v.resource.withStatus(obj)
		if requests[i], err = v.put(obj, namespace, "/status"); err != nil {
			return err
		}
	}
	return v.send(ctx, requests)
}

// round measures every operation with every variant, one after the other.
func (b *bench) round(ctx context.Context, round int) error {
	for _, op := range operations {
		for i := range b.variants {
			// No one is always the first.
			v := b.variants[(i+round)%len(b.variants)]
			s, err := measure(ctx, op, v, b.size)
			if err != nil {
				return err
			}
			if b.samples[op.name] == nil {
				b.samples[op.name] = map[string][]sample{}
			}
			b.samples[op.name][v.name] = append(b.samples[op.name][v.name], s)
		}
	}
	return nil
}

// profileSeconds is how long each operation is profiled.
const profileSeconds = 5

// profile stores profiles of the CPU for each operation, and of the heap.
func (b *bench) profile(ctx context.Context) error {
	if err := os.MkdirAll(b.profiles, 0o755); err != nil {
		return err
	}
	file := func(name string) string {
		return filepath.Join(b.profiles, strings.NewReplacer(", ", "-", " ", "-", "'", "").Replace(name)+".pb.gz")
	}
	for _, v := range b.variants {
		for _, op := range operations {
			if op.name == "delete" || op.name == "update" {
				continue // they go with create
			}
			work := func() error {
				_, err := measure(ctx, op, v, b.size)
				return err
			}
			if op.name == "create" {
				work = func() error {
					for _, op := range operations[:3] {
						if _, err := measure(ctx, op, v, b.size); err != nil {
							return err
						}
					}
					return nil
				}
			}
			if err := v.server.profile(ctx, file(op.name+" "+v.name), profileSeconds, work); err != nil {
				return err
			}
		}
	}
	for _, s := range []*server{b.peer, b.ours} {
		heap, err := s.client.do(ctx, request{path: "/debug/pprof/heap?gc=1"})
		if err != nil {
			return err
		}
		if err := os.WriteFile(file("heap "+s.name), heap, 0o644); err != nil {
			return err
		}
	}
	return nil
}
