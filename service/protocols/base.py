"""What every protocol is answered by: a WSGI application before Flask, over the pipeline.

The routes that classify are hot, so they stand before Flask and not in it: on a 28×28 picture
Flask's own machinery costs more than decoding and the network together (docs/decisions/0007). The
application does its work in two parts. Called, it has the pipeline decode and queue the images;
iterated, it waits for their scores and answers.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct
from werkzeug.exceptions import MethodNotAllowed

from service.http import problems
from service.http.openapi import Operation
from service.http.request_context import answer_headers, identify
from service.inference.pipeline import Images, Job, Result
from service.inference.pipeline import Request as PipelineRequest
from service.server.protocol import IN_LOOP, WAITING, Postpone
from service.state import State

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger(__name__)

# The loop answers these itself, so that no crowd on other routes holds them up.
PROBES = {"/livez", "/readyz", "/healthz"}
# When a request came: one that was postponed comes twice, and is counted once.
CALLED = "convoy.called"


class Target(Struct, frozen=True):
    """The model, and perhaps the version, that a path names; None is the default."""

    name: str | None = None
    version: int | None = None
    alias: str | None = None


class InferenceProtocol(Protocol):
    """Translates between the bytes of one protocol and the pipeline; decides nothing."""

    methods: tuple[str, ...]
    operations: tuple[Operation, ...]
    """For the description of the service."""

    def match(self, path: str) -> Target | None:
        """What ``path`` names, if it is a path of this protocol."""

    def read(self, environ: "WSGIEnvironment") -> tuple[Images, int]:
        """The images of a request, and how many classes each is answered with.

        Raises:
            HTTPException: the request is malformed.
        """

    def write(self, result: Result, request_id: str) -> bytes:
        """The body of the answer, JSON."""


class InferenceApp:
    """Answers the requests of ``protocols``, and gives every other request to ``app``."""

    def __init__(
        self, app: "WSGIApplication", state: State, protocols: Sequence[InferenceProtocol]
    ) -> None:
        self._app = app
        self._state = state
        self._protocols = protocols
        self._session = "HTTP_" + state.settings.sticky_header.upper().replace("-", "_")

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        for protocol in self._protocols:
            if target := protocol.match(path):
                call = _Call(self._state, protocol, target, environ)
                break
        else:
            is_probe = path in PROBES and method in ("GET", "HEAD")
            if IN_LOOP in environ and not is_probe:
                raise Postpone(background=True)
            return self._app(environ, start_response)
        try:
            call.submit(environ.get(self._session))
        except Postpone:
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a request: every error is an answer
            return call.refuse(error, start_response)
        return call.answer(start_response)


class _Call:
    """One request between its two parts."""

    def __init__(
        self,
        state: State,
        protocol: InferenceProtocol,
        target: Target,
        environ: "WSGIEnvironment",
    ) -> None:
        self._came = time.perf_counter()
        self._state = state
        self._protocol = protocol
        self._target = target
        self._environ = environ
        self._id, self._trace_id = identify(environ)
        self._job: Job | None = None
        self._result: Result | None = None

    def submit(self, session: str | None) -> None:
        """The first part; raises whatever is to be answered instead."""
        environ, target = self._environ, self._target
        if environ["REQUEST_METHOD"] not in self._protocol.methods:
            raise MethodNotAllowed(self._protocol.methods)
        self._state.access_control.admit(environ, again=CALLED in environ)
        started = environ.setdefault(CALLED, self._came)
        images, top_k = self._protocol.read(environ)
        self._job = Job(
            PipelineRequest(
                images=images,
                name=target.name,
                version=target.version,
                alias=target.alias,
                session=session,
                top_k=top_k,
                loop_bytes=environ.get(IN_LOOP),
                waiting=environ.get(WAITING, 0),
                started=started,
            )
        )
        self._state.pipeline.submit(self._job)

    def answer(self, start_response: "StartResponse") -> Iterator[bytes]:
        """The second part: it begins when it is first iterated."""
        assert self._job is not None
        try:
            body = self._state.pipeline.finish(self._job, self._write)
        except Exception as error:  # noqa: BLE001 - the edge of a request: every error is an answer
            yield from self.refuse(error, start_response)
            return
        if self._result is not None and log.isEnabledFor(logging.DEBUG):
            self._log(self._result)
        headers = answer_headers(self._id, self._version)
        length = ("Content-Length", str(len(body)))
        start_response("200 OK", [("Content-Type", "application/json"), length, *headers])
        yield body

    def refuse(self, error: Exception, start_response: "StartResponse") -> Iterable[bytes]:
        """Count and answer ``error``."""
        self._state.pipeline.refuse(self._target.name, self._version, error)
        response = problems.answer(error, self._id)
        error.__traceback__ = None  # its frames hold the body, and may hold the error
        response.headers.update(answer_headers(self._id, self._version))
        method = self._environ["REQUEST_METHOD"]
        return response({"REQUEST_METHOD": method}, start_response)

    @property
    def _version(self) -> int | None:
        """The version that was chosen, if one was."""
        served = self._job.served if self._job else None
        return served.version if served else None

    def _write(self, result: Result) -> bytes:
        self._result = result
        return self._protocol.write(result, self._id)

    def _log(self, result: Result) -> None:
        log.debug(
            "classified",
            extra={
                "request_id": self._id,
                "trace_id": self._trace_id,
                "model_name": result.served.name,
                "model_version": result.served.version,
                "images": len(result.images),
                "batch_size": result.batch_size,
                "decode_ms": result.timings_ms.decode,
                "queue_ms": result.timings_ms.queue,
                "forward_ms": result.timings_ms.forward,
            },
        )
