"""How much memory this process can still get: a data set that is too large is refused early."""

import logging
from pathlib import Path

from registry.core.errors import UsageError

log = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
# Limit and use of the container in bytes, for cgroup v2 and v1. memory.stat is in the same folder.
CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def available_bytes() -> int | None:
    """The memory that this process can get without swapping, within the container's limit.

    None if the system does not report it (macOS).
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
    """The memory of a cgroup's file pages, which the kernel frees before it refuses memory.

    MemAvailable also counts such pages as available. In cgroup v1, the names with ``total_`` hold
    the sum over the group and its sub-groups; in v2 all figures are such sums.
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
    """Log how much memory ``what`` needs, and refuse if it is not available.

    Raises:
        UsageError: ``needed_bytes`` exceed the available memory; the text ends with ``advice``.
    """
    available = available_bytes()
    if available is None:
        log.info("%s: %s of memory", what, in_units(needed_bytes))
        return
    log.info("%s: %s of memory, of %s available", what, in_units(needed_bytes), in_units(available))
    if needed_bytes > available:
        raise UsageError(
            f"{what} would take {in_units(needed_bytes)} of memory, and only "
            f"{in_units(available)} are available: {advice}"
        )


def in_units(size_bytes: float) -> str:
    """``1.2 GB``, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:,.1f} GB"
