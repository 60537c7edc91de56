"""Fashion-MNIST (Xiao et al. 2017, https://arxiv.org/abs/1708.07747), from one of five sources.

They are tried in this order: a folder that the user names, the installed files of Debian's package,
the cache, the publisher's address, and ``apt-get download`` of Debian's package, which needs no
root. The digests are of the *uncompressed* content, because Debian compressed the files again.
"""

import gzip
import hashlib
import logging
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from registry.core.errors import UsageError

log = logging.getLogger(__name__)

LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
DEBIAN_PACKAGE = "dataset-fashion-mnist"
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
PUBLISHER = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
CONNECT_TIMEOUT_S = 10


class IdxFile(NamedTuple):
    """One file of the data set, in the IDX format.

    Attributes:
        name: the file's name at the publisher, compressed with gzip.
        sha256: hexadecimal digest of the uncompressed content.
        header_bytes: length of the IDX header, after which the values follow.
        shape: shape of the uint8 values: (N, 28, 28) pictures or (N,) labels.
    """

    name: str
    sha256: str  # of the uncompressed content
    header_bytes: int
    shape: tuple[int, ...]


FILES = (
    IdxFile(
        "train-images-idx3-ubyte.gz",
        # pragma: allowlist nextline secret
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        16,
        (60_000, 28, 28),
    ),
    IdxFile(
        "train-labels-idx1-ubyte.gz",
        # pragma: allowlist nextline secret
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        8,
        (60_000,),
    ),
    IdxFile(
        "t10k-images-idx3-ubyte.gz",
        # pragma: allowlist nextline secret
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        16,
        (10_000, 28, 28),
    ),
    IdxFile(
        "t10k-labels-idx1-ubyte.gz",
        # pragma: allowlist nextline secret
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        8,
        (10_000,),
    ),
)

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.uint8], NDArray[np.int64]]


def load(folder: Path | None, cache: Path) -> Arrays:
    """Training pictures, training labels, test pictures, test labels.

    Pictures are uint8 (N, 28, 28), white on black; labels int64 (N,).

    Raises:
        UsageError: ``folder`` lacks a file or holds a damaged one, or no source has the files.
    """
    found = folder or _find(cache / "fashion-mnist")
    train, train_labels, test, test_labels = (read_idx(found / file.name, file) for file in FILES)
    return train, train_labels.astype(np.int64), test, test_labels.astype(np.int64)


def read_idx(path: Path, file: IdxFile) -> NDArray[np.uint8]:
    """The array in a gzip-compressed IDX file, after checking the published digest.

    Raises:
        UsageError: the file is missing or damaged, or has another digest.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{path} is missing") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} is damaged ({error}); delete it and try again") from error
    found = hashlib.sha256(content).hexdigest()
    if found != file.sha256:
        raise UsageError(
            f"{path} is damaged: its content has sha256 {found[:12]}…, and the published file has "
            f"{file.sha256[:12]}…; delete it and try again"
        )
    return np.frombuffer(content, np.uint8, offset=file.header_bytes).reshape(file.shape).copy()


def _find(cache: Path) -> Path:
    """A folder with all four files; downloads them into ``cache`` if there is none yet."""
    for folder in (DEBIAN_FOLDER, cache):
        if all((folder / file.name).is_file() for file in FILES):
            return folder
    failures = []
    sources: tuple[Callable[[Path], None], ...] = (download_from_publisher, download_from_debian)
    for download in sources:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as name:
            temporary = Path(name) / "files"
            temporary.mkdir()
            try:
                download(temporary)
                for file in FILES:
                    read_idx(temporary / file.name, file)
            except (UsageError, OSError, subprocess.SubprocessError) as error:
                log.info("%s: %s", download.__name__, error)
                failures.append(f"{download.__name__}: {error}")
                continue
            shutil.rmtree(cache, ignore_errors=True)
            temporary.rename(cache)  # atomic: the cache never holds only some of the files
            return cache
    raise UsageError(
        "Fashion-MNIST could not be downloaded; name a folder that holds its four files with "
        "fashion-mnist:FOLDER. Tried: " + "; ".join(failures)
    )


def download_from_publisher(folder: Path) -> None:
    """Fetch the four files from the authors' address into ``folder``."""
    for file in FILES:
        try:
            address = PUBLISHER + file.name  # from constants of this module, so S310 is safe
            with urllib.request.urlopen(address, timeout=CONNECT_TIMEOUT_S) as answer:  # noqa: S310
                total = int(answer.headers.get("Content-Length") or 0) or None
                with (
                    (folder / file.name).open("wb") as target,
                    tqdm(
                        total=total, unit="B", unit_scale=True, desc=file.name, disable=None
                    ) as bar,
                ):
                    while block := answer.read(1 << 16):
                        target.write(block)
                        bar.update(len(block))
        except urllib.error.URLError as error:
            raise UsageError(
                f"the publisher's address cannot be reached ({error.reason})"
            ) from error


def download_from_debian(folder: Path) -> None:
    """Fetch Debian's package with apt and unpack its files into ``folder``; needs no root."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise UsageError("apt-get and dpkg-deb are not installed")
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        work = Path(name)
        if not _apt_download(work, []):
            # The machine's package lists may be empty, and updating them needs root: use our own.
            (work / "lists" / "partial").mkdir(parents=True)
            options = ["-o", f"Dir::State::Lists={work / 'lists'}", "-o", f"Dir::Cache={work}"]
            subprocess.run(
                ["apt-get", *options, "-qq", "update"], check=True, capture_output=True, timeout=300
            )
            if not _apt_download(work, options):
                raise UsageError(f"apt-get cannot download {DEBIAN_PACKAGE}")
        (package,) = work.glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, work / "tree"], check=True, timeout=120)
        for file in FILES:
            shutil.move(work / "tree" / DEBIAN_FOLDER.relative_to("/") / file.name, folder)


def _apt_download(work: Path, options: list[str]) -> bool:
    """Download the package into ``work`` with a progress bar; returns whether apt succeeded."""
    uris = subprocess.run(
        ["apt-get", *options, "download", "--print-uris", DEBIAN_PACKAGE],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=work,
    )
    if uris.returncode != 0 or len(uris.stdout.split()) < 3:
        return False
    total = int(uris.stdout.split()[2])
    with (
        tqdm(total=total, unit="B", unit_scale=True, desc=DEBIAN_PACKAGE, disable=None) as bar,
        subprocess.Popen(
            ["apt-get", *options, "-qq", "download", DEBIAN_PACKAGE],
            cwd=work,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as apt,
    ):
        while apt.poll() is None:
            time.sleep(0.2)
            bar.n = sum(path.stat().st_size for path in work.glob("*.deb*"))
            bar.refresh()
    return apt.returncode == 0
