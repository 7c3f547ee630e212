// Package version says which build this is.
package version

import (
	"runtime"
	"runtime/debug"
)

// version is the released version, set when linking:
//
//	-ldflags "-X aaserver.io/aaserver/internal/version.version=v1.2.3"
var version string

// Info describes a build.
type Info struct {
	// Version is the released version, the module's version if it was built
	// as a dependency or by go install, or "devel".
	Version string `json:"version"`
	// Commit is the revision that it was built from, with "-dirty" if there
	// were changes; empty if the build had no repository.
	Commit string `json:"commit,omitempty"`
	// Go is the version of the toolchain.
	Go string `json:"go"`
	// Platform is the operating system and the architecture.
	Platform string `json:"platform"`
}

// Get returns what this binary knows about its build.
func Get() Info {
	build, _ := debug.ReadBuildInfo()
	return from(version, build)
}

func from(linked string, build *debug.BuildInfo) Info {
	info := Info{
		Version:  linked,
		Go:       runtime.Version(),
		Platform: runtime.GOOS + "/" + runtime.GOARCH,
	}
	if build == nil {
		build = &debug.BuildInfo{}
	}
	dirty := false
	for _, s := range build.Settings {
		switch s.Key {
		case "vcs.revision":
			info.Commit = s.Value
		case "vcs.modified":
			dirty = s.Value == "true"
		}
	}
	if dirty && info.Commit != "" {
		info.Commit += "-dirty"
	}
	if info.Version == "" {
		info.Version = build.Main.Version
	}
	if info.Version == "" || info.Version == "(devel)" {
		info.Version = "devel"
	}
	return info
}
