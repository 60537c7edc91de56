"""Reads the body of a request: its length, its images, and base64 in JSON.

Imports ``service.settings`` and ``service.server.protocol``. Knows no protocol and no model.
"""
