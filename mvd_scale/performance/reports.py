"""What all reports of measurements share: their kind, the machine, and the figures that two of them are compared by."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from mvd_scale.performance.timing import versions_of

SHORT = 0.01
"""Share of a step under which a part is not judged by itself."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where something was measured."""

    device: str
    """`cpu`, or the name of the GPU."""
    processor: str
    cores: int
    """That this process may use."""
    threads: int
    """Of torch, in each rank."""
    versions: dict[str, str]

    def title(self) -> str:
        """One line for the head of a report."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        place = self.processor if self.device == "cpu" else f"{self.device}, {self.processor}"
        return f"{place}, {self.cores} cores, {self.threads} threads; {versions}"


@dataclasses.dataclass(frozen=True)
class Value:
    """A measured figure by which two reports are compared."""

    value: float
    more_is_better: bool = False
    judged: bool = True
    """Whether a worse one is a loss: not what other programs do, nor parts too short to be told from noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(ABC):
    """Figures of one measurement on one machine."""

    kind: str
    machine: Machine

    def to_json(self) -> str:
        """All fields, one object."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @abstractmethod
    def to_text(self) -> str:
        """What a person reads."""

    @abstractmethod
    def setting(self) -> dict[str, Any]:
        """What was measured: two reports are compared only if it is the same in both."""

    @abstractmethod
    def values(self) -> Iterator[tuple[str, Value]]:
        """Names and values, each name once."""


def this_machine(device: torch.device, packages: Sequence[str] = ("deepspeed",)) -> Machine:
    """This machine, and the versions of torch and of some packages on it."""
    return Machine(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        processor=processor_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        versions={"torch": torch.__version__, **versions_of([name for name in packages if name != "torch"])},
    )


def processor_name() -> str:
    """The model name that Linux tells, or the architecture where it tells none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
