"""Three parts of our HTTP server, each alone: what it saves, or what it prevents.

``python -m benchmarks.http_server_parts`` measures; nothing but it uses this folder.
"""
