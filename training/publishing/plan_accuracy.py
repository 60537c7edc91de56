"""Measures, when a version is published, how accurate every plan below fp32 is.

A worker that benchmarks such a plan has only the golden images. The accuracy on a few thousand
held-out pictures is measured here, once.
"""

import logging
import tempfile
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from registry.model.bundle import Bundle, with_manifest
from registry.model.image.decode import Pixels
from registry.model.plans.base import catalogue
from registry.model.plans.benchmark_process import (
    HELDOUT_LABELS,
    HELDOUT_PIXELS,
    LIMIT_S,
    run_benchmark,
)
from registry.model.plans.planner import missing_exports

log = logging.getLogger(__name__)

SCORE_S = 0.1  # for each held-out picture, in addition to ``LIMIT_S``


def record_plan_accuracy(
    bundle: Bundle, pixels: Pixels, labels: NDArray[np.int64], device: str
) -> Bundle:
    """``bundle`` with the held-out accuracy of every plan below fp32 that this machine can run.

    Args:
        bundle: a complete bundle; its manifest is rewritten.
        pixels: uint8 (N, H, W, C), the held-out pictures as the service decodes them.
        labels: int64 (N,), their true classes.
        device: where to try plans, in addition to the CPU.
    """
    accuracies: dict[str, float] = {}
    for each in {"cpu", device}:
        accuracies |= measure_plans(bundle, pixels, labels, each)
    return with_manifest(bundle, replace(bundle.manifest, plan_accuracy=accuracies))


def measure_plans(
    bundle: Bundle, pixels: Pixels, labels: NDArray[np.int64], device: str
) -> dict[str, float]:
    """The accuracy of every plan below fp32 that ``device`` runs, by the plan's name.

    The arguments are those of ``record_plan_accuracy``. Each plan runs in a process of its own. A
    plan that fails is left out, with a warning.
    """
    names = [
        plan.name
        for plan in catalogue().values()
        if plan.precision != "fp32"
        and not plan.unsupported(device)
        and not missing_exports(plan, bundle.manifest)
    ]
    accuracies: dict[str, float] = {}
    limit_s = LIMIT_S + round(SCORE_S * len(pixels))
    with tempfile.TemporaryDirectory(prefix="convoy-heldout-") as folder:
        work = Path(folder)
        np.save(work / HELDOUT_PIXELS, pixels)
        np.save(work / HELDOUT_LABELS, labels)
        for name in names:
            found = run_benchmark("score", name, bundle, device, heldout=work, limit_s=limit_s)
            if found.accuracy is None:
                log.warning("plan %s cannot be measured: %s", name, found.reason)
            else:
                accuracies[name] = found.accuracy
                log.info("plan %s: held-out accuracy %.4f", name, found.accuracy)
    return accuracies
