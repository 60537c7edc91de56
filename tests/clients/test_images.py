"""Pictures of every accepted kind become bytes that decode to the same pixels."""

import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray
from PIL import Image

from convoy_client import InvalidImage
from convoy_client.images import encoded

SHAPES = st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(
    lambda size: st.sampled_from([size, (*size, 1), (*size, 3)])
)


@given(arrays.arrays(np.uint8, SHAPES))
def test_an_array_becomes_a_png_with_the_same_pixels(pixels: NDArray[np.uint8]) -> None:
    with Image.open(BytesIO(encoded(pixels))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB" if pixels.shape[2:] == (3,) else "L")
        decoded = np.asarray(image)
    assert np.array_equal(decoded, pixels.reshape(decoded.shape))


def test_the_layout_of_an_array_in_memory_does_not_matter() -> None:
    pixels = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    for view in (np.asfortranarray(pixels), np.flip(np.flip(pixels, 1).copy(), 1)):
        assert encoded(view) == encoded(pixels)


def test_a_tensor_is_taken_as_an_array() -> None:
    import torch

    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert encoded(torch.from_numpy(pixels)) == encoded(pixels)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2)), "dtype float64"),
        (np.zeros((2, 2), np.int64), "dtype int64"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(3, 8, 8\)"),
        (np.zeros((1, 8, 8, 3), np.uint8), "without a batch dimension"),
        (np.zeros((8,), np.uint8), r"shape \(8,\)"),
        (np.zeros((0, 8), np.uint8), r"shape \(0, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\)"),
    ],
)
def test_an_array_that_is_not_a_picture_is_refused(array: Any, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        encoded(array)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_a_pil_image_keeps_its_pixels(mode: str) -> None:
    image = Image.new(mode, (5, 4))
    image.putpixel((1, 2), 1)
    with Image.open(BytesIO(encoded(image))) as decoded:
        assert decoded.mode == mode
        assert decoded.tobytes() == image.tobytes()


def test_a_pil_image_that_png_cannot_hold_is_refused() -> None:
    with pytest.raises(InvalidImage, match=r"CMYK; pass image.convert\('RGB'\)"):
        encoded(Image.new("CMYK", (2, 2)))


def test_a_pil_image_keeps_its_orientation(tmp_path: Path) -> None:
    from registry.model.image.decode import decode_image
    from registry.model.manifest import PreprocessSpec

    pixels = np.arange(8 * 6, dtype=np.uint8).reshape(8, 6) * 5
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(pixels).save(path, exif=exif)
    spec = PreprocessSpec(mode="L", width_px=8, height_px=6, mean=(0.5,), std=(0.5,))
    with Image.open(path) as image:
        sent = encoded(image)
    assert np.array_equal(decode_image(sent, spec), decode_image(path.read_bytes(), spec))
    assert not np.array_equal(decode_image(sent, spec)[..., 0], pixels[:6, :8])


def test_files_and_bytes_are_sent_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"content")
    for image in (path, str(path), b"content", bytearray(b"content"), memoryview(b"content")):
        assert encoded(image) == b"content"


def test_a_picture_that_cannot_be_read_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    with pytest.raises(InvalidImage, match=r"empty\.png: the file is empty"):
        encoded(tmp_path / "empty.png")
    with pytest.raises(InvalidImage, match=r"missing\.png: No such file or directory"):
        encoded(tmp_path / "missing.png")
    with pytest.raises(InvalidImage, match="Is a directory"):
        encoded(tmp_path)
    with pytest.raises(InvalidImage, match="not a path"):
        encoded("a\0b")
    with pytest.raises(InvalidImage, match="no bytes"):
        encoded(b"")
    with pytest.raises(InvalidImage, match="int is not a picture"):
        encoded(7)  # type: ignore[arg-type]
    truncated = tmp_path / "truncated.png"
    Image.new("RGB", (50, 50), "red").save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:60])
    with Image.open(truncated) as image, pytest.raises(InvalidImage, match="cannot be encoded"):
        encoded(image)


def test_neither_numpy_nor_pillow_is_imported_before_a_caller_passes_one() -> None:
    code = (
        "import sys, convoy_client; from convoy_client.images import encoded; encoded(b'x');"
        "print({'numpy', 'PIL', 'registry', 'msgspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
