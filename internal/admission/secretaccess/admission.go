// Package secretaccess is the admission plugin that lets nobody use a Secret by
// a target who couldn't read it without one.
//
// A target's credentials are sent to its endpoints, and whoever may connect to
// it acts with them. So whoever says which Secret that is, or changes where it
// goes, must be allowed to get it.
package secretaccess

import (
	"context"
	"errors"
	"io"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	api "aaserver.io/aaserver/apis/streaming"
	"aaserver.io/aaserver/internal/admission/plugin"
)

// PluginName is the plugin's name in --enable-admission-plugins.
const PluginName = "TargetSecretAccess"

// Register adds the plugin.
func Register(plugins *admission.Plugins) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) {
		return &secretAccess{Handler: admission.NewHandler(admission.Create, admission.Update)}, nil
	})
}

type secretAccess struct {
	*admission.Handler
	authorizer authorizer.UnconditionalAuthorizer
}

var (
	_ admission.ValidationInterface            = (*secretAccess)(nil)
	_ initializer.WantsUnconditionalAuthorizer = (*secretAccess)(nil)
)

// SetUnconditionalAuthorizer implements
// initializer.WantsUnconditionalAuthorizer.
func (s *secretAccess) SetUnconditionalAuthorizer(a authorizer.UnconditionalAuthorizer) {
	s.authorizer = a
}

// ValidateInitialization implements admission.InitializationValidator.
func (s *secretAccess) ValidateInitialization() error {
	if s.authorizer == nil {
		return errors.New("it has no authorizer to ask")
	}
	return nil
}

// Validate demands the verb get on the Secret that a target refers to.
func (s *secretAccess) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if !plugin.Concerns(a) {
		return nil
	}
	target, old, err := plugin.Objects(a)
	if err != nil {
		return err
	}
	secret := secretOf(target)
	if secret == "" || !plugin.Matters(target, old) {
		return nil
	}
	return plugin.Authorize(ctx, s.authorizer, a, authorizer.AttributesRecord{
		Verb:       "get",
		APIVersion: corev1.SchemeGroupVersion.Version,
		Resource:   "secrets",
		Namespace:  a.GetNamespace(),
		Name:       secret,
	}, "the target sends it to its endpoints, so that whoever creates the target, or changes where it leads, must be allowed to read it; have somebody do it who may, or grant the verb get on it")
}

func secretOf(target *api.Target) string {
	if target.Spec.SSH == nil {
		return ""
	}
	return target.Spec.SSH.CredentialsSecretRef.Name
}
