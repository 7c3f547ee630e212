package storage

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	clientv3 "go.etcd.io/etcd/client/v3"

	"aaserver.io/aaserver/internal/storage/storagetest"
)

func TestPostgres(t *testing.T) {
	url := storagetest.Postgres(t)
	begin := func(t *testing.T, database string) *Backend {
		t.Helper()
		// The server may still be starting: Start waits for it.
		b, err := Start(t.Context(), Options{Endpoint: url + database})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { stop(t, b) })
		return b
	}
	t.Run("it is used as etcd", func(t *testing.T) { testEtcdSemantics(t, begin(t, "one")) })
	t.Run("it pages and compacts", func(t *testing.T) { testPagingAndCompaction(t, begin(t, "two")) })
	t.Run("what was stored is there after a restart, and for others", func(t *testing.T) {
		b := begin(t, "")
		create(t, client(t, b), "/r/a", "v")
		c := client(t, begin(t, "aaserver"))
		if diff := cmp.Diff([]string{"/r/a=v"}, contents(t, c, "/r/")); diff != "" {
			t.Errorf("in another server (-want +got):\n%s", diff)
		}
		w := c.Watch(t.Context(), "/r/b", clientv3.WithCreatedNotify())
		<-w
		create(t, client(t, b), "/r/b", "v")
		if r := <-w; len(r.Events) != 1 {
			t.Errorf("another server sees %v", r)
		}
		stop(t, b)
		if diff := cmp.Diff([]string{"/r/a=v", "/r/b=v"}, contents(t, client(t, begin(t, "aaserver")), "/r/")); diff != "" {
			t.Errorf("after a restart (-want +got):\n%s", diff)
		}
	})
	t.Run("a write that fails is an error", func(t *testing.T) {
		c := client(t, begin(t, "readonly"))
		rev := create(t, c, "/r/old", "v")
		setReadOnly(t, url, "on")
		defer setReadOnly(t, url, "off")
		// Connections take the setting up when they are used next.
		var cerr error
		for i, deadline := 0, time.Now().Add(30*time.Second); cerr == nil; i++ {
			if time.Now().After(deadline) {
				t.Fatal("the database isn't read-only")
			}
			_, cerr = c.Txn(t.Context()).If(clientv3.Compare(clientv3.ModRevision(fmt.Sprint("/new/", i)), "=", 0)).Then(clientv3.OpPut(fmt.Sprint("/new/", i), "v")).Commit()
			n := get(t, c, "/new/", clientv3.WithPrefix(), clientv3.WithCountOnly()).Count
			want := int64(i)
			if cerr == nil {
				want++
			}
			if n != want {
				t.Fatalf("%d objects of %d that were acknowledged", n, want)
			}
		}
		_, uerr := update(c, "/r/old", "v2", rev)
		_, derr := remove(c, "/r/old", rev)
		for op, err := range map[string]error{"create": cerr, "update": uerr, "delete": derr} {
			if err == nil || !strings.Contains(err.Error(), "the database didn't store the change") {
				t.Errorf("%s: %v", op, err)
			}
		}
	})
	t.Run("a wrong password is refused at once", func(t *testing.T) {
		wrong := strings.Replace(url, "secret", "other", 1) + "one"
		_, err := Start(t.Context(), Options{Endpoint: wrong})
		if err == nil || !strings.Contains(err.Error(), `password authentication failed for user "me" (SQLSTATE 28P01)`) {
			t.Errorf("got %v", err)
		}
		if strings.Contains(err.Error(), "other") || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %q", err)
		}
	})
}

func setReadOnly(t *testing.T, url, value string) {
	t.Helper()
	ctx := context.Background()
	conn, err := pgx.Connect(ctx, url+"postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, stmt := range []string{
		"SET default_transaction_read_only = off",
		"ALTER SYSTEM SET default_transaction_read_only = " + value,
		"SELECT pg_reload_conf()",
	} {
		if _, err := conn.Exec(ctx, stmt); err != nil {
			t.Fatal(err)
		}
	}
}

// refuse is a PostgreSQL server that refuses everybody.
func refuse(t *testing.T, answer *pgproto3.ErrorResponse) (address string, connections *atomic.Int32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	connections = &atomic.Int32{}
	done := make(chan struct{})
	t.Cleanup(func() { l.Close(); <-done })
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			backend := pgproto3.NewBackend(conn, conn)
			if _, err := backend.ReceiveStartupMessage(); err == nil {
				backend.Send(answer)
				_ = backend.Flush()
			}
			conn.Close()
		}
	}()
	return l.Addr().String(), connections
}

func TestPostgresRefusals(t *testing.T) {
	address, connections := refuse(t, &pgproto3.ErrorResponse{Severity: "FATAL", Code: "28P01", Message: `password authentication failed for user "me"`})
	_, err := Start(t.Context(), Options{Endpoint: "postgresql://me:secret@" + address + "/db?sslmode=disable"})
	host, port, _ := net.SplitHostPort(address)
	want := fmt.Sprintf(`can't connect to the PostgreSQL database "db" on %s:%s as "me": password authentication failed for user "me" (SQLSTATE 28P01)`, host, port)
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
	if n := connections.Load(); n != 1 {
		t.Errorf("%d attempts", n)
	}
}

func TestPostgresThatDoesNotAnswer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	l.Close()
	ctx, cancel := context.WithCancelCause(t.Context())
	given := errors.New("given up")
	timer := time.AfterFunc(100*time.Millisecond, func() { cancel(given) })
	defer timer.Stop()
	_, err = Start(ctx, Options{Endpoint: "postgres://me:secret@" + address + "/db?sslmode=disable"})
	if err == nil || !strings.Contains(err.Error(), `can't connect to the PostgreSQL database "db" on `+address) || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("got %v", err)
	}
	if strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "\n") {
		t.Errorf("got %q", err)
	}
}
