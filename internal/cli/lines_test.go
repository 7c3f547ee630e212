package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/google/go-cmp/cmp"
	clocktesting "k8s.io/utils/clock/testing"
)

// logRecord is a record of a server's log: a line, or a part of one.
type logRecord struct {
	stderr  bool
	data    string
	partial bool
}

// recordsOf cuts text into records as the server does. Its times are seconds.
func recordsOf(text string, part int) []logRecord {
	var records []logRecord
	for line := range strings.Lines(text) {
		line, whole := strings.CutSuffix(line, "\n")
		for len(line) > part {
			records = append(records, logRecord{data: line[:part], partial: true})
			line = line[part:]
		}
		records = append(records, logRecord{data: line, partial: !whole})
	}
	return records
}

func recordTime(i int) time.Time { return time.Date(2026, 1, 1, 0, 0, i, 0, time.UTC) }

// response is what the server answers who resumes after a time, "" for all.
func response(t *testing.T, records []logRecord, cursor string) string {
	t.Helper()
	var after time.Time
	if cursor != "" {
		after = timeOf(t, cursor)
	}
	var b strings.Builder
	pending, of := false, false
	for i, r := range records {
		if !recordTime(i).After(after) {
			continue
		}
		if pending && r.stderr != of {
			b.WriteByte('\n')
			pending = false
		}
		if !pending {
			b.WriteString(recordTime(i).Format("2006-01-02T15:04:05.000000000Z07:00") + " ")
		}
		b.WriteString(r.data)
		if !r.partial {
			b.WriteByte('\n')
		}
		pending, of = r.partial, r.stderr
	}
	return b.String()
}

// unstamped takes the times off.
func unstamped(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		_, rest, _ := strings.Cut(line, " ")
		b.WriteString(rest)
	}
	return b.String()
}

func TestLogCutAnywhereIsResumedExactly(t *testing.T) {
	const part, buffer = 40, 100
	records := slices.Concat(
		recordsOf("short\n\n"+strings.Repeat("0123456789", 50)+"\nafter\n", part),
		recordsOf(strings.Repeat("äöü€😀", 30)+"\n \n"+strings.Repeat("x", part)+"\n"+strings.Repeat("y", part+1)+"\n", part),
		// The other stream comes between the parts of a line.
		[]logRecord{{data: strings.Repeat("p", part), partial: true}, {stderr: true, data: "between"}, {data: "q"}},
		recordsOf(strings.Repeat("z", 4*buffer)+"\nthe last one has no end", part),
	)
	whole := response(t, records, "")
	for _, timestamps := range []bool{false, true} {
		want := whole + "\n"
		if !timestamps {
			want = unstamped(want)
		}
		random := rand.New(rand.NewPCG(1, 2))
		for cut := range len(whole) + 1 {
			got := &output{}
			m := newMerger(got, lineStyle{timestamps: timestamps})
			go m.run()
			lines := &logReader{to: m.source(sourceLive), max: buffer, from: func([]byte) *origin { return &origin{} }}
			var p position
			broken := errors.New("broken")
			body := whole[:cut]
			for range 4 {
				// The first cut is everywhere, those that follow anywhere.
				err := lines.read(io.MultiReader(iotest.OneByteReader(strings.NewReader(body)), iotest.ErrReader(broken)), &p)
				if !errors.Is(err, broken) {
					t.Fatalf("cut at %d: error %v, want %v", cut, err, broken)
				}
				body = response(t, records, p.cursor())
				body = body[:random.IntN(len(body)+1)]
			}
			if err := lines.read(strings.NewReader(response(t, records, p.cursor())), &p); err != nil {
				t.Fatalf("cut at %d: %v", cut, err)
			}
			lines.to.close()
			if err := m.finish(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got.String()); diff != "" {
				t.Fatalf("cut at %d of %d, timestamps %t: output (-want +got):\n%s", cut, len(whole), timestamps, diff)
			}
		}
	}
}

