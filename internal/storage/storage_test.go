package storage

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/k3s-io/kine/pkg/drivers"
	"github.com/k3s-io/kine/pkg/server"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func TestMain(m *testing.M) {
	if path := os.Getenv("STORAGE_TEST_WRITER"); path != "" {
		writeForever(path)
	}
	if endpoint := os.Getenv("STORAGE_TEST_START"); endpoint != "" {
		_, err := Start(context.Background(), Options{Endpoint: endpoint})
		fmt.Println(err)
		os.Exit(0)
	}
	goleak.VerifyTestMain(m,
		// klog's flusher, and the goroutine of a package that kine links.
		goleak.IgnoreTopFunction("k8s.io/klog/v2.(*flushDaemon).run.func1"),
	)
}

func endpointOf(t testing.TB, path string) string {
	t.Helper()
	endpoint, err := SQLiteEndpoint(path)
	if err != nil {
		t.Fatal(err)
	}
	return endpoint
}

func start(t testing.TB, path string) *Backend {
	t.Helper()
	b, err := Start(t.Context(), Options{Endpoint: endpointOf(t, path), SocketDir: filepath.Dir(path)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, b) })
	return b
}

func stop(t testing.TB, b *Backend) {
	t.Helper()
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := b.Err(); err != nil {
		t.Error(err)
	}
}

func client(t testing.TB, b *Backend) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{b.Endpoint()}, DialTimeout: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// The three transactions are the API server's.
func create(t testing.TB, c *clientv3.Client, key, value string) (rev int64) {
	t.Helper()
	r, err := c.Txn(t.Context()).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, value)).Commit()
	if err != nil || !r.Succeeded {
		t.Fatalf("create %s: %v, %v", key, r, err)
	}
	return r.Header.Revision
}

func update(c *clientv3.Client, key, value string, rev int64) (*clientv3.TxnResponse, error) {
	return c.Txn(context.Background()).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).
		Then(clientv3.OpPut(key, value)).
		Else(clientv3.OpGet(key)).Commit()
}

func remove(c *clientv3.Client, key string, rev int64) (*clientv3.TxnResponse, error) {
	return c.Txn(context.Background()).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).
		Then(clientv3.OpDelete(key)).
		Else(clientv3.OpGet(key)).Commit()
}

func get(t testing.TB, c *clientv3.Client, key string, opts ...clientv3.OpOption) *clientv3.GetResponse {
	t.Helper()
	r, err := c.Get(t.Context(), key, opts...)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	return r
}

// contents returns everything below a prefix, as key=value.
func contents(t testing.TB, c *clientv3.Client, prefix string) []string {
	t.Helper()
	var got []string
	for _, kv := range get(t, c, prefix, clientv3.WithPrefix()).Kvs {
		got = append(got, string(kv.Key)+"="+string(kv.Value))
	}
	return got
}

func TestEtcdSemantics(t *testing.T) {
	testEtcdSemantics(t, start(t, filepath.Join(t.TempDir(), "state.db")))
}

