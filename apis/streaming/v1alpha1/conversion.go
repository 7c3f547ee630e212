package v1alpha1

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"

	"k8s.io/apimachinery/pkg/conversion"
	"k8s.io/apimachinery/pkg/runtime"

	"aaserver.io/aaserver/apis/streaming"
	v1 "aaserver.io/aaserver/apis/streaming/v1"
)

// The two shapes hold the same as long as a target makes sense: one type, with
// the settings that this type has. Conversion goes before validation, though,
// and both versions can hold what makes none. It never fails and drops nothing:
//
//	v1alpha1                    hub, v1
//	type, its settings     ◄──► the type's source
//	settings of no type    ───► AnnotationSettings
//	AnnotationSources      ◄─── more sources, an empty log
//
// Validation refuses both annotations in the hub, so that neither is stored:
// the first by errors that name the settings. A carried value is taken off
// on the way back only if it then converts to the very same; whatever somebody
// has made of it stays an annotation, to be refused.
const (
	// AnnotationSettings carries settings of v1alpha1 that the target's type
	// doesn't have: a TargetSpec as JSON.
	AnnotationSettings = "v1alpha1.streaming.aaserver.io/settings"

	// AnnotationSources carries, on objects of v1alpha1, what the hub has
	// beside one source: a moreSources as JSON.
	AnnotationSources = "v1.streaming.aaserver.io/sources"
)

// addFieldLabels says which fields a field selector may name.
func addFieldLabels(scheme *runtime.Scheme) error {
	return scheme.AddFieldLabelConversionFunc(SchemeGroupVersion.WithKind("Target"),
		func(label, value string) (string, string, error) {
			switch label {
			case "metadata.name", "metadata.namespace", "spec.agentName":
				return label, value, nil
			}
			return "", "", fmt.Errorf("%q is not a known field selector: only metadata.name, metadata.namespace and spec.agentName are", label)
		})
}

// Convert_v1alpha1_Target_To_streaming_Target converts a target to the hub.
func Convert_v1alpha1_Target_To_streaming_Target(in *Target, out *streaming.Target, s conversion.Scope) error {
	if err := autoConvert_v1alpha1_Target_To_streaming_Target(in, out, s); err != nil {
		return err
	}
	if text, ok := out.Annotations[AnnotationSources]; ok {
		taken, err := addSources(&out.Spec, text)
		if err != nil {
			return err
		}
		if taken {
			out.Annotations = without(out.Annotations, AnnotationSources)
		}
	}
	if misfits := misfitsOf(&in.Spec); misfits != nil {
		text, err := encode(misfits)
		if err != nil {
			return err
		}
		out.Annotations = with(out.Annotations, AnnotationSettings, text)
	}
	return nil
}

// Convert_streaming_Target_To_v1alpha1_Target converts a target from the hub.
func Convert_streaming_Target_To_v1alpha1_Target(in *streaming.Target, out *Target, s conversion.Scope) error {
	if err := autoConvert_streaming_Target_To_v1alpha1_Target(in, out, s); err != nil {
		return err
	}
	if text, ok := out.Annotations[AnnotationSettings]; ok {
		if addMisfits(&out.Spec, text) {
			out.Annotations = without(out.Annotations, AnnotationSettings)
		}
	}
	more, err := moreSourcesOf(&in.Spec, s)
	if err != nil {
		return err
	}
	if more != nil {
		text, err := encode(more)
		if err != nil {
			return err
		}
		out.Annotations = with(out.Annotations, AnnotationSources, text)
	}
	return nil
}

