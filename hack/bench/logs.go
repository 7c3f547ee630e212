//go:build linux

package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
	"golang.org/x/sync/errgroup"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// Roles of this program.
const (
	// produceRole writes lines at a rate: lines a second, bytes a line.
	produceRole = "role-produce-lines"
	// serveFilesRole serves the files of a directory, one behind the other, as
	// bare HTTPS: what a log is compared with.
	serveFilesRole = "role-serve-files"
)

// logsOptions is how much is measured.
type logsOptions struct {
	bin, dir string
	self     string // this program
	// idle is how many logs are followed that nothing is written to.
	idle int
	// followers follow one instance that writes so many lines a second.
	followers, rate int
	// seconds is how long they are measured.
	seconds int
	// replay is the size in bytes of the log that is read.
	replay int64
	rounds int
	// profiles is a directory for profiles, "" for none.
	profiles string
}

func (o *logsOptions) addFlags() {
	flag.IntVar(&o.idle, "idle-logs", 5000, "how many logs are followed that nothing is written to; 0 leaves that out")
	flag.IntVar(&o.followers, "log-followers", 1000, "how many follow one instance; 0 leaves that out")
	flag.IntVar(&o.rate, "log-rate", 100, "how many lines a second it writes")
	flag.IntVar(&o.seconds, "log-seconds", 10, "how long that is measured")
	flag.Int64Var(&o.replay, "log-size", 1<<30, "the size in bytes of the log that is read; 0 leaves that out")
}

// measureLogs measures logs with a server of its own: what those cost that are
// followed while nothing happens, what a line costs that many follow, and how
// fast a large log is read.
func measureLogs(ctx context.Context, options options, dir string, out io.Writer) error {
	o := options.logs
	o.bin, o.rounds, o.profiles, o.dir = options.bin, options.rounds, options.profiles, dir
	var err error
	if o.self, err = os.Executable(); err != nil {
		return err
	}
	if o.profiles != "" {
		if err := os.MkdirAll(o.profiles, 0o755); err != nil {
			return err
		}
	}
	if o.idle > 0 {
		fmt.Fprintf(out, "### Idle followed logs, kB each on the server, %d of them\n\n", o.idle)
		fmt.Fprintf(out, "| transport | heap | stacks | resident |\n|---|---:|---:|---:|\n")
		for _, transport := range []string{"HTTP/1.1", "HTTP/2", "WebSocket"} {
			each, err := o.idleLogs(ctx, transport)
			if err != nil {
				return fmt.Errorf("idle logs over %s: %w", transport, err)
			}
			fmt.Fprintf(out, "| %s | %.1f | %.1f | %.1f |\n", transport, each.heap/1000, each.stacks/1000, each.rss/1000)
		}
		fmt.Fprintln(out)
	}
	if o.followers > 0 {
		fmt.Fprintf(out, "### Fan-out of one instance, %d lines/s of 100 bytes\n\n", o.rate)
		fmt.Fprintf(out, "| transport | followers | CPU s per million lines delivered | delay of a line, median and 99 %% |\n|---|---:|---:|---:|\n")
		for _, transport := range []string{"HTTP/1.1", "HTTP/2"} {
			for _, followers := range []int{1, o.followers} {
				if err := o.fanOut(ctx, out, transport, followers); err != nil {
					return fmt.Errorf("%d followers over %s: %w", followers, transport, err)
				}
			}
		}
		fmt.Fprintln(out)
	}
	if o.replay > 0 {
		if err := o.replayLog(ctx, out); err != nil {
			return fmt.Errorf("replay: %w", err)
		}
	}
	return nil
}

// start starts a standalone server with files of logs that are large enough.
func (o logsOptions) start(ctx context.Context) (*tlsServer, error) {
	return startStandalone(ctx, o.bin, o.dir, "--log-file-size=64Mi", "--log-files=40", "-v=0")
}

func logPath(target, query string) string {
	return defaultTargetPath(target) + "/log?" + query
}

