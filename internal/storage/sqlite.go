package storage

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/k3s-io/kine/pkg/drivers"
	"github.com/k3s-io/kine/pkg/drivers/generic"
	kinesqlite "github.com/k3s-io/kine/pkg/drivers/sqlite"
	"github.com/k3s-io/kine/pkg/logstructured"
	"github.com/k3s-io/kine/pkg/logstructured/sqllog"
	"github.com/k3s-io/kine/pkg/query"
	"github.com/k3s-io/kine/pkg/server"
	"k8s.io/klog/v2"
	modernc "modernc.org/sqlite"
)

const (
	// checkTimeout bounds the search for damage at the start: some gigabytes.
	checkTimeout = 15 * time.Second

	// busyTimeout is how long SQLite waits for a lock, in milliseconds.
	busyTimeout = "30000"
)

// sqliteDB is an SQLite database in a file of its own.
type sqliteDB struct {
	path string
	// vacuum says that most of the file is free space.
	vacuum bool
}

func newSQLite(u *url.URL) (database, error) {
	if u.Host != "" || u.User != nil {
		return nil, errors.New("the sqlite storage endpoint needs an absolute path after three slashes: sqlite:///path/to/file.db")
	}
	if u.RawQuery != "" || u.ForceQuery {
		return nil, errors.New("the sqlite storage endpoint takes no parameters; write ? in a path as %3F")
	}
	path := filepath.Clean(u.Path)
	if u.Path == "" || strings.HasSuffix(u.Path, "/") || strings.ContainsRune(path, 0) {
		return nil, errors.New("the sqlite storage endpoint needs the path of a file: sqlite:///path/to/file.db")
	}
	return &sqliteDB{path: path}, nil
}

func (d *sqliteDB) String() string { return "the SQLite database " + d.path }

func (d *sqliteDB) prepare(ctx context.Context) (release func(), err error) {
	// A path that is mistyped would give an empty server.
	if dir, err := os.Stat(filepath.Dir(d.path)); err != nil || !dir.IsDir() {
		return nil, fmt.Errorf("can't open %s: %s is no directory: make it first, or correct the path", d, filepath.Dir(d.path))
	}
	info, err := os.Stat(d.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("can't open %s: %w", d, err)
	case info.IsDir():
		return nil, fmt.Errorf("can't open %s: it is a directory; name a file in it", d)
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("can't open %s: it isn't a regular file", d)
	}
	unlock, err := lock(d.path+".lock", d.String())
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			unlock()
		}
	}()
	// SQLite gives its other files the same mode.
	f, err := os.OpenFile(d.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("can't open %s: %w", d, err)
	}
	defer f.Close()
	if err := d.check(ctx, f); err != nil {
		return nil, err
	}
	if err := d.try(ctx); err != nil {
		return nil, fmt.Errorf("can't open %s for writing: %w", d, oneLine(err))
	}
	return unlock, nil
}

// damaged is the refusal of a file that isn't what it should be.
func (d *sqliteDB) damaged(what string) error {
	return fmt.Errorf("%s %s; nothing was changed: restore it from a backup, or move it away together with its -wal and -shm files to start empty", d, strings.Join(strings.Fields(what), " "))
}

// check refuses a damaged database and one that is somebody else's, without
// changing a byte of it. What can't be found out is left for try to find.
//
// SQLite can't read a database that was in use when its process was killed
// without its log, the -wal file, and can't read that without writing next to
// it. So it gets a directory with hard links to both and opens the database
// for reading only: what it writes there is the log's index alone.
func (d *sqliteDB) check(ctx context.Context, f *os.File) error {
	// https://www.sqlite.org/fileformat.html#the_database_header
	header := make([]byte, 100)
	n, err := io.ReadFull(f, header)
	switch {
	case err == io.EOF:
		return nil // new
	case err != nil && err != io.ErrUnexpectedEOF:
		return fmt.Errorf("can't read %s: %w", d, err)
	case n < len(header) || !bytes.HasPrefix(header, []byte("SQLite format 3\x00")):
		return d.damaged("is damaged or isn't an SQLite database")
	}
	// SQLite takes a file without a whole page for an empty one.
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("can't read %s: %w", d, err)
	}
	if info.Size() < int64(binary.BigEndian.Uint16(header[16:])) {
		return d.damaged("is damaged (its first page is cut off)")
	}

	dir := d.path + ".check"
	// It may have been left behind by a server that was killed. Nobody else
	// uses it: we hold the lock.
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("can't remove an old directory: %w", err)
	}
	defer os.RemoveAll(dir)
	err = os.Mkdir(dir, 0o700)
	for _, suffix := range []string{"", "-wal", "-journal"} {
		if err != nil {
			break
		}
		if err = os.Link(d.path+suffix, filepath.Join(dir, "db"+suffix)); suffix != "" && errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	}
	if err != nil {
		klog.InfoS("The database can't be checked for damage here", "database", d.path, "err", err)
		return nil
	}

	db, err := sql.Open("sqlite", "file:"+escapePath(filepath.Join(dir, "db"))+"?mode=ro")
	if err != nil {
		return err
	}
	defer db.Close()
	db.SetMaxOpenConns(1)
	checkCtx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()

	var pages, free, tables, ours int64
	var verdict string
	err = db.QueryRowContext(checkCtx, `SELECT
		(SELECT page_count FROM pragma_page_count()),
		(SELECT freelist_count FROM pragma_freelist_count()),
		(SELECT count(*) FROM sqlite_schema WHERE name NOT LIKE 'sqlite\_%' ESCAPE '\'),
		(SELECT count(*) FROM sqlite_schema WHERE type = 'table' AND name = 'kine')`).Scan(&pages, &free, &tables, &ours)
	if err == nil {
		err = db.QueryRowContext(checkCtx, "PRAGMA quick_check(1)").Scan(&verdict)
	}
	if serr, ok := errors.AsType[*modernc.Error](err); ok {
		switch serr.Code() & 0xff {
		case 11, 26: // SQLITE_CORRUPT, SQLITE_NOTADB
			return d.damaged("is damaged (" + serr.Error() + ")")
		}
	}
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case checkCtx.Err() != nil:
		klog.InfoS("No damage found in the part of the database that could be checked in time", "database", d.path, "limit", checkTimeout)
	case err != nil:
		klog.InfoS("The database couldn't be checked for damage", "database", d.path, "err", err)
	case verdict != "ok":
		return d.damaged("is damaged (" + verdict + ")")
	case tables > 0 && ours == 0:
		return d.damaged("holds another program's data")
	}
	// Freed space is used again; it is only given back where there is a lot
	// of it, as that rewrites the file.
	d.vacuum = pages > 10_000 && free > pages/2
	return nil
}

