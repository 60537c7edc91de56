"""What every package needs: errors, paths, files, names, devices.

Imports nothing else of Convoy, and knows no model, registry or HTTP route.
"""
