"""A model in training: its engine, the loss that it minimises, and its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from mvd_scale.data.batch import ClipBatch
from mvd_scale.training.checkpointing.pieces import State
from mvd_scale.training.lr_schedule import Schedule


class Objective(Protocol):
    """The loss that a run minimises."""

    @property
    def parts(self) -> Sequence[str]:
        """Names of the loss terms that are logged in addition to the loss."""

    @property
    def teachers(self) -> Mapping[str, nn.Module]:
        """Frozen models that the loss calls, by name."""

    def __call__(self, engine: Any, batch: ClipBatch, /) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro batch and its detached terms by name; float32 scalars."""


class MovingAverage(Protocol):
    """Part of a model's state that follows each optimizer step beside the optimizer; all ranks call its methods."""

    def update(self, step: int) -> None:
        """Update it after optimizer step `step`."""

    def skip(self) -> None:
        """Forget what it took of an optimizer step that changed no weight; called in place of `update`."""

    def save(self, folder: Path) -> None:
        """Write all of it to its file in a folder."""

    def state(self) -> State:
        """The parts that this rank holds, which share memory with it; loading them must be followed by `publish`."""

    def share_of_state(self) -> State:
        """The same, with what all ranks hold on one rank only: for saving."""

    def publish(self) -> None:
        """Take the loaded state."""


@dataclass
class TrainedModel:
    """DeepSpeed engine of a model with the loss that it minimises."""

    engine: Any
    """Engine of `deepspeed.initialize`."""

    objective: Objective

    schedule: Schedule
    """Learning rate and weight decay by step."""

    averages: Sequence[MovingAverage] = ()
    """Moving averages of weights and of the statistics of features, updated after every optimizer step."""

    name: str = ""
    """Name of the student if there are several, else empty."""

    @property
    def metrics(self) -> str:
        """Prefix of the names of metrics: `students/NAME/` if there are several students, else empty."""
        return f"students/{self.name}/" if self.name else ""

    @property
    def losses(self) -> list[str]:
        """Names of the metrics of the loss and of its terms."""
        return [f"{self.metrics}{name}" for name in ("loss", *(f"loss/{part}" for part in self.objective.parts))]

    def part(self, name: str) -> str:
        """Name of one of the model's own parts of a step."""
        return f"{self.name}: {name}" if self.name else name
