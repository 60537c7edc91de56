"""From encoded images to predictions: which version answers, decoding, batches.

Imports ``registry`` and small modules of the service (settings, malloc, the server's protocol, the
shadow's client). Knows no HTTP.
"""
