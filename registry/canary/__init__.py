"""How versions do on real traffic, and what ends a canary that does badly.

Imports ``core``, ``model``, ``store`` and ``promotion``. ``traffic_stats`` is light: the service
fills it.
"""
