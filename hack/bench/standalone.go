//go:build linux

package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// tlsServer is a server, a process of its own, that is measured.
type tlsServer struct {
	*process
	dir  string // its own; "" if it has none
	base string
	tls  *tls.Config
}

// startStandalone starts a standalone server in a directory of its own in dir, which
// is gone when it is stopped. It has the default class already.
func startStandalone(ctx context.Context, bin, dir string, args ...string) (_ *tlsServer, err error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	if dir, err = os.MkdirTemp(dir, "standalone-"); err != nil {
		return nil, err
	}
	s := &tlsServer{dir: dir, base: "https://127.0.0.1:" + strconv.Itoa(port)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	s.process, err = startProcess("aaserver standalone", filepath.Join(dir, "aaserver.log"), syscall.SIGTERM, filepath.Join(bin, "aaserver"),
		append([]string{"standalone", "--data-dir=" + s.data(), "--secure-port=" + strconv.Itoa(port), "--profiling", "--max-sessions=100000"}, args...)...)
	if err != nil {
		return nil, err
	}
	return s, s.wait(ctx, func(ctx context.Context) error {
		config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(s.data(), "kubeconfig"))
		if err != nil {
			return err
		}
		if s.tls, err = rest.TLSConfigFor(config); err != nil {
			return err
		}
		client := s.client(false)
		defer client.CloseIdleConnections()
		body, err := s.get(ctx, client, "/apis/"+v1.SchemeGroupVersion.String()+"/targetclasses")
		if err != nil {
			return err
		}
		var classes v1.TargetClassList
		if err := json.Unmarshal(body, &classes); err != nil {
			return err
		}
		if len(classes.Items) == 0 {
			return errors.New("it has no class of targets yet")
		}
		return nil
	})
}

// data is where it keeps what it stores.
func (s *tlsServer) data() string { return filepath.Join(s.dir, "data") }

func (s *tlsServer) stop() error {
	if s.process != nil {
		s.process.stop()
	}
	if s.dir == "" {
		return nil
	}
	return os.RemoveAll(s.dir)
}

// client returns a client with connections of its own.
func (s *tlsServer) client(http2 bool) *http.Client {
	t := &http.Transport{TLSClientConfig: s.tls.Clone(), ForceAttemptHTTP2: http2, DisableCompression: true, ReadBufferSize: 64 << 10}
	if !http2 {
		t.TLSClientConfig.NextProtos = []string{"http/1.1"}
		t.TLSNextProto = map[string]func(string, *tls.Conn) http.RoundTripper{}
		t.ReadBufferSize = 4 << 10
	}
	return &http.Client{Transport: t}
}

func (s *tlsServer) open(ctx context.Context, client *http.Client, path string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.base+path, nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	if response.StatusCode != http.StatusOK {
		defer response.Body.Close()
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		return nil, fmt.Errorf("GET %s: %s: %s", path, response.Status, text)
	}
	return response, nil
}

func (s *tlsServer) get(ctx context.Context, client *http.Client, path string) ([]byte, error) {
	response, err := s.open(ctx, client, path)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	return io.ReadAll(response.Body)
}

func defaultTargetPath(target string) string {
	return "/apis/" + v1.SchemeGroupVersion.String() + "/namespaces/default/targets/" + target
}

// run makes a target of one instance, and waits until it runs.
func (s *tlsServer) run(ctx context.Context, name string, source *v1.ProcessSource) error {
	target := &v1.Target{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1.SchemeGroupVersion.String(), Kind: "Target"},
		ObjectMeta: metav1.ObjectMeta{Name: name},
	}
	target.Spec.Process = source
	target.Spec.RestartPolicy = v1.RestartNever
	body, err := json.Marshal(target)
	if err != nil {
		return err
	}
	client := s.client(false)
	defer client.CloseIdleConnections()
	response, err := client.Post(s.base+strings.TrimSuffix(defaultTargetPath(name), "/"+name), "application/json", bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusCreated {
		text, _ := io.ReadAll(io.LimitReader(response.Body, 1<<10))
		return fmt.Errorf("creating %s: %s: %s", name, response.Status, text)
	}
	return s.wait(ctx, func(ctx context.Context) error {
		var got v1.Target
		body, err := s.get(ctx, client, defaultTargetPath(name))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(body, &got); err != nil {
			return err
		}
		if len(got.Status.Instances) == 0 || got.Status.Instances[0].State.Waiting != nil {
			return fmt.Errorf("target %s doesn't run yet", name)
		}
		return nil
	})
}

// profile stores a profile of the server in a directory, unless that is "".
func (s *tlsServer) profile(ctx context.Context, dir, name, path string) error {
	if dir == "" {
		return nil
	}
	client := s.client(false)
	defer client.CloseIdleConnections()
	content, err := s.get(ctx, client, path)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, strings.NewReplacer(" ", "-", "/", "-", ",", "").Replace(name)+".pb.gz"), content, 0o644)
}

// read reads an answer to its end and returns how long it was.
func (s *tlsServer) read(ctx context.Context, client *http.Client, path string) (int64, error) {
	response, err := s.open(ctx, client, path)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	var n int64
	buf := make([]byte, 256<<10)
	for {
		m, err := response.Body.Read(buf)
		n += int64(m)
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// occupied is what a process has, in bytes: Go's heap in use, the stacks of its
// goroutines, and what there is of it in the machine's memory; and the goroutines.
type occupied struct {
	heap, stacks, rss float64
	goroutines        float64
}

// settled waits until the server has what it keeps: its heap stays as it is.
func (s *tlsServer) settled(ctx context.Context) (now occupied, err error) {
	client := s.client(false)
	defer client.CloseIdleConnections()
	stable := 0
	err = s.wait(ctx, func(ctx context.Context) error {
		before := now
		if now, err = s.occupied(ctx, client); err != nil {
			return err
		}
		managed, last := now.heap+now.stacks, before.heap+before.stacks
		if stable++; managed < last*0.995 || managed > last*1.005 {
			stable = 0
		}
		if stable < 5 {
			return errors.New("its heap doesn't settle")
		}
		return nil
	})
	return now, err
}

func (s *tlsServer) occupied(ctx context.Context, client *http.Client) (o occupied, err error) {
	// It collects garbage first; the second time shrinks stacks that the first has
	// found to be too large, and empties pools.
	for range 2 {
		if _, err := s.get(ctx, client, "/debug/pprof/heap?gc=1"); err != nil {
			return o, err
		}
	}
	metrics, err := s.get(ctx, client, "/metrics")
	if err != nil {
		return o, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		return o, err
	}
	for _, value := range []struct {
		of   *float64
		text []byte
		name string
	}{
		{&o.heap, metrics, "go_memstats_heap_alloc_bytes"},
		{&o.stacks, metrics, "go_memstats_stack_inuse_bytes"},
		{&o.goroutines, metrics, "go_goroutines"},
		{&o.rss, status, "VmRSS:"},
	} {
		if *value.of, err = metric(value.text, value.name); err != nil {
			return o, err
		}
	}
	o.rss *= 1024 // it is in kB
	return o, nil
}
