// Package storagetest starts the servers that objects can be stored in, for
// tests: each on loopback, with its data in a directory of its own, until the
// test ends.
package storagetest

import (
	"bytes"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// PostgresPassword is the password of Postgres's user, which is called me. It
// holds what has to be quoted in a URL.
const PostgresPassword = "p/s#w:%@secret"

// Postgres starts a PostgreSQL server and returns its URL without a database.
// It may still be starting. Where none is installed the test is skipped, or
// fails if CI is set.
func Postgres(t testing.TB) (url string) {
	t.Helper()
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin")
	dirs = append(dirs, filepath.SplitList(os.Getenv("PATH"))...)
	i := slices.IndexFunc(dirs, func(dir string) bool {
		_, err := os.Stat(filepath.Join(dir, "initdb"))
		return err == nil
	})
	if i < 0 {
		if os.Getenv("CI") != "" {
			t.Fatal("no PostgreSQL server is installed: .ci/run is to see to that")
		}
		t.Skip("no PostgreSQL server is installed")
	}
	// Its socket's path must be short.
	data, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(data) })
	passwordFile := filepath.Join(data, "password")
	if err := os.WriteFile(passwordFile, []byte(PostgresPassword), 0o600); err != nil {
		t.Fatal(err)
	}
	var attr *syscall.SysProcAttr
	if os.Getuid() == 0 { // which PostgreSQL refuses
		const nobody = 65534
		attr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		for _, path := range []string{data, passwordFile} {
			if err := os.Chown(path, nobody, nobody); err != nil {
				t.Fatal(err)
			}
		}
	}
	db := filepath.Join(data, "db")
	initdb := exec.Command(filepath.Join(dirs[i], "initdb"), "-D", db, "-U", "me", "-A", "scram-sha-256", "--pwfile", passwordFile, "--no-sync", "-E", "UTF8", "--locale=C")
	initdb.SysProcAttr, initdb.Dir = attr, data
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	port := freePort(t)
	server := exec.Command(filepath.Join(dirs[i], "postgres"), "-D", db, "-h", "127.0.0.1", "-p", fmt.Sprint(port), "-k", data, "-F")
	server.SysProcAttr, server.Dir = attr, data
	run(t, server, syscall.SIGQUIT)
	return fmt.Sprintf("postgres://me:p%%2Fs%%23w%%3A%%25%%40secret@127.0.0.1:%d/", port)
}

// Etcd starts a binary of etcd, waits until it answers, and returns its URL and
// the directory of its data.
func Etcd(t testing.TB, binary string) (url, data string) {
	t.Helper()
	data = filepath.Join(t.TempDir(), "etcd")
	url = fmt.Sprintf("http://127.0.0.1:%d", freePort(t))
	peers := fmt.Sprintf("http://127.0.0.1:%d", freePort(t))
	exited := run(t, exec.Command(binary, "--data-dir="+data, "--log-level=warn",
		"--listen-client-urls="+url, "--advertise-client-urls="+url, "--listen-peer-urls="+peers,
		"--initial-advertise-peer-urls="+peers, "--initial-cluster=default="+peers), syscall.SIGKILL)
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for deadline := time.Now().Add(30 * time.Second); ; {
		response, err := client.Get(url + "/health")
		if err == nil {
			response.Body.Close()
			if response.StatusCode == http.StatusOK {
				return url, data
			}
		}
		select {
		case <-exited:
			t.Fatal("etcd ended")
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("etcd doesn't answer: %v", err)
		}
	}
}

// run starts a server, and ends it by a signal when the test ends.
func run(t testing.TB, server *exec.Cmd, end syscall.Signal) (exited <-chan struct{}) {
	t.Helper()
	var log bytes.Buffer
	server.Stdout, server.Stderr = &log, &log
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Wait()
	}()
	t.Cleanup(func() {
		_ = server.Process.Signal(end)
		<-done
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(server.Path), log.Bytes()[max(0, log.Len()-8<<10):])
		}
	})
	return done
}

func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}
