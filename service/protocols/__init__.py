"""One module for each protocol: it translates between HTTP and the model.

Imports ``service.inference``, ``service.http`` and ``registry.model``.
"""
