"""Metrics, logs and traces of the service.

Imports ``service.inference``. Knows no protocol: HTTP and gRPC describe their requests to
``request_recorder``.
"""
