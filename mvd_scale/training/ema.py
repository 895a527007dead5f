"""Exponential moving averages of weights: for momentum targets (Table 8) and for fine-tuned models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mvd_scale.checkpoints.native import save_weights
from mvd_scale.distributed.process_group import Ranks
from mvd_scale.models import Student
from mvd_scale.targets import Target
from mvd_scale.targets.momentum import MomentumTeacher
from mvd_scale.training.checkpointing.pieces import Pieces, State
from mvd_scale.training.deepspeed_engine import gather_full, online_shard, write_shard
from mvd_scale.training.lr_schedule import Schedule, cosine_schedule


class ModelEma:
    """Exponential moving average of weights in float32.

    Each rank keeps the same part of the average as of the averaged module: its shard, or everything if the module is
    replicated. The module may have another precision; it gets the average after every step.

    Args:
        averaged: parameters of the module that gets the average, by name.
        online: parameters of the trained model by the same names.
        momentum: function from the step to the weight of the old average.
        name: name of the average among those of its run: that of its file, without suffix.
        write: function that writes all tensors of the average to a file.
        ranks: this process among all.
    """

    def __init__(
        self,
        averaged: Mapping[str, nn.Parameter],
        online: Mapping[str, nn.Parameter],
        momentum: Callable[[int], float],
        name: str,
        write: Callable[[Path, dict[str, Tensor]], None],
        ranks: Ranks,
    ) -> None:
        self.averaged = averaged
        self.online = {name: online[name] for name in averaged}
        self.momentum = momentum
        self.ranks = ranks
        self.name = name
        self._write = write
        self.shards = [share.clone() for share in self._online_shards()]
        self.publish()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the weights after optimizer step `step`. All ranks must call it."""
        torch._foreach_lerp_(self.shards, list(self._online_shards()), 1 - self.momentum(step))
        self.publish()

    def skip(self) -> None:
        """Do nothing: the weights are those of the last update."""

    def save(self, folder: Path) -> None:
        """Write the whole average to its file in a folder. All ranks must call it."""
        whole = {}
        for (name, parameter), share in zip(self.averaged.items(), self.shards, strict=True):
            full = gather_full(share, parameter, self.ranks)
            if self.ranks.is_main:
                whole[name] = full.cpu()
        if self.ranks.is_main:
            self._write(folder / f"{self.name}.safetensors", whole)

    def state(self) -> State:
        """The parts of the average that this rank holds, as pieces of whole tensors; they share memory with it.

        Loading them must be followed by `publish`. A tensor that every rank holds whole is in the state of every rank.
        """
        return {
            f"average.{self.name}.{name}": self._pieces(parameter, share)
            for (name, parameter), share in zip(self.averaged.items(), self.shards, strict=True)
        }

    def share_of_state(self) -> State:
        """The same with every tensor that all ranks hold whole on one rank only: for saving."""
        ranks = self.ranks
        return {
            name: pieces
            if hasattr(parameter, "ds_tensor") or number % ranks.world_size == ranks.rank
            else Pieces(pieces.shape, pieces.dtype, {})
            for number, ((name, pieces), parameter) in enumerate(
                zip(self.state().items(), self.averaged.values(), strict=True)
            )
        }

    def _pieces(self, parameter: nn.Parameter, share: Tensor) -> Pieces:
        if not hasattr(parameter, "ds_tensor"):
            return Pieces.of_range(share.view(-1), 0, parameter.shape)
        start = self.ranks.rank * share.numel()
        count = min(max(parameter.ds_numel - start, 0), share.numel())  # type: ignore[attr-defined]
        return Pieces.of_range(share[:count], start, parameter.ds_shape)  # type: ignore[attr-defined]

    def _online_shards(self) -> Iterator[Tensor]:
        for name, parameter in self.online.items():
            yield online_shard(parameter, self.averaged[name], self.ranks)

    def publish(self) -> None:
        """Copy the average to the module that gets it."""
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
        f"momentum_{name}",
        lambda path, tensors: save_weights(path, tensors, model),
        ranks,
    )
