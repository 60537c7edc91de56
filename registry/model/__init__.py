"""One version of a model: its manifest, its bundle, its network, and how it classifies.

Imports ``registry.core`` only. It knows neither MLflow nor which version is the champion.
"""
