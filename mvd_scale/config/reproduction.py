"""Schemas of a reproduction: tables, whose rows name encoders, and scales, which say how encoders are made and judged.

A table and a scale expand to a pipeline (`mvd_scale.reproduction.expand`).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from mvd_scale.config.pipeline import EvaluateStage, IndexStage, ProbeStage, SynthStage, find_references
from mvd_scale.config.reading import format_validation_error, parse_overrides, parse_yaml_mapping, set_by_path
from mvd_scale.config.section import Section
from mvd_scale.errors import UserError

ScaleName = Literal["full", "mini"]


class EncoderEntry(Section):
    """An encoder: a teacher or a student, pre-trained once for each seed."""

    recipe: dict[str, Any]
    """Recipe of pre-training. `{name}` in any text is the folder of an encoder or of data of the scale."""

    finetuned_as: str | None = None
    """Key of `tasks.NAME.finetune`, by which it is fine-tuned; null for a teacher that no row of a table names."""

    costs_as: str | None = None
    """Encoder whose cost this one gets: it is trained for as many epochs as cost as many floating-point operations as
    the training of that encoder and of all encoders that this one was trained from; `training.epochs` is replaced."""


class TaskEntry(Section):
    """A task on which encoders are judged."""

    published_as: str
    """Key of the task in the `published` figures of rows."""

    finetune: dict[str, dict[str, Any]]
    """Recipes of fine-tuning by `finetuned_as` of encoders. `{encoder}` is the folder of the encoder."""

    evaluate: dict[str, Any]
    """Keys of the test of the fine-tuned classifier, as those of an `evaluate` stage without `kind` and `checkpoint`.
    `{split}` is `test`, or `validation` where settings are chosen."""

    probe: dict[str, Any] | None = None
    """Keys of the linear probe of the frozen encoder, as those of a `probe` stage, likewise; null for none."""

    @model_validator(mode="after")
    def _check_stages(self) -> Self:
        EvaluateStage.model_validate({"kind": "evaluate", "checkpoint": "checkpoint", **self.evaluate})
        if self.probe is not None:
            ProbeStage.model_validate({"kind": "probe", "checkpoint": "checkpoint", **self.probe})
        return self


class Scale(Section):
    """How the encoders of all tables are made and judged, on a cluster or here."""

    output: Path
    """Folder for everything that is made."""

    seeds: list[int] = Field(min_length=1)
    """Seeds, each with encoders, and drawn videos, of its own."""

    data: dict[str, SynthStage | IndexStage]
    """Videos by name. Drawn videos are drawn anew for each seed."""

    videos: dict[str, int] = Field(default={})
    """Number of videos or images of data by name, for the plan of a cluster."""

    encoders: dict[str, EncoderEntry]
    """Encoders by name."""

    tasks: dict[str, TaskEntry]
    """Tasks by name."""

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{seeds} has a seed twice, whose figures are no independent ones: give each seed once")
        return seeds

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        for name in (*self.data, *self.encoders, *self.tasks):
            if not name.isidentifier():
                raise ValueError(f"{name}: a name must consist of letters, digits and underscores")
        known = [*self.data, *self.encoders]
        for name, stage in self.data.items():
            for reference in find_references(stage.model_dump(mode="json")):
                if reference not in self.data or reference == name:
                    raise ValueError(f"data.{name}: {reference} is not one of {', '.join(self.data)}")
        for name, task in self.tasks.items():
            # `{encoder}` and `{split}` are filled in for each cell.
            for reference in find_references(task.model_dump(mode="json")):
                if reference not in (*known, "encoder", "split"):
                    raise ValueError(f"tasks.{name}: {reference} is not one of {', '.join(known)}, encoder, split")
        for name, entry in self.encoders.items():
            wanted = [*find_references(entry.recipe), *([entry.costs_as] if entry.costs_as else [])]
            for reference in wanted:
                if reference not in known or reference == name:
                    raise ValueError(f"encoders.{name}: {reference} is not one of {', '.join(known)}")
            for task_name, task in self.tasks.items():
                if entry.finetuned_as is not None and entry.finetuned_as not in task.finetune:
                    raise ValueError(
                        f"encoders.{name}.finetuned_as {entry.finetuned_as} is not one of tasks.{task_name}.finetune"
                    )
        return self


class Row(Section):
    """A row of a table."""

    row: str
    """Words in which the table names it."""

    encoder: str
    """Encoder of the scale."""

    published: dict[str, float] = Field(default={})
    """Figures of the paper, top-1 in percent by the name of the task there."""


class Comparison(Section):
    """A difference of two encoders on a task."""

    better: str
    """Encoder that is said to be better."""

    than: str
    """Encoder that it is compared with."""

    task: str
    """Task."""


class Direction(Section):
    """A direction that the paper states, such as that one teacher helps more than another."""

    says: str
    """The direction in words."""

    all_of: list[Comparison] = Field(min_length=1)
    """Comparisons that must all hold."""


class ScaledTable(Section):
    """A table at one scale."""

    rows: list[Row] = Field(min_length=1)
    """Rows in their order."""

    tasks: list[str] = Field(min_length=1)
    """Tasks in their order."""

    directions: list[Direction] = Field(default=[])
    """Directions of the paper that the rows show."""

    @model_validator(mode="after")
    def _check_directions(self) -> Self:
        rows = [row.encoder for row in self.rows]
        for comparison in (comparison for direction in self.directions for comparison in direction.all_of):
            for name, known in ((comparison.better, rows), (comparison.than, rows), (comparison.task, self.tasks)):
                if name not in known:
                    raise ValueError(f"a direction names {name}: expected one of {', '.join(known)}")
        return self


class TableFile(Section):
    """A table of the paper, or a study that includes several."""

    title: str
    """Title."""

    note: str = ""
    """Conditions of the published figures."""

    includes: list[str] = Field(default=[])
    """Tables whose rows and directions this one has."""

    scales: dict[ScaleName, ScaledTable] = Field(default={})
    """The table at each scale."""

    @model_validator(mode="after")
    def _check_content(self) -> Self:
        if bool(self.includes) == bool(self.scales):
            raise ValueError("give either scales, or includes, which names other tables")
        return self


def list_tables() -> list[str]:
    """Names of the tables."""
    folder = resources.files("mvd_scale") / "reproduction" / "tables"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_table(name: str, scale: ScaleName) -> tuple[TableFile, ScaledTable]:
    """Read a table by name; of one that includes others, the rows and directions of all.

    Raises:
        UserError: no table has this name.
    """
    if name not in list_tables():
        raise UserError(f"no table {name!r}: expected one of {', '.join(list_tables())}")
    file = resources.files("mvd_scale") / "reproduction" / "tables" / f"{name}.yaml"
    table = _validated(
        TableFile, parse_yaml_mapping(file.read_bytes(), name, "`title:` and `scales:`"), f"table {name}"
    )
    if not table.includes:
        return table, table.scales[scale]
    parts = [load_table(other, scale)[1] for other in table.includes]
    rows: dict[str, Row] = {}
    for row in (row for part in parts for row in part.rows):
        rows.setdefault(row.encoder, row)
    return table, ScaledTable(
        rows=list(rows.values()),
        tasks=list(dict.fromkeys(task for part in parts for task in part.tasks)),
        directions=[direction for part in parts for direction in part.directions],
    )


def load_scale(name: ScaleName, overrides: list[str]) -> Scale:
    """Read a scale and apply dotted overrides.

    Raises:
        UserError: an override is malformed, or a value does not match the schema; the message names all faults.
    """
    file = resources.files("mvd_scale") / "reproduction" / "scales" / f"{name}.yaml"
    values = parse_yaml_mapping(file.read_bytes(), name, "`encoders:` and `tasks:`")
    # Anchors of the file, which are no part of the schema.
    values.pop("shared", None)
    for key, value in parse_overrides(overrides):
        set_by_path(values, key, value)
    return _validated(Scale, values, f"scale {name}")


Kind = TypeVar("Kind", bound=Section)


def _validated(kind: type[Kind], values: dict[str, Any], source: str) -> Kind:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"the {source} is not valid:\n{format_validation_error(error)}") from error
