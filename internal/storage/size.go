package storage

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	"k8s.io/client-go/tools/cache"
)

// maxTransaction bounds a write, in bytes, as etcd does by default: what one
// storage takes, all do, so that objects can be moved.
const maxTransaction = 3 << 19

// refuseTooLarge is a gRPC interceptor.
func refuseTooLarge(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if txn, ok := req.(*etcdserverpb.TxnRequest); ok && proto.Size(txn) > maxTransaction {
		return nil, rpctypes.ErrGRPCRequestTooLarge
	}
	return handler(ctx, req)
}

// SayTooLarge has clients told that an object is too large to be stored, and
// what the limit is. The generic server would answer 500 with the storage's own
// words.
func SayTooLarge(getter generic.RESTOptionsGetter) generic.RESTOptionsGetter {
	return sizeRESTOptions{getter}
}

type sizeRESTOptions struct{ generic.RESTOptionsGetter }

func (g sizeRESTOptions) GetRESTOptions(resource schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	options, err := g.RESTOptionsGetter.GetRESTOptions(resource, example)
	if err != nil {
		return options, err
	}
	decorate := options.Decorator
	options.Decorator = func(config *storagebackend.ConfigForResource, prefix string, key func(runtime.Object) (string, error), newObject, newList func() runtime.Object, attributes storage.AttrFunc, trigger storage.IndexerFuncs, indexers *cache.Indexers) (storage.Interface, factory.DestroyFunc, error) {
		store, destroy, err := decorate(config, prefix, key, newObject, newList, attributes, trigger, indexers)
		if err != nil {
			return nil, nil, err
		}
		return sizeStorage{store}, destroy, nil
	}
	return options, nil
}

type sizeStorage struct{ storage.Interface }

func (s sizeStorage) Create(ctx context.Context, key string, obj, out runtime.Object, ttl uint64) error {
	return sayTooLarge(s.Interface.Create(ctx, key, obj, out, ttl))
}

func (s sizeStorage) GuaranteedUpdate(ctx context.Context, key string, destination runtime.Object, ignoreNotFound bool, preconditions *storage.Preconditions, tryUpdate storage.UpdateFunc, cached runtime.Object) error {
	return sayTooLarge(s.Interface.GuaranteedUpdate(ctx, key, destination, ignoreNotFound, preconditions, tryUpdate, cached))
}

func sayTooLarge(err error) error {
	if err == nil {
		return nil
	}
	// etcd's refusal, or that of its client, which doesn't even send so much.
	if err == rpctypes.ErrRequestTooLarge || status.Code(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "trying to send message larger than max") {
		return tooLarge{}
	}
	return err
}

// tooLarge is still the error that the generic server knows: it tries again
// without managed fields then.
type tooLarge struct{}

func (tooLarge) Error() string { return rpctypes.ErrRequestTooLarge.Error() }

func (tooLarge) Code() codes.Code { return codes.InvalidArgument }

func (tooLarge) Status() metav1.Status {
	return metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusRequestEntityTooLarge,
		Reason:  metav1.StatusReasonRequestEntityTooLarge,
		Message: fmt.Sprintf("the object is too large to be stored: the limit is %d bytes, with all metadata", maxTransaction),
	}
}
