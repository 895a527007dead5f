"""The folder of a run: its recipe, and the promise that nothing in it is overwritten by another run."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvd_scale.capabilities import probe, table
from mvd_scale.config import RunRecipe, load_any
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError


class RunFolder:
    """Paths of a run. Everything it writes lives here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.txt"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.manifest = path / "manifest.parquet"
        self.index = path / "index"
        self.pictures = path / "pictures"
        self.probe = path / "probe.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.encoder = path / "encoder.safetensors"
        self.best = path / "best.safetensors"
        self.validation = path / "validation.jsonl"
        self.tested = path / "validation" / "manifest.parquet"
        self.student = path / "student.safetensors"
        self.summary = path / "summary.json"

    def check(self, recipe: RunRecipe) -> None:
        """See that the folder is free or holds this very run; a run that never took a step holds nothing.

        Raises:
            UserError: it holds a run of another recipe (the differing keys are named) or something that is no run.
        """
        if self._begun:
            stands = load_any(self.recipe).identity()
            wanted = recipe.identity()
            differing = [
                f"  {key}: the run there has {stands.get(key, 'nothing')!r}, this one {wanted.get(key, 'nothing')!r}"
                for key in sorted(stands.keys() | wanted.keys())
                if stands.get(key) != wanted.get(key)
            ]
            if differing:
                raise UserError(
                    f"{self.path} holds another run:\n"
                    + "\n".join(differing)
                    + "\nChoose another folder with `--run.folder`, or move that one away"
                )
        elif self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()) and not self.lock.exists()):
            raise UserError(
                f"{self.path} exists and holds no run of mvd-scale; choose an empty or new folder with `--run.folder`"
            )

    @property
    def _begun(self) -> bool:
        return self.metrics.is_file() or self.checkpoints.is_dir()

    def claim(self) -> None:
        """Make the folder and keep other processes out of it.

        Raises:
            UserError: another process trains here, or the folder cannot be written.
        """
        try:
            self.index.mkdir(parents=True, exist_ok=True)
            self._lock = self.lock.open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process is training in {self.path}; wait for it or choose another `--run.folder`"
            ) from error
        except OSError as error:
            raise UserError(f"run.folder {self.path} cannot be written: {error.strerror}") from error

    def record(self, recipe: RunRecipe, manifest: Manifest) -> None:
        """Write the resolved recipe, the videos and what the machine is.

        Raises:
            UserError: the run there was on other videos; nothing was overwritten.
        """
        if self._begun and self.manifest.is_file() and Manifest.load(self.manifest).digest != manifest.digest:
            raise UserError(
                f"{self.path} holds a run on other videos than those of {manifest.source}: give it the same, or choose "
                "another folder with `--run.folder`"
            )
        write_whole(self.recipe, recipe.to_yaml())
        write_whole(self.environment, table(probe()) + "\n")
        manifest.save(self.manifest)

    def finished_at(self, step: int, origin: Mapping[str, Any]) -> bool:
        """Whether the run has come to its end after `step` optimizer steps.

        Raises:
            UserError: it has, but from other data or weights than `origin` says.
        """
        summary = json.loads(self.summary.read_text()) if self.summary.is_file() else None
        if summary is None or summary["steps"] != step:
            return False
        differing = [key for key, value in origin.items() if summary["origin"][key] != value]
        if differing:
            raise UserError(
                f"{self.path} holds a finished run with other {', '.join(differing)} than this start has: choose "
                "another folder with `--run.folder`, or move that one away"
            )
        return True

    def finish(self, summary: dict[str, Any]) -> None:
        """Leave the mark and the figures of a run that has come to its end."""
        write_whole(self.summary, json.dumps(summary, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text file that appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
