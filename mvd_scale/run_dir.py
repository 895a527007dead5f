"""Folder of a run: paths of its files, and checks that no other run overwrites them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvd_scale.config import RunRecipe, load_any_recipe
from mvd_scale.config.recipe import student_folder
from mvd_scale.data.loaders.dali_failures import FAILURES_FILE
from mvd_scale.data.loaders.quarantine import Quarantine
from mvd_scale.data.manifest import Manifest
from mvd_scale.errors import UserError
from mvd_scale.utils.env_report import collect_capabilities, format_capabilities
from mvd_scale.utils.events import EventLog
from mvd_scale.utils.io import write_atomic
from mvd_scale.utils.lease import Lease


class RunFolder:
    """Paths of all files that a run writes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lease_file = path / "lease.json"
        self.lease: Lease | None = None
        self.started = False
        self.recipe = path / "recipe.yaml"
        self.environment = path / "environment.txt"
        self.bf16_trial = path / "bf16_trial.json"
        self.metrics = path / "metrics.jsonl"
        self.events = path / "events.jsonl"
        self.faults = path / "faults"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb.json"
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

    def of_student(self, name: str) -> RunFolder:
        """Run folder of one of several students of this run; this folder itself for an empty name."""
        return RunFolder(student_folder(self.path, name)) if name else self

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
        elif self.path.is_file() or (self.path.is_dir() and any(self.path.iterdir()) and not self.lease_file.exists()):
            raise UserError(
                f"{self.path} exists and holds no run of mvd-scale; choose an empty or new folder with `--run.folder`"
            )

    @property
    def _begun(self) -> bool:
        students = any(self.path.glob("students/*/checkpoints"))
        return self.metrics.is_file() or self.checkpoints.is_dir() or students

    def claim(self) -> None:
        """Create the folder and lease it against other processes, on this host and others.

        Raises:
            UserError: another process trains in the folder, or it cannot be written.
        """
        try:
            self.index.mkdir(parents=True, exist_ok=True)
            self.lease = Lease(self.lease_file)
        except OSError as error:
            raise UserError(f"run.folder {self.path} cannot be written: {error.strerror}") from error

    def check_lease(self) -> None:
        """Check that no other process has taken the folder over; does nothing in a process that has not claimed it.

        Raises:
            UserError: another process trains in the folder now.
        """
        if self.lease is not None:
            self.lease.check()

    def release(self) -> None:
        """Let other processes train in the folder; does nothing in a process that has not claimed it."""
        if self.lease is not None:
            self.lease.release()

    def open_quarantine(self) -> Quarantine:
        """Create the record of videos that cannot be decoded, which writes to the event log too."""
        return Quarantine(self.quarantine, EventLog(self.events))

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
            for file in (self.dali_failures, self.quarantine):
                file.unlink(missing_ok=True)
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
        """Write the summary, which marks the run as finished.

        Raises:
            UserError: another process has taken the folder over.
        """
        self.check_lease()
        write_atomic(self.summary, json.dumps(summary, indent=2) + "\n")