// Convert_v1alpha1_TargetSpec_To_streaming_TargetSpec converts what the type
// has.
func Convert_v1alpha1_TargetSpec_To_streaming_TargetSpec(in *TargetSpec, out *streaming.TargetSpec, s conversion.Scope) error {
	if err := autoConvert_v1alpha1_TargetSpec_To_streaming_TargetSpec(in, out, s); err != nil {
		return err
	}
	switch in.Type {
	case TargetTypeProcess:
		out.Process = &streaming.ProcessSource{
			Command:    in.Command,
			Args:       in.Args,
			Env:        convertEach(in.Env, func(e EnvVar) streaming.EnvVar { return streaming.EnvVar(e) }),
			WorkingDir: in.WorkingDir,
			User:       in.User,
			Stdin:      in.Stdin,
			TTY:        in.TTY,
		}
	case TargetTypeContainer:
		out.Container = &streaming.ContainerSource{
			Image:      in.Image,
			Command:    in.Command,
			Args:       in.Args,
			Env:        convertEach(in.Env, func(e EnvVar) streaming.EnvVar { return streaming.EnvVar(e) }),
			WorkingDir: in.WorkingDir,
			Resources:  streaming.ContainerResources{Limits: in.Limits},
			Stdin:      in.Stdin,
			TTY:        in.TTY,
		}
	case TargetTypeSSH:
		out.SSH = &streaming.SSHSource{
			Endpoints:            convertEach(in.Endpoints, func(e Endpoint) streaming.Endpoint { return streaming.Endpoint(e) }),
			User:                 in.User,
			CredentialsSecretRef: streaming.SecretReference{Name: in.CredentialsSecret},
		}
		if len(in.LogCommand) > 0 || in.LogPath != "" || in.LogJournalUnit != "" {
			out.SSH.Log = &streaming.SSHLog{Command: in.LogCommand, Path: in.LogPath, JournalUnit: in.LogJournalUnit}
		}
	case TargetTypeTCP:
		out.TCP = &streaming.TCPSource{
			Endpoints: convertEach(in.Endpoints, func(e Endpoint) streaming.Endpoint { return streaming.Endpoint(e) }),
		}
		if in.TLS {
			out.TCP.TLS = &streaming.TCPTLS{ServerName: in.TLSServerName, CABundle: in.TLSCABundle}
		}
	}
	return nil
}

// Convert_streaming_TargetSpec_To_v1alpha1_TargetSpec converts the first
// source.
func Convert_streaming_TargetSpec_To_v1alpha1_TargetSpec(in *streaming.TargetSpec, out *TargetSpec, s conversion.Scope) error {
	if err := autoConvert_streaming_TargetSpec_To_v1alpha1_TargetSpec(in, out, s); err != nil {
		return err
	}
	switch {
	case in.Process != nil:
		source := in.Process
		out.Type = TargetTypeProcess
		out.Command = source.Command
		out.Args = source.Args
		out.Env = convertEach(source.Env, func(e streaming.EnvVar) EnvVar { return EnvVar(e) })
		out.WorkingDir = source.WorkingDir
		out.User = source.User
		out.Stdin = source.Stdin
		out.TTY = source.TTY
	case in.Container != nil:
		source := in.Container
		out.Type = TargetTypeContainer
		out.Image = source.Image
		out.Command = source.Command
		out.Args = source.Args
		out.Env = convertEach(source.Env, func(e streaming.EnvVar) EnvVar { return EnvVar(e) })
		out.WorkingDir = source.WorkingDir
		out.Limits = source.Resources.Limits
		out.Stdin = source.Stdin
		out.TTY = source.TTY
	case in.SSH != nil:
		source := in.SSH
		out.Type = TargetTypeSSH
		out.Endpoints = convertEach(source.Endpoints, func(e streaming.Endpoint) Endpoint { return Endpoint(e) })
		out.User = source.User
		out.CredentialsSecret = source.CredentialsSecretRef.Name
		if log := source.Log; log != nil {
			out.LogCommand = log.Command
			out.LogPath = log.Path
			out.LogJournalUnit = log.JournalUnit
		}
	case in.TCP != nil:
		source := in.TCP
		out.Type = TargetTypeTCP
		out.Endpoints = convertEach(source.Endpoints, func(e streaming.Endpoint) Endpoint { return Endpoint(e) })
		if tls := source.TLS; tls != nil {
			out.TLS = true
			out.TLSServerName = tls.ServerName
			out.TLSCABundle = tls.CABundle
		}
	}
	return nil
}

// moreSources is what the hub may hold beside the first source, in the shape of
// v1. The first is in the spec.
// +k8s:openapi-gen=false
// +protobuf=false
type moreSources struct {
	Container *v1.ContainerSource `json:"container,omitempty"`
	SSH       *v1.SSHSource       `json:"ssh,omitempty"`
	TCP       *v1.TCPSource       `json:"tcp,omitempty"`
	// EmptyLog says that the first source is SSH, and has a log of nothing.
	EmptyLog bool `json:"emptyLog,omitempty"`
}

