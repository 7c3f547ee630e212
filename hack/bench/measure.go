//go:build linux

package main

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
)

const (
	clients  = 16
	page     = 500
	lists    = 3
	watchers = 100
	// initialWatchers each get the whole list.
	initialWatchers = 4
)

// variant is one column of the table: a server, a kind of object and an
// encoding.
type variant struct {
	name      string
	server    *server
	resource  resource
	mediaType string
	// namespace holds the objects that are listed and watched, scratch those
	// that are written and deleted again.
	namespace, scratch string
	padding            int
	// objects is how many namespace holds.
	objects int
}

// sample is what one operation cost: how long it took and how much processor
// time of the server, in seconds.
type sample struct{ wall, cpu float64 }

// operation is one line of the table. prepare does what isn't measured, and
// returns what is, with how many times it does the operation.
type operation struct {
	name    string
	unit    string
	prepare func(ctx context.Context, v *variant, size sizes) (run func() error, count int, err error)
}

// sizes is how much is done in one round.
type sizes struct{ writes, reads, events int }

// measure prepares an operation and does it.
func measure(ctx context.Context, op operation, v *variant, size sizes) (sample, error) {
	run, count, err := op.prepare(ctx, v, size)
	if err != nil {
		return sample{}, fmt.Errorf("%s, %s: preparing it: %w", op.name, v.name, err)
	}
	before, err := v.server.cpu()
	if err != nil {
		return sample{}, err
	}
	begin := time.Now()
	if err := run(); err != nil {
		return sample{}, fmt.Errorf("%s, %s: %w", op.name, v.name, err)
	}
	wall := time.Since(begin)
	after, err := v.server.cpu()
	if err != nil {
		return sample{}, err
	}
	return sample{wall.Seconds() / float64(count), (after - before).Seconds() / float64(count)}, nil
}

// operations are in an order in which one leaves what the next one needs.
var operations = []operation{
	{"create", "creates/s", prepareCreate},
	{"update", "updates/s", prepareUpdate},
	{"delete", "deletes/s", prepareDelete},
	{"get", "gets/s", prepareGet},
	{"list, from the cache", "lists/s", prepareList(request{}, "?resourceVersion=0")},
	{"list, consistent", "lists/s", prepareList(request{}, "")},
	{"list, consistent, gzip", "lists/s", prepareList(request{gzip: true}, "")},
	{"list, as kubectl's table", "lists/s", prepareTable},
	{"list, in pages of 500", "lists/s", preparePages},
	{"watch, initial events", "events/s", prepareInitialEvents},
	{"watch, updates to 100 watchers", "events/s", prepareEvents},
}

// inParallel calls do for the numbers below count, from as many goroutines as
// there are clients.
func inParallel(ctx context.Context, count int, do func(ctx context.Context, i int) error) error {
	group, ctx := errgroup.WithContext(ctx)
	var next atomic.Int64
	for range clients {
		group.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= count || ctx.Err() != nil {
					return ctx.Err()
				}
				if err := do(ctx, i); err != nil {
					return err
				}
			}
		})
	}
	return group.Wait()
}

// send sends requests that were made before, so that the client does as little
// as possible while it is measured.
func (v *variant) send(ctx context.Context, requests []request) error {
	return inParallel(ctx, len(requests), func(ctx context.Context, i int) error {
		return v.server.client.drop(ctx, requests[i])
	})
}

func objectName(i int) string { return fmt.Sprintf("target-%06d", i) }

func (v *variant) path(namespace, name string) string {
	return v.resource.collection(namespace) + "/" + name
}

func (v *variant) creates(namespace string, count int) ([]request, error) {
	requests := make([]request, count)
	for i := range requests {
		body, err := v.resource.encode(v.resource.object(objectName(i), v.padding), v.mediaType)
		if err != nil {
			return nil, err
		}
		requests[i] = request{method: http.MethodPost, path: v.resource.collection(namespace), body: body, mediaType: v.mediaType}
	}
	return requests, nil
}