func testEtcdSemantics(t *testing.T, b *Backend) {
	c := client(t, b)
	rev := create(t, c, "/r/a", "1")
	if r, err := c.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision("/r/a"), "=", 0)).
		Then(clientv3.OpPut("/r/a", "x")).Commit(); err != nil || r.Succeeded {
		t.Errorf("a second create: %v, %v; want it refused", r, err)
	}
	up, err := update(c, "/r/a", "2", rev)
	if err != nil || !up.Succeeded {
		t.Fatalf("update: %v, %v", up, err)
	}
	if r, err := update(c, "/r/a", "3", rev); err != nil || r.Succeeded {
		t.Errorf("update of an old revision: %v, %v; want a conflict", r, err)
	} else if kv := r.Responses[0].GetResponseRange().Kvs[0]; string(kv.Value) != "2" || kv.ModRevision != up.Header.Revision {
		t.Errorf("the conflict shows %v", kv)
	}
	if r, err := remove(c, "/r/a", rev); err != nil || r.Succeeded {
		t.Errorf("delete of an old revision: %v, %v; want a conflict", r, err)
	}
	kv := get(t, c, "/r/a").Kvs[0]
	if string(kv.Value) != "2" || kv.CreateRevision != rev || kv.ModRevision != up.Header.Revision {
		t.Errorf("get: %v", kv)
	}
	if r, err := remove(c, "/r/a", kv.ModRevision); err != nil || !r.Succeeded {
		t.Errorf("delete: %v, %v", r, err)
	}
	if r := get(t, c, "/r/a"); len(r.Kvs) != 0 {
		t.Errorf("there after its deletion: %v", r)
	}
	if again := create(t, c, "/r/a", "4"); again <= rev {
		t.Errorf("revision %d after %d", again, rev)
	}

	_, err = c.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision("/large/a"), "=", 0)).
		Then(clientv3.OpPut("/large/a", strings.Repeat("v", maxTransaction))).Commit()
	if err != rpctypes.ErrRequestTooLarge {
		t.Errorf("a value that is too large: %v", err)
	}
	create(t, c, "/large/b", strings.Repeat("v", maxTransaction-1000))

	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var got []string
	for r := range c.Watch(ctx, "/r/", clientv3.WithPrefix(), clientv3.WithRev(rev), clientv3.WithPrevKV()) {
		if err := r.Err(); err != nil {
			t.Fatal(err)
		}
		for _, e := range r.Events {
			prev := ""
			if e.PrevKv != nil {
				prev = string(e.PrevKv.Value)
			}
			got = append(got, fmt.Sprintf("%s %s %q after %q", e.Type, e.Kv.Key, e.Kv.Value, prev))
		}
		if len(got) == 4 {
			create(t, c, "/r/b", "new")
		}
		if len(got) == 5 {
			cancel()
		}
	}
	want := []string{
		`PUT /r/a "1" after ""`,
		`PUT /r/a "2" after "1"`,
		`DELETE /r/a "" after "2"`,
		`PUT /r/a "4" after ""`,
		`PUT /r/b "new" after ""`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("watch from revision %d (-want +got):\n%s", rev, diff)
	}
}

func TestPagingAndCompaction(t *testing.T) {
	testPagingAndCompaction(t, start(t, filepath.Join(t.TempDir(), "state.db")))
}

func testPagingAndCompaction(t *testing.T, b *Backend) {
	c := client(t, b)
	rev := create(t, c, "/r/0000", "v")
	first := rev
	for i := 1; i < 1100; i++ {
		create(t, c, fmt.Sprintf("/r/%04d", i), "v")
	}
	r, err := update(c, "/r/0000", "v2", rev)
	if err != nil || !r.Succeeded {
		t.Fatal(r, err)
	}

	// As the API server lists: pages of one revision, in spite of changes.
	var got []string
	key, end := "/r/", clientv3.GetPrefixRangeEnd("/r/")
	for at := int64(0); ; {
		page := get(t, c, key, clientv3.WithRange(end), clientv3.WithLimit(300), clientv3.WithRev(at))
		if at == 0 {
			at = page.Header.Revision
			create(t, c, "/r/0500a", "late")
			if page.Count != 1100 {
				t.Errorf("count %d", page.Count)
			}
		}
		for _, kv := range page.Kvs {
			got = append(got, string(kv.Key))
		}
		if !page.More {
			break
		}
		key = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
	}
	var want []string
	for i := range 1100 {
		want = append(want, fmt.Sprintf("/r/%04d", i))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("pages (-want +got):\n%s", diff)
	}

	if kv := get(t, c, "/r/0000", clientv3.WithRev(first)).Kvs[0]; string(kv.Value) != "v" {
		t.Errorf("before compaction, revision %d has %v", first, kv)
	}
	// The last 1000 revisions are always kept.
	if _, err := c.Compact(t.Context(), first+50); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), "/r/0000", clientv3.WithRev(first)); !errors.Is(err, rpctypes.ErrCompacted) {
		t.Errorf("reading a compacted revision: %v", err)
	}
	w := <-c.Watch(t.Context(), "/r/", clientv3.WithPrefix(), clientv3.WithRev(first))
	if !errors.Is(w.Err(), rpctypes.ErrCompacted) || w.CompactRevision != first+50 {
		t.Errorf("watch from a compacted revision: %v, compacted at %d, want %d", w.Err(), w.CompactRevision, first+50)
	}
	if n := get(t, c, "/r/", clientv3.WithPrefix(), clientv3.WithCountOnly()).Count; n != 1101 {
		t.Errorf("%d objects after compaction", n)
	}
}

