"""Pictures made to hurt: each is answered or refused within a second, whatever its bytes."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from registry.errors import ImageTooLarge, InvalidImage, UnsupportedImageType
from registry.preprocess import decode_image, decode_training_image
from tests.hostile_pictures import HOSTILE, SPEC, encoded, mutants

REFUSALS = (ImageTooLarge, InvalidImage, UnsupportedImageType)
# What a careful decoder can answer; the rest must be refused, and before it is decoded.
ANSWERED = {
    "webp of 4,000 frames": "the first frame is one picture",
    "png of 30 packed texts": "so many are allowed",
    "png of 9,900 chunks of pixels": "so many are allowed",
    "png with 200 MB of pixels too many": "what is beyond the last row is not unpacked",
    "jpeg claiming 3400×3400 in 689 bytes": "libjpeg fills what is missing",
    "jpeg of 900 markers of 8 KB": "so many are allowed",
    "jpeg of 65,000 EXIF entries": "none of them is the orientation",
    "jpeg of 60 scans, 12 megapixels": "so many are allowed",
    "png of 12 megapixels, RGBA, 16 bits": "a picture",
    "png of 12 megapixels, grey, 16 bits": "a picture",
    "png of 12 megapixels, grey and alpha": "a picture",
}
DECODED_FIRST = {"webp claiming 3400×3400 in 34 bytes", "png of a packed profile"}


@pytest.mark.parametrize("name", HOSTILE)
def test_none_takes_a_second(name: str) -> None:
    data = HOSTILE[name]()
    started = time.thread_time()
    if name in ANSWERED:
        assert decode_image(data, SPEC).shape == SPEC.shape
    else:
        with pytest.raises(REFUSALS):
            decode_image(data, SPEC)
    took_s = time.thread_time() - started
    refused_early = name not in ANSWERED and name not in DECODED_FIRST
    assert took_s < (0.1 if refused_early else 1.0)


def test_mutants_are_answered_or_refused() -> None:
    picture = Image.radial_gradient("L").resize((40, 30)).convert("RGB")
    seeds = [encoded(picture, kind) for kind in ("PNG", "JPEG", "WEBP")]
    seeds += [encoded(picture.convert("P")), encoded(picture.convert("CMYK"), "JPEG")]
    seeds += [encoded(picture, "JPEG", progressive=True), encoded(picture.convert("LA"), "PNG")]
    refused = 0
    for data in mutants(seeds, 3000):
        try:
            assert decode_image(data, SPEC).shape == SPEC.shape
        except REFUSALS:
            refused += 1
    assert 300 < refused < 3000  # else these are no mutants


def test_a_picture_writes_no_warnings(tmp_path: Path) -> None:
    """Nor has Python remember each: a stranger could fill the log, and the memory."""
    picture = tmp_path / "picture"
    picture.write_bytes(HOSTILE["jpeg of 65,000 EXIF entries"]())
    program = (
        "import sys; from pathlib import Path; from registry.contract import PreprocessSpec;"
        "from registry.preprocess import decode_image;"
        "spec = PreprocessSpec(mode='L', width_px=8, height_px=8, mean=(0.5,), std=(0.5,));"
        "decode_image(Path(sys.argv[1]).read_bytes(), spec);"
        "from PIL import TiffImagePlugin;"
        "known = getattr(TiffImagePlugin, '__warningregistry__', {});"
        "sys.exit(len(known.keys() - {'version'}))"
    )
    done = subprocess.run([sys.executable, "-c", program, picture], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_training_opens_no_format_that_runs_programs(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    script = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n({marker}) (w) file closefile\n"
    with pytest.raises(InvalidImage, match="unknown or damaged format"):
        decode_training_image(script.encode(), SPEC)
    assert not marker.exists()


def test_training_refuses_by_the_same_rules() -> None:
    for name in ("jpeg of 5,000 scans", "png of 200,000 texts", "jpeg of 4 MB of padding"):
        with pytest.raises(ImageTooLarge):
            decode_training_image(HOSTILE[name](), SPEC)
