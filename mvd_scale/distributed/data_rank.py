"""The rank that a data loader serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from mvd_scale.distributed.cpu_affinity import count_own_cpus
from mvd_scale.utils.nvdec import Nvdec, query_nvdec


class Exchange(Protocol):
    """Messages that loaders of all ranks read without waiting for each other at every step."""

    def post(self, name: str, lines: list[str]) -> None:
        """Publish the lines of this rank under a name, once per name; an empty list counts as well."""

    def collect(self, name: str) -> list[str]:
        """Return the lines that all ranks published under a name, and wait for those that have not yet."""


@dataclass(frozen=True)
class DataRank:
    """Properties of a rank that its data loaders need; by default, those of the only process of a job."""

    device: torch.device
    """Device of the batches; a GPU also decodes them."""

    rank: int = 0
    world_size: int = 1

    cpus: int | None = None
    """Number of CPUs for the rank and its data workers; if None, those of this process, which no other rank uses."""

    shared_nvdec: Nvdec | None = None
    """Capabilities of NVDEC that all ranks have; None to ask this rank's GPU."""

    open_exchange: Callable[[], Exchange] | None = None
    """Function that opens an exchange among all ranks, which all ranks must call as often; None without one."""

    @property
    def nvdec(self) -> Nvdec:
        """Capabilities of NVDEC that the loader may rely on."""
        return query_nvdec(self.device) if self.shared_nvdec is None else self.shared_nvdec

    @property
    def cpu_count(self) -> int:
        """Number of CPUs for the rank and its data workers."""
        return count_own_cpus() if self.cpus is None else self.cpus
