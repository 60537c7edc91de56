"""Reads how an imported model wants its pictures, from TOML or a preset."""

import math
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from registry.core.errors import UsageError
from registry.model.manifest import Interpolation, PreprocessSpec, Resampler

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Name → the members of a file. "clip" and "inception" are the names that timm and OpenCLIP use.
PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {
        "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "crop_pct": 0.875, "longer_side": "down",
        "crop_offset": "even",
    },
    "clip": {
        "mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711),
        "interpolation": "bicubic", "crop_pct": 1.0, "longer_side": "down", "crop_offset": "even",
    },
    "inception": {
        "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic",
        "crop_pct": 0.875, "longer_side": "down", "crop_offset": "even",
    },
}  # fmt: skip


# Members of which one replaces another.
WAYS_TO_RESIZE = ("crop_pct", "resize_px", "resize_shorter_px", "letterbox_level")


class _File(Struct, forbid_unknown_fields=True, kw_only=True):
    """The members of a file. Those that ``PreprocessSpec`` also has mean the same there.

    It has many fields because ``PreprocessSpec`` has them.
    """

    preset: Literal["imagenet", "clip", "inception"] | None = None
    size: int | tuple[int, int] | None = None
    crop_pct: float | None = None
    levels: Literal["0..1", "0..255"] = "0..1"
    mode: Literal["L", "RGB", "BGR"] | None = None
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    resize_px: tuple[int, int] | None = None
    resize_shorter_px: int | None = None
    letterbox_level: int | None = None
    interpolation: Interpolation | None = None
    resampler: Resampler | None = None
    longer_side: Literal["nearest", "down"] | None = None
    crop_offset: Literal["down", "even"] | None = None
    jpeg_quality: int | None = None
    jpeg_of: Literal["resized", "cropped"] | None = None
    shrink_on_load: bool | None = None
    crop_early: bool | None = None
    exif: Literal["transpose", "ignore"] | None = None


def read_members(source: str) -> dict[str, Any]:
    """The members of a TOML file, or of the preset that ``source`` names.

    Raises:
        UsageError: ``source`` is neither a preset nor a file of TOML.
    """
    if source in PRESETS:
        return {"preset": source}
    try:
        return tomllib.loads(Path(source).read_text())
    except FileNotFoundError as error:
        raise UsageError(
            f"{source} is neither a file nor a preset; presets: {', '.join(PRESETS)}"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{source} cannot be read: {error}") from error


def merge_members(record: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The members of a library's ``record``, with the user's ``own`` in their place.

    A preset of the user replaces the whole record, and one way to resize replaces another.
    """
    if "preset" in own:
        return own
    if any(name in own for name in WAYS_TO_RESIZE):
        record = {name: value for name, value in record.items() if name not in WAYS_TO_RESIZE}
    return {**record, **own}


def make_spec(
    members: dict[str, Any],
    height_px: int | None = None,
    width_px: int | None = None,
    channels: int | None = None,
) -> PreprocessSpec:
    """The preprocessing that a file's members describe.

    Args:
        members: from ``read_members``.
        height_px: the height that the network takes; None if it takes any.
        width_px: its width.
        channels: its channels, 1 or 3; None if ``mode`` decides, which is RGB by default.

    Raises:
        UsageError: a member is unknown or impossible, or does not fit the network.
    """
    preset = PRESETS.get(str(members.get("preset")), {})
    try:
        file = msgspec.convert({**preset, **members}, _File)
    except msgspec.ValidationError as error:
        raise UsageError(str(error)) from error
    size = file.size or (width_px, height_px)
    width, height = (size, size) if isinstance(size, int) else size
    if width is None or height is None:
        raise UsageError(
            "the network takes any size; say in --preprocess which one: size = 224, or "
            "size = [width, height]"
        )
    if (height_px or height, width_px or width) != (height, width):
        raise UsageError(
            f"the size is {width}×{height}, and the graph takes {width_px}×{height_px}"
        )
    mode = file.mode or ("L" if channels == 1 else "RGB")
    channels = channels or (1 if mode == "L" else 3)
    if (1 if mode == "L" else 3) != channels:
        other = '"RGB" or "BGR"' if channels == 3 else '"L"'
        raise UsageError(
            f'the mode is "{mode}", and the graph takes {channels} channels; use {other}'
        )
    shorter = file.resize_shorter_px
    if file.crop_pct is not None and not (shorter or file.resize_px or file.letterbox_level):
        if not 0.01 <= file.crop_pct <= 1:
            raise UsageError(f"crop_pct is {file.crop_pct}; it must be from 0.01 to 1")
        shorter = math.floor(max(width, height) / file.crop_pct)
    unit = 255 if file.levels == "0..255" else 1
    given = {
        name: value
        for name in _File.__struct_fields__
        if name in PreprocessSpec.__struct_fields__ and (value := getattr(file, name)) is not None
    }
    # Both move levels. The import turns them on if the reference holds with them.
    return _checked(
        {
            "shrink_on_load": False,
            "crop_early": False,
            **given,
            "mode": mode,
            "width_px": width,
            "height_px": height,
            "resize_shorter_px": shorter,
            "mean": [each / unit for each in _each(file.mean, 0.0, channels)],
            "std": [each / unit for each in _each(file.std, 1.0, channels)],
        }
    )


def _each(
    value: float | tuple[float, ...] | None, default: float, channels: int
) -> tuple[float, ...]:
    """One value for each channel."""
    found = default if value is None else value
    return (found,) * channels if isinstance(found, int | float) else found


def _checked(members: dict[str, Any]) -> PreprocessSpec:
    try:
        return msgspec.convert(members, PreprocessSpec)
    except msgspec.ValidationError as error:
        raise UsageError(str(error)) from error
