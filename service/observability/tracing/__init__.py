"""Traces in the form of OpenTelemetry, made after the answer (docs/decisions/0023).

Only ``span_export`` imports the OpenTelemetry SDK, and only a service with tracing imports that
module. Knows no protocol.
"""
