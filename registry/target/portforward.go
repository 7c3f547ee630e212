package target

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/registry/rest"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/apis/streaming/validation"
	"aaserver.io/aaserver/internal/driver"
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
	if err := authorizeCreate(ctx, r.opts.Authorizer); err != nil {
		return nil, err
	}
	target, err := r.target(ctx, name)
	if err != nil {
		return nil, err
	}
	instance, err := pick(target, opts.Instance, false)
	if err != nil {
		return nil, err
	}
	var request streaming.PortForwardRequest
	for _, port := range opts.Ports {
		// Ports that are named beforehand are refused beforehand.
		if err := r.allowPort(target, uint16(port)); err != nil {
			return nil, err
		}
		request.Ports = append(request.Ports, uint16(port))
	}
	return r.stream(responder, target, instance, "portforward", func(w http.ResponseWriter, req *http.Request, s *session.Session) error {
		conn, err := r.open(req.Context(), target, instance)
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		defer conn.Close()
		dialer, err := ability[driver.PortDialer](conn, target, "portforward")
		if err != nil {
			responder.Error(statusError(err))
			return err
		}
		return streaming.ServePortForward(w, req, request, r.opts.Streaming, func(ctx context.Context, port uint16) (streaming.PortStream, error) {
			if err := r.allowPort(target, port); err != nil {
				return nil, err
			}
			stream, err := dialer.DialPort(ctx, port)
			if err != nil {
				return nil, statusError(err)
			}
			return s.CountBackend(stream), nil
		})
	}), nil
}

// allowPort says whether a port may be forwarded. It is asked as each stream
// opens, because over SPDY the ports come after the upgrade.
func (c *connector) allowPort(target *v1.Target, port uint16) error {
	tcp := func(p v1.TargetPort) bool {
		return p.Port == int32(port) && p.Protocol == v1.ProtocolTCP
	}
	if c.opts.OpenPorts || slices.ContainsFunc(target.Spec.Ports, tcp) {
		return nil
	}
	var open []string
	for _, p := range target.Spec.Ports {
		if p.Protocol == v1.ProtocolTCP {
			open = append(open, fmt.Sprintf("%s (%d)", p.Name, p.Port))
		}
	}
	return apierrors.NewForbidden(api.Resource("targets/portforward"), target.Name,
		fmt.Errorf("port %d is not among the TCP ports in its spec: %s", port, orNone(strings.Join(open, ", "))))
}
