"""Folder of a run: paths of its files, and checks that no other run overwrites them."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvd_scale.config import RunRecipe, load_any_recipe
from mvd_scale.data.loaders.dali_failures import FAILURES_FILE
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError
from mvd_scale.utils.env_report import collect_capabilities, format_capabilities
from mvd_scale.utils.io import write_atomic


class RunFolder:
    """Paths of all files that a run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lock = path / ".lock"
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.txt"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.faults = path / "faults"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.manifest = path / "manifest.parquet"
        self.index = path / "index"
        self.pictures = path / "pictures"
        self.probe = path / "probe.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.dali_failures = path / FAILURES_FILE
        self.encoder = path / "encoder.safetensors"
        self.best = path / "best.safetensors"
        self.validation = path / "validation.jsonl"
        self.tested = path / "validation" / "manifest.parquet"
        self.student = path / "student.safetensors"
        self.summary = path / "summary.json"

    def check(self, recipe: RunRecipe) -> None:
        """Check that the folder is free or holds this run; a run without any finished step counts as free.

        Raises:
            UserError: the folder holds a run of another recipe (the message lists the keys that differ), or files that
                are no run.
        """
        if self._begun:
            stands = load_any_recipe(self.recipe).identity()
            wanted = recipe.identity()
            differing = [
                f"  {key}: that run has {stands.get(key, 'nothing')!r}, this one {wanted.get(key, 'nothing')!r}"
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
        """Create the folder and lock it against other processes.

        Raises:
            UserError: another process trains in the folder, or it cannot be written.
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
        """Write the resolved recipe, the manifest of the videos and a description of the machine.

        Raises:
            UserError: the folder holds a run on other videos; nothing was overwritten.
        """
        if self._begun and self.manifest.is_file() and Manifest.load(self.manifest).digest != manifest.digest:
            raise UserError(
                f"{self.path} holds a run on other videos than those of {manifest.source}: give it the same, or choose "
                "another folder with `--run.folder`"
            )
        if not self._begun:
            # An earlier start that finished no step may have had other videos.
            self.dali_failures.unlink(missing_ok=True)
        write_atomic(self.recipe, recipe.to_yaml())
        write_atomic(self.environment, format_capabilities(collect_capabilities()) + "\n")
        manifest.save(self.manifest)

    def is_finished(self, step: int, origin: Mapping[str, Any]) -> bool:
        """Whether the run has finished, after `step` optimizer steps.

        Raises:
            UserError: it has finished, but with other data or weights than those in `origin`.
        """
        summary = json.loads(self.summary.read_text()) if self.summary.is_file() else None
        if summary is None or summary["steps"] != step:
            return False
        differing = [key for key, value in origin.items() if summary["origin"][key] != value]
        if differing:
            raise UserError(
                f"{self.path} holds a finished run with other {', '.join(differing)} than this command: choose "
                "another folder with `--run.folder`, or move that one away"
            )
        return True

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which marks the run as finished."""
        write_atomic(self.summary, json.dumps(summary, indent=2) + "\n")
