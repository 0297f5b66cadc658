{{- define "portolan.name" -}}
{{- default .Chart.Name .Values.resourceName | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "portolan.selector" -}}
app.kubernetes.io/name: {{ include "portolan.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "portolan.labels" -}}
{{ include "portolan.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "portolan.metadata" -}}
name: {{ include "portolan.name" . }}
labels:
  {{- include "portolan.labels" . | nindent 2 }}
{{- with .Values.annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
