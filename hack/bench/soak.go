//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	soakUsers = 24
	// soakWarm is how long the server is used before its memory counts: its
	// caches and pools are filled then.
	soakWarm = 30 * time.Second
	// soakSettles bounds how long it takes until what was open has ended.
	soakSettles = 2 * time.Minute
	soakTicker  = "ticker"

	// soakGrowth is how much larger the heap may be than before, and
	// soakGoroutines how many more there may be: connections of kube-apiserver
	// come and go.
	soakGrowth     = 1.10
	soakGoroutines = 20
)

// gauge is what must come back to where it was.
type gauge struct {
	memory
	goroutines, descriptors float64
}

func (s *server) gauge(ctx context.Context) (gauge, error) {
	m, err := s.memory(ctx)
	if err != nil {
		return gauge{}, err
	}
	metrics, err := s.client.do(ctx, request{path: "/metrics"})
	if err != nil {
		return gauge{}, err
	}
	g := gauge{memory: m}
	if g.goroutines, err = metric(metrics, "go_goroutines"); err != nil {
		return gauge{}, err
	}
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.cmd.Process.Pid))
	g.descriptors = float64(len(open))
	return g, err
}

// soak is a server in use.
type soak struct {
	*cluster
	users []soakUser
	done  []atomic.Int64 // by user
}

// soakUser is one thing that a user does, in a few seconds at most.
type soakUser struct {
	name string
	do   func(ctx context.Context, i int64) error
}

// measureSoak uses every kind of session for a long time, many at once, and
// fails unless the server's memory and goroutines come back to where they were.
// No targets come and go meanwhile: of those, the watch cache has a history.
func measureSoak(ctx context.Context, o options, dir string, out io.Writer) error {
	c, err := startCluster(ctx, o, dir)
	if err != nil {
		return err
	}
	defer c.stop()
	if _, err := c.run(ctx, soakTicker, v1.TargetSpec{
		Replicas: ptr.To[int32](3),
		Process:  &v1.ProcessSource{Command: []string{"sh", "-c", "while :; do date; sleep 0.05; done"}},
	}); err != nil {
		return err
	}
	s := &soak{cluster: c}
	s.users = []soakUser{
		{"exec, a short command", s.execShort},
		{"exec, 1 MiB through cat, WebSocket", func(ctx context.Context, _ int64) error { return c.echoed(ctx, false, soakTicker, 1<<20) }},
		{"exec, 1 MiB through cat, SPDY", func(ctx context.Context, _ int64) error { return c.echoed(ctx, true, soakTicker, 1<<20) }},
		{"exec that its client leaves", s.execLeft},
		{"log, followed over HTTP", func(ctx context.Context, _ int64) error { return s.follow(ctx, false) }},
		{"log, followed over WebSocket", func(ctx context.Context, _ int64) error { return s.follow(ctx, true) }},
		{"log, its last lines", s.lastLines},
		{"port-forward, mux", s.forwardMux},
		{"port-forward, client-go", s.forwardTunnel},
	}
	s.done = make([]atomic.Int64, len(s.users))

	// It has to have written them.
	if err := c.server.wait(ctx, func(ctx context.Context) error { return s.lastLines(ctx, 0) }); err != nil {
		return err
	}
	if err := s.use(ctx, soakWarm); err != nil {
		return err
	}
	before, err := s.settled(ctx, nil)
	if err != nil {
		return err
	}
	if err := s.keepHeap(ctx, o.profiles, "before"); err != nil {
		return err
	}
	began := time.Now()
	if err := s.use(ctx, o.soak); err != nil {
		return err
	}
	took := time.Since(began)
	during, err := c.server.gauge(ctx)
	if err != nil {
		return err
	}
	after, missed := s.settled(ctx, &before)
	if err := s.keepHeap(ctx, o.profiles, "after"); err != nil {
		return err
	}

	fmt.Fprintf(out, "## Soak\n\n%d cores, %s. %d users at a time for %s after a warm-up of %s.\n\n", runtime.NumCPU(), runtime.Version(), soakUsers, took.Round(time.Second), soakWarm)
	rows := [][]string{{"what they did", "times"}}
	for i, user := range s.users {
		rows = append(rows, []string{user.name, fmt.Sprint(s.done[i].Load())})
	}
	table(out, rows)
	const mib = 1 << 20
	rows = [][]string{{"the server", "before", "as they left", "after"}}
	for _, line := range []struct {
		name string
		of   func(gauge) float64
	}{
		{"heap, MiB", func(g gauge) float64 { return g.Heap / mib }},
		{"resident memory, MiB", func(g gauge) float64 { return g.RSS / mib }},
		{"goroutines", func(g gauge) float64 { return g.goroutines }},
		{"open files", func(g gauge) float64 { return g.descriptors }},
	} {
		rows = append(rows, []string{line.name, number(line.of(before)), number(line.of(during)), number(line.of(after))})
	}
	table(out, rows)
	return missed
}

