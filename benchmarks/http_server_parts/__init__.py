"""Measures three parts of our HTTP server separately: what each saves or prevents.

``python -m benchmarks.http_server_parts`` measures; no other program uses this folder.
"""
