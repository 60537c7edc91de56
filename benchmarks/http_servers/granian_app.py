"""The service's application for Granian, which needs two things of its caller that gunicorn's do.

``service/gunicorn.conf.py`` prepares a worker's heap; here the factory does. And Granian 2.8 reads
status and headers before it iterates an answer, though PEP 3333 tells servers not to assume that
``start_response`` was called by then. Ours calls it in the first iteration, so that Granian would
send every answer as a 200 without headers. ``gathered`` iterates first.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from service import create_app
from service.malloc import share_heap

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication


def create() -> "WSGIApplication":
    """The application of one worker."""
    share_heap()
    return gathered(create_app())


def gathered(application: "WSGIApplication") -> "WSGIApplication":
    """``application``, iterated before its answer is returned, as a list."""

    def answer(environ: dict[str, Any], start_response: "StartResponse") -> Iterable[bytes]:
        body = application(environ, start_response)
        try:
            return list(body)
        finally:
            if hasattr(body, "close"):
                body.close()

    return answer
