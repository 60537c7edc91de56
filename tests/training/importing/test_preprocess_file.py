"""Files and presets that say how pictures become a network's input."""

from pathlib import Path
from typing import Any

import pytest

from registry.core.errors import UsageError
from training.importing.preprocess_file import make_spec, read_members


def test_a_preset_is_a_complete_description() -> None:
    spec = make_spec(read_members("imagenet"), 224, 224, 3)
    assert (spec.mode, spec.resize_shorter_px, spec.shape) == ("RGB", 256, (224, 224, 3))
    assert (spec.longer_side, spec.crop_offset, spec.shrink_on_load) == ("down", "even", False)
    assert make_spec(read_members("clip"), 336, 336, 3).resize_shorter_px == 336
    assert make_spec(read_members("inception"), 299, 299, 3).mean == (0.5, 0.5, 0.5)


def test_levels_to_255_scale_mean_and_deviation(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text('mode = "BGR"\nlevels = "0..255"\nmean = [104, 117, 123]\n')
    spec = make_spec(read_members(str(file)), 224, 224, 3)
    assert [round(each * 255) for each in spec.mean] == [104, 117, 123]
    assert spec.std == (1 / 255,) * 3


def test_one_value_stands_for_every_channel() -> None:
    assert make_spec({"mean": 0.5, "std": 0.25}, 8, 8, 3).mean == (0.5,) * 3
    assert make_spec({"mean": 0.5, "std": 0.25}, 8, 8, 1).mode == "L"


@pytest.mark.parametrize(
    ("members", "height_px", "text"),
    [
        ({"mode": "L"}, 8, '3 channels; use "RGB" or "BGR"'),
        ({}, None, "any size; say in --preprocess which one"),
        ({"size": 16}, 8, "the size is 16×16, and the graph takes 8×8"),
        ({"colour": 1}, 8, "unknown field `colour`"),
        ({"mean": [0.5, 0.5]}, 8, "3 values in mean"),
        ({"std": 0}, 8, "std must be finite and above 0"),
        ({"crop_pct": 0.0}, 8, "crop_pct is 0.0"),
        ({"resize_px": [8, 8], "letterbox_level": 1}, 8, "only one of"),
        ({"resize_px": [7, 9]}, 8, "at least width_px"),
        ({"preset": "vgg"}, 8, "vgg"),
    ],
)
def test_what_does_not_fit_is_refused(
    members: dict[str, Any], height_px: int | None, text: str
) -> None:
    with pytest.raises(UsageError, match=text):
        make_spec(members, height_px, height_px, 3)


def test_a_file_that_is_not_there_lists_the_presets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="presets: imagenet, clip, inception"):
        read_members(str(tmp_path / "none.toml"))
    bad = tmp_path / "bad.toml"
    bad.write_text("mode = ")
    with pytest.raises(UsageError, match=r"bad\.toml cannot be read"):
        read_members(str(bad))
