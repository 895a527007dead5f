"""Names of the checkpoints of a run, and which of them count where several students are saved together.

`step_N` is whole, `step_N.partial` was not written to its end, `step_N.torn` lost files or bytes, and `step_N.ahead` is
whole, but the other students of the run had none of that step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

PREFIX = "step_"
PARTIAL = ".partial"
"""Suffix of a checkpoint that was not written to its end."""

AHEAD = ".ahead"
"""Suffix of a whole checkpoint that was set aside because not all students of its run have one of that step."""

_DIGITS = 8


def checkpoint_folder(path: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps, in the folder of a run's checkpoints."""
    return path / f"{PREFIX}{step:0{_DIGITS}d}"


def partial_folder(path: Path, step: int) -> Path:
    """Folder of that checkpoint while it is being written."""
    return path / f"{checkpoint_folder(path, step).name}{PARTIAL}"


def saved_steps(path: Path) -> list[int]:
    """List the steps of a run's checkpoints, ascending, without partial and torn ones."""
    return sorted(int(folder.name.removeprefix(PREFIX)) for folder in path.glob(PREFIX + "[0-9]" * _DIGITS))


def common_steps(paths: Sequence[Path]) -> list[int]:
    """List the steps of which every one of several folders of checkpoints has one, ascending."""
    return sorted(set.intersection(*(set(saved_steps(path)) for path in paths)))
