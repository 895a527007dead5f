"""Cost of the training of encoders, in floating-point operations, and training of equal cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import ceil
from typing import Any

from mvd_scale.config import Recipe, recipe_from_dict
from mvd_scale.config.pipeline import find_references
from mvd_scale.config.reproduction import EncoderEntry
from mvd_scale.errors import UserError
from mvd_scale.performance.planning.flops import part_flops
from mvd_scale.performance.planning.workload import build_workload


class Costs:
    """Costs of the encoders of a scale, in floating-point operations for each video of the data.

    Counted are forward and backward passes of student and heads, and forward passes of teachers, as `mvd-scale plan`
    counts them; not decoding, augmentation and the optimizer. All encoders must be trained on the same videos.

    Args:
        encoders: encoders of a scale.
    """

    def __init__(self, encoders: Mapping[str, EncoderEntry]) -> None:
        self._encoders = encoders
        self.training = cache(self._training)

    def total(self, name: str) -> float:
        """Cost of an encoder with that of all encoders from which it is trained, each once."""
        return sum(self.training(other) for other in self.lineage(name))

    def lineage(self, name: str) -> list[str]:
        """Names of an encoder and of all from which it is trained: teachers and initial weights."""
        found = [name]
        for other in find_references(self._encoders[name].recipe):
            if other in self._encoders:
                found += [known for known in self.lineage(other) if known not in found]
        return found

    def recipe_values(self, name: str) -> dict[str, Any]:
        """Recipe of an encoder, with the epochs that its cost allows."""
        entry = self._encoders[name]
        if entry.costs_as is None:
            return entry.recipe
        recipe = self._read(name)
        epochs = ceil(self.total(entry.costs_as) / _flops_per_epoch(recipe))
        return {**entry.recipe, "training": {**entry.recipe["training"], "epochs": epochs}}

    def _training(self, name: str) -> float:
        recipe = recipe_from_dict(self._named(name, self.recipe_values(name)), f"encoders.{name}.recipe")
        return recipe.training.epochs * _flops_per_epoch(recipe)

    def _read(self, name: str) -> Recipe:
        return recipe_from_dict(self._named(name, self._encoders[name].recipe), f"encoders.{name}.recipe")

    @staticmethod
    def _named(name: str, values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "run": {"folder": name}}


def _flops_per_epoch(recipe: Recipe) -> float:
    """Floating-point operations of an epoch for each video.

    Raises:
        UserError: the recipe trains several students, or stops before its epochs end.
    """
    if recipe.students or recipe.training.max_steps is not None:
        raise UserError("costs_as compares whole trainings of one student: remove students and training.max_steps")
    parts = part_flops(build_workload(recipe), checkpointing=recipe.training.gradient_checkpointing)
    return recipe.data.clips_per_video * recipe.data.copies * sum(part.total for part in parts)
