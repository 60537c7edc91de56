"""The control plane: an HTTP API for operators and their programs, and pages over it.

Imports every folder of ``registry`` but ``cli``.
"""
