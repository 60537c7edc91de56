"""Follows what is deployed, loads it beside what serves, proves it, and switches.

Imports ``service.inference``, and knows no HTTP.
"""