func TestRestart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	b := start(t, path)
	c := client(t, b)
	for i := range 20 {
		create(t, c, fmt.Sprintf("/r/%02d", i), "v")
	}
	rev := get(t, c, "/r/00").Header.Revision
	want := contents(t, c, "/r/")
	c.Close()
	stop(t, b)
	if _, err := os.Stat(path + "-wal"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the log was left behind: %v", err)
	}
	if _, err := os.Stat(strings.TrimPrefix(b.Endpoint(), "unix://")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket was left behind: %v", err)
	}

	b = start(t, path)
	c = client(t, b)
	if diff := cmp.Diff(want, contents(t, c, "/r/")); diff != "" {
		t.Errorf("after a restart (-want +got):\n%s", diff)
	}
	if next := create(t, c, "/r/next", "v"); next <= rev {
		t.Errorf("revision %d after %d", next, rev)
	}
}

func TestBackendsAreIndependent(t *testing.T) {
	dir := t.TempDir()
	registry := prometheus.NewRegistry()
	var clients []*clientv3.Client
	for _, name := range []string{"one", "two"} {
		b, err := Start(t.Context(), Options{Endpoint: endpointOf(t, filepath.Join(dir, name+".db")), Metrics: registry})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stop(t, b) })
		c := client(t, b)
		create(t, c, "/r/a", name)
		clients = append(clients, c)
	}
	for i, want := range []string{"/r/a=one", "/r/a=two"} {
		if diff := cmp.Diff([]string{want}, contents(t, clients[i], "/r/")); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	}
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, f := range families {
		names[f.GetName()] = true
	}
	if !names["kine_sql_time_seconds"] || !names["kine_sql_total"] {
		t.Errorf("metrics: %v", names)
	}
}

func TestSocketIsPrivate(t *testing.T) {
	short, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(short) })
	for name, tc := range map[string]struct {
		dir         string
		wantInDir   bool
		wantDirMode os.FileMode
	}{
		"a short path is used":                   {dir: filepath.Join(short, "d"), wantInDir: true, wantDirMode: 0o700},
		"a path too long for a socket is not":    {dir: filepath.Join(short, strings.Repeat("long", 30)), wantDirMode: 0o700},
		"nor one that would need quoting":        {dir: filepath.Join(short, "a,b c"), wantDirMode: 0o700},
		"without a directory there is a new one": {wantDirMode: 0o700},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.db")
			for round := range 2 {
				b, err := Start(t.Context(), Options{Endpoint: endpointOf(t, path), SocketDir: tc.dir})
				if err != nil {
					t.Fatal(err)
				}
				socket := strings.TrimPrefix(b.Endpoint(), "unix://")
				if in := strings.HasPrefix(socket, tc.dir+"/"); tc.dir != "" && in != tc.wantInDir {
					t.Errorf("socket %s for directory %s", socket, tc.dir)
				}
				info, err := os.Stat(socket)
				if err != nil {
					t.Fatal(err)
				}
				if info.Mode() != os.ModeSocket|0o600 {
					t.Errorf("socket mode %v", info.Mode())
				}
				if info, err = os.Stat(filepath.Dir(socket)); err != nil || info.Mode().Perm() != tc.wantDirMode {
					t.Errorf("directory mode %v, %v", info.Mode(), err)
				}
				create(t, client(t, b), fmt.Sprintf("/r/%d", round), "v")
				stop(t, b)
				if !tc.wantInDir {
					if _, err := os.Stat(filepath.Dir(socket)); !errors.Is(err, os.ErrNotExist) {
						t.Errorf("the socket's directory was left behind: %v", err)
					}
				}
				if tc.wantInDir {
					// What a killed server leaves is replaced.
					if err := os.WriteFile(socket, nil, 0o600); err != nil {
						t.Fatal(err)
					}
				} else {
					break
				}
			}
		})
	}
}

