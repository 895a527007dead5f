"""Check of the shared memory through which DALI's workers hand samples to the graph.

Workers write to POSIX shared memory (`SharedMem` in `nvidia/dali/_multiproc`), which lies in `/dev/shm`. Where it is
full, a worker dies of SIGBUS without a message. A container has 64 MB of it, unless it is started with more.
"""

from __future__ import annotations

import os
from pathlib import Path

from mvd_scale.data.decoding.backends import DecodeBackend, Decoders, count_kinds, decode_backend
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError

SHARED = Path("/dev/shm")

QUEUES = 2
"""Buffers for each batch that is prefetched: those that workers fill, and those that the graph still reads
(`keep_alive_queue_size` and `prefetch_queue_depth` of `create_shm_chunk_manager_for_group` in `pool.py`)."""


def bytes_per_sample(manifest: Manifest, decoders: Decoders, frames: int, share: float) -> float:
    """Mean size in bytes of what a worker hands over for a sample: an encoded video, or decoded frames.

    Args:
        manifest: manifest of the videos.
        decoders: decoders of the run.
        frames: frames of a sample.
        share: part of a decoded frame that is handed over.
    """
    kinds = list(count_kinds(manifest))
    total = sum(count for _, count in kinds)
    host = sum(count for kind, count in kinds if decode_backend(kind, decoders) is DecodeBackend.PYAV)
    pixels = sum(
        count * kind.height * kind.width
        for kind, count in kinds
        if decode_backend(kind, decoders) is DecodeBackend.PYAV
    )
    encoded = sum(int(manifest.size[rows].sum()) for rows in manifest.usable_blocks()) / max(total, 1)
    return (3 * frames * share * pixels + encoded * (total - host)) / max(total, 1)


def check_shared_memory(sample: float, *, batch: int, prefetch: int, workers: int, ranks: int) -> None:
    """Check that `/dev/shm` has room for the samples that workers prepare.

    The need is computed from the mean size of a sample, so that workers rarely do with less. Measured here, it was 96 %
    of what 2 workers used for 16 clips of 640x360 pixels.

    Args:
        sample: mean bytes of a sample.
        batch: samples of a batch.
        prefetch: number of batches that are prepared in advance.
        workers: worker processes of a rank; 0 for none, which need no shared memory.
        ranks: ranks of this host.

    Raises:
        UserError: there is too little.
    """
    if not workers or not SHARED.is_dir():
        return
    needed, free = ranks * QUEUES * prefetch * batch * sample, free_bytes()
    if free < needed:
        raise UserError(
            f"{SHARED} has {free / 1e6:.0f} MB free, but the data workers of the {ranks} ranks of this host need "
            f"{needed / 1e6:.0f} MB: {QUEUES * prefetch} batches of {batch} samples of {sample / 1e6:.2f} MB each. "
            f"Start the container with more, such as `--shm-size={-(-2 * needed // 10**9):.0f}g` or `--ipc=host`, or "
            "set data.workers to 0"
        )


def free_bytes() -> int:
    """Free bytes of `/dev/shm`."""
    status = os.statvfs(SHARED)
    return status.f_bavail * status.f_frsize
