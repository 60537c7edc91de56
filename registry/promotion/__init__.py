"""Decides whether a challenger may become champion, and carries decisions out.

Imports ``core``, ``model`` and ``store``. It knows neither HTTP nor canary traffic.
"""
