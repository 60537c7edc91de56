"""The WSGI application that answers the classification requests of every protocol.

It stands in front of Flask, because for a 28×28 image Flask's own work costs more than decoding and
the network together (docs/decisions/0007). It works in two parts. When the server calls it, the
pipeline decodes and queues the images. When the server iterates over its answer, it waits for the
predictions.
"""

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Protocol

from flask import Response
from msgspec import Struct
from msgspec.structs import replace
from werkzeug.exceptions import MethodNotAllowed

from service.http.openapi import Operation
from service.http.recording import MAX_NAME_CHARACTERS, RouteTemplates, finished
from service.http.request_context import answer_headers, identify
from service.inference.requests import ImageStream, Job, Result, Target
from service.inference.requests import Request as PipelineRequest
from service.observability.request_record import FinishedRequest
from service.server.protocol import IN_LOOP, WAITING, Postpone
from service.state import State

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

# In a request's environment, when it arrived. The server calls the application a second time for a
# postponed request; this key keeps it from being counted twice.
CALLED = "convoy.called"
# How many paths are remembered. One has at most 4 KB (gunicorn's ``limit_request_line``).
MAX_KNOWN_PATHS = 256


class HttpAnswer(Struct, frozen=True):
    """What a protocol answers to a request that succeeded; ``headers`` are further headers."""

    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


class ProtocolRequest(ImageStream, Protocol):
    """One request of a protocol: its images, whose iteration reads the body, and its answer."""

    def write(self, result: Result, request_id: str) -> HttpAnswer:
        """The answer that the client gets."""


class InferenceProtocol(Protocol):
    """Translates between the bytes of one protocol and the pipeline; decides nothing."""

    name: str
    """The protocol's name in the metrics."""
    methods: tuple[str, ...]
    operations: tuple[Operation, ...]
    """The protocol's part of the OpenAPI description."""

    def match(self, path: str) -> Target | None:
        """The target that ``path`` names; None if it is not a path of this protocol."""

    def read(self, environ: "WSGIEnvironment") -> ProtocolRequest:
        """The request of ``environ``, before its body is read.

        Raises:
            HTTPException: the request is malformed.
        """

    def refuse(self, error: Exception, request_id: str) -> Response:
        """The answer to a request that failed with ``error``."""


class InferenceApp:
    """Answers the requests of ``protocols``, and passes every other request to ``app``."""

    def __init__(
        self,
        app: "WSGIApplication",
        state: State,
        protocols: Sequence[InferenceProtocol],
        probes: Collection[str],
    ) -> None:
        """``probes`` are the paths of ``app`` that the server's loop answers itself."""
        self._app = app
        self._state = state
        # Many requests for other routes must not delay these.
        self._probes = probes
        self._session = state.settings.session_variable
        operations = [each for protocol in protocols for each in protocol.operations]
        others = filter(None, [state.settings.predict_route])
        routes = RouteTemplates(operations, others)
        # Most clients send the same path again and again.
        self._match = lru_cache(MAX_KNOWN_PATHS)(partial(_match, protocols, routes))

    def __call__(
        self, environ: "WSGIEnvironment", start_response: "StartResponse"
    ) -> Iterable[bytes]:
        """Submit the images of a classification request; iterating over the answer waits for them.

        Every error of such a request becomes an answer in problem JSON. Other requests go to the
        next application.

        Raises:
            Postpone: the loop called this, and the request takes too long to answer there.
        """
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        found = self._match(path)
        if found is None:
            is_probe = path in self._probes and method in ("GET", "HEAD")
            if IN_LOOP in environ and not is_probe:
                raise Postpone(background=True)
            return self._app(environ, start_response)
        call = _Call(self._state, found, environ)
        try:
            call.submit(environ.get(self._session))
        except Postpone:
            raise
        except Exception as error:  # noqa: BLE001 - the edge of a request: every error is an answer
            return call.refuse(error, start_response)
        return call.answer(start_response)


