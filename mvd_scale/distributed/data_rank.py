"""The rank that a data loader serves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mvd_scale.distributed.cpu_affinity import count_own_cpus


@dataclass(frozen=True)
class DataRank:
    """Properties of a rank that its data loaders need; by default, those of the only process of a job."""

    device: torch.device
    """Device of the batches; a GPU also decodes them."""

    rank: int = 0
    world_size: int = 1

    cpus: int | None = None
    """Number of CPUs for the rank and its data workers; if None, those of this process, which no other rank uses."""

    @property
    def cpu_count(self) -> int:
        """Number of CPUs for the rank and its data workers."""
        return count_own_cpus() if self.cpus is None else self.cpus
