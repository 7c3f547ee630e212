package storage

import (
	"context"
	"io"
	"strings"
	"sync"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/klog/v2"
)

// routeLogs sends what kine logs to klog. kine knows no logger but logrus's
// global one, and nothing else in our binaries uses that.
var routeLogs = sync.OnceFunc(func() {
	logrus.SetOutput(io.Discard)
	logrus.SetFormatter(noFormat{})
	switch {
	case klog.V(10).Enabled():
		logrus.SetLevel(logrus.TraceLevel)
	case klog.V(4).Enabled():
		logrus.SetLevel(logrus.DebugLevel)
	case klog.V(2).Enabled():
		logrus.SetLevel(logrus.InfoLevel)
	default:
		logrus.SetLevel(logrus.WarnLevel)
	}
	logrus.AddHook(klogHook{})
	logrus.RegisterExitHandler(klog.Flush)
})

// klogHook hands logrus's entries on.
type klogHook struct{}

func (klogHook) Levels() []logrus.Level { return logrus.AllLevels }

func (klogHook) Fire(e *logrus.Entry) error {
	msg := strings.TrimSpace(e.Message)
	switch {
	case e.Level <= logrus.FatalLevel && strings.HasPrefix(msg, "Transaction "):
		panic(failedTransaction(msg))
	case e.Level <= logrus.ErrorLevel && strings.HasPrefix(msg, "error "):
		// An error that the client gets: it knows what to make of it, an
		// expired revision for example.
		klog.V(2).InfoS("Storage request failed", "err", msg)
	case strings.HasSuffix(msg, context.Canceled.Error()), strings.HasSuffix(msg, "sql: database is closed"):
		// What was under way when the backend was closed.
		klog.V(4).Info("Storage: " + msg)
	case e.Level <= logrus.ErrorLevel:
		klog.ErrorS(nil, "Storage: "+msg)
	case e.Level == logrus.WarnLevel:
		klog.Warning("Storage: " + msg)
	case e.Level == logrus.InfoLevel:
		klog.V(2).Info("Storage: " + msg)
	case e.Level == logrus.DebugLevel:
		klog.V(4).Info("Storage: " + msg)
	default:
		klog.V(10).Info("Storage: " + msg)
	}
	return nil
}

type noFormat struct{}

func (noFormat) Format(*logrus.Entry) ([]byte, error) { return nil, nil }

// failedTransaction is thrown where kine would end the process because a
// transaction could be neither committed nor rolled back, as on a full disk.
// It only does so when it compacts, which can wait.
type failedTransaction string

func (f failedTransaction) Error() string { return string(f) }

// recoverFailedTransaction is a gRPC interceptor that makes a failedTransaction
// the request's error.
func recoverFailedTransaction(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (_ any, err error) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failedTransaction:
			klog.ErrorS(r, "Storage transaction failed")
			err = status.Error(codes.Unavailable, r.Error())
		default:
			panic(r)
		}
	}()
	return handler(ctx, req)
}
