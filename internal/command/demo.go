package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"sort"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// newDemo is what the demo's targets run.
func newDemo() *cobra.Command {
	cmd := &cobra.Command{
		Use:    "demo",
		Short:  "The programs of the demo's targets",
		Hidden: true,
	}
	var listen string
	web := &cobra.Command{
		Use:  "web",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return demoWeb(cmd.Context(), cmd.OutOrStdout(), listen)
		},
	}
	web.Flags().StringVar(&listen, "listen", "127.0.0.1:8080", "The address to listen on.")
	cmd.AddCommand(web,
		&cobra.Command{
			Use:  "ticker",
			Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return demoTicker(cmd.Context(), cmd.OutOrStdout(), cmd.ErrOrStderr())
			},
		},
		&cobra.Command{
			Use:  "shell",
			Args: cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				return demoShell(cmd.InOrStdin(), cmd.OutOrStdout())
			},
		},
	)
	return cmd
}

// demoWeb answers every request with the name of its instance.
func demoWeb(ctx context.Context, out io.Writer, listen string) error {
	instance := os.Getenv("AASERVER_INSTANCE")
	server := &http.Server{
		Addr:              listen,
		ReadHeaderTimeout: 10 * time.Second,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(out, "%s %s\n", r.Method, r.URL.Path)
			fmt.Fprintf(w, "hello from %s\n", instance)
		}),
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	fmt.Fprintf(out, "%s listens on %s\n", instance, listen)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// demoTicker writes a numbered line each second, every fifth to errOut.
func demoTicker(ctx context.Context, out, errOut io.Writer) error {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for i := 1; ; i++ {
		to := out
		if i%5 == 0 {
			to = errOut
		}
		if _, err := fmt.Fprintf(to, "tick %d\n", i); err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// demoShell answers lines, so that there is something to attach to.
func demoShell(in io.Reader, out io.Writer) error {
	answers := map[string]func() string{
		"help": nil,
		"date": func() string { return time.Now().Format(time.RFC1123) },
		"name": func() string { return os.Getenv("AASERVER_INSTANCE") },
		"pid":  func() string { return fmt.Sprint(os.Getpid()) },
		"size": func() string {
			width, height, err := term.GetSize(int(os.Stdin.Fd()))
			if err != nil {
				return "no terminal"
			}
			return fmt.Sprintf("%d columns, %d lines", width, height)
		},
	}
	var names []string
	for name := range answers {
		names = append(names, name)
	}
	sort.Strings(names)
	answers["help"] = func() string { return "Say " + strings.Join(names, ", ") + " or exit." }

	fmt.Fprint(out, answers["help"](), "\n> ")
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if line == "exit" {
			return nil
		}
		if answer, ok := answers[line]; ok {
			fmt.Fprintln(out, answer())
		} else if line != "" {
			fmt.Fprintf(out, "You said %q. Say help for what I know.\n", line)
		}
		fmt.Fprint(out, "> ")
	}
	return lines.Err()
}
