// +k8s:deepcopy-gen=package
// +groupName=streaming.aaserver.io

// Package streaming is the hub of the streaming.aaserver.io API: what every
// served version converts to and from, and what registries and admission see.
// The fields are documented in the served versions.
package streaming
