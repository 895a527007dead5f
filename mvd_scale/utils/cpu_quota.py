"""CPU time that the control groups of a process allow: the limit of a container, which CPU affinity does not show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

MEMBERSHIP = Path("/proc/self/cgroup")
"""File in which Linux lists the control groups of this process."""

CGROUPS = Path("/sys/fs/cgroup")
"""Folder at which the hierarchies of control groups are mounted."""


def cpu_quota(membership: Path = MEMBERSHIP, root: Path = CGROUPS) -> float | None:
    """Return the number of CPUs whose time all processes of this container may use together; None if it has no limit.

    The smallest limit counts among those of the process's group and of the groups that contain it.

    Args:
        membership: file that lists the control groups of this process.
        root: folder at which the hierarchies are mounted.
    """
    with suppress(OSError):
        return min(_limits(membership.read_text(), root), default=None)
    return None


def _limits(membership: str, root: Path) -> Iterator[float]:
    for line in membership.splitlines():
        _, controllers, group = line.split(":", 2)
        if not controllers:  # version 2 has one hierarchy for all controllers
            for folder in _enclosing(root, group):
                yield from _limit_v2(folder / "cpu.max")
        elif "cpu" in controllers.split(","):
            for folder in _enclosing(root / "cpu", group):
                yield from _limit_v1(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")


def _enclosing(mount: Path, group: str) -> Iterator[Path]:
    """Yield the folders of a group and of those that contain it, as far as this process sees them.

    In a container the group may be named as outside of it, while the mount shows the container's own group alone.
    """
    parts = Path(group.strip("/")).parts
    for length in range(len(parts) + 1):
        folder = mount.joinpath(*parts[:length])
        if folder.is_dir():
            yield folder


def _limit_v2(file: Path) -> Iterator[float]:
    # "max 100000", or microseconds of CPU time and of the period: "400000 100000"
    with suppress(OSError, ValueError):
        quota, period = map(int, file.read_text().split())
        yield quota / period


def _limit_v1(quota_file: Path, period_file: Path) -> Iterator[float]:
    with suppress(OSError, ValueError):
        quota, period = int(quota_file.read_text()), int(period_file.read_text())
        if quota > 0:  # -1 without a limit
            yield quota / period
