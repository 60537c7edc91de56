"""Opens the slots of a worker, and loads their versions, each checked before it serves."""

from functools import partial

from registry.core.errors import BundleInvalid, UsageError
from registry.delivery.deployment import DeployedVersion
from registry.delivery.signing import TrustedKeys, check_signature
from registry.model.bundle import WEIGHTS, Bundle
from registry.model.plans.planner import Planner
from service.inference.batcher import BatchLimits, MicroBatcher
from service.inference.loaded_model import ServedModel
from service.loading.gpu_client import GpuPlanner, PlanLoader
from service.loading.model_slot import ModelSlot
from service.loading.worker_sync import WorkerGroup
from service.observability.metrics import Metrics
from service.settings import Settings

Slots = dict[str, ModelSlot]
"""Slots by model name; the first is the default model."""


def open_slots(settings: Settings, metrics: Metrics) -> Slots:
    """A slot for each model: loaded from disk if possible, and following the deployment.

    Call it in the process that serves: the engines that it opens use OpenMP, whose threads do not
    survive a fork.

    Raises:
        UsageError: no plan has the name in ``settings.plan``, or ``settings.device`` is a GPU and
            the process that owns it was not started.
    """
    planner = open_planner(settings)
    trust = TrustedKeys.from_environment()
    group = WorkerGroup(settings.run_folder and settings.run_folder / "workers")
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
    """Loads versions in this worker, or in the process that owns the GPU.

    Raises:
        UsageError: as ``open_slots``.
    """
    on_cpu = Planner(settings.plans_folder, "cpu", settings.forward_threads, settings.plan)
    if settings.gpu_socket is not None:
        return GpuPlanner(settings.gpu_socket, on_cpu)
    if settings.device not in ("auto", "cpu"):
        raise UsageError(
            f"CONVOY_DEVICE={settings.device} needs the process that owns the GPU; start the "
            "service with convoy serve"
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
    """The version in ``bundle``, loaded, warmed up and checked on its golden images.

    This does not check whether a signature has ended, so that a version does not stop serving on a
    date: the puller checks that before it deploys a version.

    Raises:
        BundleInvalid: the bundle is damaged or of another model than ``name``, or ``trust`` has
            keys and none of them has signed the version.
        ConvoyError: as ``planner.load``.
    """
    if bundle.manifest.model != name:
        raise BundleInvalid(
            f"the bundle of {name} version {deployed.version} belongs to the model "
            f"{bundle.manifest.model!r}; publish it again under its own name"
        )
    # The weights are verified when they are read. Verify all other files, also those that this plan
    # does not read.
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
            BatchLimits(
                max_batch=settings.max_batch,
                queue_limit=settings.queue_limit,
                max_batch_compute_ms=settings.max_batch_compute_ms,
                max_queue_delay_s=settings.max_queue_delay_s,
                deadline_s=settings.deadline_s,
            ),
            metrics.on_batch(bundle.manifest.model, deployed.version),
        ),
    )
