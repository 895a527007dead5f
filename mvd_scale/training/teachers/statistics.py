"""Statistics of teachers' features during a run: equal on all ranks, in its checkpoints, and in a file at its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from mvd_scale.distributed.process_group import Ranks
from mvd_scale.targets import FrozenTeacher, Target
from mvd_scale.targets.load import statistics_file
from mvd_scale.targets.statistics import FeatureStatistics
from mvd_scale.training.checkpointing.pieces import Pieces, State


class RunningStatistics:
    """The statistics of one target in the form of `MovingAverage`.

    Args:
        name: name of the target.
        statistics: statistics of its features; they are moved to the device of the ranks.
        ranks: this process among all.
    """

    def __init__(self, name: str, statistics: FeatureStatistics, ranks: Ranks) -> None:
        self.name = name
        self.statistics = statistics
        self.ranks = ranks
        statistics.to(ranks.device)
        if ranks.world_size > 1:
            statistics.reduce = torch.distributed.all_reduce

    def update(self, step: int) -> None:
        """Update the statistics with the features of optimizer step `step`. All ranks must call it."""
        self.statistics.update()

    def skip(self) -> None:
        """Forget the features of an optimizer step that changed no weight."""
        self.statistics.discard()

    def save(self, folder: Path) -> None:
        """Write the statistics to their file in a folder. All ranks must call it."""
        if self.ranks.is_main:
            save_file({"moments": self.statistics.moments.cpu()}, statistics_file(folder, self.name))

    def state(self) -> State:
        """The moments, which every rank holds whole; they share memory with the statistics.

        Loading them must be followed by `publish`.
        """
        moments = self.statistics.moments
        return {self._key: Pieces.of_range(moments.view(-1), 0, moments.shape)}

    def share_of_state(self) -> State:
        """The same, on one rank only: for saving."""
        if self.ranks.is_main:
            return self.state()
        moments = self.statistics.moments
        return {self._key: Pieces(tuple(moments.shape), moments.dtype, {})}

    def publish(self) -> None:
        """Take loaded moments."""
        self.statistics.restore()

    @property
    def _key(self) -> str:
        return f"statistics.{self.name}"


def running_statistics(targets: Mapping[str, Target], ranks: Ranks) -> list[RunningStatistics]:
    """Make the running statistics of each target of a run that is standardised."""
    return [
        RunningStatistics(name, target.statistics, ranks)
        for name, target in targets.items()
        if isinstance(target, FrozenTeacher) and target.statistics is not None
    ]
