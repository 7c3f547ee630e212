package storage

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/jackc/pgerrcode"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/k3s-io/kine/pkg/drivers"
	"github.com/k3s-io/kine/pkg/drivers/pgsql"
	"github.com/k3s-io/kine/pkg/server"
	"k8s.io/klog/v2"
)

const (
	// connectTimeout is how long Start waits for a PostgreSQL server that
	// doesn't answer, which may be starting as well.
	connectTimeout = 30 * time.Second

	// attemptTimeout bounds one attempt.
	attemptTimeout = 5 * time.Second

	// defaultDatabase is the database of a URL without one.
	defaultDatabase = "aaserver"
)

// postgresDB is a database on a PostgreSQL server, or one that speaks its
// protocol.
type postgresDB struct {
	// dsn is the URL without its scheme.
	dsn    string
	config *pgx.ConnConfig
}

func newPostgres(u *url.URL) (database, error) {
	if u.Opaque != "" || u.Host == "" && !u.Query().Has("host") {
		return nil, errors.New("the postgres storage endpoint needs a host: postgres://user:password@host:port/database")
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/" + defaultDatabase
	}
	u.Scheme = "postgres"
	config, err := pgx.ParseConfig(u.String())
	if err != nil {
		// pgx's own text holds parts of the URL.
		return nil, errors.New("the postgres storage endpoint has a parameter that PostgreSQL's client doesn't understand, or names a file that can't be read; see https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-URIS")
	}
	return &postgresDB{dsn: u.String()[len("postgres://"):], config: config}, nil
}

func (d *postgresDB) String() string {
	return fmt.Sprintf("the PostgreSQL database %q on %s:%d", d.config.Database, d.config.Host, d.config.Port)
}

// prepare connects once. kine would try for five minutes, and with a password
// that is wrong as well.
func (d *postgresDB) prepare(ctx context.Context) (release func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for first := true; ; first = false {
		err := d.connect(ctx)
		if err == nil {
			return func() {}, nil
		}
		if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && pgErr.Code != pgerrcode.CannotConnectNow && pgErr.Code != pgerrcode.TooManyConnections {
			return nil, fmt.Errorf("can't connect to %s as %q: %s (SQLSTATE %s)", d, d.config.User, pgErr.Message, pgErr.Code)
		}
		if first {
			klog.InfoS("Waiting for the database", "database", d.String(), "timeout", connectTimeout, "err", oneLine(err))
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, fmt.Errorf("can't connect to %s as %q: %w", d, d.config.User, oneLine(err))
		}
	}
}

func (d *postgresDB) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(ctx, d.config)
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && pgErr.Code == pgerrcode.InvalidCatalogName {
		return nil // kine creates the database
	}
	if err != nil {
		return err
	}
	return conn.Close(ctx)
}

func (d *postgresDB) open(ctx context.Context, wg *sync.WaitGroup, cfg *drivers.Config) (server.Backend, func(), error) {
	cfg.DataSourceName = d.dsn
	_, backend, err := pgsql.New(ctx, wg, cfg)
	if err != nil {
		return nil, nil, err
	}
	return &faithful{Backend: backend}, func() {}, nil
}
