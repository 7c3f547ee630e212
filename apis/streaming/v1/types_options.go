package v1

import metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

// LogStream selects which output of an instance is returned. It is an alias,
// because the parameters of a query must be of a simple type.
type LogStream = string

const (
	// LogStreamAll is standard output and standard error, in the order of
	// their times.
	LogStreamAll LogStream = "All"
	// LogStreamStdout is standard output alone.
	LogStreamStdout LogStream = "Stdout"
	// LogStreamStderr is standard error alone.
	LogStreamStderr LogStream = "Stderr"
)

// What the answer of targets/log says of itself, for one instance, in headers; a
// WebSocket's in those of its upgrade.
const (
	// LogInstanceHeader names the instance.
	LogInstanceHeader = "X-Log-Instance"
	// LogCursorHeader is the resumeAfter, in RFC 3339 with nanoseconds, with
	// which all of this answer is returned again, and what came later: a
	// client that was cut off before its first line resumes with it. It isn't
	// there with previous.
	LogCursorHeader = "X-Log-Cursor"
	// LogEndHeader, with any value in a request that isn't a WebSocket, has
	// the answer always end in order, with a trailer of that name, which says
	// why: a status code, 200 for the end of the log, a space, and a text.
	// Who sends it takes an answer without that trailer for one that was cut
	// off. For all others, an answer that isn't whole ends in an unexpected
	// EOF.
	LogEndHeader = "X-Log-End"
)

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
// +k8s:validation-gen=false
// +k8s:conversion-gen:explicit-from=net/url.Values

