"""``Cors``: lets web pages of the origins that an operator listed send requests to this service.

Follows the Fetch standard, section 3.3 (CORS protocol). Credentials are never allowed: the service
sets no cookies, and a page sends a token that it knows in ``Authorization``.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

MAX_AGE_S = 600
METHODS = "GET, POST, PUT"
EXPOSED = "X-Request-Id, X-Model-Version, Retry-After"


class Cors:
    """Answers preflight requests of ``origins``, and adds CORS headers to answers of ``app``."""

    def __init__(self, app: "WSGIApplication", origins: Iterable[str], sticky_header: str) -> None:
        self._app = app
        self._origins = frozenset(origins)
        self._request_headers = (
            f"Authorization, Content-Type, X-Request-Id, traceparent, {sticky_header}"
        )

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Answer a preflight request with 204; pass every other request to the application.

        A listed origin gets the CORS headers with the application's answer. Other origins get
        none, and their preflight requests go to the application like any request.
        """
        origin = environ.get("HTTP_ORIGIN")
        cors_headers = [("Vary", "Origin")]
        if origin not in self._origins:
            origin = None
        else:
            cors_headers += [
                ("Access-Control-Allow-Origin", str(origin)),
                ("Access-Control-Expose-Headers", EXPOSED),
            ]
        names_method = "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        if origin and names_method and environ["REQUEST_METHOD"] == "OPTIONS":
            start_response(
                "204 No Content",
                [
                    *cors_headers,
                    ("Access-Control-Allow-Methods", METHODS),
                    ("Access-Control-Allow-Headers", self._request_headers),
                    ("Access-Control-Max-Age", str(MAX_AGE_S)),
                ],
            )
            return ()

        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            return start_response(status, [*headers, *cors_headers], *error)

        return self._app(environ, start)
