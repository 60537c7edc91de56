"""A stand-in for a GPU: the CPU under another name, which a test can make fail.

``python -m tests.stand_in_gpu serve …`` runs ``python -m service …`` with it. While the file that
``STAND_IN_LOST`` names exists, the device fails, and a process that starts finds no GPU. While the
file that ``STAND_IN_HELD`` names exists, a process that starts to own the device waits.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from registry.core.errors import DeviceLost
from registry.model.bundle import Bundle
from registry.model.classifier import Classifier
from registry.model.plans.base import PredictFn
from registry.model.plans.planner import Planner
from registry.model.plans.torch_eager import EAGER

DEVICE, PLAN = "cuda:0 (stand-in)", "cuda-stand-in"


def lost() -> bool:
    return Path(os.environ.get("STAND_IN_LOST", "/nowhere")).exists()


class StandInPlanner:
    """A ``PlanLoader`` for the stand-in. ``wrap`` may change the forward pass."""

    def __init__(self, wrap: Any = lambda predict: predict) -> None:
        self.loads = 0
        self.chosen: list[str] = []
        self._wrap = wrap

    def load(self, bundle: Bundle) -> Classifier:
        self.loads += 1
        eager = Planner(Path("unused"), "cpu", 1, EAGER).load(bundle)
        return Classifier(self._wrap(eager.predict), PLAN, DEVICE)

    def choose(self, bundle: Bundle) -> None:
        self.chosen.append(bundle.manifest_sha256)


def losable(predict: PredictFn) -> PredictFn:
    def losing(pixels: Any) -> Any:
        if lost():
            raise DeviceLost("CUDA error: device-side assert triggered")
        return predict(pixels)

    return losing


def main() -> int:
    step, *arguments = sys.argv[1:]
    if step == "serve":
        from service import supervisor
        from service.__main__ import main as service

        supervisor.GPU = [sys.executable, "-m", "tests.stand_in_gpu", "own"]
        # Replaces the supervisor's import.
        supervisor.may_use_gpu = lambda wanted: True  # type: ignore[attr-defined]
        return service(arguments)
    while Path(os.environ.get("STAND_IN_HELD", "/nowhere")).exists():
        time.sleep(0.05)
    from registry.core import devices
    from registry.model.plans import planner
    from service.loading import gpu_process

    devices.choose_device = lambda wanted="auto": "cpu" if lost() else "cuda:0"
    # A function in place of the class.
    planner.Planner = lambda *arguments: StandInPlanner(losable)  # type: ignore[misc, assignment]
    return gpu_process.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
