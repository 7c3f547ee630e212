// Package classpolicy is the admission plugin that holds targets to their
// class: when they are created or changed, and whenever somebody connects.
package classpolicy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/client-go/tools/record"

	api "aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
	"aaserver.io/aaserver/internal/admission/plugin"
	"aaserver.io/aaserver/internal/policy"
)

// PluginName is the plugin's name in --enable-admission-plugins.
const PluginName = "TargetClassPolicy"

// Register adds the plugin.
func Register(plugins *admission.Plugins) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) {
		return &classPolicy{Handler: admission.NewHandler(admission.Create, admission.Update, admission.Connect)}, nil
	})
}

type classPolicy struct {
	*admission.Handler
	classes    policy.Classes
	targets    plugin.Targets
	services   func() ([]netip.Prefix, error)
	authorizer authorizer.UnconditionalAuthorizer
	recorder   record.EventRecorder
}

var (
	_ admission.ValidationInterface            = (*classPolicy)(nil)
	_ plugin.WantsClasses                      = (*classPolicy)(nil)
	_ plugin.WantsTargets                      = (*classPolicy)(nil)
	_ plugin.WantsServices                     = (*classPolicy)(nil)
	_ plugin.WantsRecorder                     = (*classPolicy)(nil)
	_ initializer.WantsUnconditionalAuthorizer = (*classPolicy)(nil)
)

// SetClasses implements plugin.WantsClasses.
func (p *classPolicy) SetClasses(classes policy.Classes) { p.classes = classes }

// SetTargets implements plugin.WantsTargets.
func (p *classPolicy) SetTargets(targets plugin.Targets) { p.targets = targets }

// SetServices implements plugin.WantsServices.
func (p *classPolicy) SetServices(services func() ([]netip.Prefix, error)) { p.services = services }

// SetRecorder implements plugin.WantsRecorder.
func (p *classPolicy) SetRecorder(recorder record.EventRecorder) { p.recorder = recorder }

// SetUnconditionalAuthorizer implements
// initializer.WantsUnconditionalAuthorizer.
func (p *classPolicy) SetUnconditionalAuthorizer(a authorizer.UnconditionalAuthorizer) {
	p.authorizer = a
}

// ValidateInitialization implements admission.InitializationValidator.
func (p *classPolicy) ValidateInitialization() error {
	switch {
	case p.classes == nil:
		return errors.New("it has nowhere to read TargetClasses")
	case p.targets == nil:
		return errors.New("it has nowhere to read targets")
	case p.services == nil:
		return errors.New("it has nowhere to learn the cluster's service ranges")
	case p.authorizer == nil:
		return errors.New("it has no authorizer to ask")
	case p.recorder == nil:
		return errors.New("it has nowhere to tell of what it refuses")
	}
	return nil
}

// Validate implements admission.ValidationInterface.
func (p *classPolicy) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	switch {
	case !plugin.Concerns(a):
		return nil
	case a.GetOperation() == admission.Connect:
		return p.connect(ctx, a)
	}
	return p.write(ctx, a)
}

// write judges a target that is created or changed. What was wrong before and
// is as it was isn't refused, but whoever changes a target must be allowed to
// use its class, even if it was somebody else who named it.
func (p *classPolicy) write(ctx context.Context, a admission.Attributes) error {
	hub, oldHub, err := plugin.Objects(a)
	if err != nil || !plugin.Matters(hub, oldHub) {
		return err
	}
	target, err := toV1(hub)
	if err != nil {
		return err
	}
	var old *v1.Target
	if oldHub != nil {
		if old, err = toV1(oldHub); err != nil {
			return err
		}
	}
	name := target.Spec.ClassName
	if name == "" {
		if name, err = p.classes.DefaultClass(ctx); err != nil {
			return plugin.Unreadable(fmt.Errorf("finding the default class: %w", err))
		}
	}
	// First: who may not use a class isn't told whether there is one.
	if name != "" {
		if err := plugin.Authorize(ctx, p.authorizer, a, authorizer.AttributesRecord{
			Verb:       "use",
			APIGroup:   v1.GroupName,
			APIVersion: v1.SchemeGroupVersion.Version,
			Resource:   "targetclasses",
			Name:       name,
		}, "name a class in spec.className that you may use, or have the verb use on this one granted to you"); err != nil {
			return err
		}
	}
	class, err := p.classOf(ctx, a, name)
	if err != nil {
		return err
	}
	return p.check(a, class, target, old)
}