class _Match(Struct, frozen=True):
    """What a path means: ``route`` is its template, such as ``/v1/models/{name}/classify``."""

    protocol: InferenceProtocol
    target: Target
    route: str | None


def _match(
    protocols: Sequence[InferenceProtocol], routes: RouteTemplates, path: str
) -> _Match | None:
    for protocol in protocols:
        if target := protocol.match(path):
            return _Match(protocol, target, routes.find(path))
    return None


class _Call:
    """One classification request: ``submit`` is the first part, ``answer`` the second.

    It has many attributes because both parts need what the first has found out.
    """

    def __init__(self, state: State, found: _Match, environ: "WSGIEnvironment") -> None:
        self._arrived_at = time.perf_counter()
        self._state = state
        self._protocol = found.protocol
        self._target = found.target
        self._route = found.route
        self._environ = environ
        self._id = identify(environ)
        self._request: ProtocolRequest | None = None
        self._job: Job | None = None

    def submit(self, session: str | None) -> None:
        """Admit the request, and queue its images.

        Raises:
            Postpone: the request is too slow for the server's loop.
            Exception: any error; the caller must answer it with ``refuse``.
        """
        environ = self._environ
        if environ["REQUEST_METHOD"] not in self._protocol.methods:
            raise MethodNotAllowed(self._protocol.methods)
        self._state.access_control.admit(environ, again=CALLED in environ)
        started = environ.setdefault(CALLED, self._arrived_at)
        self._request = self._protocol.read(environ)
        self._job = Job(
            PipelineRequest(
                images=self._request,
                protocol=self._protocol.name,
                target=self._target,
                session=session,
                loop_bytes=environ.get(IN_LOOP),
                waiting=environ.get(WAITING, 0),
                started=started,
            )
        )
        self._state.pipeline.submit(self._job)

    def answer(self, start_response: "StartResponse") -> Iterator[bytes]:
        """Wait for the predictions, and yield the body; starts when it is first iterated."""
        job, request = self._job, self._request
        assert job is not None
        assert request is not None
        try:
            answer = self._state.pipeline.finish(job, lambda found: request.write(found, self._id))
        except Exception as error:  # noqa: BLE001 - the edge of a request: every error is an answer
            yield from self.refuse(error, start_response)
            return
        headers = [
            ("Content-Type", answer.content_type),
            ("Content-Length", str(len(answer.body))),
            *answer.headers,
            *answer_headers(self._id, self._version),
        ]
        start_response("200 OK", headers)
        self._record(200, len(answer.body))
        yield answer.body

    def refuse(self, error: Exception, start_response: "StartResponse") -> Iterable[bytes]:
        """Count ``error`` in the metrics, and answer with it."""
        name, protocol = self._target.name, self._protocol
        self._state.pipeline.refuse(name, self._version, protocol.name, error)
        response = protocol.refuse(error, self._id)
        error.__traceback__ = None  # its frames hold the request's body, and may hold the error
        response.headers.update(answer_headers(self._id, self._version))
        self._record(response.status_code, response.content_length or 0, error)
        method = self._environ["REQUEST_METHOD"]
        return response({"REQUEST_METHOD": method}, start_response)

    @property
    def _version(self) -> int | None:
        """The version that the pipeline chose; None before that."""
        served = self._job.served if self._job else None
        return served.version if served else None

    def _record(self, status: int, response_bytes: int, error: Exception | None = None) -> None:
        """Record this request, whose answer is made, if it is sampled or all are logged."""
        if (recorder := self._state.recorder) is None:
            return

        def describe() -> FinishedRequest:
            environ, route, name = self._environ, self._route, self._target.name
            started = environ.get(CALLED, self._arrived_at)
            return replace(
                finished(environ, self._id, route, started, status, response_bytes, error),
                protocol=self._protocol.name,
                model_name=name and name[:MAX_NAME_CHARACTERS],
            )

        recorder.record(self._environ, self._id, self._job, describe)
