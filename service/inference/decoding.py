"""Pixels of a request's images, within what a worker may spend on decoding."""

from threading import Semaphore

from registry.core.errors import ConvoyError, ImageTooLarge, Overloaded
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.structure import check_parts
from registry.model.manifest import PreprocessSpec
from service.malloc import trim_heap
from service.server.protocol import Postpone
from service.settings import Settings

LARGE_AT_ONCE = 1
LARGE_WAIT_S = 1.0
# Each that waits has one of the worker's threads; so many are left to other requests.
FREE_THREADS = 2


class Decoder:
    """Decodes images; large ones one at a time. Every method may be called from any thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._large = Semaphore(LARGE_AT_ONCE)
        self._large_or_waiting = Semaphore(max(1, settings.threads - FREE_THREADS))

    def decode(
        self, image: bytes | ConvoyError, spec: PreprocessSpec, in_loop: bool
    ) -> Pixels | Exception:
        """Pixels, uint8 (H, W, C), or the reason why the image has none.

        Raises:
            Postpone: the image takes too long for the loop.
        """
        if isinstance(image, ConvoyError):
            return image
        limits = (
            self._settings.loop_decode_limits if in_loop else self._settings.common_decode_limits
        )
        try:
            return decode_image(image, spec, limits)
        except ImageTooLarge as error:
            if in_loop:
                raise Postpone from error
            return self._decode_large(image, spec)
        except ConvoyError as error:
            return _without_frames(error)

    def _decode_large(self, image: bytes, spec: PreprocessSpec) -> Pixels | Exception:
        """One at a time, so that large images take neither all memory nor all threads."""
        try:
            # Before it waits: an image that is refused takes no other's place.
            check_parts(image, self._settings.decode_limits)
        except ConvoyError as error:
            return _without_frames(error)
        if not self._large_or_waiting.acquire(blocking=False):
            return Overloaded("too many large images are being decoded")
        try:
            return self._decode_alone(image, spec)
        finally:
            self._large_or_waiting.release()

    def _decode_alone(self, image: bytes, spec: PreprocessSpec) -> Pixels | Exception:
        if not self._large.acquire(timeout=LARGE_WAIT_S):
            return Overloaded("too many large images are being decoded")
        try:
            return decode_image(image, spec, self._settings.decode_limits)
        except ConvoyError as error:
            return _without_frames(error)
        finally:
            trim_heap()  # else the heap keeps what the largest picture took
            self._large.release()


def _without_frames(error: ConvoyError) -> ConvoyError:
    """``error`` to be kept as an image's outcome.

    Its traceback has the frames that hold the request's body and the list of outcomes: in that
    cycle of references, bodies would live until the next garbage collection.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
