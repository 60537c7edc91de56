"""From folders and files to labelled pixels, and the split of them.

Imports ``registry.core`` and ``registry.model``, and knows no network.
"""
