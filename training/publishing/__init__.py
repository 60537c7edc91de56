"""Turns trained weights into a registered version: scores, drawings, exports, the bundle.

Imports ``training.data`` and ``training.fitting``; ``tracking`` imports MLflow.
"""
