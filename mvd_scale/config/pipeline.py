"""Schema of a pipeline: stages that run one after the other; a stage may use the outputs of earlier stages."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from mvd_scale.config.data import TestViews
from mvd_scale.config.reading import format_validation_error, parse_overrides, parse_yaml_mapping, set_by_path
from mvd_scale.config.section import Section
from mvd_scale.errors import UserError


class BaseStage(Section):
    """Base of all stages. `{name}` in any text value is replaced by the folder of the earlier stage `name`."""

    title: str = ""
    """Description of the stage, for the log."""


class SamplesStage(BaseStage):
    """Stage that writes the sample clips of the `samples` extra into its folder."""

    kind: Literal["samples"]


class IndexStage(BaseStage):
    """Stage that probes videos and writes `manifest.parquet`."""

    kind: Literal["index"]

    sources: list[str] = Field(min_length=1)
    """Sources, as the arguments of `mvd-scale data index`."""

    root: str | None = None
    """Folder or URL to which the paths of a list are relative; the folder of the list if omitted."""

    split: Literal["train", "validation", "test"] | None = None
    """Split to take from a list that holds several; all of them if omitted."""

    fold: int = Field(default=1, ge=1, le=3)
    """Official split of HMDB51: 1, 2 or 3."""

    classes: str | None = None
    """File with the names of the classes."""


class SynthStage(BaseStage):
    """Stage that makes labelled synthetic videos in the folders `train/`, `validation/` and `test/` of its folder."""

    kind: Literal["synth"]

    label: Literal["appearance", "motion", "object", "direction"]
    """Property that the label describes: the appearance of an object, or the direction of motion, left or right; or
    texture and direction, one of eight, of an object that crosses a dim scene."""

    train: int = Field(default=100, gt=0)
    """Number of training videos per class."""

    test: int = Field(default=25, gt=0)
    """Number of test videos per class."""

    validation: int = Field(default=0, ge=0)
    """Number of validation videos per class; without any, the test has their objects too."""

    seed: int = Field(default=0, ge=0)
    """Seed of all random choices."""


class TrainStage(BaseStage):
    """Base of stages that train under the `deepspeed` launcher; the folder of the stage is the folder of the run."""

    recipe: dict[str, Any]
    """Recipe, usually a `base` and the values that differ from it; `run.folder` is set to the folder of the stage."""

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        if "run" in self.recipe:
            raise ValueError("recipe.run is set by the pipeline, to the folder of the stage: remove it")
        return self


class PretrainStage(TrainStage):
    """Stage that runs `mvd-scale pretrain` and writes `encoder.safetensors`."""

    kind: Literal["pretrain"]


class FinetuneStage(TrainStage):
    """Stage that runs `mvd-scale finetune` and writes `classifier.safetensors`."""

    kind: Literal["finetune"]


class EvaluateStage(BaseStage):
    """Stage that runs the multi-view test of a classifier and writes scores, figures and `summary.json`."""

    kind: Literal["evaluate"]

    checkpoint: Path
    """File of weights with a classification head, or the folder of a fine-tuning run."""

    source: str
    """Labelled videos: a manifest, or any other source that `data index` accepts."""

    root: str | None = None
    """Folder or URL to which the paths of a list are relative; the folder of the list if omitted."""

    views: TestViews | None = None
    """Clips and crops of each video; the views stored with the weights if omitted."""

    batch: int = Field(default=1, gt=0)
    """Number of videos per batch of a rank."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the test. `auto`: a GPU if there is one, else the CPU."""


class ProbeStage(BaseStage):
    """Stage that judges a frozen encoder by a linear layer on its features; its folder holds `linear/summary.json`."""

    kind: Literal["probe"]

    checkpoint: Path
    """Weights of the encoder, in any format that `mvd-scale inspect` knows."""

    train: str
    """Labelled videos to fit the layer to, as `source` of a test."""

    test: str
    """Labelled videos to judge it on, with the same classes."""

    stride: int = Field(default=4, gt=0)
    """Frames from one sampled frame of a clip to the next; one clip from the middle of each video."""

    decay: float = Field(default=1e-3, ge=0)
    """L2 penalty of the layer."""

    batch: int = Field(default=8, gt=0)
    """Number of videos per batch of a rank."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device of the encoder. `auto`: a GPU if there is one, else the CPU."""


