"""The rank that a data loader serves."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mvd_scale.config.launcher import local_world_size


@dataclass(frozen=True)
class DataRank:
    """One process of a job as its data loaders see it; a job of a single process by default."""

    device: torch.device
    """Where batches live; on a GPU it is also where they are decoded."""

    rank: int = 0
    world_size: int = 1

    cpus: int | None = None
    """CPUs for data workers and threads; if None, those that this process may use, divided by the ranks of its host."""

    @property
    def cpu_count(self) -> int:
        """Number of CPUs for data workers and threads."""
        if self.cpus is not None:
            return self.cpus
        return len(os.sched_getaffinity(0)) // local_world_size(self.world_size)
