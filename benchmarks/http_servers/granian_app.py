"""The service's application for Granian, with two additions that gunicorn does not need.

``service/gunicorn.conf.py`` prepares a worker's heap; here the factory does it. Granian 2.8 reads
status and headers before it iterates an answer, although PEP 3333 tells servers not to assume that
the application has called ``start_response`` by then. Our application calls it in the first
iteration, so Granian would send every answer as a 200 without headers. ``gathered`` therefore
iterates first.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from service import create_app
from service.memory import share_heap

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication


def create() -> "WSGIApplication":
    """The application of one worker."""
    share_heap()
    return gathered(create_app())


def gathered(application: "WSGIApplication") -> "WSGIApplication":
    """``application``, changed to iterate its answer completely and return it as a list."""

    def answer(environ: dict[str, Any], start_response: "StartResponse") -> Iterable[bytes]:
        body = application(environ, start_response)
        try:
            return list(body)
        finally:
            if hasattr(body, "close"):
                body.close()

    return answer
