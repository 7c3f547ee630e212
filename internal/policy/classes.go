package policy

import (
	"context"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// Classes finds classes.
type Classes interface {
	// Class returns the class of a name as it is stored now. It fails with a
	// NotFound of the API if there is none. The class isn't the caller's to
	// change.
	Class(ctx context.Context, name string) (*v1.TargetClass, error)
	// DefaultClass returns the name of the class of targets that name none, ""
	// if there is none. That another is the default may show a moment late.
	DefaultClass(ctx context.Context) (string, error)
}

// Governing returns the class that governs a target, by the name that the
// target gives; "" is the default class. That there is no such class is a
// *DeniedError.
func Governing(ctx context.Context, classes Classes, name string) (*v1.TargetClass, error) {
	if name == "" {
		var err error
		switch name, err = classes.DefaultClass(ctx); {
		case err != nil:
			return nil, fmt.Errorf("finding the default class: %w", err)
		case name == "":
			return nil, &DeniedError{reason: fmt.Sprintf("without a TargetClass nothing is allowed: name one in spec.className, or make one the default by the annotation %s: \"true\"", v1.AnnotationDefaultClass)}
		}
	}
	class, err := classes.Class(ctx, name)
	switch {
	case apierrors.IsNotFound(err):
		return nil, deny(name, "does not exist, and without its TargetClass a target is allowed nothing: create the class, or name another in spec.className")
	case err != nil:
		return nil, fmt.Errorf("reading %s: %w", classNamed(name), err)
	}
	return class, nil
}
