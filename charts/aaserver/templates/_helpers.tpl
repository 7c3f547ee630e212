{{- define "aaserver.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 40 | trimSuffix "-" }}
{{- end }}

{{/* A Service's name is a DNS label of at most 63 characters; the longest suffix has 15. */}}
{{- define "aaserver.fullname" -}}
{{- $name := include "aaserver.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 48 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 48 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 48 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "aaserver.selectorLabels" -}}
app.kubernetes.io/name: {{ include "aaserver.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "aaserver.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "aaserver.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "aaserver.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{ .Values.serviceAccount.name | default (include "aaserver.fullname" .) }}
{{- else -}}
{{ .Values.serviceAccount.name | default "default" }}
{{- end }}
{{- end }}

{{/* "true" if the server keeps something on a volume, which one pod at a time may have. */}}
{{- define "aaserver.stateful" -}}
{{- if or (eq .Values.storage.type "sqlite") .Values.embeddedAgent }}true{{ end }}
{{- end }}

{{/* The schema holds a number that is given to 1 for a stateful server. */}}
{{- define "aaserver.replicas" -}}
{{- if kindIs "invalid" .Values.replicas -}}
{{ ternary 1 2 (eq (include "aaserver.stateful" .) "true") }}
{{- else -}}
{{ int .Values.replicas }}
{{- end }}
{{- end }}

{{/* The Secrets of the ways to certificates have names of their own, so that a release can change from one to another. */}}
{{- define "aaserver.tlsSecretName" -}}
{{- if eq .Values.certificates.source "secret" -}}
{{ .Values.certificates.secret.name }}
{{- else if eq .Values.certificates.source "certManager" -}}
{{ include "aaserver.fullname" . }}-issued-tls
{{- else -}}
{{ include "aaserver.fullname" . }}-generated-tls
{{- end }}
{{- end }}

{{- define "aaserver.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* What the server is asked for by: kube-aggregator uses the last name. */}}
{{- define "aaserver.dnsNames" -}}
{{- $name := include "aaserver.fullname" . -}}
- {{ $name }}
- {{ $name }}.{{ .Release.Namespace }}
- {{ $name }}.{{ .Release.Namespace }}.svc
{{- end }}
