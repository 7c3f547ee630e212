package target

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/driver"
	"aaserver.io/aaserver/internal/policy"
	"aaserver.io/aaserver/internal/session"
	"aaserver.io/aaserver/streaming"
)

// connector is what the connect subresources share: the way from a request to
// an open instance.
type connector struct {
	targets rest.Getter
	opts    Options
}

// access is a target, and the class that governs it, both as they were when the
// session was asked for: its limits are those of that class.
type access struct {
	target *v1.Target
	class  *v1.TargetClass
}

// access finds a target and its class. Without its class, a target can't be
// connected to.
func (c *connector) access(ctx context.Context, name string) (*access, error) {
	return c.accessAt(ctx, name, "")
}

// accessAt is access to a target that is no older than a resource version; the
// newest one if that is "". Its class is the newest in any case.
func (c *connector) accessAt(ctx context.Context, name, resourceVersion string) (*access, error) {
	obj, err := c.targets.Get(ctx, name, &metav1.GetOptions{ResourceVersion: resourceVersion})
	if err != nil {
		return nil, err
	}
	target, err := toV1(obj.(*api.Target))
	if err != nil {
		return nil, err
	}
	class, err := c.class(ctx, target)
	if err != nil {
		return nil, err
	}
	return &access{target, class}, nil
}

// class finds the class that governs a target now.
func (c *connector) class(ctx context.Context, target *v1.Target) (*v1.TargetClass, error) {
	class, err := policy.Governing(ctx, c.opts.Classes, target.Spec.ClassName)
	c.tell(target, err)
	return class, statusError(err)
}

// tell leaves an Event on a target about a connection that failed, if a person
// would look for it there.
func (c *connector) tell(target *v1.Target, err error) {
	reason := ""
	switch _, denied := errors.AsType[*policy.DeniedError](err); {
	case denied:
		reason = v1.EventClassDenied
	case driver.KindOf(err) == driver.Unavailable:
		reason = v1.EventUnreachable
	default:
		return
	}
	c.opts.Recorder.Event(target, corev1.EventTypeWarning, reason, err.Error())
}

// pick returns the instance that a request means: the one that it names, or
// else the first ready one. With none ready it fails, unless notReady allows
// another: a log can be read of an instance that has ended.
func pick(target *v1.Target, name string, notReady bool) (string, error) {
	names := instances(target)
	if name != "" {
		if !slices.Contains(names, name) {
			return "", notFound(fmt.Sprintf("target %q has no instance %q: it has %s", target.Name, name, listed(names)))
		}
		return name, nil
	}
	for _, instance := range target.Status.Instances {
		if instance.Ready {
			return instance.Name, nil
		}
	}
	switch {
	case len(names) == 0 && target.Spec.Hosted() && len(target.InstanceNames()) == 0:
		return "", statusError(driver.Errorf(driver.NotRunning, "target %q is scaled to 0 instances: scale it up first", target.Name))
	case len(names) == 0:
		return "", statusError(driver.Errorf(driver.NotRunning, "no instance of target %q was started yet: its agent %q may be down, or busy", target.Name, target.Spec.AgentName))
	case notReady, !target.Spec.Hosted():
		// Whether a reached endpoint answers is seen when it is dialled.
		return names[0], nil
	}
	return "", statusError(driver.Errorf(driver.NotRunning, "no instance of target %q is running: %s", target.Name, describe(target.Status.Instances[0])))
}

// instances returns the names of a target's instances: of those that exist
// where an agent makes them, of those that the spec lists where they are
// reached.
func instances(target *v1.Target) []string {
	if !target.Spec.Hosted() {
		return target.InstanceNames()
	}
	var names []string
	for _, instance := range target.Status.Instances {
		names = append(names, instance.Name)
	}
	return names
}

func listed(names []string) string { return enumerated(names, 5) }

func enumerated(names []string, most int) string {
	switch {
	case len(names) == 0:
		return "none"
	case len(names) > most:
		return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
	}
	return strings.Join(names, ", ")
}

