"""An HTTP/1.1 server as a gunicorn worker: one loop, and threads for what takes long.

Knows nothing of pictures or models: the application tells it what may run in the loop.
"""
