package driver

import (
	"errors"
	"fmt"
)

// Kind says whose problem an error is. The registry maps each to an HTTP
// status.
type Kind int

const (
	// Internal is an error that no driver foresaw.
	Internal Kind = iota
	// Invalid: what was asked for can't be done; asking again won't help.
	Invalid
	// NotFound: there is no such instance, or no such log.
	NotFound
	// NotRunning: the instance exists, but doesn't run at the moment.
	NotRunning
	// Unavailable: the instance or what it is reached through doesn't answer.
	Unavailable
	// Unsupported: the source doesn't have the ability.
	Unsupported
)

// Error is an error with a kind. Its text tells the user what is wrong and, if
// they can do anything about it, what.
type Error struct {
	Kind Kind
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an error of a kind; %w wraps as in fmt.Errorf.
func Errorf(kind Kind, format string, args ...any) error {
	return &Error{Kind: kind, Err: fmt.Errorf(format, args...)}
}

// KindOf returns an error's kind, Internal if it has none.
func KindOf(err error) Kind {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Kind
	}
	return Internal
}

// ExitError is how a Run reports an exit code other than 0.
type ExitError struct {
	// Code is the exit code; 128 plus the signal's number if a signal ended
	// the command.
	Code int
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("command terminated with exit code %d", e.Code)
}