func prepareCreate(ctx context.Context, v *variant, size sizes) (func() error, int, error) {
	requests, err := v.creates(v.scratch, size.writes)
	return func() error { return v.send(ctx, requests) }, size.writes, err
}

// changes counts what updates write, so that none writes what is there already.
var changes atomic.Int64

// updates changes an annotation of the first objects of a namespace, at the
// versions that they have now.
func (v *variant) updates(ctx context.Context, namespace string, count int) ([]request, error) {
	body, err := v.server.client.do(ctx, request{
		path: v.resource.collection(namespace) + "?limit=" + strconv.Itoa(count), mediaType: runtime.ContentTypeJSON,
	})
	if err != nil {
		return nil, err
	}
	objects, err := v.resource.decodeList(body)
	if err != nil {
		return nil, err
	}
	if len(objects) != count {
		return nil, fmt.Errorf("%d objects in %s, want %d", len(objects), namespace, count)
	}
	requests := make([]request, count)
	for i, obj := range objects {
		annotations := obj.GetAnnotations()
		annotations[changedKey] = fmt.Sprintf("%08d", changes.Add(1)%1e8)
		if requests[i], err = v.put(obj, namespace, ""); err != nil {
			return nil, err
		}
	}
	return requests, nil
}

func (v *variant) put(obj metav1.Object, namespace, subresource string) (request, error) {
	body, err := v.resource.encode(obj, v.mediaType)
	return request{method: http.MethodPut, path: v.path(namespace, obj.GetName()) + subresource, body: body, mediaType: v.mediaType}, err
}

func prepareUpdate(ctx context.Context, v *variant, size sizes) (func() error, int, error) {
	requests, err := v.updates(ctx, v.scratch, size.writes)
	return func() error { return v.send(ctx, requests) }, size.writes, err
}

func prepareDelete(ctx context.Context, v *variant, size sizes) (func() error, int, error) {
	requests := make([]request, size.writes)
	for i := range requests {
		requests[i] = request{method: http.MethodDelete, path: v.path(v.scratch, objectName(i)), accept: v.mediaType}
	}
	return func() error { return v.send(ctx, requests) }, size.writes, nil
}

func prepareGet(ctx context.Context, v *variant, size sizes) (func() error, int, error) {
	requests := make([]request, size.reads)
	for i := range requests {
		requests[i] = request{path: v.path(v.namespace, objectName(i*7%v.objects)), accept: v.mediaType}
	}
	return func() error { return v.send(ctx, requests) }, size.reads, nil
}

func prepareList(like request, query string) func(context.Context, *variant, sizes) (func() error, int, error) {
	return func(ctx context.Context, v *variant, _ sizes) (func() error, int, error) {
		r := like
		r.path = v.resource.collection(v.namespace) + query
		if r.accept == "" {
			r.accept = v.mediaType
		}
		return func() error {
			for range lists {
				if err := v.server.client.drop(ctx, r); err != nil {
					return err
				}
			}
			return nil
		}, lists, nil
	}
}

// prepareTable asks for what kubectl get prints. It has it in JSON always.
func prepareTable(ctx context.Context, v *variant, size sizes) (func() error, int, error) {
	like := request{accept: "application/json;as=Table;v=v1;g=meta.k8s.io"}
	return prepareList(like, "")(ctx, v, size)
}

func preparePages(ctx context.Context, v *variant, _ sizes) (func() error, int, error) {
	return func() error {
		for range lists {
			pages, next := 0, ""
			for {
				body, err := v.server.client.do(ctx, request{
					path:   v.resource.collection(v.namespace) + "?limit=" + strconv.Itoa(page) + "&continue=" + next,
					accept: v.mediaType,
				})
				if err != nil {
					return err
				}
				meta, err := listMeta(body, v.mediaType)
				if err != nil {
					return err
				}
				pages++
				if next = meta.Continue; next == "" {
					break
				}
			}
			if want := (v.objects + page - 1) / page; pages != want {
				return fmt.Errorf("%d pages, want %d", pages, want)
			}
		}
		return nil
	}, lists, nil
}

