"""The MLflow registry: versions, aliases, and the audit log.

The only folder here that imports MLflow. Imports ``registry.core`` and ``registry.model``.
"""