func TestCutLineWhoseRestIsGoneIsEnded(t *testing.T) {
	got := &output{}
	m := newMerger(got, lineStyle{})
	go m.run()
	lines := &logReader{to: m.source(sourceLive), max: 60, from: func([]byte) *origin { return &origin{} }}
	var p position
	_ = lines.read(io.MultiReader(strings.NewReader(at(1, strings.Repeat("x", 60))), iotest.ErrReader(io.ErrUnexpectedEOF)), &p)
	if err := lines.read(strings.NewReader(at(2, "next")+"\n"), &p); err != nil {
		t.Fatal(err)
	}
	lines.to.close()
	if err := m.finish(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Repeat("x", 60-len(at(1, "")))+"\nnext\n", got.String()); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

func TestLineReader(t *testing.T) {
	long := strings.Repeat("x", 1000)
	tests := map[string]struct {
		in   string
		want []string // pieces, those of lines that ended with a newline
	}{
		"nothing":                         {want: []string{""}},
		"lines":                           {in: "a\n\nb\n", want: []string{"a\n", "\n", "b\n", ""}},
		"a last line without an end":      {in: "a\nb", want: []string{"a\n", "b"}},
		"a long line comes in pieces":     {in: long[:150] + "\nb", want: []string{long[:64], long[:64], long[:22] + "\n", "b"}},
		"pieces end between characters":   {in: strings.Repeat("€", 40) + "\n", want: []string{strings.Repeat("€", 21), strings.Repeat("€", 19) + "\n", ""}},
		"what isn't UTF-8 is cut as well": {in: strings.Repeat("\x80", 70), want: []string{strings.Repeat("\x80", 64), strings.Repeat("\x80", 6)}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			for _, r := range []io.Reader{strings.NewReader(test.in), iotest.OneByteReader(strings.NewReader(test.in))} {
				// Whatever else has been read, no piece is longer.
				l := &lineReader{r: r, max: 64}
				var got []string
				for {
					piece, ended, err := l.next()
					text := string(piece)
					if ended {
						text += "\n"
					}
					got = append(got, text)
					if err != nil {
						break
					}
				}
				if strings.Join(got, "") != test.in {
					t.Fatalf("the pieces %q aren't %q", got, test.in)
				}
				if _, one := r.(*strings.Reader); !one {
					if diff := cmp.Diff(test.want, got); diff != "" {
						t.Errorf("pieces (-want +got):\n%s", diff)
					}
				}
			}
		})
	}
}

func TestQuietLogsHaveSmallBuffers(t *testing.T) {
	r, w := io.Pipe()
	l := &lineReader{r: r, max: lineBuffer}
	go func() {
		defer w.Close()
		io.WriteString(w, strings.Repeat("x", lineBuffer-1)+"\n")
		io.WriteString(w, "short\n")
	}()
	for _, want := range []int{lineBuffer - 1, 5} {
		if line, ended, err := l.next(); len(line) != want || !ended || err != nil {
			t.Fatalf("a line of %d bytes, ended %t, error %v; want %d", len(line), ended, err, want)
		}
	}
	if got := cap(l.buf); got != smallBuffer {
		t.Errorf("the buffer has %d bytes, want %d", got, smallBuffer)
	}
}

// merging is a merger whose clock and writer are the test's.
type merging struct {
	*merger
	t     *testing.T
	clock *clocktesting.FakeClock
}

func newMerging(t *testing.T, style lineStyle) *merging {
	c := clocktesting.NewFakeClock(recordTime(0))
	m := newMerger(io.Discard, style)
	m.clock = c
	return &merging{m, t, c}
}

// written returns what is written at this time.
func (m *merging) written() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	for m.next(m.clock.Now()) == 0 {
	}
	out := string(m.out)
	m.out = nil
	return out
}

func (m *merging) want(want string) {
	m.t.Helper()
	if diff := cmp.Diff(want, m.written()); diff != "" {
		m.t.Fatalf("written (-want +got):\n%s", diff)
	}
}

