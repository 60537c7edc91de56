"""The command ``convoy``: one command for training, the registry and the service.

The only package that may import all three, and only when a verb needs it.
"""
