{{- define "type" -}}
## {{ .Name }}

{{ .Doc }}
{{ if .References }}
In: {{ range $i, $_ := .SortedReferences }}{{ if $i }}, {{ end }}{{ markdownRenderTypeLink . }}{{ end }}
{{ end }}
{{- if .Members }}
| field | type | meaning |
|---|---|---|
{{ range .Members -}}
| `{{ if .Name }}{{ .Name }}{{ else }}metadata{{ end }}` | {{ markdownRenderType .Type }} | {{ if eq .Name "metadata" }}The [standard metadata](https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.37/#objectmeta-v1-meta).{{ else }}{{ markdownRenderFieldDoc .Doc }}{{ end }} |
{{ end -}}
{{- end }}
{{- if .EnumValues }}
| value | meaning |
|---|---|
{{ range .EnumValues -}}
| `{{ .Name }}` | {{ markdownRenderFieldDoc .Doc }} |
{{ end -}}
{{- end }}
{{- end -}}
