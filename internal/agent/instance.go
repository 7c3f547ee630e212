package agent

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// The back-off between the end of a run and the next start.
const (
	backoffFirst = time.Second
	backoffMax   = 5 * time.Minute
	// backoffReset is how long a run makes the back-off begin anew.
	backoffReset = 10 * time.Minute
)

// Reasons in the state of an instance.
const (
	reasonPending    = "Pending"
	reasonBackoff    = "CrashLoopBackOff"
	reasonStartError = "StartError"
	reasonAgentLost  = "AgentLost"
)

const (
	// exitCodeStartError is that of an instance that couldn't be started, as
	// for containers.
	exitCodeStartError = 128
	// exitCodeAgentLost is that of an instance whose agent ended: 128 plus
	// SIGKILL.
	exitCodeAgentLost = 137
)

// maxMessage bounds the messages of others in the status, in bytes.
const maxMessage = 1024

// instance is what the agent knows of one instance.
type instance struct {
	name    string
	ordinal int

	// target is what it was, or is to be, started by; hash tells the specs
	// that matter apart.
	target *v1.Target
	hash   string
	ports  []v1.InstancePort

	// run is set while it runs, and since tells for how long.
	run   *v1.InstanceStateRunning
	since time.Time
	// ended is how its last run, or the last try to start it, ended; before is
	// that of the one before.
	ended, before *v1.InstanceStateTerminated
	// pending: it hasn't been started by this spec.
	pending bool
	// ran: it has ended since it was last started, so that the next start is a
	// restart.
	ran      bool
	restarts int32
	// delay is the present back-off, retryAt when it is over.
	delay   time.Duration
	retryAt time.Time
	// told is the retryAt that an event has told of.
	told time.Time

	// stopBy is when it is killed, once it was asked to end.
	stopBy time.Time
	// removing: it is ended for good. replacing: to be started by a new spec.
	removing, replacing bool

	// message is the host's, of something wrong that doesn't end it.
	message string
}

// restoreInstance takes up what an earlier agent said in the status.
func restoreInstance(status *v1.InstanceStatus, ordinal int) *instance {
	i := &instance{
		name:     status.Name,
		ordinal:  ordinal,
		ports:    status.Ports,
		restarts: status.RestartCount,
		ended:    status.LastState.Terminated,
	}
	switch {
	case status.State.Running != nil:
		i.run = status.State.Running
	case status.State.Terminated != nil:
		i.ended, i.before = status.State.Terminated, status.LastState.Terminated
	}
	i.ran = i.run == nil && i.ended != nil && i.ended.Reason != reasonStartError
	i.pending = i.run == nil && i.ended == nil
	return i
}

// startable says that the instance doesn't run and is to, now or when its
// back-off is over.
func (i *instance) startable(policy v1.RestartPolicy) bool {
	if i.run != nil || i.removing {
		return false
	}
	return i.pending || i.ended == nil || policy.Restarts(i.ended.ExitCode)
}

func (i *instance) started(now time.Time) {
	if i.ran {
		i.restarts++
	}
	i.run = &v1.InstanceStateRunning{StartedAt: metav1.NewTime(now)}
	i.since = now
	i.ran, i.pending = false, false
	i.stopBy, i.retryAt = time.Time{}, time.Time{}
}

func (i *instance) failedToStart(err error, now time.Time) {
	i.before, i.ended = i.ended, &v1.InstanceStateTerminated{
		ExitCode:   exitCodeStartError,
		Reason:     reasonStartError,
		Message:    bounded(err.Error()),
		FinishedAt: metav1.NewTime(now),
	}
	i.pending = false
	i.backOff(now)
}

func (i *instance) exited(how *v1.InstanceStateTerminated, now time.Time) {
	if how.FinishedAt.Sub(how.StartedAt.Time) >= backoffReset {
		i.delay = 0
	}
	i.end(how)
	i.backOff(now)
}

// lost is the end of an instance whose agent ended.
func (i *instance) lost(now time.Time) {
	i.end(&v1.InstanceStateTerminated{
		ExitCode:   exitCodeAgentLost,
		Reason:     reasonAgentLost,
		Message:    "the agent that ran it ended, and the instance with it",
		StartedAt:  i.run.StartedAt,
		FinishedAt: metav1.NewTime(now),
	})
	i.delay, i.retryAt = 0, time.Time{}
}

func (i *instance) end(how *v1.InstanceStateTerminated) {
	i.before, i.ended = i.ended, how
	i.run, i.since, i.stopBy = nil, time.Time{}, time.Time{}
	i.ran = true
}

func (i *instance) backOff(now time.Time) {
	i.delay = min(max(2*i.delay, backoffFirst), backoffMax)
	i.retryAt = now.Add(i.delay)
}

// renew makes the instance, which doesn't run, one of another spec.
func (i *instance) renew(target *v1.Target, hash string) {
	i.target, i.hash = target, hash
	i.pending, i.replacing = true, false
	i.ran, i.restarts = false, 0
	i.delay, i.retryAt = 0, time.Time{}
}

// settled says that a rollout may go on to the next instance, or else after
// how long it may if this one runs on.
func (i *instance) settled(policy v1.RestartPolicy, now time.Time) (settled bool, after time.Duration) {
	if i.run == nil {
		// One that has done its work is as good as one that runs.
		return !i.startable(policy) && i.ended.ExitCode == 0, 0
	}
	need := settleTime
	if i.restarts > 0 {
		need = settleTimeCrashed
	}
	after = need - now.Sub(i.since)
	return after <= 0, after
}

// broken says that the instance, which hasn't settled, has ended or failed to
// start by its present spec.
func (i *instance) broken() bool {
	return i.ended != nil && !i.pending && (i.run == nil || i.restarts > 0)
}

// how says in words how a run ended.
func how(ended *v1.InstanceStateTerminated) string {
	var text string
	switch {
	case ended.Reason == reasonStartError:
		return ended.Message
	case ended.Reason == reasonAgentLost:
		text = "its agent ended"
	case ended.Signal != 0:
		text = fmt.Sprintf("ended by %s", signalName(ended.Signal))
	default:
		text = fmt.Sprintf("exited with code %d", ended.ExitCode)
	}
	if ended.Message != "" && ended.Reason != reasonAgentLost {
		text += ": " + ended.Message
	}
	return bounded(text)
}

func signalName(signal int32) string {
	if name := unix.SignalName(unix.Signal(signal)); name != "" {
		return name
	}
	return fmt.Sprintf("signal %d", signal)
}

func bounded(message string) string {
	if len(message) <= maxMessage {
		return message
	}
	cut := maxMessage
	for cut > 0 && message[cut]&0xc0 == 0x80 { // not within a character
		cut--
	}
	return message[:cut] + "…"
}
