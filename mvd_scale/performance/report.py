"""Base class of measurement reports: kind, machine, settings, and the figures by which two reports are compared."""

from __future__ import annotations

import dataclasses
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mvd_scale.performance.benchmarks.timing import versions_of
from mvd_scale.utils.machine import processor_name

SHORT = 0.01
"""Share of a step's time below which a part is too short to be judged."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Machine of a measurement."""

    device: str
    """`cpu`, or the name of the GPU."""
    processor: str
    cores: int
    """CPU cores that this process may use."""
    threads: int
    """Threads of torch in each rank."""
    versions: dict[str, str]

    def title(self) -> str:
        """Format as one line for the head of a report."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        place = self.processor if self.device == "cpu" else f"{self.device}, {self.processor}"
        return f"{place}, {self.cores} cores, {self.threads} threads; {versions}"


@dataclasses.dataclass(frozen=True)
class Metric:
    """Measured figure by which two reports are compared."""

    value: float
    more_is_better: bool = False
    judged: bool = True
    """Whether a worse value counts as a regression; false for other programs, and for parts that are mostly noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(ABC):
    """Figures of one measurement on one machine."""

    kind: str
    machine: Machine

    def to_json(self) -> str:
        """Format all fields as one JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @abstractmethod
    def to_text(self) -> str:
        """Format as text for a terminal."""

    @abstractmethod
    def setting(self) -> dict[str, Any]:
        """Return the settings of the measurement; two reports are comparable only if these are equal."""

    @abstractmethod
    def values(self) -> Iterator[tuple[str, Metric]]:
        """Yield name and value of every figure; each name is unique."""


def this_machine(device: torch.device, packages: Sequence[str] = ("deepspeed",)) -> Machine:
    """Describe this machine, with the versions of torch and of some packages."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, **versions_of([name for name in packages if name != "torch"])},
    )
