"""Ways to resize that other libraries have: each against an independent computation."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from registry.model.image.decode import decode_image
from registry.model.image.resize import resize
from registry.model.manifest import PreprocessSpec

PHOTOGRAPH = Image.fromarray(
    np.random.default_rng(4).integers(0, 256, (13, 17, 3), np.uint8)
).resize((150, 101), Image.Resampling.BICUBIC)


def decode(image: Image.Image = PHOTOGRAPH, **members: Any) -> Any:
    file = BytesIO()
    image.save(file, "PNG")
    spec = {"mode": "RGB", "width_px": 32, "height_px": 32, "mean": (0,) * 3, "std": (1,) * 3}
    return decode_image(file.getvalue(), PreprocessSpec(**{**spec, **members}))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 48), (300, 202), (150, 40)])
def test_without_antialiasing_pictures_are_resized_as_by_torch(
    interpolation: Any, size: tuple[int, int]
) -> None:
    pixels = np.asarray(PHOTOGRAPH)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    smooth = {} if interpolation == "nearest" else {"align_corners": False}
    wanted = torch.nn.functional.interpolate(tensor, size[::-1], mode=interpolation, **smooth)
    found = resize(pixels, *size, interpolation, "torch-no-antialias")
    rounded = wanted[0].permute(1, 2, 0).round().clamp(0, 255).numpy().astype(int)
    assert np.abs(found.astype(int) - rounded).max() <= (0 if interpolation == "nearest" else 1)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(64, 48), (300, 202), (150, 40), (37, 101)])
def test_with_antialiasing_levels_are_resized_exactly_as_by_torch(
    interpolation: Any, size: tuple[int, int]
) -> None:
    pixels = np.asarray(PHOTOGRAPH)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    wanted = torch.nn.functional.interpolate(tensor, size[::-1], mode=interpolation, antialias=True)
    found = resize(pixels, *size, interpolation, "torch")
    np.testing.assert_array_equal(found, wanted[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    ("interpolation", "most"), [("nearest", 0), ("bilinear", 0), ("lanczos", 1), ("bicubic", 1)]
)
@pytest.mark.parametrize("size", [(64, 48), (300, 202), (150, 40), (37, 101)])
def test_pictures_are_resized_as_by_opencv(
    interpolation: Any, most: int, size: tuple[int, int]
) -> None:
    cv2 = pytest.importorskip("cv2", reason="pip install opencv-python-headless")
    names = {"nearest": "NEAREST", "bilinear": "LINEAR", "lanczos": "LANCZOS4", "bicubic": "CUBIC"}
    number = getattr(cv2, f"INTER_{names[interpolation]}")
    pixels = np.asarray(PHOTOGRAPH)
    wanted = cv2.resize(pixels, size, interpolation=number).astype(int)
    difference = np.abs(resize(pixels, *size, interpolation, "opencv") - wanted)
    assert difference.max() <= most
    assert (difference > 0).mean() < 1e-3


def test_opencvs_levels_without_opencv() -> None:
    """Two columns and two rows, by hand: 1.5 pixels apart, weights of 2048ths, dropped bits."""
    row = np.array([[0, 100, 200]], np.uint8)[..., None]
    np.testing.assert_array_equal(resize(row, 2, 1, "bilinear", "opencv")[0, :, 0], [25, 175])


def test_the_resampler_of_a_manifest_is_used() -> None:
    members: dict[str, Any] = {"resize_px": (40, 36), "interpolation": "bicubic"}
    whole = resize(np.asarray(PHOTOGRAPH), 40, 36, "bicubic", "torch")
    np.testing.assert_array_equal(decode(**members, resampler="torch"), whole[2:34, 4:36])
    pillows = PHOTOGRAPH.resize((40, 36), Image.Resampling.BICUBIC).crop((4, 2, 36, 34))
    np.testing.assert_array_equal(decode(**members, crop_early=False), np.asarray(pillows))


def test_lanczos_without_antialiasing_keeps_a_flat_picture() -> None:
    flat = np.full((20, 30, 3), 77, np.uint8)
    for resampler in ("torch-no-antialias", "opencv"):
        assert (resize(flat, 13, 9, "lanczos", resampler) == 77).all()


def test_a_picture_is_stretched_before_the_crop() -> None:
    wanted = PHOTOGRAPH.resize((40, 36), Image.Resampling.BILINEAR).crop((4, 2, 36, 34))
    difference = decode(resize_px=(40, 36)).astype(int) - np.asarray(wanted)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("turned", [False, True])
def test_torchvisions_rounding_of_the_longer_side_and_of_the_crop(turned: bool) -> None:
    image = PHOTOGRAPH.transpose(Image.Transpose.ROTATE_90) if turned else PHOTOGRAPH
    width, height = image.size
    short = min(width, height)
    size = (int(35 * width / short), int(35 * height / short))
    left, top = (round((side - 32) / 2) for side in size)
    wanted = image.resize(size, Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    found = decode(
        image, resize_shorter_px=35, longer_side="down", crop_offset="even",
        interpolation="bicubic",
    )  # fmt: skip
    assert np.abs(found.astype(int) - np.asarray(wanted)).max() <= 1


def test_a_letterbox_shows_the_whole_picture_on_one_level() -> None:
    found = decode(letterbox_level=114)
    high = round(101 * 32 / 150)
    top = (32 - high) // 2
    assert (found[:top] == 114).all()
    assert (found[top + high :] == 114).all()
    wanted = PHOTOGRAPH.resize((32, high), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(found[top : top + high], np.asarray(wanted))


def test_bgr_is_rgb_in_the_other_order() -> None:
    np.testing.assert_array_equal(decode(mode="BGR"), decode()[..., ::-1])


@pytest.mark.parametrize("of", ["resized", "cropped"])
def test_a_picture_may_pass_through_a_jpeg(of: Any) -> None:
    resized = PHOTOGRAPH.resize((40, 40), Image.Resampling.BILINEAR)
    part = (4, 4, 36, 36)
    first = resized if of == "resized" else resized.crop(part)
    file = BytesIO()
    first.save(file, "JPEG", quality=75)
    read = Image.open(file)
    wanted = read.crop(part) if of == "resized" else read
    found = decode(resize_px=(40, 40), jpeg_quality=75, jpeg_of=of)
    np.testing.assert_array_equal(found, np.asarray(wanted))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("crop_offset", ["down", "even"])
def test_a_picture_that_exif_turns_is_cut_as_if_it_stood_upright(
    orientation: int, crop_offset: str
) -> None:
    picture = PHOTOGRAPH.crop((0, 0, 61, 47))
    exif = picture.getexif()
    exif[0x0112] = orientation
    file = BytesIO()
    picture.save(file, "PNG", exif=exif)
    members: dict[str, Any] = {
        "width_px": 32, "height_px": 32, "mean": (0,) * 3, "std": (1,) * 3, "mode": "RGB",
        "resize_shorter_px": 35, "longer_side": "down", "crop_offset": crop_offset,
        "crop_early": False, "shrink_on_load": False,
    }  # fmt: skip
    found = decode_image(file.getvalue(), PreprocessSpec(**members))
    upright = ImageOps.exif_transpose(Image.open(file))
    np.testing.assert_array_equal(found, decode(upright, **members))
