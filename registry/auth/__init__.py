"""Bearer tokens and sessions, for the service and for the control plane.

Imports ``registry.core`` only, and knows no route.
"""
