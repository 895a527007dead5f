"""A recipe: YAML -> dotted overrides -> the typed schema -> checks across sections."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from mvd_scale.config.data import DataConfig
from mvd_scale.config.model import ModelConfig
from mvd_scale.config.reading import describe, parse_overrides, read_mapping, set_value
from mvd_scale.config.section import Section
from mvd_scale.config.target import TargetConfig
from mvd_scale.config.training import CheckpointConfig, LoggingConfig, RunConfig, TeacherConfig, TrainingConfig
from mvd_scale.errors import UserError


class Recipe(Section):
    """Everything that one run of `mvd-scale pretrain` needs to know."""

    seed: int = Field(default=0, ge=0)
    """Of weights, order, frames, crops and masks."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    targets: dict[str, TargetConfig] = Field(min_length=1)
    """Any number of targets by name; the loss is their weighted sum."""

    training: TrainingConfig
    teachers: TeacherConfig = TeacherConfig()
    checkpoints: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

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
        if self.device == "cpu" and "fp16" in (self.training.precision, self.teachers.precision):
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
        return self

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
        values = self.model_dump(mode="json")
        for section in ("run", "device", "teachers", "checkpoints", "logging"):
            del values[section]
        for key in ("source", "root", "workers", "threads", "prefetch", "max_broken", "read_timeout"):
            del values["data"][key]
        for part in (values["data"]["mixture"] or {}).values():
            del part["source"], part["root"]
        for target in values["targets"].values():
            # Weights are known by their contents, which the checkpoints record, not by where they lie.
            target.pop("checkpoint", None)
        for key in (
            "max_steps", "micro_batch", "deepspeed", "gradient_checkpointing", "collective_timeout_minutes",
            "initial_encoder",
        ):  # fmt: skip
            del values["training"][key]
        return dict(_flatten(values))

    def to_yaml(self) -> str:
        """The resolved recipe, every field spelled out; `load_recipe` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def list_recipes() -> dict[str, str]:
    """Names of the shipped recipes and the first line of each one's head."""
    root = resources.files("mvd_scale") / "recipes"
    found = {}
    for folder in sorted(root.iterdir(), key=lambda entry: entry.name):
        if folder.is_dir():
            for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
                if file.name.endswith(".yaml"):
                    name = f"{folder.name}/{file.name.removesuffix('.yaml')}"
                    found[name] = file.read_text().splitlines()[0].lstrip("# ")
    return found


def load_recipe(name_or_path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe by shipped name or by path and lay dotted overrides over it.

    Args:
        name_or_path: a name of `list_recipes`, or a YAML file. The recipe that its `base:` names stands below it.
        overrides: command-line words such as `--training.epochs 3` or `--training.epochs=3`, values in YAML;
            the last one of a key wins. A mapping merges into what stands, anything else replaces it.

    Raises:
        UserError: the recipe does not exist, is no YAML, or does not fit the schema; all faults are named.
    """
    source, values = _read(name_or_path, ())
    for key, value in parse_overrides(overrides or []):
        set_value(values, key, value)
    return _validated(values, source)


def recipe_of(values: dict[str, Any], source: str) -> Recipe:
    """A recipe from the mapping that a YAML file would hold; `source` names it in messages.

    Raises:
        UserError: as `load_recipe`.
    """
    return _validated(_with_base(values, source, None, ()), source)


def _validated(values: dict[str, Any], source: str) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{source} does not describe a run:\n{describe(error)}") from error


def _read(name_or_path: str | Path, above: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    source, path = str(name_or_path), Path(name_or_path)
    if source in above:
        raise UserError(f"{' -> '.join([*above, source])}: a recipe cannot be its own base")
    expected = "sections such as `model:` and `training:`"
    if path.is_file():
        return source, _with_base(read_mapping(path.read_bytes(), source, expected), source, path.parent, above)
    known = list_recipes()
    if source not in known:
        raise UserError(f"no recipe {source!r}: give the path of a YAML file or one of {', '.join(known)}")
    shipped = resources.files("mvd_scale") / "recipes" / f"{source}.yaml"
    return source, _with_base(read_mapping(shipped.read_bytes(), source, expected), source, None, above)


def _with_base(values: dict[str, Any], source: str, folder: Path | None, above: tuple[str, ...]) -> dict[str, Any]:
    """A recipe laid over the one that its `base:` names, that one over its own, and so on."""
    base = values.get("base")
    own = {key: value for key, value in values.items() if key != "base"}
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{source}: base is {base!r}, expected the name or path of a recipe")
    beside = folder / base if folder is not None else None
    _, merged = _read(beside if beside is not None and beside.is_file() else base, (*above, source))
    for key, value in own.items():
        set_value(merged, [str(key)], value)
    return merged


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
