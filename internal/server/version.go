package server

import (
	"runtime/debug"
	"strings"

	apimachineryversion "k8s.io/apimachinery/pkg/version"
	"k8s.io/apiserver/pkg/util/compatibility"
	basecompatibility "k8s.io/component-base/compatibility"

	"aaserver.io/aaserver/internal/version"
)

// effectiveVersion is the version of Kubernetes that the server is made of.
// The libraries know theirs only in builds that set it when linking, and kubectl
// can't parse what they say otherwise.
type effectiveVersion struct {
	basecompatibility.EffectiveVersion
}

func newEffectiveVersion() basecompatibility.EffectiveVersion {
	return effectiveVersion{compatibility.DefaultBuildEffectiveVersion()}
}

// Info is what /version answers.
func (v effectiveVersion) Info() *apimachineryversion.Info {
	info := *v.EffectiveVersion.Info()
	build := version.Get()
	info.GitVersion = kubernetesVersion(v.BinaryVersion().String()) + "+aaserver"
	info.GitCommit = build.Commit
	info.GitTreeState = ""
	info.BuildDate = ""
	return &info
}

// kubernetesVersion is the release that k8s.io/apiserver belongs to: its module
// has the major version 0 where Kubernetes has 1.
func kubernetesVersion(fallback string) string {
	if build, ok := debug.ReadBuildInfo(); ok {
		for _, dep := range build.Deps {
			if rest, ok := strings.CutPrefix(dep.Version, "v0."); ok && dep.Path == "k8s.io/apiserver" {
				return "v1." + rest
			}
		}
	}
	return "v" + fallback
}
