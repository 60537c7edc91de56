"""How much memory this process can still get, so that too large a data set is refused in time."""

import logging
from pathlib import Path

from registry.core.errors import UsageError

log = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
# Of the container, by cgroup v2 and v1: limit and use, in bytes. memory.stat lies beside them.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_bytes() -> int | None:
    """What the kernel says can be had without swapping, within the container's limit.

    None where the system does not say (macOS).
    """
    figures = []
    try:
        for line in MEMINFO.read_text().splitlines():
            name, _, figure = line.partition(":")
            if name == "MemAvailable":
                figures.append(int(figure.split()[0]) * 1024)
    except (OSError, ValueError):
        return None
    for limit, used in CGROUPS:
        try:
            in_use = int(used.read_text()) - _page_cache_bytes(used.with_name("memory.stat"))
            figures.append(int(limit.read_text()) - in_use)
        except (OSError, ValueError):  # no such group, or its limit is "max"
            continue
    return min(figures, default=None)


def _page_cache_bytes(stat: Path) -> int:
    """What a cgroup uses for files' pages: the kernel frees these before it refuses memory.

    MemAvailable counts such pages as available, too. Cgroup v1 says the sum over all groups below
    in the names with ``total_``; in v2 all figures are such sums.
    """
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return 0
    figures = {name: int(figure) for name, figure in map(str.split, lines)}
    return sum(
        figures.get(f"total_{name}", figures.get(name, 0))
        for name in ("active_file", "inactive_file")
    )


def check_memory(what: str, needed_bytes: int, advice: str) -> None:
    """Say what ``what`` will take, and refuse when that cannot be had.

    Raises:
        UsageError: more than there is; the text ends with ``advice``.
    """
    available = available_bytes()
    if available is None:
        log.info("%s: %s of memory", what, in_units(needed_bytes))
        return
    log.info("%s: %s of memory, of %s available", what, in_units(needed_bytes), in_units(available))
    if needed_bytes > available:
        raise UsageError(
            f"{what} would take {in_units(needed_bytes)} of memory, and {in_units(available)} "
            f"are available: {advice}"
        )


def in_units(size_bytes: float) -> str:
    """``1.2 GB``, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} GB"
