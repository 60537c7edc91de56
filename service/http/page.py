"""The page at ``/``: a visitor drops pictures and sees the model's predictions."""

from flask import Blueprint, Response, current_app

blueprint = Blueprint("page", __name__)

# The page loads only from this origin. Pictures that the visitor drops are blobs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@blueprint.get("/")
def page() -> Response:
    """The page on which a visitor classifies pictures; it loads only from this origin."""
    response = current_app.send_static_file("index.html")
    response.headers["Content-Security-Policy"] = POLICY
    return response
