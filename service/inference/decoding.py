"""``Decoder``: pixels of a request's images, within a worker's memory and threads."""

from threading import Semaphore

from registry.core.errors import ConvoyError, ImageTooLarge, Overloaded
from registry.model.image.decode import Pixels, decode_image
from registry.model.image.structure import check_parts
from registry.model.image.tensors import pixels_of
from registry.model.manifest import PreprocessSpec
from service.inference.requests import InputImage
from service.memory import trim_heap
from service.server.protocol import Postpone
from service.settings import Settings

LARGE_AT_ONCE = 1
LARGE_WAIT_S = 1.0
# A large image that waits occupies a thread of the worker; this many stay free for other requests.
FREE_THREADS = 2


class Decoder:
    """Decodes images, large ones one at a time. Any thread may call any method."""

    def __init__(self, settings: Settings) -> None:
        self._limits = settings.decode_limits
        self._common_limits = settings.common_decode_limits
        self._loop_limits = settings.loop_decode_limits
        self._large = Semaphore(LARGE_AT_ONCE)
        self._large_or_waiting = Semaphore(max(1, settings.threads - FREE_THREADS))

    def decode(
        self, image: InputImage | ConvoyError, spec: PreprocessSpec, in_loop: bool
    ) -> Pixels | Exception:
        """The image's pixels, uint8 (H, W, C), or the error that it has instead.

        Raises:
            Postpone: the caller is the loop, and the image is too large to decode there.
        """
        if isinstance(image, ConvoyError):
            return image
        limits = self._loop_limits if in_loop else self._common_limits
        try:
            if not isinstance(image, bytes):
                return pixels_of(image, spec)
            return decode_image(image, spec, limits)
        except ImageTooLarge as error:
            if in_loop:
                raise Postpone from error
            assert isinstance(image, bytes)
            return self._decode_large(image, spec)
        except ConvoyError as error:
            return _without_frames(error)

    def _decode_large(self, image: bytes, spec: PreprocessSpec) -> Pixels | Exception:
        """As ``decode``, one image at a time: large ones must not take all memory and threads."""
        try:
            # Before waiting: an invalid image must not take the place of another.
            check_parts(image, self._limits)
        except ConvoyError as error:
            return _without_frames(error)
        if not self._large_or_waiting.acquire(blocking=False):
            return Overloaded("too many large images are being decoded; try again later")
        try:
            return self._decode_alone(image, spec)
        finally:
            self._large_or_waiting.release()

    def _decode_alone(self, image: bytes, spec: PreprocessSpec) -> Pixels | Exception:
        if not self._large.acquire(timeout=LARGE_WAIT_S):
            return Overloaded("too many large images are being decoded; try again later")
        try:
            return decode_image(image, spec, self._limits)
        except ConvoyError as error:
            return _without_frames(error)
        finally:
            trim_heap()  # otherwise the heap keeps the memory of the largest picture
            self._large.release()


def _without_frames(error: ConvoyError) -> ConvoyError:
    """``error`` without its traceback, to be kept as an image's outcome.

    The traceback's frames refer to the request's body and to the list of outcomes. That cycle of
    references would keep bodies in memory until the next garbage collection.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
