"""Makes addresses of pages and files relative to the requested page.

A proxy may serve the control plane below a path prefix and strip the prefix before it forwards a
request. An address that starts with a slash would then lead a browser out of the control plane.
"""

from typing import Any

import flask
from flask import request


def url_for(endpoint: str, **values: Any) -> str:
    """Flask's address of ``endpoint``, relative to the request's address."""
    return relative(flask.url_for(endpoint, **values).removeprefix(request.script_root))


def relative(path: str) -> str:
    """``path``, which must start with a slash, relative to the request's address."""
    up = request.path.count("/") - 1
    return "../" * up + path.lstrip("/") or "./"
