"""``HttpSource``: a running service answers the pictures."""

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import convoy_client
from convoy.classify.inputs import ReadPicture
from convoy.classify.rows import Answer
from convoy_client import Classification, Client, Failure
from registry.core.errors import UsageError
from registry.model.manifest import ClassScore

# (retries, deadline_s) of a picture in a run into a file: if the service restarts, or limits the
# rate, the run only pauses.
PATIENT = (100, 120.0)
# (retries, deadline_s) of all other requests: a user waits for them at the terminal.
BRIEF = (2, 30.0)
# The next picture would get these errors, too.
FATAL = (
    convoy_client.Unauthorized,
    convoy_client.Forbidden,
    convoy_client.NotFound,
    convoy_client.InvalidAnswer,
)


class HttpSource:
    """Asks one service, several pictures at once, and answers in order."""

    def __init__(
        self, client: Client, brief: Client, model: str | None, top_k: int, *, is_bulk: bool
    ) -> None:
        """Ask one service through two clients; the caller closes them.

        Args:
            client: sends the pictures, and asks for their plans.
            brief: sends all other requests, and gives up soon.
            model: its name; None for the service's default model.
            top_k: how many classes to ask for.
            is_bulk: whether the answers name their plan, which needs further requests.
        """
        self._client = client
        self._brief = brief
        self._model = self._expected = model
        self._top_k = top_k
        self._is_bulk = is_bulk
        self._plans: dict[tuple[str, int], str] = {}
        self._answering: set[int | None] | None = None

    def check(self) -> str | None:
        """The model that will answer.

        With a token that may only classify, it is None if the caller named no model.

        Raises:
            UsageError: the service cannot be reached, does not know the model or token, or has no
                version loaded.
        """
        try:
            name = self._model or self._brief.models()[0].name
            details = self._brief.model(name)
        except convoy_client.Forbidden:
            return self._model
        except convoy_client.ConvoyError as error:
            raise _usage_error(error) from error
        except IndexError as error:
            raise UsageError("the service has no model") from error
        canary = details.canary
        self._answering = {details.version, canary.version if canary and canary.share else None}
        self._expected = name
        return name

    def class_count(self, model: str, version: int) -> int | None:
        """How many classes a version has; None if it is neither the champion nor a canary.

        With a token that may only classify, a shadow counts as a canary.

        Raises:
            UsageError: the service does not answer.
        """
        if self._answering is not None and version not in self._answering:
            return None
        try:
            return len(self._brief.metadata(model, version=version).labels)
        except convoy_client.NotFound:
            return None
        except convoy_client.ConvoyError as error:
            raise _usage_error(error) from error

    def answers(
        self, pictures: Iterable[ReadPicture]
    ) -> Iterator[tuple[ReadPicture, Answer | str]]:
        """Each picture with its answer, or with the text of an error.

        Raises:
            UsageError: no further picture would be answered.
        """
        waiting: deque[ReadPicture] = deque()

        def contents() -> Iterator[bytes]:
            for picture in pictures:
                waiting.append(picture._replace(content=b""))
                yield picture.content  # if it has none, the client reports that and sends nothing

        results = self._client.classify_many(contents(), model=self._model, top_k=self._top_k)
        for result in results:
            picture = waiting.popleft()
            if picture.problem:
                yield picture, picture.problem
            elif isinstance(result, Failure):
                self._check_fatal(result.error)
                yield picture, result.error.detail
            else:
                yield picture, self._answer(result)

    def _check_fatal(self, error: convoy_client.ConvoyError) -> None:
        """Raise ``UsageError`` if the next picture would fail, too."""
        if isinstance(error, FATAL) or (error.is_transient and not self._is_ready()):
            raise _usage_error(error) from error

    def _is_ready(self) -> bool:
        try:
            return self._brief.ready()
        except convoy_client.ConvoyError:  # another server answers at this address now
            return False

    def _answer(self, found: Classification) -> Answer:
        if self._expected not in (None, found.model):
            raise UsageError(
                f"the service answered for the model {found.model!r}, not {self._expected!r}"
            )
        return Answer(
            model=found.model,
            version=found.version,
            alias=found.alias,
            plan=self._plan(found.model, found.version) if self._is_bulk else "",
            predictions=tuple(
                ClassScore(each.label, each.index, each.probability) for each in found.predictions
            ),
            request_id=found.request_id,
            timings_ms=dict(found.timings_ms),
        )

    def _plan(self, model: str, version: int) -> str:
        """The plan that runs a version, read once; empty if the version no longer serves.

        Raises:
            UsageError: the service does not answer.
        """
        if (model, version) not in self._plans:
            try:
                plan = self._client.metadata(model, version=version).plan
            except convoy_client.ConvoyError as error:
                if error.is_transient:
                    raise _usage_error(error) from error
                plan = ""
            self._plans[model, version] = plan
        return self._plans[model, version]


@contextmanager
def open_http(
    url: str, model: str | None, top_k: int, concurrency: int, *, is_bulk: bool
) -> Iterator[HttpSource]:
    """A source that asks the service at ``url``; see ``HttpSource``.

    Raises:
        UsageError: the address, the token or ``concurrency`` cannot be used.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs each request at INFO
    with (
        _client(url, concurrency, PATIENT if is_bulk else BRIEF) as client,
        _client(url, 1, BRIEF) as brief,
    ):
        yield HttpSource(client, brief, model, top_k, is_bulk=is_bulk)


def _usage_error(error: convoy_client.ConvoyError) -> UsageError:
    """The error that ends the run."""
    if isinstance(error, convoy_client.Unauthorized):
        return UsageError(f"{error.detail}; this command sends the token in CONVOY_TOKEN")
    return UsageError(error.detail)


def _client(url: str, concurrency: int, limits: tuple[int, float]) -> Client:
    retries, deadline_s = limits
    try:
        return Client(url, concurrency=concurrency, retries=retries, deadline_s=deadline_s)
    except ValueError as error:
        raise UsageError(str(error)) from error
