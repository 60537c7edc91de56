"""Compares our HTTP server with gunicorn's gthread and Granian, all with the same application.

``python -m benchmarks.http_servers`` measures. Besides it, only ``benchmarks.http_server_parts``
uses this folder.
"""
