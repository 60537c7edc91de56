"""The manifest's records: training writes them, the registry stores them, serving reads them.

Imports msgspec only, so that the HTTP workers, the CLI's ``--help`` and the tests of the records
load neither torch nor MLflow. All records are immutable, refuse unknown fields, and check their own
values, so that code that has a record can trust it.
"""

import math
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from registry.core.errors import BundleInvalid, UsageError
from registry.core.names import Sha256, check_model_name

SCHEMA_VERSION = 4

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
Resampler = Literal["pillow", "torch", "torch-no-antialias", "opencv"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Side = Annotated[int, Meta(ge=1, le=4096)]
Level = Annotated[int, Meta(ge=0, le=255)]


# A plan's probabilities may differ from fp32's by so much, by precision. Trained networks differed
# by about 0.01 in bf16 and 0.05 in int8 (docs/decisions/0006).
DEFAULT_TOLERANCES: dict[Precision, float] = {
    "fp32": 1e-3,
    "fp16": 0.02,
    "bf16": 0.05,
    "int8": 0.2,
}


class PreprocessSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How encoded bytes become the network's input, in training, publishing and serving alike.

    The picture is resized, then the centre ``height_px`` × ``width_px`` is cut out. It has many
    fields because each library resizes in its own way, and a network answers best for the pictures
    of the library that trained it. At most one of the first three is set; without them, the picture
    is stretched to ``height_px`` × ``width_px``.

    Attributes:
        resize_px: the picture is stretched to this width and height.
        resize_shorter_px: the shorter side gets this size, and the longer one keeps the ratio.
        letterbox_level: the whole picture is fitted in, centred, and the rest gets this level.
        interpolation: how pixels are resampled.
        resampler: whose arithmetic resizes. ``pillow`` averages over all pixels when it shrinks a
            picture, and so do torchvision and timm on pictures. ``torch`` does the same for tensors
            of 8-bit levels, and rounds otherwise; transformers uses it. ``torch-no-antialias`` and
            ``opencv`` read few pixels. All but ``pillow`` take some ten times as long here.
        longer_side: how the longer side is rounded: to the ``nearest`` pixel, or ``down``, as
            torchvision does.
        crop_offset: how half a pixel of the crop's offset is rounded: ``down``, or to the ``even``
            number, as torchvision does.
        jpeg_quality: the picture is written as a JPEG of this quality, and read again.
        jpeg_of: which picture is: the whole ``resized`` one, or the ``cropped`` one.
        shrink_on_load: whether a large JPEG may be decoded at a fraction of its size, which is
            faster, and moves some levels by one or two.
        crop_early: whether only the part that stays is resized, which is faster, and moves some
            levels by one or two.
        mode: grey, or the order of the channels.
        mean: per channel, in units of pixel value / 255; the device subtracts it.
        std: as ``mean``; the device divides by it.
        exif: whether the picture is turned as its EXIF orientation says.
    """

    mode: Literal["L", "RGB", "BGR"]
    width_px: Side
    height_px: Side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_px: tuple[Side, Side] | None = None
    resize_shorter_px: Side | None = None
    letterbox_level: Level | None = None
    interpolation: Interpolation = "bilinear"
    resampler: Resampler = "pillow"
    longer_side: Literal["nearest", "down"] = "nearest"
    crop_offset: Literal["down", "even"] = "down"
    jpeg_quality: Annotated[int, Meta(ge=1, le=95)] | None = None
    jpeg_of: Literal["resized", "cropped"] = "resized"
    shrink_on_load: bool = True
    crop_early: bool = True
    exif: Literal["transpose", "ignore"] = "transpose"

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mode {self.mode} needs {self.channels} values in mean and in std")
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError("mean must be finite")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError("std must be finite and above 0")
        names = ("resize_px", "resize_shorter_px", "letterbox_level")
        if len(found := [name for name in names if getattr(self, name) is not None]) > 1:
            raise ValueError(f"only one of {' and '.join(found)} may be set")
        if self.resampler == "torch" and self.interpolation == "lanczos":
            raise ValueError("torch has no lanczos; its libraries use pillow for it")
        shorter = self.resize_shorter_px
        if shorter is not None and shorter < max(self.width_px, self.height_px):
            raise ValueError("resize_shorter_px must be at least width_px and height_px")
        if self.resize_px and (
            self.resize_px[0] < self.width_px or self.resize_px[1] < self.height_px
        ):
            raise ValueError("resize_px must be at least width_px and height_px")

    @property
    def channels(self) -> int:
        """1 for the mode ``L`` (grey), 3 for ``RGB`` and ``BGR``."""
        return 1 if self.mode == "L" else 3

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one ``Pixels`` array: (height_px, width_px, channels)."""
        return self.height_px, self.width_px, self.channels


class ListedNetwork(
    Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="listed"
):
    """The name of a network in ``registry.model.networks.NETWORKS``, and its arguments."""

    name: str
    args: dict[str, Any] = {}

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.args.items())])


