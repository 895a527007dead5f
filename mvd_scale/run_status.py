"""State of runs from the files in their folders: alive or not, how far, how fast, and what went wrong.

Only files are read, which rank 0 and `mvd-scale supervise` write. Any of them may be missing, partial or of an older
run.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from mvd_scale.config import DetectionRecipe, load_any_recipe
from mvd_scale.errors import UserError
from mvd_scale.run_dir import RunFolder
from mvd_scale.training.checkpointing.folders import checkpoint_folder, common_steps
from mvd_scale.utils.events import first_faults, read_events
from mvd_scale.utils.io import last_metrics, read_json_object, read_metrics
from mvd_scale.utils.lease import RENEW_SECONDS, STALE_RENEWALS, LeaseView, look_at_lease

State = Literal["running", "finished", "stopped", "failed", "dead", "stale", "unknown"]
"""`running`: its process is alive. `finished`: all steps are done. `stopped`: it ended by a signal, after a checkpoint.
`failed`: it ended by an error. `dead`: its process on this host is gone, without a word. `stale`: its process on
another host has not renewed the lease. `unknown`: there is no lease, as in folders of older runs."""

_QUIET_SECONDS = 600.0
"""Age of the last reading of a running run above which a note tells it."""

SEARCH_DEPTH = 4
"""Levels of folders beneath a path in which runs are looked for."""


@dataclass(frozen=True)
class Checkpoint:
    """Newest checkpoint of a run."""

    step: int
    age_seconds: float


@dataclass(frozen=True)
class Fault:
    """Fault of a rank, host or link."""

    time: str
    """UTC, ISO 8601."""
    message: str


@dataclass(frozen=True)
class RunStatus:
    """State of one run. Values that no file tells are None."""

    path: Path
    state: State
    note: str = ""
    """Reason of the state, if there is more to say."""
    step: int = 0
    """Step of the last reading."""
    total_steps: int | None = None
    reading_age_seconds: float | None = None
    loss: float | None = None
    clips_per_second: float | None = None
    seconds_per_step: float | None = None
    eta_seconds: float | None = None
    """Seconds to the last step at the speed of the last reading; None unless the run is running."""
    checkpoint: Checkpoint | None = None
    ranks: int | None = None
    hosts: dict[str, int] = field(default_factory=dict)
    """Number of ranks by host."""
    restarts: int = 0
    faults: int = 0
    """Starts of the processes that ended by a fault."""
    last_fault: Fault | None = None
    quarantined: int = 0
    """Videos that cannot be decoded."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON types."""
        return {**asdict(self), "path": str(self.path)}


def find_runs(path: Path) -> list[Path]:
    """List the run folders that a path stands for: itself, or those beneath it; with those of students.

    Raises:
        UserError: there are none.
    """
    if not path.is_dir():
        raise UserError(f"{path}: expected the folder of a run, or a folder of runs, but there is no such folder")
    runs = sorted(_walk(path, SEARCH_DEPTH))
    if not runs:
        raise UserError(
            f"{path} holds no run: expected recipe.yaml in it, or in a folder up to {SEARCH_DEPTH} levels below"
        )
    return runs


def is_run(path: Path) -> bool:
    """Whether a folder has any of the files by which a run is known."""
    folder = RunFolder(path)
    return any(file.is_file() for file in (folder.lease_file, folder.recipe, folder.metrics))


def _walk(path: Path, depth: int) -> Iterator[Path]:
    if is_run(path):
        yield path
        # A run of several students is followed by theirs.
        yield from (student for student in path.glob("students/*") if student.is_dir())
    elif depth:
        try:
            below = [Path(entry.path) for entry in os.scandir(path) if entry.is_dir() and entry.name[0] != "."]
        except PermissionError:
            return  # somebody else's, beside the runs
        for folder_below in below:
            yield from _walk(folder_below, depth - 1)


def read_statuses(runs: Iterable[Path], patience: float = 1.2 * RENEW_SECONDS) -> list[RunStatus]:
    """Read the state of runs.

    A lease of another host that looks old is watched once, for all runs together: clocks of hosts may differ.

    Args:
        runs: folders of runs.
        patience: seconds to watch.
    """
    folders = [RunFolder(path) for path in runs]
    views = [look_at_lease(folder.lease_file) for folder in folders]
    if any(view.alive is None and not _is_recent(view) for view in views):
        time.sleep(patience)
    return [_read_tolerant(folder, view) for folder, view in zip(folders, views, strict=True)]


def _read_tolerant(folder: RunFolder, view: LeaseView) -> RunStatus:
    """Read the state of a run; a file that cannot be read is told in the note."""
    try:
        return _read(folder, view.alive if view.alive is not None else _is_alive(view, folder), view)
    except OSError as error:
        return RunStatus(folder.path, "unknown", f"cannot be read: {error}")


def _is_recent(view: LeaseView) -> bool:
    if view.holder is None:
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(view.holder.renewed)
    return abs(age.total_seconds()) < STALE_RENEWALS * RENEW_SECONDS


