"""Problem JSON (RFC 9457): the body of every HTTP error of Convoy."""

from typing import Any

import msgspec
from flask import Response
from msgspec import Struct
from werkzeug.exceptions import HTTPException


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was wrong with a request. ``error`` repeats ``detail`` for OIP clients."""

    type: str
    title: str
    status: int
    detail: str
    error: str
    request_id: str | None = None

    @classmethod
    def of(cls, status: int, title: str, detail: str, request_id: str | None = None) -> "Problem":
        """A problem whose ``type`` is a URN with the ``title`` in lower case."""
        return cls(
            type=f"urn:convoy:problem:{title.replace(' ', '-').lower()}",
            title=title,
            status=status,
            detail=detail,
            error=detail,
            request_id=request_id,
        )

    def answer(self, error: Exception | None = None) -> Response:
        """The HTTP response. For 405 it lists the allowed methods, if ``error`` has them."""
        response = Response(
            msgspec.json.encode(self), self.status, mimetype="application/problem+json"
        )
        if isinstance(error, HTTPException) and self.status == 405:
            response.headers["Allow"] = ", ".join(getattr(error, "valid_methods", None) or ())
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response


def responses(codes: dict[str, str]) -> dict[str, Any]:
    """OpenAPI response objects for status → description, each with a problem as its body."""
    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {code: {"description": text, "content": problem} for code, text in codes.items()}