// keepHeap stores a profile of the heap, if profiles are wanted.
func (s *soak) keepHeap(ctx context.Context, dir, when string) error {
	if dir == "" {
		return nil
	}
	heap, err := s.server.client.do(ctx, request{path: "/debug/pprof/heap?gc=1"})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "soak-heap-"+when+".pb.gz"), heap, 0o644)
}

// use has users do everything by turns.
func (s *soak) use(ctx context.Context, lasts time.Duration) error {
	until := time.Now().Add(lasts)
	var next atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range soakUsers {
		group.Go(func() error {
			for time.Now().Before(until) {
				i := next.Add(1) - 1
				which := int(i % int64(len(s.users)))
				ctx, cancel := context.WithTimeout(ctx, readyTimeout)
				err := s.users[which].do(ctx, i)
				cancel()
				if err != nil {
					return fmt.Errorf("%s: %w", s.users[which].name, err)
				}
				s.done[which].Add(1)
			}
			return nil
		})
	}
	return group.Wait()
}

// settled waits until nothing of the users is left, and fails if the server
// doesn't come back to where it was.
func (s *soak) settled(ctx context.Context, before *gauge) (gauge, error) {
	s.client.http.CloseIdleConnections()
	deadline := time.Now().Add(soakSettles)
	var last gauge
	for {
		now, err := s.server.gauge(ctx)
		if err != nil {
			return now, err
		}
		steady := now.goroutines == last.goroutines && now.descriptors == last.descriptors
		back := before == nil || now.goroutines <= before.goroutines+soakGoroutines &&
			now.descriptors <= before.descriptors+soakGoroutines && now.Heap <= before.Heap*soakGrowth
		if steady && back {
			return now, nil
		}
		if time.Now().After(deadline) {
			if before == nil {
				return now, nil // connections come and go
			}
			return now, fmt.Errorf("the server doesn't come back to where it was: %.0f goroutines before and %.0f after, %.0f and %.0f open files, %.1f and %.1f MiB of heap",
				before.goroutines, now.goroutines, before.descriptors, now.descriptors, before.Heap/(1<<20), now.Heap/(1<<20))
		}
		last = now
		select {
		case <-ctx.Done():
			return now, context.Cause(ctx)
		case <-time.After(5 * time.Second):
		}
	}
}

func (s *soak) execShort(ctx context.Context, i int64) error {
	var got bytes.Buffer
	if err := s.exec(ctx, i%4 == 0, soakTicker, remotecommand.StreamOptions{Stdout: &got}, "echo", "hello"); err != nil {
		return err
	}
	if got.String() != "hello\n" {
		return fmt.Errorf("it printed %q", got.String())
	}
	return nil
}

// execLeft leaves a command that would run on.
func (s *soak) execLeft(ctx context.Context, i int64) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	err := s.exec(ctx, i%4 == 0, soakTicker, remotecommand.StreamOptions{Stdout: io.Discard, Tty: i%3 == 0}, "sleep", "1000")
	if err == nil || ctx.Err() == nil {
		return fmt.Errorf("it ended by itself: %v", err)
	}
	return nil
}

func (s *soak) follow(ctx context.Context, webSocket bool) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	lines, err := s.readLog(ctx, webSocket, soakTicker, "follow", "true", "tailLines", "10", "allInstances", "true")
	if err == nil && lines == 0 {
		err = errors.New("no line came")
	}
	return err
}

func (s *soak) lastLines(ctx context.Context, _ int64) error {
	lines, err := s.readLog(ctx, false, soakTicker, "tailLines", "10")
	if err == nil && lines != 10 {
		err = fmt.Errorf("%d lines came", lines)
	}
	return err
}

const (
	soakConns = 5
	soakFetch = 256 << 10
)

func (s *soak) forwardMux(ctx context.Context, _ int64) error {
	session, err := s.openMux(ctx, backendName)
	if err != nil {
		return err
	}
	defer session.Close()
	group, ctx := errgroup.WithContext(ctx)
	for range soakConns {
		group.Go(func() error {
			conn, err := session.Dial(ctx, backendEndpoint)
			if err != nil {
				return err
			}
			defer conn.Close()
			return fetch(conn, soakFetch)
		})
	}
	return group.Wait()
}

func (s *soak) forwardTunnel(context.Context, int64) error {
	session, err := s.openTunnel(backendName)
	if err != nil {
		return err
	}
	defer session.Close()
	for i := range soakConns {
		conn, err := dialTunnel(session, i, backendPort)
		if err != nil {
			return err
		}
		if err := fetch(conn, soakFetch); err != nil {
			return err
		}
		session.RemoveStreams(conn)
	}
	return nil
}
