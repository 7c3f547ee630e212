// Package defaultclass is the admission plugin that fills in the class of new
// targets that name none.
package defaultclass

import (
	"context"
	"errors"
	"fmt"
	"io"

	"k8s.io/apiserver/pkg/admission"

	"aaserver.io/aaserver/internal/admission/plugin"
	"aaserver.io/aaserver/internal/policy"
)

// PluginName is the plugin's name in --enable-admission-plugins.
const PluginName = "DefaultTargetClass"

// Register adds the plugin.
func Register(plugins *admission.Plugins) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) {
		return &defaultClass{Handler: admission.NewHandler(admission.Create)}, nil
	})
}

type defaultClass struct {
	*admission.Handler
	classes policy.Classes
}

var (
	_ admission.MutationInterface = (*defaultClass)(nil)
	_ plugin.WantsClasses         = (*defaultClass)(nil)
)

// SetClasses implements plugin.WantsClasses.
func (d *defaultClass) SetClasses(classes policy.Classes) { d.classes = classes }

// ValidateInitialization implements admission.InitializationValidator.
func (d *defaultClass) ValidateInitialization() error {
	if d.classes == nil {
		return errors.New("it has nowhere to read TargetClasses")
	}
	return nil
}

// Admit fills in the default class, if there is one. A class that an update
// leaves out isn't its business: the registry keeps the one that the target has.
func (d *defaultClass) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if !plugin.Concerns(a) {
		return nil
	}
	target, _, err := plugin.Objects(a)
	if err != nil || target.Spec.ClassName != "" {
		return err
	}
	name, err := d.classes.DefaultClass(ctx)
	if err != nil {
		return plugin.Unreadable(fmt.Errorf("finding the default class: %w", err))
	}
	target.Spec.ClassName = name
	return nil
}
