"""Where ``convoy import`` takes models from: a module for each source.

A new source is one module here, whose ``SOURCE`` is a ``Source``. The command finds it and adds its
option.
"""
