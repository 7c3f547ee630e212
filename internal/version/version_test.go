package version

import (
	"runtime"
	"runtime/debug"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestFrom(t *testing.T) {
	vcs := func(revision, modified string) []debug.BuildSetting {
		return []debug.BuildSetting{{Key: "vcs.revision", Value: revision}, {Key: "vcs.modified", Value: modified}}
	}
	tests := map[string]struct {
		linked string
		build  *debug.BuildInfo
		want   Info
	}{
		"the linked version wins over the module's": {
			linked: "v1.2.3",
			build:  &debug.BuildInfo{Main: debug.Module{Version: "v0.0.1"}, Settings: vcs("abc", "false")},
			want:   Info{Version: "v1.2.3", Commit: "abc"},
		},
		"the module's version is used when none is linked": {
			build: &debug.BuildInfo{Main: debug.Module{Version: "v0.0.1"}},
			want:  Info{Version: "v0.0.1"},
		},
		"a changed checkout says so": {
			build: &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Settings: vcs("abc", "true")},
			want:  Info{Version: "devel", Commit: "abc-dirty"},
		},
		"a binary without build information is a development build": {
			want: Info{Version: "devel"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			test.want.Go = runtime.Version()
			test.want.Platform = runtime.GOOS + "/" + runtime.GOARCH
			if diff := cmp.Diff(test.want, from(test.linked, test.build)); diff != "" {
				t.Errorf("info (-want +got):\n%s", diff)
			}
		})
	}
}
