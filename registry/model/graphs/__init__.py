"""Checks the graphs of a bundle before an engine reads them.

Imports neither an engine nor the package ``onnx``: serving checks graphs, and has only one engine.
"""
