"""From encoded images to predictions: choosing the version, decoding, batching.

Imports ``registry`` and small modules of the service: settings, malloc, the server's protocol, the
shadow's client. Must not know HTTP.
"""
