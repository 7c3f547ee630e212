{{- define "gvList" -}}
{{- range . -}}
# {{ .GroupVersionString }}

<!-- Made by `make update` from the types. -->

{{ .Doc }}

`kubectl explain` says the same of a server's own version.
{{ range .SortedTypes }}
{{ template "type" . }}
{{- end }}
{{- end -}}
{{- end -}}
