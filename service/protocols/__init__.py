"""One module for each protocol, which translates between HTTP and the pipeline.

Imports ``service.inference``, ``service.http``, ``service.state`` and ``service.server.protocol``.
Decides nothing.
"""
