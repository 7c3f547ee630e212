package agent

import (
	"context"
	"fmt"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-base/metrics"
	"k8s.io/klog/v2"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// fieldManager owns what the agent writes.
const fieldManager = "aaserver-agent"

// Reasons of the conditions.
const (
	// Ready
	reasonAllInstancesReady = "AllInstancesReady"
	reasonInstancesNotReady = "InstancesNotReady"
	reasonNoReplicas        = "NoReplicas"
	// Progressing
	reasonUpToDate       = "UpToDate"
	reasonStarting       = "StartingInstances"
	reasonStopping       = "StoppingInstances"
	reasonReplacing      = "ReplacingInstances"
	reasonRolloutStopped = "RolloutStopped"
	// Ready and Progressing
	reasonDeleting = "Deleting"
	// AgentConnected
	reasonConnected = "Connected"
)

// maxProblems is how many instances a condition's message tells about.
const maxProblems = 3

// report writes the status, if it says anything new.
func (r *reconciler) report(ctx context.Context, h *hosted) error {
	if !h.observed {
		return nil
	}
	status := h.status(r.name, metav1.NewTime(r.clock.Now()))
	if equality.Semantic.DeepEqual(status, &h.target.Status) {
		return nil
	}
	target := h.target.DeepCopy()
	target.Status = *status
	written, err := r.client.Targets(h.key.Namespace).UpdateStatus(ctx, target, metav1.UpdateOptions{FieldManager: fieldManager})
	switch {
	case apierrors.IsNotFound(err):
		return nil // the informer will tell
	case err != nil:
		return fmt.Errorf("writing the status: %w", err)
	}
	klog.FromContext(ctx).V(4).Info("Status written", "ready", status.ReadyReplicas, "replicas", status.Replicas)
	h.target, h.written = written, r.clock.Now()
	return nil
}

// status says how the target is.
func (h *hosted) status(agent string, now metav1.Time) *v1.TargetStatus {
	status := h.target.Status.DeepCopy()
	status.ObservedGeneration = h.target.Generation
	status.Replicas, status.ReadyReplicas = 0, 0
	status.Instances = nil
	for _, i := range h.ascending() {
		instance := i.status(h)
		status.Instances = append(status.Instances, instance)
		status.Replicas++
		if instance.Ready {
			status.ReadyReplicas++
		}
	}
	for _, condition := range []metav1.Condition{
		h.readyCondition(status.Instances),
		h.progressingCondition(),
		{
			Type: v1.ConditionAgentConnected, Status: metav1.ConditionTrue, Reason: reasonConnected,
			Message: fmt.Sprintf("agent %s runs the instances", agent),
		},
	} {
		condition.ObservedGeneration = h.target.Generation
		condition.LastTransitionTime = now.Rfc3339Copy()
		meta.SetStatusCondition(&status.Conditions, condition)
	}
	return status
}

func (i *instance) status(h *hosted) v1.InstanceStatus {
	status := v1.InstanceStatus{
		Name:         i.name,
		Ready:        i.run != nil && i.stopBy.IsZero(),
		RestartCount: i.restarts,
		Ports:        i.ports,
	}
	status.LastState.Terminated = forStatus(i.ended)
	switch {
	case i.run != nil:
		status.State.Running = &v1.InstanceStateRunning{StartedAt: i.run.StartedAt.Rfc3339Copy()}
	case i.ended != nil && !i.pending && !i.startable(h.target.Spec.RestartPolicy):
		status.State.Terminated = forStatus(i.ended)
		status.LastState.Terminated = forStatus(i.before)
	default:
		status.State.Waiting = i.waiting(h)
	}
	return status
}

func (i *instance) waiting(h *hosted) *v1.InstanceStateWaiting {
	switch {
	case i.pending && h.waits:
		return &v1.InstanceStateWaiting{Reason: reasonPending, Message: "instances of the deleted target of this name haven't ended yet"}
	case i.pending || i.ended == nil || i.delay == 0:
		return &v1.InstanceStateWaiting{Reason: reasonPending}
	case i.ended.Reason == reasonStartError:
		return &v1.InstanceStateWaiting{
			Reason:  reasonStartError,
			Message: fmt.Sprintf("%s (back-off %s)", how(i.ended), i.delay),
		}
	}
	return &v1.InstanceStateWaiting{
		Reason:  reasonBackoff,
		Message: fmt.Sprintf("back-off %s: %s", i.delay, how(i.ended)),
	}
}

// forStatus makes the times what they are once they have been to the server:
// otherwise, the status would seem to differ each time. And it bounds what a
// host says, as the server does.
func forStatus(ended *v1.InstanceStateTerminated) *v1.InstanceStateTerminated {
	if ended == nil {
		return nil
	}
	ended = ended.DeepCopy()
	ended.Message = bounded(ended.Message)
	ended.StartedAt = ended.StartedAt.Rfc3339Copy()
	ended.FinishedAt = ended.FinishedAt.Rfc3339Copy()
	return ended
}

// readyCondition is True when every wanted instance is ready. Its message also
// tells what is wrong with instances that run on regardless, such as a log
// that can't be written: a person looks there first.
func (h *hosted) readyCondition(instances []v1.InstanceStatus) metav1.Condition {
	condition := metav1.Condition{Type: v1.ConditionReady, Status: metav1.ConditionFalse}
	if h.target.DeletionTimestamp != nil {
		condition.Reason = reasonDeleting
		condition.Message = fmt.Sprintf("the target is being deleted; instances that haven't ended: %d", len(instances))
		return condition
	}
	want := len(h.target.InstanceNames())
	if want == 0 {
		condition.Status, condition.Reason = metav1.ConditionTrue, reasonNoReplicas
		condition.Message = "no instances are wanted"
		return condition
	}
	// The worst first: what can't be started, what crashes, what has ended,
	// what is only on its way; then what runs with something wrong.
	var problems [5][]string
	ready := 0
	for n, i := range h.ascending() {
		if i.ordinal >= want {
			continue
		}
		state := instances[n].State
		switch {
		case instances[n].Ready:
			ready++
			if i.message != "" {
				problems[4] = append(problems[4], i.name+": "+bounded(i.message))
			}
		case state.Waiting != nil && state.Waiting.Reason == reasonStartError:
			problems[0] = append(problems[0], i.name+": "+state.Waiting.Message)
		case state.Waiting != nil && state.Waiting.Reason == reasonBackoff:
			problems[1] = append(problems[1], i.name+": "+state.Waiting.Message)
		case state.Terminated != nil && state.Terminated.ExitCode != 0:
			problems[1] = append(problems[1], i.name+" has ended: "+how(state.Terminated))
		case state.Terminated != nil:
			problems[2] = append(problems[2], i.name+" has completed")
		case state.Running != nil:
			problems[3] = append(problems[3], i.name+" is stopping")
		case state.Waiting != nil && state.Waiting.Message != "":
			problems[3] = append(problems[3], i.name+": "+state.Waiting.Message)
		default:
			problems[3] = append(problems[3], i.name+" hasn't started")
		}
	}
	condition.Reason = reasonInstancesNotReady
	if ready == want {
		condition.Status, condition.Reason = metav1.ConditionTrue, reasonAllInstancesReady
	}
	parts := []string{fmt.Sprintf("%d of %d instances are ready", ready, want)}
	more := 0
	for _, kind := range problems {
		for _, problem := range kind {
			if len(parts) > maxProblems {
				more++
				continue
			}
			parts = append(parts, problem)
		}
	}
	if more > 0 {
		parts = append(parts, fmt.Sprintf("and %d more", more))
	}
	condition.Message = strings.Join(parts, "; ")
	return condition
}

func (h *hosted) progressingCondition() metav1.Condition {
	condition := metav1.Condition{Type: v1.ConditionProgressing, Status: metav1.ConditionTrue}
	var pending, removing int
	for _, i := range h.instances {
		switch {
		case i.removing:
			removing++
		case i.pending:
			pending++
		}
	}
	outdated, broken := h.rollout.outdated, h.rollout.stoppedAt
	switch {
	case h.target.DeletionTimestamp != nil:
		condition.Reason = reasonDeleting
		condition.Message = "the instances are being stopped"
	case broken != nil:
		condition.Status, condition.Reason = metav1.ConditionFalse, reasonRolloutStopped
		condition.Message = fmt.Sprintf("the rollout stopped at %s (%s); instances still on an earlier spec: %d; "+
			"correct the spec to go on", broken.name, how(broken.ended), len(outdated))
	case len(outdated) > 0:
		condition.Reason = reasonReplacing
		condition.Message = fmt.Sprintf("instances still on an earlier spec: %d; next is %s", len(outdated), outdated[0].name)
	case removing > 0:
		condition.Reason = reasonStopping
		condition.Message = fmt.Sprintf("instances to be stopped: %d", removing)
	case pending > 0:
		condition.Reason = reasonStarting
		condition.Message = fmt.Sprintf("instances to be started: %d", pending)
	default:
		condition.Status, condition.Reason = metav1.ConditionFalse, reasonUpToDate
		condition.Message = "every instance is of the present spec"
	}
	return condition
}

// agentMetrics are values of an Agent, not of the package: a process may have
// several, as tests do.
type agentMetrics struct {
	starts   *metrics.CounterVec
	syncs    *metrics.CounterVec
	syncTime *metrics.Histogram
}

func newMetrics() *agentMetrics {
	return &agentMetrics{
		starts: metrics.NewCounterVec(&metrics.CounterOpts{
			Name:           "aaserver_agent_instance_starts_total",
			Help:           "Starts of instances, restarts included, by source and result.",
			StabilityLevel: metrics.ALPHA,
		}, []string{"source", "result"}),
		syncs: metrics.NewCounterVec(&metrics.CounterOpts{
			Name:           "aaserver_agent_syncs_total",
			Help:           "How often the agent saw to a target, by result.",
			StabilityLevel: metrics.ALPHA,
		}, []string{"result"}),
		syncTime: metrics.NewHistogram(&metrics.HistogramOpts{
			Name:           "aaserver_agent_sync_duration_seconds",
			Help:           "How long the agent took to see to a target once.",
			Buckets:        metrics.ExponentialBuckets(0.001, 4, 8),
			StabilityLevel: metrics.ALPHA,
		}),
	}
}

func (m *agentMetrics) all() []metrics.Registerable {
	return []metrics.Registerable{m.starts, m.syncs, m.syncTime}
}

func (m *agentMetrics) start(source string, err error) {
	m.starts.WithLabelValues(source, result(err)).Inc()
}

func (m *agentMetrics) synced(err error, took time.Duration) {
	m.syncs.WithLabelValues(result(err)).Inc()
	m.syncTime.Observe(took.Seconds())
}

func result(err error) string {
	switch {
	case err == nil:
		return "success"
	case isConflict(err):
		return "conflict"
	}
	return "error"
}
