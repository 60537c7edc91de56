"""Trains weights on labelled pixels: recipes, batches, the training loop, checkpoints.

Imports ``training.data``. Imports neither MLflow nor ``training.publishing``.
"""
