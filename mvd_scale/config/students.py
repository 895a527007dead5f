"""Section `students:` of a recipe: several students for one pass of the teachers, each as a recipe of its own.

A student is told by the keys in which it differs from the recipe; they are merged over the recipe's sections `model`,
`targets`, `training` and `data` before validation, so that each student has all values. A resolved recipe holds those
in which a student differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import field_validator

from mvd_scale.config.data import AugmentConfig, DataConfig, MaskConfig
from mvd_scale.config.model import SIZES, ModelConfig
from mvd_scale.config.reading import copy_mappings, set_by_path
from mvd_scale.config.section import Section
from mvd_scale.config.target import BaseTarget, TargetConfig
from mvd_scale.config.training import PretrainTraining

_CLIP_KEYS = ("frames", "input_size", "patch_size", "tubelet")
"""Keys of `model` that set the shape of clips and masks."""

_STEP_KEYS = (
    "epochs", "max_steps", "global_batch", "micro_batch", "precision", "collective_timeout_minutes", "hang_minutes",
    "skip_nonfinite_steps", "bf16_products",
)  # fmt: skip
"""Keys of `training` that set the clips of a step, the number of steps, and the precision of features."""

_HEAD_KEYS = frozenset({"head", "hidden", "decoder", "weight", "distance"})
"""Keys of a target that do not change its features."""

_SHAPE = ("width", "depth", "heads")


class StudentData(Section):
    """View of one student on the clips that all students share."""

    mask: MaskConfig | None
    """Mask over the tokens: that which the student would have alone. Features of the teachers are then computed at all
    tokens, once for all students."""


class StudentConfig(Section):
    """One of several students. Each section is merged over the recipe's section of the same name."""

    model: ModelConfig
    """Shape of the student. Clips and tokens are those of the recipe: `frames`, `input_size`, `patch_size` and
    `tubelet` cannot differ. A `size` replaces the recipe's `width`, `depth` and `heads`; one of these changes that of
    the recipe's `size`."""

    targets: dict[str, TargetConfig]
    """Heads of the student, and weights and distances of its loss: `head`, `hidden`, `decoder`, `weight` and `distance`
    of each of the recipe's targets. A target that is null is left out."""

    training: PretrainTraining
    """Optimizer, schedule of learning rate and weight decay, initial weights, and DeepSpeed engine of the student. The
    clips of a step, their precision and the number of steps are those of the recipe: `epochs`, `max_steps`,
    `global_batch`, `micro_batch`, `precision`, `collective_timeout_minutes`, `hang_minutes` and `skip_nonfinite_steps`
    cannot differ."""

    data: StudentData
    """Mask of the student, if it is not the recipe's. All else of `data` is shared."""

    @field_validator("targets")
    @classmethod
    def _check_any_target(cls, targets: dict[str, BaseTarget]) -> dict[str, BaseTarget]:
        if not targets:
            raise ValueError("a student needs at least one target")
        return targets


def merge_student(recipe: dict[str, Any], name: str) -> dict[str, Any]:
    """Merge the sections of a student over those of its recipe.

    Args:
        recipe: values of the whole recipe, as a YAML file holds them.
        name: name of the student.

    Returns:
        values of the student; keys that no section has are kept, for the validation to refuse.
    """
    own = recipe["students"][name] or {}
    if not isinstance(own, dict):
        return own
    merged = copy_mappings({section: recipe.get(section) or {} for section in StudentConfig.model_fields})
    if isinstance(merged["data"], dict):
        merged["data"] = {"mask": merged["data"].get("mask", {})}
    model, base = own.get("model"), merged["model"]
    if isinstance(model, dict) and isinstance(base, dict):
        if model.get("size") is not None:
            merged["model"] = {key: value for key, value in base.items() if key not in _SHAPE}
        elif any(key in model for key in _SHAPE) and base.get("size") in SIZES:
            shape = dict(zip(_SHAPE, SIZES[base["size"]], strict=True))
            merged["model"] = {**base, **shape, "size": None}
    for section, values in own.items():
        set_by_path(merged, [str(section)], values)
    if isinstance(merged["targets"], dict):
        merged["targets"] = {target: values for target, values in merged["targets"].items() if values is not None}
    return merged


def find_contradictions(
    name: str,
    student: StudentConfig,
    model: ModelConfig,
    targets: dict[str, TargetConfig],
    training: PretrainTraining,
    data: DataConfig,
) -> Iterator[str]:
    """Yield a message for each value of a student that all students of a recipe must share.

    Args:
        name: name of the student.
        student: the student.
        model: the recipe's section `model`.
        targets: the recipe's section `targets`.
        training: the recipe's section `training`.
        data: the recipe's section `data`.
    """

    def differing(key: str, own: object, shared: object) -> Iterator[str]:
        if own != shared:
            yield (
                f"students.{name}.{key} is {own!r}, but all students of a recipe share {key} {shared!r}: remove it, or "
                "train this student by a recipe of its own"
            )

    for key in _CLIP_KEYS:
        yield from differing(f"model.{key}", getattr(student.model, key), getattr(model, key))
    for key in _STEP_KEYS:
        yield from differing(f"training.{key}", getattr(student.training, key), getattr(training, key))
    if data.augment != AugmentConfig() and _mask_draws(student.data.mask) != _mask_draws(data.mask):
        yield (
            f"students.{name}.data.mask is of another kind than data.mask, or only one of the two has a decode_ratio: "
            "alone, the student would draw another data.augment after it. Let the masks differ in nothing but ratio, "
            "or train this student by a recipe of its own"
        )
    for target, config in student.targets.items():
        if target not in targets:
            yield (
                f"students.{name}.targets.{target} is no target of the recipe, whose targets are "
                f"{', '.join(targets)}: add it to the recipe's targets, and set it to null for the other students"
            )
            continue
        own, shared = config.model_dump(), targets[target].model_dump()
        for key in sorted((own.keys() | shared.keys()) - _HEAD_KEYS):
            yield from differing(f"targets.{target}.{key}", own.get(key), shared.get(key))


def _mask_draws(mask: MaskConfig | None) -> tuple[str, bool] | None:
    """Properties of a mask on which the random numbers that it draws for a clip depend."""
    return None if mask is None else (mask.kind, mask.decode_ratio < 1)
