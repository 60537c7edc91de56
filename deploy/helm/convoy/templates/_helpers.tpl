{{- define "convoy.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: convoy
{{- end }}

{{/* Labels that choose the pods of one part: (list . "service") */}}
{{- define "convoy.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: convoy
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "convoy.name" -}}
{{- $root := index . 0 -}}
{{- printf "%s-%s" $root.Release.Name (index . 1) | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "convoy.image" -}}
{{- $root := index . 0 -}}
{{ printf "%s-%s:%s" $root.Values.image.prefix (index . 1) $root.Values.image.tag }}
{{- end }}

{{- define "convoy.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "convoy.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- define "convoy.trackingUri" -}}
{{- .Values.registry.trackingUri | default (printf "http://%s:5000" (include "convoy.name" (list . "mlflow"))) -}}
{{- end }}

{{/* Variables for access to the registry with the account of a Secret: (list . "secret") */}}
{{- define "convoy.mlflowClient" -}}
{{- $root := index . 0 -}}
- {name: HOME, value: /tmp}
- {name: MLFLOW_TRACKING_URI, value: {{ include "convoy.trackingUri" $root | quote }}}
- name: MLFLOW_TRACKING_USERNAME
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: username}}
- name: MLFLOW_TRACKING_PASSWORD
  valueFrom: {secretKeyRef: {name: {{ index . 1 }}, key: password}}
{{- end }}

{{- define "convoy.serviceKey" -}}
{{- with .Values.service.keySecret }}
- name: CONVOY_SERVICE_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: service_key}}
{{- end }}
{{- end }}
