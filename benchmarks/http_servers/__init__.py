"""The application behind our HTTP server, gunicorn's gthread and Granian, one beside the other.

``python -m benchmarks.http_servers`` measures; nothing but it uses this folder.
"""
