"""Names of the checkpoints of a run: `step_N` is whole, `step_N.partial` was not written to its end."""

from __future__ import annotations

from pathlib import Path

PREFIX = "step_"
PARTIAL = ".partial"
"""Suffix of a checkpoint that was not written to its end."""

_DIGITS = 8


def checkpoint_folder(path: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` optimizer steps, in the folder of a run's checkpoints."""
    return path / f"{PREFIX}{step:0{_DIGITS}d}"


def saved_steps(path: Path) -> list[int]:
    """List the steps of a run's checkpoints, ascending, without partial and torn ones."""
    return sorted(int(folder.name.removeprefix(PREFIX)) for folder in path.glob(PREFIX + "[0-9]" * _DIGITS))
