package server

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"

	"aaserver.io/aaserver/internal/storage"
)

// openDataDir makes and locks a data directory.
func openDataDir(dir string) (unlock func(), err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("the data directory can't be made: %w", err)
	}
	release, err := storage.LockDir(dir)
	if err != nil {
		return nil, err
	}
	return func() { release() }, nil
}

// startStorage starts a SQL database as the API server's etcd. That it fails
// later ends the group.
func startStorage(ctx context.Context, group *errgroup.Group, opts storage.Options) (*storage.Backend, error) {
	backend, err := storage.Start(ctx, opts)
	if err != nil {
		return nil, err
	}
	group.Go(func() error {
		select {
		case <-backend.Done():
			return failed("the storage", backend.Err())
		case <-ctx.Done():
			return nil
		}
	})
	return backend, nil
}

// failed names the part of the server that has failed.
func failed(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s has failed: %w", what, err)
}
