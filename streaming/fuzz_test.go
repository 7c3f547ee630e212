package streaming

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"
	"unicode/utf8"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// FuzzCommandFrames throws bytes at the WebSocket demultiplexer.
func FuzzCommandFrames(f *testing.F) {
	f.Add(true, rawFrame(0x82, "\x00hello"))
	f.Add(true, append(rawFrame(0x02, "\x04{\"Width\":"), rawFrame(0x80, "80,\"Height\":24}")...))
	f.Add(true, rawFrame(0x82, "\xff\x00"))
	f.Add(false, rawFrame(0x81, "0aGVsbG8="))
	f.Add(false, rawFrame(0x89, "ping"))
	f.Add(false, rawFrame(0x88, "\x03\xe8bye"))
	results := make(chan error)
	s := newServer(f, func(w http.ResponseWriter, r *http.Request) error {
		err := ServeCommand(w, r, CommandRequest{Stdin: true, Stdout: true, TTY: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
			for {
				select {
				case _, ok := <-stdio.Resize:
					if ok {
						continue
					}
				case <-ctx.Done():
				}
				break
			}
			n, err := io.Copy(io.Discard, io.LimitReader(stdio.Stdin, maxMessage))
			if n == maxMessage {
				return nil
			}
			return err
		})
		results <- err
		return nil
	})
	s.results = make(chan error, 1<<20)
	f.Fuzz(func(t *testing.T, binary bool, frames []byte) {
		protocol := "v5.channel.k8s.io"
		if !binary {
			protocol = "v5.base64.channel.k8s.io"
		}
		c := mustDialWebSocket(t, s.URL, protocol)
		c.NetConn().Write(frames)
		c.Close()
		wait(t, results, "the session to end")
	})
}

// FuzzResize looks for what the bounded parser makes of JSON in pieces.
func FuzzResize(f *testing.F) {
	f.Add([]byte(`{"Width":80,"Height":24}`), uint8(7))
	f.Add([]byte(`{"Width":70000}{"Width":1}`), uint8(1))
	f.Add([]byte(strings.Repeat("[", 3000)), uint8(200))
	f.Fuzz(func(t *testing.T, data []byte, piece uint8) {
		s := newResizes()
		for rest := data; len(rest) > 0; {
			n := min(int(piece)+1, len(rest))
			if m, err := s.Write(rest[:n]); m != n || err != nil {
				t.Fatal(m, err)
			}
			rest = rest[n:]
			if cap(s.pending) > 4*maxResize {
				t.Fatalf("%d bytes are kept", cap(s.pending))
			}
		}
		s.close()
		s.close()
		s.Write(data)
		var want TerminalSize
		if json.NewDecoder(bytes.NewReader(data)).Decode(&want) == nil && len(data) <= maxResize {
			if _, ok := <-s.c; !ok {
				t.Errorf("no size came of %q", data)
			}
		}
	})
}

// FuzzStatus looks for statuses that don't fit or don't parse.
func FuzzStatus(f *testing.F) {
	f.Add("plain", "reason")
	f.Add(strings.Repeat("\x00", 2000), strings.Repeat("é", 400))
	f.Add(strings.Repeat("日本", 1000)+"\xff", "")
	f.Fuzz(func(t *testing.T, message, reason string) {
		data := encodeStatus(statusOf(&apierrors.StatusError{ErrStatus: metav1.Status{
			Status: metav1.StatusFailure, Code: 500, Message: message, Reason: metav1.StatusReason(reason),
			Details: &metav1.StatusDetails{Name: message, Causes: []metav1.StatusCause{{Message: message}}},
		}}))
		var status metav1.Status
		if err := json.Unmarshal(data, &status); err != nil || len(data) > maxStatus || !utf8.Valid(data) {
			t.Fatalf("%v in %d bytes: %q", err, len(data), data)
		}
		if len(message) < 100 && utf8.ValidString(message) && len(reason) < 50 && status.Message != message {
			t.Errorf("the message became %q", status.Message)
		}
	})
}
