"""The moving average behind a momentum target, kept in the shards in which its encoder is kept (Table 8)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.weights import read_checkpoint, save_weights
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.targets import Target
from mvd_scale.targets.load import average_file
from mvd_scale.targets.momentum import Momentum
from mvd_scale.training.engine import Ranks, online_share, share_of, whole_of, write_share
from mvd_scale.training.schedule import Schedule, cosine


class MovingAverage:
    """A float32 average of the encoder's weights over the steps.

    Each rank keeps the part of it that it keeps of the target's encoder: its shard, or everything where that is
    replicated. The encoder itself may have another precision and takes over the average after every step.
    """

    def __init__(self, name: str, target: Momentum, student: nn.Module, schedule: Schedule, ranks: Ranks) -> None:
        self.name = name
        self.config = target.config
        self.model = target.encoder.config
        self.schedule = schedule
        self.ranks = ranks
        online = dict(student.encoder.named_parameters())  # type: ignore[union-attr]
        self.averaged = dict(target.encoder.named_parameters())
        self.online = {parameter: online[parameter] for parameter in self.averaged}
        self.shares = [share.clone() for share in self._online_shares()]
        self._publish()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights that optimizer step `step` left. All ranks call it."""
        torch._foreach_lerp_(self.shares, list(self._online_shares()), 1 - self.momentum(step))
        self._publish()

    def momentum(self, step: int) -> float:
        """Share of the average that stays at a step."""
        total = self.schedule.total_steps
        return cosine(step, total=total, start=self.config.momentum, end=self.config.momentum_end)

    def save(self, folder: Path) -> None:
        """Write the whole average as an encoder of ours. All ranks call it."""
        whole = {}
        for (name, parameter), share in zip(self.averaged.items(), self.shares, strict=True):
            full = whole_of(share, parameter, self.ranks)
            if self.ranks.first:
                whole[name] = full.cpu()
        if self.ranks.first:
            save_weights(average_file(folder, self.name), whole, self.model)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = average_file(folder, self.name)
        tensors = read_checkpoint(path).encoder
        if tensors.keys() != self.averaged.keys():
            raise UserError(
                f"{path} is not the average of this student; remove its folder to resume from the one before"
            )
        for (name, parameter), share in zip(self.averaged.items(), self.shares, strict=True):
            share.copy_(share_of(tensors[name].to(share), parameter, self.ranks))
        self._publish()

    def _online_shares(self) -> Iterator[Tensor]:
        for name, parameter in self.online.items():
            yield online_share(parameter, self.averaged[name], self.ranks)

    def _publish(self) -> None:
        for parameter, share in zip(self.averaged.values(), self.shares, strict=True):
            write_share(parameter, share)


def start_averages(targets: Mapping[str, Target], student: Student) -> None:
    """Let the encoders of momentum targets begin as the student's, before any of them is sharded."""
    weights = {name: weight for name, weight in student.encoder.state_dict().items() if not name.startswith("norm.")}
    for target in targets.values():
        if isinstance(target, Momentum):
            target.encoder.load_state_dict(weights)


def moving_averages(
    targets: Mapping[str, Target], engine: Any, schedule: Schedule, ranks: Ranks
) -> list[MovingAverage]:
    """An average for each momentum target of a run, after student and targets came to their shards."""
    return [
        MovingAverage(name, target, engine.module, schedule, ranks)
        for name, target in targets.items()
        if isinstance(target, Momentum)
    ]
