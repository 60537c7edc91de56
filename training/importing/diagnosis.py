"""Finds out where an import and its owner's answers part.

Each step of the preprocessing is changed as people get it wrong: the order of the colours, the
normalisation, how pictures are resized and cut. The change after which the answers agree is the
cause.
"""

from collections.abc import Callable, Iterator

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray
from tqdm import tqdm

from registry.model.manifest import PreprocessSpec
from training.importing.preprocess_file import IMAGENET_MEAN, IMAGENET_STD, PRESETS
from training.importing.reference import Reference, compare

Score = Callable[[PreprocessSpec], NDArray[np.float32]]
"""The probabilities (N, classes) of the reference's pictures under a preprocessing."""

MAX_CHANGES = 3
SHOWN = 3  # alternatives
CAFFE_MEAN = (104 / 255, 117 / 255, 123 / 255)
CROPS = (0.875, 0.9, 0.95, 0.96, 1.0)
# A change that leaves more than this part of the distance explains nothing.
MEANINGFUL = 0.9


class Change(Struct, frozen=True):
    """One change of the preprocessing: the step that it belongs to, and what it sets."""

    step: str
    text: str
    spec: PreprocessSpec


class Diagnosis(Struct, frozen=True):
    """The changes with which the answers agree, or come closest.

    Attributes:
        changes: the steps and what to set, the most important one first. Empty if nothing helps.
        equal: how many of the pictures agree then.
        total: how many pictures there are.
        shift: the labels are this many places further in the owner's list; 0 if they are not.
        alternatives: other changes in place of the last one, with which all answers agree, too.
    """

    changes: tuple[Change, ...]
    equal: int
    total: int
    shift: int = 0
    alternatives: tuple[Change, ...] = ()

    def __str__(self) -> str:
        if self.shift:
            return (
                f"The cause: the labels: the owner's are {abs(self.shift)} "
                f"{'later' if self.shift > 0 else 'earlier'} in the list for {self.equal} of "
                f"{self.total} pictures; check the first line of --labels"
            )
        if not self.changes:
            return "No change of colours, normalisation, resizing or crop that is known explains it"
        found = "; ".join(f"{each.step}: {each.text}" for each in self.changes)
        if self.equal < self.total:
            return f"No change that is known explains all of it; the closest is {found}"
        others = "".join(f"; or {each.step}: {each.text}" for each in self.alternatives[:SHOWN])
        return f"The cause: {found}{others}"


def diagnose(
    score: Score, spec: PreprocessSpec, reference: Reference, tolerance: float
) -> Diagnosis:
    """The cause of the difference between ``score(spec)`` and the reference.

    One change after another is kept, that which comes closest, until the answers agree or nothing
    helps any more.
    """
    answers = score(spec)
    if shifted := _shifted(answers, reference, tolerance):
        return shifted
    total = len(answers)
    distance = _distance(answers, reference)
    equal = compare(answers, reference, tolerance).equal
    kept: list[Change] = []
    for _ in range(MAX_CHANGES):
        tries = []
        for change in tqdm(list(_changes(spec)), unit="try", desc="comparing", disable=None):
            answers = score(change.spec)
            agreeing = compare(answers, reference, tolerance).equal
            tries.append(_Try(_distance(answers, reference), agreeing, change))
        best = min(tries, key=lambda each: (each.equal < total, each.distance))
        if best.equal < total and best.distance > MEANINGFUL * distance:
            break
        distance, equal, spec = best.distance, best.equal, best.change.spec
        kept.append(best.change)
        if equal == total:
            others = [each.change for each in tries if each.equal == total and each is not best]
            return Diagnosis(tuple(kept), equal, total, alternatives=tuple(others))
    return Diagnosis(tuple(kept), equal, total)


class _Try(Struct, frozen=True):
    """A change, how far the answers are from the owner's then, and how many agree."""

    distance: float
    equal: int
    change: Change


def _shifted(
    answers: NDArray[np.float32], reference: Reference, tolerance: float
) -> Diagnosis | None:
    """The labels' shift, if the owner's best classes are all the same number of places away."""
    classes = answers.shape[1]
    places = (reference.best - answers.argmax(axis=1)) % classes
    common = int(np.bincount(places, minlength=classes).argmax())
    if common == 0 or (classes == 2 and len(set(places.tolist())) > 1):
        return None
    moved = np.roll(answers, common, axis=1)
    agreement = compare(moved, reference, tolerance)
    if agreement.equal < MEANINGFUL * agreement.total:
        return None
    shift = common if common <= classes // 2 else common - classes
    return Diagnosis((), agreement.equal, agreement.total, shift)