// say pushes a line of which the first digit is the time.
func (m *merging) say(s *lineSource, text string) {
	m.t.Helper()
	if err := s.push(line{from: &origin{target: "web", instance: "web-0"}, at: recordTime(int(text[0] - '0')), raw: []byte(text), begins: true, ends: true}); err != nil {
		m.t.Fatal(err)
	}
}

func TestMergerOrdersByTime(t *testing.T) {
	tests := map[string]func(m *merging){
		"one source doesn't wait": func(m *merging) {
			a := m.source(sourceLive)
			m.say(a, "1a")
			m.want("1a\n")
		},
		"a line waits for a quiet source, but not longer than the window": func(m *merging) {
			a, _ := m.source(sourceLive), m.source(sourceLive)
			m.say(a, "5a")
			m.want("")
			m.clock.Step(mergeWindow - time.Millisecond)
			m.want("")
			m.clock.Step(time.Millisecond)
			m.want("5a\n")
		},
		"an earlier line comes first": func(m *merging) {
			a, b := m.source(sourceLive), m.source(sourceLive)
			m.say(a, "5a")
			m.want("")
			m.say(b, "4b")
			m.want("4b\n")
			m.say(b, "6b")
			m.want("5a\n")
		},
		"a line isn't kept by earlier ones that come late": func(m *merging) {
			a, b, _ := m.source(sourceLive), m.source(sourceLive), m.source(sourceLive)
			m.say(a, "5a")
			m.clock.Step(mergeWindow / 2)
			m.say(b, "4b")
			m.want("")
			m.clock.Step(mergeWindow / 2)
			m.want("4b\n5a\n")
		},
		"a line that comes too late comes all the same, in order with others that do": func(m *merging) {
			a, b := m.source(sourceLive), m.source(sourceLive)
			m.say(a, "5a")
			m.clock.Step(mergeWindow)
			m.want("5a\n")
			m.say(b, "4b")
			m.clock.Step(mergeWindow)
			m.want("4b\n")
		},
		"a line of a clock that is ahead leaves the others in order": func(m *merging) {
			a, b, c := m.source(sourceLive), m.source(sourceLive), m.source(sourceLive)
			m.say(a, "9a")
			m.clock.Step(mergeWindow)
			m.want("9a\n")
			m.say(b, "3b")
			m.want("")
			m.say(c, "2c")
			m.clock.Step(mergeWindow)
			m.want("2c\n3b\n")
			// The same while another one of it is held.
			m.say(b, "5b")
			m.say(a, "9a")
			m.clock.Step(mergeWindow / 2)
			m.want("")
			m.say(c, "4c")
			m.clock.Step(mergeWindow / 2)
			m.want("4c\n5b\n9a\n")
		},
		"a source that isn't connected isn't waited for": func(m *merging) {
			a, b := m.source(sourceLive), m.source(sourceLive)
			m.say(a, "5a")
			b.set(sourceAway)
			m.want("5a\n")
		},
		"a source that has ended isn't waited for": func(m *merging) {
			a, b := m.source(sourceLive), m.source(sourceLive)
			m.say(a, "5a")
			m.say(b, "6b")
			b.close()
			m.want("5a\n")
			m.say(a, "7a")
			m.want("6b\n7a\n")
		},
		"the past is in order however long it takes": func(m *merging) {
			m.patience = 0
			a, b, c := m.source(sourcePast), m.source(sourcePast), m.source(sourcePast)
			m.say(a, "1a")
			m.say(a, "4a")
			m.say(b, "3b")
			m.clock.Step(time.Hour)
			m.want("")
			m.say(c, "2c")
			m.want("1a\n2c\n")
			c.set(sourceLive)
			m.want("3b\n")
			b.set(sourceLive)
			m.want("4a\n")
		},
		"what is live comes after the past": func(m *merging) {
			a, b := m.source(sourcePast), m.source(sourcePast)
			a.set(sourceLive)
			m.say(a, "9a")
			m.clock.Step(mergeWindow)
			m.want("")
			m.say(b, "1b")
			m.want("1b\n")
			b.set(sourceLive)
			m.want("9a\n")
		},
		"a source that says nothing holds the past for a while only": func(m *merging) {
			a, b := m.source(sourcePast), m.source(sourcePast)
			m.say(a, "2a")
			m.clock.Step(mergePatience - 1)
			m.want("")
			m.clock.Step(1)
			m.want("2a\n")
			a.set(sourceLive)
			m.say(b, "1b")
			m.clock.Step(mergeWindow)
			m.want("1b\n")
		},
		"what is held is bounded": func(m *merging) {
			a, _ := m.source(sourceLive), m.source(sourceLive)
			long := strings.Repeat("x", mergeBudget/4)
			for i := range 4 {
				m.say(a, fmt.Sprint(i)+long)
			}
			if got := m.written(); !strings.HasPrefix(got, "0x") || strings.Count(got, "\n") != 1 {
				t.Errorf("%d bytes were written, want the first line", len(got))
			}
		},
		"a line that was begun is ended before others when it stays away": func(m *merging) {
			m.style.prefix = true
			a, b := m.source(sourceLive), m.source(sourceLive)
			piece := line{from: &origin{target: "web", instance: "web-0"}, at: recordTime(1), raw: []byte("long "), begins: true}
			if err := a.push(piece); err != nil {
				t.Fatal(err)
			}
			m.say(b, "2b")
			m.want("[web/web-0] long ")
			m.clock.Step(mergeWindow)
			m.want("\n[web/web-0] 2b\n")
			piece.begins, piece.ends, piece.raw = false, true, []byte("line")
			if err := a.push(piece); err != nil {
				t.Fatal(err)
			}
			m.clock.Step(mergeWindow)
			m.want("[web/web-0] line\n")
		},
		"a line that was begun goes on when nobody else has one": func(m *merging) {
			a, _ := m.source(sourceAway), m.source(sourceLive)
			piece := line{from: &origin{}, at: recordTime(1), raw: []byte("long "), begins: true}
			if err := a.push(piece); err != nil {
				t.Fatal(err)
			}
			m.clock.Step(mergeWindow)
			m.want("long ")
			m.clock.Step(time.Hour)
			m.want("")
			piece.begins, piece.ends, piece.raw = false, true, []byte("line")
			if err := a.push(piece); err != nil {
				t.Fatal(err)
			}
			m.want("line\n")
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) { test(newMerging(t, lineStyle{})) })
	}
}

