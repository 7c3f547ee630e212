package streaming

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"testing"

	"k8s.io/apiserver/pkg/endpoints/responsewriter"
	"k8s.io/client-go/tools/remotecommand"
)

// decorator is a response writer as the filters of the generic API server have
// them.
type decorator struct{ http.ResponseWriter }

func (d decorator) Unwrap() http.ResponseWriter { return d.ResponseWriter }

func TestResponseWritersOfTheGenericServer(t *testing.T) {
	wrap := func(w http.ResponseWriter) http.ResponseWriter {
		return responsewriter.WrapForHTTP1Or2(decorator{responsewriter.WrapForHTTP1Or2(decorator{w})})
	}
	eachExecClient(t, func(t *testing.T, c execClient) {
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			return ServeCommand(wrap(w), r, CommandRequest{Stdout: true}, Options{}, func(ctx context.Context, stdio Stdio) error {
				_, err := io.WriteString(stdio.Stdout, "through")
				return err
			})
		})
		var out bytes.Buffer
		if err := c.executor(t, s.URL).StreamWithContext(testContext(t), remotecommand.StreamOptions{Stdout: &out}); err != nil {
			t.Error(err)
		}
		if err := s.result(t); err != nil {
			t.Error(err)
		}
		if c.status && out.String() != "through" {
			t.Errorf("got %q", out.String())
		}
	})
	t.Run("log", func(t *testing.T) {
		s := newServer(t, func(w http.ResponseWriter, r *http.Request) error {
			return ServeLog(wrap(w), r, true, Options{}, func(_ context.Context, out io.Writer) error {
				io.WriteString(out, "line\n")
				return io.ErrNoProgress
			})
		})
		body, err := io.ReadAll(get(t, s).Body)
		if string(body) != "line\n" || err != io.ErrUnexpectedEOF {
			t.Errorf("got %q, %v, want a line and its being cut off", body, err)
		}
	})
}
