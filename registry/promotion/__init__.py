"""Whether a challenger may become champion, and what makes it so.

Imports ``core``, ``model`` and ``store``, and knows no HTTP and no canary.
"""
