"""Decodes encoded images to pixels, within limits.

Imports ``registry.core`` and ``registry.model.manifest``. Contains nothing about networks.
"""
