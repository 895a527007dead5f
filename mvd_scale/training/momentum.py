"""Moving averages of weights: behind a momentum target (Table 8), and of a model that is fine-tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mvd_scale.checkpoints.native import save_weights
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.targets import Target
from mvd_scale.targets.load import average_file
from mvd_scale.targets.momentum import Momentum
from mvd_scale.training.engine import online_share, share_of, whole_of, write_share
from mvd_scale.training.ranks import Ranks
from mvd_scale.training.schedule import Schedule, cosine


class MovingAverage:
    """A float32 average of weights over the steps.

    Each rank keeps the part of it that it keeps of the averaged module: its shard, or everything where that is
    replicated. The module itself may have another precision and takes over the average after every step.

    Args:
        averaged: parameters of the module that takes the average, by name.
        online: those of the trained model under the same names.
        momentum: share of the average that stays at a step.
        file: where a folder keeps it.
        write: writes all of it into such a file.
        ranks: all of them keep their parts.
    """

    def __init__(
        self,
        averaged: Mapping[str, nn.Parameter],
        online: Mapping[str, nn.Parameter],
        momentum: Callable[[int], float],
        file: Callable[[Path], Path],
        write: Callable[[Path, dict[str, Tensor]], None],
        ranks: Ranks,
    ) -> None:
        self.averaged = averaged
        self.online = {name: online[name] for name in averaged}
        self.momentum = momentum
        self.ranks = ranks
        self._file = file
        self._write = write
        self.shares = [share.clone() for share in self._online_shares()]
        self._publish()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the weights that optimizer step `step` left. All ranks call it."""
        torch._foreach_lerp_(self.shares, list(self._online_shares()), 1 - self.momentum(step))
        self._publish()

    def save(self, folder: Path) -> None:
        """Write the whole average into its file. All ranks call it."""
        whole = {}
        for (name, parameter), share in zip(self.averaged.items(), self.shares, strict=True):
            full = whole_of(share, parameter, self.ranks)
            if self.ranks.first:
                whole[name] = full.cpu()
        if self.ranks.first:
            self._write(self._file(folder), whole)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self._file(folder)
        tensors = load_file(path) if path.is_file() else {}
        if tensors.keys() != self.averaged.keys():
            raise UserError(f"{path} is not the average of this run: remove its folder to resume from the one before")
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
        _average_of(name, target, engine.module.encoder, schedule, ranks)
        for name, target in targets.items()
        if isinstance(target, Momentum)
    ]


def _average_of(name: str, target: Momentum, encoder: nn.Module, schedule: Schedule, ranks: Ranks) -> MovingAverage:
    config, model = target.config, target.encoder.config

    def momentum(step: int) -> float:
        return cosine(step, total=schedule.total_steps, start=config.momentum, end=config.momentum_end)

    return MovingAverage(
        dict(target.encoder.named_parameters()),
        dict(encoder.named_parameters()),
        momentum,
        lambda folder: average_file(folder, name),
        lambda path, tensors: save_weights(path, tensors, model),
        ranks,
    )
