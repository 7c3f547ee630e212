package target

import (
	"context"
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/registry/rest"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/policy"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

// PortForwardREST is the portforward subresource.
type PortForwardREST struct {
	*connector
}

var _ rest.Connecter = (*PortForwardREST)(nil)

// New implements rest.Storage.
func (*PortForwardREST) New() runtime.Object { return &v1.TargetPortForwardOptions{} }

// Destroy implements rest.Storage.
func (*PortForwardREST) Destroy() {}

// ConnectMethods implements rest.Connecter.
func (*PortForwardREST) ConnectMethods() []string { return upgradeMethods }

// NewConnectOptions implements rest.Connecter.
func (*PortForwardREST) NewConnectOptions() (runtime.Object, bool, string) {
	return &v1.TargetPortForwardOptions{}, false, ""
}

// Connect implements rest.Connecter.
func (r *PortForwardREST) Connect(ctx context.Context, name string, options runtime.Object, responder rest.Responder) (http.Handler, error) {
	opts := options.(*v1.TargetPortForwardOptions)
	if err := badOptions(validation.ValidateTargetPortForwardOptions(opts)); err != nil {
		return nil, err
	}
	to, err := r.access(ctx, name)
	if err != nil {
		return nil, err
	}
	instance, err := pick(to.target, opts.Instance, false)
	if err != nil {
		return nil, err
	}
	var request streaming.PortForwardRequest
	for _, port := range opts.Ports {
		// Ports that are named beforehand are refused beforehand.
		if err := r.allowPort(to.target, to.class, uint16(port)); err != nil {
			return nil, err
		}
		request.Ports = append(request.Ports, uint16(port))
	}
	return r.stream(responder, to, instance, "portforward", func(w http.ResponseWriter, req *http.Request, s *session.Session) error {
		conn, err := r.open(req.Context(), to, instance)
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		defer conn.Close()
		dialer, err := ability[driver.PortDialer](conn, to.target, "portforward")
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		dial := func(ctx context.Context, end streaming.Endpoint) (streaming.PortStream, error) {
			// The class as it is by now: a session may last, and each of its
			// connections is a new one.
			class, err := r.class(ctx, to.target)
			if err != nil {
				return nil, err
			}
			if err := r.allowPort(to.target, class, end.Port); err != nil {
				return nil, err
			}
			stream, err := dialer.DialPort(ctx, end.Port)
			if err != nil {
				r.tell(to.target, err)
				return nil, statusError(err)
			}
			return s.CountBackend(stream), nil
		}
		return streaming.ServePortForward(w, req, request, r.opts.Streaming, streaming.PortForwardBackend{Dial: dial})
	}), nil
}

// allowPort says whether a port may be forwarded. It is asked as each stream
// opens, because over SPDY the ports come after the upgrade.
func (r *PortForwardREST) allowPort(target *v1.Target, class *v1.TargetClass, port uint16) error {
	err := policy.AllowPort(class, target, port, v1.ProtocolTCP)
	r.tell(target, err)
	return statusError(err)
}
