"""The protocol's records of the server and its models: metadata, configuration, statistics."""

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from prometheus_client.samples import Sample

from registry.core.names import convoy_version
from registry.model.manifest import PreprocessSpec
from service.inference.loaded_model import ActiveVersions, ServedModel
from service.inference.requests import Target
from service.loading.model_slot import ModelSlot
from service.observability.metrics import Metrics
from service.protocols.openinference.tensors import TensorSpec, input_specs, output_specs
from service.state import State

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "statistics",
)
PLATFORM = "convoy"
_CONFIG_TYPES = {"BYTES": "TYPE_STRING", "UINT8": "TYPE_UINT8", "FP32": "TYPE_FP32"}
# Stage of a request in the metrics → the statistic that it is a part of.
_STAGES = {
    "read": "compute_input",
    "decode": "compute_input",
    "queue": "queue",
    "forward": "compute_infer",
    "encode": "compute_output",
}


class ServerMetadata(Struct, frozen=True):
    """The server, and the extensions of the protocol that it supports."""

    name: str
    version: str
    extensions: tuple[str, ...]


class ModelParameters(Struct, frozen=True):
    """What a client needs to prepare images and to read answers.

    ``labels`` are in the order of the probabilities.
    """

    labels: tuple[str, ...]
    preprocess: PreprocessSpec
    alias: str | None
    plan: str
    device: str


class ModelMetadata(Struct, frozen=True, kw_only=True):
    """One version: its tensors, labels and preprocessing. A request has one of the ``inputs``."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    parameters: ModelParameters


class ConfigTensor(Struct, frozen=True, omit_defaults=True):
    """One tensor in a configuration; ``dims`` has no entry for the images of a batch."""

    name: str
    data_type: str
    dims: list[int]
    optional: bool = False


class ModelConfig(Struct, frozen=True, kw_only=True):
    """One version, as Triton describes a model's configuration."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    version_policy: dict[str, Any]
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    dynamic_batching: dict[str, Any]
    parameters: dict[str, dict[str, str]]


class Duration(Struct):
    """How often something happened, and for how many nanoseconds in total."""

    count: int = 0
    ns: int = 0


class InferenceStatistics(Struct, frozen=True):
    """The time of each stage. ``queue`` and the ``compute_…`` are parts of ``success``."""

    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class VersionStatistics(Struct, frozen=True, kw_only=True):
    """One version since the service started, in all workers.

    ``inference_count`` counts images, and ``execution_count`` forward passes.
    """

    name: str
    version: str
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics


class Statistics(Struct, frozen=True):
    """The statistics of versions."""

    model_stats: list[VersionStatistics]


class IndexEntry(Struct, frozen=True):
    """One version in the repository's index; ``reason`` says why none is ready."""

    name: str
    version: str
    state: str
    reason: str = ""


def server_metadata() -> ServerMetadata:
    """The metadata of this server."""
    return ServerMetadata("convoy", convoy_version(), EXTENSIONS)


def model_metadata(served: ServedModel, serving: ActiveVersions) -> ModelMetadata:
    """The metadata of ``served``, one of the versions that are ``serving``."""
    manifest = served.manifest
    return ModelMetadata(
        name=served.name,
        versions=[str(each.version) for each in (serving.champion, serving.challenger) if each],
        platform=PLATFORM,
        inputs=input_specs(manifest.preprocess),
        outputs=output_specs(len(manifest.labels)),
        parameters=ModelParameters(
            labels=manifest.labels,
            preprocess=manifest.preprocess,
            alias=served.alias,
            plan=served.plan,
            device=served.device,
        ),
    )


def model_config(served: ServedModel, max_batch: int) -> ModelConfig:
    """The configuration of ``served``; ``max_batch`` is the most images of a request."""
    labels = msgspec.json.encode(served.manifest.labels).decode()
    return ModelConfig(
        name=served.name,
        platform=PLATFORM,
        backend=PLATFORM,
        max_batch_size=max_batch,
        version_policy={"specific": {"versions": [served.version]}},
        input=[_config(each, optional=True) for each in input_specs(served.manifest.preprocess)],
        output=[_config(each) for each in output_specs(len(served.manifest.labels))],
        dynamic_batching={},
        parameters={
            "labels": {"string_value": labels},
            "plan": {"string_value": served.plan},
        },
    )


def index(slots: Mapping[str, ModelSlot]) -> list[IndexEntry]:
    """The versions that serve, and the models for which none does."""
    entries = []
    for name, slot in slots.items():
        if (serving := slot.serving) is None:
            reason = slot.error or "no version is deployed"
            entries.append(IndexEntry(name, "", "UNAVAILABLE", reason))
        else:
            versions = (serving.champion, serving.challenger)
            entries += [IndexEntry(name, str(each.version), "READY") for each in versions if each]
    return entries


def model_statistics(state: State, wanted: Target) -> Statistics:
    """The statistics of all models, of one model, or of one version, in all workers.

    Raises:
        ModelNotFound, VersionNotFound, ModelNotReady: as ``Pipeline.find``.
    """
    if wanted.version is None and wanted.alias is None:
        names = [state.slot(wanted.name).ref.name] if wanted.name else list(state.slots)
        return Statistics([each for name in names for each in statistics(name, state.metrics)])
    served, _ = state.pipeline.find(wanted)
    found = statistics(served.name, state.metrics)
    return Statistics([each for each in found if each.version == str(served.version)])


def statistics(name: str, metrics: Metrics) -> list[VersionStatistics]:
    """The statistics of each version of the model ``name``, in all workers."""
    found: dict[str, _Sums] = {}
    for sample in metrics.samples(name):
        found.setdefault(sample.labels["model_version"], _Sums()).add(sample)
    return [found[version].statistics(name, version) for version in sorted(found, key=int)]


def _config(spec: TensorSpec, optional: bool = False) -> ConfigTensor:
    return ConfigTensor(spec.name, _CONFIG_TYPES[spec.datatype], spec.shape[1:] or [1], optional)


class _Sums:
    """Adds up the samples of one version."""

    def __init__(self) -> None:
        self._durations = {name: Duration() for name in InferenceStatistics.__struct_fields__}
        self._images = self._batches = 0

    def add(self, sample: Sample) -> None:
        """Add one sample, by its name."""
        name, labels, value = sample.name, sample.labels, sample.value
        if name == "convoy_requests_total":
            outcome = "success" if labels["outcome"] == "ok" else "fail"
            self._durations[outcome].count += int(value)
        elif name == "convoy_request_seconds_sum":
            self._durations["success"].ns += int(value * 1e9)
        elif name == "convoy_stage_seconds_sum":
            self._durations[_STAGES[labels["stage"]]].ns += int(value * 1e9)
        elif name == "convoy_stage_seconds_count" and labels["stage"] != "read":
            self._durations[_STAGES[labels["stage"]]].count += int(value)
        elif name == "convoy_images_total":
            self._images += int(value)
        elif name == "convoy_batch_size_count":
            self._batches += int(value)

    def statistics(self, name: str, version: str) -> VersionStatistics:
        """The sums, as the statistics of ``version`` of the model ``name``."""
        return VersionStatistics(
            name=name,
            version=version,
            inference_count=self._images,
            execution_count=self._batches,
            inference_stats=InferenceStatistics(**self._durations),
        )