class CompareStage(BaseStage):
    """Stage that compares two tests of the same videos; its folder holds `comparison.json`."""

    kind: Literal["compare"]

    first: str
    """Folder of a test."""

    second: str
    """Folder of the test that the first one is compared with."""

    names: tuple[str, str]
    """Names of the two tests in the summary."""

    caption: str = ""
    """Conditions of the comparison, printed below the summary."""


class DrawStage(BaseStage):
    """Stage that draws the predictions of a finished run beside the ground truth, into the folder of that run."""

    kind: Literal["draw"]

    run: str
    """Folder of the run."""

    clips: int = Field(default=4, gt=0)
    """Number of clips to show."""


Stage = Annotated[
    SamplesStage
    | SynthStage
    | IndexStage
    | PretrainStage
    | FinetuneStage
    | EvaluateStage
    | ProbeStage
    | CompareStage
    | DrawStage,
    Field(discriminator="kind"),
]


class Pipeline(Section):
    """Pipeline: stages by name, in the order in which they run."""

    folder: Path
    """Folder that holds a folder for every stage."""

    ranks: int | None = Field(default=None, gt=0)
    """Number of ranks of each training or test stage on this host; if omitted, one per GPU, or two without a GPU."""

    hostfile: Path | None = None
    """File of hosts and their slots for the `deepspeed` launcher; only this host if omitted."""

    stages: dict[str, Stage] = Field(min_length=1)
    """Stages by name, in the order in which they run."""

    @model_validator(mode="after")
    def _check_references(self) -> Self:
        if self.ranks is not None and self.hostfile is not None:
            raise ValueError("give either ranks or hostfile, which states the slots of each host, not both")
        earlier: list[str] = []
        for name, stage in self.stages.items():
            if not name.isidentifier():
                raise ValueError(
                    f"stages.{name}: the name of a stage must consist of letters, digits and underscores, and must not "
                    "begin with a digit"
                )
            for reference in references(stage):
                if reference not in earlier:
                    known = ", ".join(f"{{{other}}}" for other in earlier) or "none"
                    raise ValueError(
                        f"stages.{name}: {{{reference}}} is not an earlier stage: expected one of these: {known}"
                    )
            earlier.append(name)
        return self

    def place(self, name: str) -> Path:
        """Folder of a stage."""
        return self.folder / name

    def resolved(self, name: str) -> dict[str, Any]:
        """Fields of a stage, in which each `{name}` is replaced by the folder of that stage."""
        folders = {other: str(self.place(other)) for other in self.stages}
        values = self.stages[name].model_dump(mode="json", exclude_unset=True)
        resolved: dict[str, Any] = replace_references(values, folders)
        return resolved


_REFERENCE = re.compile(r"\{(\w+)\}")


def references(stage: BaseStage) -> list[str]:
    """Names of the stages to whose folders a stage refers."""
    return find_references(stage.model_dump(mode="json"))


def find_references(values: Any) -> list[str]:
    """Names in braces in the texts of nested mappings and lists."""
    return [name for text in _texts(values) for name in _REFERENCE.findall(text)]


def replace_references(values: Any, texts: Mapping[str, str]) -> Any:
    """Replace each `{name}` in nested mappings and lists by the text of that name; unknown names stay."""
    return _map_texts(values, lambda text: _REFERENCE.sub(lambda found: texts.get(found[1], found[0]), text))


def list_pipelines() -> list[str]:
    """Names of the shipped pipelines."""
    return sorted(
        file.name.removesuffix(".yaml")
        for file in (resources.files("mvd_scale") / "pipelines").iterdir()
        if file.name.endswith(".yaml")
    )


def load_pipeline(name_or_path: str | Path, overrides: list[str] | None = None) -> Pipeline:
    """Read a pipeline by its shipped name or its path, and apply dotted overrides.

    Raises:
        UserError: the pipeline does not exist, is not valid YAML, or does not match the schema; the message names all
            faults.
    """
    shipped = resources.files("mvd_scale") / "pipelines" / f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if not path.is_file() and not shipped.is_file():
        known = ", ".join(list_pipelines())
        raise UserError(f"no pipeline {str(name_or_path)!r}: give the path of a YAML file or one of {known}")
    raw = path.read_bytes() if path.is_file() else shipped.read_bytes()
    values = parse_yaml_mapping(raw, str(name_or_path), "`folder:` and `stages:`")
    for key, value in parse_overrides(overrides or []):
        set_by_path(values, key, value)
    try:
        return Pipeline.model_validate(values)
    except ValidationError as error:
        raise UserError(f"the pipeline {name_or_path} is not valid:\n{format_validation_error(error)}") from error


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
