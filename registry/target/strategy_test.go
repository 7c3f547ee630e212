package target

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"

	api "aaserver.io/aaserver/apis/streaming"
)

// TestUpdatesKeepWhatWasFilledIn is what a client sends that applies its own
// manifest again.
func TestUpdatesKeepWhatWasFilledIn(t *testing.T) {
	old := &api.Target{Spec: api.TargetSpec{ClassName: "standard", AgentName: "local"}}
	old.Generation = 3
	for name, tt := range map[string]struct {
		spec           api.TargetSpec
		want           api.TargetSpec
		wantGeneration int64
	}{
		"what is left out is kept": {
			want:           api.TargetSpec{ClassName: "standard", AgentName: "local"},
			wantGeneration: 3,
		},
		"what is given is taken": {
			spec:           api.TargetSpec{ClassName: "wide", AgentName: "edge"},
			want:           api.TargetSpec{ClassName: "wide", AgentName: "edge"},
			wantGeneration: 4,
		},
	} {
		t.Run(name, func(t *testing.T) {
			target := old.DeepCopy()
			target.Spec = tt.spec
			strategy{}.PrepareForUpdate(context.Background(), target, old)
			if diff := cmp.Diff(tt.want, target.Spec); diff != "" {
				t.Errorf("spec (-want +got):\n%s", diff)
			}
			if target.Generation != tt.wantGeneration {
				t.Errorf("generation %d, want %d", target.Generation, tt.wantGeneration)
			}
		})
	}
}