// connect judges a connection by the class as it is now. Which of the target's
// ports may be forwarded is asked for each port by itself: one that the class
// doesn't open any more is no reason to refuse another, or a log.
func (p *classPolicy) connect(ctx context.Context, a admission.Attributes) error {
	found, err := p.targets.Target(ctx, a.GetNamespace(), a.GetName())
	switch {
	case apierrors.IsNotFound(err):
		return nil // the registry says so
	case err != nil:
		return plugin.Unreadable(fmt.Errorf("reading the target: %w", err))
	}
	err = p.judge(ctx, a, found)
	if apierrors.IsForbidden(err) {
		p.recorder.Eventf(found, corev1.EventTypeWarning, v1.EventClassDenied, "Refused %s: %s", a.GetSubresource(), err)
	}
	return err
}

func (p *classPolicy) judge(ctx context.Context, a admission.Attributes, found *v1.Target) error {
	class, err := p.classOf(ctx, a, found.Spec.ClassName)
	if err != nil {
		return err
	}
	target := *found
	target.Spec.Ports = nil
	if err := p.check(a, class, &target, nil); err != nil {
		return err
	}
	opts, ok := a.GetObject().(*v1.TargetPortForwardOptions)
	if !ok {
		return nil
	}
	for i, port := range opts.Ports {
		if port < 1 || port > 65535 {
			continue // the registry says what is wrong with it
		}
		// By which protocol is known with the connection.
		if err := policy.AllowPortNumber(class, found, uint16(port)); err != nil {
			refused := plugin.Forbidden(a, err.Error())
			if status, ok := errors.AsType[*apierrors.StatusError](refused); ok && status.ErrStatus.Details != nil {
				status.ErrStatus.Details.Causes = []metav1.StatusCause{policy.RefusedPort(i)}
			}
			return refused
		}
	}
	return nil
}

// classOf returns the class that governs a target that names one, or "" for the
// default. Without one, nothing goes.
func (p *classPolicy) classOf(ctx context.Context, a admission.Attributes, name string) (*v1.TargetClass, error) {
	class, err := policy.Governing(ctx, p.classes, name)
	if denied, ok := errors.AsType[*policy.DeniedError](err); ok {
		return nil, plugin.Forbidden(a, denied.Error())
	}
	if err != nil {
		return nil, plugin.Unreadable(err)
	}
	return class, nil
}

// check refuses a request if the class doesn't allow the target, in one message
// that lists what is wrong. Of an update, that is what wasn't wrong before.
func (p *classPolicy) check(a admission.Attributes, class *v1.TargetClass, target, old *v1.Target) error {
	opts := policy.CheckOptions{Old: old}
	if !target.Spec.Hosted() {
		var err error
		if opts.Services, err = p.services(); err != nil {
			return apierrors.NewServiceUnavailable(fmt.Sprintf("which addresses are the cluster's services isn't known yet: %v", err))
		}
	}
	errs := policy.Check(class, target, opts)
	if len(errs) == 0 {
		return nil
	}
	var reasons []string
	for _, err := range errs {
		reasons = append(reasons, err.Field+": "+err.Detail)
	}
	return plugin.Forbidden(a, reasons...)
}

func toV1(hub *api.Target) (*v1.Target, error) {
	target := &v1.Target{}
	if err := v1.Convert_streaming_Target_To_v1_Target(hub, target, nil); err != nil {
		return nil, apierrors.NewInternalError(err)
	}
	return target, nil
}
