package storage

import (
	"context"
	"errors"
	"fmt"

	"github.com/k3s-io/kine/pkg/logstructured"
	"github.com/k3s-io/kine/pkg/server"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// faithful corrects how kine's backend reports failures of the database, as of
// kine v0.17.5:
//
//   - Create reports success if a new key can't be stored, on a full disk for
//     example: the error is shadowed, and an API object that was acknowledged
//     is lost.
//   - Update and Delete report a conflict in that case, with the very revision
//     that was asked for, on which the API server tries again without pause
//     until its request times out.
//   - List returns the rows read until then as all there are if reading fails
//     halfway, as when the connection to the database breaks.
type faithful struct {
	server.Backend
	// writes, if not nil, admits one write at a time. SQLite knows one writer;
	// others would sleep and try again, for longer each time.
	writes chan struct{}
	// explained says that the backend's log is an explainingLog, so that a
	// failed write is known for one. Otherwise what was created is read back.
	explained bool
}

func (f *faithful) Create(ctx context.Context, key string, value []byte, lease int64) (int64, error) {
	ctx, outcome, unlock, err := f.beginWrite(ctx)
	if err != nil {
		return 0, err
	}
	rev, err := f.Backend.Create(ctx, key, value, lease)
	unlock()
	if err != nil {
		return rev, err
	}
	if outcome.err != nil {
		return 0, notStored(outcome.err)
	}
	if !f.explained {
		_, kv, err := f.Backend.Get(ctx, key, rev, true)
		if err != nil {
			return 0, err
		}
		if kv == nil || kv.ModRevision != rev {
			return 0, notStored(nil)
		}
	}
	return rev, nil
}

func (f *faithful) Update(ctx context.Context, key string, value []byte, revision, lease int64) (int64, *server.KeyValue, bool, error) {
	ctx, outcome, unlock, err := f.beginWrite(ctx)
	if err != nil {
		return 0, nil, false, err
	}
	rev, kv, updated, err := f.Backend.Update(ctx, key, value, revision, lease)
	unlock()
	if err == nil && !updated && (outcome.err != nil || kv != nil && kv.ModRevision == revision) {
		return 0, nil, false, notStored(outcome.err)
	}
	return rev, kv, updated, err
}

func (f *faithful) Delete(ctx context.Context, key string, revision int64) (int64, *server.KeyValue, bool, error) {
	ctx, outcome, unlock, err := f.beginWrite(ctx)
	if err != nil {
		return 0, nil, false, err
	}
	rev, kv, deleted, err := f.Backend.Delete(ctx, key, revision)
	unlock()
	// A key that doesn't exist counts as deleted.
	if err == nil && (outcome.err != nil || !deleted && kv != nil && kv.ModRevision == revision) {
		return 0, nil, false, notStored(outcome.err)
	}
	return rev, kv, deleted, err
}

func (f *faithful) List(ctx context.Context, key, end string, limit, revision int64, keysOnly bool) (int64, []*server.KeyValue, error) {
	rev, kvs, err := f.Backend.List(ctx, key, end, limit, revision, keysOnly)
	if err != nil || limit > 0 && int64(len(kvs)) >= limit {
		return rev, kvs, err
	}
	// kine's streamed form would tell of the failure, but is a data race.
	if revision == 0 {
		revision = rev
	}
	_, n, err := f.Backend.Count(ctx, key, end, revision)
	if err != nil {
		return rev, nil, err
	}
	if n != int64(len(kvs)) {
		return rev, nil, status.Error(codes.Unavailable, fmt.Sprintf("the database broke off a list after %d of %d objects", len(kvs), n))
	}
	return rev, kvs, nil
}

func (f *faithful) beginWrite(ctx context.Context) (_ context.Context, _ *outcome, unlock func(), err error) {
	if f.writes == nil {
		unlock = func() {}
	} else {
		select {
		case f.writes <- struct{}{}:
			unlock = func() { <-f.writes }
		case <-ctx.Done():
			return nil, nil, nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	o := &outcome{}
	return context.WithValue(ctx, outcomeKey{}, o), o, unlock, nil
}

// refuseRangeStream is a gRPC interceptor that hides kine's streamed lists, of
// which a limited one returns an item too many and no revision if a batch ends
// at the limit. The API server falls back on pages.
func refuseRangeStream(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if info.FullMethod == etcdserverpb.KV_RangeStream_FullMethodName {
		return status.Error(codes.Unimplemented, "streamed lists are not supported")
	}
	return handler(srv, stream)
}

// notStored is the error of a write that the database didn't take.
func notStored(err error) error {
	switch {
	case err == nil:
		return status.Error(codes.Unavailable, "the database didn't store the change; is it read-only, or its disk full?")
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return status.FromContextError(err).Err()
	default:
		return status.Error(codes.Unavailable, fmt.Sprintf("the database didn't store the change: %v", err))
	}
}

// outcome is what became of the last row that a request wrote.
type outcome struct{ err error }

type outcomeKey struct{}

// explainingLog tells the request's outcome what became of a row.
type explainingLog struct{ logstructured.Log }

func (l explainingLog) Append(ctx context.Context, event *server.Event) (int64, error) {
	rev, err := l.Log.Append(ctx, event)
	if o, ok := ctx.Value(outcomeKey{}).(*outcome); ok {
		// That somebody else has written the same revision is a conflict, no
		// failure, and told as one.
		o.err = err
		if errors.Is(err, server.ErrKeyExists) {
			o.err = nil
		}
	}
	return rev, err
}
