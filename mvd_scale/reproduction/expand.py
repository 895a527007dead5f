"""A table at a scale as a pipeline: each encoder, its fine-tuning, test and probe, for each seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mvd_scale.config.pipeline import Pipeline, SynthStage, find_references, replace_references
from mvd_scale.config.reproduction import Scale, ScaledTable
from mvd_scale.errors import UserError
from mvd_scale.reproduction.compute import Costs

Measure = Literal["finetune", "probe"]
Split = Literal["test", "validation"]


@dataclass(frozen=True)
class Cell:
    """One figure of one seed: an encoder on a task by a measure."""

    encoder: str
    task: str
    measure: Measure
    seed: int

    stage: str
    """Stage whose result it is."""

    stages: tuple[str, ...]
    """Names of that stage and of those before it that serve this figure alone."""


@dataclass(frozen=True)
class Expansion:
    """Pipeline of a table, and where each of its figures comes from."""

    pipeline: Pipeline
    cells: tuple[Cell, ...]

    seeds: tuple[int, ...]

    encoders: dict[str, tuple[str, ...]]
    """Stages that pre-train an encoder, by its name, one for each seed."""


class _Names:
    """Names of stages: those of data that all seeds share are as in the scale, others end in the seed."""

    def __init__(self, scale: Scale) -> None:
        self._shared = {name for name in scale.data if not self._is_drawn(scale, name)}

    def _is_drawn(self, scale: Scale, name: str) -> bool:
        stage = scale.data[name]
        below = find_references(stage.model_dump(mode="json"))
        return isinstance(stage, SynthStage) or any(self._is_drawn(scale, other) for other in below)

    def stage(self, name: str, seed: int) -> str:
        return name if name in self._shared else f"{name}_seed{seed}"

    def rewrite(self, values: Any, seed: int) -> Any:
        """Rewrite references to names of the scale as references to stages."""
        return replace_references(values, {name: f"{{{self.stage(name, seed)}}}" for name in find_references(values)})


def expand(scale: Scale, table: ScaledTable, seeds: Sequence[int], output: Path, split: Split) -> Expansion:
    """Expand a table to the pipeline of all that it needs.

    Args:
        scale: how encoders are made and judged.
        table: rows and tasks.
        seeds: seeds of encoders and drawn videos.
        output: folder of the pipeline.
        split: videos on which all are judged.

    Raises:
        UserError: the table names an encoder or a task that the scale has not, or a recipe is not valid.
    """
    _check_names(scale, table)
    names, costs = _Names(scale), Costs(scale.encoders)
    wanted = [row.encoder for row in table.rows]
    encoders = _in_order(scale, costs, wanted)
    stages: dict[str, dict[str, Any]] = {}
    cells: list[Cell] = []
    for seed in seeds:
        stages |= dict(_data_stages(scale, names, seed))
        for name in encoders:
            recipe = names.rewrite(costs.recipe_values(name), seed) | {"seed": seed}
            title = f"encoder {name}, seed {seed}"
            stages[names.stage(name, seed)] = {"kind": "pretrain", "title": title, "recipe": recipe}
        for name in wanted:
            for task in table.tasks:
                judged, measured = _judging(scale, names, (name, task, seed), split)
                stages |= judged
                cells += measured
    stages = _without_unused_data(stages)
    used = tuple(seeds)
    return Expansion(
        Pipeline.model_validate({"folder": output, "ranks": 1, "stages": stages}),
        tuple(cells),
        used,
        {name: tuple(names.stage(name, seed) for seed in used) for name in encoders},
    )


def _check_names(scale: Scale, table: ScaledTable) -> None:
    judged = [name for name, entry in scale.encoders.items() if entry.finetuned_as is not None]
    for row in table.rows:
        if row.encoder not in judged:
            raise UserError(f"the table names the encoder {row.encoder!r}: expected one of {', '.join(judged)}")
    for task in table.tasks:
        if task not in scale.tasks:
            raise UserError(f"the table names the task {task!r}: expected one of {', '.join(scale.tasks)}")


def _in_order(scale: Scale, costs: Costs, wanted: Sequence[str]) -> list[str]:
    """Encoders that the wanted ones need, each after those from which it is trained."""
    found: list[str] = []
    for name in wanted:
        found += [other for other in reversed(costs.lineage(name)) if other not in found]
    # A lineage is ordered by depth; one encoder may be the teacher of another and of its teacher.
    return sorted(found, key=lambda name: (len(costs.lineage(name)), list(scale.encoders).index(name)))


def _data_stages(scale: Scale, names: _Names, seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, stage in scale.data.items():
        values = names.rewrite(stage.model_dump(mode="json", exclude_unset=True), seed)
        yield names.stage(name, seed), values | ({"seed": seed} if isinstance(stage, SynthStage) else {})


def _without_unused_data(stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Stages without the data from which no encoder, classifier, test or probe is made."""
    used = {name for name, values in stages.items() if values["kind"] not in ("synth", "index")}
    # A stage refers to earlier ones alone.
    for name in reversed(stages):
        if name in used:
            used.update(find_references(stages[name]))
    return {name: values for name, values in stages.items() if name in used}


def _judging(
    scale: Scale, names: _Names, cell: tuple[str, str, int], split: Split
) -> tuple[dict[str, dict[str, Any]], list[Cell]]:
    """Stages that judge an encoder on a task, and the figures that they give."""
    encoder, task, seed = cell
    told, kind = scale.tasks[task], scale.encoders[encoder].finetuned_as
    assert kind is not None

    def filled(values: Any) -> Any:
        texts = {"encoder": f"{{{encoder}}}", "split": split}
        return names.rewrite(replace_references(values, texts), seed)

    title, place = f"encoder {encoder}, {task}, seed {seed}", f"{encoder}_{task}"
    classifier, test, probe = (f"{place}_{part}_seed{seed}" for part in ("classifier", split, f"probe_{split}"))
    stages = {
        classifier: {
            "kind": "finetune",
            "title": f"{title}: fine-tuning",
            "recipe": filled(told.finetune[kind]) | {"seed": seed},
        },
        test: {
            "kind": "evaluate",
            "title": f"{title}: {split}",
            "checkpoint": f"{{{classifier}}}/classifier.safetensors",
            **filled(told.evaluate),
        },
    }
    cells = [Cell(encoder, task, "finetune", seed, test, (classifier, test))]
    if told.probe is not None:
        checkpoint = f"{{{names.stage(encoder, seed)}}}/encoder.safetensors"
        stages[probe] = {"kind": "probe", "title": f"{title}: probe", "checkpoint": checkpoint, **filled(told.probe)}
        cells.append(Cell(encoder, task, "probe", seed, probe, (probe,)))
    return stages, cells