func TestPathsWithSpecialCharacters(t *testing.T) {
	dir := filepath.Join(t.TempDir(), `a?b#c%41 d&e=f"g'`+strings.Repeat("/long", 30))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "state?x=1.db")
	b := start(t, path)
	create(t, client(t, b), "/r/a", "v")
	stop(t, b)
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		t.Errorf("no database at %q: %v", path, err)
	}
	c := client(t, start(t, path))
	if diff := cmp.Diff([]string{"/r/a=v"}, contents(t, c, "/r/")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestSettingsAreInForceOnEveryConnection(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	ctx := t.Context()
	kineCtx, end := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	dialect, err := (&sqliteDB{path: path}).connect(kineCtx, &wg, &drivers.Config{})
	if err != nil {
		t.Fatal(err)
	}
	db := dialect.DB
	for i := range 8 {
		conn, err := db.Conn(ctx)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		got := map[string]string{}
		for _, pragma := range []string{"synchronous", "journal_mode", "busy_timeout"} {
			var value string
			if err := conn.QueryRowContext(ctx, "PRAGMA "+pragma).Scan(&value); err != nil {
				t.Fatal(err)
			}
			got[pragma] = value
		}
		want := map[string]string{"synchronous": "2", "journal_mode": "wal", "busy_timeout": "30000"}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("connection %d (-want +got):\n%s", i, diff)
		}
	}
	if got := db.Stats().OpenConnections; got < 8 {
		t.Errorf("only %d connections were looked at", got)
	}
}

// writeForever is a process that is killed while it writes. It tells of each
// write once it has been acknowledged.
func writeForever(path string) {
	endpoint, err := SQLiteEndpoint(path)
	if err != nil {
		panic(err)
	}
	b, err := Start(context.Background(), Options{Endpoint: endpoint})
	if err != nil {
		panic(err)
	}
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{b.Endpoint()}})
	if err != nil {
		panic(err)
	}
	prefix := os.Getenv("STORAGE_TEST_PREFIX")
	value := strings.Repeat("v", 4000)
	for i := 0; ; i++ {
		key := fmt.Sprintf("%s%06d", prefix, i)
		r, err := c.Txn(context.Background()).If(clientv3.Compare(clientv3.ModRevision(key), "=", 0)).
			Then(clientv3.OpPut(key, value)).Commit()
		if err != nil || !r.Succeeded {
			panic(fmt.Sprint(r, err))
		}
		fmt.Println(key)
	}
}

func TestKilledProcessLosesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	var acknowledged []string
	for round := range 3 {
		cmd := exec.Command(os.Args[0])
		// Sockets of killed processes are the test's to clear away.
		cmd.Env = append(os.Environ(), "STORAGE_TEST_WRITER="+path, fmt.Sprintf("STORAGE_TEST_PREFIX=/r/%d/", round), "TMPDIR="+shortDir(t))
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for range 400 {
			if !lines.Scan() {
				break
			}
			acknowledged = append(acknowledged, lines.Text())
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		for lines.Scan() {
			acknowledged = append(acknowledged, lines.Text())
		}
		_ = cmd.Wait()
		if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || ws.Signal() != syscall.SIGKILL {
			t.Fatalf("the writer wasn't killed: %v\n%s", cmd.ProcessState, &stderr)
		}
		if info, err := os.Stat(path + "-wal"); err != nil || info.Size() == 0 {
			t.Fatalf("nothing in the log, so that its recovery isn't tested: %v", err)
		}
	}
	if len(acknowledged) < 1200 {
		t.Fatalf("only %d writes", len(acknowledged))
	}
	c := client(t, start(t, path))
	there := map[string]bool{}
	for _, kv := range get(t, c, "/r/", clientv3.WithPrefix()).Kvs {
		there[string(kv.Key)] = len(kv.Value) == 4000
	}
	for _, key := range acknowledged {
		if !there[key] {
			t.Errorf("%s was acknowledged and is lost", key)
		}
	}
}

