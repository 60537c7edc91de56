"""Lists the files of Convoy that one image, one training or one promotion passes through.

    python -m benchmarks.walks image
    python -m benchmarks.walks train
    python -m benchmarks.walks promote

A file counts when one of its functions is called; what runs while a module is imported does not
count. ``entries`` is how often control came into the file from another one of Convoy's files. The
processes that a command starts, such as the benchmark of a plan, are not followed.

``image`` sends one raw JPEG, without a token or a canary, to a worker that is warm. ``train`` and
``promote`` use a registry of their own: digits, the recipe ``cnn``, one epoch, and a champion.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import CO_OPTIMIZED
from io import BytesIO
from pathlib import Path
from types import FrameType
from typing import Any

from PIL import Image

from benchmarks.http_server_parts.__main__ import worker
from benchmarks.http_servers.servers import serving
from benchmarks.http_servers.windows import fastest_plan
from benchmarks.serving import ROOT, prepare
from service.server import gunicorn_worker
from service.server.gunicorn_worker import LoopWorker
from service.server.request_loop import POLL_INTERVAL_S, RequestLoop

PACKAGES = tuple(f"{ROOT / name}{os.sep}" for name in ("convoy", "registry", "training", "service"))
FOLDER = "WALKS_FOLDER"
"""The variable with the folder for the walks of workers; they record while ``on`` is in it."""
TIMEOUT_S = 30.0


class Walk:
    """Records which files control enters, in all threads."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._of_thread = threading.local()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        is_function = code.co_flags & CO_OPTIMIZED  # not the body of a module or class
        if event == "call" and is_function and code.co_filename.startswith(PACKAGES):
            if getattr(self._of_thread, "file", None) != code.co_filename:
                self.files.append(os.path.relpath(code.co_filename, ROOT))
            self._of_thread.file = code.co_filename
        elif event == "return" and code.co_filename.startswith(PACKAGES) and frame.f_back:
            self._of_thread.file = _nearest(frame.f_back)

    @contextmanager
    def recording(self) -> Iterator[None]:
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def _nearest(frame: FrameType | None) -> str | None:
    """The file of the innermost frame that is Convoy's."""
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGES):
        frame = frame.f_back
    return frame.f_code.co_filename if frame else None


class RecordedLoop(RequestLoop):
    """Records the turns during which the file ``on`` exists."""

    def turn(self, wait_s: float = POLL_INTERVAL_S) -> None:
        folder = Path(os.environ[FOLDER])
        if not (folder / "on").exists():
            super().turn(wait_s)
            return
        walk = Walk()
        with walk.recording():
            super().turn(wait_s)
        if any(file.endswith("decode.py") for file in walk.files):
            (folder / "walk").write_text("\n".join(walk.files))


class RecordedWorker(LoopWorker):
    """A worker whose loop is recorded."""

    def init_process(self) -> None:
        gunicorn_worker.RequestLoop = RecordedLoop  # type: ignore[attr-defined]
        super().init_process()


def walk_of_image() -> list[str]:
    bundle = prepare("w1")
    model, plan = f"models:/{bundle.manifest.model}@champion", fastest_plan("w1")
    body = BytesIO()
    Image.new("L", (28, 28), 128).save(body, "JPEG")
    with tempfile.TemporaryDirectory(prefix="convoy-walk-") as folder:
        os.environ[FOLDER] = folder
        command = worker("benchmarks.walks.RecordedWorker")
        with serving(command, model, plan) as server:
            walk, deadline = Path(folder) / "walk", time.monotonic() + TIMEOUT_S
            (Path(folder) / "on").touch()
            while not walk.exists() and time.monotonic() < deadline:
                connection = server.connect()
                headers = {"Content-Type": "image/jpeg"}
                connection.request("POST", "/v1/classify", body.getvalue(), headers)
                assert connection.getresponse().status == 200
                connection.close()
            return walk.read_text().splitlines()


def walk_of_command(*before: list[str], recorded: list[str]) -> list[str]:
    """The walk of ``convoy`` with the arguments ``recorded``, after other commands."""
    from convoy.__main__ import main

    walk = Walk()
    with tempfile.TemporaryDirectory(prefix="convoy-walk-") as folder:
        os.environ["CONVOY_HOME"] = folder
        for arguments in before:
            assert main(arguments) == 0, arguments
        with walk.recording():
            main(recorded)
    return walk.files


def train(seed: int) -> list[str]:
    options = ["--data", "digits", "--set", "epochs=1", "--seed", str(seed)]
    return ["train", *options, "--model", "digits"]


WALKS: dict[str, Callable[[], list[str]]] = {
    "image": walk_of_image,
    "train": lambda: walk_of_command(recorded=train(1)),
    "promote": lambda: walk_of_command(
        train(1),
        ["promote", "digits", "1"],
        train(2),
        recorded=["promote", "digits", "2", "--force", "--reason", "a walk"],
    ),
}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("walk", choices=WALKS)
    files = WALKS[options.parse_args().walk]()
    order = list(dict.fromkeys(files))
    print(f"{'entries':>7}  file")
    for file in order:
        print(f"{files.count(file):>7}  {file}")
    again = sum(files.count(file) > 1 for file in order)
    print(f"{len(order)} files, {again} of them entered more than once")
    return 0


if __name__ == "__main__":
    sys.exit(main())
