"""A process in which atheris steers mutants through the decoder by the code that they reach.

    python -m benchmarks.chaos.guided CORPUS -runs=50000

The arguments are libFuzzer's. Ends with an error, and the picture in a file ``crash-…``, at the
first exception that is no refusal.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["registry.picture_parts", "registry.preprocess", "PIL"]):
    from PIL import Image

    from registry.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
    from registry.preprocess import decode_image
    from tests.hostile_pictures import SPEC

    Image.init()  # else the first picture imports the plug-ins, and nobody sees where it goes there


def decode(data: bytes) -> None:
    with contextlib.suppress(InvalidImage, ImageTooLarge, UnsupportedImageType):
        decode_image(data, SPEC)


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