// idleLogs returns what a followed log occupies on the server.
func (o logsOptions) idleLogs(ctx context.Context, transport string) (each occupied, err error) {
	s, err := o.start(ctx)
	if err != nil {
		return each, err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.run(ctx, "quiet", &v1.ProcessSource{Command: []string{"/bin/sh", "-c", "echo one; exec sleep 100000"}}); err != nil {
		return each, err
	}
	ctx, cancel := context.WithCancel(ctx)
	// The server has done all once before it is measured.
	warm, err := s.follow(ctx, transport, 100)
	if err != nil {
		cancel()
		return each, err
	}
	warm()
	before, err := s.settled(ctx)
	if err != nil {
		cancel()
		return each, err
	}
	leave, err := s.follow(ctx, transport, o.idle)
	defer func() {
		cancel()
		if leave != nil {
			leave()
		}
	}()
	if err != nil {
		return each, err
	}
	after, err := s.settled(ctx)
	if err != nil {
		return each, err
	}
	for _, kind := range []string{"heap", "goroutine"} {
		if err := s.profile(ctx, o.profiles, kind+" "+transport, "/debug/pprof/"+kind); err != nil {
			return each, err
		}
	}
	n := float64(o.idle)
	return occupied{
		heap:   (after.heap - before.heap) / n,
		stacks: (after.stacks - before.stacks) / n,
		rss:    (after.rss - before.rss) / n,
	}, nil
}

// follow opens so many followed logs, and returns what closes them.
func (s *tlsServer) follow(ctx context.Context, transport string, n int) (leave func(), err error) {
	path := logPath("quiet", "follow=true&tailLines=0")
	var mu sync.Mutex
	var open []io.Closer
	var clients []*http.Client
	leave = func() {
		for _, c := range open {
			c.Close()
		}
		for _, c := range clients {
			c.CloseIdleConnections()
		}
	}
	const streams = 100 // on a connection of HTTP/2
	if transport == "HTTP/2" {
		for range (n + streams - 1) / streams {
			clients = append(clients, s.client(true))
		}
	} else {
		clients = append(clients, s.client(false))
	}
	err = inParallel(ctx, n, func(ctx context.Context, i int) error {
		var c io.Closer
		if transport == "WebSocket" {
			dialer := websocket.Dialer{TLSClientConfig: s.tls.Clone(), Subprotocols: []string{"binary.k8s.io"}, ReadBufferSize: 1024, WriteBufferSize: 1024}
			dialer.TLSClientConfig.NextProtos = nil
			conn, _, err := dialer.DialContext(ctx, "wss"+strings.TrimPrefix(s.base, "https")+path, nil)
			if err != nil {
				return err
			}
			go func() { // answers pings until it is closed
				for {
					if _, _, err := conn.NextReader(); err != nil {
						return
					}
				}
			}()
			c = conn
		} else {
			// The context of the group ends with the group.
			response, err := s.open(context.WithoutCancel(ctx), clients[i%len(clients)], path)
			if err != nil {
				return err
			}
			c = response.Body
		}
		mu.Lock()
		defer mu.Unlock()
		open = append(open, c)
		return nil
	})
	return leave, err
}

// fanOut has many follow an instance.
func (o logsOptions) fanOut(ctx context.Context, out io.Writer, transport string, followers int) (err error) {
	s, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.run(ctx, "busy", &v1.ProcessSource{Command: []string{o.self, produceRole, strconv.Itoa(o.rate), "100"}}); err != nil {
		return err
	}
	const streams = 100
	var clients []*http.Client
	for range (followers + streams - 1) / streams {
		clients = append(clients, s.client(transport == "HTTP/2"))
	}
	ctx, cancel := context.WithCancel(ctx)
	var lines atomic.Int64
	var measuring atomic.Bool
	var mu sync.Mutex
	var delays []time.Duration
	group, ctx := errgroup.WithContext(ctx)
	started := make(chan struct{}, followers)
	slots := make(chan struct{}, 50)
	for i := range followers {
		group.Go(func() error {
			slots <- struct{}{}
			response, err := s.open(ctx, clients[i%len(clients)], logPath("busy", "follow=true&tailLines=0&timestamps=true"))
			<-slots
			if err != nil {
				return err
			}
			defer response.Body.Close()
			started <- struct{}{}
			if i > 0 {
				// As little as can be: it shares its processors with the server.
				buf := make([]byte, 16<<10)
				for {
					n, err := response.Body.Read(buf)
					lines.Add(int64(bytes.Count(buf[:n], []byte{'\n'})))
					if err != nil {
						return err
					}
				}
			}
			reader := bufio.NewReader(response.Body)
			for {
				line, err := reader.ReadSlice('\n')
				if err != nil {
					return err
				}
				lines.Add(1)
				stamp, _, _ := strings.Cut(string(line), " ")
				at, err := time.Parse(time.RFC3339Nano, stamp)
				if err != nil {
					return err
				}
				if measuring.Load() {
					mu.Lock()
					delays = append(delays, time.Since(at))
					mu.Unlock()
				}
			}
		})
	}
	measure := func() error {
		for range followers {
			select {
			case <-started:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		// What came of their beginning passes.
		if err := pause(ctx, 2*time.Second); err != nil {
			return err
		}
		before, err := s.cpu()
		if err != nil {
			return err
		}
		first := lines.Load()
		measuring.Store(true)
		if err := o.measured(ctx, s, fmt.Sprintf("cpu %d followers %s", followers, transport)); err != nil {
			return err
		}
		measuring.Store(false)
		delivered := lines.Load() - first
		after, err := s.cpu()
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		slices.Sort(delays)
		if len(delays) == 0 || delivered < int64(followers*o.rate*o.seconds)/2 {
			return fmt.Errorf("%d lines were delivered, want about %d", delivered, followers*o.rate*o.seconds)
		}
		fmt.Fprintf(out, "| %s | %d | %.2f | %s, %s |\n", transport, followers, (after-before).Seconds()/float64(delivered)*1e6,
			delays[len(delays)/2].Round(10*time.Microsecond), delays[len(delays)*99/100].Round(10*time.Microsecond))
		return nil
	}
	err = measure()
	cancel()
	if ended := group.Wait(); err != nil {
		return errors.Join(err, ended)
	}
	return nil
}

// measured waits for the time that is measured, or takes a profile meanwhile.
func (o logsOptions) measured(ctx context.Context, s *tlsServer, name string) error {
	if o.profiles != "" {
		return s.profile(ctx, o.profiles, name, "/debug/pprof/profile?seconds="+strconv.Itoa(o.seconds))
	}
	return pause(ctx, time.Duration(o.seconds)*time.Second)
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// replayLog reads a large log of one run.
func (o logsOptions) replayLog(ctx context.Context, out io.Writer) (err error) {
	s, err := o.start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	const line = 100
	// Each line has a time before it in the file.
	count := o.replay / int64(line+len("2006-01-02T15:04:05.000000000Z stdout F "))
	if err := s.run(ctx, "large", &v1.ProcessSource{Command: []string{o.self, produceRole, "0", strconv.Itoa(line), strconv.FormatInt(count, 10)}}); err != nil {
		return err
	}
	logs := filepath.Join(s.data(), "logs")
	if err := s.wait(ctx, func(ctx context.Context) error {
		text, err := s.get(ctx, s.client(false), logPath("large", "tailLines=1"))
		if err == nil && !strings.HasPrefix(string(text), endOfLines) {
			err = errors.New("the log isn't whole yet")
		}
		return err
	}); err != nil {
		return err
	}
	files, err := logFiles(logs)
	if err != nil {
		return err
	}
	var size int64
	for _, name := range files {
		info, err := os.Stat(name)
		if err != nil {
			return err
		}
		size += info.Size()
	}
	fmt.Fprintf(out, "### Reading a log of %.2f GiB in %d files, %d lines\n\n", float64(size)/(1<<30), len(files), count)
	fmt.Fprintf(out, "| what | ms | MiB/s | CPU s/GiB |\n|---|---:|---:|---:|\n")

	port, err := freePort()
	if err != nil {
		return err
	}
	certFile, keyFile, err := servingCert(s.dir)
	if err != nil {
		return err
	}
	bare, err := startProcess("the bare server", filepath.Join(s.dir, "bare.log"), syscall.SIGKILL,
		o.self, serveFilesRole, "127.0.0.1:"+strconv.Itoa(port), certFile, keyFile, logs)
	if err != nil {
		return err
	}
	defer bare.stop()
	peer := &tlsServer{process: bare, base: "https://127.0.0.1:" + strconv.Itoa(port), tls: &tls.Config{InsecureSkipVerify: true}}
	if err := bare.wait(ctx, func(ctx context.Context) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		response, err := peer.open(ctx, peer.client(false), "/")
		if err != nil {
			return err
		}
		return response.Body.Close()
	}); err != nil {
		return err
	}
	lastSecond, err := s.get(ctx, s.client(false), logPath("large", "tailLines=100000&limitBytes=40&timestamps=true"))
	if err != nil {
		return err
	}
	since, _, _ := strings.Cut(string(lastSecond), " ")
	instance := "&instance=large-0"
	for _, http2 := range []bool{false, true} {
		name := "HTTP/1.1"
		if http2 {
			name = "HTTP/2"
		}
		for _, row := range []struct {
			what   string
			server *tlsServer
			path   string
		}{
			{"the last 10 lines", s, logPath("large", "tailLines=10"+instance)},
			{"the last 100,000 lines, by time", s, logPath("large", "resumeAfter="+url.QueryEscape(since)+instance)},
			{"all of it", s, logPath("large", instance)},
			{"all of it, with times", s, logPath("large", "timestamps=true"+instance)},
			{"all of it, followed", s, logPath("large", "follow=true"+instance)},
			{"the files, by a bare server", peer, "/"},
		} {
			var walls, rates, costs []float64
			for range o.rounds {
				client := row.server.client(http2)
				before, err := row.server.cpu()
				if err != nil {
					return err
				}
				begin := time.Now()
				n, err := row.server.read(ctx, client, row.path)
				if err != nil {
					return fmt.Errorf("%s: %w", row.what, err)
				}
				wall := time.Since(begin).Seconds()
				after, err := row.server.cpu()
				if err != nil {
					return err
				}
				client.CloseIdleConnections()
				walls = append(walls, wall*1000)
				rates = append(rates, float64(n)/(1<<20)/wall)
				costs = append(costs, (after-before).Seconds()/(float64(n)/(1<<30)))
			}
			cost, rate := fmt.Sprintf("%.2f", median(costs)), fmt.Sprintf("%.0f", median(rates))
			if median(walls) < 100 {
				cost = "" // less than the kernel's clock can tell
				rate = ""
			}
			fmt.Fprintf(out, "| %s, %s | %.1f | %s | %s |\n", row.what, name, median(walls), rate, cost)
		}
	}
	fmt.Fprintln(out)
	return nil
}

// logFiles returns the files of the only log below a directory, in order.
func logFiles(dir string) ([]string, error) {
	var files []string
	part := func(name string) (n int) {
		fmt.Sscanf(filepath.Base(name), "1.%d.log", &n)
		return n
	}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".log") {
			files = append(files, path)
		}
		return err
	})
	slices.SortFunc(files, func(a, b string) int { return part(a) - part(b) })
	return files, err
}

