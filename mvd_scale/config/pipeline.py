"""A pipeline: stages that run one after the other, the output of one the input of the next."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from mvd_scale.config.data import TestViews
from mvd_scale.config.reading import describe, parse_overrides, read_mapping, set_value
from mvd_scale.config.section import Section
from mvd_scale.errors import UserError


class AnyStage(Section):
    """What all stages have in common. `{name}` in any text stands for the folder of an earlier stage."""

    title: str = ""
    """What the stage does, for the log."""


class SamplesStage(AnyStage):
    """Cuts the real clips of the `samples` extra into its folder."""

    kind: Literal["samples"]


class IndexStage(AnyStage):
    """Probes videos into `manifest.parquet`."""

    kind: Literal["index"]

    sources: list[str] = Field(min_length=1)
    """As of `mvd-scale data index`."""

    root: str | None = None
    """Folder or URL that the paths of a list start from; the list's own if left out."""

    split: Literal["train", "validation", "test"] | None = None
    """Of a list that holds several."""

    fold: int = Field(default=1, ge=1, le=3)
    """Of HMDB51's three."""

    classes: str | None = None
    """File with the names of the classes."""


class SynthStage(AnyStage):
    """Makes labelled videos: `train/` and `test/` in its folder."""

    kind: Literal["synth"]

    label: Literal["appearance", "motion"]
    """What it lies in."""

    train: int = Field(default=100, gt=0)
    """Training videos of a class."""

    test: int = Field(default=25, gt=0)
    """Test videos of a class."""


class TrainStage(AnyStage):
    """Trains under the `deepspeed` launcher; its folder is the run's."""

    recipe: dict[str, Any]
    """A recipe, most often a `base` and what differs from it; `run.folder` is the stage's."""

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        if "run" in self.recipe:
            raise ValueError("recipe.run is the pipeline's to decide: the run lives in the folder of its stage")
        return self


class PretrainStage(TrainStage):
    """A run of `mvd-scale pretrain`, with `encoder.safetensors` at the end."""

    kind: Literal["pretrain"]


class FinetuneStage(TrainStage):
    """A run of `mvd-scale finetune`, with `classifier.safetensors` at the end."""

    kind: Literal["finetune"]


class EvaluateStage(AnyStage):
    """The multi-view test of a classifier; its folder holds scores and figures, with `summary.json` at the end."""

    kind: Literal["evaluate"]

    checkpoint: Path
    """Weights with a head, or the folder of a run of fine-tuning."""

    source: str
    """Labelled videos: a manifest, or whatever `data index` takes."""

    root: str | None = None
    """Folder or URL that the paths of a list start from."""

    views: TestViews | None = None
    """Clips and crops of each video; those that the weights were meant for if left out."""

    batch: int = Field(default=1, gt=0)
    """Videos that a rank decodes together."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""


class CompareStage(AnyStage):
    """Compares two tests of the same videos; its folder holds `comparison.json`."""

    kind: Literal["compare"]

    first: str
    """Folder of a test."""

    second: str
    """Folder of the test that it is compared with."""

    names: tuple[str, str]
    """The two in words, for the summary."""

    caption: str = ""
    """Conditions of the comparison, for the summary."""


class DrawStage(AnyStage):
    """Draws what a finished run predicts beside what is true, into the folder of that run."""

    kind: Literal["draw"]

    run: str
    """Folder of the run."""

    clips: int = Field(default=4, gt=0)
    """Clips to show."""


Stage = Annotated[
    SamplesStage | SynthStage | IndexStage | PretrainStage | FinetuneStage | EvaluateStage | CompareStage | DrawStage,
    Field(discriminator="kind"),
]


class Pipeline(Section):
    """Stages by name, in their order."""

    folder: Path
    """Holds a folder for every stage."""

    ranks: int | None = Field(default=None, gt=0)
    """Processes of each trained stage on this host; one per GPU, or two without any, if left out."""

    hostfile: Path | None = None
    """Hosts and their slots for the `deepspeed` launcher; this host alone if left out."""

    stages: dict[str, Stage] = Field(min_length=1)
    """What is done."""

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        if self.ranks is not None and self.hostfile is not None:
            raise ValueError("give either ranks or hostfile, which says the slots of each host")
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not name.isidentifier():
                raise ValueError(f"stages.{name}: a stage's name must be a word of letters, digits and underscores")
            for reference in references(stage):
                if reference not in earlier:
                    known = ", ".join(f"{{{other}}}" for other in earlier) or "none"
                    raise ValueError(f"stages.{name}: {{{reference}}} is no earlier stage; those are {known}")
            earlier.append(name)
        return self

    def place(self, name: str) -> Path:
        """Folder of a stage."""
        return self.folder / name

    def resolved(self, name: str) -> dict[str, Any]:
        """The fields of a stage with the folders of other stages put in."""
        folders = {other: str(self.place(other)) for other in self.stages}
        values = _map_texts(
            self.stages[name].model_dump(mode="json", exclude_unset=True),
            lambda text: _REFERENCE.sub(lambda found: folders[found[1]], text),
        )
        assert isinstance(values, dict)
        return values


_REFERENCE = re.compile(r"\{(\w+)\}")


def references(stage: AnyStage) -> list[str]:
    """Names of the stages whose folders a stage mentions."""
    return [name for text in _texts(stage.model_dump(mode="json")) for name in _REFERENCE.findall(text)]


def list_pipelines() -> list[str]:
    """Names of the shipped pipelines."""
    return sorted(file.name.removesuffix(".yaml") for file in (resources.files("mvd_scale") / "pipelines").iterdir())


def load_pipeline(name_or_path: str | Path, overrides: list[str] | None = None) -> Pipeline:
    """Read a pipeline by shipped name or by path and lay dotted overrides over it.

    Raises:
        UserError: it does not exist, is no YAML, or does not fit the schema; all faults are named.
    """
    shipped = resources.files("mvd_scale") / "pipelines" / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if not path.is_file() and not shipped.is_file():
        known = ", ".join(list_pipelines())
        raise UserError(f"no pipeline {str(name_or_path)!r}: give the path of a YAML file or one of {known}")
    raw = path.read_bytes() if path.is_file() else shipped.read_bytes()
    values = read_mapping(raw, str(name_or_path), "`folder:` and `stages:`")
    for key, value in parse_overrides(overrides or []):
        set_value(values, key, value)
    try:
        return Pipeline.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{name_or_path} does not describe a pipeline:\n{describe(error)}") from error


def _texts(values: Any) -> Iterator[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value)


def _map_texts(values: Any, change: Callable[[str], str]) -> Any:
    if isinstance(values, str):
        return change(values)
    if isinstance(values, dict):
        return {key: _map_texts(value, change) for key, value in values.items()}
    return [_map_texts(value, change) for value in values] if isinstance(values, list) else values
