"""Who may call: tokens, and how often each caller may ask.

Imports ``registry.core`` and ``registry.auth``.
"""
