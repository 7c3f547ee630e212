package validation

import (
	"math"
	"time"

	"k8s.io/apimachinery/pkg/api/validate/content"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/validation/field"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

const (
	// maxSinceSeconds is the longest time.Duration.
	maxSinceSeconds = math.MaxInt64 / int64(time.Second)

	maxForwardedPorts = 128
)

var logStreams = []v1.LogStream{v1.LogStreamAll, v1.LogStreamStdout, v1.LogStreamStderr}

// ValidateTargetLogOptions validates the query of targets/log, with or without
// its defaults.
func ValidateTargetLogOptions(options *v1.TargetLogOptions) field.ErrorList {
	errs := validateInstance(options.Instance)
	if options.AllInstances && options.Instance != "" {
		errs = append(errs, field.Forbidden(field.NewPath("allInstances"), "may not be set with `instance`"))
	}

	var since []string
	if options.SinceSeconds != nil {
		since = append(since, "sinceSeconds")
		errs = append(errs, validateRange(field.NewPath("sinceSeconds"), options.SinceSeconds, 1, maxSinceSeconds)...)
	}
	if options.SinceTime != nil {
		since = append(since, "sinceTime")
	}
	if options.ResumeAfter != "" {
		since = append(since, "resumeAfter")
		errs = append(errs, validateResumeAfter(options)...)
	}
	if len(since) > 1 {
		errs = append(errs, field.Forbidden(field.NewPath(since[len(since)-1]), "at most one of `sinceSeconds`, `sinceTime` and `resumeAfter` may be set"))
	}

	if n := options.TailLines; n != nil && *n < 0 {
		errs = append(errs, field.Invalid(field.NewPath("tailLines"), *n, content.MinError(0)))
	}
	if n := options.LimitBytes; n != nil && *n < 1 {
		errs = append(errs, field.Invalid(field.NewPath("limitBytes"), *n, content.MinError(1)))
	}
	if options.Stream != "" {
		errs = append(errs, validateEnum(field.NewPath("stream"), options.Stream, logStreams)...)
	}
	return errs
}

// validateResumeAfter says with what else the cursor can't be combined: it is
// one instance's, and continues where the client was, whatever the run.
func validateResumeAfter(options *v1.TargetLogOptions) field.ErrorList {
	var errs field.ErrorList
	p := field.NewPath("resumeAfter")
	errs = append(errs, validateFormat(p, options.ResumeAfter, maxShownBytes, isRFC3339)...)
	switch {
	case options.AllInstances:
		errs = append(errs, field.Forbidden(p, "may not be set with `allInstances`: each instance has times of its own"))
	case options.Instance == "":
		errs = append(errs, field.Required(field.NewPath("instance"), "must be set with `resumeAfter`"))
	}
	if options.Previous {
		errs = append(errs, field.Forbidden(p, "may not be set with `previous`: it reads on through all runs"))
	}
	if options.TailLines != nil {
		errs = append(errs, field.Forbidden(p, "may not be set with `tailLines`"))
	}
	return errs
}

// ValidateTargetExecOptions validates the query of targets/exec after
// defaulting.
func ValidateTargetExecOptions(options *v1.TargetExecOptions) field.ErrorList {
	errs := validateInstance(options.Instance)
	errs = append(errs, validateStreams(options.Stdin, options.Stdout, options.Stderr, options.TTY)...)
	errs = append(errs, validateCommand(options.Command, field.NewPath("command"))...)
	return append(errs, validateCommandSize(nil, options.Command, nil, nil)...)
}

// ValidateTargetAttachOptions validates the query of targets/attach after
// defaulting.
func ValidateTargetAttachOptions(options *v1.TargetAttachOptions) field.ErrorList {
	errs := validateInstance(options.Instance)
	if options.Replay < 0 {
		errs = append(errs, field.Invalid(field.NewPath("replay"), options.Replay, content.MinError(0)))
	}
	if options.CloseStdin && !options.Stdin {
		errs = append(errs, field.Required(field.NewPath("stdin"), "must be set with `closeStdin`"))
	}
	return append(errs, validateStreams(options.Stdin, options.Stdout, options.Stderr, options.TTY)...)
}

// ValidateTargetPortForwardOptions validates the query of targets/portforward.
// It reports no more than the first bad port: clients lose an answer of more
// than 1 KiB to an upgrade.
func ValidateTargetPortForwardOptions(options *v1.TargetPortForwardOptions) field.ErrorList {
	errs := validateInstance(options.Instance)
	p := field.NewPath("ports")
	if len(options.Ports) > maxForwardedPorts {
		return append(errs, field.TooMany(p, len(options.Ports), maxForwardedPorts))
	}
	seen := sets.New[int32]()
	for i, port := range options.Ports {
		portErrs := validatePort(p.Index(i), port)
		if seen.Has(port) {
			portErrs = append(portErrs, field.Duplicate(p.Index(i), port))
		}
		if len(portErrs) > 0 {
			return append(errs, portErrs...)
		}
		seen.Insert(port)
	}
	return errs
}

func validateInstance(instance string) field.ErrorList {
	if instance == "" {
		return nil
	}
	return validateFormat(field.NewPath("instance"), instance, maxDNSLabelBytes, content.IsDNS1123Label)
}

func validateStreams(stdin, stdout, stderr, tty bool) field.ErrorList {
	var errs field.ErrorList
	if !stdin && !stdout && !stderr {
		errs = append(errs, field.Required(field.NewPath("stdout"), "must specify at least one of: `stdin`, `stdout`, `stderr`"))
	}
	if tty && stderr {
		errs = append(errs, field.Forbidden(field.NewPath("stderr"), "may not be set with `tty`: a terminal has no standard error of its own"))
	}
	return errs
}

func isRFC3339(value string) []string {
	if _, err := time.Parse(time.RFC3339Nano, value); err != nil {
		return []string{"must be an RFC 3339 time, such as 2006-01-02T15:04:05.999999999Z"}
	}
	return nil
}
