package process

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/utils/ptr"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
)

func BenchmarkExec(b *testing.B) {
	for _, tty := range []bool{false, true} {
		b.Run(fmt.Sprintf("tty=%t", tty), func(b *testing.B) {
			d := newDriver(b, Options{})
			target := newTarget(script("exec sleep 1000"))
			start(b, d, target)
			c := open(b, d, target)
			for b.Loop() {
				output(b, c, driver.ExecOptions{Command: []string{"true"}, TTY: tty})
			}
		})
	}
}

// benchLine is as long as lines of logs usually are.
var benchLine = strings.Repeat("x", 119) + "\n"

func BenchmarkLogWrite(b *testing.B) {
	l := newLog(b, b.TempDir(), func(s *logSettings) { s.fileSize = 10 << 20 })
	run := l.begin()
	block := []byte(strings.Repeat(benchLine, 64<<10/len(benchLine)))
	b.SetBytes(int64(len(block)))
	for b.Loop() {
		if _, err := l.write(run, v1.LogStreamStdout, block, false); err != nil {
			b.Fatal(err)
		}
	}
}

// bigLog makes the files of a log as if they had been written.
func bigLog(b *testing.B, size int64) *instanceLog {
	b.Helper()
	dir := b.TempDir()
	const files = 8
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano()
	var s driver.LogStamp
	for part := range files {
		f, err := os.Create(filepath.Join(dir, segmentName(1, part)))
		if err != nil {
			b.Fatal(err)
		}
		var block []byte
		for written := int64(0); written < size/files; {
			block = block[:0]
			for len(block) < 1<<20 {
				at += 1000
				block = s.Append(block, time.Unix(0, at))
				block = append(block, " stdout F "...)
				block = append(block, benchLine...)
			}
			n, err := f.Write(block)
			if err != nil {
				b.Fatal(err)
			}
			written += int64(n)
		}
		if err := f.Close(); err != nil {
			b.Fatal(err)
		}
	}
	return newLog(b, dir, nil)
}

func BenchmarkLogRead(b *testing.B) {
	const size = 256 << 20
	l := bigLog(b, size)
	b.SetBytes(size)
	b.ReportAllocs()
	for b.Loop() {
		r, err := l.read(driver.LogOptions{})
		if err != nil {
			b.Fatal(err)
		}
		for {
			if _, err := r.Next(b.Context()); err == io.EOF {
				break
			} else if err != nil {
				b.Fatal(err)
			}
		}
		r.Close()
	}
}

func BenchmarkLogSeekInGiB(b *testing.B) {
	l := bigLog(b, 1<<30)
	middle := time.Date(2026, 1, 1, 0, 0, 3, 0, time.UTC)
	for name, opts := range map[string]driver.LogOptions{
		"tail of 10":     {Tail: ptr.To[int64](10)},
		"tail of 10000":  {Tail: ptr.To[int64](10000)},
		"after a moment": {After: middle},
		"since a moment": {Since: middle},
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				r, err := l.read(opts)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := r.Next(b.Context()); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}