// try opens the database as kine will, which would try again for minutes if
// that failed.
func (d *sqliteDB) try(ctx context.Context) error {
	db, err := sql.Open("sqlite", "file:"+escapePath(d.path)+"?_txlock=immediate&_pragma=busy_timeout("+busyTimeout+")&_pragma=journal_mode(WAL)&_pragma=synchronous(FULL)")
	if err != nil {
		return err
	}
	defer db.Close()
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	return tx.Rollback()
}

// connect has kine open the database.
func (d *sqliteDB) connect(ctx context.Context, wg *sync.WaitGroup, cfg *drivers.Config) (*generic.Generic, error) {
	params := url.Values{
		"_busy_timeout": {busyTimeout},
		"_journal_mode": {"WAL"},
		// What was acknowledged survives a power cut. kine's own default is
		// NORMAL, which survives the death of the process alone.
		"_synchronous": {"FULL"},
		"_txlock":      {"immediate"},
	}
	if !d.vacuum {
		params.Set("_kine_disable_startup_vacuum", "1")
	}
	cfg.DataSourceName = dataSource(d.path) + "?" + params.Encode()
	_, dialect, err := kinesqlite.NewVariant(ctx, wg, "sqlite3", cfg)
	if err != nil {
		return nil, err
	}
	if err := verifyDurable(ctx, dialect.DB); err != nil {
		return nil, err
	}
	return dialect, nil
}

func (d *sqliteDB) open(ctx context.Context, wg *sync.WaitGroup, cfg *drivers.Config) (server.Backend, func(), error) {
	dialect, err := d.connect(ctx, wg, cfg)
	if err != nil {
		return nil, nil, err
	}
	backend := &faithful{
		Backend:   logstructured.New(explainingLog{sqllog.New(unleakingDialect{dialect}, wg, cfg)}),
		writes:    make(chan struct{}, 1),
		explained: true,
	}
	closed := func() {
		// Some of kine's goroutines aren't counted and may have a connection
		// for a moment longer.
		for deadline := time.Now().Add(closeTimeout); dialect.DB.Stats().OpenConnections > 0 && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		// The last connection to be closed writes the log back, but when two
		// are at the same time, neither is the last.
		if _, err := os.Stat(d.path + "-wal"); err == nil {
			if err := d.try(context.Background()); err != nil {
				klog.InfoS("The database's log is left for the next start", "database", d.path, "err", err)
			}
		}
	}
	return backend, closed, nil
}

// unleakingDialect prepares the statement of kine's poll loop in spite of a
// context that ends: kine v0.17.5 would lose the connection.
type unleakingDialect struct{ *generic.Generic }

func (d unleakingDialect) PrepareAfter(ctx context.Context, limit int64) (*query.Stmt, error) {
	return d.Generic.PrepareAfter(context.WithoutCancel(ctx), limit)
}

// verifyDurable makes sure that the connection's settings are in force: each
// of the two SQLite drivers that kine is built with spells them differently,
// and ignores what it doesn't know.
func verifyDurable(ctx context.Context, db *sql.DB) error {
	var synchronous int
	var journal string
	if err := db.QueryRowContext(ctx, "PRAGMA synchronous").Scan(&synchronous); err != nil {
		return err
	}
	if err := db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&journal); err != nil {
		return err
	}
	if synchronous != 2 || journal != "wal" {
		return fmt.Errorf("SQLite didn't accept its settings: synchronous is %d instead of 2, journal_mode %q instead of wal", synchronous, journal)
	}
	return nil
}

// escapePath makes a path part of an SQLite URI.
func escapePath(path string) string {
	return (&url.URL{Path: path}).EscapedPath()
}
