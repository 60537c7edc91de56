"""Addresses of pages and files, relative to the page that is being shown.

A proxy may serve the control plane below a path of its own, and take that off before it asks: what
begins with a slash would then leave it.
"""

from typing import Any

import flask
from flask import request


def url_for(endpoint: str, **values: Any) -> str:
    """Flask's address of ``endpoint``, relative to that of the request."""
    return relative(flask.url_for(endpoint, **values).removeprefix(request.script_root))


def relative(path: str) -> str:
    """``path``, which begins with a slash, relative to the address of the request."""
    up = request.path.count("/") - 1
    return "../" * up + path.lstrip("/") or "./"