func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// sample makes a database with some objects, and with part of them in the log
// if its process is said to have been killed.
func sample(t testing.TB, killed bool) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "state.db")
	b := start(t, path)
	c := client(t, b)
	for i := range 200 {
		create(t, c, fmt.Sprintf("/r/%d", i), strings.Repeat("v", 2000))
	}
	c.Close()
	if !killed {
		stop(t, b)
		return path
	}
	// A copy of the files in use is what a killed process leaves.
	dead := filepath.Join(t.TempDir(), "state.db")
	for _, suffix := range []string{"", "-wal", "-shm"} {
		data, err := os.ReadFile(path + suffix)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(dead+suffix, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	stop(t, b)
	return dead
}

// files returns the contents of all files in a directory but locks.
func files(t testing.TB, dir string) map[string]string {
	t.Helper()
	got := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".lock") {
			continue
		}
		if e.IsDir() {
			got[e.Name()] = "a directory"
			continue
		}
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		got[e.Name()] = string(data)
	}
	return got
}

func TestDamagedDatabaseIsRefusedAndLeftAlone(t *testing.T) {
	overwrite := func(at, n int64) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(n)), at); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, tc := range map[string]struct {
		killed bool
		damage func(t *testing.T, path string)
		want   string
	}{
		"not a database": {
			damage: func(t *testing.T, path string) {
				if err := os.WriteFile(path, []byte("apiVersion: v1\nkind: Config\n"), 0o600); err != nil {
					t.Fatal(err)
				}
			},
			want: "is damaged or isn't an SQLite database",
		},
		"shorter than a header": {
			damage: func(t *testing.T, path string) {
				if err := os.Truncate(path, 10); err != nil {
					t.Fatal(err)
				}
			},
			want: "is damaged or isn't an SQLite database",
		},
		"a header alone": {
			damage: func(t *testing.T, path string) {
				if err := os.Truncate(path, 100); err != nil {
					t.Fatal(err)
				}
			},
			want: "is damaged (",
		},
		"cut off":                               {damage: func(t *testing.T, path string) { halve(t, path) }, want: "is damaged ("},
		"a bad magic number":                    {damage: overwrite(0, 16), want: "is damaged or isn't"},
		"a bad schema":                          {damage: overwrite(100, 3000), want: "is damaged ("},
		"a page of the table":                   {damage: overwrite(4096, 4096), want: "is damaged ("},
		"many pages, with a log":                {killed: true, damage: overwrite(4096, 16*4096), want: "is damaged ("},
		"cut off, with the log of another time": {killed: true, damage: func(t *testing.T, path string) { halve(t, path); halve(t, path+"-wal") }, want: "is damaged ("},
		"another program's": {
			damage: func(t *testing.T, path string) {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				db, err := sql.Open("sqlite", path)
				if err != nil {
					t.Fatal(err)
				}
				defer db.Close()
				if _, err := db.Exec("CREATE TABLE bookmarks (url TEXT)"); err != nil {
					t.Fatal(err)
				}
			},
			want: "holds another program's data",
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := sample(t, tc.killed)
			tc.damage(t, path)
			before := files(t, filepath.Dir(path))
			b, err := Start(t.Context(), Options{Endpoint: endpointOf(t, path)})
			if err == nil {
				stop(t, b)
				t.Fatal("it started")
			}
			for _, want := range []string{path, tc.want, "nothing was changed", "restore it from a backup"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q doesn't say %q", err, want)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q has more than one line", err)
			}
			if diff := cmp.Diff(before, files(t, filepath.Dir(path))); diff != "" {
				t.Errorf("files were changed")
			}
		})
	}
}

func halve(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, info.Size()/2/4096*4096); err != nil {
		t.Fatal(err)
	}
}

func TestCheckChangesNothing(t *testing.T) {
	for name, killed := range map[string]bool{"closed": false, "killed": true} {
		t.Run(name, func(t *testing.T) {
			path := sample(t, killed)
			before := files(t, filepath.Dir(path))
			f, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if err := (&sqliteDB{path: path}).check(t.Context(), f); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, files(t, filepath.Dir(path))); diff != "" {
				t.Errorf("files were changed")
			}
			c := client(t, start(t, path))
			if n := len(contents(t, c, "/r/")); n != 200 {
				t.Errorf("%d objects", n)
			}
		})
	}
}

