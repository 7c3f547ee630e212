package drivertest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func testHost(t *testing.T, h Harness) {
	t.Run("ends have a reason and an exit code", func(t *testing.T) {
		host := h.Host(t)
		type ending struct {
			Code, Signal int32
			Reason       string
		}
		for script, want := range map[string]ending{
			"exit 0":        {0, 0, "Completed"},
			"exit 3":        {3, 0, "Error"},
			"kill -KILL $$": {137, 9, "Killed"},
		} {
			target := h.Target(t, Instance{Script: script})
			before := time.Now()
			start(t, host, target)
			state := end(t, host, instance(target).ID())
			if diff := cmp.Diff(want, ending{state.ExitCode, state.Signal, state.Reason}); diff != "" {
				t.Errorf("%s (-want +got):\n%s", script, diff)
			}
			if state.StartedAt.Time.Before(before) || state.FinishedAt.Time.Before(state.StartedAt.Time) {
				t.Errorf("%s: started at %v, finished at %v, tested at %v", script, state.StartedAt, state.FinishedAt, before)
			}
		}
	})

	t.Run("the exit code of a stopped instance is its own", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "trap 'exit 9' TERM; echo ready; while :; do sleep 0.05; done"})
		start(t, host, target)
		awaitLines(t, open[driver.Logger](t, host, request(target)), 1)
		id := instance(target).ID()
		if err := host.Stop(bounded(t), id, timeout); err != nil {
			t.Fatalf("Stop: %v", err)
		}
		if state := end(t, host, id); state.ExitCode != 9 {
			t.Errorf("exit code %d, want 9", state.ExitCode)
		}
		if err := host.Stop(bounded(t), id, 0); err != nil {
			t.Errorf("stopping what doesn't run: %v", err)
		}
	})

	t.Run("what doesn't stop is killed after its time, which can be brought forward", func(t *testing.T) {
		for name, stop := range map[string]func(host driver.Host, id driver.InstanceID) error{
			"after its time": func(host driver.Host, id driver.InstanceID) error {
				return host.Stop(bounded(t), id, 100*time.Millisecond)
			},
			"at once": func(host driver.Host, id driver.InstanceID) error {
				return host.Stop(bounded(t), id, 0)
			},
			"brought forward": func(host driver.Host, id driver.InstanceID) error {
				return errors.Join(host.Stop(bounded(t), id, time.Hour), host.Stop(bounded(t), id, 100*time.Millisecond))
			},
			"not put off": func(host driver.Host, id driver.InstanceID) error {
				return errors.Join(host.Stop(bounded(t), id, 100*time.Millisecond), host.Stop(bounded(t), id, time.Hour))
			},
		} {
			t.Run(name, func(t *testing.T) {
				host, target := h.Host(t), h.Target(t, Instance{Script: "trap '' TERM; echo ready; while :; do sleep 0.05; done"})
				start(t, host, target)
				awaitLines(t, open[driver.Logger](t, host, request(target)), 1)
				id := instance(target).ID()
				if err := stop(host, id); err != nil {
					t.Fatalf("Stop: %v", err)
				}
				if state := end(t, host, id); state.Signal != 9 {
					t.Errorf("state %+v, want killed", state)
				}
			})
		}
	})

	t.Run("an instance is listed from its start to its removal", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: idle})
		id := instance(target).ID()
		what := instance(target)
		what.Ports = []v1.InstancePort{{Name: "http", Port: 8080, HostPort: 31021}}
		if err := host.Start(bounded(t), what); err != nil {
			t.Fatalf("Start: %v", err)
		}
		eventually(t, host, "running", func(list map[string]driver.InstanceStatus) bool {
			return list[id.Name].State.Running != nil && cmp.Equal(list[id.Name].Ports, what.Ports)
		})
		if err := host.Start(bounded(t), what); err == nil {
			t.Error("what runs was started again")
		}
		if err := host.Remove(bounded(t), id); err == nil {
			t.Error("what runs was removed")
		}
		if err := host.Stop(bounded(t), id, 0); err != nil {
			t.Fatalf("Stop: %v", err)
		}
		end(t, host, id)
		if err := host.Start(bounded(t), what); err != nil {
			t.Fatalf("starting again: %v", err)
		}
		eventually(t, host, "running again", func(list map[string]driver.InstanceStatus) bool {
			return list[id.Name].State.Running != nil
		})
		if err := host.Stop(bounded(t), id, 0); err != nil {
			t.Fatalf("Stop: %v", err)
		}
		end(t, host, id)
		if err := host.Remove(bounded(t), id); err != nil {
			t.Fatalf("Remove: %v", err)
		}
		list, err := host.List(bounded(t))
		if err != nil || len(list) != 0 {
			t.Errorf("after Remove the list is %v, %v", names(list), err)
		}
	})

	t.Run("without its instance nothing works, and it says so", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "exit 0"})
		check := func() {
			t.Helper()
			if e := open[driver.Execer](t, host, request(target)); e != nil {
				_, err := e.Exec(bounded(t), driver.ExecOptions{Command: []string{"true"}})
				wantKind(t, err, driver.NotRunning)
			}
			if a := open[driver.Attacher](t, host, request(target)); a != nil {
				_, err := a.Attach(bounded(t), driver.AttachOptions{})
				wantKind(t, err, driver.NotRunning)
			}
		}
		check()
		start(t, host, target)
		end(t, host, instance(target).ID())
		check()
	})

	t.Run("commands end with their instance", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: idle})
		start(t, host, target)
		run, err := open[driver.Execer](t, host, request(target)).Exec(bounded(t), driver.ExecOptions{Command: sh("echo ready; sleep 1000")})
		if err != nil {
			t.Fatalf("Exec: %v", err)
		}
		out := newOutput()
		done := make(chan error, 1)
		go func() { done <- run(bounded(t), driver.Stdio{Stdout: out}) }()
		out.wait(t, "ready")
		if err := host.Stop(bounded(t), instance(target).ID(), 0); err != nil {
			t.Fatalf("Stop: %v", err)
		}
		wantKind(t, <-done, driver.NotRunning)
	})

	t.Run("a spec that can't be run is refused, and not listed", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: idle})
		if target.Spec.Process == nil {
			t.Skip("not a process")
		}
		target.Spec.Process.Command[0] = "no-such-command-anywhere"
		wantKind(t, host.Start(bounded(t), instance(target)), driver.Invalid)
		if list, err := host.List(bounded(t)); err != nil || len(list) != 0 {
			t.Errorf("the list is %v, %v", names(list), err)
		}
	})

	t.Run("what isn't retained is deleted", func(t *testing.T) {
		host := h.Host(t)
		kept, gone := h.Target(t, Instance{Script: "echo kept"}), h.Target(t, Instance{Script: "echo gone"})
		for _, target := range []*v1.Target{kept, gone} {
			start(t, host, target)
			end(t, host, instance(target).ID())
		}
		if err := host.Remove(bounded(t), instance(gone).ID()); err != nil {
			t.Fatalf("Remove: %v", err)
		}
		if err := host.Retain(bounded(t), uids(kept)); err != nil {
			t.Fatalf("Retain: %v", err)
		}
		if lines, _ := readLog(t, open[driver.Logger](t, host, request(kept)), driver.LogOptions{}); len(lines) != 1 {
			t.Errorf("the kept log is %v", lines)
		}
		if lines, _ := readLog(t, open[driver.Logger](t, host, request(gone)), driver.LogOptions{}); len(lines) != 0 {
			t.Errorf("the deleted log is %v", lines)
		}
	})

	t.Run("Shutdown lets everything end by itself", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.1; done"})
		start(t, host, target)
		l := open[driver.Logger](t, host, request(target))
		awaitLines(t, l, 1)
		if err := host.Shutdown(bounded(t)); err != nil {
			t.Fatalf("Shutdown: %v", err)
		}
		if lines, _ := readLog(t, l, driver.LogOptions{}); len(lines) != 2 {
			t.Errorf("the log is %v, want two lines", lines)
		}
	})

	t.Run("Shutdown waits no longer than it may", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "trap '' TERM; echo ready; " + idle})
		start(t, host, target)
		awaitLines(t, open[driver.Logger](t, host, request(target)), 1)
		ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, errImpatient)
		defer cancel()
		if err := host.Shutdown(ctx); !errors.Is(err, errImpatient) {
			t.Errorf("Shutdown: %v, want the context's cause", err)
		}
	})

	t.Run("Close ends everything, and then nothing starts", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "trap '' TERM; echo ready; " + idle})
		start(t, host, target)
		l := open[driver.Logger](t, host, request(target))
		awaitLines(t, l, 1)
		follower, err := l.Logs(bounded(t), driver.LogOptions{Follow: true})
		if err != nil {
			t.Fatalf("Logs: %v", err)
		}
		defer follower.Close()
		closed := make(chan error, 1)
		go func() { closed <- host.Close() }()
		select {
		case err := <-closed:
			if err != nil {
				t.Errorf("Close: %v", err)
			}
		case <-time.After(timeout):
			t.Fatal("Close hangs")
		}
		for {
			_, err := follower.Next(bounded(t))
			if err != nil {
				if errors.Is(err, errWaited) {
					t.Errorf("the follower: %v", err)
				}
				break
			}
		}
		if err := host.Start(bounded(t), instance(h.Target(t, Instance{Script: idle}))); err == nil {
			t.Error("started after Close")
		}
	})
}

var errImpatient = errors.New("the test waits no longer")
