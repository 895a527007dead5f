"""Recipes: the sections that all runs share, the pre-training recipe, and checks across sections."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from mvd_scale.config.data import DataConfig, MaskConfig, ShortSideCrop
from mvd_scale.config.model import WIDTH_MULTIPLES, ModelConfig
from mvd_scale.config.reading import flatten_sections
from mvd_scale.config.section import Section
from mvd_scale.config.students import StudentConfig, find_contradictions, merge_student
from mvd_scale.config.target import MomentumTarget, TargetConfig, TeacherTarget, group_decoders
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
    """Base of all recipes of runs that train."""

    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, and of the order, frames, crops and masks of clips."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the run. `auto`: GPUs if there are any, else the CPU."""

    run: RunConfig
    """Folder of the run."""

    model: ModelConfig
    """Shape of the vision transformer that is trained."""

    data: DataConfig
    """Sources, sampling, crop, augmentation and mask of clips."""

    training: TrainingConfig
    """Optimisation."""

    checkpoints: CheckpointConfig = CheckpointConfig()
    """When checkpoints are saved, and how many are kept."""

    logging: LoggingConfig = LoggingConfig()
    """Metrics and their destinations."""

    @property
    def own_masks(self) -> Mapping[str, MaskConfig | None]:
        """Masks of students in the place of `data.mask`, by name; only recipes of several students have any."""
        return {}

    @model_validator(mode="after")
    def _check_sections(self) -> Self:
        self._check_training()
        return self

    def _check_training(self) -> None:
        """Check device, schedule and crop.

        Raises:
            ValueError: sections contradict each other.
        """
        if self.device == "cpu" and self.training.precision == "fp16":
            raise ValueError(
                "training.precision fp16 needs a GPU (CPUs compute fp16 slowly or not at all): use bf16 or fp32"
            )
        if self.device == "cpu" and self.data.decoder == "nvdec":
            raise ValueError("data.decoder nvdec needs a GPU, but device is cpu: use auto")
        if self.model.is_rotary:
            raise ValueError(
                f"model.positions {self.model.positions} are those of frozen teachers: a model that is trained has "
                "sincos3d, sinusoid or sincos2d"
            )
        if self.model.rms_norm:
            raise ValueError("model.rms_norm is for frozen teachers: a model that is trained has LayerNorms")
        if self.training.warmup_epochs >= self.training.epochs:
            raise ValueError(
                f"training.warmup_epochs {self.training.warmup_epochs:g} must be less than "
                f"training.epochs {self.training.epochs}"
            )
        if self.training.min_lr > self.training.base_lr:
            raise ValueError(
                f"training.min_lr {self.training.min_lr:g} must not exceed training.base_lr {self.training.base_lr:g}"
            )
        crop = self.data.crop
        if isinstance(crop, ShortSideCrop) and crop.sides[0] < self.model.input_size:
            raise ValueError(
                f"data.crop.sides begins with {crop.sides[0]} pixels, which is less than the crop of model.input_size "
                f"{self.model.input_size}: give at least {self.model.input_size}"
            )

    @property
    def lr_batch(self) -> int:
        """Number of clips per optimizer step by which the learning rate is scaled."""
        return self.training.global_batch

    def micro_batch_and_accumulation(self, world_size: int) -> tuple[int, int]:
        """Micro batch and gradient accumulation steps for `world_size` ranks: the largest micro batch that is allowed.

        Raises:
            UserError: the global batch cannot be split over the ranks; the message proposes the nearest numbers of
                ranks and the nearest global batches that can.
        """
        total, copies = self.training.global_batch, self.data.copies
        limit = self.training.micro_batch or total
        if limit < copies:
            raise UserError(
                f"training.micro_batch {limit} is less than data.copies {copies}, but a micro batch must hold all "
                f"copies of a clip: set training.micro_batch to {copies} or more"
            )
        if total % (world_size * copies):
            # The smallest global batch that gives every rank a whole set of copies.
            unit = world_size * copies
            splits = [n for n in range(1, total // copies + 1) if total % (n * copies) == 0]
            ranks = _nearest(splits, world_size)
            batches = [n for n in (total // unit * unit, -(-total // unit) * unit) if n]
            raise UserError(
                f"training.global_batch {total} cannot be split over {world_size} ranks"
                + (f" in whole sets of {copies} copies" if copies > 1 else "")
                + (f". Start {_either(ranks)} ranks, or" if ranks else ". No number of ranks divides it:")
                + f" set training.global_batch to {_either(batches)}; the learning rate scales with it"
            )
        share = total // world_size
        micro = max(n for n in range(copies, min(share, limit) + 1, copies) if share % n == 0)
        return micro, share // micro

    def identity(self) -> dict[str, Any]:
        """Values that must not change when a run resumes, by dotted key: all that affect the computed numbers.

        The folder of the run, the frequency of checkpoints and logs, the settings of decoding, the split of batches,
        and the last step may change between a start and its resumption.
        """
        return flatten_sections(self._identity())

    def _identity(self) -> dict[str, Any]:
        values = self.model_dump(mode="json")
        for section in ("run", "device", "checkpoints", "logging"):
            del values[section]
        for key in ("source", "root", "decoder", "workers", "threads", "prefetch", "max_broken", "read_timeout"):
            del values["data"][key]
        for part in (values["data"]["mixture"] or {}).values():
            del part["source"], part["root"]
        # The checkpoints record the contents of the initial weights, so that their path may change.
        for key in (
            "max_steps", "micro_batch", "deepspeed", "precision", "bf16_products", "gradient_checkpointing",
            "compile", "collective_timeout_minutes", "hang_minutes", "initial_encoder",
        ):  # fmt: skip
            del values["training"][key]
        return values

    def to_yaml(self) -> str:
        """Resolved recipe as YAML with a value for every field; `load_recipe` reads it back."""
        return yaml.safe_dump(self._resolved(), sort_keys=False)

    def _resolved(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Recipe(RunRecipe):
    """Recipe of one run of `mvd-scale pretrain`."""

    targets: dict[str, TargetConfig] = Field(min_length=1)
    """Prediction targets by name; the loss is the weighted sum of their losses."""

    training: PretrainTraining
    """Optimisation of the student."""

    teachers: TeacherConfig = TeacherConfig()
    """Placement and precision of frozen teachers."""

    logging: PretrainLogging = PretrainLogging()
    """Metrics, pictures and probes, and their destinations."""

    students: dict[str, StudentConfig] = Field(default={})
    """Several students by name, for one pass of the teachers: all see the same clips and features, and the same masks
    unless one has its own, and each has its own DeepSpeed engine, and its own run folder `students/NAME` in that of the
    run. Losses and weights equal those of a run alone. Keys that a student does not name have the recipe's values.
    Without any, the recipe's `model` is the only student."""

    @model_validator(mode="before")
    @classmethod
    def _merge_students(cls, values: object) -> object:
        """Merge each student over the recipe; a student that is null is left out, as a student of its base."""
        if not isinstance(values, dict) or not isinstance(values.get("students"), dict):
            return values
        kept = {name: own for name, own in values["students"].items() if own is not None}
        values = {**values, "students": kept}
        return {**values, "students": {name: merge_student(values, name) for name in kept}}

    @model_validator(mode="before")
    @classmethod
    def _drop_targets(cls, values: object) -> object:
        """Remove targets that are null: this is how a recipe drops a target of its base."""
        if isinstance(values, dict) and isinstance(values.get("targets"), dict):
            kept = {name: target for name, target in values["targets"].items() if target is not None}
            return {**values, "targets": kept}
        return values

    @model_validator(mode="after")
    def _check_across_sections(self) -> Self:
        self._check_models()
        for name, student in self.students.items():
            _check_name("students", "student", name)
            shared = (self.model, self.targets, self.training, self.data)
            contradictions = list(find_contradictions(name, student, *shared))
            if contradictions:
                raise ValueError("; ".join(contradictions))
            alone = self.alone(name)
            try:
                alone._check_training()
                alone._check_models()
            except ValueError as error:
                raise ValueError(f"students.{name}: {error}") from error
        return self

    def _check_models(self) -> None:
        """Check the student of this recipe, its targets and its teachers.

        Raises:
            ValueError: sections contradict each other.
        """
        self._check_mask()
        for name, target in self.targets.items():
            _check_name("targets", "target", name)
            if target.decoder is None:
                continue
            if target.decoder.width % target.decoder.heads:
                raise ValueError(
                    f"targets.{name}.decoder: width {target.decoder.width} is not a multiple of heads "
                    f"{target.decoder.heads}"
                )
            multiple = WIDTH_MULTIPLES[self.model.positions]
            if target.decoder.width % multiple:
                raise ValueError(
                    f"targets.{name}.decoder: model.positions {self.model.positions} require a width that is a "
                    f"multiple of {multiple}, not {target.decoder.width}"
                )
        if self.device == "cpu" and self.teachers.precision == "fp16":
            raise ValueError(
                "teachers.precision fp16 needs a GPU (CPUs compute fp16 slowly or not at all): use bf16 or fp32"
            )
        self._check_eight_bits()
        self._check_programs()

    def _check_programs(self) -> None:
        teachers = self.teachers
        if self.training.batch_decoders is True and not self.decoder_groups:
            raise ValueError(
                "training.batch_decoders true has no effect: no two targets have decoders of the same shape that "
                "predict the same tokens. Set it to auto"
            )
        for key in ("compile", "cuda_graphs"):
            if getattr(teachers, key) is not True:
                continue
            if teachers.sharding == "zero3":
                raise ValueError(
                    f"teachers.{key} is not supported for sharded teachers, which gather their parameters block by "
                    f"block: use `teachers.sharding: replicated`, or set teachers.{key} to auto"
                )
            if not any(isinstance(target, TeacherTarget) for target in self.targets.values()):
                raise ValueError(f"teachers.{key} true has no effect: no target has a teacher. Set it to auto")
        if teachers.cuda_graphs is True and self.device == "cpu":
            raise ValueError("teachers.cuda_graphs needs a GPU, but device is cpu: set it to auto")
        if teachers.compile is True and teachers.precision == "int8":
            raise ValueError("teachers.compile is not supported for teachers.precision int8: set it to auto")

    def _check_eight_bits(self) -> None:
        precision = self.teachers.precision
        if self.teachers.shard_over == "world" and self.teachers.sharding == "replicated":
            raise ValueError(
                "teachers.shard_over world has no effect with teachers.sharding replicated: remove one of the two"
            )
        if (self.device, precision) in (("cpu", "fp8"), ("cuda", "int8")):
            raise ValueError(
                f"teachers.precision {precision} is not supported on device {self.device}: use int8 on CPUs, or fp8 on "
                "GPUs"
            )
        if precision not in ("int8", "fp8"):
            if self.teachers.accept_inexact:
                raise ValueError(
                    f"teachers.accept_inexact has no effect with teachers.precision {precision}: it is for int8 and fp8"
                )
            return
        if self.teachers.sharding == "zero3":
            raise ValueError(
                f"teachers.precision {precision} cannot be sharded: use `teachers.sharding: replicated`, or precision "
                "fp16"
            )
        if not any(isinstance(target, TeacherTarget) for target in self.targets.values()):
            raise ValueError(f"teachers.precision {precision} has no effect: no target has a teacher")
        moving = [name for name, target in self.targets.items() if isinstance(target, MomentumTarget)]
        if moving:
            raise ValueError(
                f"teachers.precision {precision} requires frozen weights, but the teacher of targets.{moving[0]} "
                "changes with every step: use another precision"
            )

    def _check_mask(self) -> None:
        mask, visible, total = self.data.mask, self.visible_tokens, self.tokens
        for name, target in self.targets.items():
            if mask is None and target.tokens != "all":
                raise ValueError(
                    f"targets.{name}.tokens is {target.tokens}, but without data.mask the student sees all tokens: "
                    "give a mask, or `tokens: all` with `head: mlp` or `head: linear`"
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
                "expected at least one visible and one masked token"
            )
        if mask.decode_ratio < 1:
            if mask.kind != "tube" or self.model.grid[0] % 4:
                raise ValueError(
                    f"data.mask.decode_ratio {mask.decode_ratio:g} requires a tube mask over a multiple of 4 time "
                    "slices, so that every clip has the same number of tokens; this is a "
                    f"{mask.kind} mask over {self.model.grid[0]} slices"
                )
            if not any(target.tokens == "masked" for target in self.targets.values()):
                raise ValueError(
                    f"data.mask.decode_ratio {mask.decode_ratio:g} has no effect: no target is predicted at masked "
                    "tokens. Set it to 1"
                )

    def alone(self, name: str) -> Recipe:
        """Recipe of one of the `students`: that of the run in its folder, which trains it alone.

        Args:
            name: name of the student.
        """
        student = self.students[name]
        return self.model_copy(
            update={
                "run": RunConfig(folder=student_folder(self.run.folder, name)),
                "model": student.model,
                "targets": student.targets,
                "training": student.training,
                "data": self.data.model_copy(update={"mask": student.data.mask}),
                "students": {},
            }
        )

    def each_student(self) -> dict[str, Recipe]:
        """Recipes of all students by name; this recipe itself, under an empty name, if it names no students."""
        return {name: self.alone(name) for name in self.students} or {"": self}

    @property
    def decoder_groups(self) -> list[list[str]]:
        """Targets whose decoders can be batched, see `group_decoders`."""
        return group_decoders({name: target.decoder_kind for name, target in self.targets.items()})

    @property
    def own_masks(self) -> dict[str, MaskConfig | None]:
        """Masks of the students whose mask is not the recipe's, by name."""
        masks = {name: student.data.mask for name, student in self.students.items()}
        return {name: mask for name, mask in masks.items() if mask != self.data.mask}

    @property
    def shared_tokens(self) -> int | None:
        """Number of tokens of a clip if students have masks of their own, and share features at all of them."""
        return self.tokens if self.own_masks else None

    @property
    def tokens(self) -> int:
        """Number of tokens of a clip (N)."""
        time, height, width = self.model.grid
        return time * height * width

    @property
    def visible_tokens(self) -> int:
        """Number of visible tokens of a clip (V), the same in every clip.

        For a tube mask, the number of masked patches of one time slice is rounded down; for a random mask, the number
        of masked tokens of the clip.
        """
        mask, (time, height, width) = self.data.mask, self.model.grid
        if mask is None:
            return self.tokens
        if mask.kind == "tube":
            return self.tokens - time * int(mask.ratio * height * width)
        return self.tokens - int(mask.ratio * self.tokens)

    def _resolved(self) -> dict[str, Any]:
        values = super()._resolved()
        for student in values["students"].values():
            # Targets that a student leaves out would be merged into it again.
            student["targets"] = {name: student["targets"].get(name) for name in values["targets"]}
            # Values that are the recipe's would hide an override of the recipe.
            for section in StudentConfig.model_fields:
                student[section] = _differing(student[section], values[section])
        return values

    def _identity(self) -> dict[str, Any]:
        values = super()._identity()
        del values["teachers"], values["training"]["batch_decoders"]
        for target in values["targets"].values():
            target.pop("checkpoint", None)
        if self.students:
            # The recipe's own sections are only the values of keys that students do not name.
            for section in StudentConfig.model_fields:
                if section != "data":
                    del values[section]
            del values["data"]["mask"]
            parts = {name: self.alone(name)._identity() for name in self.students}
            values["students"] = {
                name: {section: part[section] for section in ("model", "targets", "training")}
                | {"data": {"mask": part["data"]["mask"]}}
                for name, part in parts.items()
            }
        return values


def _differing(own: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Values of nested mappings that are others than those of a base."""
    return {
        key: _differing(value, base[key]) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in own.items()
        if key not in base or value != base[key]
    }


def student_folder(run: Path, name: str) -> Path:
    """Run folder of one of several students in the folder of their run."""
    return run / "students" / name


def _check_name(section: str, noun: str, name: str) -> None:
    """Raise a `ValueError` if a name cannot be the name of a module, a metric and a folder."""
    if not name.isidentifier():
        raise ValueError(
            f"{section}.{name}: the name of a {noun} must consist of letters, digits and underscores, and must not "
            "begin with a digit"
        )


def _nearest(numbers: list[int], wanted: int) -> list[int]:
    """Largest number below `wanted` and smallest number above it, of ascending numbers, as far as they exist."""
    below, above = [n for n in numbers if n < wanted], [n for n in numbers if n > wanted]
    return below[-1:] + above[:1]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
