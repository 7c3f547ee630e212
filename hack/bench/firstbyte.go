//go:build linux

package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"k8s.io/client-go/rest"
)

// measureFirstByte measures how long it takes until the first byte of an exec is
// there, beside a GET of the same target, each over a connection of its own, and
// prints a table of it. path is the target's; config says by which way: a
// kube-apiserver's or the server's own.
func measureFirstByte(ctx context.Context, out io.Writer, config *rest.Config, path string, rounds int) error {
	secure, err := rest.TLSConfigFor(config)
	if err != nil {
		return err
	}
	secure = secure.Clone()
	secure.NextProtos = []string{"http/1.1"}
	const exec = "/exec?stdout=true&command=echo&command=x"
	kinds := []struct {
		name string
		do   func(conn *tls.Conn, host string) error
	}{
		{"GET", func(conn *tls.Conn, host string) error { return firstGet(conn, host, path) }},
		{"exec", func(conn *tls.Conn, host string) error { return firstOutput(conn, host, path+exec) }},
		{"exec with a terminal", func(conn *tls.Conn, host string) error { return firstOutput(conn, host, path+exec+"&tty=true") }},
	}
	host := strings.TrimPrefix(config.Host, "https://")
	took := make([][]float64, len(kinds))
	for range rounds {
		for i, kind := range kinds {
			begin := time.Now()
			conn, err := (&tls.Dialer{Config: secure}).DialContext(ctx, "tcp", host)
			if err != nil {
				return err
			}
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			err = kind.do(conn.(*tls.Conn), host)
			stop()
			took[i] = append(took[i], time.Since(begin).Seconds()*1000)
			conn.Close()
			if err != nil {
				return fmt.Errorf("%s: %w", kind.name, err)
			}
		}
	}
	rows := [][]string{{"to the first byte, each over a new connection", "ms", "of a GET"}}
	for i, kind := range kinds {
		rows = append(rows, []string{kind.name, number(median(took[i])), ratio(ratios(took[i], took[0]))})
	}
	(&bench{out: out}).table(rows)
	return nil
}

func firstGet(conn *tls.Conn, host, path string) error {
	if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: %s\r\nAccept: application/json\r\n\r\n", path, host); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, resp.Body)
	if resp.StatusCode != http.StatusOK {
		err = errors.Join(err, errors.New(resp.Status))
	}
	return err
}

func firstOutput(conn *tls.Conn, host, path string) error {
	r, err := upgradeWebSocket(conn, host, path)
	if err != nil {
		return err
	}
	if strings.HasSuffix(path, "tty=true") {
		// As clients do right after the upgrade: masked, by zeros.
		size := "\x04" + `{"Width":80,"Height":24}`
		if _, err := fmt.Fprintf(conn, "\x82%s\x00\x00\x00\x00%s", string([]byte{0x80 | byte(len(size))}), size); err != nil {
			return err
		}
	}
	for {
		// Frames are short: a byte for the type, one for the length, the channel.
		var head [2]byte
		if _, err := io.ReadFull(r, head[:]); err != nil {
			return err
		}
		payload := make([]byte, head[1]&0x7f)
		if _, err := io.ReadFull(r, payload); err != nil {
			return err
		}
		const stdout, failed = 1, 3
		switch {
		case len(payload) > 0 && payload[0] == failed:
			return fmt.Errorf("the command wrote nothing: %s", payload[1:])
		case len(payload) > 1 && payload[0] == stdout:
			return nil
		}
	}
}