// TestCheckOfHalfWrittenBack: a process can be killed while SQLite writes its
// log back into the database, which is then whole only together with the log.
func TestCheckOfHalfWrittenBack(t *testing.T) {
	path := sample(t, true)
	old, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.ReadFile(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path + "-shm"); err != nil {
		t.Fatal(err)
	}
	db, err := sql.Open("sqlite", path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec("PRAGMA wal_checkpoint(TRUNCATE)"); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	mixed, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at+4096 <= len(old); at += 2 * 4096 {
		copy(mixed[at:at+4096], old[at:])
	}
	for at := len(old) + 4096; at+4096 <= len(mixed); at += 2 * 4096 {
		clear(mixed[at : at+4096])
	}
	if err := os.WriteFile(path, mixed, 0o600); err != nil {
		t.Fatal(err)
	}
	check := func() error {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		return (&sqliteDB{path: path}).check(t.Context(), f)
	}
	if err := check(); err == nil {
		t.Error("without the log, it passes")
	}
	if err := os.WriteFile(path+"-wal", log, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := check(); err != nil {
		t.Error(err)
	}
	if n := len(contents(t, client(t, start(t, path)), "/r/")); n != 200 {
		t.Errorf("%d objects", n)
	}
}

// TestFullDisk stands a limit on the size of files in for a full disk.
func TestFullDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	c := client(t, start(t, path))
	rev := create(t, c, "/r/old", "v")
	info, err := os.Stat(path + "-wal")
	if err != nil {
		t.Fatal(err)
	}

	signal.Ignore(syscall.SIGXFSZ)
	defer signal.Reset(syscall.SIGXFSZ)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	full := syscall.Rlimit{Cur: uint64(info.Size()), Max: limit.Max}
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &full); err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat("v", 100_000)
	_, cerr := c.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision("/r/new"), "=", 0)).Then(clientv3.OpPut("/r/new", big)).Commit()
	_, uerr := update(c, "/r/old", big, rev)
	_, derr := remove(c, "/r/old", rev)
	kvs := contents(t, c, "/r/")
	if err := syscall.Setrlimit(syscall.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}

	for op, err := range map[string]error{"create": cerr, "update": uerr, "delete": derr} {
		if err == nil || !strings.Contains(err.Error(), "the database didn't store the change: ") {
			t.Errorf("%s: %v", op, err)
		}
	}
	if diff := cmp.Diff([]string{"/r/old=v"}, kvs); diff != "" {
		t.Errorf("with a full disk (-want +got):\n%s", diff)
	}
	if r, err := update(c, "/r/old", "v2", rev); err != nil || !r.Succeeded {
		t.Errorf("update when there is space again: %v, %v", r, err)
	}
	create(t, c, "/r/new", "v")
	if diff := cmp.Diff([]string{"/r/new=v", "/r/old=v2"}, contents(t, c, "/r/")); diff != "" {
		t.Errorf("when there is space again (-want +got):\n%s", diff)
	}
}

// TestUnusableFiles needs a user who may not do everything.
func TestUnusableFiles(t *testing.T) {
	dir := shortDir(t)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	self := filepath.Join(dir, "self")
	if err := os.Link(os.Args[0], self); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		dirMode, fileMode os.FileMode
		want              string
	}{
		"a directory that can't be written to": {dirMode: 0o555, want: "permission denied"},
		"a directory that can't be entered":    {dirMode: 0o600, want: "permission denied"},
		"a file that can't be written to":      {dirMode: 0o755, fileMode: 0o444, want: "permission denied"},
		"a file that can't be read":            {dirMode: 0o755, fileMode: 0o200, want: "permission denied"},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := os.MkdirTemp(dir, "d")
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(data, "state.db")
			if tc.fileMode != 0 {
				if err := os.WriteFile(path, nil, tc.fileMode); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command(self)
			cmd.Env = append(os.Environ(), "STORAGE_TEST_START="+endpointOf(t, path))
			if os.Getuid() == 0 {
				const nobody = 65534
				cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
				for _, p := range []string{data, path} {
					if err := os.Chown(p, nobody, nobody); err != nil && !errors.Is(err, os.ErrNotExist) {
						t.Fatal(err)
					}
				}
			}
			if err := os.Chmod(data, tc.dirMode); err != nil {
				t.Fatal(err)
			}
			defer os.Chmod(data, 0o755)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			got := strings.TrimSuffix(string(out), "\n")
			if !strings.Contains(got, tc.want) || !strings.Contains(got, path) || strings.Contains(got, "\n") {
				t.Errorf("got %q, want a line with %q and %q", got, path, tc.want)
			}
		})
	}
}

