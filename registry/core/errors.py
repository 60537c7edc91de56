"""The errors that Convoy's own rules raise. They carry facts and know no HTTP.

``service/http/problems.py`` has the table that turns them into answers;
``registry/control/state.py`` has that of the control plane.
"""

import re


class ConvoyError(Exception):
    """Base of every error that is somebody's to understand: its text is fit to be shown."""

    @classmethod
    def title(cls) -> str:
        """The kind of error in words: ``model not found``."""
        return re.sub(r"(?<!^)(?=[A-Z])", " ", cls.__name__).lower()


class InvalidImage(ConvoyError):
    """The bytes claim to be an image of an accepted type but cannot be decoded."""


class UnsupportedImageType(ConvoyError):
    """The bytes are not an image of an accepted type."""


class UnsupportedEncoding(ConvoyError):
    """The body is compressed, and bodies are read as they are."""


class ImageTooLarge(ConvoyError):
    """The image has more bytes, more pixels or a longer aspect than is allowed."""


class Overloaded(ConvoyError):
    """Too many wait already; trying again after ``retry_after_s`` seconds may succeed."""

    def __init__(self, text: str, retry_after_s: int = 1) -> None:
        super().__init__(text)
        self.retry_after_s = retry_after_s


class RateExceeded(Overloaded):
    """This caller asks more often than it may; ``retry_after_s`` as in ``Overloaded``."""


class TokenMissing(ConvoyError):
    """The caller has not said who it is, or is not known."""


class TokenInsufficient(ConvoyError):
    """The caller is known, and may not do this."""


class TokensUnavailable(ConvoyError):
    """Nobody's key can be checked now, which is not the caller's fault."""


class DeadlineExceeded(ConvoyError):
    """The work was not started within its time."""


class ModelNotFound(ConvoyError):
    """No model of that name is known here."""


class VersionNotFound(ConvoyError):
    """The model is known, but not that version or alias of it."""


class ModelNotReady(ConvoyError):
    """The model is configured but no version of it is loaded yet."""


class BundleInvalid(ConvoyError):
    """A bundle is damaged, incomplete, of another schema, or does not score as it was published."""


class DeviceUnavailable(ConvoyError):
    """The device that was asked for by name cannot run a kernel."""


class DeviceOutOfMemory(ConvoyError):
    """A forward pass did not fit the device's memory; a smaller one may."""


class DeviceLost(ConvoyError):
    """The device failed in a way that this process cannot recover from."""


class PlanUndecided(ConvoyError):
    """No plan was chosen for this version on this machine yet; that takes a while."""


class NetworkImpossible(ConvoyError):
    """No network can be built from these arguments for this input shape.

    ``suggestion`` is an argument that could be, ``pool_size=2,1``, or empty.
    """

    def __init__(self, text: str, suggestion: str = "") -> None:
        super().__init__(text)
        self.suggestion = suggestion


class RegistryUnavailable(ConvoyError):
    """The registry cannot be reached, or speaks another version of its schema."""


class PromotionRefused(ConvoyError):
    """The gate found the challenger worse than the champion, or the two cannot be compared."""


class PromotionConflict(ConvoyError):
    """The champion is not the one that was expected: somebody else has moved it."""


class UsageError(ConvoyError):
    """What the user asked for cannot be done with what is there; the text says what could be."""
