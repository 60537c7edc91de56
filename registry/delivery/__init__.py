"""Brings a version from the registry to the disk of the machine that serves it.

Imports ``core``, ``model`` and ``store``. ``deployment`` and ``signing`` are light, because the
service imports them.
"""
