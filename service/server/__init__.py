"""An HTTP/1.1 server as a gunicorn worker: one loop, and threads for slow requests.

It knows nothing about images or models. The application decides which requests run in the loop.
"""
