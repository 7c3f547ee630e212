// Package validation says which objects of the streaming.aaserver.io API are
// valid. Every error names the field and what is allowed there.
//
// Objects are validated after defaulting and admission. What passes keeps
// these promises to everything that reads a stored target: exactly one source
// is set; a hosted source has its agent, replicas, restart policy and grace
// period; the name of each instance is a DNS label; nothing holds a NUL byte
// that ends up in an argument, an environment or a path; every string is
// UTF-8; and every list and string has a bound.
//
// The rules are the hub's, so that they hold in whatever version an object is
// written. Only what every served version of a kind says by its tags is left to
// declarative validation, which runs on the version of the request: the sizes
// and ranges of TargetClass, which has one version.
//
// An update isn't refused for what was there before: see ratchet.
package validation
