"""Folders that a report is made of: runs, tests, comparisons and studies, found beneath the paths of a command."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mvd_scale.evaluation.comparison import FILE as COMPARISON
from mvd_scale.run_status import SEARCH_DEPTH, is_run
from mvd_scale.utils.io import read_json_object

STUDY = "results.json"
"""File of a study's cells, see `mvd_scale.run_report.results`."""

_SKIPPED = frozenset({"checkpoints", "tensorboard", "index", "wandb", "pictures", "faults"})
"""Folders of a run that hold no other folder of a report."""


@dataclass
class Sources:
    """Folders by what they hold, each in the order of their paths."""

    runs: list[Path] = field(default_factory=list)
    tests: list[Path] = field(default_factory=list)
    comparisons: list[Path] = field(default_factory=list)
    studies: list[Path] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    """A sentence for each path that holds none of them."""

    @property
    def folders(self) -> list[Path]:
        """All folders."""
        return [*self.runs, *self.tests, *self.comparisons, *self.studies]

    def name(self, folder: Path) -> str:
        """Return the path of a folder as far as it tells it from the others."""
        common = Path(os.path.commonpath(self.folders))
        return str(folder.relative_to(common.parent if common in self.folders else common))

    @property
    def title(self) -> str:
        """Name of the deepest folder that holds all others; without any, that of the first one, and how many more."""
        common = Path(os.path.commonpath(self.folders)).name
        first, *more = self.folders
        return common or f"{first.name} and {len(more)} more"


def find_sources(paths: Sequence[Path]) -> Sources:
    """Search paths, and the folders up to four levels beneath each, for what a report shows."""
    found = Sources()
    seen: set[Path] = set()
    for path in paths:
        before = len(found.folders)
        known = False
        for real, folder in _by_real_path(_walk(path.resolve(), SEARCH_DEPTH)):
            if real in seen:
                known = True
                continue
            seen.add(real)
            _sort_in(folder, found)
        if len(found.folders) == before and not known:
            found.left_out.append(_explain(path))
    return found


def _by_real_path(folders: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Pair folders with what they are without links, once each, in the order of their paths.

    Of a folder and links to it the folder is taken.
    """
    chosen: dict[Path, Path] = {}
    for folder in sorted(folders):
        real = folder.resolve()
        if real == folder or real not in chosen:
            chosen[real] = folder
    return sorted(chosen.items(), key=lambda pair: pair[1])


def _walk(path: Path, depth: int, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield a folder and those beneath it; links are followed, except in runs and to folders `above` (resolved)."""
    real = path.resolve()
    if not path.is_dir() or real in above:
        return
    yield path
    if depth:
        # A link in a run is one to its videos or weights.
        follow = not is_run(path)
        try:
            below = [entry.name for entry in os.scandir(path) if entry.is_dir(follow_symlinks=follow)]
        except PermissionError:
            return  # somebody else's, beside the runs
        for name in below:
            if name[0] != "." and name not in _SKIPPED:
                yield from _walk(path / name, depth - 1, above | {real})


def _sort_in(folder: Path, found: Sources) -> None:
    if is_run(folder):
        found.runs.append(folder)
    elif read_json_object(folder / "summary.json").keys() & {"top1", "frame_map"}:
        found.tests.append(folder)
    if (folder / COMPARISON).is_file():
        found.comparisons.append(folder)
    if (folder / STUDY).is_file():
        found.studies.append(folder)


def _explain(path: Path) -> str:
    if not path.is_dir():
        return (
            f"{path}: {'is a file' if path.exists() else 'there is no such folder'}; expected a folder of runs or tests"
        )
    return (
        f"{path} holds no run and no finished evaluation: expected recipe.yaml of a run, summary.json of a test, or "
        f"{STUDY} of a study in it, or in a folder up to {SEARCH_DEPTH} levels below"
    )
