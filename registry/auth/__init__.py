"""Bearer tokens and sessions, for the service and for the control plane.

Imports ``registry.core`` only. Contains nothing about routes.
"""