def _distance(answers: NDArray[np.float32], reference: Reference) -> float:
    """How far answers are from the owner's: the mean difference of the probabilities he gave.

    Where he gave labels only, what his label lacks to 1 counts.
    """
    known = ~np.isnan(reference.probabilities)
    if known.any():
        return float(np.abs(answers - reference.probabilities)[known].mean())
    return float(1 - answers[np.arange(len(answers)), reference.best].mean())


def _changes(spec: PreprocessSpec) -> Iterator[Change]:
    """All single changes of ``spec``."""
    if spec.mode != "L":
        other = "BGR" if spec.mode == "RGB" else "RGB"
        yield Change("colour order", f'mode = "{other}"', replace(spec, mode=other))
        yield Change(
            "colour order",
            f'mode = "{other}", with mean and std in that order',
            replace(spec, mode=other, mean=spec.mean[::-1], std=spec.std[::-1]),
        )
    for text, mean, std in _normalisations(spec.channels):
        if (mean, std) != (spec.mean, spec.std):
            yield Change("normalisation", text, replace(spec, mean=mean, std=std))
    for name in ("nearest", "bilinear", "bicubic", "lanczos"):
        for resampler in ("pillow", "torch", "torch-no-antialias", "opencv"):
            is_torchs = resampler != "torch" or name != "lanczos"
            if (name, resampler) != (spec.interpolation, spec.resampler) and is_torchs:
                text = f'interpolation = "{name}", resampler = "{resampler}"'
                changed = replace(spec, interpolation=name, resampler=resampler)
                yield Change("resize", text, changed)
    yield from _sizes(spec)
    yield from _jpegs(spec)
    exif = "ignore" if spec.exif == "transpose" else "transpose"
    yield Change("EXIF orientation", f'exif = "{exif}"', replace(spec, exif=exif))
    side = "down" if spec.longer_side == "nearest" else "nearest"
    yield Change("resize", f'longer_side = "{side}"', replace(spec, longer_side=side))
    offset = "down" if spec.crop_offset == "even" else "even"
    yield Change("crop", f'crop_offset = "{offset}"', replace(spec, crop_offset=offset))


def _jpegs(spec: PreprocessSpec) -> Iterator[Change]:
    """With and without writing the picture as a JPEG, as networks of Caffe expect."""
    if spec.jpeg_quality is not None:
        yield Change("JPEG", "no jpeg_quality", replace(spec, jpeg_quality=None))
    for of in ("resized", "cropped"):
        if (spec.jpeg_quality, spec.jpeg_of) != (75, of):
            text = f'jpeg_quality = 75, jpeg_of = "{of}"'
            yield Change("JPEG", text, replace(spec, jpeg_quality=75, jpeg_of=of))


def _normalisations(
    channels: int,
) -> Iterator[tuple[str, tuple[float, ...], tuple[float, ...]]]:
    """Usual means and deviations."""
    yield "mean = 0 and std = 1", (0.0,) * channels, (1.0,) * channels
    yield 'levels = "0..255", mean = 0', (0.0,) * channels, (1 / 255,) * channels
    yield "mean = 0.5 and std = 0.5", (0.5,) * channels, (0.5,) * channels
    if channels != 3:
        return
    yield 'preset = "imagenet"', IMAGENET_MEAN, IMAGENET_STD
    yield "mean and std of imagenet in BGR", IMAGENET_MEAN[::-1], IMAGENET_STD[::-1]
    yield 'preset = "clip"', PRESETS["clip"]["mean"], PRESETS["clip"]["std"]
    text = 'levels = "0..255", mean = {}'
    yield text.format([104, 117, 123]), CAFFE_MEAN, (1 / 255,) * 3
    yield text.format([123, 117, 104]), CAFFE_MEAN[::-1], (1 / 255,) * 3


def _sizes(spec: PreprocessSpec) -> Iterator[Change]:
    """Other ways to bring a picture to its size."""
    plain = replace(spec, resize_px=None, resize_shorter_px=None, letterbox_level=None)
    side = max(spec.width_px, spec.height_px)
    if plain != spec:
        yield Change("resize", "stretch the whole picture to the size, without a crop", plain)
    for part in CROPS:
        shorter = int(side / part)
        if shorter != spec.resize_shorter_px:
            step = "crop" if spec.resize_shorter_px else "resize"
            text = f"resize_shorter_px = {shorter} (crop_pct = {part})"
            yield Change(step, text, replace(plain, resize_shorter_px=shorter))
        if part < 1 and (shorter, shorter) != spec.resize_px:
            text = f"resize_px = [{shorter}, {shorter}]"
            yield Change("resize", text, replace(plain, resize_px=(shorter, shorter)))
    for level in (0, 114, 128, 255):
        if level != spec.letterbox_level:
            text = f"letterbox_level = {level}"
            yield Change("resize", text, replace(plain, letterbox_level=level))
