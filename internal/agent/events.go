package agent

import (
	"context"

	corev1 "k8s.io/api/core/v1"
)

// Reasons of events. They are listed in docs/targets.md.
const (
	eventStarted         = "Started"
	eventStartError      = "StartError"
	eventPortUnavailable = "PortUnavailable"
	eventExited          = "Exited"
	eventBackOff         = "BackOff"
	eventStopping        = "Stopping"
	eventScaled          = "Scaled"
	eventRolloutStarted  = "RolloutStarted"
	eventRolloutStopped  = "RolloutStopped"
	eventRolloutComplete = "RolloutComplete"
	eventImpaired        = "Impaired"
	eventAgentLost       = "AgentLost"
	eventHostError       = "HostError"
)

// Why an instance is stopped.
const (
	whyScaledDown = "the target was scaled down"
	whyReplaced   = "its spec has changed"
	whyDeleted    = "the target is being deleted"
	whyGone       = "the target is gone"
)

// told is what events have told of a target, so that none is repeated at each
// look.
type told struct {
	// replicas is how many instances were wanted; unknown of a new target.
	replicas int
	// rollout is the hash of the spec that is being rolled out, "" if none is;
	// stoppedAt is the instance at which that has stopped.
	rollout, stoppedAt string
}

const unknown = -1

// tell records an event about a target. Messages name the instance, and hold
// nothing that differs each time: the same ones are counted, and those of 256
// instances are combined. The reference names none: `kubectl describe` would put
// that before each message.
func (r *reconciler) tell(h *hosted, kind, reason, format string, args ...any) {
	if r.events != nil && h.target != nil {
		r.events.Eventf(h.target, kind, reason, format, args...)
	}
}

// tellScaled tells that another number of instances is wanted.
func (r *reconciler) tellScaled(h *hosted, replicas int) {
	switch from := h.told.replicas; {
	case from == unknown:
	case from < replicas:
		r.tell(h, corev1.EventTypeNormal, eventScaled, "Scaled up from %d to %d instances", from, replicas)
	case from > replicas:
		r.tell(h, corev1.EventTypeNormal, eventScaled, "Scaled down from %d to %d instances", from, replicas)
	}
	h.told.replicas = replicas
}

// tellExited tells how an instance has ended. What was asked to end is no reason
// to warn, whatever its exit code.
func (r *reconciler) tellExited(h *hosted, i *instance, asked bool) {
	kind := corev1.EventTypeWarning
	if asked || i.ended.ExitCode == 0 {
		kind = corev1.EventTypeNormal
	}
	r.tell(h, kind, eventExited, "Instance %s %s", i.name, how(i.ended))
}

// tellBackoffs tells of each back-off once, as it begins.
func (r *reconciler) tellBackoffs(h *hosted) {
	now := r.clock.Now()
	for _, i := range h.ascending() {
		if !i.startable(h.target.Spec.RestartPolicy) || !i.retryAt.After(now) || i.retryAt.Equal(i.told) {
			continue
		}
		i.told = i.retryAt
		why := how(i.ended)
		if i.ended.Reason == reasonStartError {
			why = "it couldn't be started" // another event tells the rest
		}
		r.tell(h, corev1.EventTypeWarning, eventBackOff, "Back-off %s before instance %s is started again: %s", i.delay, i.name, why)
	}
}

// tellRollout tells that instances have to be replaced, and if that can't go on.
func (r *reconciler) tellRollout(h *hosted, hash string) {
	if h.told.rollout != hash {
		h.told.rollout, h.told.stoppedAt = hash, ""
		r.tell(h, corev1.EventTypeNormal, eventRolloutStarted, "Instances to be replaced by the present spec, one at a time: %d", len(h.rollout.outdated))
	}
	if broken := h.rollout.stoppedAt; broken != nil && h.told.stoppedAt != broken.name {
		h.told.stoppedAt = broken.name
		r.tell(h, corev1.EventTypeWarning, eventRolloutStopped, "%s", h.progressingCondition().Message)
	}
}

// tellRolledOut tells that the last instance was replaced.
func (r *reconciler) tellRolledOut(h *hosted) {
	if h.told.rollout == "" || len(h.rollout.outdated) > 0 {
		return
	}
	for _, i := range h.instances {
		if !i.removing && (i.pending || i.run == nil && i.ended.ExitCode != 0) {
			return
		}
	}
	h.told.rollout = ""
	r.tell(h, corev1.EventTypeNormal, eventRolloutComplete, "Every instance is of the present spec")
}

// hostError tells that a host doesn't do what is asked of it. The error is
// returned.
func (r *reconciler) hostError(ctx context.Context, h *hosted, err error) error {
	if ctx.Err() == nil {
		r.tell(h, corev1.EventTypeWarning, eventHostError, "Agent %s: %s", r.name, bounded(err.Error()))
	}
	return err
}