// describe says in a few words what an instance does.
func describe(instance v1.InstanceStatus) string {
	switch state := instance.State; {
	case state.Terminated != nil:
		return fmt.Sprintf("%s has ended (%s, exit code %d)", instance.Name, state.Terminated.Reason, state.Terminated.ExitCode)
	case state.Waiting != nil && state.Waiting.Message != "":
		return fmt.Sprintf("%s is waiting (%s: %s)", instance.Name, state.Waiting.Reason, state.Waiting.Message)
	case state.Waiting != nil:
		return fmt.Sprintf("%s is waiting (%s)", instance.Name, state.Waiting.Reason)
	}
	return instance.Name + " isn't ready"
}

// stream serves one streaming request: it registers the session, calls serve,
// and ends the session with what serve returned. A session that may not begin
// is answered with an HTTP status. serve says by stands that the client has been
// answered otherwise.
func (c *connector) stream(responder rest.Responder, to *access, instance, subresource string, serve func(w http.ResponseWriter, r *http.Request, s *session.Session, stands func()) error) http.Handler {
	allowed := policy.LimitsOf(to.class, c.opts.Limits)
	limits := session.Limits{
		PerUser:     allowed.SessionsPerUser,
		PerTarget:   allowed.SessionsPerTarget,
		IdleTimeout: allowed.IdleTimeout,
		MaxDuration: allowed.MaxDuration,
	}
	if subresource == "log" {
		limits.IdleTimeout = 0 // to wait for lines is what it is for
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info := session.Info{
			Class:       to.class.Name,
			Namespace:   to.target.Namespace,
			Target:      to.target.Name,
			TargetUID:   to.target.UID,
			Instance:    instance,
			Subresource: subresource,
			Protocol:    protocolOf(r),
		}
		if user, ok := request.UserFrom(r.Context()); ok {
			info.User = user.GetName()
		}
		detach(w, r, info.Protocol != session.ProtocolHTTP, func(w http.ResponseWriter, r *http.Request, d *detached) {
			ctx, s, err := c.opts.Sessions.Start(r.Context(), info, limits)
			if err != nil {
				responder.Error(err)
				return
			}
			audit.AddAuditAnnotations(ctx, sessionAnnotation, s.ID(), auditPrefix+"instance", instance)
			// The session ends after its streams are joined, also when they panic.
			var ended error = errPanicked
			defer func() {
				in, out := s.Bytes()
				d.end(ctx, ended == errPanicked,
					auditPrefix+"bytes-in", strconv.FormatInt(in, 10),
					auditPrefix+"bytes-out", strconv.FormatInt(out, 10),
					causeAnnotation, causeOf(ended))
				s.End(ended)
			}()
			ended = serve(w, r.WithContext(ctx), s, d.stands)
		})
	})
}

// auditPrefix begins the keys of the annotations that a stream leaves in the
// audit log: what was run, and what came of it. Never what was sent, and
// nothing of a target's environment.
const auditPrefix = v1.GroupName + "/"

// The annotations of a session's beginning and of its end.
const (
	sessionAnnotation = auditPrefix + "session"
	causeAnnotation   = auditPrefix + "cause"
)

// maxAuditValue bounds what a client can make the audit log grow by, in bytes.
const maxAuditValue = 4 << 10

// auditCommand records a command as JSON.
func auditCommand(ctx context.Context, command []string) {
	text, err := json.Marshal(command)
	if err != nil {
		return // strings can always be encoded
	}
	audit.AddAuditAnnotation(ctx, auditPrefix+"command", cut(string(text)))
}

func causeOf(err error) string {
	if err == nil {
		return "done"
	}
	return cut(err.Error())
}

func cut(text string) string {
	if len(text) <= maxAuditValue {
		return text
	}
	return strings.ToValidUTF8(text[:maxAuditValue], "") + "…"
}

var errPanicked = driver.Errorf(driver.Internal, "the handler panicked")

// protocolOf names the transport that a request asks for, for the session's
// record.
func protocolOf(r *http.Request) string {
	switch upgrade := r.Header.Get("Upgrade"); {
	case strings.EqualFold(upgrade, "websocket"):
		return session.ProtocolWebSocket
	case strings.HasPrefix(strings.ToUpper(upgrade), "SPDY/"):
		return session.ProtocolSPDY
	}
	return session.ProtocolHTTP
}

