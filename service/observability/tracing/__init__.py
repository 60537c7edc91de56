"""Traces in the form of OpenTelemetry, made after the answer (docs/decisions/0023).

Only ``span_export`` imports the OpenTelemetry SDK, and only the process that makes the spans
imports that module. Knows no protocol.
"""
