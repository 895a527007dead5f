"""Records of finished stages: configuration and its hash, commit, seed, time on CPUs; refusal of changed ones."""

from __future__ import annotations

import hashlib
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mvd_scale
from mvd_scale.config import finetune_recipe_from_dict, recipe_from_dict
from mvd_scale.config.pipeline import FinetuneStage, Pipeline, TrainStage, references
from mvd_scale.config.reading import flatten_sections
from mvd_scale.errors import UserError
from mvd_scale.pipelines.runner import stage_output
from mvd_scale.utils.io import write_atomic

_NO_RESULT: dict[str, tuple[str, ...]] = {
    "data": ("workers", "threads", "prefetch", "read_timeout"),
    "training": ("collective_timeout_minutes", "hang_minutes"),
}
"""Keys of recipes that change no result."""

_SHOWN = 5
"""Differing keys that a message names."""


@dataclass(frozen=True)
class Record:
    """Settings, code and time that made the output of a stage."""

    config_hash: str
    """Hash of the configuration of the stage and of those from which it is made; folders do not enter it."""

    config: dict[str, Any]
    """Configuration of the stage alone, by dotted key."""

    commit: str
    """Commit of the code when the stage was started, with `+changes` if files differed from it; the version where there
    is no repository. On a cluster, when its launch file was written."""

    cpu_minutes: float | None
    """Minutes on CPUs of the start that finished it, all its processes together; None if it ran on a cluster."""

    @classmethod
    def load(cls, pipeline: Pipeline, name: str) -> Record | None:
        """Record of a stage; None if it has none."""
        file = _file(pipeline, name)
        return cls(**json.loads(file.read_text())) if file.is_file() else None

    def write(self, pipeline: Pipeline, name: str) -> None:
        """Write the record of a stage."""
        file = _file(pipeline, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(asdict(self), indent=2) + "\n")


def _file(pipeline: Pipeline, name: str) -> Path:
    return pipeline.folder / "records" / f"{name}.json"


def is_finished(pipeline: Pipeline, name: str) -> bool:
    """Whether a stage is finished."""
    return stage_output(pipeline, name).exists() and Record.load(pipeline, name) is not None


class StageConfigs:
    """Configurations of the stages of a pipeline, with all defaults of their recipes; `{name}` stands for folders.

    Args:
        pipeline: pipeline of a table.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._hashes: dict[str, str] = {}

    def record(self, name: str, cpu_minutes: float | None, commit: str) -> None:
        """Write the record of a stage that was made by the configuration that it has now, and by the code `commit`."""
        made = Record(self.hash(name), self.described(name), commit, cpu_minutes)
        made.write(self._pipeline, name)

    def check_unchanged(self) -> None:
        """Check that stages whose folders are there were made by the configurations that they have now.

        Raises:
            UserError: some were not; the message names the first one, and the keys that differ.
        """
        pipeline = self._pipeline
        changed = [
            name
            for name in pipeline.stages
            if pipeline.place(name).exists()
            and (record := Record.load(pipeline, name)) is not None
            and record.config_hash != self.hash(name)
        ]
        if changed:
            raise UserError(
                f"{pipeline.folder} holds {changed[0]} of another configuration"
                + (f", and {len(changed) - 1} others" if len(changed) > 1 else "")
                + f":\n{self._differences(changed[0])}\nGive another folder with `--output`, or remove the folder of "
                f"each of these, to make them anew: {', '.join(changed)}"
            )

    def _differences(self, name: str) -> str:
        record, wanted = Record.load(self._pipeline, name), self.described(name)
        assert record is not None
        stood = record.config
        keys = [key for key in sorted(stood.keys() | wanted.keys()) if stood.get(key) != wanted.get(key)]
        told = [f"  {key}: {stood.get(key)!r} then, {wanted.get(key)!r} now" for key in keys[:_SHOWN]]
        told += ["  and others"] if len(keys) > _SHOWN else []
        return "\n".join(told or ["  what it is made from has changed"])

    def hash(self, name: str) -> str:
        """Hash of the configuration of a stage and, recursively, of those from which it is made."""
        if name not in self._hashes:
            below = {other: self.hash(other) for other in references(self._pipeline.stages[name])}
            described = json.dumps({"stage": self.described(name), "below": below}, sort_keys=True)
            self._hashes[name] = hashlib.sha256(described.encode()).hexdigest()[:16]
        return self._hashes[name]

    def described(self, name: str) -> dict[str, Any]:
        """Configuration of a stage alone, by dotted key."""
        stage = self._pipeline.stages[name]
        values = stage.model_dump(mode="json", exclude={"title"})
        if isinstance(stage, TrainStage):
            read = finetune_recipe_from_dict if isinstance(stage, FinetuneStage) else recipe_from_dict
            recipe = read({**stage.recipe, "run": {"folder": name}}, f"stages.{name}.recipe").model_dump(mode="json")
            for section in ("run", "checkpoints", "logging"):
                del recipe[section]
            for section, keys in _NO_RESULT.items():
                for key in keys:
                    del recipe[section][key]
            values["recipe"] = recipe
        return flatten_sections(values)


def code_version() -> str:
    """Commit of the code as it lies now, with `+changes` if files differ from it; the version without a repository."""
    try:
        # The package may be installed below somebody's own repository, which does not hold it.
        _git("ls-files", "--error-unmatch", "__init__.py")
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return f"version {mvd_scale.__version__}"
    return commit + ("+changes" if changed else "")


def _git(*words: str) -> str:
    """Output of a git command in the folder of the package; `status` without a path is of the whole repository."""
    command = ["git", "-C", str(Path(mvd_scale.__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