func TestLinesOfManyStreamsStayWhole(t *testing.T) {
	noLeaks(t)
	const streams, lines = 8, 200
	got := &output{}
	m := newMerger(got, lineStyle{})
	m.patience = 0
	var wg sync.WaitGroup
	for i := range streams {
		to := m.source(sourcePast)
		r, w := io.Pipe()
		wg.Go(func() {
			defer w.Close()
			for n := range lines {
				// In two pieces, some longer than the buffer.
				text := strings.Repeat(string(rune('a'+i)), 10+i*lineBuffer/4)
				io.WriteString(w, recordTime(n).Format(time.RFC3339)+" "+text[:5])
				io.WriteString(w, text[5:]+"\n")
			}
		})
		wg.Go(func() {
			defer to.close()
			from := &origin{}
			reader := &logReader{to: to, max: lineBuffer, from: func([]byte) *origin { return from }}
			if err := reader.read(r, &position{}); err != nil {
				t.Error(err)
			}
		})
	}
	go m.run()
	wg.Wait()
	if err := m.finish(); err != nil {
		t.Fatal(err)
	}
	count := map[byte]int{}
	for line := range strings.Lines(got.String()) {
		line = strings.TrimSuffix(line, "\n")
		if line == "" || strings.Trim(line, line[:1]) != "" || len(line) != 10+int(line[0]-'a')*lineBuffer/4 {
			t.Fatalf("a line is mixed up: %d bytes beginning with %.20q", len(line), line)
		}
		count[line[0]]++
		// All sources have the same times: none is ahead of another.
		for i := range streams {
			if ahead := count[line[0]] - count[byte('a'+i)]; ahead > 1 {
				t.Fatalf("%q is %d lines ahead", line[0], ahead)
			}
		}
	}
	for i := range streams {
		if n := count[byte('a'+i)]; n != lines {
			t.Errorf("stream %d: %d lines, want %d", i, n, lines)
		}
	}
}

