"""One version of a model: its manifest, its bundle, its network, and how it classifies images.

Imports ``registry.core`` only. Contains nothing about MLflow or about which version is champion.
"""
