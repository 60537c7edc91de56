"""Which callers may use the service, and how often each may ask.

Imports ``registry.core``, ``registry.auth`` and ``service.settings``. Knows no model.
"""
