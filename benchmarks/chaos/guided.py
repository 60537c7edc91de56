"""A process in which atheris steers mutants through the decoder by the code that they reach.

    python -m benchmarks.chaos.guided CORPUS -runs=50000

The arguments are libFuzzer's. Ends with an error, and the picture in a file ``crash-…``, at the
first exception that is no refusal.
"""

import contextlib
import sys

import atheris

with atheris.instrument_imports(
    include=["registry.model.image.structure", "registry.model.image.decode", "PIL"]
):
    from PIL import Image

    from registry.core.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
    from registry.model.image.decode import decode_image
    from tests.hostile_pictures import SPEC

    Image.init()  # else the first picture imports the plug-ins, and nobody sees where it goes there


def decode(data: bytes) -> None:
    with contextlib.suppress(InvalidImage, ImageTooLarge, UnsupportedImageType):
        decode_image(data, SPEC)


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
