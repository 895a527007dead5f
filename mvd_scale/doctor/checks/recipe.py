"""Needs of a recipe that hosts must meet: room for its checkpoints, and its files at the same paths."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mvd_scale.config import FinetuneRecipe, Recipe
from mvd_scale.doctor.findings import Finding, HostCheck
from mvd_scale.performance.planning.workload import build_workload

_STATE_BYTES, _AVERAGE_BYTES = 12, 4
"""Bytes of a parameter in a checkpoint: float32 weight and Adam's two moments; and of one in an average."""

_SIGNS = ("://", "*", "?", "[")
"""Signs of sources that are no plain paths."""


def checkpoint_bytes(recipe: Recipe | FinetuneRecipe) -> int:
    """Bytes of all checkpoints that a run keeps, and of the next, which is written before the oldest is deleted.

    Raises:
        UserError: the shape of a teacher, or the number of classes, is missing.
    """
    if isinstance(recipe, Recipe) and recipe.students:
        return sum(checkpoint_bytes(alone) for alone in recipe.each_student().values())
    workload = build_workload(recipe)
    averaged = 0
    if isinstance(recipe, FinetuneRecipe):
        averaged = 0 if recipe.training.ema_decay is None else workload.parameters
    else:
        momentum = {f"{name} teacher" for name, target in recipe.targets.items() if target.kind == "momentum"}
        averaged = sum(part.parameters for part in workload.teachers if part.name in momentum)
    one = _STATE_BYTES * workload.parameters + _AVERAGE_BYTES * averaged
    return (recipe.checkpoints.keep + 1) * one


def recipe_checks(recipe: Recipe | FinetuneRecipe) -> list[HostCheck]:
    """List the checks of a host alone."""
    hung = "the file system of one of these paths does not answer: see `mount` and its server"
    return [HostCheck("folder", "files of the recipe", lambda: files_exist(recipe_files(recipe)), 30, hung)]


def recipe_files(recipe: Recipe | FinetuneRecipe) -> dict[str, Path]:
    """Files and folders that a recipe names, by key; without URLs and patterns."""
    sources = {"data.source": recipe.data.source, "data.root": recipe.data.root}
    for name, part in (recipe.data.mixture or {}).items():
        sources |= {f"data.mixture.{name}.source": part.source}
    paths = {key: Path(text) for key, text in sources.items() if text and not any(sign in text for sign in _SIGNS)}
    weights = {"training.initial_encoder": recipe.training.initial_encoder}
    if isinstance(recipe, Recipe):
        for name, target in recipe.targets.items():
            weights[f"targets.{name}.checkpoint"] = getattr(target, "checkpoint", None)
        for name, student in recipe.students.items():
            weights[f"students.{name}.training.initial_encoder"] = student.training.initial_encoder
    return paths | {key: path for key, path in weights.items() if path is not None}


def files_exist(files: dict[str, Path]) -> Iterator[Finding]:
    """Check that files exist on this host."""
    name = "files of the recipe"
    missing = {key: path for key, path in files.items() if not path.exists()}
    if missing:
        said = "; ".join(f"{key} {path}" for key, path in missing.items())
        yield Finding(name, "fail", f"missing: {said}", "mount or copy them to the same paths on every host")
    elif files:
        yield Finding(name, "ok", f"{len(files)} exist: {', '.join(files)}")
    else:
        yield Finding(name, "left out", "the recipe names no files")
