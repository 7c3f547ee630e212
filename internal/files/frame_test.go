//go:build linux

package files

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// script is what one side of the protocol says, whatever the other does.
type script struct {
	*conn
	bytes.Buffer
}

func newScript() *script {
	s := &script{}
	s.conn = newConn(nil, &s.Buffer)
	_ = s.hello("")
	return s
}

func (s *script) say(kind byte, payload *encoder) *script {
	_ = s.conn.write(kind, payload.b)
	_ = s.conn.flush()
	return s
}

func (s *script) top(name string, isDir bool) *script {
	return s.say(frameTop, new(encoder).text(name, 1000).flag(isDir))
}

func (s *script) dir(number, parent uint64, name string) *script {
	return s.say(frameDir, new(encoder).number(number).number(parent).text(name, 1000).mode(0o755).time(time.Unix(1, 0)))
}

func (s *script) file(number, parent uint64, name string, size uint64) *script {
	return s.say(frameFile, new(encoder).number(number).number(parent).text(name, 1000).mode(0o644).time(time.Unix(1, 0)).number(size))
}

func (s *script) link(parent uint64, name, target string) *script {
	return s.say(frameLink, new(encoder).number(parent).text(name, 1000).time(time.Unix(1, 0)).text(target, 10000))
}

func (s *script) begin(number, keep uint64) *script {
	return s.say(frameBegin, new(encoder).number(number).number(keep))
}

func (s *script) data(text string) *script { return s.say(frameData, &encoder{b: []byte(text)}) }

func (s *script) end(number uint64, sum string) *script {
	return s.say(frameEnd, new(encoder).number(number).number(endWhole).text(sum, 1000))
}

// quiet is an input that is closed by its reader.
type quiet struct{ io.Reader }

func (quiet) Close() error { return nil }

