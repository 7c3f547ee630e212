package streaming_test

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"

	"aaserver.io/aaserver/streaming"
)

// A command that greets whoever writes to it, and fails; and kubectl's way to
// run it.
func ExampleServeCommand() {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		streams := streaming.CommandRequest{Stdin: true, Stdout: true}
		streaming.ServeCommand(w, r, streams, streaming.Options{}, func(ctx context.Context, stdio streaming.Stdio) error {
			names := bufio.NewScanner(stdio.Stdin)
			for names.Scan() {
				fmt.Fprintf(stdio.Stdout, "Hello, %s!\n", names.Text())
			}
			return &streaming.ExitError{Code: 3}
		})
	}))
	defer server.Close()

	client, err := remotecommand.NewWebSocketExecutor(&rest.Config{Host: server.URL}, "GET", server.URL)
	if err != nil {
		fmt.Println(err)
		return
	}
	err = client.StreamWithContext(context.Background(), remotecommand.StreamOptions{
		Stdin:  strings.NewReader("Ada\nGrace\n"),
		Stdout: os.Stdout,
	})
	fmt.Println(err)
	// Output:
	// Hello, Ada!
	// Hello, Grace!
	// command terminated with exit code 3
}