func TestColors(t *testing.T) {
	plain, colored := &lineStyle{}, &lineStyle{color: true}
	of := func(s *lineStyle, instance string) string {
		return string(s.appendPrefix(nil, &origin{target: "web", instance: instance}))
	}
	if diff := cmp.Diff("[web/web-0] ", of(plain, "web-0")); diff != "" {
		t.Errorf("without colours (-want +got):\n%s", diff)
	}
	first := of(colored, "web-0")
	if !strings.HasPrefix(first, "\x1b[") || !strings.HasSuffix(first, "m[web/web-0]\x1b[0m ") {
		t.Errorf("painted %q", first)
	}
	if first != of(colored, "web-0") {
		t.Error("an instance changes its colour")
	}
	used := map[string]bool{}
	for i := range 100 {
		used[strings.SplitN(of(colored, fmt.Sprint("web-", i)), "m", 2)[0]] = true
	}
	if len(used) != len(colors) {
		t.Errorf("100 instances use %d colours, want %d", len(used), len(colors))
	}
}

func TestJSONLines(t *testing.T) {
	stamp := recordTime(1)
	tests := map[string]struct {
		text  string
		ends  bool
		style lineStyle
		want  logObject
	}{
		"a line": {text: "text", ends: true, style: lineStyle{namespace: "shop"},
			want: logObject{Time: &stamp, Namespace: "shop", Target: "web", Instance: "web-0", Line: "text"}},
		"the stream, where it was asked for": {text: "text", ends: true, style: lineStyle{stream: "stderr"},
			want: logObject{Time: &stamp, Target: "web", Instance: "web-0", Stream: "stderr", Line: "text"}},
		"what JSON has to escape": {text: "\"<\\\x00\t\u2028", ends: true,
			want: logObject{Time: &stamp, Target: "web", Instance: "web-0", Line: "\"<\\\x00\t\u2028"}},
		"what isn't UTF-8": {text: "a\xffb", ends: true,
			want: logObject{Time: &stamp, Target: "web", Instance: "web-0", Line: "a\ufffdb", Base64: base64.StdEncoding.EncodeToString([]byte("a\xffb"))}},
		"a line that goes on": {text: "text",
			want: logObject{Time: &stamp, Target: "web", Instance: "web-0", Line: "text", Partial: true}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			l := line{from: &origin{target: "web", instance: "web-0"}, at: stamp, ends: test.ends}
			encoded := test.style.appendJSON(nil, l, []byte(test.text))
			if bytes.Count(encoded, []byte{'\n'}) != 1 {
				t.Errorf("%q isn't one line", encoded)
			}
			var got logObject
			if err := json.Unmarshal(encoded, &got); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("object (-want +got):\n%s", diff)
			}
		})
	}
}

func BenchmarkFollowedLines(b *testing.B) {
	text := []byte(recordTime(1).Format("2006-01-02T15:04:05.000000000Z07:00") + " " + strings.Repeat("x", 100) + "\n")
	block := bytes.Repeat(text, 1000)
	b.SetBytes(int64(len(block)))
	for _, sources := range []int{1, 8} {
		b.Run(fmt.Sprint("sources=", sources), func(b *testing.B) {
			b.SetBytes(int64(len(block) * sources))
			for b.Loop() {
				m := newMerger(io.Discard, lineStyle{})
				var wg sync.WaitGroup
				for range sources {
					to, from := m.source(sourcePast), &origin{}
					wg.Go(func() {
						defer to.close()
						reader := &logReader{to: to, max: lineBuffer, from: func([]byte) *origin { return from }}
						if err := reader.read(bytes.NewReader(block), nil); err != nil {
							b.Error(err)
						}
					})
				}
				go m.run()
				wg.Wait()
				if err := m.finish(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
