"""Speaks to an MLflow database or server, and fetches artefacts.

Imports ``registry.core`` and ``registry.model``. Knows no rule about champions or audit logs.
"""
