"""Follows the deployment, loads its versions while the old ones serve, checks them, and switches.

Imports ``service.inference``. Must not know HTTP.
"""