func TestUnusableEndpoints(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		endpoint string
		want     string
	}{
		"empty":                        {"", "isn't a URL; use sqlite:///"},
		"a path":                       {"/var/lib/state.db", "isn't a URL; use sqlite:///"},
		"another database":             {"mysql://user:secret@tcp(host)/db", `scheme "mysql" isn't supported; use sqlite:///`},
		"etcd":                         {"https://127.0.0.1:2379", `scheme "https" isn't supported; use sqlite:///`},
		"no scheme but a password":     {"user:secret@host://x", "scheme isn't supported; use sqlite:///"},
		"two slashes":                  {"sqlite://state.db", "needs an absolute path after three slashes"},
		"no path":                      {"sqlite://", "needs the path of a file"},
		"a root":                       {"sqlite:///", "needs the path of a file"},
		"parameters":                   {"sqlite:///x.db?_synchronous=OFF", "takes no parameters"},
		"a directory":                  {"sqlite://" + dir, "is a directory; name a file in it"},
		"a file as directory":          {"sqlite:///dev/null/state.db", "/dev/null is no directory: make it first, or correct the path"},
		"a directory that isn't there": {"sqlite:///nonexistent/state.db", "/nonexistent is no directory"},
		"a device":                     {"sqlite:///dev/null", "isn't a regular file"},
		"a bad escape":                 {"postgres://user:secret%@host/db", "can't be parsed as a URL; percent-encode"},
		"a slash in the password":      {"postgres://user:secret/x@host/db", "can't be parsed as a URL; percent-encode"},
		"a hash in the password":       {"postgres://user:secret#x@host/db", "percent-encode"},
		"no host":                      {"postgres:///db", "needs a host"},
		"a wrong parameter":            {"postgres://user:secret@host/db?sslmode=secret", "has a parameter"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := Start(t.Context(), Options{Endpoint: tc.endpoint})
			if err == nil {
				stop(t, b)
				t.Fatal("it started")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%q doesn't say %q", err, tc.want)
			}
			for _, not := range []string{"secret", "\n"} {
				if strings.Contains(err.Error(), not) {
					t.Errorf("%q says %q", err, not)
				}
			}
		})
	}
}

func TestDatabaseInUse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.db")
	start(t, path)
	_, err := Start(t.Context(), Options{Endpoint: endpointOf(t, path)})
	if want := fmt.Sprintf("%s is in use by another aaserver (pid %d)", path, os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a second start: %v, want %q", err, want)
	}
}

func TestLockDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	release, err := LockDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("the directory: %v, %v", info, err)
	}
	_, err = LockDir(dir)
	if want := fmt.Sprintf("%s is in use by another aaserver (pid %d); stop it first, or choose another", dir, os.Getpid()); err == nil || err.Error() != want {
		t.Errorf("a second lock: %v, want %q", err, want)
	}
	release()
	release, err = LockDir(dir)
	if err != nil {
		t.Fatalf("after the release: %v", err)
	}
	release()
	if _, err = LockDir("/dev/null/x"); err == nil || !strings.Contains(err.Error(), "can't create the data directory") {
		t.Errorf("a directory that can't be created: %v", err)
	}
}

func TestCloseEndsWatchesInBoundedTime(t *testing.T) {
	b := start(t, filepath.Join(t.TempDir(), "state.db"))
	c := client(t, b)
	w := c.Watch(t.Context(), "/r/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	if r := <-w; !r.Created {
		t.Fatal(r)
	}
	before := time.Now()
	stop(t, b)
	if took := time.Since(before); took > drainTimeout+closeTimeout/2 {
		t.Errorf("it took %v", took)
	}
	select {
	case <-b.Done():
	default:
		t.Error("a closed backend isn't done")
	}
}

