package drivertest

import (
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func testLogs(t *testing.T, h Harness) {
	// The pauses keep what comes from two pipes in order.
	d, req := h.Instance(t, Instance{Script: `
		echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three; sleep 0.1; echo four >&2; sleep 0.1; echo five; ` + idle})
	all := []line{stdout("one"), stderr("two"), stdout("three"), stderr("four"), stdout("five")}
	l := open[driver.Logger](t, d, req)
	awaitLines(t, l, len(all))
	lines, times := readLog(t, l, driver.LogOptions{})
	if diff := cmp.Diff(all, lines); diff != "" {
		t.Fatalf("the whole log (-want +got):\n%s", diff)
	}

	for name, test := range map[string]struct {
		opts driver.LogOptions
		want []line
	}{
		"stdout alone":                        {driver.LogOptions{Stream: v1.LogStreamStdout}, []line{all[0], all[2], all[4]}},
		"stderr alone":                        {driver.LogOptions{Stream: v1.LogStreamStderr}, []line{all[1], all[3]}},
		"both streams by name":                {driver.LogOptions{Stream: v1.LogStreamAll}, all},
		"since is inclusive":                  {driver.LogOptions{Since: times[1]}, all[1:]},
		"since the future is nothing":         {driver.LogOptions{Since: time.Now().Add(time.Hour)}, nil},
		"after is exclusive":                  {driver.LogOptions{After: times[1]}, all[2:]},
		"after the last is nothing":           {driver.LogOptions{After: times[4]}, nil},
		"tail of 0":                           {driver.LogOptions{Tail: ptr.To[int64](0)}, nil},
		"tail of 2":                           {driver.LogOptions{Tail: ptr.To[int64](2)}, all[3:]},
		"tail of more than there is":          {driver.LogOptions{Tail: ptr.To[int64](100)}, all},
		"tail of one stream":                  {driver.LogOptions{Tail: ptr.To[int64](2), Stream: v1.LogStreamStdout}, []line{all[2], all[4]}},
		"tail of more than since leaves":      {driver.LogOptions{Tail: ptr.To[int64](4), Since: times[3]}, all[3:]},
		"tail of less than since leaves":      {driver.LogOptions{Tail: ptr.To[int64](1), Since: times[1]}, all[4:]},
		"tail and since and stream, combined": {driver.LogOptions{Tail: ptr.To[int64](2), Since: times[2], Stream: v1.LogStreamStderr}, all[3:4]},
	} {
		t.Run(name, func(t *testing.T) {
			lines, _ := readLog(t, l, test.opts)
			if diff := cmp.Diff(test.want, lines); diff != "" {
				t.Errorf("lines (-want +got):\n%s", diff)
			}
		})
	}

	t.Run("without a previous run there is no log of it", func(t *testing.T) {
		_, err := l.Logs(bounded(t), driver.LogOptions{Previous: true})
		wantKind(t, err, driver.NotFound)
	})

	t.Run("long lines are split, and bytes are kept", func(t *testing.T) {
		long := strings.Repeat("x", 3*driver.MaxLogLine+5)
		d, req := h.Instance(t, Instance{Script: `head -c 49157 /dev/zero | tr '\0' x; echo
			printf 'a\000b\r\n\n\377\376\n'; printf 'no newline'`, RestartPolicy: v1.RestartNever})
		l := open[driver.Logger](t, d, req)
		r, err := l.Logs(bounded(t), driver.LogOptions{Follow: true})
		if err != nil {
			t.Fatalf("Logs: %v", err)
		}
		defer r.Close()
		var lines []line
		for {
			got, _ := readLine(t, r)
			if got == nil {
				break
			}
			lines = append(lines, *got)
		}
		if want, got := long+"\na\x00b\r\n\n\xff\xfe\nno newline", joined(lines); got != want {
			t.Errorf("the log is %d bytes, want %d; it ends with %q", len(got), len(want), got[max(0, len(got)-30):])
		}
	})

	if h.Host == nil {
		return
	}

	t.Run("the log of an instance that hasn't started is empty", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: idle})
		l := open[driver.Logger](t, host, request(target))
		if lines, _ := readLog(t, l, driver.LogOptions{}); lines != nil {
			t.Errorf("lines: %v", lines)
		}
	})

	t.Run("runs are apart, and follow and after go through them", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "echo begin; echo end"})
		id := instance(target).ID()
		l := open[driver.Logger](t, host, request(target))
		follower, err := l.Logs(bounded(t), driver.LogOptions{Follow: true})
		if err != nil {
			t.Fatalf("Logs: %v", err)
		}
		defer follower.Close()
		const runs = 3
		var followed []line
		var times []time.Time
		for range runs {
			start(t, host, target)
			end(t, host, id)
			for range 2 {
				got, at := readLine(t, follower)
				if got == nil {
					t.Fatal("the follower has ended")
				}
				if n := len(times); n > 0 && !at.After(times[n-1]) {
					t.Errorf("time %v isn't after %v", at, times[n-1])
				}
				followed, times = append(followed, *got), append(times, at)
			}
		}
		one := []line{stdout("begin"), stdout("end")}
		var three []line
		for range runs {
			three = append(three, one...)
		}
		if diff := cmp.Diff(three, followed); diff != "" {
			t.Errorf("followed (-want +got):\n%s", diff)
		}
		lines, last := readLog(t, l, driver.LogOptions{})
		if diff := cmp.Diff(one, lines); diff != "" {
			t.Errorf("the last run (-want +got):\n%s", diff)
		}
		if !last[0].Equal(times[4]) {
			t.Errorf("the last run begins at %v, want %v", last[0], times[4])
		}
		lines, previous := readLog(t, l, driver.LogOptions{Previous: true})
		if diff := cmp.Diff(one, lines); diff != "" {
			t.Errorf("the previous run (-want +got):\n%s", diff)
		}
		if !previous[0].Equal(times[2]) {
			t.Errorf("the previous run begins at %v, want %v", previous[0], times[2])
		}
		for i, at := range times {
			if lines, _ := readLog(t, l, driver.LogOptions{After: at}); len(lines) != len(times)-1-i {
				t.Errorf("%d lines after line %d, want %d", len(lines), i, len(times)-1-i)
			}
		}

		if err := host.Remove(bounded(t), id); err != nil {
			t.Fatalf("Remove: %v", err)
		}
		if _, err := follower.Next(bounded(t)); err != io.EOF {
			t.Errorf("the follower of a removed instance: %v, want io.EOF", err)
		}
	})

	t.Run("a follower ends when the instance won't be started again", func(t *testing.T) {
		host, target := h.Host(t), h.Target(t, Instance{Script: "echo once", RestartPolicy: v1.RestartNever})
		l := open[driver.Logger](t, host, request(target))
		start(t, host, target)
		lines, _ := readLog(t, l, driver.LogOptions{Follow: true})
		if diff := cmp.Diff([]line{stdout("once")}, lines); diff != "" {
			t.Errorf("lines (-want +got):\n%s", diff)
		}
	})
}
