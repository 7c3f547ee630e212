package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/utils/dump"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/driver/process"
)

// realAgent is an agent with the process driver, as in a server.
type realAgent struct {
	*testing.T
	api  *fakeAPI
	stop func()
}

func newRealAgent(t *testing.T, api *fakeAPI, dir string) *realAgent {
	t.Helper()
	host, err := process.New(process.Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	agent, err := New(Options{Name: "local", Client: api})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := agent.Run(ctx, map[string]driver.Host{v1.SourceProcess: host}); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	r := &realAgent{T: t, api: api, stop: sync.OnceFunc(func() {
		cancel()
		running.Wait()
		if err := host.Close(); err != nil {
			t.Errorf("closing the host: %v", err)
		}
	})}
	t.Cleanup(r.stop)
	return r
}

func (r *realAgent) status() v1.TargetStatus {
	r.Helper()
	target := r.api.get("web")
	if target == nil {
		r.Fatal("the target is gone")
	}
	return target.Status
}

func (r *realAgent) eventually(what string, holds func(v1.TargetStatus) bool) {
	r.Helper()
	var status v1.TargetStatus
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if status = r.status(); holds(status) {
			return
		}
	}
	r.Fatalf("never happened: %s; the last status: %s", what, dump.Pretty(status))
}

// script makes instances note their name and port, and then run.
func script(dir, then string) *v1.ProcessSource {
	return &v1.ProcessSource{Command: []string{"sh", "-c", fmt.Sprintf(`echo "$AASERVER_PORT_HTTP" > %s/port.$AASERVER_PORT_HTTP && %s`, dir, then)}}
}

func TestWithProcesses(t *testing.T) {
	logs, notes := t.TempDir(), t.TempDir()
	api := newFakeAPI(t)
	r := newRealAgent(t, api, logs)
	target := withPorts(web(2), v1.TargetPort{Name: "http", Port: 8080})
	target.Spec.Process = script(notes, "exec sleep 1000")
	api.create(target)
	r.eventually("both run", func(s v1.TargetStatus) bool { return s.ReadyReplicas == 2 })
	wantPorts := map[string]bool{}
	for _, i := range r.status().Instances {
		wantPorts[fmt.Sprint(i.Ports[0].HostPort)] = true
	}
	if len(wantPorts) != 2 {
		t.Errorf("two instances have the ports %v", wantPorts)
	}
	told := func() map[string]bool {
		ports := map[string]bool{}
		files, _ := filepath.Glob(filepath.Join(notes, "port.*"))
		for _, file := range files {
			if text, _ := os.ReadFile(file); len(text) > 0 {
				ports[strings.TrimSpace(string(text))] = true
			}
		}
		return ports
	}
	r.eventually("the instances know their ports", func(v1.TargetStatus) bool { return len(told()) == 2 })
	for port := range told() {
		if !wantPorts[port] {
			t.Errorf("an instance was told port %s, which isn't in the status", port)
		}
	}

	// A spec that fails stops at the first, and one that doesn't goes on.
	api.change("web", func(s *v1.TargetSpec) { s.Process = script(notes, "exit 3") })
	r.eventually("web-1 crashes by the new spec, web-0 runs by the old", func(s v1.TargetStatus) bool {
		last := s.Instances[1].LastState.Terminated
		return last != nil && last.ExitCode == 3 && s.Instances[1].RestartCount > 0 && s.Instances[0].Ready
	})
	api.change("web", func(s *v1.TargetSpec) { s.Process = script(notes, "exec sleep 2000") })
	r.eventually("both are replaced", func(s v1.TargetStatus) bool {
		return s.ReadyReplicas == 2 && s.Instances[0].LastState.Terminated != nil && s.Instances[0].RestartCount == 0
	})
	if last := r.status().Instances[0].LastState.Terminated; last.Signal != 15 || last.ExitCode != 143 {
		t.Errorf("web-0 was ended by %+v, want SIGTERM", last)
	}

	// Processes end with their agent; the next one starts them again.
	r.stop()
	before := r.status()
	r = newRealAgent(t, api, logs)
	r.eventually("both run again", func(s v1.TargetStatus) bool {
		for n, i := range s.Instances {
			last := i.LastState.Terminated
			if !i.Ready || last == nil || last.Reason != "AgentLost" || i.RestartCount != before.Instances[n].RestartCount+1 {
				return false
			}
			if i.Ports[0] != before.Instances[n].Ports[0] {
				t.Fatalf("%s had port %v and has %v", i.Name, before.Instances[n].Ports, i.Ports)
			}
		}
		return true
	})

	api.change("web", func(s *v1.TargetSpec) { s.Process = &v1.ProcessSource{Command: []string{"/does/not/exist"}} })
	r.eventually("web-1 can't be started", func(s v1.TargetStatus) bool {
		waiting := s.Instances[1].State.Waiting
		return waiting != nil && waiting.Reason == "StartError" && strings.Contains(waiting.Message, "/does/not/exist") && s.Instances[0].Ready
	})

	api.delete("web")
	r.eventually("the finalizer is taken off", func(v1.TargetStatus) bool {
		return !slices.Contains(api.get("web").Finalizers, v1.FinalizerInstances)
	})
	if left, _ := os.ReadDir(logs); len(left) > 0 {
		t.Errorf("left of a target that was deleted: %v", left)
	}
}
