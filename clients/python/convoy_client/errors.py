"""The errors of the client, by what a caller can do about them."""


class ConvoyError(Exception):
    """Base of all errors that a service's answer, or a missing answer, causes.

    Attributes:
        detail: what was wrong, for a person to read.
        status: the HTTP status; None if there was no answer.
        request_id: the id of the request in the service's log; None if there was no answer.
        retry_after_s: how long the service asks clients to wait; None if it does not say.
        is_transient: whether the same request may succeed a moment later. The client has already
            repeated such a request as often as its settings allow.
    """

    is_transient = False

    def __init__(
        self,
        detail: str,
        *,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.status = status
        self.request_id = request_id
        self.retry_after_s: float | None = None


class InvalidImage(ConvoyError):
    """This picture cannot be read, encoded or decoded, or is too large. Others may succeed."""


class InvalidRequest(ConvoyError):
    """The service does not accept the request, for example ``top_k=0``."""


class Unauthorized(ConvoyError):
    """The service asks for a token, and the client sent none or an unknown one."""


class Forbidden(ConvoyError):
    """The token's role does not permit this request."""


class NotFound(ConvoyError):
    """The service has no such model, version or alias, or the URL is not that of a service."""


class Overloaded(ConvoyError):
    """The service has too much work, or this client is over its rate."""

    is_transient = True


class Unavailable(ConvoyError):
    """No version is loaded yet, or a proxy found no replica that answers."""

    is_transient = True


class Timeout(ConvoyError):
    """The answer did not come in time, or the service did not start the work in time."""

    is_transient = True


class ServiceUnreachable(ConvoyError):
    """No connection to the service could be made, or it broke before the answer was complete."""

    is_transient = True


class ServerError(ConvoyError):
    """A defect of the service. Its operator finds ``request_id`` in the log."""


class InvalidAnswer(ConvoyError):
    """The answer is not one of a Convoy service: is the URL right?"""
