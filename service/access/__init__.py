"""Decides which callers may use the service, and limits how often each may.

Imports ``registry.core``, ``registry.auth`` and ``service.settings``. Knows nothing about models.
"""