def _is_alive(view: LeaseView, folder: RunFolder) -> bool:
    """Whether the holder on another host has renewed its lease lately, or since the first look."""
    return _is_recent(view) or look_at_lease(folder.lease_file).content != view.content


def _read(folder: RunFolder, alive: bool, view: LeaseView) -> RunStatus:
    now = time.time()
    events = read_events(folder.events)
    reading = last_metrics(folder.metrics) or {}
    start = _last(events, "start")
    step, total = int(reading.get("step", 0)), start.get("steps") or _total_steps(folder)
    state, note = _judge(folder, alive, view, events, step)
    seconds = reading.get("seconds_per_step")
    remaining = (total - step) * seconds if total is not None and seconds is not None and state == "running" else None
    faults = first_faults(events)
    checkpoint = _checkpoint(folder, now)
    return RunStatus(
        path=folder.path,
        state=state,
        note=note,
        step=step,
        total_steps=total,
        reading_age_seconds=_age(folder.metrics, now) if reading else None,
        loss=reading.get("loss"),
        clips_per_second=reading.get("clips_per_second"),
        seconds_per_step=seconds,
        eta_seconds=remaining,
        checkpoint=checkpoint,
        ranks=start.get("ranks") or _ranks_of(folder, checkpoint),
        hosts=start.get("hosts") or {},
        restarts=sum(event.get("event") == "restart" for event in events),
        faults=len(faults),
        last_fault=Fault(faults[-1].get("time", ""), faults[-1].get("message", "")) if faults else None,
        quarantined=_count_videos(folder.quarantine),
    )


def _judge(
    folder: RunFolder, alive: bool, view: LeaseView, events: list[dict[str, Any]], step: int
) -> tuple[State, str]:
    """Tell the state of a run, and its reason."""
    if alive:
        return "running", _note_of_running(folder, step)
    if step and read_json_object(folder.summary).get("steps") == step:
        return "finished", ""
    if view.content is None:
        return "unknown", "there is no lease.json"
    holder = view.holder
    if holder is None:
        return "stale", "lease.json cannot be read"
    if holder.released:
        end = _last(events, "end")
        if end.get("reason") == "stopped":
            return "stopped", f"exit code {end.get('exit_code')}"
        return "failed", str(end.get("message") or "it did not say why")
    names = [event.get("event") for event in events]
    said = str(_last(events, "fault").get("message", "")) if "fault" in names[_index(names, "start") :] else ""
    seen = f"process {holder.pid} of host {holder.host} renewed its lease last at {holder.renewed}"
    return "stale" if view.alive is None else "dead", said or seen


def _note_of_running(folder: RunFolder, step: int) -> str:
    if not step:
        return "no reading yet"
    age = _age(folder.metrics, time.time()) or 0.0
    return f"the last reading is {age / 60:.0f} minutes old" if age > _QUIET_SECONDS else ""


def _index(names: list[Any], name: str) -> int:
    """Index of the last occurrence of a name; 0 without one."""
    return max((number for number, other in enumerate(names) if other == name), default=0)


def _last(events: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next((event for event in reversed(events) if event.get("event") == name), {})


def _total_steps(folder: RunFolder) -> int | None:
    """Last step of a run without an event `start`, by its recipe and its manifest."""
    from mvd_scale.data.manifest import Manifest
    from mvd_scale.data.sampling.sampler import steps_per_epoch
    from mvd_scale.training.lr_schedule import Schedule

    if not folder.recipe.is_file() or not folder.manifest.is_file():
        return None
    try:
        recipe = load_any_recipe(folder.recipe)
        if isinstance(recipe, DetectionRecipe):
            return None  # its epochs count key frames, which the manifest does not list
        steps = steps_per_epoch(Manifest.load(folder.manifest), recipe.data, recipe.training.global_batch)
    except (UserError, OSError, ValueError):
        return None  # written by another version
    return Schedule(recipe.training, steps, recipe.lr_batch).last_step


def _checkpoint(folder: RunFolder, now: float) -> Checkpoint | None:
    students = [RunFolder(path).checkpoints for path in sorted(folder.path.glob("students/*"))]
    paths = students or [folder.checkpoints]
    for step in reversed(common_steps(paths)):
        age = _age(checkpoint_folder(paths[0], step), now)
        if age is not None:
            return Checkpoint(step, age)
    return None


def _ranks_of(folder: RunFolder, checkpoint: Checkpoint | None) -> int | None:
    if checkpoint is None:
        return None
    layout = read_json_object(checkpoint_folder(folder.checkpoints, checkpoint.step) / "state.json").get("layout")
    return layout.get("ranks") if isinstance(layout, dict) else None


def _count_videos(path: Path) -> int:
    if not path.is_file():
        return 0
    return len({line.get("row") for line in read_metrics(path)})


def _age(path: Path, now: float) -> float | None:
    try:
        return max(now - path.stat().st_mtime, 0.0)
    except FileNotFoundError:
        return None  # deleted since it was listed
