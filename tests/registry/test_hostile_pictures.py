"""Hostile pictures: each is answered at a bounded cost, or refused before it is decoded."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from registry.core.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
from registry.model.image.decode import FORMATS, decode_image, decode_training_image
from tests.hostile_pictures import HOSTILE, SPEC, encoded, mutants

REFUSALS = (ImageTooLarge, InvalidImage, UnsupportedImageType)
# A careful decoder can answer these, for the reason given. The rest must be refused.
ANSWERED = {
    "webp of 4,000 frames": "only the first frame is decoded",
    "png of 30 packed texts": "no text is unpacked",
    "png of 900 packed texts": "no text is unpacked",
    "png of a packed profile": "the profile is not unpacked",
    "png of 9,900 chunks of pixels": "so many are allowed",
    "png with 200 MB of pixels too many": "bytes after the last row are not unpacked",
    "jpeg claiming 3400×3400 in 689 bytes": "libjpeg fills what is missing",
    "jpeg of 12 scans, 50 megapixels": "so many are allowed",
    "jpeg of 900 markers of 8 KB": "so many are allowed",
    "jpeg of 65,000 EXIF entries": "none of them is the orientation",
    "jpeg of 60 scans, 12 megapixels": "so many are allowed",
    "png of 9 megapixels, RGBA, 16 bits": "a picture within the limits",
    "gif of 900 blocks of comment": "so many are allowed",
    "gif of 4,000 frames": "only the first frame is decoded",
    "tiff of 900 entries of 1 MB": "all of them are dropped",
    "tiff whose directories form a ring": "only the first directory is read",
    "tiff whose EXIF is its own directory": "its EXIF is not read",
    "tiff of 2³² rows a strip": "only as many rows are read as the picture has",
    "tiff of 4 GB of deflate": "bytes after the last row are not unpacked",
    "png of 12 megapixels, grey, 16 bits": "a picture within the limits",
    "png of 12 megapixels, grey and alpha": "a picture within the limits",
}
# Their headers are within the limits, so the decoder finds that the pixels are missing.
REFUSED_BY_THE_DECODER = {
    "webp claiming 3400×3400 in 34 bytes",
    "gif claiming 5000×5000 in 800 bytes",
    "bmp claiming 5000×5000",
    "ppm claiming 5000×5000",
    "tiff claiming 5000×5000",
}


DECODE = """
import sys
from contextlib import suppress
from pathlib import Path
from PIL import TiffImagePlugin
from registry.model.manifest import PreprocessSpec
from registry.core.errors import ConvoyError
from registry.model.image.decode import decode_image

spec = PreprocessSpec(mode="L", width_px=8, height_px=8, mean=(0.5,), std=(0.5,))
with suppress(ConvoyError):
    decode_image(Path(sys.argv[1]).read_bytes(), spec)
known = getattr(TiffImagePlugin, "__warningregistry__", {})
sys.exit(len(known.keys() - {"version"}))
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_picture_is_answered_or_refused_before_a_decoder_sees_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = HOSTILE[name]()
    if name in ANSWERED:
        assert decode_image(data, SPEC).shape == SPEC.shape
        return
    if name not in REFUSED_BY_THE_DECODER:
        monkeypatch.setattr("PIL.Image.open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(REFUSALS):
        decode_image(data, SPEC)


def test_mutants_are_answered_or_refused() -> None:
    picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    seeds = [encoded(picture, kind) for kind in FORMATS]
    seeds += [
        encoded(picture, "TIFF", compression="tiff_lzw"),
        encoded(picture.convert("P"), "GIF"),
    ]
    seeds += [encoded(picture.convert("P")), encoded(picture.convert("CMYK"), "JPEG")]
    seeds += [encoded(picture, "JPEG", progressive=True), encoded(picture.convert("LA"), "PNG")]
    refused = 0
    for data in mutants(seeds, 3000):
        try:
            assert decode_image(data, SPEC).shape == SPEC.shape
        except REFUSALS:
            refused += 1
    assert 300 < refused < 3000  # otherwise the mutants test nothing


@pytest.mark.parametrize(
    "name", ["jpeg of 65,000 EXIF entries", "tiff claiming 5000×5000", "tiff of 65,535 samples"]
)
def test_a_picture_writes_no_warnings(name: str, tmp_path: Path) -> None:
    """Nor does Python remember them: a client could fill the log and the memory."""
    picture = tmp_path / "picture"
    picture.write_bytes(HOSTILE[name]())
    done = subprocess.run([sys.executable, "-c", DECODE, picture], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_opens_no_format_that_runs_programs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({marker}) (w) file closefile\n"
    with pytest.raises(UnsupportedImageType):
        decode_training_image(script.encode(), SPEC)
    assert not marker.exists()


def test_training_refuses_hostile_pictures_by_the_same_rules() -> None:
    for name in ("jpeg of 5,000 scans", "png of 200,000 texts", "jpeg of 4 MB of padding"):
        with pytest.raises(ImageTooLarge):
            decode_training_image(HOSTILE[name](), SPEC)
