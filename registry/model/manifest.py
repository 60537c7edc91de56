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
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Side = Annotated[int, Meta(ge=1, le=4096)]


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

    With ``resize_shorter_px``, the shorter side is resized to it, and the centre ``height_px`` ×
    ``width_px`` is cut out. Without it, the whole picture is stretched to that size. ``mean`` and
    ``std`` are per channel, in units of pixel value / 255. The device applies them.
    """

    mode: Literal["L", "RGB"]
    width_px: Side
    height_px: Side
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize_shorter_px: Side | None = None
    interpolation: Interpolation = "bilinear"
    exif: Literal["transpose", "ignore"] = "transpose"

    def __post_init__(self) -> None:
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise ValueError(f"mode {self.mode} needs {self.channels} values in mean and in std")
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError("mean must be finite")
        if not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError("std must be finite and above 0")
        shorter = self.resize_shorter_px
        if shorter is not None and shorter < max(self.width_px, self.height_px):
            raise ValueError("resize_shorter_px must be at least width_px and height_px")

    @property
    def channels(self) -> int:
        """1 for the mode ``L`` (grey), 3 for ``RGB``."""
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
    is ``metrics["validation_accuracy"]``. ``scored_champion``: the digest of the manifest of the
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
