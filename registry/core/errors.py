"""The errors that Convoy raises itself. They carry facts and contain nothing about HTTP.

Two tables map them to HTTP answers: ``service/http/problems.py`` for the service,
``registry/control/state.py`` for the control plane.
"""

import re


class ConvoyError(Exception):
    """Base of all errors of Convoy. Their text may be shown to clients and operators."""

    @classmethod
    def title(cls) -> str:
        """The class's name in words: ``model not found``."""
        return re.sub(r"(?<!^)(?=[A-Z])", " ", cls.__name__).lower()


class InvalidImage(ConvoyError):
    """The bytes begin like an image of an accepted type, but cannot be decoded."""


class InvalidTensor(ConvoyError):
    """The form of a picture that the client has decoded is not the one that the version takes."""


class UnsupportedImageType(ConvoyError):
    """The bytes are not an image of an accepted type."""


class UnsupportedEncoding(ConvoyError):
    """The request's body is compressed; the service decompresses no bodies."""


class ImageTooLarge(ConvoyError):
    """The image has more bytes or pixels, or a longer aspect, than the limits allow."""


class Overloaded(ConvoyError):
    """Too many requests wait already. A retry after ``retry_after_s`` seconds may succeed."""

    def __init__(self, text: str, retry_after_s: int = 1) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class RateExceeded(Overloaded):
    """This client is over its rate limit; ``retry_after_s`` as in ``Overloaded``."""


class TokenMissing(ConvoyError):
    """The client sent no token, or an unknown one."""


class TokenInsufficient(ConvoyError):
    """The client's token is known, but its role does not permit this."""


class TokensUnavailable(ConvoyError):
    """Tokens cannot be checked now. The fault is the server's, not the client's."""


class DeadlineExceeded(ConvoyError):
    """The work did not start before its deadline."""


class ModelNotFound(ConvoyError):
    """There is no model of that name here."""


class VersionNotFound(ConvoyError):
    """The model exists, but it has no such version or alias."""


class ModelNotReady(ConvoyError):
    """The model is configured but no version of it is loaded yet."""


class BundleInvalid(ConvoyError):
    """A bundle is damaged, incomplete, of another schema, or does not give its published scores."""


class ReferenceDiffers(ConvoyError):
    """An imported model does not answer as its owner's reference says."""


class DeviceUnavailable(ConvoyError):
    """The device that the user named cannot run a kernel."""


class DeviceOutOfMemory(ConvoyError):
    """A forward pass did not fit the device's memory; a smaller one may fit."""


class DeviceLost(ConvoyError):
    """The device failed in a way that this process cannot recover from."""


class PlanUndecided(ConvoyError):
    """No plan has been chosen for this version on this machine yet; choosing takes a while."""


class NetworkImpossible(ConvoyError):
    """No network can be built from these arguments for this input shape.

    ``suggestion`` is an argument that would work, such as ``pool_size=2,1``, or empty.
    """

    def __init__(self, text: str, suggestion: str = "") -> None:
        super().__init__(text)
        self.suggestion = suggestion


class RegistryUnavailable(ConvoyError):
    """The registry cannot be reached, or its database has another schema version."""


class PromotionRefused(ConvoyError):
    """The gate found the challenger worse than the champion, or the two cannot be compared."""


class PromotionConflict(ConvoyError):
    """The champion is not the expected version: somebody else has changed it."""


class UsageError(ConvoyError):
    """The user's request cannot be carried out; the text says what would work instead."""