// open reaches an instance through its driver.
func (c *connector) open(ctx context.Context, to *access, instance string) (_ driver.Conn, err error) {
	defer func() { c.tell(to.target, err) }()
	d, err := c.opts.Drivers(to.target)
	if err != nil {
		return nil, err
	}
	request := driver.Request{Target: to.target, Instance: instance, Dial: c.opts.Dial}
	if !to.target.Spec.Hosted() {
		request.Dial = c.dialer(to.target)
	}
	if ssh := to.target.Spec.SSH; ssh != nil {
		// Read for each connection, and kept no longer.
		if request.Secret, err = c.opts.Secrets(ctx, to.target.Namespace, ssh.CredentialsSecretRef.Name); err != nil {
			return nil, driver.Errorf(driver.Unavailable, "the server can't read the Secret %q that the target refers to: %w", ssh.CredentialsSecretRef.Name, err)
		}
	}
	return d.Open(ctx, request)
}

// dialer returns how a driver reaches endpoints, which whoever wrote the target
// chose: as the target's class allows at the time.
func (c *connector) dialer(target *v1.Target) driver.DialFunc {
	return func(ctx context.Context, network, address string) (net.Conn, error) {
		class, err := policy.Governing(ctx, c.opts.Classes, target.Spec.ClassName)
		if err != nil {
			return nil, err
		}
		services, err := c.services()
		if err != nil {
			return nil, err
		}
		return policy.NewDialer(policy.NewAddresses(class, services), policy.DialerOptions{}).DialContext(ctx, network, address)
	}
}

// services are the cluster's service ranges.
func (c *connector) services() ([]netip.Prefix, error) {
	services, err := c.opts.ServiceRanges()
	if err != nil {
		return nil, driver.Errorf(driver.Unavailable, "which addresses are the cluster's services isn't known yet: %w", err)
	}
	return services, nil
}

// ability finds what a connection can do beyond being closed. It is the one
// place where abilities are asserted.
func ability[T any](conn driver.Conn, target *v1.Target, subresource string) (T, error) {
	able, ok := conn.(T)
	if !ok {
		return able, driver.Errorf(driver.Unsupported, "a target of source %s has no %s", target.Spec.Source(), subresource)
	}
	return able, nil
}

// statusError maps a driver's or the policy's error to the status that the client gets. Others
// pass as they are.
func statusError(err error) error {
	if err == nil {
		return nil
	}
	if denied, ok := errors.AsType[*policy.DeniedError](err); ok {
		return &apierrors.StatusError{ErrStatus: metav1.Status{
			Status:  metav1.StatusFailure,
			Code:    http.StatusForbidden,
			Reason:  metav1.StatusReasonForbidden,
			Message: denied.Error(),
		}}
	}
	switch driver.KindOf(err) {
	case driver.Invalid, driver.Unsupported:
		return apierrors.NewBadRequest(err.Error())
	case driver.NotFound:
		return notFound(err.Error())
	case driver.NotRunning:
		return &apierrors.StatusError{ErrStatus: metav1.Status{
			Status:  metav1.StatusFailure,
			Code:    http.StatusConflict,
			Reason:  metav1.StatusReasonConflict,
			Message: err.Error(),
		}}
	case driver.Unavailable:
		return apierrors.NewServiceUnavailable(err.Error())
	}
	return err
}

// SessionCode is the result code of a session that ended with err, for
// session.Options: an exit code is no failure of the session, and neither is a
// client that leaves one of the server.
func SessionCode(err error) int {
	var status apierrors.APIStatus
	switch {
	case errors.As(err, new(*streaming.ExitError)), errors.As(err, new(*driver.ExitError)):
		return http.StatusOK
	case errors.Is(err, streaming.ErrClientGone), errors.Is(err, streaming.ErrPeerTimeout):
		return session.StatusClientGone
	case errors.Is(err, streaming.ErrProtocol), errors.Is(err, streaming.ErrSetupTimeout):
		return http.StatusBadRequest
	case errors.As(statusError(err), &status):
		return int(status.Status().Code)
	}
	return 0
}

func notFound(message string) error {
	return &apierrors.StatusError{ErrStatus: metav1.Status{
		Status:  metav1.StatusFailure,
		Code:    http.StatusNotFound,
		Reason:  metav1.StatusReasonNotFound,
		Message: message,
	}}
}

// badOptions makes one 400 of what is wrong with a query. The options are no
// object that a user wrote, so that 422 wouldn't fit.
func badOptions(errs field.ErrorList) error {
	if len(errs) == 0 {
		return nil
	}
	return apierrors.NewBadRequest(errs.ToAggregate().Error())
}
