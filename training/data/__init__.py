"""Reads folders and files as labelled pixels, and splits them into training, validation and test.

Imports ``registry.core`` and ``registry.model``. Knows nothing of networks.
"""