// moreSourcesOf returns what v1alpha1 has no fields for, nil if that is
// nothing.
func moreSourcesOf(spec *streaming.TargetSpec, s conversion.Scope) (*moreSources, error) {
	var more moreSources
	first := spec.Process == nil
	if in := spec.Container; in != nil {
		if !first {
			more.Container = &v1.ContainerSource{}
			if err := v1.Convert_streaming_ContainerSource_To_v1_ContainerSource(in, more.Container, s); err != nil {
				return nil, err
			}
		}
		first = false
	}
	if in := spec.SSH; in != nil {
		if first {
			more.EmptyLog = in.Log != nil && len(in.Log.Command) == 0 && in.Log.Path == "" && in.Log.JournalUnit == ""
		} else {
			more.SSH = &v1.SSHSource{}
			if err := v1.Convert_streaming_SSHSource_To_v1_SSHSource(in, more.SSH, s); err != nil {
				return nil, err
			}
		}
		first = false
	}
	if in := spec.TCP; in != nil && !first {
		more.TCP = &v1.TCPSource{}
		if err := v1.Convert_streaming_TCPSource_To_v1_TCPSource(in, more.TCP, s); err != nil {
			return nil, err
		}
	}
	if more == (moreSources{}) {
		return nil, nil
	}
	return &more, nil
}

// addSources adds what text carries, if it is nothing else than what the
// outcome would be carried as.
func addSources(spec *streaming.TargetSpec, text string) (bool, error) {
	var more moreSources
	if decode(text, &more) != nil {
		return false, nil
	}
	out := *spec
	if more.Container != nil {
		if out.Container != nil {
			return false, nil
		}
		out.Container = &streaming.ContainerSource{}
		if err := v1.Convert_v1_ContainerSource_To_streaming_ContainerSource(more.Container, out.Container, nil); err != nil {
			return false, err
		}
	}
	if more.SSH != nil {
		if out.SSH != nil {
			return false, nil
		}
		out.SSH = &streaming.SSHSource{}
		if err := v1.Convert_v1_SSHSource_To_streaming_SSHSource(more.SSH, out.SSH, nil); err != nil {
			return false, err
		}
	}
	if more.TCP != nil {
		if out.TCP != nil {
			return false, nil
		}
		out.TCP = &streaming.TCPSource{}
		if err := v1.Convert_v1_TCPSource_To_streaming_TCPSource(more.TCP, out.TCP, nil); err != nil {
			return false, err
		}
	}
	if more.EmptyLog {
		if out.SSH == nil || out.SSH.Log != nil {
			return false, nil
		}
		ssh := *out.SSH
		ssh.Log = &streaming.SSHLog{}
		out.SSH = &ssh
	}
	again, err := moreSourcesOf(&out, nil)
	if err != nil || again == nil {
		return false, err
	}
	if carried, err := encode(again); err != nil || carried != text {
		return false, err
	}
	*spec = out
	return true, nil
}

func with(annotations map[string]string, key, value string) map[string]string {
	changed := make(map[string]string, len(annotations)+1)
	maps.Copy(changed, annotations)
	changed[key] = value
	return changed
}

func without(annotations map[string]string, key string) map[string]string {
	if len(annotations) == 1 {
		return nil
	}
	changed := maps.Clone(annotations)
	delete(changed, key)
	return changed
}

func convertEach[In, Out any](in []In, convert func(In) Out) []Out {
	if in == nil {
		return nil
	}
	out := make([]Out, len(in))
	for i := range in {
		out[i] = convert(in[i])
	}
	return out
}

// encode doesn't escape for HTML, which would make the text longer.
func encode(value any) (string, error) {
	var text bytes.Buffer
	encoder := json.NewEncoder(&text)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(value); err != nil {
		return "", err
	}
	return string(bytes.TrimSuffix(text.Bytes(), []byte("\n"))), nil
}

func decode(text string, into any) error {
	decoder := json.NewDecoder(bytes.NewReader([]byte(text)))
	decoder.DisallowUnknownFields()
	return decoder.Decode(into)
}
