"""A table whose stages are shell commands in place of trainings: each writes the output that the stage would have."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from mvd_scale.config.pipeline import Pipeline
from mvd_scale.config.reproduction import load_scale, load_table
from mvd_scale.pipelines.runner import stage_output
from mvd_scale.reproduction import runner
from mvd_scale.reproduction.expand import Expansion, expand

Shell = Callable[[str], str]
"""Function from the name of a stage to a shell command that is run before its output is written."""


@pytest.fixture
def small(tmp_path: Path) -> Expansion:
    """Table 9 in miniature, seed 0: 21 stages."""
    _, table = load_table("table9", "mini")
    return expand(load_scale("mini", []), table, [0], tmp_path / "out", "test")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Callable[[Shell], None]:
    """Replace the commands of stages by shell commands, and the work of this process by an empty file."""

    def replace(before: Shell) -> None:
        def written(pipeline: Pipeline, name: str) -> str:
            # The accuracy is the length of the name, so that stages differ.
            output = shlex.quote(str(stage_output(pipeline, name)))
            summary = f'{{"top1": {len(name) / 100}, "videos": 10}}'
            return f"{before(name) or ':'} && mkdir -p $(dirname {output}) && echo '{summary}' >{output}"

        def here(pipeline: Pipeline, name: str) -> None:
            pipeline.place(name).mkdir(exist_ok=True)
            if stage_output(pipeline, name) != pipeline.place(name) / ".":
                stage_output(pipeline, name).touch()

        monkeypatch.setattr(runner, "_command", lambda pipeline, name: ["sh", "-c", written(pipeline, name)])
        monkeypatch.setattr(runner, "run_local_stage", here)

    return replace
