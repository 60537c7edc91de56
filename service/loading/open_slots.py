"""Opens the models of a worker, and loads their versions, each proved before it serves."""

from functools import partial

from registry.core.errors import BundleInvalid, UsageError
from registry.delivery.deployment import DeployedVersion
from registry.delivery.signing import TrustedKeys, check_signature
from registry.model.bundle import WEIGHTS, Bundle
from registry.model.plans.planner import Planner
from service.inference.batcher import MicroBatcher
from service.inference.loaded_model import ServedModel
from service.loading.gpu_client import GpuPlanner, PlanLoader
from service.loading.model_slot import ModelSlot
from service.loading.worker_sync import WorkerGroup
from service.observability.metrics import Metrics
from service.settings import Settings

Slots = dict[str, ModelSlot]
"""By model name; the first is the default model."""


def open_slots(settings: Settings, metrics: Metrics) -> Slots:
    """A slot for each model, loaded from disk if it can be, and following what is released.

    An engine is opened here, in the process that serves: OpenMP does not survive a fork.

    Raises:
        UsageError: there is no plan of the name that was asked for, or a GPU was asked for of a
            worker that was started without the process that owns it.
    """
    planner = open_planner(settings)
    trust = TrustedKeys.from_environment()
    group = WorkerGroup(settings.run_folder and settings.run_folder / "crew")
    slots = {
        ref.name: ModelSlot(
            ref,
            settings.models_folder,
            partial(
                load_served,
                name=ref.name,
                planner=planner,
                settings=settings,
                metrics=metrics,
                trust=trust,
            ),
            planner.choose,
            metrics.version_switched,
            group,
            settings.keep_warm_s,
        )
        for ref in settings.models
    }
    for slot in slots.values():
        slot.start(gently=settings.forward_threads == 1)
    return slots


def open_planner(settings: Settings) -> PlanLoader:
    """What loads the versions of this worker: in itself, or in the process that owns the GPU."""
    on_cpu = Planner(settings.plans_folder, "cpu", settings.forward_threads, settings.plan)
    if settings.gpu_socket is not None:
        return GpuPlanner(settings.gpu_socket, on_cpu)
    if settings.device not in ("auto", "cpu"):
        raise UsageError(
            f"CONVOY_DEVICE={settings.device}: start with python -m service, which starts the "
            "process that owns the GPU"
        )
    return on_cpu


def load_served(
    bundle: Bundle,
    deployed: DeployedVersion,
    *,
    name: str,
    planner: PlanLoader,
    settings: Settings,
    metrics: Metrics,
    trust: TrustedKeys,
) -> ServedModel:
    """The version in ``bundle``, warmed up and proved; raises as ``planner.load`` does.

    And ``BundleInvalid`` when it is another model's than ``name``, or when there are keys to
    ``trust`` and none has signed it. Whether it may still serve is the puller's to judge: what
    serves must not end by the calendar.
    """
    if bundle.manifest.model != name:
        raise BundleInvalid(
            f"the bundle of {name} version {deployed.version} is of the model "
            f"{bundle.manifest.model!r}; publish it again under its own name"
        )
    # The weights are, as they are read; what this plan does not read must be whole all the same.
    bundle.verify(name for name in bundle.serving_files() if name != WEIGHTS)
    if trust:
        check_signature(bundle, name, deployed.version, trust)
    classifier = planner.load(bundle)
    return ServedModel(
        manifest=bundle.manifest,
        manifest_sha256=bundle.manifest_sha256,
        version=deployed.version,
        alias=deployed.alias,
        classifier=classifier,
        batcher=MicroBatcher(
            classifier.classify,
            settings.max_batch,
            settings.queue_limit,
            settings.max_batch_compute_ms,
            settings.max_queue_delay_s,
            settings.deadline_s,
            metrics.on_batch(bundle.manifest.model, deployed.version),
        ),
    )
