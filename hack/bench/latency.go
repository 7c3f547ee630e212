//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"time"

	"k8s.io/client-go/tools/remotecommand"
)

// attempts is how often each first byte is waited for in a round.
const attempts = 20

// measureLatency tells how long it takes to the first byte, through a real
// kube-apiserver, beside a bare GET of the target on a connection of its own.
func measureLatency(ctx context.Context, o options, dir string, out io.Writer) error {
	c, err := startCluster(ctx, o, dir)
	if err != nil {
		return err
	}
	defer c.stop()
	ways := []struct {
		name string
		try  func(ctx context.Context) (time.Duration, error)
	}{
		{"GET of the target", c.firstOfGet},
		{"exec over WebSocket", func(ctx context.Context) (time.Duration, error) { return c.firstOfExec(ctx, false) }},
		{"exec over SPDY", func(ctx context.Context) (time.Duration, error) { return c.firstOfExec(ctx, true) }},
		{"port-forward, mux", c.firstOfMux},
		{"port-forward, client-go", c.firstOfTunnel},
	}
	samples := make([][]float64, len(ways)) // medians of the rounds
	for round := range o.rounds + 1 {       // the first one warms up
		values := make([][]float64, len(ways))
		for range attempts {
			for i, way := range ways {
				took, err := way.try(ctx)
				if err != nil {
					return fmt.Errorf("%s: %w", way.name, err)
				}
				values[i] = append(values[i], took.Seconds()*1e3)
			}
		}
		if round > 0 {
			for i := range ways {
				samples[i] = append(samples[i], median(values[i]))
			}
		}
	}
	fmt.Fprintf(out, "## Time to the first byte\n\n%d cores, %s. Milliseconds, through kube-apiserver, each time on a new connection with a new TLS session: medians of %d rounds of %d. The ratio is to the GET, with the least and the most of the rounds in brackets.\n\n",
		runtime.NumCPU(), runtime.Version(), o.rounds, attempts)
	rows := [][]string{{"first byte of", "ms", "ratio"}}
	for i, way := range ways {
		rows = append(rows, []string{way.name, number(median(samples[i])), ratio(ratios(samples[i], samples[0]))})
	}
	table(out, rows)
	return nil
}

func (c *cluster) firstOfGet(ctx context.Context) (time.Duration, error) {
	via := c.client.connection()
	defer via.CloseIdleConnections()
	begin := time.Now()
	response, err := c.client.open(ctx, via, request{path: targetPath(backendName)})
	if err != nil {
		return 0, err
	}
	took := time.Since(begin)
	return took, discard(response)
}

// timer notes when it is first written to.
type timer struct {
	begin, first time.Time
}

func (t *timer) Write(p []byte) (int, error) {
	if t.first.IsZero() && len(p) > 0 {
		t.first = time.Now()
	}
	return len(p), nil
}

func (c *cluster) firstOfExec(ctx context.Context, spdy bool) (time.Duration, error) {
	t := &timer{begin: time.Now()}
	if err := c.exec(ctx, spdy, backendName, remotecommand.StreamOptions{Stdout: t}, "echo", "hello"); err != nil {
		return 0, err
	}
	if t.first.IsZero() {
		return 0, io.ErrUnexpectedEOF
	}
	return t.first.Sub(t.begin), nil
}

func (c *cluster) firstOfMux(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	session, err := c.openMux(ctx, backendName)
	if err != nil {
		return 0, err
	}
	defer session.Close()
	conn, err := session.Dial(ctx, backendEndpoint)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	if err := fetch(conn, 1); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}

func (c *cluster) firstOfTunnel(context.Context) (time.Duration, error) {
	begin := time.Now()
	session, err := c.openTunnel(backendName)
	if err != nil {
		return 0, err
	}
	defer session.Close()
	conn, err := dialTunnel(session, 0, backendPort)
	if err != nil {
		return 0, err
	}
	if err := fetch(conn, 1); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
}