// TargetLogOptions is the query of a GET of targets/log.
type TargetLogOptions struct {
	metav1.TypeMeta `json:",inline"`

	// instance names the instance; the first ready one if not given, or else
	// the first.
	// +optional
	Instance string `json:"instance,omitempty" protobuf:"bytes,1,opt,name=instance"`

	// follow keeps the response open and sends new lines as they come.
	// +optional
	Follow bool `json:"follow,omitempty" protobuf:"varint,2,opt,name=follow"`

	// previous reads the log of the instance's last run instead of its
	// present one.
	// +optional
	Previous bool `json:"previous,omitempty" protobuf:"varint,3,opt,name=previous"`

	// sinceSeconds leaves out lines older than so many seconds; at least 1. At
	// most one of sinceSeconds, sinceTime and resumeAfter may be given.
	// +optional
	SinceSeconds *int64 `json:"sinceSeconds,omitempty" protobuf:"varint,4,opt,name=sinceSeconds"`

	// sinceTime leaves out lines from before this time.
	// +optional
	SinceTime *metav1.Time `json:"sinceTime,omitempty" protobuf:"bytes,5,opt,name=sinceTime"`

	// resumeAfter is an RFC 3339 time with nanoseconds, as timestamps prints
	// it. Only lines from after it are returned, those of earlier runs of the
	// instance too: the times of an instance's lines strictly increase, so
	// that this is an exact cursor. It needs instance, and excludes previous
	// and tailLines.
	// +optional
	ResumeAfter string `json:"resumeAfter,omitempty" protobuf:"bytes,6,opt,name=resumeAfter"`

	// timestamps puts the time of each line, in RFC 3339 with nanoseconds, and
	// a space before it.
	// +optional
	Timestamps bool `json:"timestamps,omitempty" protobuf:"varint,7,opt,name=timestamps"`

	// tailLines returns the last lines only, so many; 0 or more.
	// +optional
	TailLines *int64 `json:"tailLines,omitempty" protobuf:"varint,8,opt,name=tailLines"`

	// limitBytes ends the response after so many bytes; at least 1. The last
	// line may be cut.
	// +optional
	LimitBytes *int64 `json:"limitBytes,omitempty" protobuf:"varint,9,opt,name=limitBytes"`

	// stream selects All (the default), Stdout or Stderr.
	// +optional
	Stream LogStream `json:"stream,omitempty" protobuf:"bytes,10,opt,name=stream"`

	// allInstances returns the logs of all instances, and excludes instance.
	// When following, instances that come later are followed too.
	// +optional
	AllInstances bool `json:"allInstances,omitempty" protobuf:"varint,11,opt,name=allInstances"`

	// prefix puts the instance's name in brackets, and a space, before each
	// line, and before its time.
	// +optional
	Prefix bool `json:"prefix,omitempty" protobuf:"varint,12,opt,name=prefix"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
// +k8s:validation-gen=false
// +k8s:conversion-gen:explicit-from=net/url.Values

// TargetExecOptions is the query of a request to targets/exec.
type TargetExecOptions struct {
	metav1.TypeMeta `json:",inline"`

	// instance names the instance; the first ready one if not given.
	// +optional
	Instance string `json:"instance,omitempty" protobuf:"bytes,1,opt,name=instance"`

	// stdin sends the client's standard input to the command.
	// +optional
	Stdin bool `json:"stdin,omitempty" protobuf:"varint,2,opt,name=stdin"`

	// stdout returns the command's standard output.
	// +optional
	Stdout bool `json:"stdout,omitempty" protobuf:"varint,3,opt,name=stdout"`

	// stderr returns the command's standard error. A terminal has none of its
	// own: it excludes tty.
	// +optional
	Stderr bool `json:"stderr,omitempty" protobuf:"varint,4,opt,name=stderr"`

	// tty gives the command a terminal.
	// +optional
	TTY bool `json:"tty,omitempty" protobuf:"varint,5,opt,name=tty"`

	// command is the program and its arguments. It isn't run in a shell.
	// +listType=atomic
	Command []string `json:"command" protobuf:"bytes,6,rep,name=command"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
// +k8s:validation-gen=false
// +k8s:conversion-gen:explicit-from=net/url.Values

// TargetAttachOptions is the query of a request to targets/attach.
type TargetAttachOptions struct {
	metav1.TypeMeta `json:",inline"`

	// instance names the instance; the first ready one if not given.
	// +optional
	Instance string `json:"instance,omitempty" protobuf:"bytes,1,opt,name=instance"`

	// stdin sends the client's standard input to the instance, which must have
	// one.
	// +optional
	Stdin bool `json:"stdin,omitempty" protobuf:"varint,2,opt,name=stdin"`

	// stdout returns the instance's standard output from now on.
	// +optional
	Stdout bool `json:"stdout,omitempty" protobuf:"varint,3,opt,name=stdout"`

	// stderr returns the instance's standard error from now on. A terminal has
	// none of its own: it excludes tty.
	// +optional
	Stderr bool `json:"stderr,omitempty" protobuf:"varint,4,opt,name=stderr"`

	// tty says that the client is a terminal. The instance must have one too.
	// +optional
	TTY bool `json:"tty,omitempty" protobuf:"varint,5,opt,name=tty"`

	// replay sends the last lines of what the instance has written first, so
	// many, as far as they are kept: 64 KiB are of a process, none of other
	// sources. No byte is lost or sent twice between them and what follows. 0,
	// the default, sends none.
	// +optional
	Replay int64 `json:"replay,omitempty" protobuf:"varint,6,opt,name=replay"`

	// closeStdin hands the end of the client's standard input on to the
	// instance, whose own ends then, for every client and for good. It needs
	// stdin. A terminal's input has no end.
	// +optional
	CloseStdin bool `json:"closeStdin,omitempty" protobuf:"varint,7,opt,name=closeStdin"`
}

// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object
// +k8s:validation-gen=false
// +k8s:conversion-gen:explicit-from=net/url.Values

// TargetPortForwardOptions is the query of a request to targets/portforward.
type TargetPortForwardOptions struct {
	metav1.TypeMeta `json:",inline"`

	// instance names the instance. If it isn't given, each connection goes to one
	// that is ready: the same one as long as it is, the first to begin with.
	// +optional
	Instance string `json:"instance,omitempty" protobuf:"bytes,1,opt,name=instance"`

	// ports, when given, are the only ports, of TCP and UDP, that the session may
	// forward, and then it forwards nothing else: no unix sockets, and nothing in
	// reverse. The legacy WebSocket protocol needs them, and numbers its channels
	// by their order.
	// +optional
	// +listType=atomic
	Ports []int32 `json:"ports,omitempty" protobuf:"varint,2,rep,name=ports"`
}