func TestFailureEndsTheBackend(t *testing.T) {
	b, err := Start(t.Context(), Options{Endpoint: endpointOf(t, filepath.Join(t.TempDir(), "state.db"))})
	if err != nil {
		t.Fatal(err)
	}
	b.listener.Close()
	select {
	case <-b.Done():
	case <-time.After(30 * time.Second):
		t.Fatal("it goes on")
	}
	if err := b.Err(); err == nil || !strings.Contains(err.Error(), "stopped") {
		t.Errorf("Err: %v", err)
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
}

func TestOnlyTheSupportedDriversAreLinked(t *testing.T) {
	for scheme, want := range map[string]bool{
		"sqlite": true, "postgres": true, "postgresql": true,
		"mysql": false, "nats": false, "jetstream": false, "memory": false, "mem": false, "t4": false, "http": false,
	} {
		if _, linked := drivers.Get(scheme); linked != want {
			t.Errorf("%s: linked %t, want %t", scheme, linked, want)
		}
	}
}

// TestFailedTransactions: kine ends the process where it can't commit a
// compaction, by a log entry.
func TestFailedTransactions(t *testing.T) {
	routeLogs()
	got, err := recoverFailedTransaction(t.Context(), nil, nil, func(context.Context, any) (any, error) {
		logrus.Fatalf("Transaction commit failed: %v", "database or disk is full")
		return "goes on", nil
	})
	if want := "Transaction commit failed: database or disk is full"; got != nil || status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, %v; want Unavailable, %s", got, err, want)
	}
	defer func() {
		if r := recover(); r != "another" {
			t.Errorf("recovered %v", r)
		}
	}()
	_, _ = recoverFailedTransaction(t.Context(), nil, nil, func(context.Context, any) (any, error) { panic("another") })
}

// brokenOff is a backend whose connection breaks while it reads a list.
type brokenOff struct{ server.Backend }

func (b brokenOff) List(ctx context.Context, key, end string, limit, revision int64, keysOnly bool) (int64, []*server.KeyValue, error) {
	rev, kvs, err := b.Backend.List(ctx, key, end, limit, revision, keysOnly)
	return rev, kvs[:min(len(kvs), 2)], err
}

func TestBrokenOffLists(t *testing.T) {
	ctx, end := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer end()
	backend, _, err := (&sqliteDB{path: filepath.Join(t.TempDir(), "state.db")}).open(ctx, &wg, &drivers.Config{CompactBatchSize: 1000, PollInterval: time.Second, PollBatchSize: pollBatch})
	if err != nil {
		t.Fatal(err)
	}
	if err := backend.Start(ctx); err != nil {
		t.Fatal(err)
	}
	var middle int64
	for i := range 4 {
		if middle, err = backend.Create(ctx, fmt.Sprintf("/r/%d", i), nil, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := backend.Create(ctx, "/r/4", nil, 0); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		limit, revision int64
		want            int
	}{
		"everything":                    {want: 5},
		"everything of an old revision": {revision: middle, want: 4},
		"a full page":                   {limit: 2, want: 2},
		"a page that isn't full":        {limit: 9, want: 5},
	} {
		_, kvs, err := backend.List(ctx, "/r/", "/r0", tc.limit, tc.revision, true)
		if err != nil || len(kvs) != tc.want {
			t.Errorf("%s: %d objects, %v; want %d", name, len(kvs), err, tc.want)
		}
		_, kvs, err = (&faithful{Backend: brokenOff{backend}}).List(ctx, "/r/", "/r0", tc.limit, tc.revision, true)
		if tc.want == 2 {
			if err != nil || len(kvs) != 2 {
				t.Errorf("%s, broken off after it: %d objects, %v", name, len(kvs), err)
			}
		} else if want := fmt.Sprintf("broke off a list after 2 of %d objects", tc.want); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s, broken off: %v, want %s", name, err, want)
		}
	}
}

func BenchmarkCreate(b *testing.B) {
	c := client(b, start(b, filepath.Join(b.TempDir(), "state.db")))
	value := strings.Repeat("v", 1000)
	var n atomic.Int64
	b.SetParallelism(8)
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			create(b, c, fmt.Sprintf("/r/%d", n.Add(1)), value)
		}
	})
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "creates/s")
}