// A receiver takes nothing from a sender that breaks the rules, and writes
// nothing outside of the destination whatever it is told.
func TestHostileSenders(t *testing.T) {
	deep := newScript().top("d", true)
	for i := range uint64(MaxDepth + 1) {
		deep.dir(i+1, i, "d")
	}
	many := newScript().top("d", true).dir(1, 0, "d")
	for i := range uint64(3 * window) {
		many.file(i+2, 1, "f"+strings.Repeat("x", int(i%200)), 1)
	}
	dirs := newScript().top("d", true).dir(1, 0, "d")
	for i := range uint64(3 * window) {
		dirs.dir(i+2, 1, "d"+strings.Repeat("x", int(i%200)))
	}
	big := newScript()
	big.Buffer.Write([]byte{frameData, 0x7f, 0xff, 0xff, 0xff})
	tests := map[string]struct {
		says *script
		want string // of the fatal error; "" for a problem
		told []string
	}{
		"a name that leads up":                  {newScript().top("d", true).dir(1, 0, "d").file(2, 1, "../up", 1), "", []string{`d/../up: "../up" has a character`}},
		"a name that is the one above":          {newScript().top("d", true).dir(1, 0, "d").dir(2, 1, ".."), "", []string{`d/..: ".." is no name`}},
		"a name that is absolute":               {newScript().top("d", true).dir(1, 0, "d").link(1, "/etc/x", "y"), "", []string{`/etc/x" has a character`}},
		"a name with a zero byte":               {newScript().top("d", true).dir(1, 0, "d").file(2, 1, "a\x00b", 1), "", []string{"has a character"}},
		"a name that is too long":               {newScript().top("d", true).dir(1, 0, "d").file(2, 1, strings.Repeat("x", 300), 1), "", []string{"300 bytes is too long"}},
		"a name of unfinished copies":           {newScript().top("d", true).dir(1, 0, "d").link(1, partialOf("f"), "/etc/passwd"), "", []string{"a name for unfinished copies"}},
		"a copy that leads up":                  {newScript().top("..", true), "is no name", nil},
		"a copy with a path":                    {newScript().top("a/b", false), "has a character", nil},
		"a link, and then what is below it":     {newScript().top("d", true).dir(1, 0, "d").link(1, "l", "..").dir(2, 1, "l").file(3, 2, "up", 0), "", []string{"d/l: there is a symbolic link"}},
		"a bad name in a directory that failed": {newScript().top("d", true).dir(1, 0, "d").link(1, "l", "..").dir(2, 1, "l").file(3, 2, "../up", 1), "", []string{"d/l: there is a symbolic link"}},
		"another copy than was announced":       {newScript().top("d", true).dir(1, 0, "other"), "it isn't what was to come", nil},
		"a file for a directory":                {newScript().top("d", true).file(1, 0, "d", 1), "it isn't what was to come", nil},
		"two copies":                            {newScript().top("d", true).dir(1, 0, "d").dir(2, 0, "d"), "it isn't what was to come", nil},
		"two beginnings":                        {newScript().top("d", true).top("e", true), "it begins twice", nil},
		"entries before the beginning":          {newScript().dir(1, 0, "d"), "doesn't begin with", nil},
		"a directory that isn't known":          {newScript().top("d", true).dir(1, 0, "d").file(2, 7, "f", 1), "a directory that isn't known", nil},
		"a directory that is over":              {newScript().top("d", true).dir(1, 0, "d").say(frameLeave, new(encoder).number(1)).file(2, 1, "f", 1), "a directory that isn't known", nil},
		"a directory that isn't done":           {newScript().top("d", true).dir(1, 0, "d").file(2, 1, "f", 1).say(frameLeave, new(encoder).number(1)), "isn't done", nil},
		"numbers out of order":                  {newScript().top("d", true).dir(2, 0, "d"), "out of order", nil},
		"too deep":                              {deep, "more than 256 directories", nil},
		"too many files at once":                {many, "too many files at once", nil},
		"too many directories at once":          {dirs, "too many directories at once", nil},
		"contents without a file":               {newScript().top("f", false).data("x"), "contents without a file", nil},
		"contents of another file":              {newScript().top("f", false).file(1, 0, "f", 1).begin(2, 0), "out of order", nil},
		"contents that aren't there":            {newScript().top("f", false).file(1, 0, "f", 9).begin(1, 5), "weren't asked for", nil},
		"more contents than announced":          {newScript().top("f", false).file(1, 0, "f", 3).begin(1, 0).data("1234"), "more contents than", nil},
		"less contents than announced":          {newScript().top("f", false).file(1, 0, "f", 3).begin(1, 0).data("12").end(1, ""), "less contents than", nil},
		"another hash":                          {newScript().top("f", false).file(1, 0, "f", 3).begin(1, 0).data("123").end(1, "x"), "", []string{"f: its SHA-256 isn't the source's"}},
		"an end that is too early":              {newScript().top("d", true).dir(1, 0, "d").say(frameDone, new(encoder)), "it ends too early", nil},
		"nothing at all":                        {newScript().top("d", true).say(frameDone, new(encoder)), "it ends too early", nil},
		"an unknown frame":                      {newScript().top("d", true).say('?', new(encoder)), "an unknown frame", nil},
		"a huge frame":                          {big, "a frame of 2147483647 bytes", nil},
		"a frame with more than it has":         {newScript().top("d", true).say(frameLeave, &encoder{b: []byte{1, 2, 3}}), "can't be read", nil},
		"a size that isn't one":                 {newScript().top("f", false).file(1, 0, "f", 1<<63), "can't be read", nil},
		"another language":                      {&script{Buffer: *bytes.NewBufferString("HTTP/1.1 200 OK\r\n\r\n")}, "", nil},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			into := filepath.Join(dir, "into")
			if err := os.Mkdir(into, 0o755); err != nil {
				t.Fatal(err)
			}
			var told []string
			_, err := Receive(t.Context(), quiet{&test.says.Buffer}, io.Discard, Options{Path: into, Report: func(p Problem) {
				told = append(told, p.Path+": "+p.Text)
			}})
			if err == nil {
				t.Error("it succeeded")
			}
			if fatal, ok := errors.AsType[*FatalError](err); test.want != "" && (!ok || !strings.Contains(fatal.Text, test.want)) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			if len(told) != len(test.told) || len(told) > 0 && !strings.Contains(told[0], test.told[0]) {
				t.Errorf("problems %q, want %q", told, test.told)
			}
			onlyInside(t, dir)
		})
	}
}

