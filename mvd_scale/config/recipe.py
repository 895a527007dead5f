"""A recipe: YAML -> dotted overrides -> the typed schema -> checks across sections."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator
from typing_extensions import Self

from mvd_scale.config.data import DataConfig, ShortSideCrop
from mvd_scale.config.model import ModelConfig
from mvd_scale.config.section import Section
from mvd_scale.config.target import MomentumTarget, TargetConfig, TeacherTarget
from mvd_scale.config.training import (
    CheckpointConfig,
    LoggingConfig,
    PretrainLogging,
    PretrainTraining,
    RunConfig,
    TeacherConfig,
    TrainingConfig,
)
from mvd_scale.errors import UserError


class RunRecipe(Section):
    """What all runs that train have in common."""

    seed: int = Field(default=0, ge=0)
    """Of weights, order, frames, crops and masks."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    checkpoints: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _check_training(self) -> Self:
        if self.device == "cpu" and self.training.precision == "fp16":
            raise ValueError("precision fp16 needs a GPU (CPUs compute it slowly or not at all): use bf16 or fp32")
        if self.training.warmup_epochs >= self.training.epochs:
            raise ValueError(
                f"training.warmup_epochs {self.training.warmup_epochs:g} must be fewer than "
                f"training.epochs {self.training.epochs}"
            )
        if self.training.min_lr > self.training.base_lr:
            raise ValueError(
                f"training.min_lr {self.training.min_lr:g} is above training.base_lr {self.training.base_lr:g}"
            )
        crop = self.data.crop
        if isinstance(crop, ShortSideCrop) and crop.sides[0] < self.model.input_size:
            raise ValueError(
                f"data.crop.sides begins with {crop.sides[0]}, less than the square of model.input_size "
                f"{self.model.input_size} that is cut out"
            )
        return self

    @property
    def lr_batch(self) -> int:
        """Clips of an optimizer step by which the learning rate is scaled."""
        return self.training.global_batch

    def batch_split(self, world_size: int) -> tuple[int, int]:
        """Micro batch and accumulation steps for a number of ranks: the largest micro batch that the recipe allows.

        Raises:
            UserError: the global batch cannot be split so; the message proposes the nearest numbers that can.
        """
        total, copies = self.training.global_batch, self.data.copies
        limit = self.training.micro_batch or total
        if limit < copies:
            raise UserError(
                f"training.micro_batch {limit} is less than data.copies {copies}: the copies of a clip stay together"
            )
        if total % (world_size * copies):
            unit = world_size * copies
            splits = [n for n in range(1, total // copies + 1) if total % (n * copies) == 0]
            ranks = _nearest(splits, world_size)
            batches = [n for n in (total // unit * unit, -(-total // unit) * unit) if n]
            raise UserError(
                f"training.global_batch {total} cannot be split over {world_size} ranks"
                + (f" in whole sets of {copies} copies" if copies > 1 else "")
                + (f". Start {_either(ranks)} ranks, or" if ranks else ". No number of ranks can;")
                + f" set training.global_batch to {_either(batches)}, with which the learning rate scales"
            )
        share = total // world_size
        micro = max(n for n in range(copies, min(share, limit) + 1, copies) if share % n == 0)
        return micro, share // micro

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: all that changes which numbers are computed, flattened to dotted keys.

        Where the run lives, how often it saves and logs, how it decodes and splits batches, and where it stops
        may change between a start and its resumption.
        """
        return dict(_flatten(self._identity()))

    def _identity(self) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        for section in ("run", "device", "checkpoints", "logging"):
            del values[section]
        for key in ("source", "root", "workers", "threads", "prefetch", "max_broken", "read_timeout"):
            del values["data"][key]
        for part in (values["data"]["mixture"] or {}).values():
            del part["source"], part["root"]
        # Weights are known by their contents, which the checkpoints record, not by where they lie.
        for key in (
            "max_steps", "micro_batch", "deepspeed", "gradient_checkpointing", "compile", "collective_timeout_minutes",
            "initial_encoder",
        ):  # fmt: skip
            del values["training"][key]
        return values

    def to_yaml(self) -> str:
        """The resolved recipe, every field spelled out; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class Recipe(RunRecipe):
    """Everything that one run of `mvd-scale pretrain` needs to know."""

    targets: dict[str, TargetConfig] = Field(min_length=1)
    """Any number of targets by name; the loss is their weighted sum."""

    training: PretrainTraining
    teachers: TeacherConfig = TeacherConfig()
    logging: PretrainLogging = PretrainLogging()

    @model_validator(mode="before")
    @classmethod
    def _drop_targets(cls, values: object) -> object:
        """A target that is null is none: how a recipe leaves out one of its base."""
        if isinstance(values, dict) and isinstance(values.get("targets"), dict):
            kept = {name: target for name, target in values["targets"].items() if target is not None}
            return {**values, "targets": kept}
        return values

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        self._check_mask()
        for name, target in self.targets.items():
            if not name.isidentifier():
                raise ValueError(f"targets.{name}: a target's name must be a word of letters, digits and underscores")
            if target.decoder is None:
                continue
            if target.decoder.width % target.decoder.heads:
                raise ValueError(
                    f"targets.{name}.decoder: width {target.decoder.width} does not divide into "
                    f"{target.decoder.heads} heads"
                )
            multiple = {"sincos3d": 16, "sincos2d": 4, "sinusoid": 1}[self.model.positions]
            if target.decoder.width % multiple:
                raise ValueError(
                    f"targets.{name}.decoder: positions {self.model.positions} need a width that is a multiple of "
                    f"{multiple}, not {target.decoder.width}"
                )
        if self.device == "cpu" and self.teachers.precision == "fp16":
            raise ValueError("precision fp16 needs a GPU (CPUs compute it slowly or not at all): use bf16 or fp32")
        self._check_eight_bits()
        self._check_programs()
        return self

    def _check_programs(self) -> None:
        teachers = self.teachers
        shapes = [target.decoder for target in self.targets.values() if target.decoder is not None]
        if self.training.batch_decoders is True and len(set(shapes)) == len(shapes):
            raise ValueError("training.batch_decoders does nothing: no two targets have decoders of one shape")
        for key in ("compile", "cuda_graphs"):
            if getattr(teachers, key) is not True:
                continue
            if teachers.sharding == "zero3":
                raise ValueError(
                    f"teachers.{key} is not for sharded teachers, which gather their parameters block by block: "
                    "use `sharding: replicated`, or leave it at auto"
                )
            if not any(isinstance(target, TeacherTarget) for target in self.targets.values()):
                raise ValueError(f"teachers.{key} does nothing: no target has a teacher")
        if teachers.cuda_graphs is True and self.device == "cpu":
            raise ValueError("teachers.cuda_graphs needs a GPU, but device is cpu: leave it at auto")
        if teachers.compile is True and teachers.precision == "int8":
            raise ValueError("teachers.compile is not for teachers.precision int8: leave it at auto")

    def _check_eight_bits(self) -> None:
        precision = self.teachers.precision
        if self.teachers.shard_over == "world" and self.teachers.sharding == "replicated":
            raise ValueError("teachers.shard_over world does nothing with teachers.sharding replicated")
        if (self.device, precision) in (("cpu", "fp8"), ("cuda", "int8")):
            raise ValueError(
                f"teachers.precision {precision} is not for device {self.device}: int8 is for CPUs, fp8 for GPUs"
            )
        if precision not in ("int8", "fp8"):
            if self.teachers.accept_inexact:
                raise ValueError(f"teachers.accept_inexact does nothing with teachers.precision {precision}")
            return
        if self.teachers.sharding == "zero3":
            raise ValueError(f"teachers.precision {precision} cannot be sharded: use `sharding: replicated` or fp16")
        if not any(isinstance(target, TeacherTarget) for target in self.targets.values()):
            raise ValueError(f"teachers.precision {precision} does nothing: no target has a teacher")
        moving = [name for name, target in self.targets.items() if isinstance(target, MomentumTarget)]
        if moving:
            raise ValueError(
                f"teachers.precision {precision} is for frozen weights, but those of targets.{moving[0]} move"
            )

    def _check_mask(self) -> None:
        mask, visible, total = self.data.mask, self.visible_tokens, self.tokens
        for name, target in self.targets.items():
            if mask is None and target.tokens != "all":
                raise ValueError(
                    f"targets.{name}.tokens is {target.tokens}, but without data.mask the student sees all tokens: "
                    "give a mask, or `tokens: all` with `head: mlp` or `linear`"
                )
            if mask is not None and target.tokens == "all":
                raise ValueError(
                    f"targets.{name}.tokens is all, but data.mask hides some of them from the student: "
                    "set data.mask to null, or `tokens: visible`"
                )
        if mask is None:
            return
        if not 0 < visible < total:
            raise ValueError(
                f"data.mask.ratio {mask.ratio} leaves {visible} of {total} tokens visible; "
                "at least one must stay visible and one be masked"
            )
        if mask.decode < 1:
            if mask.kind != "tube" or self.model.grid[0] % 4:
                raise ValueError(
                    f"data.mask.decode {mask.decode:g} runs through tube masks of 4, 8 ... time slices, where it takes "
                    f"equally many of every clip; here it is a {mask.kind} mask of {self.model.grid[0]} slices"
                )
            if not any(target.tokens == "masked" for target in self.targets.values()):
                raise ValueError(f"data.mask.decode {mask.decode:g} does nothing: no target is at masked tokens")

    @property
    def tokens(self) -> int:
        """Tokens of a clip (N)."""
        time, height, width = self.model.grid
        return time * height * width

    @property
    def visible_tokens(self) -> int:
        """Visible tokens of a clip (V), the same in every clip.

        A tube mask rounds the masked patches of one time slice down and repeats them; a random mask
        rounds over all tokens.
        """
        mask, (time, height, width) = self.data.mask, self.model.grid
        if mask is None:
            return self.tokens
        if mask.kind == "tube":
            return self.tokens - time * int(mask.ratio * height * width)
        return self.tokens - int(mask.ratio * self.tokens)

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        del values["teachers"], values["training"]["batch_decoders"]
        for target in values["targets"].values():
            target.pop("checkpoint", None)
        return values


def _nearest(numbers: list[int], wanted: int) -> list[int]:
    """The next smaller and the next larger of ascending numbers."""
    below, above = [n for n in numbers if n < wanted], [n for n in numbers if n > wanted]
    return below[-1:] + above[:1]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
