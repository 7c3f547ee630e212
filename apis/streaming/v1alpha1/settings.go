package v1alpha1

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"
)

// setting is a field of the spec that not every type has.
// +k8s:openapi-gen=false
// +protobuf=false
type setting struct {
	name  string
	types []TargetType
	// needsTLS says that it means something with tls only.
	needsTLS bool
	isSet    func(*TargetSpec) bool
	move     func(to, from *TargetSpec)
}

var (
	hosted    = []TargetType{TargetTypeProcess, TargetTypeContainer}
	reached   = []TargetType{TargetTypeSSH, TargetTypeTCP}
	container = []TargetType{TargetTypeContainer}
	ssh       = []TargetType{TargetTypeSSH}
	tcp       = []TargetType{TargetTypeTCP}
	withUser  = []TargetType{TargetTypeProcess, TargetTypeSSH}
	allTypes  = []TargetType{TargetTypeProcess, TargetTypeContainer, TargetTypeSSH, TargetTypeTCP}
)

var settings = []setting{
	{name: "image", types: container,
		isSet: func(s *TargetSpec) bool { return s.Image != "" }, move: func(to, from *TargetSpec) { to.Image = from.Image }},
	{name: "command", types: hosted,
		isSet: func(s *TargetSpec) bool { return len(s.Command) > 0 }, move: func(to, from *TargetSpec) { to.Command = from.Command }},
	{name: "args", types: hosted,
		isSet: func(s *TargetSpec) bool { return len(s.Args) > 0 }, move: func(to, from *TargetSpec) { to.Args = from.Args }},
	{name: "env", types: hosted,
		isSet: func(s *TargetSpec) bool { return len(s.Env) > 0 }, move: func(to, from *TargetSpec) { to.Env = from.Env }},
	{name: "workingDir", types: hosted,
		isSet: func(s *TargetSpec) bool { return s.WorkingDir != "" }, move: func(to, from *TargetSpec) { to.WorkingDir = from.WorkingDir }},
	{name: "user", types: withUser,
		isSet: func(s *TargetSpec) bool { return s.User != "" }, move: func(to, from *TargetSpec) { to.User = from.User }},
	{name: "stdin", types: hosted,
		isSet: func(s *TargetSpec) bool { return s.Stdin }, move: func(to, from *TargetSpec) { to.Stdin = from.Stdin }},
	{name: "tty", types: hosted,
		isSet: func(s *TargetSpec) bool { return s.TTY }, move: func(to, from *TargetSpec) { to.TTY = from.TTY }},
	{name: "limits", types: container,
		isSet: func(s *TargetSpec) bool { return len(s.Limits) > 0 }, move: func(to, from *TargetSpec) { to.Limits = from.Limits }},
	{name: "endpoints", types: reached,
		isSet: func(s *TargetSpec) bool { return len(s.Endpoints) > 0 }, move: func(to, from *TargetSpec) { to.Endpoints = from.Endpoints }},
	{name: "credentialsSecret", types: ssh,
		isSet: func(s *TargetSpec) bool { return s.CredentialsSecret != "" }, move: func(to, from *TargetSpec) { to.CredentialsSecret = from.CredentialsSecret }},
	{name: "logCommand", types: ssh,
		isSet: func(s *TargetSpec) bool { return len(s.LogCommand) > 0 }, move: func(to, from *TargetSpec) { to.LogCommand = from.LogCommand }},
	{name: "logPath", types: ssh,
		isSet: func(s *TargetSpec) bool { return s.LogPath != "" }, move: func(to, from *TargetSpec) { to.LogPath = from.LogPath }},
	{name: "logJournalUnit", types: ssh,
		isSet: func(s *TargetSpec) bool { return s.LogJournalUnit != "" }, move: func(to, from *TargetSpec) { to.LogJournalUnit = from.LogJournalUnit }},
	{name: "tls", types: tcp,
		isSet: func(s *TargetSpec) bool { return s.TLS }, move: func(to, from *TargetSpec) { to.TLS = from.TLS }},
	{name: "tlsServerName", types: tcp, needsTLS: true,
		isSet: func(s *TargetSpec) bool { return s.TLSServerName != "" }, move: func(to, from *TargetSpec) { to.TLSServerName = from.TLSServerName }},
	{name: "tlsCABundle", types: tcp, needsTLS: true,
		isSet: func(s *TargetSpec) bool { return len(s.TLSCABundle) > 0 }, move: func(to, from *TargetSpec) { to.TLSCABundle = from.TLSCABundle }},
}

// fits says whether a target has the setting.
func (f *setting) fits(spec *TargetSpec) bool {
	return slices.Contains(f.types, spec.Type) && (!f.needsTLS || spec.TLS)
}

// misfitsOf returns the settings that the type doesn't have, and the type if
// there is no such, nil if there is nothing of the kind.
func misfitsOf(spec *TargetSpec) *TargetSpec {
	var misfits *TargetSpec
	if spec.Type != "" && !slices.Contains(allTypes, spec.Type) {
		misfits = &TargetSpec{Type: spec.Type}
	}
	for i := range settings {
		if f := &settings[i]; f.isSet(spec) && !f.fits(spec) {
			if misfits == nil {
				misfits = &TargetSpec{}
			}
			f.move(misfits, spec)
		}
	}
	return misfits
}

// addMisfits adds the settings that text carries, if they are nothing else than
// the misfits of the outcome.
func addMisfits(spec *TargetSpec, text string) bool {
	var misfits TargetSpec
	if decode(text, &misfits) != nil {
		return false
	}
	out := *spec
	if misfits.Type != "" {
		if out.Type != "" {
			return false
		}
		out.Type = misfits.Type
	}
	for i := range settings {
		if f := &settings[i]; f.isSet(&misfits) {
			if f.isSet(&out) {
				return false
			}
			f.move(&out, &misfits)
		}
	}
	again := misfitsOf(&out)
	if again == nil {
		return false
	}
	if carried, err := encode(again); err != nil || carried != text {
		return false
	}
	*spec = out
	return true
}

// ReservedDetail is what is wrong with an annotation that only conversion may
// set.
const ReservedDetail = "is reserved for conversion between versions: remove it"

// ValidateSettings says what is wrong with the settings that AnnotationSettings
// carries: nothing may be carried that is stored. It finds an error in any text.
func ValidateSettings(text string, spec *field.Path) field.ErrorList {
	var carried TargetSpec
	if decode(text, &carried) != nil {
		carried = TargetSpec{}
	}
	if carried.Type != "" {
		const maxShown = 64
		var shown any = string(carried.Type)
		if len(carried.Type) > maxShown {
			shown = field.OmitValueType{}
		}
		return field.ErrorList{field.NotSupported(spec.Child("type"), shown, allTypes)}
	}
	var errs field.ErrorList
	for i := range settings {
		if f := &settings[i]; f.isSet(&carried) {
			errs = append(errs, field.Forbidden(spec.Child(f.name), f.onlyFor()))
		}
	}
	if len(errs) == 0 {
		errs = append(errs, field.Forbidden(field.NewPath("metadata", "annotations").Key(AnnotationSettings),
			ReservedDetail))
	}
	return errs
}

func (f *setting) onlyFor() string {
	var quoted []string
	for _, t := range f.types {
		quoted = append(quoted, "`"+string(t)+"`")
	}
	text := "may only be set for the type " + strings.Join(quoted, " or ")
	if f.needsTLS {
		text += " with `tls`"
	}
	return text
}