class OnnxNetwork(Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="onnx"):
    """The bundle's ONNX graph, from pixels to logits. The bundle has no weights for torch."""

    def __str__(self) -> str:
        return "an ONNX graph"


NetworkSpec = ListedNetwork | OnnxNetwork
"""The description of a network in a manifest. It is data that Convoy can load, never code."""


class DataRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The pictures that trained a version and those held out. ``sha256`` is the data set's digest.

    The digests of the single pictures are in ``training.npz`` and ``heldout.npz``.
    """

    name: str
    sha256: Sha256
    counts: dict[str, int]


class SourceRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What produced this version, in enough detail to train it again."""

    recipe: str
    seed: int
    device: str
    git_commit: str | None = None
    versions: dict[str, str] = {}


class ImportRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an imported version comes from, and how it was compared with its owner's answers.

    Attributes:
        origin: the source, for people.
        sha256: the digest of the original graph.
        compared: for how many pictures the owner's answers were equal; 0 without such answers.
        largest_difference: of a probability that the owner gave; None without such answers.
    """

    origin: str
    sha256: Sha256
    compared: Annotated[int, Meta(ge=0)] = 0
    largest_difference: float | None = None


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """The digest and the size of one file of a bundle."""

    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0)]


class Manifest(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The record inside a bundle. ``files`` lists every other file of the bundle.

    A field with a default is an optional section: a version without it leaves it out of the
    manifest, and serves without that ability. An older Convoy that does not know a section refuses
    the version, so a new section needs no new ``schema_version``. It has many fields because one
    digest protects them all.

    ``tolerances``: for each precision, the largest difference to a published probability that a
    replay of the golden images accepts. ``plan_accuracy``: plan → accuracy on the held-out
    pictures, for the plans below fp32 that the publishing machine could run; the accuracy of fp32
    is ``metrics["validation_accuracy"]``. An imported version without labelled examples has no such
    metric; the accuracy of a plan is then the part of the examples that get fp32's best class.
    ``scored_champion``: the digest of the manifest of the
    version that was champion when this one was published. That champion's scores on the held-out
    pictures of this version are in ``champion.npz``.
    """

    schema_version: int
    model: str
    network: NetworkSpec
    labels: Annotated[tuple[str, ...], Meta(min_length=2)]
    preprocess: PreprocessSpec
    metrics: dict[str, float]
    data: DataRecord
    source: SourceRecord
    tolerances: dict[Precision, Annotated[float, Meta(gt=0, le=1)]] = msgspec.field(
        default_factory=DEFAULT_TOLERANCES.copy
    )
    plan_accuracy: dict[str, float] = {}
    scored_champion: Sha256 | None = None
    imported: ImportRecord | None = None
    files: dict[str, FileEntry] = {}

    def __post_init__(self) -> None:
        check_model_name(self.model)
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must differ from each other")
        if missing := set(DEFAULT_TOLERANCES) - set(self.tolerances):
            raise ValueError(f"tolerances must have a value for {', '.join(sorted(missing))}")

    def to_json(self) -> bytes:
        """Stable UTF-8 JSON: equal manifests give equal bytes."""
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"


MAX_EVALUATION_BYTES = 512 * 1024 * 1024


class LaterEvaluation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Held-out pictures on which a version was scored after it was published.

    Attributes:
        manifest_sha256: the digest of the version's manifest.
        data: the pictures.
        metrics: accuracy, log loss and calibration error, as in a manifest.
        scored_champion: as in a manifest, for ``champion.npz`` among ``files``.
        files: they take the place of the bundle's files of the same names.
    """

    manifest_sha256: Sha256
    data: DataRecord
    metrics: dict[str, float]
    scored_champion: Sha256 | None = None
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        wanted = {"heldout.npz", "champion.npz"} if self.scored_champion else {"heldout.npz"}
        if set(self.files) - {"thumbnails.npz"} != wanted:
            raise ValueError(f"an evaluation needs the files {', '.join(sorted(wanted))}")
        if any(each.size_bytes > MAX_EVALUATION_BYTES for each in self.files.values()):
            raise ValueError(f"a file has more than {MAX_EVALUATION_BYTES:,} bytes")
        if "validation_accuracy" not in self.metrics:
            raise ValueError("an evaluation needs validation_accuracy")


class _SchemaOnly(Struct):
    schema_version: int


def manifest_from_json(data: bytes) -> Manifest:
    """The manifest in ``data``.

    Raises:
        BundleInvalid: ``data`` is not JSON, is of another schema version, or has an impossible
            value.
    """
    try:
        found = msgspec.json.decode(data, type=_SchemaOnly).schema_version
        if found != SCHEMA_VERSION:
            raise BundleInvalid(
                f"the manifest has schema_version {found}; this Convoy reads {SCHEMA_VERSION}: "
                "publish the version again, or run the Convoy that wrote it"
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError, UsageError) as error:
        raise BundleInvalid(f"the manifest cannot be read: {error}") from error


class ClassScore(Struct, frozen=True):
    """The probability of one class, 0 … 1, with the class's label and index."""

    label: str
    index: int
    probability: float
