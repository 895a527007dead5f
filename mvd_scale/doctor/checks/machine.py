"""Checks of a host alone: CPUs, shared memory, limits of processes, disks, time of the job."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mvd_scale.config.launcher import job_end
from mvd_scale.data.loaders import shared_memory
from mvd_scale.distributed.rendezvous import CONNECTIONS_OF_A_RANK
from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.performance.bringup.checks.machine import LEAST_SHARED
from mvd_scale.utils.cpu_quota import cpu_quota

_LITTLE_SHARED = 2**30
"""Bytes of /dev/shm below which loaders of videos in full size find too little."""

_FILES = 4096
"""Open files that a rank needs: libraries, workers, videos."""

_PROCESSES = 4096
"""Processes and threads of a user: each rank has its workers, and each of them a thread for every core."""

_LITTLE_DISK, _LEAST_DISK = 5 * 2**30, 2**28
"""Free bytes of the folders that compilers and pip use, below which they fail soon, and at once."""

_HOUR = 3600.0

INFINIBAND = Path("/dev/infiniband")
"""Folder of InfiniBand's devices, whose drivers pin memory."""

_CONTAINER = "start the container with --shm-size=16g or --ipc=host, or set data.workers to 0"


def machine_checks(world_size: int) -> list[HostCheck]:
    """List the checks.

    Args:
        world_size: number of ranks of the job.
    """
    return [
        HostCheck("machine", "CPUs", cpus, 5, "see that /sys and /proc answer"),
        HostCheck("machine", "/dev/shm", shared, 5, _CONTAINER),
        HostCheck("machine", "limits", lambda: limits(world_size), 5, "see `ulimit -a`"),
        HostCheck("machine", "disks", disks, 20, "see `df`, and the mounts of $TMPDIR and $HOME"),
        HostCheck("machine", "time of the job", time_of_job, 5, "see `scontrol show job`"),
    ]


def cpus() -> Iterator[Finding]:
    """Compare the CPUs of this process with the CPU time that its container may use."""
    count, quota = len(os.sched_getaffinity(0)), cpu_quota()
    figures = {"CPUs": count, "quota": quota}
    if quota is None or quota >= count:
        yield Finding("CPUs", "ok", f"{count} CPUs, without a quota below them", figures=figures)
        return
    detail = f"{count} CPUs, but the container may use the time of {quota:g}"
    if quota >= 2:
        yield Finding("CPUs", "ok", f"{detail}; threads and workers follow that", figures=figures)
        return
    yield Finding("CPUs", "warning", detail, "start the container with more, such as `--cpus 16`", figures)


def shared() -> Iterator[Finding]:
    """Check the free shared memory, in which DALI's workers hand samples over."""
    name = "/dev/shm"
    if not shared_memory.SHARED.is_dir():
        yield Finding(name, "warning", "there is none", "set data.workers to 0, or mount a tmpfs there")
        return
    free = shared_memory.free_bytes()
    figures = {"free bytes": free}
    detail = f"{free / 2**30:.2f} GiB free"
    if free < LEAST_SHARED:
        yield Finding(name, "fail", f"{detail}: data workers die of SIGBUS where it is full", _CONTAINER, figures)
        return
    if free < _LITTLE_SHARED:
        yield Finding(name, "warning", f"{detail}, little for data workers", _CONTAINER, figures)
        return
    yield Finding(name, "ok", detail, figures=figures)


def limits(world_size: int) -> Iterator[Finding]:
    """Check the limits of this process, which ranks inherit."""
    files = _FILES + CONNECTIONS_OF_A_RANK * world_size
    yield _limit("open files", resource.RLIMIT_NOFILE, files, "ulimit -n", "LimitNOFILE")
    yield _limit("processes", resource.RLIMIT_NPROC, _PROCESSES, "ulimit -u", "TasksMax and LimitNPROC")
    yield _limit("CPU time", resource.RLIMIT_CPU, None, "ulimit -t", "LimitCPU")
    if INFINIBAND.is_dir():
        yield _limit("locked memory", resource.RLIMIT_MEMLOCK, None, "ulimit -l", "LimitMEMLOCK")
    else:
        yield Finding("limit of locked memory", "left out", f"matters to InfiniBand; there is no {INFINIBAND}")


def _limit(what: str, number: int, least: int | None, shell: str, unit: str) -> Finding:
    """Compare a limit with what a rank needs: a number, or None for no limit at all."""
    name, (soft, hard) = f"limit of {what}", resource.getrlimit(number)
    figures = {"soft": _said(soft), "hard": _said(hard)}
    if soft == resource.RLIM_INFINITY or (least is not None and soft >= least):
        return Finding(name, "ok", _said(soft), figures=figures)
    needed = "unlimited" if least is None else str(least)
    reach = hard == resource.RLIM_INFINITY or (least is not None and hard >= least)
    remedy = (
        f"`{shell} {needed}` in the shell or job script that starts the ranks"
        if reach
        else f"raise the hard limit to {needed}: /etc/security/limits.conf, {unit} of the systemd unit (sshd, slurmd), "
        "or --ulimit of the container"
    )
    return Finding(name, "fail", f"{_said(soft)}, expected {needed} or more", remedy, figures)


def _said(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else str(limit)


def disks() -> Iterator[Finding]:
    """Check that the folders in which compilers and caches write have room."""
    yield _disk("temporary folder", Path(tempfile.gettempdir()), "set TMPDIR to a folder with more room")
    yield _disk("home folder", Path.home(), "free some space, or set HOME to a folder that can be written")


def _disk(name: str, folder: Path, remedy: str) -> Finding:
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding(name, "fail", f"{folder} cannot be written: {error.strerror}", remedy)
    detail, figures = f"{folder}: {free / 2**30:.1f} GiB free", {"free bytes": free}
    if free < _LEAST_DISK:
        return Finding(name, "fail", detail, remedy, figures)
    if free < _LITTLE_DISK:
        return Finding(name, "warning", f"{detail}: compiled operators and caches need about 5", remedy, figures)
    return Finding(name, "ok", detail, figures=figures)


def time_of_job() -> Iterator[Finding]:
    """Report the time until Slurm ends the job."""
    name, end = "time of the job", job_end()
    if end is None:
        yield Finding(name, "left out", "SLURM_JOB_END_TIME is not set")
        return
    left = end - time.time()
    detail, figures = f"{left / _HOUR:.1f} h are left", {"seconds left": left}
    if left < _HOUR / 2:
        remedy = "ask for more with `sbatch --time`; a run that is ended so saves first and resumes"
        yield Finding(name, "warning", detail, remedy, figures)
        return
    yield Finding(name, "ok", detail, figures=figures)