// onlyInside fails if there is something beside the directory "into", or a part
// of a copy in it.
func onlyInside(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Errorf("something was written outside: %v", entries)
	}
	_ = filepath.WalkDir(filepath.Join(dir, "into"), func(path string, e fs.DirEntry, err error) error {
		if err == nil && partialName(e.Name()) {
			t.Errorf("left over: %s", path)
		}
		return nil
	})
}

func FuzzReceive(f *testing.F) {
	f.Add(newScript().top("d", true).dir(1, 0, "d").link(1, "l", "..").file(2, 1, "f", 3).begin(2, 0).data("123").end(2, "").Bytes())
	f.Add(newScript().top("f", false).file(1, 0, "f", 3).Bytes())
	f.Fuzz(func(t *testing.T, says []byte) {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, "into"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, _ = Receive(t.Context(), quiet{bytes.NewReader(says)}, io.Discard, Options{Path: filepath.Join(dir, "into"), Report: func(Problem) {}})
		onlyInside(t, dir)
	})
}

func FuzzSend(f *testing.F) {
	f.Add(newScript().say(frameRoot, new(encoder).text("x", 10)).say(frameWant, new(encoder).number(2).number(0)).Bytes())
	f.Add(newScript().say(frameRoot, new(encoder).text("x", 10)).say(frameSkip, new(encoder).number(2)).say(frameDone, new(encoder).number(1).number(1).number(0)).Bytes())
	f.Fuzz(func(t *testing.T, says []byte) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "a"), "contents")
		_, _ = Send(t.Context(), quiet{bytes.NewReader(says)}, io.Discard, Options{Path: dir, Report: func(Problem) {}})
	})
}

func TestPayloadsSurvive(t *testing.T) {
	now := time.Unix(-5, 999_999_999)
	mode := fs.FileMode(0o751) | fs.ModeSetuid | fs.ModeSticky
	d := decoder{b: new(encoder).number(1<<63+1).text("a\x00ü", 10).flag(true).time(now).mode(mode).text("too long", 3).b}
	got := []any{d.number(), d.text(10), d.flag(), d.time().Equal(now), d.mode() == mode, d.text(3)}
	if diff := cmp.Diff([]any{uint64(1<<63 + 1), "a\x00ü", true, true, true, "too"}, got); diff != "" || d.end() != nil {
		t.Errorf("%v (-want +got):\n%s", d.err, diff)
	}
	if slices.Contains([]error{(&decoder{b: []byte{0x80}}).end()}, nil) {
		t.Error("what is left over isn't an error")
	}
}

func TestOtherVersions(t *testing.T) {
	say := func(version uint64) *bytes.Buffer {
		s := &script{}
		s.conn = newConn(nil, &s.Buffer)
		s.say(frameHello, new(encoder).text(magic, 100).number(version).text("web-0", 100).text("what a later version may say", 100))
		return &s.Buffer
	}
	c := newConn(say(7), io.Discard)
	if instance, err := c.await(); err != nil || instance != "web-0" {
		t.Errorf("a later version: %q, %v", instance, err)
	}
	c = newConn(say(0), io.Discard)
	if _, err := c.await(); err == nil || !strings.Contains(err.Error(), "update it") {
		t.Errorf("an older version: %v", err)
	}
}

// To send to nobody ends, and so does to receive from nobody.
func TestNobodyIsThere(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "f"), "x")
	for name, do := range map[string]func(context.Context, io.ReadCloser, io.Writer, Options) (Result, error){"send": Send, "receive": Receive} {
		result, err := do(t.Context(), quiet{strings.NewReader("")}, io.Discard, Options{Path: filepath.Join(dir, "f")})
		if !errors.Is(err, io.ErrUnexpectedEOF) || result.Met {
			t.Errorf("%s: %v, met %v", name, err, result.Met)
		}
	}
}
