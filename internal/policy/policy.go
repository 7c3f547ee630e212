// Package policy says what a TargetClass allows. Everything in it is a pure
// function of the class and of what is asked, except Dialer, which connects to
// nothing but what a class allows.
//
// What isn't allowed is refused: a class that is missing allows nothing, and
// so does what can't be understood in one, because a class that was stored by
// an older server may be one that validation would refuse today.
package policy

import (
	"fmt"
	"math"
	"strings"
	"time"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// DeniedError says that a class doesn't allow something. Its text is for the
// user: it names the class and says what it allows.
type DeniedError struct {
	// Class is the class's name, "" if there is none.
	Class  string
	reason string
}

func (e *DeniedError) Error() string { return e.reason }

func deny(class, format string, args ...any) *DeniedError {
	return &DeniedError{
		Class:  class,
		reason: clip(classNamed(class)+" "+fmt.Sprintf(format, args...), maxMessageBytes),
	}
}

var errNoClass = &DeniedError{reason: "without a TargetClass nothing is allowed"}

// DefaultClass returns the class of targets that name none: of the classes
// that are annotated as default the one that was created last, and of those
// the first by name. It is nil if there is none.
func DefaultClass(classes []*v1.TargetClass) *v1.TargetClass {
	var found *v1.TargetClass
	for _, class := range classes {
		if class == nil || class.Annotations[v1.AnnotationDefaultClass] != "true" {
			continue
		}
		if found == nil || found.CreationTimestamp.Before(&class.CreationTimestamp) ||
			found.CreationTimestamp.Equal(&class.CreationTimestamp) && class.Name < found.Name {
			found = class
		}
	}
	return found
}

// Limits bound the sessions on targets of a class, on each replica of the
// server for itself. 0 is no limit.
type Limits struct {
	SessionsPerUser   int
	SessionsPerTarget int
	// IdleTimeout is how long a session other than a log may go without a byte
	// either way.
	IdleTimeout time.Duration
	// MaxDuration is how long a session may last.
	MaxDuration time.Duration
}

// LimitsOf returns the limits of a class, and the server's defaults for those
// that it doesn't give. A limit below the least that the API knows is that
// least: it must not become none.
func LimitsOf(class *v1.TargetClass, defaults Limits) Limits {
	limits := defaults
	if class == nil {
		return limits
	}
	given := &class.Spec.Limits
	if given.SessionsPerUser != nil {
		limits.SessionsPerUser = int(max(1, *given.SessionsPerUser))
	}
	if given.SessionsPerTarget != nil {
		limits.SessionsPerTarget = int(max(1, *given.SessionsPerTarget))
	}
	if given.IdleTimeoutSeconds != nil {
		limits.IdleTimeout = seconds(*given.IdleTimeoutSeconds)
	}
	if given.MaxDurationSeconds != nil {
		limits.MaxDuration = seconds(*given.MaxDurationSeconds)
	}
	return limits
}

// seconds keeps within what a Duration can hold, some 292 years.
func seconds(n int64) time.Duration {
	return time.Duration(min(max(1, n), math.MaxInt64/int64(time.Second))) * time.Second
}

const (
	// maxMessageBytes bounds messages: a refused upgrade has to tell its
	// reason in a Status of 1 KiB. Of that, quotation marks take more.
	maxMessageBytes = 640
	// maxListBytes and maxItemBytes bound the lists in them.
	maxListBytes = 200
	maxItemBytes = 80
	// maxNameBytes is the longest that a name of the API may be.
	maxNameBytes = 253
)

func classNamed(name string) string {
	return fmt.Sprintf("class %q", clip(name, maxNameBytes))
}

// list names as many items as a message has room for.
func list(items []string) string {
	if len(items) == 0 {
		return "none"
	}
	var b strings.Builder
	for i, item := range items {
		item = clip(item, maxItemBytes)
		if i > 0 && b.Len()+len(item) > maxListBytes {
			fmt.Fprintf(&b, " and %d more", len(items)-i)
			break
		}
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(item)
	}
	return b.String()
}

// clip cuts what is too long, and leaves valid UTF-8.
func clip(s string, length int) string {
	if len(s) <= length {
		return s
	}
	return strings.ToValidUTF8(s[:length], "") + "…"
}
