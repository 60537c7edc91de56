"""A process in which atheris steers mutants through the decoder by the code that they reach.

    python -m benchmarks.chaos.guided CORPUS -runs=50000

The arguments are libFuzzer's. Ends with an error, and the picture in a file ``crash-…``, at the
first exception that is no refusal.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["registry.picture_parts", "registry.preprocess", "PIL"]):
    from registry.contract import PreprocessSpec
    from registry.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
    from registry.preprocess import decode_image

SPEC = PreprocessSpec(
    mode="RGB", width_px=224, height_px=224, resize_shorter_px=256, mean=(0.5,) * 3, std=(0.5,) * 3
)


def decode(data: bytes) -> None:
    with contextlib.suppress(InvalidImage, ImageTooLarge, UnsupportedImageType):
        decode_image(data, SPEC)


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
