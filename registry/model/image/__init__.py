"""From encoded bytes to pixels, within limits.

Imports ``registry.core`` and ``registry.model.manifest``, and knows no network.
"""
