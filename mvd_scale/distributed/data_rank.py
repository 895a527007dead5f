"""The rank that a data loader serves."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from mvd_scale.config.launcher import local_world_size


@dataclass(frozen=True)
class DataRank:
    """Properties of a rank that its data loaders need; by default, those of the only process of a job."""

    device: torch.device
    """Device of the batches; a GPU also decodes them."""

    rank: int = 0
    world_size: int = 1

    cpus: int | None = None
    """Number of CPUs for data workers and threads; if None, those of this process divided by the ranks of its host."""

    @property
    def cpu_count(self) -> int:
        """Number of CPUs for data workers and threads."""
        if self.cpus is not None:
            return self.cpus
        return len(os.sched_getaffinity(0)) // local_world_size(self.world_size)
