"""Runs mutated pictures through the decoder; atheris chooses mutants by the code that they reach.

    python -m benchmarks.chaos.guided CORPUS -runs=50000

The arguments are libFuzzer's. At the first exception that is not a refusal, the process ends with
an error and writes the picture to a file ``crash-…``.
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

    Image.init()  # imports the plug-ins here, so that atheris instruments them


def decode(data: bytes) -> None:
    with contextlib.suppress(InvalidImage, ImageTooLarge, UnsupportedImageType):
        decode_image(data, SPEC)


if __name__ == "__main__":
    atheris.Setup(sys.argv, decode)
    atheris.Fuzz()
