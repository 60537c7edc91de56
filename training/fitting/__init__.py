"""From labelled pixels to weights: recipes, batches, one loop, checkpoints.

Imports ``training.data``, and neither MLflow nor ``training.publishing``.
"""
