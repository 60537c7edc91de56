"""``Client``: waits for each answer. ``AsyncClient`` has the same methods for asyncio."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event
from typing import Self

import httpx

from convoy_client.errors import ConvoyError, Overloaded, ServiceUnreachable, Timeout, Unavailable
from convoy_client.exchange import (
    DEFAULT_URL,
    Call,
    Endpoint,
    Reply,
    checked_concurrency,
    connection_limits,
    failure_of_transport,
    metadata_path,
    model_path,
)
from convoy_client.images import ImageInput, encoded
from convoy_client.results import (
    Classification,
    Failure,
    Metadata,
    Model,
    ModelDetails,
    Result,
    read_classification,
    read_metadata,
    read_model,
    read_models,
)
from convoy_client.retries import SYSTEM_CLOCK, Attempts, Clock, RetryPolicy


def _wait(seconds: float, ended: Event) -> None:
    """Wait for ``seconds``, or until ``ended`` is set."""
    ended.wait(seconds)


class _Connection:
    """Sends requests to one service, each as often as the policy allows."""

    def __init__(
        self,
        http: httpx.Client,
        url: str,
        policy: RetryPolicy,
        sleep: Callable[[float, Event], object],
    ) -> None:
        self.http = http
        self._url = url
        self._policy = policy
        self._sleep = sleep

    def send(self, call: Call, ended: Event | None = None) -> Reply:
        """The answer to ``call``; raises ``ConvoyError``. Retries end when ``ended`` is set."""
        ended = ended or Event()
        attempts = self._policy.begin(self._url)
        while True:
            try:
                return self.send_once(call, attempts)
            except ConvoyError as failure:
                wait_s = attempts.wait_after_s(failure)
                self._sleep(wait_s, ended)
                if ended.is_set():
                    raise

    def send_once(self, call: Call, attempts: Attempts | None = None) -> Reply:
        """Like ``send``, without a retry."""
        current = (attempts or self._policy.begin(self._url)).begin_try()
        try:
            with self.http.stream(
                call.method,
                call.url,
                content=call.body,
                headers=call.headers,
                timeout=current.timeout_s,
            ) as response:
                current.begin_body(response.headers)
                for chunk in response.iter_bytes():
                    current.add(chunk)
                return current.reply(response.status_code, response.headers)
        except httpx.RequestError as error:
            raise failure_of_transport(error, self._url) from error


class Client:
    """A client of one Convoy service. Safe to use from several threads at once.

    Close it, or use it as a context manager, to close its connections.
    """

    def __init__(  # noqa: PLR0913 - keywords that most callers leave out
        self,
        url: str = DEFAULT_URL,
        *,
        token: str | None = None,
        timeout_s: float = 30.0,
        deadline_s: float = 60.0,
        retries: int = 4,
        concurrency: int = 8,
        transport: httpx.BaseTransport | None = None,
        clock: Clock = SYSTEM_CLOCK,
        sleep: Callable[[float, Event], object] = _wait,
    ) -> None:
        """Connect at the first request, not now.

        Args:
            url: address of the service; a path of a proxy may follow the host.
            token: sent with each request; None means the variable ``CONVOY_TOKEN``, if it is set.
            timeout_s: seconds for one try of a request. A server that sends the headers of its
                answer in small parts can exceed it: only ``AsyncClient`` ends that.
            deadline_s: seconds for all tries of a request and the waits between them.
            retries: how often a request is sent again after a transient failure: no connection,
                a broken connection, a time-out, and status 429, 502, 503 or 504.
            concurrency: how many pictures ``classify_many`` sends at once.
            transport: sends the requests instead of the network, for tests.
            clock: gives the time and random numbers; tests pass their own.
            sleep: waits for some seconds, or until an event is set; tests pass their own.

        Raises:
            ValueError: an argument cannot be used; the message says what would work.
        """
        self._endpoint = Endpoint(url, token)
        self._concurrency = checked_concurrency(concurrency)
        http = httpx.Client(
            transport=transport,
            limits=connection_limits(concurrency),
            # A proxy that the environment names cannot reach this machine's own addresses.
            trust_env=not self._endpoint.is_local,
        )
        policy = RetryPolicy(timeout_s, deadline_s, retries, clock)
        self._connection = _Connection(http, url, policy, sleep)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._connection.http.close()

    def classify(
        self,
        image: ImageInput,
        *,
        model: str | None = None,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 5,
        session: str | None = None,
    ) -> Classification:
        """Classify one picture.

        Args:
            image: a path, the bytes of an encoded picture, a uint8 array (H, W), (H, W, 1) or
                (H, W, 3), or a PIL image.
            model: its name; None for the service's default model.
            version: the number of the version to ask.
            alias: the alias of the version to ask, instead of ``version``.
            top_k: how many classes to answer with, 1 to 10,000.
            session: during a canary, requests of one session get the same version.

        Raises:
            ConvoyError: one of its subclasses says why there is no classification.
            ValueError: ``model``, ``version``, ``alias`` and ``session`` cannot be sent together.
        """
        return self._classify(image, model_path(model, version, alias), top_k, session)

    def classify_many(
        self,
        images: Iterable[ImageInput],
        *,
        model: str | None = None,
        version: int | None = None,
        alias: str | None = None,
        top_k: int = 5,
        session: str | None = None,
    ) -> Generator[Result, None, None]:
        """Classify pictures, ``concurrency`` at once, and yield one result for each, in order.

        A picture that gets no classification yields a ``Failure`` and does not end the run. At most
        ``concurrency`` pictures are taken from ``images`` before their results are consumed.
        If the caller closes the iterator early, requests that are under way end in the background,
        and none is sent again.

        Args:
            images: pictures as ``classify`` takes them. This thread iterates over them.
            model: as in ``classify``; so are the next four.
            version: the number of the version.
            alias: the alias of the version.
            top_k: how many classes.
            session: the session.

        Raises:
            ValueError: as ``classify``. An error that ``images`` raises ends the run.
        """
        path = model_path(model, version, alias)
        self._endpoint.classify(path, b"", top_k, session)  # raises before the first picture
        return self._results(images, path, top_k, session)

    def models(self) -> tuple[Model, ...]:
        """All models of the service, the default model first; raises ``ConvoyError``."""
        return read_models(self._connection.send(self._endpoint.get("/v1/models")).body)

    def model(
        self, name: str, *, version: int | None = None, alias: str | None = None
    ) -> ModelDetails:
        """One version that serves; without ``version`` and ``alias``, the champion.

        Raises:
            ConvoyError: the service does not serve it, or the request fails.
        """
        path = model_path(name, version, alias)
        return read_model(self._connection.send(self._endpoint.get(path)).body)

    def metadata(self, name: str, *, version: int | None = None) -> Metadata:
        """Labels and plan of one version that serves; without ``version``, of the champion.

        A token that may only classify is enough, while ``model`` needs one that may view.

        Raises:
            ConvoyError: the service does not serve it, or the request fails.
        """
        call = self._endpoint.get(metadata_path(name, version))
        return read_metadata(self._connection.send(call).body)

    def ready(self) -> bool:
        """Whether the service can classify now; asked once, without a retry.

        Raises:
            ConvoyError: a server answers at this URL, and it is not a Convoy service.
        """
        try:
            self._connection.send_once(self._endpoint.get("/readyz"))
        except (Overloaded, ServiceUnreachable, Timeout, Unavailable):
            return False
        return True

    def _results(
        self, images: Iterable[ImageInput], path: str, top_k: int, session: str | None
    ) -> Generator[Result, None, None]:
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="convoy-client")
        waiting: deque[Future[Result]] = deque()
        ended = Event()

        def result(image: ImageInput) -> Result:
            try:
                return self._classify(image, path, top_k, session, ended)
            except ConvoyError as error:
                return Failure(error)

        try:
            for image in images:
                waiting.append(pool.submit(result, image))
                del image  # the window alone decides how many pictures are in memory
                while waiting and (len(waiting) >= self._concurrency or waiting[0].done()):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            ended.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _classify(
        self,
        image: ImageInput,
        path: str,
        top_k: int,
        session: str | None,
        ended: Event | None = None,
    ) -> Classification:
        call = self._endpoint.classify(path, encoded(image), top_k, session)
        return read_classification(self._connection.send(call, ended).body)