// endOfLines is the last line of a producer that ends.
const endOfLines = "end"

// produceLines is what runs in a target.
func produceLines(args []string) error {
	if len(args) < 2 {
		return fmt.Errorf("usage: %s RATE BYTES [COUNT]", produceRole)
	}
	numbers := make([]int64, 3)
	for i, arg := range args[:min(len(args), 3)] {
		var err error
		if numbers[i], err = strconv.ParseInt(arg, 10, 64); err != nil {
			return err
		}
	}
	rate, size, count := numbers[0], numbers[1], numbers[2]
	line := append(bytes.Repeat([]byte("x"), int(size)), '\n')
	if rate == 0 {
		w := bufio.NewWriterSize(os.Stdout, 64<<10)
		for range count {
			if _, err := w.Write(line); err != nil {
				return err
			}
		}
		w.WriteString(endOfLines + "\n")
		return w.Flush()
	}
	tick := time.NewTicker(time.Second / time.Duration(rate))
	defer tick.Stop()
	for range tick.C {
		if _, err := os.Stdout.Write(line); err != nil {
			return err
		}
	}
	return nil
}

// serveFiles is the bare server.
func serveFiles(args []string) error {
	if len(args) != 4 {
		return fmt.Errorf("usage: %s ADDRESS CERT KEY DIR", serveFilesRole)
	}
	server := &http.Server{Addr: args[0], Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		files, err := logFiles(args[3])
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for _, name := range files {
			file, err := os.Open(name)
			if err != nil {
				panic(http.ErrAbortHandler)
			}
			_, err = io.Copy(w, file)
			file.Close()
			if err != nil {
				return
			}
		}
	})}
	return server.ListenAndServeTLS(args[1], args[2])
}
