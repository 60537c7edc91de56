"""The basics that every package uses: errors, paths, files, names, devices.

Imports nothing else from Convoy. Contains nothing about models, the registry or HTTP routes.
"""
