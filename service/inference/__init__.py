"""From pixels to scores: batches, and which version answers.

Imports ``registry.core`` and ``registry.model``, and knows no HTTP.
"""
