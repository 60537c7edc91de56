"""One module for each protocol: it translates between HTTP and the pipeline.

Imports ``service.inference``, ``service.http``, ``service.state`` and the protocol of the server.
Decides nothing.
"""