// initialEventsEnd is the annotation of the bookmark behind the initial events.
var initialEventsEnd = []byte(metav1.InitialEventsAnnotationKey)

func prepareInitialEvents(ctx context.Context, v *variant, _ sizes) (func() error, int, error) {
	query := "?watch=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
	return func() error {
		group, ctx := errgroup.WithContext(ctx)
		for range initialWatchers {
			group.Go(func() error {
				connection := v.server.client.connection()
				defer connection.CloseIdleConnections()
				return v.watch(ctx, watch{via: connection, query: query, events: v.objects, bookmark: true})
			})
		}
		return group.Wait()
	}, initialWatchers * v.objects, nil
}

func prepareEvents(ctx context.Context, v *variant, size sizes) (func() error, int, error) {
	requests, err := v.updates(ctx, v.namespace, size.events)
	if err != nil {
		return nil, 0, err
	}
	body, err := v.server.client.do(ctx, request{path: v.resource.collection(v.namespace) + "?limit=1", accept: runtime.ContentTypeJSON})
	if err != nil {
		return nil, 0, err
	}
	meta, err := listMeta(body, runtime.ContentTypeJSON)
	if err != nil {
		return nil, 0, err
	}
	group, watching := errgroup.WithContext(ctx)
	started := make(chan struct{})
	// No more updates are under way than there are clients, until every watcher
	// has seen them: the server ends watches that don't keep up.
	underWay := make(chan struct{}, clients)
	seen := make([]atomic.Int64, size.events)
	event := func(i int) {
		if seen[i].Add(1) == watchers {
			<-underWay
		}
	}
	for range watchers {
		group.Go(func() error {
			connection := v.server.client.connection()
			defer connection.CloseIdleConnections()
			return v.watch(watching, watch{
				via: connection, query: "?watch=1&resourceVersion=" + meta.ResourceVersion,
				events: size.events, started: started, event: event,
			})
		})
	}
	for range watchers {
		select {
		case <-started:
		case <-watching.Done():
			return nil, 0, group.Wait()
		}
	}
	return func() error {
		group.Go(func() error {
			return inParallel(watching, len(requests), func(ctx context.Context, i int) error {
				select {
				case underWay <- struct{}{}:
				case <-ctx.Done():
					return context.Cause(ctx)
				}
				return v.server.client.drop(ctx, requests[i])
			})
		})
		return group.Wait()
	}, watchers * size.events, nil
}

// watch is what is watched, and until when.
type watch struct {
	via   *http.Client
	query string
	// events is how many are read, bookmark that the one behind the initial
	// events is read too.
	events   int
	bookmark bool
	// started is told when the server has begun to answer, if it isn't nil.
	started chan<- struct{}
	// event is called with the number of each event, if it isn't nil.
	event func(int)
}

func (v *variant) watch(ctx context.Context, w watch) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	accept := v.mediaType
	if accept == runtime.ContentTypeProtobuf {
		accept += ";stream=watch"
	}
	response, err := v.server.client.open(ctx, w.via, request{path: v.resource.collection(v.namespace) + w.query, accept: accept})
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if w.started != nil {
		select {
		case w.started <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	events := newEvents(response.Body, v.mediaType)
	for i := range w.events {
		if err := events.next(); err != nil {
			return fmt.Errorf("the watch ended after %d of %d events: %w", i, w.events, err)
		}
		if bytes.Contains(events.last, initialEventsEnd) {
			return fmt.Errorf("the initial events ended after %d of %d", i, w.events)
		}
		if w.event != nil {
			w.event(i)
		}
	}
	if !w.bookmark {
		return nil
	}
	if err := events.next(); err != nil {
		return fmt.Errorf("the watch ended before its bookmark: %w", err)
	}
	if !bytes.Contains(events.last, initialEventsEnd) {
		return fmt.Errorf("no bookmark after %d initial events: %.200q", w.events, events.last)
	}
	return nil
}
