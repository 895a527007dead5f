"""Exponential moving averages of weights: for momentum targets (Table 8) and for fine-tuned models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mvd_scale.checkpoints.native import save_weights
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.errors import UserError
from mvd_scale.models import Student
from mvd_scale.targets import Target
from mvd_scale.targets.load import ema_file
from mvd_scale.targets.momentum import MomentumTeacher
from mvd_scale.training.deepspeed_engine import gather_full, local_shard, online_shard, write_shard
from mvd_scale.training.lr_schedule import Schedule, cosine_schedule


class ModelEma:
    """Exponential moving average of weights in float32.

    Each rank keeps the same part of the average as of the averaged module: its shard, or everything if the module is
    replicated. The module may have another precision; it gets the average after every step.

    Args:
        averaged: parameters of the module that gets the average, by name.
        online: parameters of the trained model by the same names.
        momentum: function from the step to the weight of the old average.
        file: function from a folder to the path of the average in it.
        write: function that writes all tensors of the average to such a path.
        ranks: this process among all.
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
        self.shards = [share.clone() for share in self._online_shards()]
        self._publish()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`. All ranks must call it."""
        torch._foreach_lerp_(self.shards, list(self._online_shards()), 1 - self.momentum(step))
        self._publish()

    def save(self, folder: Path) -> None:
        """Write the whole average to its file in a folder. All ranks must call it."""
        whole = {}
        for (name, parameter), share in zip(self.averaged.items(), self.shards, strict=True):
            full = gather_full(share, parameter, self.ranks)
            if self.ranks.is_main:
                whole[name] = full.cpu()
        if self.ranks.is_main:
            self._write(self._file(folder), whole)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the average that `save` wrote.

        Raises:
            UserError: the file is missing or damaged.
        """
        path = self._file(folder)
        tensors = load_file(path) if path.is_file() else {}
        if tensors.keys() != self.averaged.keys():
            raise UserError(
                f"{path} is not the average of this run: remove its folder to resume from the checkpoint before it"
            )
        for (name, parameter), share in zip(self.averaged.items(), self.shards, strict=True):
            share.copy_(local_shard(tensors[name].to(share), parameter, self.ranks))
        self._publish()

    def _online_shards(self) -> Iterator[Tensor]:
        for name, parameter in self.online.items():
            yield online_shard(parameter, self.averaged[name], self.ranks)

    def _publish(self) -> None:
        for parameter, share in zip(self.averaged.values(), self.shards, strict=True):
            write_shard(parameter, share)


def initialize_momentum_targets(targets: Mapping[str, Target], student: Student) -> None:
    """Copy the student's encoder to the encoders of momentum targets; must be called before any of them is sharded."""
    weights = {name: weight for name, weight in student.encoder.state_dict().items() if not name.startswith("norm.")}
    for target in targets.values():
        if isinstance(target, MomentumTeacher):
            target.encoder.load_state_dict(weights)


def build_momentum_emas(targets: Mapping[str, Target], engine: Any, schedule: Schedule, ranks: Ranks) -> list[ModelEma]:
    """Make the average of each momentum target of a run; must be called after student and targets are sharded."""
    return [
        _average_of(name, target, engine.module.encoder, schedule, ranks)
        for name, target in targets.items()
        if isinstance(target, MomentumTeacher)
    ]


def _average_of(name: str, target: MomentumTeacher, encoder: nn.Module, schedule: Schedule, ranks: Ranks) -> ModelEma:
    config, model = target.config, target.encoder.config

    def momentum(step: int) -> float:
        return cosine_schedule(step, total=schedule.total_steps, start=config.momentum, end=config.momentum_end)

    return ModelEma(
        dict(target.encoder.named_parameters()),
        dict(encoder.named_parameters()),
        momentum,
        lambda folder: ema_file(folder, name),
        lambda path, tensors: save_weights(path, tensors, model),
        ranks,
    )
